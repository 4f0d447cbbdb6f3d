"""Concrete CPU arrays of any library as NumPy arrays of the same memory, and results back without a copy."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy

from anyattn.arrays import Array, namespace

__all__ = ["address_of", "as_numpy", "empty_like", "from_numpy"]

NDArray = numpy.ndarray[Any, Any]


def address_of(x: NDArray) -> int:
    """Where the numbers of an array begin."""
    found: int = x.__array_interface__["data"][0]
    return found


# NumPy's C structure of an array begins, after the header of every object, with this address, and to
# read it there takes a fifth of the time of asking for it, which a small call does five times.
_word_at = ctypes.c_ssize_t.from_address
_HEADER = object.__basicsize__
_probe = numpy.empty(1)
if _word_at(id(_probe) + _HEADER).value == address_of(_probe):

    def address_of(x: NDArray) -> int:
        """Where the numbers of an array begin."""
        return _word_at(id(x) + _HEADER).value


def as_numpy(x: Array, library: str) -> NDArray:
    """The memory of `x`; bfloat16 as its bits where NumPy has no such type of that library."""
    if library == "numpy":
        return x  # type: ignore[no-any-return]
    if library == "torch":
        import torch

        x = x.detach()
        return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()  # type: ignore[no-any-return]
    # JAX's protocol has no bfloat16.
    return numpy.asarray(x) if library == "jax" else numpy.from_dlpack(x)


def empty_like(dtype: Any, shape: tuple[int, ...], swapped: bool, library: str) -> NDArray:
    """Memory for a result (..., H, L, D) of a library, which lies as (..., L, H, D) where `swapped`."""
    if swapped:
        shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    out = _aligned(dtype, shape) if library == "jax" else numpy.empty(shape, dtype)
    return out.swapaxes(-3, -2) if swapped else out


def _aligned(dtype: Any, shape: tuple[int, ...]) -> NDArray:
    """Memory from a multiple of 64 bytes on: JAX copies any other."""
    nbytes = math.prod(shape) * dtype.itemsize
    room = numpy.empty(nbytes + 64, numpy.uint8)
    start = -address_of(room) % 64
    out: NDArray = room[start : start + nbytes].view(dtype).reshape(shape)
    return out


def from_numpy(x: NDArray, like: Array, library: str) -> Array:
    """A result as an array of the caller's library, in the dtype of `like` where that is bfloat16."""
    if library == "numpy":
        return x
    if library == "torch":
        import torch

        out = torch.from_numpy(x)
        return out.view(torch.bfloat16) if x.dtype == numpy.uint16 else out
    if library == "jax":
        import jax

        return jax.device_put(x)
    return namespace(like).from_dlpack(x)
