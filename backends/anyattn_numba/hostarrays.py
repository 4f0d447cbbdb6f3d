"""Concrete CPU arrays of any library as NumPy arrays of the same memory, and results back without a copy."""

from __future__ import annotations

from typing import Any

import numpy

from anyattn.arrays import Array

__all__ = ["as_numpy", "empty_like", "from_numpy"]

NDArray = numpy.ndarray[Any, Any]


def as_numpy(x: Array, library: str) -> NDArray:
    """The memory of `x`; bfloat16 as its bits where NumPy has no such type of that library."""
    if library == "numpy":
        return x  # type: ignore[no-any-return]
    if library == "torch":
        import torch

        x = x.detach()
        return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()  # type: ignore[no-any-return]
    return numpy.asarray(x)


def empty_like(dtype: Any, shape: tuple[int, ...], swapped: bool) -> NDArray:
    """Memory for a result (..., H, L, D), which lies as (..., L, H, D) where `swapped`.

    Begins at a multiple of 64 bytes: JAX shares no other memory, and whole cache lines are written.
    """
    if swapped:
        shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    dtype = numpy.dtype(dtype)
    count = 1
    for n in shape:
        count *= n
    room = numpy.empty(count * dtype.itemsize + 64, numpy.uint8)
    start = -room.__array_interface__["data"][0] % 64
    out: NDArray = room[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
    return out.swapaxes(-3, -2) if swapped else out


def from_numpy(x: NDArray, like: Array, library: str) -> Array:
    """A result as an array of the caller's library, in the dtype of `like` where that is bfloat16."""
    if library == "numpy":
        return x
    if library == "torch":
        import torch

        out = torch.from_numpy(x)
        return out.view(torch.bfloat16) if x.dtype == numpy.uint16 else out
    import jax

    return jax.device_put(x)
