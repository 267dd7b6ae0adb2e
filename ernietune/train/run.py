"""From a configuration to a finished run, step by step; nothing else happens here."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import paddle

from ernietune import config as configuration
from ernietune import launch
from ernietune.checkpoint import state
from ernietune.checkpoint.adapter import load_adapter, save_adapter
from ernietune.checkpoint.load import save_model
from ernietune.checkpoint.names import parameter_shapes
from ernietune.checkpoint.processor import Processor
from ernietune.checkpoint.safetensors import write_json
from ernietune.checkpoint.start import Start, adapter_at
from ernietune.config import Config
from ernietune.data.build import records_of, training_records
from ernietune.data.collate import Batch
from ernietune.data.dataset import Dataset
from ernietune.data.pairs import PairDataset, collate_pairs
from ernietune.data.stream import Stream, StreamOptions, count_batches, sample_lengths
from ernietune.errors import ConfigError, ErnietuneError
from ernietune.estimate.report import estimate
from ernietune.lora import inject, unfreeze
from ernietune.memory_modes import Recompute, offloads_of
from ernietune.models.decoder import CausalLM
from ernietune.parallel import accounts
from ernietune.parallel import apply as parallelism
from ernietune.parallel.degrees import Degrees
from ernietune.parallel.team import Team
from ernietune.parallel.trained import Trained
from ernietune.train import base, loop, memory, plan, reference
from ernietune.train.answers import Answers
from ernietune.train.answers import held_out as held_out_questions
from ernietune.train.division import check_division, degrees_of
from ernietune.train.dpo import dpo
from ernietune.train.frozen_adapter import FrozenAdapter
from ernietune.train.log import console
from ernietune.train.optim import Optimizer
from ernietune.train.router_losses import RouterLosses
from ernietune.train.sft import Objective, sft


def main(config: Config) -> Path:
    """Train as `config` says; return the run folder."""
    # 1. The run folder, before anything slow.
    folder = prepare_folder(config)
    base.require_same_form(folder, config.model.quantization)
    degrees = degrees_of(config)
    require_started(degrees)
    # 2. The checkpoint's words and pixels, then the data: mistakes there are found before weights are read.
    start = start_of(config)
    name = plan.named_reference(config)
    named = None if name is None else adapter_at(name, start.base)
    processor = processor_of(config, start.base)
    check_division(config, processor.config)
    setup = memory.settled(config, processor.config)
    train_set = training_records(config, processor)
    held_out = records_of(config, config.data.eval, processor) if config.data.eval else None
    asked = held_out_questions(config, processor) if config.train.eval_generate else None
    # 3. The other processes, the model or this one's part of it, and what of it trains.
    team = Team.of(degrees)
    dtype = compute_dtype(config.model.dtype)
    held = undivided_or_part(config, start, processor, team, dtype)
    model = held.model
    frozen = None if named is None else FrozenAdapter(model, named)
    choose_trainable(model, config, start, team)
    trained = divide(held, config, team, setup.recompute)
    options = stream_options(config)
    if config.dpo.reference == "precomputed":
        attach_references(model, config, options, start, {"train": train_set, "eval": held_out}, team)
    # 4. The loop.
    total = total_steps(config, train_set, options)
    run = loop.Run(
        folder=folder,
        train=config.train,
        model=model,
        objective=objective_of(config, frozen),
        optimizer=optimizer_of(model, config, trained),
        stream=stream_of(train_set, options),
        total_steps=total,
        write_weights=weights_writer(model, config, start),
        evaluation=None if held_out is None else evaluation_of(held_out, config),
        answers=None if asked is None else Answers(model, processor, config, asked),
        routers=RouterLosses(model, config.train.router_losses, team) if config.train.router_losses else None,
        team=team,
    )
    loop.restore(run)
    at_the_start = accounts.held_memory()
    announce(run, train_set, dtype)
    console.print(estimate(setup).line())
    with needing_space(folder):
        if team.is_main:
            configuration.save(config, folder / "config.yaml")
        try:
            loop.fit(run)
        finally:
            run.stream.close()
            if team.is_main:
                report_dropped(run)
    report_processes(team, at_the_start, folder)
    console.print(f"done: {folder / 'checkpoints' / state.pointers(folder).get('last', '')}")
    return folder


def optimizer_of(model: CausalLM, config: Config, trained: Trained) -> Optimizer:
    """AdamW over what trains; LoRA+ gives B a rate of its own."""
    ratio = config.lora.plus_ratio if config.lora.enabled else 1.0
    on_host = "optimizer" in offloads_of(config.train.offload)
    return Optimizer(model, config.train, ratio, trained, on_host)


def undivided_or_part(
    config: Config, start: Start, processor: Processor, team: Team, dtype: str
) -> base.Base:
    """The model, or what this process holds of it; the table of what trains is printed."""
    paddle.seed(config.train.seed)
    build = partial(parallelism.build, team=team)
    if "weights" in offloads_of(config.train.offload):
        found = base.waiting_base(start.base, processor.config, dtype, build, team.holding)
    else:
        form = config.model.quantization
        found = base.Base(base.load_base(start.base, processor.config, dtype, form, build, team.holding))
    plan.print_table(parameter_shapes(processor.config), config)
    return found


def divide(held: base.Base, config: Config, team: Team, recomputed: Recompute) -> Trained:
    """Put everything parallel, and recompute, around the model with its adapters."""
    return parallelism.apply(
        held.model,
        team,
        stage=config.parallel.sharding,
        base_sharded=config.parallel.base == "sharded",
        recomputed=recomputed,
        offload="activations" in offloads_of(config.train.offload),
        waiting=held.waiting,
    )


def require_started(degrees: Degrees) -> None:
    """ConfigError unless this is one of as many processes as the degrees ask for."""
    if launch.place_for(degrees.world) is None:
        raise ConfigError(
            f"parallel: data x tensor is {degrees.world}, but this is one process; "
            "start the run with `ernietune train`, or all processes with paddle.distributed.launch"
        )


def report_processes(team: Team, held: int, folder: Path) -> None:
    """Memory and traffic of every process, when there are several: said, and kept in processes.json."""
    if team.world.size == 1:
        return
    found = accounts.all_accounts(team, held)
    for line in accounts.lines(found):
        console.print(line)
    if team.is_main:
        write_json(folder / "processes.json", {"processes": [asdict(one) for one in found]})


def prepare_folder(config: Config) -> Path:
    """Create the run folder; refuse one that holds another run when nothing is to be resumed."""
    folder = Path(config.train.output)
    if not config.train.resume and state.pointers(folder):
        raise ConfigError(
            f"train.output: {folder} holds a run already; choose another folder or set train.resume: true"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"train.output: {folder} cannot be created ({error.strerror})") from None
    return folder


def attach_references(
    model: CausalLM,
    config: Config,
    options: StreamOptions,
    start: Start,
    sets: Mapping[str, Dataset | PairDataset | None],
    team: Team,
) -> None:
    """Give every set of pairs its log-probabilities under the model as it starts, kept in the run folder.

    Every process works them out, because a divided model needs all of them; the first one keeps them.
    """
    for name, records in sets.items():
        if isinstance(records, PairDataset):
            file = Path(config.train.output) / "reference" / name
            form, chunk = config.model.quantization, config.train.loss_chunk
            reference.attach(records, model, options, chunk, start, file, form, team)


@contextmanager
def needing_space(folder: Path) -> Iterator[None]:
    """Turn a disk that is full, whichever file of the run meets it first, into one ErnietuneError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ErnietuneError(
            f"{folder}: {error.strerror}; make room and run the same command again, "
            "it continues from the last checkpoint"
        ) from error


