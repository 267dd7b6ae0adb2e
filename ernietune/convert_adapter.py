"""`ernietune adapter convert`: adapters of ERNIEKit and PaddleFormers to PEFT's layout, ours, or back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ernietune import hub
from ernietune.checkpoint.adapter import read_adapter, read_adapter_config, write_adapter
from ernietune.checkpoint.adapter_config import CONFIG_FILE, PADDLE_CONFIG_FILE
from ernietune.checkpoint.folder import staged
from ernietune.checkpoint.paddle_adapter import read_lora_config, read_paddle_adapter, write_paddle_adapter
from ernietune.checkpoint.state import checkpoint_in
from ernietune.errors import CheckpointError
from ernietune.models.config import ModelConfig


def convert(source: Path, output: Path, base: str | None = None) -> str:
    """Write the adapter of a folder or run in the other layout as a new folder; say what was written.

    `base` is the model it belongs to, when the adapter names none or one that has moved. CheckpointError when
    there is no adapter, its base is missing, or the two do not fit.
    """
    folder = checkpoint_in(source)
    theirs = (folder / PADDLE_CONFIG_FILE).is_file()
    if not theirs and not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds neither {CONFIG_FILE} nor {PADDLE_CONFIG_FILE}: no adapter")
    _, named = read_lora_config(folder) if theirs else read_adapter_config(folder)
    if not (base or named):
        raise CheckpointError(f"{folder} names no base model; give it with --base")
    config = ModelConfig.from_folder(hub.resolve(base or named))
    adapter = read_paddle_adapter(folder, config) if theirs else read_adapter(config, folder)
    adapter = replace(adapter, base=base or named)
    with staged(output) as part:
        (write_adapter if theirs else write_paddle_adapter)(part, adapter, config)
    layout = "PEFT's layout" if theirs else "the layout of PaddleNLP and PaddleFormers"
    return f"{len(adapter.factors)} layers, rank {adapter.spec.rank}, in {layout}: {output}"
