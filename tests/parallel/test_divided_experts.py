"""Divided experts against the whole layer: results and gradients, plain and by the kernels of a GPU."""

from __future__ import annotations

import json

import divided_experts
import numpy as np
import parallel_cases
import pytest

from ernietune.parallel.experts import by_expert


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of both processes, by case."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("divided")
    started = parallel_cases.start_script(2, [divided_experts.__file__, folder], folder)
    parallel_cases.finish(started, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("path", ["plain", "kernels"])
@pytest.mark.parametrize("name", divided_experts.CASES)
def test_divided_experts_are_the_whole_layer(differences, name, path):
    # Beside codes, kernels give the gradients of factors in bfloat16.
    coarse = 2**-8 if path == "kernels" and name in divided_experts.FORMS else 1e-5
    for found in differences:
        for what, difference in found[f"{name}, {path}"].items():
            assert difference <= (coarse if what.startswith("factors") else 1e-5), what


@pytest.mark.parametrize("senders", [1, 2, 8])
@pytest.mark.parametrize("most", [1, 2, 30])
def test_the_order_by_expert_is_that_of_a_stable_sort(senders, most):
    counts = np.random.default_rng(senders).integers(0, most, (senders, 6))
    kinds = np.repeat(np.tile(np.arange(6), senders), counts.reshape(-1))
    found = by_expert(counts)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.argsort(kinds, kind="stable"))
