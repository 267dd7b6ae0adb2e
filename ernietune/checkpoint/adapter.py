"""LoRA adapters on disk, in the layout of the PEFT library: any tool that reads PEFT can read them.

A stack of experts becomes one A and one B per expert, numbered as on disk: vision behind text experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paddle import nn

from ernietune.checkpoint.adapter_config import CONFIG_FILE, read_adapter_config
from ernietune.checkpoint.names import PT, sources, table
from ernietune.checkpoint.safetensors import Reader, write_file, write_json
from ernietune.errors import CheckpointError, listed
from ernietune.lora import LoRAExperts, LoraSpec, adapters
from ernietune.models.config import ModelConfig
from ernietune.parallel.degrees import Degrees, Holding

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "fill",
    "load_adapter",
    "module_names",
    "read_adapter",
    "read_adapter_config",
    "save_adapter",
    "short_names",
    "write_adapter",
]

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
Float = NDArray[np.float32]
Key = tuple[str, int | None]  # path of the adapted layer, expert within its stack


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk: A [r, in] and B [out, r] for every adapted layer or single expert."""

    spec: LoraSpec
    base: str
    factors: dict[Key, tuple[Float, Float]]


def save_adapter(
    model: nn.Layer, folder: str | Path, base: str, weights: Mapping[str, Float] | None = None
) -> None:
    """Write the adapters of an injected model as adapter_config.json and adapter_model.safetensors.

    `base` is the folder or hub id of the model they belong to. `weights`, by parameter path, stand for the
    model's own where it holds only a part of them. CheckpointError when the disk refuses.
    """
    injected = list(adapters(model))
    assert injected, "save_adapter needs a model with adapters"
    factors = {
        (path, index): pair for path, layer in injected for pair, index in _host_factors(layer, path, weights)
    }
    write_adapter(folder, Adapter(injected[0][1].spec, base, factors), model.config)


