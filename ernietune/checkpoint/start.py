"""Where a training starts: a whole model, or an adapter on top of one; imports no paddle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ernietune import hub
from ernietune.checkpoint.adapter_config import CONFIG_FILE, read_adapter_config, refuse_paddle_adapter
from ernietune.checkpoint.state import checkpoint_in
from ernietune.errors import CheckpointError


@dataclass(frozen=True)
class Start:
    """The folder of the whole model, what an adapter calls that model, and the adapter to go on with."""

    base: Path
    name: str
    adapter: Path | None = None

    @classmethod
    def find(cls, path: str) -> Start:
        """What `path` stands for: a model folder, a hub id, a run (its best checkpoint) or an adapter.

        CheckpointError when there is none of these, or when the adapter's base is not there.
        """
        folder = checkpoint_in(hub.resolve(path))
        refuse_paddle_adapter(folder)
        if not (folder / CONFIG_FILE).is_file():
            # A hub id stays one: the local copy of it is nobody else's path.
            return cls(folder, str(folder) if Path(path).exists() else path)
        base = base_of(folder)
        try:
            return cls(hub.resolve(base), base, folder)
        except CheckpointError as error:
            raise CheckpointError(f"the base model of {folder} is not there: {error}") from error


def base_of(adapter: Path) -> str:
    """The model an adapter folder names as its base; CheckpointError when it names none."""
    _, base = read_adapter_config(adapter)
    if not base:
        raise CheckpointError(f"{adapter / CONFIG_FILE} names no base model; write base_model_name_or_path")
    return base


def adapter_at(path: str, base: Path) -> Path:
    """The adapter of a run, a checkpoint or an adapter folder; CheckpointError when none is there for `base`.

    A base that is no longer where the adapter says is not compared; the shapes still are when it is read.
    """
    folder = checkpoint_in(Path(path).expanduser())
    refuse_paddle_adapter(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path} holds no adapter ({CONFIG_FILE}); name a LoRA run or an adapter")
    trained_on = Path(base_of(folder)).expanduser()
    if trained_on.is_dir() and not trained_on.samefile(base):
        raise CheckpointError(f"{path} is an adapter of {trained_on}, not of {base}; both must have one base")
    return folder
