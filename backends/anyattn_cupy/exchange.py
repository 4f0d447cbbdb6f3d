"""Arrays of torch and JAX as CuPy's and results back: by DLPack, without a copy, on the caller's stream.

torch has a current stream, and CuPy computes on it. JAX has none that it tells: it makes CuPy's stream wait
for arrays when it hands them over, and its own for results. It would also give the memory of an array that
nobody names any more to others while a kernel still reads it, so arrays are held until that is done.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyattn.arrays import Array, library

__all__ = ["as_cupy", "current", "given_back", "hold", "keep_until_done"]

_OTHERS = ("torch", "jax")
_held: deque[tuple[Any, list[Array]]] = deque()
_lock = threading.Lock()


@contextmanager
def current(x: Array, cupy: Any) -> Iterator[None]:
    """CuPy on the device of an array, and on the stream that its library computes on now."""
    number = x.__dlpack_device__()[1]
    with cupy.cuda.Device(number):
        if library(x) != "torch":
            _let_go(cupy)
            yield
            return
        stream = _Stream(sys.modules["torch"].cuda.current_stream(x.device).cuda_stream)
        with cupy.cuda.Stream.from_external(stream):
            _let_go(cupy)
            yield


class _Stream:
    """The address of a stream, by the protocol of CUDA streams."""

    def __init__(self, address: int):
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def as_cupy(x: Array, cupy: Any) -> Array:
    """An array that CuPy computes with: memory of torch and JAX as it is, numbers of the host as a copy."""
    if library(x) not in _OTHERS:
        return cupy.asarray(x)
    return cupy.from_dlpack(x.detach() if library(x) == "torch" else x)


def given_back(x: Array | None, to: str) -> Array | None:
    """A result as an array of a library."""
    if x is None or to not in _OTHERS:
        return x
    if to == "torch":
        return sys.modules["torch"].from_dlpack(x)
    return sys.modules["jax"].dlpack.from_dlpack(x)


def hold(owner: str, arrays: list[Array], cupy: Any) -> None:
    """Keep arrays of JAX until what was launched has run."""
    if owner == "jax":
        keep_until_done(arrays, cupy)


def keep_until_done(arrays: list[Array], cupy: Any) -> None:
    """Keep arrays until the current stream has come so far; later calls ask, and nothing waits."""
    done = cupy.cuda.Event(disable_timing=True)
    done.record(cupy.cuda.get_current_stream())
    with _lock:
        _held.append((done, arrays))


def _let_go(cupy: Any) -> None:
    """Keep no more what is done; nobody may ask for that while a stream is captured into a graph."""
    if _held and not cupy.cuda.get_current_stream().is_capturing():
        with _lock:
            while _held and _held[0][0].done:
                _held.popleft()
