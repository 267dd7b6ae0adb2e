"""LoRA adapters in the layout of PaddleNLP, PaddleFormers and ERNIEKit.

A is [in, r] and B [r, out] there, under the names that layers have in memory. An adapter of a fused layer
becomes one of each part, with the same A: the sums are exactly the same. The columns of a fused B stand as
the layer's outputs do: q|k|v in ERNIEKit's own models (`ernie.`), by key/value group in PaddleFormers'
(`model.`): its query heads, its key head, its value head.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernietune.checkpoint.adapter import Adapter, Float, Key, module_names, short_names
from ernietune.checkpoint.adapter_config import PADDLE_CONFIG_FILE
from ernietune.checkpoint.names import PADDLE, PT, DiskTensor, parameter_shapes, table
from ernietune.checkpoint.safetensors import Reader, write_file, write_json
from ernietune.errors import CheckpointError, listed
from ernietune.models.config import ModelConfig
from ernietune.models.fields import Fields
from ernietune.targets import LoraSpec, named_targets

WEIGHTS_FILE = "peft_model-00001-of-00001.safetensors"
INDEX_FILE = "peft_model.safetensors.index.json"  # without it their libraries start from fresh adapters
PICKLED_FILE = "lora_model_state.pdparams"
# Options under which the sum is another one, or the base another model.
_REFUSED = ("pissa", "loraga", "use_mora", "lora_use_mixer", "do_qat", "trainable_bias", "trainable_modules")
_HARMLESS = {("collections", "OrderedDict"), ("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")}
_DEGREES = ("tensor_parallel_degree", "tensor_model_parallel_size")


@dataclass(frozen=True, eq=False)
class _Piece:
    """What one of our layers is of one of theirs: columns of B, in the order of our outputs."""

    key: Key
    columns: NDArray[np.int64]


@dataclass(frozen=True)
class _Layer:
    """A layer of theirs: its numbers of inputs and outputs, and its parts."""

    inputs: int
    outputs: int
    pieces: list[_Piece]


def read_paddle_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """Read an adapter folder of theirs, with our paths for its layers.

    CheckpointError names the file and what is wrong in it: options that change the sums, parts of a divided
    run, layers the model does not have, shapes that do not fit.
    """
    folder = Path(folder)
    spec, base = read_lora_config(folder)
    tensors, layers = _tensors(folder), _layers(config)
    factors: dict[Key, tuple[Float, Float]] = {}
    for name in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
        layer = layers.get(name)
        if layer is None:
            raise CheckpointError(f"{folder}: {name} is no layer of the base model ({config.model_type})")
        a = _factor(tensors, f"{name}.lora_A", (layer.inputs, spec.rank), folder)
        b = _factor(tensors, f"{name}.lora_B", (spec.rank, layer.outputs), folder)
        for piece in layer.pieces:
            factors[piece.key] = (np.ascontiguousarray(a.T), np.ascontiguousarray(b[:, piece.columns].T))
    targets = named_targets({path for path, _ in factors}, parameter_shapes(config))
    return Adapter(LoraSpec(spec.rank, spec.alpha, targets, (), spec.dropout, spec.rslora), base, factors)


def read_lora_config(folder: Path) -> tuple[LoraSpec, str]:
    """The spec (its targets left empty) and the base of a lora_config.json; CheckpointError names the key."""
    path = folder / PADDLE_CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); is this an adapter of ERNIEKit's?"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    fields = Fields(raw, str(path))
    for key in _REFUSED:
        if raw.get(key):
            raise fields.wrong(
                key, f"is {raw[key]!r}, under which an adapter is not a plain sum beside its base"
            )
    for key in _DEGREES:
        if (raw.get(key) or 1) > 1:
            raise fields.wrong(key, "is above 1: these are parts of an adapter; save it merged there")
    spec = LoraSpec(
        rank=fields.integer("r"),
        alpha=fields.number("lora_alpha"),
        targets=(),
        dropout=float(raw.get("lora_dropout") or 0.0),
        rslora=bool(raw.get("rslora")),
    )
    stated = raw.get("scaling")
    if stated is not None and abs(float(stated) - spec.scale) > 1e-6 * abs(spec.scale):
        raise fields.wrong("scaling", f"is {stated}, but r, lora_alpha and rslora give {spec.scale:g}")
    return spec, str(raw.get("base_model_name_or_path") or "")


def write_paddle_adapter(folder: str | Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write an adapter for models whose layers are named as the published "-PT" weights are."""
    folder, names = Path(folder), module_names(config)
    tensors: dict[str, tuple[str, Any]] = {}
    for key, (a, b) in adapter.factors.items():
        tensors[f"{names[key]}.lora_A"] = ("F32", np.ascontiguousarray(a.T))
        tensors[f"{names[key]}.lora_B"] = ("F32", np.ascontiguousarray(b.T))
    write_file(folder / WEIGHTS_FILE, tensors, framework="np")
    total = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, WEIGHTS_FILE)}
    write_json(folder / INDEX_FILE, index)
    modules = [names[key] for key in adapter.factors]
    short = short_names(modules, names.values())
    spec = adapter.spec
    write_json(
        folder / PADDLE_CONFIG_FILE,
        {
            "base_model_name_or_path": adapter.base,
            "r": spec.rank,
            "lora_alpha": spec.effective_alpha,
            "lora_dropout": spec.dropout,
            "rslora": spec.rslora,
            "scaling": spec.scale,
            "target_modules": [re.escape(n) if n in modules else rf".*\.{n}" for n in short],
            "tensor_parallel_degree": -1,
            "dtype": "float32",
        },
    )


