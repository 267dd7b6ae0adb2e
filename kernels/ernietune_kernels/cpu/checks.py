"""What a compiled kernel gives at its first use beside what it has to give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paddle import Tensor

from ernietune_kernels.cpu.library import Library, kernels

_log = logging.getLogger(__name__)
_TOLERANCE = 1e-4
Results = Mapping[str, tuple[Tensor, NDArray[Any]]]  # name -> (found, wanted)


def is_right(kernel: str, results: Results) -> bool:
    """Whether all numbers are as wanted, to 1e-4 of the largest; says which are not, and what follows."""
    for name, (found, wanted) in results.items():
        error = np.abs(found.numpy() - wanted).max() / np.abs(wanted).max()
        if not error <= _TOLERANCE:
            _log.warning(
                "the C kernel for %s is not used, which is slower: %s has an error of %.1e",
                kernel,
                name,
                error,
            )
            return False
    return True


def checked(kernel: str, results: Callable[[Library], Results]) -> Library | None:
    """The library, None where it is missing or computes something else than float64; says so."""
    library = kernels()
    return library if library is not None and is_right(kernel, results(library)) else None
