"""The few things the launch code asks of a tensor, Paddle's or torch's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

Tensor = Any  # a paddle.Tensor or a torch.Tensor


def is_torch(tensor: Tensor) -> bool:
    """Whether the tensor is torch's; everything else is taken to be Paddle's."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def empty(shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
    """An uninitialised tensor of the framework and on the device of `like`; `dtype` by name ("float32")."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=vars(torch)[dtype], device=like.device)
    import paddle

    return paddle.empty(list(shape), dtype)


def zeros(shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
    """The same, filled with zeros."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.zeros(tuple(shape), dtype=vars(torch)[dtype], device=like.device)
    import paddle

    return paddle.zeros(list(shape), dtype)


def dtype_name(tensor: Tensor) -> str:
    """ "bfloat16", "float32", ... in either framework."""
    return str(tensor.dtype).rpartition(".")[2]


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor lies on a CUDA device."""
    return bool(tensor.is_cuda) if is_torch(tensor) else bool(tensor.place.is_gpu_place())


def is_tensor(value: Any) -> bool:
    """Whether a kernel argument is a tensor rather than a number or nothing."""
    return not (value is None or isinstance(value, (int, float)))


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its values lie in order, else a copy whose values do."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False) -> Tensor:
    """The framework's own product of two matrices, the first transposed where asked."""
    if is_torch(x):
        return (x.T if transpose_x else x) @ y
    import paddle

    return paddle.matmul(x, y, transpose_x=transpose_x)


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, along the first axis."""
    if is_torch(parts[0]):
        return sys.modules["torch"].cat(list(parts))
    import paddle

    return paddle.concat(list(parts))


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The values in another type."""
    if is_torch(tensor):
        return tensor.to(vars(sys.modules["torch"])[dtype])
    return tensor.astype(dtype)


def take(tensor: Tensor, index_N: Tensor) -> Tensor:
    """tensor[index] along the first axis."""
    if is_torch(tensor):
        return tensor[index_N]
    import paddle

    return paddle.gather(tensor, index_N)
