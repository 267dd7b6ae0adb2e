"""The training loop: steps, evaluation, early stopping, checkpoints. Objectives are functions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from ernietune import metric_names
from ernietune.checkpoint import state
from ernietune.checkpoint.state import Progress
from ernietune.config import TrainSection
from ernietune.data.collate import Batch
from ernietune.data.stream import Stream
from ernietune.errors import CheckpointError, ErnietuneError, listed
from ernietune.lora import adapters
from ernietune.models.decoder import CausalLM
from ernietune.parallel.team import Team
from ernietune.train.interrupt import Interrupts
from ernietune.train.log import RunLog, Silence, console
from ernietune.train.optim import Optimizer, learning_rate
from ernietune.train.router_losses import RouterLosses
from ernietune.train.sft import LossSums, Objective

N = TypeVar("N", int, float)
Weights = Mapping[str, NDArray[Any]]  # all that trains in fp32, by path

_WEIGHT = "weight::"  # before the path of a trained parameter, in a checkpoint
_BIAS = "bias::"  # before the path of a router whose correction bias may change


@dataclass
class Run:
    """Everything a fit needs.

    `evaluation` gives the evaluation batches anew each time it is called, `answers` the metrics of generated
    answers under the weights of that time.
    """

    folder: Path
    train: TrainSection
    model: CausalLM
    objective: Objective
    optimizer: Optimizer
    stream: Stream[Any]
    total_steps: int
    write_weights: Callable[[Path, Weights], None]
    evaluation: Callable[[], Iterator[Batch]] | None = None
    answers: Callable[[], dict[str, float]] | None = None
    routers: RouterLosses | None = None
    progress: Progress = None  # type: ignore[assignment]
    team: Team = field(default_factory=Team.alone)

    def __post_init__(self) -> None:
        if self.progress is None:
            self.progress = Progress(data=self.stream.state_dict(), best_metric=self.train.best_metric)


def fit(run: Run) -> Progress:
    """Train from where `run.progress` stands to the last step; return where it ended.

    An interrupt (Ctrl-C) saves the last complete step before it is passed on; several processes first end the
    step that they are in.
    """
    with _log_of(run) as log, Interrupts(run.team) as interrupts:
        watch = GradientWatch(run.model)
        saved_step = run.progress.step
        try:
            while run.progress.step < run.total_steps and not _patience_is_over(run):
                train_step(run, log, watch)
                gained = _evaluate_if_due(run, log)
                if gained or _save_is_due(run):
                    saved_step = save(run, best=gained)
                interrupts.heed()
        except KeyboardInterrupt:
            if run.progress.step > saved_step:
                console.print(f"interrupted: saved {save(run, best=False)} steps; the same command continues")
            raise
        if run.progress.step > saved_step:
            save(run, best=False)
    return run.progress


def _log_of(run: Run) -> RunLog | Silence:
    return RunLog(run.folder, run.total_steps, run.progress.step) if run.team.is_main else Silence()


def train_step(run: Run, log: RunLog | Silence, watch: GradientWatch) -> None:
    """One optimizer step over `accumulation` micro-batches, of which this process works on its share."""
    started, step = time.perf_counter(), run.progress.step + 1
    batches = [next(run.stream) for _ in range(run.train.accumulation)]
    if run.routers is not None:
        run.routers.begin(batches)
    share = Share(run.team, (run.train.seed << 24) + step, run.optimizer.trained.micro_batch_is_done)
    loss, metrics = accumulate(run.model, run.objective, batches, share)
    if run.routers is not None:
        metrics |= run.routers.finish()
    if not math.isfinite(loss):
        raise ErnietuneError(
            f"the loss of step {step} is {loss}; nothing was updated. "
            "Lower train.learning_rate, or look at the data"
        )
    watch.check(batches, run.optimizer.trained.collect())
    rate = learning_rate(step, run.total_steps, run.train)
    norm = run.optimizer.step(rate)
    if run.routers is not None:
        run.routers.update_biases()
    run.progress = replace(run.progress, step=step, data=run.stream.state_dict())
    seconds = time.perf_counter() - started
    values = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, **metrics, **_counts(batches)}
    values["seconds"] = round(seconds, 4)
    values["tokens_per_second"] = round(values["tokens"] / seconds, 1)
    log.step(step, values, show=step % run.train.log_every == 0 or step == 1)


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a step are this process's, and what happens before and after each."""

    team: Team = field(default_factory=Team.alone)
    seed: int | None = None
    done: Callable[[], None] = lambda: None

    def begin(self, number: int) -> None:
        """Dropout is a function of seed, step and micro-batch: neither a resume nor the degrees change it."""
        if self.seed is not None:
            paddle.seed(self.seed + (number << 48))


