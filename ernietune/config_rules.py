"""What the values of a configuration must be like, and which of them contradict one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ernietune import metric_names
from ernietune.config_extras import extras_problems, loss_problems
from ernietune.config_parallel import parallel_problems
from ernietune.memory_modes import memory_problems, weights_problem

if TYPE_CHECKING:
    from ernietune.config import Config, DataSection, TrainSection

CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.quantization": ("none", "wint8", "wint4", "mixed", "nf4", "fp8"),
    "model.template": ("auto", "text", "thinking", "vl", "vl_thinking"),
    "data.format": ("auto", "messages", "erniekit", "alpaca", "sharegpt", "preference"),
    "data.mixing": ("concat", "interleave", "sequence"),
    "data.train_on": ("all", "last"),
    "data.overlong": ("error", "skip", "truncate"),
    "data.on_error": ("error", "skip"),
    "train.schedule": ("cosine", "linear", "constant"),
    "train.objective": ("sft", "dpo"),
    "train.best_metric": metric_names.NAMES,
    "parallel.base": ("replicated", "sharded"),
    "dpo.loss": (
        *("sigmoid", "hinge", "ipo", "simpo", "orpo"),
        *("kto_pair", "sppo_hard", "nca_pair", "dpop", "robust"),
    ),
}
_LEAST: dict[tuple[str, float], str] = {
    ("lora", 0): "dropout plus_ratio",
    ("lora", 1): "rank",
    ("data", 0): "workers",
    ("data", 0.01): "fps max_frames",
    ("data", 8): "max_length",
    ("train", 0): "learning_rate min_learning_rate warmup_steps warmup_ratio weight_decay clip_norm "
    "eval_generate",
    ("train", 1): "steps epochs rows accumulation loss_chunk log_every save_every keep_last eval_every "
    "eval_batches patience",
    ("parallel", 1): "data expert tensor",
    ("dpo", 0): "label_smoothing offset_alpha simpo_gamma dpop_lambda preference_ratio sft_ratio",
}
AT_LEAST = {f"{part}.{name}": least for (part, least), names in _LEAST.items() for name in names.split()}


def value_of(config: Config, path: str) -> Any:
    """The value of a key path such as `train.steps`."""
    section, name = path.split(".")
    return vars(vars(config)[section])[name]


def problems(config: Config) -> Iterator[tuple[str, str]]:
    """(key path, what is wrong with its value) of every choice, range and combination that cannot be."""
    yield from _of_values(config)
    yield from _of_ranges(config)
    yield from _of_data(config)
    yield from _of_the_loop(config)
    yield from _of_preferences(config)


def _of_values(config: Config) -> Iterator[tuple[str, str]]:
    for path, choices in CHOICES.items():
        value = value_of(config, path)
        if value not in choices:
            yield path, f"is {value!r}; it must be one of {', '.join(choices)}"
    for path, least in AT_LEAST.items():
        value = value_of(config, path)
        if value is not None and value < least:
            yield path, f"is {value}; it must be at least {least:g}"


def _of_ranges(config: Config) -> Iterator[tuple[str, str]]:
    if config.lora.dropout >= 1:
        yield "lora.dropout", f"is {config.lora.dropout}; it must be below 1"
    if config.train.warmup_ratio > 1:
        yield "train.warmup_ratio", f"is {config.train.warmup_ratio}; it must be at most 1"
    for name, ratio in config.train.rate_ratios.items():
        if ratio < 0:
            yield "train.rate_ratios", f"gives {name} {ratio}; it must be at least 0"
    if config.dpo.beta <= 0:
        yield "dpo.beta", f"is {config.dpo.beta}; it must be above 0"
    if config.dpo.label_smoothing >= 0.5:
        yield "dpo.label_smoothing", f"is {config.dpo.label_smoothing}; it must be below 0.5"


def _of_data(config: Config) -> Iterator[tuple[str, str]]:
    train, data = config.train, config.data
    if not data.train:
        yield "data.train", "is empty; name at least one file of messages"
    yield from _of_mixing(data)
    asked = [name for name in ("eval_every", "patience", "eval_generate") if vars(train)[name]]
    if asked and not data.eval:
        yield f"train.{asked[0]}", "is set, but data.eval names no file"
    if train.patience and not train.eval_every:
        yield "train.patience", "needs train.eval_every"
    if problem := metric_names.problem(train.best_metric, train.objective, train.eval_generate, data.eval):
        yield "train.best_metric", problem


def _of_the_loop(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        yield "train.steps", "and `train.epochs`: give exactly one of the two"
    if config.model.quantization != "none" and not config.lora.enabled:
        yield "model.quantization", "is for a frozen base, but lora.enabled is false; use none, or adapters"
    yield from _of_schedule(train)
    for name, problem in extras_problems(
        train.router_losses, train.neftune_alpha, train.objective, config.lora.enabled
    ):
        yield f"train.{name}", problem
    for name, problem in memory_problems(train.recompute, train.offload):
        yield f"train.{name}", problem
    sections = {name: vars(part) for name, part in vars(config).items()}
    if reason := weights_problem(sections):
        yield "train.offload", reason
    for name, problem in parallel_problems(sections):
        yield f"parallel.{name}", problem


def _of_schedule(train: TrainSection) -> Iterator[tuple[str, str]]:
    if train.steps is not None and train.warmup_steps > train.steps:
        yield "train.warmup_steps", f"is {train.warmup_steps}, beyond the {train.steps} steps of train.steps"
    if train.warmup_steps and train.warmup_ratio:
        yield "train.warmup_ratio", "and `train.warmup_steps`: give one of the two"
    if train.min_learning_rate > train.learning_rate:
        yield "train.min_learning_rate", "is above train.learning_rate"


def _of_preferences(config: Config) -> Iterator[tuple[str, str]]:
    if config.train.objective == "sft":
        if config.dpo != type(config.dpo)():
            yield "dpo", "is set, but train.objective is sft; set train.objective: dpo"
        return
    if config.data.overlong == "truncate":
        yield "data.overlong", "is truncate, but an answer of a pair is never cut; use error or skip"
    if config.dpo.reference not in ("precomputed", "none") and not config.lora.enabled:
        yield (
            "dpo.reference",
            f"is {config.dpo.reference}, but lora.enabled is false; use precomputed",
        )
    for name, problem in loss_problems(vars(config.dpo), vars(type(config.dpo)())):
        yield f"dpo.{name}", problem


def _of_mixing(data: DataSection) -> Iterator[tuple[str, str]]:
    if data.mixing != "interleave" and data.weights:
        yield "data.weights", f"needs data.mixing: interleave; {data.mixing} takes every record once"
    if data.mixing == "interleave" and len(data.weights) != len(data.train):
        yield "data.weights", f"has {len(data.weights)} shares for the {len(data.train)} files of data.train"
    if any(not 0 < weight < float("inf") for weight in data.weights):
        yield "data.weights", f"is {list(data.weights)}; every share must be a number above 0"
