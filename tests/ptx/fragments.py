"""Which element of a matrix each thread of a warp holds in which register, for ldmatrix and mma.

From the tables and formulas of the PTX ISA, chapter "Warp-level matrix instructions": groupID = lane >> 2,
threadID_in_group = lane % 4. Layouts are arrays (rows or columns) by lane and by element of its fragment, in
the order of the registers, low half first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LAYOUTS", "Fragment", "Shape", "matrix_8x8"]

NDArray = np.ndarray[Any, Any]

_LANES = np.arange(32)[:, None]
_GROUP, _THREAD = _LANES >> 2, _LANES % 4


@dataclass(frozen=True)
class Fragment:
    """Row and column of each element, both (32, elements)."""

    row: NDArray
    column: NDArray


@dataclass(frozen=True)
class Shape:
    """The fragments of an mma: A (m, k), B (k, n), C and D (m, n); `bits` of an element of A and B."""

    m: int
    n: int
    k: int
    bits: int
    a: Fragment
    b: Fragment
    c: Fragment


def _fragment(row: NDArray, column: NDArray) -> Fragment:
    row, column = np.broadcast_arrays(row, column)
    return Fragment(row, column)


def _accumulator() -> Fragment:
    """C and D of m16n8: c0 and c1 in row groupID, c2 and c3 eight rows below; columns in pairs."""
    i = np.arange(4)
    return _fragment(_GROUP + 8 * (i >= 2), 2 * _THREAD + (i & 1))


def _m16n8k16() -> Shape:
    """16-bit elements: row groupID for a0, a1, a4, a5, else 8 below; columns from 8 on for a4 to a7."""
    i = np.arange(8)
    lower = (i == 2) | (i == 3) | (i == 6) | (i == 7)
    a = _fragment(_GROUP + 8 * lower, 2 * _THREAD + (i & 1) + 8 * (i >= 4))
    j = np.arange(4)
    b = _fragment(2 * _THREAD + (j & 1) + 8 * (j >= 2), _GROUP)
    return Shape(16, 8, 16, 16, a, b, _accumulator())


def _m16n8k8() -> Shape:
    """16-bit elements: row groupID for a0 and a1, 8 below for a2 and a3."""
    i = np.arange(4)
    a = _fragment(_GROUP + 8 * (i >= 2), 2 * _THREAD + (i & 1))
    b = _fragment(2 * _THREAD + np.arange(2), _GROUP)
    return Shape(16, 8, 8, 16, a, b, _accumulator())


def _m16n8k8_wide() -> Shape:
    """tf32: a1 and a3 8 rows below, a2 and a3 four columns on."""
    i = np.arange(4)
    a = _fragment(_GROUP + 8 * (i & 1), _THREAD + 4 * (i >= 2))
    b = _fragment(_THREAD + 4 * np.arange(2), _GROUP)
    return Shape(16, 8, 8, 32, a, b, _accumulator())


LAYOUTS: dict[tuple[str, int], Shape] = {
    ("m16n8k16", 16): _m16n8k16(),
    ("m16n8k8", 16): _m16n8k8(),
    ("m16n8k8", 32): _m16n8k8_wide(),
}
"""By shape and bits of an element of A and B."""


def matrix_8x8(transposed: bool) -> Fragment:
    """ldmatrix of an 8 x 8 matrix of 16-bit elements: thread T has two neighbours of row T / 4.

    Rows are what eight threads give the addresses of; transposed, they are columns.
    """
    held = _fragment(_GROUP, 2 * _THREAD + np.arange(2))
    return Fragment(held.column, held.row) if transposed else held
