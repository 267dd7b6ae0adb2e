"""Configuration files: every mistake is one sentence with file, line, key path and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ernietune.config import Config, key_paths, load, save
from ernietune.config_rules import value_of
from ernietune.errors import ConfigError

GOOD = """\
model:
  path: some/folder
data:
  train: [a.jsonl]
train:
  output: runs/x
  steps: 100
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write_file


def complaint(file: Path, *overrides: str) -> str:
    """The text of the error, with the folder cut off; always one line."""
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(file), "run.yaml")


def test_file_overrides_and_defaults_come_together(write: Write) -> None:
    config = load(write(GOOD + "  learning_rate: 2e-4\n"), ["train.steps=7", "lora.targets=[mlp, vision]"])
    assert config.model.path == "some/folder"
    assert config.train.learning_rate == 2e-4
    assert config.train.steps == 7
    assert config.lora.targets == ["mlp", "vision"]
    assert config.lora.rank == Config().lora.rank


def test_override_beats_the_file_and_null_unsets(write: Write) -> None:
    config = load(write(GOOD), ["train.steps=null", "train.epochs=2", "train.clip_norm=null"])
    assert (config.train.steps, config.train.epochs, config.train.clip_norm) == (None, 2, None)


def test_saved_configuration_reads_back_equal(write: Write, tmp_path: Path) -> None:
    config = load(
        write(GOOD), ["lora.alpha=12.5", "data.enable_thinking=false", "train.min_learning_rate=1e-7"]
    )
    save(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == config


def test_two_loads_share_nothing(write: Write) -> None:
    first, second = load(write(GOOD)), load(write(GOOD))
    first.lora.targets.append("vision")
    assert second.lora.targets == Config().lora.targets


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  learning_rat: 1e-4", "unknown key `train.learning_rat`; did you mean `train.learning_rate`?"),
        ("  rank: 8", "unknown key `train.rank`; did you mean `lora.rank`?"),
        ("  max_length: 8", "unknown key `train.max_length`; did you mean `data.max_length`?"),
        ("trian:", "unknown key `trian`; did you mean `train`?"),
        ("zzz: 1", "unknown key `zzz`; sections are model, lora, data, train, dpo, parallel"),
        ("  steps: 5", "`train.steps` stands twice (first in line 7); keep one"),
    ],
)
def test_keys(write: Write, line: str, expected: str) -> None:
    assert complaint(write(f"{GOOD}{line}\n")) == f"run.yaml:8: {expected}"


def test_keys_of_other_tools_are_refused_not_ignored(write: Write) -> None:
    assert complaint(write(f"{GOOD}lora_rank: 8\n")).startswith("run.yaml:8: unknown key `lora_rank`")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("  rows: two", "train.rows"),
        ("  rows: 1.5", "train.rows"),
        ("  rows: null", "train.rows"),
        ("  learning_rate: fast", "train.learning_rate"),
        ("  recompute: perhaps", "train.recompute"),
        ("  rows: [1]", "train.rows"),
    ],
)
def test_wrong_type(write: Write, line: str, key: str) -> None:
    text = complaint(write(f"{GOOD}{line}\n"))
    assert text.startswith(f"run.yaml:8: `{key}`")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("recompute: every-1", "train.recompute` is 'every-1'; every-n needs a whole number from 2"),
        ("recompute: norm+norm", "train.recompute` is 'norm+norm'; it must be none, layers, every-n, auto"),
        ("recompute: layers+norm", "train.recompute` is 'layers+norm'; it must be none, layers"),
        ("offload: disk", "train.offload` is 'disk'; it must be none, or of activations, optimizer, weights"),
        ("recompute: auto-0", "train.recompute` is 'auto-0'; auto-n needs the GiB that it may use"),
        ("recompute: auto-x", "train.recompute` is 'auto-x'; auto-n needs the GiB that it may use"),
    ],
)
def test_ways_of_saving_memory(write: Write, lines: str, problem: str) -> None:
    assert problem in complaint(write(f"{GOOD}  {lines}\n"))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("true", "layers"),
        ("false", "none"),
        ("every-4", "every-4"),
        ("norm+attention", "norm+attention"),
        ("auto", "auto"),
    ],
)
def test_true_and_false_are_ways_of_recompute(write: Write, value: str, name: str) -> None:
    assert load(write(f"{GOOD}  recompute: {value}\n")).train.recompute == name
    assert load(write(GOOD), [f"train.recompute={value}"]).train.recompute == name


