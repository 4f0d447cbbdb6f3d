"""Conditions of no simpler form, judged by interval arithmetic over tiles and evaluated at points."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.expr.nodes import Apply, Expr, Load, walk
from anyattn.schedule.atoms import Bounds, columns_of_tiles
from anyattn.schedule.axes import KEY, NONE, ROW, Space
from anyattn.schedule.extremes import Extremes
from anyattn.schedule.grid import Tiles
from anyattn.schedule.intervals import Number, Truth, operate, real, unknown, whole
from anyattn.schedule.verdicts import ANY, EMPTY, FULL

__all__ = ["Mixed"]

NDArray = np.ndarray[Any, Any]


class Mixed:
    """A condition on the row and the key together."""

    cost = 1

    def __init__(self, space: Space, expr: Expr, directions: dict[int, str]):
        self.space, self.expr = space, expr
        self.directions = directions
        self.dtype = np.dtype(space.accumulate)
        self._lines: dict[int, _LineRange] = {}
        self._ranges: dict[int, RangeTable] = {}

    def verdicts(self, tiles: Tiles) -> NDArray:
        truth = self._bounds(tiles)
        assert isinstance(truth, Truth)
        found = np.where(~truth.true, EMPTY, np.where(~truth.false, FULL, ANY)).astype(np.uint8)
        return np.broadcast_to(found, (len(tiles),))

    def columns(self, tiles: Tiles) -> NDArray:
        return columns_of_tiles(self.verdicts(tiles), tiles)

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        shape = np.broadcast_shapes(group.shape, row.shape, key.shape)
        seen = np.broadcast_to(self.space.evaluate(self.expr, group, row, key), shape)
        return seen, seen

    def _bounds(self, tiles: Tiles) -> Number | Truth:
        known: dict[int, Number | Truth] = {}
        for node in walk(self.expr):
            direction = self.directions[id(node)]
            if direction in (NONE, ROW, KEY):
                known[id(node)] = self._line(node, direction).of(tiles)
            elif isinstance(node, Apply):
                args = [known[id(c)] for c in node.args]
                known[id(node)] = operate(node.op, node.kind, args, self.dtype)
            elif isinstance(node, Load):
                known[id(node)] = self._read(node, [known[id(c)] for c in node.indices])
            else:
                known[id(node)] = unknown(node.kind, self.dtype)
        return known[id(self.expr)]

    def _line(self, node: Expr, direction: str) -> _LineRange:
        if id(node) not in self._lines:
            self._lines[id(node)] = _LineRange(self.space.line(node, direction), node.kind, direction)
        return self._lines[id(node)]

    def _read(self, node: Load, indices: list[Number | Truth]) -> Number | Truth:
        if id(node) not in self._ranges:
            self._ranges[id(node)] = RangeTable(node.table.value, node.kind, self.dtype)
        index = indices[0] if len(indices) == 1 else None
        return self._ranges[id(node)].between(index if isinstance(index, Number) else None)


def _of_extremes(low: NDArray, high: NDArray, kind: str, modulus: Any = 1, rest: Any = 0) -> Number | Truth:
    if kind == "bool":
        return Truth(high > 0, low == 0)
    return whole(low, high, modulus, rest) if kind == "int" else real(low, high)


class _LineRange:
    """Ranges of a number or condition that hangs on the row alone, the key alone, or neither."""

    def __init__(self, values: NDArray, kind: str, direction: str):
        self.kind = kind
        self.constant = direction == NONE
        self.values = values.astype(np.int8) if kind == "bool" else values
        self.extremes = Extremes(self.values, direction)
        self.modulus, self.rest = np.ones(len(values), np.int64), np.zeros(len(values), np.int64)
        if kind == "int" and not self.constant:
            step = np.gcd.reduce(np.diff(values, axis=1), axis=1)
            self.modulus = np.where(step == 0, 1, step)
            self.rest = values[:, 0] % self.modulus

    def of(self, tiles: Tiles) -> Number | Truth:
        group: Any = tiles.group if len(self.values) > 1 else 0
        if self.constant:
            value = self.values[group, 0]
            return _of_extremes(value, value, self.kind)
        return _of_extremes(*self.extremes.of(tiles), self.kind, self.modulus[group], self.rest[group])


class RangeTable:
    """Least and greatest entry between two indices of a table: minima over 1, 2, 4, ... entries."""

    # Beyond this many entries, and for several axes, only the extremes of the whole table are kept.
    _LARGEST = 1 << 16

    def __init__(self, table: NDArray, kind: str, dtype: Any):
        self.kind = kind
        values = table.reshape(-1)
        values = values.astype({"bool": np.int8, "int": np.int64, "float": dtype}[kind])
        self.size = values.size if table.ndim == 1 and values.size <= self._LARGEST else 1
        if self.size == 1:
            self.low, self.high = [values.min(keepdims=True)], [values.max(keepdims=True)]
            return
        self.low, self.high = [values], [values]
        width = 1
        while 2 * width <= self.size:
            self.low.append(np.minimum(self.low[-1][:-width], self.low[-1][width:]))
            self.high.append(np.maximum(self.high[-1][:-width], self.high[-1][width:]))
            width *= 2

    def between(self, index: Number | None) -> Number | Truth:
        """The range of entries read at an index, which reads the nearest edge beyond the table."""
        if index is None or self.size == 1:
            low, high = np.zeros(1, np.int64), np.full(1, self.size - 1)
        else:
            # NaN reads the first entry, whatever the bounds of the numbers are.
            low = np.where(index.nan, 0, np.clip(index.low, 0, self.size - 1)).astype(np.int64)
            high = np.clip(index.high, 0, self.size - 1).astype(np.int64)
        level = np.frexp((high - low + 1).astype(np.float64))[1] - 1
        least = np.empty(level.shape, self.low[0].dtype)
        most = np.empty_like(least)
        for n in np.unique(level):
            at = level == n
            left, right = low[at], high[at] - (1 << int(n)) + 1
            least[at] = np.minimum(self.low[n][left], self.low[n][right])
            most[at] = np.maximum(self.high[n][left], self.high[n][right])
        return _of_extremes(least, most, self.kind)
