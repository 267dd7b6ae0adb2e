"""The data section's keys reach the data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernietune.checkpoint.processor import Processor
from ernietune.config import DataSection
from ernietune.data.build import dataset_of, processor_for
from ernietune.data.dataset import Sample
from ernietune.initialize import initialize

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
TINY = Path(__file__).parents[2] / "data" / "tiny"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("model") / "m"
    return processor_for(str(initialize("demo-vl", folder, dtype="float32", tokenizer=TINY)))


def trained(processor: Processor, data: DataSection) -> list[int]:
    """Trained tokens of the samples of ERNIEKit's picture record, in which two answers are one word each."""
    samples = dataset_of(data, [str(SAMPLES / "erniekit_vl.json")], processor).samples(0)
    return [sample.trained for sample in samples if isinstance(sample, Sample)]


def test_which_answers_are_trained(processor: Processor) -> None:
    assert trained(processor, DataSection()) == [2, 2]
    assert trained(processor, DataSection(train_on="last")) == [2]
    assert trained(processor, DataSection(train_all_turns=True)) == [4]


def test_form_and_shares(processor: Processor) -> None:
    paths = [str(SAMPLES / name) for name in ("messages.jsonl", "alpaca.json")]
    recognised = dataset_of(DataSection(), paths, processor)
    assert (recognised.forms, recognised.weights) == (["messages", "alpaca"], None)
    said = dataset_of(DataSection(format="sharegpt"), paths, processor, [1.0, 2.0])
    assert (said.forms, said.weights) == (["sharegpt"] * 2, [1.0, 2.0])
    assert len(said.order(None, 0)) == 3
