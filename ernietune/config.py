"""The configuration of a run: one YAML file, a few dataclasses, and errors that name file, line and key.

Unknown keys and wrong types are refused with the nearest valid key; nothing is filled in from anywhere but
the defaults below. Imports no paddle, so a mistake is answered at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ernietune.config_parallel import ParallelSection
from ernietune.config_rules import problems
from ernietune.errors import ConfigError
from ernietune.memory_modes import spelt


@dataclass
class ModelSection:
    """Which weights are tuned."""

    path: str = "???"  # a local folder or a hub id; a LoRA run or adapter goes on with its adapter
    shape: str | None = None  # a published shape by name: lets --dry-run plan without the weights
    dtype: str = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU (the only type Paddle computes in there)
    quantization: str = "none"  # of the frozen base under adapters, see docs/quantized-training.md
    template: str = "auto"  # auto, text, thinking, vl, vl_thinking: overrides what the checkpoint says


@dataclass
class LoraSection:
    """The adapters; `enabled: false` trains the weights named in train.trainable instead."""

    enabled: bool = True
    rank: int = 16
    alpha: float | None = None  # default: twice the rank
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])
    exclude: list[str] = field(default_factory=list)
    dropout: float = 0.0
    rslora: bool = False
    plus_ratio: float = 1.0  # LoRA+: learning rate of B over that of A


@dataclass
class DataSection:
    """Where samples come from and how they become rows."""

    train: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    format: str = "auto"  # of the records; auto: what the keys of each file's records say
    mixing: str = (
        "concat"  # of several files; interleave: in turn, by data.weights; sequence: one after another
    )
    weights: list[float] = field(default_factory=list)  # shares, one for each file of data.train
    max_length: int = 8192  # tokens of one row
    packing: bool = True
    overlong: str = "error"  # error, skip, truncate (at the end of a turn, never inside a picture)
    on_error: str = "error"  # error, skip (counted and named in dropped.jsonl)
    shuffle: bool = True
    train_on: str = "all"  # of the answers of a conversation: all, last
    train_all_turns: bool = False  # train all answers in one sequence, earlier ones as a history shows them
    enable_thinking: bool | None = None  # VL templates: open a think block before the answer
    min_pixels: int | None = None  # None: as the checkpoint's preprocessor_config.json says
    max_pixels: int | None = None
    fps: float | None = None  # frames of a video taken per second; None: as the checkpoint says, else 2
    max_frames: int | None = None  # at most, of a video; None: as the checkpoint says, else 180
    workers: int = 2


@dataclass
class TrainSection:
    """The loop."""

    output: str = "???"
    objective: str = "sft"  # sft, dpo (data.train holds preference pairs)
    steps: int | None = None  # exactly one of steps and epochs
    epochs: int | None = None
    rows: int = 1  # rows in one micro-batch
    accumulation: int = 1  # micro-batches in one step
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0
    schedule: str = "cosine"  # cosine, linear, constant
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # the same as a share of all steps; not together with warmup_steps
    rate_ratios: dict[str, float] = field(default_factory=dict)  # group or pattern -> share of the rate
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    trainable: list[str] = field(default_factory=lambda: ["all"])  # with lora.enabled false only
    recompute: str = "none"  # layers, every-2 (any n), attention+moe+norm+activation, auto; docs/hardware.md
    offload: str = "none"  # what waits on the host: activations, optimizer, weights, joined by +
    router_losses: dict[str, float] = field(default_factory=dict)  # see docs/training-extras.md
    neftune_alpha: float | None = None  # noise on word embeddings while conversations train; 5 is usual
    loss_chunk: int | None = None  # rows whose logits exist at a time; None: 64 MiB worth
    seed: int = 0
    resume: bool = True  # continue from the newest state in train.output, if there is one
    log_every: int = 1
    save_every: int | None = None  # None: at the end only
    keep_last: int = 2
    eval_every: int | None = None
    eval_batches: int | None = None  # None: the whole evaluation set
    eval_generate: int = 0  # held-out records that are answered at every evaluation, and the answers measured
    best_metric: str = "loss"  # what the best checkpoint is best at; docs/evaluation.md lists the names
    patience: int | None = None  # stop after this many evaluations without a better one


@dataclass
class DpoSection:
    """Preference tuning (train.objective: dpo); the formulas are in ernietune/train/dpo.py."""

    loss: str = "sigmoid"  # or hinge, ipo, simpo, orpo, kto_pair, sppo_hard, nca_pair, dpop, robust
    beta: float = 0.1  # scale of the rewards; orpo has none (its weight is preference_ratio)
    label_smoothing: float = 0.0  # share of pairs taken to be swapped: sigmoid, simpo, robust
    offset_alpha: float = 0.0  # sigmoid: demand a margin of alpha * log(score_gap of the record)
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    preference_ratio: float = 1.0  # weight of the preference loss, a mean over pairs
    sft_ratio: float = 0.0  # weight of the cross-entropy of the chosen answers, a mean over tokens
    normalize_logps: bool = False  # scale both answers to their mean length; ipo, simpo, orpo average anyway
    ignore_eos: bool = False  # leave the end of the turn out of the log-probabilities
    # adapters_off: the base; the folder of an adapter or LoRA run: the base with that, frozen;
    # precomputed: the model as the training starts, worked out once and kept in the run folder; none
    reference: str = "adapters_off"


@dataclass
class Config:
    """All of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    dpo: DpoSection = field(default_factory=DpoSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `section.key=value` overrides into a checked Config.

    A relative path that does not exist is looked for among the packaged configs. ConfigError says file, line,
    key and what to do.
    """
    file, text, node = read(path)
    lines = _check_keys(node, Config, str(file)) if node is not None else {}
    return build(text if node is not None else {}, overrides, str(file), lines)


def read(path: str | Path) -> tuple[Path, str, yaml.Node | None]:
    """The file meant by `path`, its text and YAML tree (None when empty); ConfigError when there is none."""
    file = _find(Path(path))
    text = file.read_text(encoding="utf-8")
    try:
        return file, text, yaml.compose(text)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(error, str(file))) from None


def build(
    values: str | dict[str, Any], overrides: Sequence[str], file: str, lines: Mapping[str, int]
) -> Config:
    """A checked Config of YAML text, or of a dict per section; `lines`: key path -> line in `file`."""
    _check_overrides(overrides)
    schema = OmegaConf.structured(Config)
    try:
        merged = OmegaConf.merge(schema, OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_value_problem(error, file, lines)) from None
    assert isinstance(config, Config)
    config.train.recompute = spelt(config.train.recompute)
    _check_values(config, file, lines)
    return config


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load` reads it back equal."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    inside = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    packaged = Path(__file__).parent.joinpath("configs", *inside)
    if not path.is_absolute() and packaged.is_file():
        return packaged
    raise ConfigError(
        f"{path}: no such configuration file; give the path of a YAML file such as configs/tiny/sft_lora.yaml"
    )


def _yaml_problem(error: yaml.YAMLError, file: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{file}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    return f"{file}: not valid YAML: {error}"


def sections() -> list[str]:
    """The top-level keys of a configuration."""
    return [f.name for f in fields(Config)]


def _section_types(owner: type) -> dict[str, type | None]:
    """Keys of a dataclass; the value is the section's class where a key holds one."""
    sections = {f.name: f.default_factory for f in fields(owner)}
    return {name: kind if is_dataclass(kind) else None for name, kind in sections.items()}


def _check_keys(node: yaml.Node, owner: type, file: str, prefix: str = "") -> dict[str, int]:
    """Line of every key path; ConfigError at the first unknown or repeated key."""
    if not isinstance(node, yaml.MappingNode):
        where = f"{file}:{node.start_mark.line + 1}"
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} must hold `key: value` pairs")
    known = _section_types(owner)
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        path, line = prefix + str(key_node.value), key_node.start_mark.line + 1
        if key_node.value not in known:
            raise ConfigError(f"{file}:{line}: unknown key `{path}`{_suggestion(path)}")
        if path in lines:
            raise ConfigError(f"{file}:{line}: `{path}` stands twice (first in line {lines[path]}); keep one")
        lines[path] = line
        section = known[key_node.value]
        if section is not None:
            lines |= _check_keys(value, section, file, path + ".")
    return lines


