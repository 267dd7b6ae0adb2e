"""adapter_config.json, PEFT's description of an adapter; imports no paddle."""

from __future__ import annotations

import json
from pathlib import Path

from ernietune.errors import CheckpointError
from ernietune.models.fields import Fields
from ernietune.targets import LoraSpec

CONFIG_FILE = "adapter_config.json"
PADDLE_CONFIG_FILE = "lora_config.json"  # of PaddleNLP, PaddleFormers and ERNIEKit
# Options of PEFT that change the mathematics; we neither write nor read them.
_PLAIN = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
_EMPTY = ("rank_pattern", "alpha_pattern")


def refuse_paddle_adapter(folder: Path) -> None:
    """CheckpointError when `folder` holds an adapter in the layout of the Paddle libraries."""
    if (folder / PADDLE_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter in the layout of ERNIEKit and PaddleFormers ({PADDLE_CONFIG_FILE}); "
            f"write it in ours first: ernietune adapter convert {folder} --output NEW_FOLDER"
        )


def read_adapter_config(folder: Path) -> tuple[LoraSpec, str]:
    """Return the spec and the base model of an adapter folder; CheckpointError names the file and key."""
    refuse_paddle_adapter(folder)
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is this an adapter folder?") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type must be LORA")
    fields = Fields(raw, str(path))
    for key, plain in _PLAIN.items():
        if raw.get(key, plain) not in (plain, None):
            raise fields.wrong(key, f"is {raw[key]!r}, which is not supported")
    for key in _EMPTY:
        if raw.get(key):
            raise fields.wrong(key, "is set; adapters with several ranks or alphas are not supported")
    own = fields.child("ernietune").raw if raw.get("ernietune") else {}
    spec = LoraSpec(
        rank=fields.integer("r"),
        alpha=fields.number("lora_alpha"),
        targets=tuple(own.get("targets", raw.get("target_modules") or ())),
        exclude=tuple(own.get("exclude", ())),
        dropout=float(fields.value("lora_dropout", 0.0)),
        rslora=fields.boolean("use_rslora", False),
    )
    return spec, str(raw.get("base_model_name_or_path") or "")
