"""The command line as a user meets it: light, and one sentence for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ernietune.environment import INSTALL_PADDLE

ROOT = Path(__file__).resolve().parent.parent
GOOD = """model:
  path: {folder}
  shape: tiny-dense
data:
  train: [train.jsonl]
lora:
  targets: [attention]
train:
  output: runs/x
  steps: 3
"""
# Runs the command with the arguments that follow, and says at the end whether paddle was imported.
REPORTING = """
import atexit, sys
atexit.register(lambda: print("PADDLE" if "paddle" in sys.modules else "LIGHT"))
from ernietune.cli import main
main()
"""
# An environment without paddle: finding it gives nothing, as if it were not installed.
WITHOUT_PADDLE = """
import sys
from importlib.machinery import PathFinder
class Blocked(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "paddle" else super().find_spec(name, path, target)
sys.meta_path = [Blocked if finder is PathFinder else finder for finder in sys.meta_path]
from ernietune.cli import main
main()
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text.format(folder=folder), encoding="utf-8")
    return file


def test_help_names_the_commands_and_leaves_paddle_alone() -> None:
    result = run(REPORTING, "--help")
    assert result.returncode == 0
    assert {"train", "export", "eval", "serve", "chat", "init"} <= set(result.stdout.split())
    assert result.stdout.endswith("LIGHT\n")


def test_misspelt_key_is_one_sentence_with_file_line_and_the_nearest_key(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD + "  warmup_step: 1\n")
    result = run(REPORTING, "train", file)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {file}:11: unknown key `train.warmup_step`; did you mean `train.warmup_steps`?\n"
    )
    assert result.stdout == "LIGHT\n"


def test_misspelt_override(tmp_path: Path) -> None:
    result = run(REPORTING, "train", written(tmp_path, GOOD), "train.step=5")
    assert result.returncode == 2
    assert result.stderr == "error: command line: unknown key `train.step`; did you mean `train.steps`?\n"
    assert result.stdout == "LIGHT\n"


def test_missing_file() -> None:
    result = run(REPORTING, "train", "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere.yaml: no such configuration file")
    assert result.stderr.count("\n") == 1


def test_unknown_target_in_a_plan(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    result = run(REPORTING, "train", file, "lora.targets=[experts]", "--dry-run")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: lora.targets: experts matches no layer of this model; use a group"
    )
    assert result.stdout.splitlines()[-1] == "LIGHT"


def test_plan_without_weights_needs_a_known_shape(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    result = run(REPORTING, "train", file, "model.shape=30b", "--dry-run")
    assert result.returncode == 2
    assert result.stderr.startswith("error: model.shape: '30b' is none of 0.3b, 21b-a3b")


def test_without_paddle_training_says_how_to_install_it(tmp_path: Path) -> None:
    result = run(WITHOUT_PADDLE, "train", written(tmp_path, GOOD))
    assert result.returncode == 2
    assert result.stderr == f"error: {INSTALL_PADDLE}\n"
    assert "pip install 'ernietune[cpu]'" in INSTALL_PADDLE
    assert "pip install 'ernietune[gpu]'" in INSTALL_PADDLE


def test_without_paddle_a_plan_still_works(tmp_path: Path) -> None:
    result = run(WITHOUT_PADDLE, "train", written(tmp_path, GOOD), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "attention" in result.stdout


def test_without_paddle_the_other_commands_say_the_same(tmp_path: Path) -> None:
    commands = (["eval", tmp_path, "--data", "x.jsonl"], ["serve", tmp_path], ["chat", tmp_path])
    for arguments in (*commands, ["export", tmp_path, "--output", tmp_path / "merged"]):
        result = run(WITHOUT_PADDLE, *arguments)
        assert (result.returncode, result.stderr) == (2, f"error: {INSTALL_PADDLE}\n")


def test_checking_data_is_light_and_says_by_its_exit_code_whether_all_is_well(tmp_path: Path) -> None:
    good = run(REPORTING, "data", "check", ROOT / "data" / "samples" / "openai.jsonl")
    assert (good.returncode, good.stdout) == (0, "2 records, nothing wrong\nLIGHT\n")
    (tmp_path / "d.jsonl").write_text('{"messages": []}\n')
    bad = run(WITHOUT_PADDLE, "data", "check", tmp_path / "d.jsonl")
    assert bad.returncode == 2
    assert bad.stdout.startswith(f"{tmp_path / 'd.jsonl'}:1: messages is empty")


def test_the_data_of_a_training_configuration_can_be_checked_and_counted() -> None:
    checked = run(WITHOUT_PADDLE, "data", "check", ROOT / "configs/tiny/dpo_lora_pictures.yaml")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.startswith("600 records, nothing wrong; 600 samples")
    counted = run(WITHOUT_PADDLE, "data", "stats", ROOT / "configs/tiny/dpo_lora_pictures.yaml")
    assert "1,200 samples" in counted.stdout
    missing = run(WITHOUT_PADDLE, "data", "stats", "d.jsonl")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: --model is missing")


def test_a_preview_needs_no_paddle(tmp_path: Path) -> None:
    missing = run(WITHOUT_PADDLE, "data", "preview", "x.jsonl", "--model", tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith(f"error: {tmp_path / 'none'} is neither an existing folder nor a hub id")


def test_what_is_logged_after_paddle_came_is_seen() -> None:
    """Paddle sets up the logging while the lines that it prints at its import are hidden."""
    done = run(
        "import logging\nfrom ernietune.environment import require_paddle\nrequire_paddle()\n"
        "logging.getLogger('ernietune.x').warning('a notice')"
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.endswith("a notice")
