"""What rounding a base to four bits does to it, before any training and to one; other choices of scales.

    python benchmarks/rounding.py                      errors, seconds
    python benchmarks/rounding.py --train 5            and the demo's training over each, that many seeds

Every matrix that `model.quantization: wint4` holds as codes is replaced by numbers that went through them:
int4       as the kernels do it: the value of largest magnitude of a group is the code -8
int4 fit   the scale of least squared error: for 16 sizes of the step the best codes, and the scale that fits
           those best
... N      with groups of at most N columns
nf4; int8  the other codes
noise      not rounded: normal noise whose power in every matrix is that of int4's error
Errors are root mean squares over those of the exact numbers: of the matrices, and of the logits at answers
of held-out records. `known` are questions that the embedded model was made for, `badges` the task it has yet
to learn; `agree` is how often the most probable word is the exact model's.

For training the numbers are written as a bf16 checkpoint, so that everything else is as with
`quantization: none`. Columns are those of benchmarks/quantized_training.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import quantized_training as recipe  # noqa: E402
from ernietune_kernels import nf4, quantized  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from ernietune import config as configuration  # noqa: E402
from ernietune.checkpoint.load import save_model  # noqa: E402
from ernietune.data.build import records_of  # noqa: E402
from ernietune.models.decoder import CausalLM  # noqa: E402
from ernietune.models.forms import TRAINING, form_of  # noqa: E402
from ernietune.text.template import IGNORE  # noqa: E402
from ernietune.train import run as training  # noqa: E402
from ernietune.train.base import load_base  # noqa: E402
from ernietune.train.sft import to_inputs  # noqa: E402

Rounding = Callable[[NDArray[np.float32], int], NDArray[np.float32]]
STEPS = np.linspace(0.7, 1.075, 16, dtype=np.float32)
SETS = {"known": "data/questions/text.jsonl", "badges": "data/badges/heldout.jsonl"}


def int4(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """As the kernels round."""
    return quantized.dequantize(quantized.quantize(rows, 4, width)).numpy()


def int8(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """A scale for a row."""
    return quantized.dequantize(quantized.quantize(rows, 8)).numpy()


def nf4_levels(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """QLoRA's levels, in groups of at most 64."""
    codes, scale = nf4.codes_of(rows, width := min(width, 64))
    return nf4.dequantize(
        nf4.Nf4Weight(paddle.to_tensor(codes), paddle.to_tensor(scale), width, rows.shape)
    ).numpy()