def accumulate(
    model: CausalLM, objective: Objective, batches: list[Batch], share: Share | None = None
) -> tuple[float, dict[str, float]]:
    """Gradients of the loss of the whole step; that loss, and its metrics, over all processes.

    The divisors are the step's, not the micro-batch's: a token or pair counts the same wherever it stands.
    """
    model.train()
    share = share or Share()
    totals = _totals(batches)
    loss = 0.0
    metrics: dict[str, dict[str, float]] = {}
    for number, batch in share.team.mine(batches):
        share.begin(number)
        sums = objective(model, batch)
        mean = _mean(sums, totals)
        if not mean.stop_gradient:  # a micro-batch may have no supervised token
            mean.backward()
        share.done()
        loss += float(mean.item())
        _add_metrics(metrics, sums.metrics)
        del sums, mean  # their graph would lie beside the next one
    means = share.team.sums({**_metric_means(metrics, totals), "loss": loss})
    return means.pop("loss"), means


def _add(sums: dict[str, N], values: Mapping[str, N]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _add_metrics(sums: dict[str, dict[str, float]], values: Mapping[str, Mapping[str, float]]) -> None:
    for count, metrics in values.items():
        _add(sums.setdefault(count, {}), metrics)


def _totals(batches: list[Batch]) -> dict[str, float]:
    """The counts that the terms of a loss are divided by."""
    totals: dict[str, float] = {}
    for batch in batches:
        _add(totals, batch.counts)
    return totals


def _mean(sums: LossSums, totals: Mapping[str, float]) -> Tensor:
    return sum(term / (totals[name] or 1) for name, term in sums.terms.items())


def _metric_means(
    metrics: Mapping[str, Mapping[str, float]], totals: Mapping[str, float]
) -> dict[str, float]:
    """Every sum divided by the total of the count it stands under."""
    return {
        name: value / (totals[count] or 1) for count, sums in metrics.items() for name, value in sums.items()
    }


def _counts(batches: list[Batch]) -> dict[str, float]:
    """Tokens of a step: all, supervised, and per expert pool."""
    vision = sum(int(np.count_nonzero(batch.is_vision)) for batch in batches)
    tokens = sum(batch.tokens for batch in batches)
    return {
        "tokens": tokens,
        "supervised_tokens": sum(batch.supervised for batch in batches),
        "text_pool_tokens": tokens - vision,
        "vision_pool_tokens": vision,
        "samples": sum(batch.samples for batch in batches),
    }


class GradientWatch:
    """Makes sure that every adapter gets a gradient in the first step in which it can.

    Adapters of pictures (vision experts, tower, resampler) wait for the first step with a picture, those of
    the text experts for the first text token.
    """

    def __init__(self, model: CausalLM) -> None:
        self.waiting = dict(adapters(model))

    def check(self, batches: list[Batch], reached: set[str]) -> None:
        """Raise ErnietuneError naming the adapters that should have a gradient by now and have none.

        `reached` are the paths of the parameters that got one in this step.
        """
        if not self.waiting:
            return
        vision = any(batch.is_vision.any() for batch in batches)
        pictures = any(len(batch.grids) for batch in batches)
        missing = []
        for path in list(self.waiting):
            if {f"{path}.lora_A", f"{path}.lora_B"} <= reached:
                del self.waiting[path]
            elif (".vision_experts." not in path or vision) and (
                not path.startswith(("vision_model.", "model.resampler_model.")) or pictures
            ):
                missing.append(path)
        if missing:
            raise ErnietuneError(
                f"no gradient reached {len(missing)} adapters: {listed(missing)}; this is a defect"
            )


def evaluate(
    model: CausalLM, objective: Objective, batches: Iterator[Batch], team: Team | None = None
) -> dict[str, float]:
    """Loss and metrics over `batches` without dropout, and the perplexity where the loss is one of tokens.

    The processes of `team` take turns; all of them return the same.
    """
    model.eval()
    team = team or Team.alone()
    terms: dict[str, float] = {}
    totals: dict[str, float] = {}
    metrics: dict[str, dict[str, float]] = {}
    with paddle.no_grad():
        for batch, counted in _turns(batches, team):
            sums = objective(model, batch)
            if not counted:
                continue
            _add(terms, {name: float(term.item()) for name, term in sums.terms.items()})
            _add(totals, batch.counts)
            _add_metrics(metrics, sums.metrics)
    terms, totals, metrics = _over_all(team, terms, totals, metrics)
    loss = sum(value / (totals[name] or 1) for name, value in terms.items())
    perplexity = {"perplexity": math.exp(min(loss, 700.0))} if "tokens" in terms else {}
    return {"loss": loss, **perplexity, **_metric_means(metrics, totals), **totals}


def _turns(batches: Iterator[Batch], team: Team) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count.

    All run the same number of forward passes, because divided experts need everybody: in the last round a
    process without a batch repeats another one's, for nothing.
    """
    batches = iter(batches)
    while found := list(islice(batches, team.data.size)):
        mine = team.data.index
        yield (found[mine], True) if mine < len(found) else (found[0], False)


def _over_all(
    team: Team,
    terms: dict[str, float],
    totals: dict[str, float],
    metrics: dict[str, dict[str, float]],
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """Sums of this process -> sums of all; one that had no batch to count knows no names, so all are told."""
    if team.data.size == 1:
        return terms, totals, metrics
    found = team.merged({".terms": terms, ".totals": totals, **metrics})
    return found.pop(".terms"), found.pop(".totals"), found


def _evaluate_if_due(run: Run, log: RunLog | Silence) -> bool:
    """Evaluate at the chosen steps and after the last one; True when it is the best so far."""
    step, every = run.progress.step, run.train.eval_every
    if run.evaluation is None or not (step == run.total_steps or (every and step % every == 0)):
        return False
    values = evaluate(run.model, run.objective, run.evaluation(), run.team)
    if run.answers is not None:
        values |= run.team.told(run.answers)
    value = values.get(metric_names.OF_PAIRS.get(run.train.best_metric, run.train.best_metric))
    best = value is not None and _is_better(value, run)
    log.evaluation(step, values, best)
    if best:
        run.progress = replace(run.progress, best_value=value, best_step=step, evaluations_without_gain=0)
    else:
        waited = run.progress.evaluations_without_gain + 1
        run.progress = replace(run.progress, evaluations_without_gain=waited)
    return best


def _is_better(value: float, run: Run) -> bool:
    """Whether a value of the metric that picks the best checkpoint beats all before."""
    best = run.progress.best_value
    smaller = run.train.best_metric in metric_names.SMALLER_IS_BETTER
    return best is None or (value < best if smaller else value > best)


def _patience_is_over(run: Run) -> bool:
    patience = run.train.patience
    if patience is None or run.progress.evaluations_without_gain < patience:
        return False
    console.print(
        f"stopped early: {patience} evaluations without a better {run.train.best_metric} "
        f"than step {run.progress.best_step}'s"
    )
    return True


def _save_is_due(run: Run) -> bool:
    every = run.train.save_every
    return every is not None and run.progress.step % every == 0


def save(run: Run, best: bool) -> int:
    """Write a checkpoint of the current step; return the step."""
    weights = run.optimizer.weights()
    tensors = {_WEIGHT + path: values for path, values in weights.items()} | run.optimizer.state()
    if run.routers is not None:
        tensors |= {_BIAS + path: values for path, values in run.routers.state().items()}
    if run.team.is_main:

        def write(folder: Path) -> None:
            run.write_weights(folder, weights)

        state.save(run.folder, run.progress, tensors, write, run.train.keep_last, best)
    run.team.wait()
    return run.progress.step


def restore(run: Run) -> None:
    """Continue from the newest checkpoint of `run.folder`, if any: weights, moments, data, evaluations."""
    found = state.load(run.folder)
    if found is None:
        return
    progress, tensors = found
    run.progress = _judged_by(progress, run.train.best_metric)
    moments = {key: value for key, value in tensors.items() if not key.startswith((_WEIGHT, _BIAS))}
    weights, biases = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in (_WEIGHT, _BIAS)
    )
    _require_same_parameters(run, weights)
    if run.routers is not None:
        run.routers.load_state(biases)
    run.optimizer.load_state(moments)
    run.optimizer.load_weights(weights)
    run.stream.load_state_dict(run.progress.data)


def _judged_by(progress: Progress, metric: str) -> Progress:
    """The progress of a run that is from now on judged by `metric`; values of another one are no measure."""
    if progress.best_metric == metric:
        return progress
    console.print(
        f"train.best_metric was {progress.best_metric} and is {metric}: the best is looked for anew"
    )
    return replace(progress, best_metric=metric, best_value=None, best_step=0, evaluations_without_gain=0)


def _require_same_parameters(run: Run, weights: Mapping[str, NDArray[Any]]) -> None:
    """CheckpointError when the run trained other parameters, or adapters of another rank."""
    saved = {path: tuple(values.shape) for path, values in weights.items()}
    degrees = run.team.degrees
    shapes = run.optimizer.trained.shapes
    wanted = {path: tuple(degrees.whole_shape(path, shape)) for path, shape in shapes.items()}
    differing = sorted(path for path in saved.keys() | wanted.keys() if saved.get(path) != wanted.get(path))
    if differing:
        raise CheckpointError(
            f"{run.folder} cannot be resumed: it trained other parameters or shapes ({listed(differing)}); "
            "restore its configuration or choose another train.output"
        )
