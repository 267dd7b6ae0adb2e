"""The launcher with real processes: what it starts, how it stops them, and what it says."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time

import parallel_cases
import pytest
import small_run

from ernietune import config as configuration
from ernietune import launch
from ernietune.errors import ConfigError


def test_processes_of_another_launcher_must_be_as_many_as_the_degrees_say(monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    assert launch.place_for(1) == launch.Place(0, 1)
    assert launch.place_for(2) is None
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "3")
    assert launch.place_for(4) == launch.Place(3, 4)
    with pytest.raises(ConfigError, match="data x tensor is 2, but 4 processes were started"):
        launch.place_for(2)


def test_every_process_knows_its_number_and_everybodys_address():
    found = launch.variables(3)
    assert [each["PADDLE_TRAINER_ID"] for each in found] == ["0", "1", "2"]
    everybody = found[0]["PADDLE_TRAINER_ENDPOINTS"].split(",")
    assert len(set(everybody)) == 3
    assert [each["PADDLE_CURRENT_ENDPOINT"] for each in found] == everybody
    assert {each["PADDLE_MASTER"] for each in found}.isdisjoint(everybody)


@pytest.fixture
def settings(tmp_path):
    """A file for 2 processes with divided experts and too many steps to end."""
    made = parallel_cases.settings(
        {
            "base": str(small_run.base(tmp_path / "base", "tiny-moe")),
            "data": str(small_run.write_data(tmp_path / "data", 6, pictures=False)),
            "output": str(tmp_path / "run"),
            "parallel": {"data": 2, "expert": 2},
            "changes": {"train_steps": 100000, "train_save_every": 1, "train_schedule": "constant"},
        }
    )
    made.train.schedule, made.lora.targets = "constant", ["experts"]
    configuration.save(made, tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, parallel_cases.PLACES))}
    return subprocess.Popen(
        [sys.executable, "-m", "ernietune", "train", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that run in the background of a script have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def child_of(pid, rank):
    """The process of a rank among the children of `pid`."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    for child in map(int, children.split()):
        with open(f"/proc/{child}/environ") as handle:
            if f"PADDLE_TRAINER_ID={rank}" in handle.read().split("\0"):
                return child
    raise AssertionError(f"no process of rank {rank}: {children}")


def test_a_killed_process_stops_the_run_which_goes_on_in_one(settings, tmp_path):
    run = tmp_path / "run"
    started = command(settings)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(started.stdout))
    reader.start()
    try:
        until = time.monotonic() + 120
        while not (run / "run.json").is_file() and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(child_of(started.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        assert started.wait(60) == 128 + signal.SIGKILL
        assert time.monotonic() - killed < 60
    finally:
        started.kill()
        reader.join()
    last = said[-1]
    assert last.startswith("error: rank 1 (process ")
    assert "was killed by SIGKILL" in last
    assert str(run / "logs" / "rank-1.log") in last
    step = int(json.loads((run / "run.json").read_text())["last"].removeprefix("step-"))
    alone = command(settings, "parallel.data=1", "parallel.expert=1", f"train.steps={step + 1}")
    output, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0, output
    assert f"resuming after step {step} of {step + 1}" in output


def wait_for(condition, seconds=120):
    """Until a file says so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_interrupt_saves_the_step_that_all_have_ended(settings, tmp_path):
    run = tmp_path / "run"
    started = command(settings, "train.save_every=null")
    log = run / "log.jsonl"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 1)
    assert not (run / "run.json").exists()
    started.send_signal(signal.SIGINT)  # to the launcher alone, which passes it on
    output, _ = started.communicate(timeout=120)
    assert started.returncode == 130, output
    step = max(small_run.log(run))
    assert json.loads((run / "run.json").read_text())["last"] == f"step-{step:06d}"
    assert f"interrupted: saved {step} steps; the same command continues" in output
    assert "error" not in output
    alone = command(settings, "parallel.data=1", "parallel.expert=1", f"train.steps={step + 1}")
    output, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0, output
    assert f"resuming after step {step} of {step + 1}" in output


def test_an_interrupt_of_one_process_and_a_second_one_of_all(settings, tmp_path):
    # A step of minutes: it does not end, and only the second Ctrl-C stops it.
    started = command(settings, "train.accumulation=100000")
    wait_for((tmp_path / "run" / "config.yaml").is_file)
    time.sleep(0.5)
    os.kill(child_of(started.pid, 1), signal.SIGINT)
    time.sleep(0.5)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    assert "Ctrl-C again stops at once" in next(line for line in started.stdout if "Ctrl-C" in line)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130, output
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_mistake_is_said_once_and_keeps_its_exit_code(settings):
    wrong = command(settings, "data.max_length=9")
    output, _ = wrong.communicate(timeout=120)
    assert wrong.returncode == 2, output
    assert sum(line.startswith("error:") for line in output.splitlines()) == 1
    assert "rank" not in output.splitlines()[-1]


def test_the_collectives_that_only_gpus_have_are_called_as_this_paddle_names_them():
    """Their names and keywords; that they exist is all a CPU can show (docs/parallel.md)."""
    import paddle.distributed as dist

    wanted = {
        dist.stream.alltoall_single: {"out_split_sizes", "in_split_sizes", "group", "sync_op"},
        dist.stream.reduce_scatter: {"group", "sync_op"},
        dist.stream.all_gather: {"group", "sync_op"},
        dist.new_group: {"ranks"},
    }
    for function, keywords in wanted.items():
        assert keywords <= set(inspect.signature(function).parameters), function
    for function in (dist.stream.alltoall_single, dist.stream.reduce_scatter, dist.stream.all_gather):
        first = next(iter(inspect.signature(function).parameters))
        assert first in ("out_tensor", "tensor", "tensor_or_tensor_list"), (function, first)
