"""Several CPU processes against one: what 30 steps differ by, and what each process sends and holds.

    python benchmarks/parallel.py [--steps 30] [--data "sft, packed" ...] [--divisions TP2 ...] [--work DIR]

Tiny random models, fp32, every kind of adapter; conversations and pairs, with and without pictures. `loss`
and `weights` are the largest differences from one process over all steps and over the final adapters, with
the shipped epsilon of Adam, 1e-8. `gradient, noise` are, at the number that differs most, the root of Adam's
second moment and the difference of its first ones: a step moves a weight by rate x mean / (root + epsilon),
so noise d moves it by rate x d / epsilon at most, 1e5 d with the rate of 1e-3 here. The first row of each
kind of data is the measure of that: one process whose gradients of a step are added up from the last micro-
batch to the first. Where `weights` exceeds 1e-5 both runs are made again with 1e-6, and the row has both.
Bytes are those of a ring or direct algorithm, counted per call in ernietune/parallel/collectives.py; beside
them the formula of docs/parallel.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "kernels"), str(ROOT)]

import numpy as np  # noqa: E402
import parallel_cases  # noqa: E402
import small_run  # noqa: E402
import tiny_pairs  # noqa: E402

from ernietune.checkpoint.state import pointers  # noqa: E402
from ernietune.models.config import ModelConfig  # noqa: E402
from ernietune.parallel import traffic  # noqa: E402
from ernietune.parallel.degrees import Degrees, Part  # noqa: E402

SHIPPED, LARGER, CLOSE = 1e-8, 1e-6, 1e-5
PACKED = {"data_packing": True, "train_rows": 2}
DPO = {**PACKED, "train_objective": "dpo"}
TEXT = {"lora_targets": ["attention", "experts"]}
MEASURES = {
    # name: (model, records, settings). One conversation a micro-batch: every second one has no picture.
    "sft, pictures": ("tiny-vl", "mixed/train.jsonl", {}),
    "sft, packed": ("tiny-vl", "mixed/train.jsonl", PACKED),
    "sft, text": ("tiny-moe", "text/train.jsonl", {**PACKED, **TEXT}),
    "dpo, pictures": ("tiny-vl", "pairs/pairs.jsonl", DPO),
    "dpo, text": ("tiny-moe", "text-pairs/pairs.jsonl", {**DPO, **TEXT}),
}
REVERSED = "one process, micro-batches reversed"
DIVISIONS = {
    REVERSED: {},
    "DP2": {"data": 2},
    "DP2, sharding 1": {"data": 2, "sharding": 1},
    "DP2, sharding 2": {"data": 2, "sharding": 2},
    "DP2, sharding 3 + base": {"data": 2, "sharding": 3, "base": "sharded"},
    "EP2": {"data": 2, "expert": 2},
    "TP2": {"tensor": 2},
    "DP4": {"data": 4},
    "EP4": {"data": 4, "expert": 4},
    "EP2 x DP2": {"data": 4, "expert": 2},
    "EP2 x TP2": {"data": 2, "expert": 2, "tensor": 2},
}


def processes_of(parallel: dict) -> int:
    """How many a division needs."""
    return parallel.get("data", 1) * parallel.get("tensor", 1)


def case_of(folder: Path, measure: str, division: str, epsilon: float, steps: int) -> dict:
    """One run of `tests/parallel_cases.py`; an empty division is one process."""
    model, records, changes = MEASURES[measure]
    parallel = DIVISIONS.get(division, {})
    settings = {
        "train_steps": steps,
        "train_save_every": steps,
        "train_epsilon": epsilon,
        "train_recompute": "layers" if parallel.get("sharding") == 3 else "none",
        **changes,
    }
    return {
        "base": str(folder / model),
        "data": str(folder / records),
        "output": str(output_of(folder, measure, division, epsilon)),
        "parallel": parallel,
        "changes": settings,
        "reversed": division == REVERSED,
    }


def output_of(folder: Path, measure: str, division: str, epsilon: float) -> Path:
    """The folder of one run."""
    return folder / f"{measure}; {division or 'one'}; {epsilon}"


def prepare(folder: Path) -> None:
    """Two random checkpoints and four files of records."""
    for shape in ("tiny-vl", "tiny-moe"):
        small_run.base(folder / shape, shape)
    small_run.write_data(folder / "mixed", 24)
    small_run.write_data(folder / "text", 24, pictures=False)
    tiny_pairs.write(folder / "pairs", 12)
    tiny_pairs.write(folder / "text-pairs", 12, pictures=False)


class Runs:
    """Runs by measure, division and epsilon; those of as many processes share a start.

    What a folder holds already is not run again, and what has stopped goes on.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps

    def make(self, processes: int, wanted: list[tuple[str, str, float]]) -> None:
        """Run what of this has not been run yet."""
        wanted = [key for key in wanted if not self._is_made(output_of(self.folder, *key), processes)]
        if wanted:
            cases = [case_of(self.folder, *key, self.steps) for key in wanted]
            with tempfile.TemporaryDirectory() as name:
                logs = Path(name) / "logs"
                parallel_cases.finish(parallel_cases.start(processes, cases, logs), logs, 7200)

    def _is_made(self, output: Path, processes: int) -> bool:
        last = pointers(output).get("last") if output.is_dir() else None
        ended = processes == 1 or (output / "processes.json").is_file()
        return ended and last == f"step-{self.steps:06d}"

    def compare(self, measure: str, divisions: list[str], epsilon: float) -> dict[str, Difference]:
        """What these divisions, of one number of processes, differ by from one process."""
        self.make(1, [(measure, "", epsilon)])
        self.make(processes_of(DIVISIONS[divisions[0]]), [(measure, d, epsilon) for d in divisions])
        one = output_of(self.folder, measure, "", epsilon)
        return {d: difference(one, output_of(self.folder, measure, d, epsilon)) for d in divisions}


