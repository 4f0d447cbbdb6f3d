"""The index grid of a call: which batch entry, head, position, row and key each score belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Pairs:
    """int64 index arrays that broadcast to (B, Hq, Lq, Lk); the position `i` is `row` + offset."""

    b: Array
    h: Array
    i: Array
    j: Array
    row: Array
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, batch: int, heads: int, q_len: int, k_len: int, offset: Array) -> Pairs:
        """The grid of `batch` entries whose row 0 stands at `offset` (B,)."""
        row = np.arange(q_len, dtype=np.int64).reshape(1, 1, -1, 1)
        return cls(
            b=np.arange(batch, dtype=np.int64).reshape(-1, 1, 1, 1),
            h=np.arange(heads, dtype=np.int64).reshape(1, -1, 1, 1),
            i=row + np.asarray(offset, np.int64).reshape(-1, 1, 1, 1),
            j=np.arange(k_len, dtype=np.int64).reshape(1, 1, 1, -1),
            row=row,
            shape=(batch, heads, q_len, k_len),
        )

    def fill(self, values: Array) -> Array:
        """Broadcast values of some of the indices to one value for each pair."""
        return np.broadcast_to(values, self.shape)

    def place(self, positions: bool) -> Array:
        """What an entry calls i: the position, or with `positions=False` the row number."""
        return self.i if positions else self.row