def _layers(config: ModelConfig) -> dict[str, _Layer]:
    """Every layer an adapter may go around, under all names it has there."""
    found: dict[str, _Layer] = {}
    for entry in table(config, PT).values():
        if _is_matrix(entry):
            pieces = [_Piece((_path(entry), entry.targets[0].index), np.arange(entry.shape[0]))]
            found[entry.name.removesuffix(".weight")] = _Layer(entry.shape[1], entry.shape[0], pieces)
    for entry in table(config, PADDLE).values():
        if _is_matrix(entry):
            name, layer = entry.name.removesuffix(".weight"), _fused(entry)
            found[name] = layer
            if name.endswith(".qkv_proj"):
                layer = _by_groups(layer, config)
            found.setdefault(re.sub(r"^ernie\.", "model.", name), layer)
    return found


def _is_matrix(entry: DiskTensor) -> bool:
    return bool(entry.targets) and len(entry.shape) == 2 and not entry.keep_fp32 and ".weight" in entry.name


def _path(entry: DiskTensor) -> str:
    return entry.targets[0].param.removesuffix(".weight")


def _fused(entry: DiskTensor) -> _Layer:
    """Of a matrix [in, out] on disk, whose parts are ranges of columns."""
    inputs, outputs = entry.shape
    pieces = [
        _Piece(
            (target.param.removesuffix(".weight"), target.index),
            np.arange(outputs) if target.axis is None else np.arange(target.start, target.stop),
        )
        for target in entry.targets
    ]
    return _Layer(inputs, outputs, pieces)


def _by_groups(layer: _Layer, config: ModelConfig) -> _Layer:
    """The same q, k and v where they stand by key/value group."""
    heads, size = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    grid = np.arange(layer.outputs).reshape([config.num_key_value_heads, heads + 2, size])
    parts = (grid[:, :heads], grid[:, heads], grid[:, heads + 1])
    pieces = [_Piece(old.key, part.ravel()) for old, part in zip(layer.pieces, parts, strict=True)]
    return _Layer(layer.inputs, layer.outputs, pieces)


def _factor(tensors: Mapping[str, Float], name: str, shape: tuple[int, int], folder: Path) -> Float:
    if name not in tensors:
        raise CheckpointError(f"{folder}: {name} is missing, its partner is there")
    if tensors[name].shape != shape:
        raise CheckpointError(f"{folder}: {name} expected {list(shape)} found {list(tensors[name].shape)}")
    return tensors[name]


def _tensors(folder: Path) -> dict[str, Float]:
    """All factors of a folder in fp32; the pickled file is read where there is no other."""
    files = sorted(folder.glob("peft_model*.safetensors"))
    if not files and not (folder / PICKLED_FILE).is_file():
        raise CheckpointError(f"{folder} has neither peft_model*.safetensors nor {PICKLED_FILE}")
    found = dict(_of_files(files)) if files else _unpickled(folder / PICKLED_FILE)
    others = [name for name in found if not re.fullmatch(r".+\.lora_[AB]", name)]
    if others:
        raise CheckpointError(f"{folder}: {listed(others)} is no LoRA factor; only those are read")
    if not found:
        raise CheckpointError(f"{folder} holds no adapter weights")
    return found


def _of_files(files: list[Path]) -> Iterator[tuple[str, Float]]:
    for file in files:
        reader = Reader(file)
        for info in reader.infos:
            yield info.name, reader.float32(info.name)


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle can name any function, and would have it called."""

    def find_class(self, module: str, name: str) -> Any:
        if re.fullmatch(r"numpy\._?core\.multiarray", module) and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]  # numpy 2 has it in another module than numpy 1
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _unpickled(path: Path) -> dict[str, Float]:
    try:
        with open(path, "rb") as handle:
            content = _ArraysOnly(handle).load()
    except (pickle.UnpicklingError, OSError, EOFError, ImportError) as error:
        raise CheckpointError(f"{path} cannot be read as arrays ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dict of arrays")
    found: dict[str, Float] = {}
    for name, value in content.items():
        # Paddle pickles a tensor as (its internal name, the array); bfloat16 numbers are uint16 there.
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if isinstance(array, np.ndarray):
            wide = array.astype(np.uint32) << 16 if array.dtype == np.uint16 else array
            found[str(name)] = wide.view(np.float32) if array.dtype == np.uint16 else wide.astype(np.float32)
    return found