def int4_fit(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Codes and scale of each group with the least squared error of those tried."""
    groups = rows.reshape(-1, width)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1) / np.float32(-8)
    best, least = np.zeros_like(groups), np.full((len(groups), 1), np.inf, np.float32)
    for step in STEPS:
        codes = np.clip(np.rint(groups / np.where(peak == 0, 1, peak * step)), -8, 7)
        fitted = codes * (_dots(groups, codes) / np.maximum(_dots(codes, codes), 1))
        error = _dots(groups - fitted, groups - fitted)
        best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    return best.reshape(rows.shape)


def _dots(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    return (one * other).sum(-1, keepdims=True)


def noise(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """With the error of int4 replaced by noise; of one shape and power always the same."""
    power = float(np.sqrt(np.square(int4(rows, width) - rows).mean()))
    return rows + power * np.random.default_rng(rows.size).standard_normal(rows.shape, np.float32)


def exact(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Nothing is rounded."""
    return rows


def narrower(rounding: Rounding, most: int, rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The same in groups of at most `most` columns."""
    return rounding(rows, min(width, most))


ROUNDINGS: dict[str, Rounding] = {
    "exact": exact,
    "int8": int8,
    "int4": int4,
    "int4 fit": int4_fit,
    "int4 64": partial(narrower, int4, 64),
    "int4 32": partial(narrower, int4, 32),
    "int4 fit 32": partial(narrower, int4_fit, 32),
    "nf4": nf4_levels,
    "noise": noise,
}
TRAINED = ("int4", "int4 fit", "int4 32", "noise")


@dataclass(frozen=True)
class Told:
    """What a model says at the answers of a set: logits [N, V] and the labels' mean loss."""

    logits: NDArray[np.float32]
    loss: float


def rounded_model(rounding: Rounding) -> tuple[CausalLM, float]:
    """The embedded model with its matrices rounded, and the error of all of them over their power."""
    config, folder = _config(), _folder()
    model = load_base(folder, training.processor_of(config, folder).config, "float32", "none")
    error = power = 0.0
    for name, weight in model.named_parameters():
        path = name.removesuffix(".weight")
        shape = tuple(weight.shape)
        if len(shape) < 2 or path == name or ".router" in path:
            continue
        form = form_of(path, shape, TRAINING["wint4"], {})
        if form is None or form.bits != 4:
            continue
        before = weight.numpy()
        after = rounding(before, form.group)
        error, power = error + float(np.square(after - before).sum()), power + float(np.square(before).sum())
        weight.set_value(after)
    return model, (error / power) ** 0.5


def _config(data: str = SETS["badges"]) -> Any:
    return configuration.load(recipe.ROOT / recipe.SFT, [f"data.eval=[{data}]"])


def _folder() -> Path:
    return Path(_config().model.path)


def told(model: CausalLM, data: str) -> Told:
    """Logits and loss at every label of a file."""
    config = _config(data)
    processor = training.processor_of(config, _folder())
    logits, losses = [], []
    with paddle.no_grad():
        for batch in training.evaluation_of(records_of(config, config.data.eval, processor), config)():
            where = paddle.to_tensor(np.flatnonzero(batch.labels != IGNORE))
            found = model.logits(paddle.gather(model(to_inputs(batch)), where))
            labels = paddle.to_tensor(batch.labels[batch.labels != IGNORE])
            losses.append(paddle.nn.functional.cross_entropy(found, labels, reduction="none").numpy())
            logits.append(found.numpy())
    return Told(np.concatenate(logits), float(np.concatenate(losses).mean()))


def errors() -> None:
    """Print one line for every rounding."""
    print(f"{'':14}{'weights':>9}" + "".join(f"{f'logits, {s}':>16}{'agree':>8}{'loss':>9}" for s in SETS))
    plain: dict[str, Told] = {}
    for name, rounding in ROUNDINGS.items():
        model, error = rounded_model(rounding)
        text = f"{name:14}{error:9.2%}"
        for which, data in SETS.items():
            found = told(model, data)
            true = plain.setdefault(which, found)
            off = np.sqrt(np.square(found.logits - true.logits).mean() / np.square(true.logits).mean())
            agree = (found.logits.argmax(-1) == true.logits.argmax(-1)).mean()
            text += f"{off:16.2%}{agree:8.1%}{found.loss:9.4f}"
        print(text, flush=True)


def train(seeds: int, epochs: int, names: list[str]) -> None:
    """The recipe over checkpoints of rounded numbers."""
    print(recipe.heading("base"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        plain = None
        for which in ("exact", *names):
            folder = Path(name) / which
            model, _ = rounded_model(ROUNDINGS[which])
            save_model(model, folder, like=_folder())
            before = told(model, SETS["badges"]).loss
            runs = recipe.losses("none", Path(name) / f"{which} runs", seeds, epochs, f"model.path={folder}")
            print(recipe.row(which, before, runs, plain), flush=True)
            plain = plain or runs


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, metavar="SEEDS", help="train as well; two or more")
    parser.add_argument("--epochs", type=int, default=recipe.EPOCHS)
    parser.add_argument("--over", nargs="*", default=list(TRAINED), choices=ROUNDINGS)
    args = parser.parse_args()
    recipe.console.quiet = True
    errors()
    if args.train:
        train(args.train, args.epochs, args.over)


if __name__ == "__main__":
    main()
