"""A tensor group with slices of the rows and of the vocabulary: exact gradients, and less that is kept."""

from __future__ import annotations

import json

import parallel_cases
import pytest
import tensor_work


@pytest.fixture(scope="module", params=[2])
def found(tmp_path_factory):
    """What the group found; its processes work on everything in turn."""
    folder = tmp_path_factory.mktemp("tensor")
    script = [parallel_cases.ROOT / "tests" / "tensor_work.py", folder / "found.json"]
    parallel_cases.finish(parallel_cases.start_script(2, script, folder), folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", tensor_work.CASES)
def test_gradients_are_those_of_one_process(found, case):
    """Of adapters on both sides of every product, of norms and routers; an odd number of tokens, pictures."""
    assert found[case]["losses"] < 1e-5
    assert found[case]["difference"] < 2e-5, found[case]
    assert found[case]["parameters"] >= (20 if "dropout" in case else 60)


def test_a_process_keeps_a_slice_of_the_rows(found):
    rows = 1000 * 64 * 4  # tokens, width, bytes
    alone, divided = found["kept"]["layers"]
    assert alone == pytest.approx(rows, rel=0.02)
    assert divided == pytest.approx(rows / 2, rel=0.02)
    alone, divided = found["kept"]["none"]
    assert divided < 0.6 * alone
