"""Rows of numbers as int8 with a scale for each row: what caches keep where memory is short.

Symmetric and by the largest number: x is near scale * n, n from -127 to 127. A row is one token of one head,
so that a large token spoils no other, and its scale leaves both products of attention as one factor a key.
"""

from __future__ import annotations

from typing import Any

from anyattn import arrays
from anyattn.arrays import Array

__all__ = ["MOST", "check_constant", "quantise"]

MOST = 127


def quantise(x: Array) -> tuple[Array, Array]:
    """Rows on the last axis as (int8, float32 scales (..., 1)).

    No number is off by more than half its row's scale. A row with NaN or infinity has the scale NaN, and so
    is NaN.
    """
    xp = arrays.namespace(x)
    if x.shape[-1] == 0:
        zeros = xp.zeros((*x.shape[:-1], 1), dtype=xp.float32, device=arrays.device(x))
        return xp.astype(x, xp.int8), zeros
    with arrays.exactly(x):
        wide = arrays.cast(xp, x, xp.float32)
        largest = xp.max(xp.abs(wide), axis=-1, keepdims=True)
        finite = xp.isfinite(largest)
        scales = xp.where(finite, largest / MOST, xp.nan)
        # Rows of zeros, or of numbers so small that the scale is 0, become 0.
        divisor = xp.where(finite & (scales > 0), scales, 1.0)
        numbers = arrays.clip(xp, xp.round(xp.where(finite, wide, 0.0) / divisor), -MOST, MOST)
        return xp.astype(numbers, xp.int8), scales


def check_constant(x: Any, name: str) -> None:
    """Raise where gradients may be asked of what is to be rounded."""
    if arrays.needs_gradient(x) or arrays.is_tracer(x):
        raise ValueError(
            f"{name}: wanted an array without gradients for an int8 cache, whose rounding has none, "
            f"got one that takes part in differentiation or tracing"
        )
