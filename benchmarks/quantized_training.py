"""What a quantised or FP8 base costs a training: the demo's recipes on the embedded model, by form.

    python benchmarks/quantized_training.py [--seeds N] [--epochs N] [FORM ...]   all forms of a frozen base
    python benchmarks/quantized_training.py --answers [FORM ...]     the dear part, one seed

Losses: configs/tiny/sft_lora.yaml, whose rate ends at zero after ten epochs, over every form and `none`, each
with several orders of the data and first adapters. Of each run
before    held-out loss of the base as it is, in this form
training  the mean of its last epoch's steps
held out  after the last step
Of each the mean and the least of the seeds. `to none` compares runs of one seed, which began alike: the mean
over seeds, its standard error, the smallest and the largest. The row of `none` says how far seeds alone are
apart. Some 0.417 of the loss is not for adapters to take: the base never met the letters K and V, and the
embedding, which is the head and is neither trained nor rounded, hardly tells them from 733 other such words.

Answers, after the same recipe:
exact     exact answers to held-out questions: over the base as it was trained on, and over the base from
          disk, which is what `serve` and `export` take
rewards   held-out pairs whose chosen answer gained more than the rejected one (50 % before the training),
          after configs/tiny/dpo_lora.yaml with DPO_EPOCHS epochs of its text pairs

And for FP8, decoder layer by decoder layer on held-out records: how far a layer's change to the hidden states
is from that of fp32, both given the same states (root mean squares).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from ernietune import config as configuration  # noqa: E402
from ernietune.config_rules import CHOICES  # noqa: E402
from ernietune.data.build import records_of  # noqa: E402
from ernietune.evaluation.answering import EngineAnswers  # noqa: E402
from ernietune.evaluation.run import gather  # noqa: E402
from ernietune.evaluation.scoring import Outcome  # noqa: E402
from ernietune.infer.engine import Engine  # noqa: E402
from ernietune.train import loop  # noqa: E402
from ernietune.train import run as training  # noqa: E402
from ernietune.train.base import load_base  # noqa: E402
from ernietune.train.log import console  # noqa: E402
from ernietune.train.sft import to_inputs  # noqa: E402

EPOCHS, DPO_EPOCHS = 10, 1
FORMS = ("wint8", "mixed", "wint4", "nf4", "fp8")
ONCE = "train.eval_every=100000"  # only after the last step
HELD_OUT = 120
REWARDS = "rewards/accuracies"
SFT, DPO = "configs/tiny/sft_lora.yaml", "configs/tiny/dpo_lora.yaml"
TEXT_PAIRS = ["data.train=[data/preferences/train.jsonl]", "data.eval=[data/preferences/heldout.jsonl]"]


@dataclass(frozen=True)
class Losses:
    """Of the runs over one base, by seed: training and held-out loss at the end."""

    training: list[float]
    held_out: list[float]


@dataclass(frozen=True)
class Answers:
    """What the whole recipes gave over one form of the base."""

    exact: float
    exact_on_disk: float
    rewards: float
    seconds: float


def trained(path: str, form: str, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train a recipe over a form of its base, unless that has been done; the lines of its log."""
    values = [f"model.quantization={form}", f"train.output={output}", "data.workers=0"]
    lines = _lines(output / "log.jsonl")
    if not lines or lines[-1]["kind"] != "eval":  # the evaluation after the last step
        training.main(configuration.load(ROOT / path, [*values, *overrides]))
        lines = _lines(output / "log.jsonl")
    return lines


def _lines(log: Path) -> list[dict[str, Any]]:
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