def test_one_name_where_a_list_is_needed(write: Write) -> None:
    text = complaint(write(GOOD.replace("[a.jsonl]", "a.jsonl")))
    assert text == "run.yaml:4: `data.train` must be a list, such as [a, b]"


@pytest.mark.parametrize("key", ["model.path", "train.output"])
def test_missing_mandatory_key(write: Write, key: str) -> None:
    name = key.partition(".")[2]
    text = complaint(
        write(re.sub(rf"  {name}: .*\n", "", GOOD).replace("model:\n", "model: {}\n", name == "path"))
    )
    assert text == f"run.yaml: `{key}` is required; add it to the file or pass {key}=VALUE"


def test_mandatory_key_can_come_from_the_command_line(write: Write) -> None:
    assert load(write(GOOD.replace("  output: runs/x\n", "")), ["train.output=y"]).train.output == "y"


def test_empty_file_names_what_is_missing(write: Write) -> None:
    assert "`model.path` is required" in complaint(write(""))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_file_without_sections(write: Write, text: str) -> None:
    assert complaint(write(text)) == "run.yaml:1: the file must hold `key: value` pairs"


def test_section_without_keys(write: Write) -> None:
    assert complaint(write(f"{GOOD}lora: 16\n")) == "run.yaml:8: lora must hold `key: value` pairs"


@pytest.mark.parametrize(
    ("text", "line"),
    [("model:\n  path: [a\n", 3), ("model:\n\tpath: a\n", 2), ("model:\n  path: a\n bad\n", 3)],
)
def test_broken_yaml(write: Write, text: str, line: int) -> None:
    assert complaint(write(text)).startswith(f"run.yaml:{line}: not valid YAML: ")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "command line: 'train.steps' is not `section.key=value`"),
        ("steps=5", "command line: unknown key `steps`; did you mean `train.steps`?"),
        ("lora.rnk=5", "command line: unknown key `lora.rnk`; did you mean `lora.rank`?"),
        ("lora=5", "command line: unknown key `lora`; did you mean"),
    ],
)
def test_overrides(write: Write, override: str, expected: str) -> None:
    assert complaint(write(GOOD), override).startswith(expected)


def test_override_of_a_wrong_type_names_the_key(write: Write) -> None:
    assert "`lora.rank`" in complaint(write(GOOD), "lora.rank=many")


@pytest.mark.parametrize(
    ("override", "key", "problem"),
    [
        ("train.schedule=sawtooth", "train.schedule", "must be one of cosine, linear, constant"),
        ("data.overlong=cut", "data.overlong", "must be one of error, skip, truncate"),
        ("model.dtype=float16", "model.dtype", "must be one of auto, float32, bfloat16"),
        ("lora.rank=0", "lora.rank", "must be at least 1"),
        ("lora.dropout=1", "lora.dropout", "must be below 1"),
        ("lora.dropout=-0.1", "lora.dropout", "must be at least 0"),
        ("train.steps=0", "train.steps", "must be at least 1"),
        ("train.learning_rate=-1e-4", "train.learning_rate", "must be at least 0"),
        ("data.max_length=1", "data.max_length", "must be at least 8"),
        ("data.train=[]", "data.train", "name at least one file"),
        ("data.format=csv", "data.format", "must be one of auto, messages, erniekit"),
        ("data.train_on=first", "data.train_on", "must be one of all, last"),
        ("data.mixing=interleave", "data.weights", "has 0 shares for the 1 files of data.train"),
        ("data.weights=[1]", "data.weights", "needs data.mixing: interleave"),
        ("train.steps=null", "train.steps", "give exactly one of the two"),
        ("train.epochs=1", "train.steps", "give exactly one of the two"),
        ("train.warmup_steps=101", "train.warmup_steps", "beyond the 100 steps"),
        ("train.warmup_ratio=1.5", "train.warmup_ratio", "must be at most 1"),
        ("train.rate_ratios={router: -1}", "train.rate_ratios", "gives router -1.0; it must be at least 0"),
        ("train.min_learning_rate=1", "train.min_learning_rate", "is above train.learning_rate"),
        ("train.eval_every=5", "train.eval_every", "data.eval names no file"),
    ],
)
def test_ranges_and_combinations(write: Write, override: str, key: str, problem: str) -> None:
    text = complaint(write(GOOD), override)
    assert f"`{key}`" in text
    assert problem in text


