"""Linear maps of a layer: weights (in, out), checked against each other, and rows times them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping

from anyattn import arrays
from anyattn.arrays import Array, Namespace

__all__ = [
    "BIASES",
    "check_like",
    "check_weight",
    "checked_biases",
    "linear",
    "size_of_heads",
    "split_heads",
    "standard_namespace",
]

BIASES = ("q", "k", "v", "o")


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x @ weight + bias`` over the last axis, in the dtype of `x`."""
    xp = arrays.namespace(x)
    # NumPy multiplies a stack matrix by matrix: 8.4 ms for (32, 24, 384) by (384, 1536), 3.0 as one product.
    # Dask would have to move chunks for it.
    rows = x if arrays.is_lazy(x) else xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    with arrays.exactly(x):
        y = xp.matmul(rows, weight)
    if bias is not None:
        y = y + arrays.cast(xp, bias, y.dtype)
    # bfloat16 times bfloat16 is float32 in NumPy.
    return xp.reshape(arrays.cast(xp, y, x.dtype), (*x.shape[:-1], weight.shape[1]))


def split_heads(x: Array, heads: int) -> Array:
    """(..., L, H * n) -> (..., L, H, n)."""
    return arrays.namespace(x).reshape(x, (*x.shape[:-1], heads, x.shape[-1] // heads))


def checked_biases(biases: Mapping[str, Array] | None, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Biases "q", "k", "v" and "o" by the names of parameters, each as long as its weight has columns."""
    if biases is None:
        return {}
    if not isinstance(biases, Mapping):
        raise TypeError(f"biases: wanted a mapping with any of {BIASES}, got {type(biases).__name__}")
    for key, bias in biases.items():
        if key not in BIASES:
            raise ValueError(f"biases: wanted any of {BIASES}, got {key!r}")
        check_weight(f"biases[{key!r}]", bias, 1, weights["wq"])
        columns = weights[f"w{key}"].shape[1]
        if bias.shape[0] != columns:
            raise ValueError(
                f"biases[{key!r}]: wanted shape ({columns},), as w{key} has columns, got {tuple(bias.shape)}"
            )
    return {f"b{key}": biases[key] for key in BIASES if key in biases}


def check_weight(name: str, weight: Array, rank: int, like: Array) -> None:
    """Raise where `weight` is not a float array of `rank` axes, like wq in library, device and dtype."""
    arrays.check_plain(weight, name)
    if arrays.kind(weight) != "float":
        wanted = ", ".join(arrays.FLOAT_DTYPES)
        raise TypeError(f"{name}: wanted a dtype of {wanted}, got {arrays.dtype_name(weight)}")
    check_like(name, weight, like, "wq")
    if weight.ndim != rank or 0 in weight.shape:
        axes = "(in, out)" if rank == 2 else "(out,)"
        raise ValueError(f"{name}: wanted shape {axes} with no empty axis, got {tuple(weight.shape)}")


def check_like(name: str, given: Array, like: Array, what: str) -> None:
    """Raise where `given` is not of the library, device and dtype of `like`, called `what` in the message."""
    arrays.check_beside(given, name, like, what)
    have, want = arrays.dtype_name(given), arrays.dtype_name(like)
    if have != want:
        raise TypeError(f"{name}: wanted dtype {want} like {what}, got {have}")


def size_of_heads(name: str, weight: Array, heads: int, argument: str) -> int:
    """Columns of a weight for each head."""
    columns = int(weight.shape[1])
    if columns % heads:
        raise ValueError(
            f"{name}: wanted columns for {argument}={heads} equal heads, got {tuple(weight.shape)}"
        )
    return columns // heads


def standard_namespace(xp: Namespace) -> Namespace:
    """The array API namespace of a library's own module."""
    if hasattr(xp, "__array_namespace_info__"):
        return xp
    name = getattr(xp, "__name__", None)
    if name not in ("torch", "cupy", "dask.array"):
        raise TypeError(f"xp: wanted the module of an array library, such as numpy, got {xp!r}")
    return importlib.import_module(f"array_api_compat.{name}")