def processor_of(config: Config, folder: Path) -> Processor:
    """Tokenizer, chat format and picture sizes of the base, with the configuration's overrides."""
    return Processor.load(folder, None if config.model.template == "auto" else config.model.template)


def stream_of(records: Dataset | PairDataset, options: StreamOptions) -> Stream[Any]:
    """The micro-batches of a data set."""
    if isinstance(records, PairDataset):
        return Stream(records, options, collate_pairs)
    return Stream(records, options)


def objective_of(config: Config, frozen: FrozenAdapter | None = None) -> Objective:
    """The loss of a micro-batch; `frozen` is the reference that preference tuning names, if it names one."""
    if config.train.objective == "dpo":
        return partial(dpo, options=config.dpo, loss_chunk=config.train.loss_chunk, frozen=frozen)
    return partial(sft, loss_chunk=config.train.loss_chunk, neftune_alpha=config.train.neftune_alpha)


def stream_options(config: Config) -> StreamOptions:
    """How samples become micro-batches."""
    data, train = config.data, config.train
    return StreamOptions(
        max_length=data.max_length,
        packing=data.packing,
        rows=train.rows,
        seed=train.seed,
        shuffle=data.shuffle,
        workers=data.workers,
    )


def evaluation_of(held_out: Dataset | PairDataset, config: Config) -> Callable[[], Iterator[Batch]]:
    """A function that gives the evaluation batches from the start, in the files' order."""
    options = StreamOptions(
        max_length=config.data.max_length,
        packing=config.data.packing,
        rows=config.train.rows,
        shuffle=False,
        epochs=1,
    )

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(stream_of(held_out, options)):
            if number == config.train.eval_batches:
                return
            yield batch

    return batches