def key_paths() -> list[str]:
    """Every valid key path, such as `train.learning_rate`."""
    return [
        f"{section}.{f.name}"
        for section, kind in _section_types(Config).items()
        if kind is not None
        for f in fields(kind)
    ]


def _suggestion(path: str) -> str:
    name = path.rpartition(".")[2]
    paths = [*key_paths(), *_section_types(Config)]
    near = difflib.get_close_matches(path, paths, n=1, cutoff=0.6)
    near = near or [p for p in paths if p.rpartition(".")[2] == name]
    if not near:
        names = {p.rpartition(".")[2]: p for p in paths}
        near = [names[m] for m in difflib.get_close_matches(name, list(names), n=1)]
    return f"; did you mean `{near[0]}`?" if near else f"; sections are {', '.join(_section_types(Config))}"


def _check_overrides(overrides: Sequence[str]) -> None:
    for item in overrides:
        path, equals, _ = item.partition("=")
        if not equals:
            raise ConfigError(f"command line: {item!r} is not `section.key=value`")
        if path not in key_paths():
            raise ConfigError(f"command line: unknown key `{path}`{_suggestion(path)}")


def _value_problem(error: OmegaConfBaseException, file: str, lines: Mapping[str, int]) -> str:
    path = str(error.full_key or "")
    where = f"{file}:{lines[path]}" if path in lines else file
    reason = str(error.msg if error.msg else error).splitlines()[0]
    if "missing mandatory value" in reason.lower():
        return f"{file}: `{path}` is required; add it to the file or pass {path}=VALUE"
    if "is not a ListConfig" in reason:
        return f"{where}: `{path}` must be a list, such as [a, b]"
    return f"{where}: `{path}`: {reason}"


def _check_values(config: Config, file: str, lines: Mapping[str, int]) -> None:
    """Choices, ranges and combinations; ConfigError with key path and line at the first that is wrong."""
    for path, problem in problems(config):
        where = f"{file}:{lines[path]}" if path in lines else file
        raise ConfigError(f"{where}: `{path}` {problem}")
