"""What a quantised or FP8 base costs a training: the demo's recipes on the embedded model, by form.

    python benchmarks/quantized_training.py [--seeds N] [FORM ...]   wint8 wint4 fp8; also mixed nf4
    python benchmarks/quantized_training.py --answers [FORM ...]     the dear part, one seed

Held-out loss: configs/tiny/sft_lora.yaml with EPOCHS epochs, over every form and `none`, each with several
orders of the data and first adapters. A run's loss is the mean of its last LAST evaluations. `to none`
compares runs of one seed, which began alike: the mean over the seeds and its standard error. Beside each mean
stand the smallest and the largest of the seeds; the row of `none` says how far seeds alone are apart.

Answers, after the whole recipe of ten epochs:
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
from ernietune.train import run as training  # noqa: E402
from ernietune.train.base import load_base  # noqa: E402
from ernietune.train.sft import to_inputs  # noqa: E402

EPOCHS, LAST, EVERY = 5, 4, 4  # the last evaluations are EVERY steps apart
DPO_EPOCHS = 1
FORMS = ("wint8", "wint4", "fp8")
HELD_OUT = 120
REWARDS = "rewards/accuracies"
SFT, DPO = "configs/tiny/sft_lora.yaml", "configs/tiny/dpo_lora.yaml"
TEXT_PAIRS = ["data.train=[data/preferences/train.jsonl]", "data.eval=[data/preferences/heldout.jsonl]"]


@dataclass(frozen=True)
class Losses:
    """Held-out losses of the runs over one form, by seed, and their CPU-seconds."""

    by_seed: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.by_seed) / len(self.by_seed)


@dataclass(frozen=True)
class Answers:
    """What the whole recipes gave over one form of the base."""

    exact: float
    exact_on_disk: float
    rewards: float
    seconds: float


def trained(path: str, form: str, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train a recipe over a form of its base; what its evaluations say."""
    values = [f"model.quantization={form}", f"train.output={output}", "data.workers=0"]
    training.main(configuration.load(ROOT / path, [*values, *overrides]))
    records = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == "eval"]


def losses(form: str, folder: Path, seeds: int) -> Losses:
    """The recipe over one form, seed by seed."""
    started, found = time.process_time(), []
    for seed in range(seeds):
        values = [f"train.epochs={EPOCHS}", f"train.eval_every={EVERY}", f"train.seed={seed}"]
        evaluations = trained(SFT, form, folder / f"{form}-{seed}", *values)
        found.append(sum(each["loss"] for each in evaluations[-LAST:]) / LAST)
    return Losses(found, time.process_time() - started)


def answers(form: str, folder: Path) -> Answers:
    """Both whole recipes over one form."""
    started, output, once = time.process_time(), folder / f"{form}-answers", "train.eval_every=100000"
    tuned = trained(SFT, form, output, f"train.eval_generate={HELD_OUT}", once)[-1]
    pairs = [f"train.epochs={DPO_EPOCHS}", once, *TEXT_PAIRS]
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--answers", action="store_true")
    args = parser.parse_args()
    forms = args.forms or list(FORMS)
    with tempfile.TemporaryDirectory() as name:
        if args.answers:
            print_answers(forms, Path(name))
        else:
            print_losses(forms, Path(name), args.seeds)
    if "fp8" in forms:
        print("fp8, by decoder layer:", "  ".join(f"{error:.2%}" for error in layer_errors()))


def print_losses(forms: list[str], folder: Path, seeds: int) -> None:
    """Losses by form, each row as soon as it is known."""
    head = f"{'base':8}{'loss':>9}{'seeds from mean':>20}{'to none':>10}{'+-':>7}{'by seed':>20}{'CPU-s':>7}"
    print(head, flush=True)
    plain = losses("none", folder, seeds)
    for form in dict.fromkeys(["none", *forms]):
        row = plain if form == "none" else losses(form, folder, seeds)
        text = f"{form:8}{row.mean:9.5f}{_range([loss / row.mean - 1 for loss in row.by_seed]):>20}"
        if row is not plain:
            off = [one / other - 1 for one, other in zip(row.by_seed, plain.by_seed, strict=True)]
            text += (
                f"{sum(off) / len(off):+10.2%}{np.std(off, ddof=1) / len(off) ** 0.5:7.2%}{_range(off):>20}"
            )
        else:
            text += " " * 37
        print(f"{text}{row.seconds:7.0f}", flush=True)


def _range(values: list[float]) -> str:
    return f"{min(values):+.2%} to {max(values):+.2%}"


def print_answers(forms: list[str], folder: Path) -> None:
    """Answers by form, each row as soon as it is known."""
    print(f"{'base':8}{'exact':>8}{'on disk':>9}{'rewards':>9}{'CPU-s':>7}", flush=True)
    for form in dict.fromkeys(["none", *forms]):
        row = answers(form, folder)
        exact = f"{row.exact:8.1%}{row.exact_on_disk:9.1%}{row.rewards:9.1%}"
        print(f"{form:8}{exact}{row.seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