@dataclass(frozen=True)
class Difference:
    """The largest of losses and of weights; where the latter is, the root of the second moment of one process
    and how far the first moments are apart. `far` numbers of that parameter, `path`, are further apart than
    1e-5; `elsewhere` is the largest difference of the others.
    """

    loss: float
    weights: float
    rms: float
    noise: float
    path: str
    far: int
    elsewhere: float

    @property
    def apart(self) -> str:
        """The largest difference of weights, and where it is when that is far."""
        if not self.far:
            return f"{self.weights:.1e}"
        return f"{self.weights:.1e} ({self.far} numbers of {self.path}; elsewhere {self.elsewhere:.1e})"


def difference(one: Path, many: Path) -> Difference:
    """Of two runs."""
    expected, found = small_run.tensors(one), small_run.tensors(many)
    apart = {
        key.removeprefix("weight::"): np.abs(values - found[key])
        for key, values in expected.items()
        if key.startswith("weight::")
    }
    path = max(apart, key=lambda name: apart[name].max())
    place = np.unravel_index(apart[path].argmax(), apart[path].shape)
    power = float(expected[f"{path}::beta2_pow_acc_0"].reshape(-1)[0])
    first = f"{path}::moment1_0"
    return Difference(
        loss=float(np.abs(small_run.losses(one) - small_run.losses(many)).max()),
        weights=float(apart[path][place]),
        rms=float(np.sqrt(expected[f"{path}::moment2_0"][place] / (1 - power))),
        noise=float(abs(expected[first][place] - found[first][place])),
        path=path,
        far=int((apart[path] > CLOSE).sum()),
        elsewhere=max(float(values.max()) for name, values in apart.items() if name != path),
    )


def degrees_of(parallel: dict) -> Degrees:
    """The degrees of a `parallel` section."""
    return Degrees(**{key: parallel.get(key, 1) for key in ("data", "expert", "tensor")})