def compute_dtype(wanted: str) -> str:
    """The type the model computes in; ConfigError for bf16 on a CPU, where Paddle has no such products."""
    gpu = paddle.device.get_device().startswith("gpu")
    if wanted == "auto":
        return "bfloat16" if gpu else "float32"
    if wanted == "bfloat16" and not gpu:
        raise ConfigError(
            "model.dtype: bfloat16 cannot be computed in on a CPU by Paddle; use auto or float32"
        )
    return wanted


def start_of(config: Config) -> Start:
    """What model.path stands for; ConfigError when it is an adapter and there are to be none."""
    start = Start.find(config.model.path)
    if start.adapter is not None and not config.lora.enabled:
        raise ConfigError(
            f"model.path: {config.model.path} is an adapter, but lora.enabled is false; "
            "merge it with `ernietune export` and name the merged model"
        )
    return start


def choose_trainable(model: CausalLM, config: Config, start: Start, team: Team) -> None:
    """Inject the adapters, as `start` has them where it has some, or unfreeze the named groups."""
    if not config.lora.enabled:
        unfreeze(model, tuple(config.train.trainable))
        return
    inject(model, plan.lora_spec(config.lora))
    parallelism.same_start(model, config.train.seed, team)
    if start.adapter is not None:
        load_adapter(model, start.adapter, team.holding)
        console.print(f"going on with the adapter {start.adapter}")


def total_steps(config: Config, train_set: Dataset | PairDataset, options: StreamOptions) -> int:
    """Steps of the whole run; counting epochs reads the data once, because packing decides the number."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    console.print(f"reading {len(train_set)} records to count the steps of {config.train.epochs} epochs")
    lengths = sample_lengths(train_set, options.workers)
    batches = count_batches(train_set, lengths, replace(options, epochs=config.train.epochs))
    return -(-batches // config.train.accumulation)


def weights_writer(model: CausalLM, config: Config, start: Start) -> Callable[[Path, loop.Weights], None]:
    """What a checkpoint holds: the adapter alone, or the whole model in the base's layout."""
    if config.lora.enabled:
        return lambda folder, weights: save_adapter(model, folder, start.name, weights)
    return lambda folder, weights: save_model(model, folder, like=start.base, trained=weights)


def announce(run: loop.Run, train_set: Dataset | PairDataset, dtype: str) -> None:
    """One line on what is about to happen."""
    device = paddle.device.get_device()
    note = " (Paddle computes in float32 only on a CPU)" if device == "cpu" else ""
    console.print(f"computing in {dtype} on {device}{note}; {len(train_set)} records")
    if run.progress.step:
        console.print(f"resuming after step {run.progress.step} of {run.total_steps}")


def report_dropped(run: loop.Run) -> None:
    """Count and name what the run left out."""
    log = run.stream.log
    if not log.dropped and not log.cut:
        return
    path = run.folder / "dropped.jsonl"
    log.write(path)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(log.counts.items()))
    console.print(f"left out: {reasons or 'no record'}; cut: {len(log.cut)} records; each is named in {path}")
