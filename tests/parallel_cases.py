"""Runs of seconds with several processes: the cases, and the processes that work on all of them in turn."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import small_run

from ernietune import launch
from ernietune.config import ParallelSection

ROOT = Path(__file__).parents[1]
PLACES = [ROOT, ROOT / "kernels", ROOT / "tests"]


def settings(case):
    """The Config of one case: base, data, output, the parallel section, and `section_key` changes."""
    defaults = {
        "train_steps": 3,
        "train_accumulation": 4,
        "train_save_every": 2,
        "train_weight_decay": 0.1,
        # Adam divides a gradient by its size: at 1e-8, noise in a gradient of 1e-9 would move a weight.
        "train_epsilon": 1e-6,
        "train_warmup_steps": 1,
        "data_max_length": 128,
    }
    made = small_run.config(
        case["base"], case["data"], case["output"], **{**defaults, **case.get("changes", {})}
    )
    made.parallel = ParallelSection(**case.get("parallel", {}))
    return made


def start(processes, cases, folder):
    """Start processes that run all `cases`; what they say goes to rank-N.log."""
    folder.mkdir()
    job = folder / "cases.json"
    job.write_text(json.dumps(cases))
    return start_script(processes, [__file__, str(job)], folder)


def start_script(processes, script, folder):
    """Start a script with its arguments that many times, as the launcher would."""
    shared = {
        "PYTHONPATH": os.pathsep.join(map(str, PLACES)),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    workers = []
    for rank, variables in enumerate(launch.variables(processes)):
        with (folder / f"rank-{rank}.log").open("w") as log:
            environment = {**os.environ, **variables, **shared}
            command = [sys.executable, *map(str, script)]
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return workers


def finish(workers, folder, seconds=240):
    """Wait for the processes; the log of one that failed is the failure."""
    try:
        for rank, worker in enumerate(workers):
            code = worker.wait(seconds)
            assert code == 0, (folder / f"rank-{rank}.log").read_text()[-4000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def in_reverse(team, batches):
    """The micro-batches of a step from the last to the first: the same sums in another order."""
    return list(enumerate(batches))[::-1]


def work(cases):
    """In a started process: every case in turn."""
    from ernietune.parallel.team import Team
    from ernietune.train import run

    for case in cases:
        with patch.object(Team, "mine", in_reverse if case.get("reversed") else Team.mine):
            run.main(settings(case))
        gc.collect()  # of the memory that the next one finds in use


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))
