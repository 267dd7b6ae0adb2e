"""Tensors on the host: copies of what the graph keeps, of what an optimizer steps on, and frozen layers.

Page-locked and on a stream of its own where there is a GPU.

The GPU branch has not run on a GPU yet; `tests/test_gpu_calls.py` checks its calls against Paddle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import paddle
from paddle import Tensor

from ernietune.models.layers import parameter

ON_HOST = paddle.CPUPlace()
Fetch = Callable[[], Tensor]  # gives a weight in host memory


def at(tensor: Tensor, place: paddle.core.Place) -> Tensor:
    """The tensor itself when it is there, else a copy."""
    return tensor if tensor.place._equals(place) else tensor._copy_to(place, True)


class HostCopies:
    """Puts tensors on the host. On a CPU, whose memory is the host's, that is a copy all the same."""

    def __init__(self) -> None:
        self._stream: paddle.device.Stream | None = None

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy; return what fetches the copy to the tensor's own place.

        The tensor must not be freed or changed before `settle`.
        """
        if tensor.place.is_cpu_place():
            copy = tensor.clone()
            return lambda: copy
        return self._put_from_gpu(tensor)

    def settle(self) -> None:
        """Let the computation wait until the copies are made: their tensors may be freed then."""
        if self._stream is not None:
            paddle.device.current_stream().wait_stream(self._stream)

    def _put_from_gpu(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self._stream is None:
            self._stream = paddle.device.Stream()
        self._stream.wait_stream(paddle.device.current_stream())
        with paddle.device.stream_guard(self._stream):
            copy = tensor._copy_to(paddle.CUDAPinnedPlace(), False)
        place = tensor.place
        return lambda: copy._copy_to(place, True)


class HostCopy:
    """fp32 copies in host memory of parameters that an optimizer steps on in their place, by path."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.copies: dict[str, Tensor] = {}
        with _host_as_device():
            for path, held in parameters.items():
                copy = parameter(held.shape, "float32")
                copy.set_value(_fp32_on_host(held))
                copy.stop_gradient = False
                self.copies[path] = copy

    @property
    def masters(self) -> dict[str, Tensor]:
        """The copies of parameters of another type, which have digits that those have not."""
        return {p: copy for p, copy in self.copies.items() if self.parameters[p].dtype != copy.dtype}

    def follow(self) -> None:
        """Take the parameters' values, but where a copy has more digits of the same value."""
        for path, copy in self.copies.items():
            held = _fp32_on_host(self.parameters[path])
            if not paddle.equal_all(_rounded(copy, self.parameters[path]), held).item():
                copy.set_value(held)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Gradients move to the copies; what is then done to these is done to the parameters afterwards."""
        moved = [path for path, held in self.parameters.items() if held.grad is not None]
        for path in moved:
            self.copies[path].grad = _fp32_on_host(self.parameters[path].grad)
            self.parameters[path].grad = None
        with _host_as_device():
            yield
        for path in moved:
            held = self.parameters[path]
            held.set_value(at(self.copies[path].astype(held.dtype), held.place))


def _fp32_on_host(tensor: Tensor) -> Tensor:
    return at(tensor.detach(), ON_HOST).astype("float32")


def _rounded(copy: Tensor, held: Tensor) -> Tensor:
    return copy.astype(held.dtype).astype("float32")


@contextmanager
def _host_as_device() -> Iterator[None]:
    """What is made inside, such as moments, is made in host memory."""
    device = paddle.get_device()
    paddle.set_device("cpu")
    try:
        yield
    finally:
        paddle.set_device(device)


class WaitingLayers:
    """Frozen weights of layers that wait on the host, and come for as long as their layer works.

    On a GPU the next layer's are copied while one works: the one above in a forward pass, the one below in a
    backward pass. On a CPU `Fetch` reads them from the checkpoint's mapped files.
    """

    def __init__(self) -> None:
        self._layers: list[Sequence[Fetch]] = []
        self._coming: dict[int, list[Tensor]] = {}
        self._last = -1
        self._stream: paddle.device.Stream | None = None

    def add(self, weights: Sequence[Fetch]) -> int:
        """The number of one more layer."""
        self._layers.append(weights)
        return len(self._layers) - 1

    def take(self, number: int) -> list[Tensor]:
        """A layer's weights, in the order in which they were added."""
        found = self._coming[number] if number in self._coming else self._begin(number)
        self._settle()
        self._coming.clear()
        if self._stream is not None:
            following = number + 1 if number == 0 or number > self._last else number - 1
            if following < len(self._layers):
                self._coming[following] = self._begin(following)
        self._last = number
        return found

    def _begin(self, number: int) -> list[Tensor]:
        weights = [fetch() for fetch in self._layers[number]]
        return weights if paddle.get_device() == "cpu" else self._copied(weights)

    def _copied(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the GPU, in room that the computation's stream has: it may use it again afterwards."""
        if self._stream is None:
            self._stream = paddle.device.Stream()
        rooms = [paddle.empty(weight.shape, weight.dtype) for weight in weights]
        self._stream.wait_stream(paddle.device.current_stream())
        with paddle.device.stream_guard(self._stream):
            for room, weight in zip(rooms, weights, strict=True):
                room.copy_(weight, False)
        return rooms

    def _settle(self) -> None:
        if self._stream is not None:
            paddle.device.current_stream().wait_stream(self._stream)


def page_locked(tensor: Tensor) -> Tensor:
    """A copy in memory that a GPU reads by itself."""
    return tensor._copy_to(paddle.CUDAPinnedPlace(), True)