def gradient_formula(output: Path, parallel: dict, steps: int) -> float:
    """Bytes one process sends for gradients, by the formula; 0 with sharding or tensor groups."""
    degrees = degrees_of(parallel)
    if parallel.get("sharding") or degrees.tensor > 1:
        return 0.0
    common = experts = 0
    for path, values in small_run.tensors(output).items():
        if path.startswith("weight::"):
            if Part.of(path.removeprefix("weight::")).expert:
                experts += values.size // degrees.expert
            else:
                common += values.size
    step = traffic.StepTraffic(common=common, experts=experts)
    return steps * traffic.gradient_bytes(step, degrees.data, degrees.replicas)


def activation_formulas(measure: str, output: Path, parallel: dict) -> dict[str, float]:
    """Bytes one process sends for rows in training passes, by what; to experts, if choices were even."""
    degrees, config = degrees_of(parallel), ModelConfig.from_folder(output.parent / MEASURES[measure][0])
    records = small_run.log(output).values()
    step = traffic.StepTraffic(
        tokens=sum(record["tokens"] for record in records) / degrees.data,
        supervised=sum(record["supervised_tokens"] for record in records) / degrees.data,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        moe_layers=sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers)),
        chosen=config.moe_k,
    )
    found = {}
    if degrees.expert > 1:
        found["even exchange"] = traffic.exchange_bytes(step, degrees.expert)
    if degrees.tensor > 1:
        found["rows"] = traffic.tensor_bytes(step, degrees.tensor)
        found["words and labels"] = traffic.vocabulary_bytes(step, degrees.tensor)
    return found


def line(measure: str, division: str, output: Path, found: Difference, larger: str, steps: int) -> str:
    """One row of the table; of pairs, which take a pass without gradients as well, without formulas."""
    start = (
        f"| {measure} | {division} | {found.loss:.1e} | {found.apart} "
        f"| {found.rms:.0e}, {found.noise:.0e} | {larger} |"
    )
    if division == REVERSED:
        return f"{start} - | - | - |"
    processes = json.loads((output / "processes.json").read_text())["processes"]
    sent = {kind: count / 2**20 for kind, count in processes[0]["sent"].items()}
    held = "/".join(f"{each['held'] / 2**20:.1f}" for each in processes)
    formulas = {"gradients": gradient_formula(output, DIVISIONS[division], steps)}
    if not measure.startswith("dpo"):
        formulas |= activation_formulas(measure, output, DIVISIONS[division])
    shown = ", ".join(f"{what} {count / 2**20:.2f}" for what, count in formulas.items() if count)
    counted = ", ".join(f"{kind} {amount:.2f}" for kind, amount in sent.items() if amount >= 0.005)
    return f"{start} {held} | {counted} | {shown or '-'} |"


def compare(runs: Runs, measure: str, divisions: list[str]) -> None:
    """Print the rows of one measure for divisions of one number of processes."""
    shipped = runs.compare(measure, divisions, SHIPPED)
    far = [division for division, found in shipped.items() if found.weights > CLOSE]
    again = runs.compare(measure, far, LARGER) if far else {}
    for division, found in shipped.items():
        other = again.get(division)
        larger = f"{other.loss:.1e}, {other.weights:.1e}" if other else "-"
        output = output_of(runs.folder, measure, division, SHIPPED)
        print(line(measure, division, output, found, larger, runs.steps), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--data", nargs="*", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--divisions", nargs="*", default=list(DIVISIONS), choices=DIVISIONS)
    parser.add_argument("--work", type=Path, help="keeps the runs, to go on; default: none does")
    options = parser.parse_args()
    print(
        "| data | division | loss | weights | gradient, noise there | loss, weights with epsilon 1e-6 "
        "| MiB held | MiB sent by rank 0 | formula |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = options.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tiny-vl").exists():
            prepare(folder)
        runs = Runs(folder, options.steps)
        for processes in (1, 2, 4):
            divisions = [name for name in options.divisions if processes_of(DIVISIONS[name]) == processes]
            for measure in options.data if divisions else []:
                compare(runs, measure, divisions)


if __name__ == "__main__":
    main()
