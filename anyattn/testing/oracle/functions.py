"""What a user's traced function may call and index, on NumPy arrays (contract section 3, last paragraph)."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

where, clip, minimum, maximum = np.where, np.clip, np.minimum, np.maximum
exp, log, tanh, sqrt, floor = np.exp, np.log, np.tanh, np.sqrt, np.floor


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


class Captured:
    """An array that a function captured: an index never wraps, out of range it reads the nearest edge."""

    def __init__(self, values: Array) -> None:
        values = np.asarray(values)
        # Scores compute in float64 here, whatever the table's own dtype.
        self._values = values.astype(np.float64) if values.dtype.kind == "f" else values

    def __getitem__(self, index: Any) -> Array:
        indices = index if isinstance(index, tuple) else (index,)
        return self._values[
            tuple(np.clip(x, 0, n - 1) for x, n in zip(indices, self._values.shape, strict=True))
        ]
