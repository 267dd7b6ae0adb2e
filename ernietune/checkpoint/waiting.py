"""A model whose frozen decoder weights stay on the host until their layer works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import paddle

from ernietune.checkpoint.load import fill_from, stored_entries
from ernietune.checkpoint.names import Source, sources
from ernietune.checkpoint.safetensors import Reader
from ernietune.memory_modes import waits_on_host
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM
from ernietune.parallel.degrees import Holding
from ernietune.parallel.host_memory import Fetch, page_locked


def load_waiting(
    folder: str | Path,
    dtype: str,
    config: ModelConfig,
    build: Callable[[ModelConfig, str], CausalLM] = CausalLM,
    holding: Holding | None = None,
) -> tuple[CausalLM, dict[str, Fetch]]:
    """The model of a checkpoint folder without those weights, and what gives each of them, by path.

    On a CPU that reads it from the mapped files, where it has taken no memory of the process; beside a GPU
    it is page-locked in host memory. CheckpointError lists all that does not fit.
    """
    reader = Reader(folder)
    parts = sources(stored_entries(reader, config))
    device = paddle.get_device()
    with _on_host(device):
        model = build(config, dtype)
        state = model.state_dict()
        # Nobody has written to these: they take no memory yet, and `parallel.apply` lets go of them.
        absent = {path: state[path] for path in state if waits_on_host(path)}
        fetch: dict[str, Fetch] = {
            path: partial(_read, path, tensor, parts, reader, holding) for path, tensor in absent.items()
        }
    if device != "cpu":
        _move_the_rest(model, device)
        fetch = {path: _locked(read) for path, read in fetch.items()}
    fill_from({p: t for p, t in model.state_dict().items() if p not in absent}, parts, reader, holding)
    return model, fetch


@contextmanager
def _on_host(device: str) -> Iterator[None]:
    paddle.set_device("cpu")
    try:
        yield
    finally:
        paddle.set_device(device)


def _read(
    path: str, like: Any, parts: dict[str, list[Source]], reader: Reader, holding: Holding | None
) -> Any:
    tensor = paddle.empty(like.shape, like.dtype)
    fill_from({path: tensor}, parts, reader, holding)
    return tensor


def _locked(read: Fetch) -> Fetch:
    with _on_host(paddle.get_device()):
        held = page_locked(read())
    return lambda: held


def _move_the_rest(model: CausalLM, device: str) -> None:
    """To the GPU goes what does not wait."""
    homes = [
        (layer, name)
        for path, layer in model.named_sublayers()
        for name in layer._parameters
        if waits_on_host(f"{path}.{name}")
    ]
    waiting = [layer._parameters[name] for layer, name in homes]
    for layer, name in homes:
        layer._parameters[name] = None
    model.to(device)
    for (layer, name), tensor in zip(homes, waiting, strict=True):
        layer._parameters[name] = tensor