def losses(form: str, folder: Path, seeds: int, epochs: int, *overrides: str) -> Losses:
    """The recipe over one form, seed by seed."""
    last, held_out = [], []
    for seed in range(seeds):
        values = [f"train.epochs={epochs}", f"train.seed={seed}", ONCE, *overrides]
        log = trained(SFT, form, folder / f"{form}-{seed}", *values)
        steps = [record["loss"] for record in log if record["kind"] == "train"]
        epoch = steps[-len(steps) // epochs :]
        last.append(sum(epoch) / len(epoch))
        held_out.append(log[-1]["loss"])
    return Losses(last, held_out)


def loss_before(form: str) -> float:
    """Held-out loss of a base before any training."""
    config = configuration.load(ROOT / SFT)
    folder = Path(config.model.path)
    processor = training.processor_of(config, folder)
    batches = training.evaluation_of(records_of(config, config.data.eval, processor), config)
    model = load_base(folder, processor.config, "float32", form)
    return loop.evaluate(model, training.objective_of(config), batches())["loss"]


def answers(form: str, folder: Path) -> Answers:
    """Both whole recipes over one form."""
    started, output = time.process_time(), folder / f"{form}-answers"
    tuned = trained(SFT, form, output, f"train.eval_generate={HELD_OUT}", ONCE)[-1]
    pairs = [f"train.epochs={DPO_EPOCHS}", ONCE, *TEXT_PAIRS]
    preferred = trained(DPO, form, folder / f"{form}-dpo", *pairs)[-1]
    seconds = time.process_time() - started
    return Answers(tuned["exact_match"], exact_on_disk(output), preferred[REWARDS], seconds)


def exact_on_disk(run: Path) -> float:
    """Exact answers of a run's adapter over the base from disk."""
    questions = gather([ROOT / "data/badges/heldout.jsonl"], None, False, HELD_OUT)
    with closing(Engine.load(run)) as engine:
        said = list(EngineAnswers(engine).answers(questions, 16))
    return sum(Outcome(*pair).correct for pair in zip(questions, said, strict=True)) / len(questions)


def layer_errors() -> list[float]:
    """Of the FP8 base, for every decoder layer: error of its change to the hidden states over that change."""
    config = configuration.load(ROOT / SFT)
    folder = Path(config.model.path)
    processor = training.processor_of(config, folder)
    exact, rounded = (load_base(folder, processor.config, "float32", form) for form in ("none", "fp8"))
    batch = next(iter(training.evaluation_of(records_of(config, config.data.eval, processor), config)()))
    inputs, errors = to_inputs(batch), []
    with paddle.no_grad():
        hidden, shared = exact.embed(inputs), exact.shared(inputs)
        for layer, other in zip(exact.model.layers, rounded.model.layers, strict=True):
            after = layer(hidden, shared)
            off = (other(hidden, shared) - after).square().mean() / (after - hidden).square().mean()
            errors.append(float(off.sqrt()))
            hidden = after
    return errors


def main() -> None:
    """Train every form and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("forms", nargs="*", choices=[*CHOICES["model.quantization"], []], metavar="FORM")
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--work", type=Path, help="keeps the runs, to go on; default: none does")
    args = parser.parse_args()
    forms = args.forms or list(FORMS)
    console.quiet = True
    with tempfile.TemporaryDirectory() as name:
        folder = args.work or Path(name)
        if args.answers:
            print_answers(forms, folder)
        else:
            print_losses(forms, folder, args.seeds, args.epochs)
    if "fp8" in forms:
        print("fp8, by decoder layer:", "  ".join(f"{error:.2%}" for error in layer_errors()))


def print_losses(forms: list[str], folder: Path, seeds: int, epochs: int) -> None:
    """Losses by form, each row as soon as it is known."""
    print(heading("base"), flush=True)
    plain = losses("none", folder, seeds, epochs)
    print(row("none", loss_before("none"), plain, None), flush=True)
    for form in dict.fromkeys(forms):
        if form != "none":
            found = losses(form, folder, seeds, epochs)
            print(row(form, loss_before(form), found, plain), flush=True)


def heading(first: str) -> str:
    """What stands over `row`."""
    columns = f"{'least':>8}{'to none':>9}{'+-':>7}{'by seed':>19}"
    return f"{first:16}{'before':>9}{'training':>10}{columns}{'held out':>10}{columns}"


def row(name: str, before: float, found: Losses, plain: Losses | None) -> str:
    """One line of the table; without `plain` it is compared with its own mean."""
    training_part = _compared(found.training, plain and plain.training)
    held_out = _compared(found.held_out, plain and plain.held_out)
    return f"{name:16}{before:9.4f}{training_part}{held_out}"


def _compared(found: list[float], plain: list[float] | None) -> str:
    """The mean, and what the seeds are away from the same seeds of `plain`, or from their own mean."""
    mean = sum(found) / len(found)
    off = np.array(found) / (plain or mean) - 1
    text = f"{mean:10.4f}{min(found):8.4f}"
    if plain is None:
        text += " " * 16
    else:
        text += f"{off.mean():+9.2%}{off.std(ddof=1) / len(off) ** 0.5:7.2%}"
    return text + f"{off.min():+10.2%} to{off.max():+7.2%}"


def print_answers(forms: list[str], folder: Path) -> None:
    """Answers by form, each row as soon as it is known."""
    print(f"{'base':8}{'exact':>8}{'on disk':>9}{'rewards':>9}{'CPU-s':>7}", flush=True)
    for form in dict.fromkeys(["none", *forms]):
        row = answers(form, folder)
        exact = f"{row.exact:8.1%}{row.exact_on_disk:9.1%}{row.rewards:9.1%}"
        print(f"{form:8}{exact}{row.seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