def test_range_complaint_names_the_line(write: Write) -> None:
    text = complaint(write(f"{GOOD}  rows: 0\n"))
    assert text == "run.yaml:8: `train.rows` is 0; it must be at least 1"


def test_one_kind_of_warm_up(write: Write) -> None:
    text = complaint(write(GOOD), "train.warmup_ratio=0.1", "train.warmup_steps=5")
    assert "`train.warmup_ratio` and `train.warmup_steps`: give one of the two" in text


def test_patience_needs_evaluations(write: Write) -> None:
    text = complaint(write(GOOD), "data.eval=[b.jsonl]", "train.patience=2")
    assert "`train.patience` needs train.eval_every" in text


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["dpo.loss=kto"], "`dpo.loss` is 'kto'; it must be one of sigmoid, hinge"),
        (["dpo.beta=0"], "`dpo.beta` is 0.0; it must be above 0"),
        (["dpo.label_smoothing=0.5"], "`dpo.label_smoothing` is 0.5; it must be below 0.5"),
        (["data.overlong=truncate"], "`data.overlong` is truncate, but an answer of a pair is never cut"),
        (["dpo.loss=simpo"], "`dpo.reference` is adapters_off, but simpo has no reference"),
        (["dpo.loss=dpop", "dpo.reference=none"], "`dpo.reference` is none, but dpop needs one"),
        (["lora.enabled=false"], "`dpo.reference` is adapters_off, but lora.enabled is false"),
        (["dpo.loss=hinge", "dpo.label_smoothing=0.1"], "`dpo.label_smoothing` has no effect on hinge"),
        (["dpo.loss=robust", "dpo.offset_alpha=1"], "`dpo.offset_alpha` has no effect on robust"),
        (["dpo.dpop_lambda=5"], "`dpo.dpop_lambda` has no effect on sigmoid, only on dpop; remove it"),
        (["dpo.loss=ipo", "dpo.normalize_logps=true"], "`dpo.normalize_logps` has no effect on ipo"),
        (["train.objective=sft", "dpo.beta=0.2"], "`dpo` is set, but train.objective is sft"),
    ],
)
def test_preference_tuning(write: Write, overrides: list[str], problem: str) -> None:
    path = write(GOOD)
    assert load(path, ["train.objective=dpo"]).dpo.reference == "adapters_off"
    assert problem in complaint(path, "train.objective=dpo", *overrides)


def test_the_configuration_stays_small() -> None:
    assert len(key_paths()) <= 80


def test_every_key_path_has_a_value() -> None:
    assert {"model.path", "lora.rank", "data.train", "train.steps"} <= set(key_paths())
    assert all(value_of(Config(), path) is not ... for path in key_paths())


def test_shares_of_a_mixture(write: Write) -> None:
    mixed = ["data.train=[a.jsonl, b.jsonl]", "data.mixing=interleave"]
    assert load(write(GOOD), [*mixed, "data.weights=[3, 0.5]"]).data.weights == [3.0, 0.5]
    text = complaint(write(GOOD), *mixed, "data.weights=[1, 0]")
    assert text == "run.yaml: `data.weights` is [1.0, 0.0]; every share must be a number above 0"
