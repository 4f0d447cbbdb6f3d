"""Ways in which the same values can lie in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

MEMORIES = {
    "plain": "C order, writeable",
    "readonly": "a write raises",
    "reversed": "every stride negative",
    "transposed": "the strides of the transpose",
    "gapped": "every second element of a larger array along each axis",
    "repeated": "stride 0 along the first of three or more axes",
}


def lay_out(values: Array, memory: str, xp: Any = np) -> Array:
    """The same values lying as `memory` says; `xp` is NumPy or a library with its strides."""
    every = (slice(None, None, -1),) * values.ndim
    # An array without axes has no strides to choose.
    match memory if values.ndim or memory == "readonly" else "plain":
        case "reversed":
            return xp.array(values[every], order="C")[every]
        case "transposed":
            return xp.array(values.T, order="C").T
        case "gapped":
            wide = xp.zeros([2 * n for n in values.shape], dtype=values.dtype)
            inside = (slice(None, None, 2),) * values.ndim
            wide[inside] = values
            return wide[inside]
        case "repeated":
            return (
                xp.broadcast_to(values[:1], values.shape)
                if values.ndim > 2 and values.shape[0] > 1
                else values
            )
        case "readonly":
            values = values.copy()
            values.flags.writeable = False
            return values
    return xp.array(values, order="C")