def write_adapter(folder: str | Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors; CheckpointError when the disk refuses."""
    folder, names = Path(folder), module_names(config)
    tensors: dict[str, tuple[str, Any]] = {}
    for key, (a, b) in adapter.factors.items():
        tensors[f"{_PREFIX}{names[key]}.lora_A.weight"] = ("F32", a)
        tensors[f"{_PREFIX}{names[key]}.lora_B.weight"] = ("F32", b)
    write_file(folder / WEIGHTS_FILE, tensors)
    modules = [names[key] for key in adapter.factors]
    try:
        write_json(folder / CONFIG_FILE, _config(adapter.spec, adapter.base, modules, names))
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be written ({error.strerror})") from error


def load_adapter(model: nn.Layer, folder: str | Path, holding: Holding | None = None) -> Adapter:
    """Copy a saved adapter, or this process's part of it, into an injected model and return it.

    CheckpointError when the two do not adapt the same layers with the same rank and scale.
    """
    adapter = read_adapter(model.config, folder)
    fill(dict(adapters(model)), adapter, folder, holding)
    return adapter


def fill(
    layers: Mapping[str, Any], adapter: Adapter, folder: str | Path, holding: Holding | None = None
) -> None:
    """Copy an adapter that was read from `folder` into injected layers by path, as `load_adapter` does."""
    holding = holding or Holding(Degrees())
    wanted = {(path, index) for path, layer in layers.items() for index in _indices(layer, holding)}
    missing = sorted(f"{path}{_number(index)}" for path, index in wanted - adapter.factors.keys())
    extra = sorted(f"{path}{_number(index)}" for path, index in adapter.factors.keys() - wanted)
    for what, items in (("has no weights for", missing), ("has weights for layers without adapter:", extra)):
        if items:
            raise CheckpointError(
                f"{folder} {what} {listed(items)}; use the lora settings it was trained with"
            )
    for path, layer in layers.items():
        _fill(layer, path, adapter, str(folder), holding)


def read_adapter(config: ModelConfig, folder: str | Path) -> Adapter:
    """Read a PEFT folder, with our paths for its modules.

    CheckpointError when a module does not exist in a model of this config, a shape or rank is wrong, one of a
    pair is missing, or the adapter uses PEFT options that we do not support.
    """
    folder = Path(folder)
    spec, base = read_adapter_config(folder)
    reader = Reader(folder / WEIGHTS_FILE) if folder.is_dir() else Reader(folder)
    shapes = _module_shapes(config)
    factors: dict[Key, tuple[Float, Float]] = {}
    for module in _modules(reader):
        where = f"{folder / WEIGHTS_FILE}: {module}"
        if module not in shapes:
            raise CheckpointError(f"{where} is no layer of the base model ({config.model_type})")
        key, (outputs, inputs) = shapes[module]
        a = _factor(reader, module, "A", (spec.rank, inputs), where)
        factors[key] = a, _factor(reader, module, "B", (outputs, spec.rank), where)
    if not factors:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no adapter weights")
    return Adapter(spec, base, factors)


def module_names(config: ModelConfig) -> dict[Key, str]:
    """Return the "pt" module name of every layer, and of every expert of a stack."""
    return {key: module for module, (key, _) in _module_shapes(config).items()}


def _module_shapes(config: ModelConfig) -> dict[str, tuple[Key, tuple[int, int]]]:
    """Return module name -> (our key, weight shape [out, in]) of everything that could be adapted."""
    found: dict[str, tuple[Key, tuple[int, int]]] = {}
    for param, parts in sources(table(config, PT).values()).items():
        for entry, target in parts:
            if param.endswith(".weight") and len(entry.shape) == 2 and not entry.keep_fp32:
                outputs, inputs = entry.shape
                key = param.removesuffix(".weight"), target.index
                found[entry.name.removesuffix(".weight")] = key, (outputs, inputs)
    return found


def _config(spec: LoraSpec, base: str, modules: list[str], names: dict[Key, str]) -> dict[str, Any]:
    alpha = spec.effective_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": spec.dropout,
        "target_modules": short_names(modules, names.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "ernietune": asdict(spec),
    }


def short_names(modules: list[str], everything: Iterable[str]) -> list[str]:
    """Return last name parts ("q_proj") when they mean exactly these modules to PEFT, else the full names."""
    short = {name.rpartition(".")[2] for name in modules}
    meant = {name for name in everything if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(modules) else modules


def _host_factors(
    layer: Any, path: str, weights: Mapping[str, Float] | None
) -> Iterator[tuple[tuple[Float, Float], int | None]]:
    if weights is None:
        a, b = layer.lora_A.numpy(), layer.lora_B.numpy()
    else:
        a, b = weights[f"{path}.lora_A"], weights[f"{path}.lora_B"]
    if not isinstance(layer, LoRAExperts):
        yield (a, b), None
        return
    for index in range(len(a)):
        yield (a[index], b[index]), index


def _indices(layer: Any, holding: Holding) -> list[int | None]:
    """Of all experts, also those that other processes hold."""
    if not isinstance(layer, LoRAExperts):
        return [None]
    return list(range(layer.lora_A.shape[0] * holding.degrees.expert))


def _number(index: int | None) -> str:
    return "" if index is None else f"[{index}]"


def _modules(reader: Reader) -> list[str]:
    """Return the modules that have a lora_A or lora_B; any other tensor is an error."""
    modules: dict[str, None] = {}
    for info in reader.infos:
        module, _, rest = info.name.rpartition(".lora_")
        if rest not in ("A.weight", "B.weight") or not module.startswith(_PREFIX):
            raise CheckpointError(f"{reader.path}: {info.name} is no LoRA weight of the PEFT layout")
        modules[module.removeprefix(_PREFIX)] = None
    return list(modules)


def _factor(reader: Reader, module: str, letter: str, shape: tuple[int, int], where: str) -> Float:
    name = f"{_PREFIX}{module}.lora_{letter}.weight"
    if name not in reader:
        raise CheckpointError(f"{where} has no lora_{letter}")
    found = reader.info(name).shape
    if found != shape:
        raise CheckpointError(f"{where}: lora_{letter} expected {list(shape)} found {list(found)}")
    return reader.float32(name)


def _fill(layer: Any, path: str, adapter: Adapter, where: str, holding: Holding) -> None:
    if (layer.spec.rank, layer.scale) != (adapter.spec.rank, adapter.spec.scale):
        raise CheckpointError(
            f"{where} has rank {adapter.spec.rank} and scale {adapter.spec.scale:g}, the model's adapter"
            f" of {path} has {layer.spec.rank} and {layer.scale:g}; set lora.rank and lora.alpha as there"
        )
    pairs = [adapter.factors[path, index] for index in _indices(layer, holding)]
    stacked = isinstance(layer, LoRAExperts)
    factors = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    for (name, parameter), items in zip(factors.items(), zip(*pairs, strict=True), strict=True):
        whole = np.stack(items) if stacked else items[0]
        parameter.set_value(np.ascontiguousarray(holding.cut(f"{path}.{name}", whole)))
