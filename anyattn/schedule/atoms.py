"""The conditions that a mask is joined from, each judged in the way that is exact for its form.

An atom says of tiles which verdicts their leaf tiles may have (`verdicts`), and of points whether they are
seen (`values`): a pair of an upper and a lower bound, which differ where a value may not be read.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from anyattn.expr.nodes import Expr, Load
from anyattn.schedule.axes import DIFFERENCE, KEY, NONE, ROW, Space
from anyattn.schedule.extremes import Extremes
from anyattn.schedule.grid import FACTOR, Grid, Tiles
from anyattn.schedule.matches import Matches
from anyattn.schedule.verdicts import ANY, EMPTY, FULL, NOT, PARTIAL

__all__ = ["Atom", "Blocks", "Bounds", "Compare", "Hidden", "Line", "Opposite", "columns_of_tiles"]

NDArray = np.ndarray[Any, Any]
Bounds = tuple[NDArray, NDArray]


class Atom(Protocol):
    """What the formula asks of a condition; `cost` orders atoms by the time that asking takes."""

    @property
    def cost(self) -> int: ...

    def verdicts(self, tiles: Tiles) -> NDArray: ...

    def columns(self, tiles: Tiles) -> NDArray:
        """Verdicts that each column of leaf tiles may have (tiles, keys)."""

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds: ...


class Line:
    """A condition that changes in one direction only: its values along it, counted."""

    cost = 0

    def __init__(self, space: Space, expr: Expr, direction: str):
        self.space, self.direction = space, direction
        self.seen = space.line(expr, direction)
        self.count = _running(self.seen)
        self._codes: dict[Grid, tuple[NDArray, NDArray, NDArray]] = {}
        self._places: dict[bool, NDArray] = {}

    def verdicts(self, tiles: Tiles) -> NDArray:
        codes, empty, full = self._of_grid(tiles.grid)
        group: Any = tiles.group if len(codes) > 1 else 0
        low, high = self._steps(tiles)
        found: NDArray = codes[group, low]
        if tiles.level == 0:
            return found
        empties = empty[group, high + 1] - empty[group, low]
        fulls = full[group, high + 1] - full[group, low]
        partial = empties + fulls < high + 1 - low
        found = np.where(partial, PARTIAL, 0).astype(np.uint8)
        found[empties > 0] |= EMPTY
        found[fulls > 0] |= FULL
        return found

    def columns(self, tiles: Tiles) -> NDArray:
        # The rows of a column are one stretch along every direction, or one place.
        row, key = _rows_and_keys(tiles)
        ends = [self.space.place(self.direction, r, key) for r in (row[:, :1], row[:, -1:])]
        first, end = np.minimum(*ends), np.maximum(*ends) + 1
        group: Any = tiles.group[:, None] if len(self.count) > 1 else 0
        seen = self.count[group, end] - self.count[group, first]
        found = np.where(seen == 0, EMPTY, np.where(seen == end - first, FULL, PARTIAL)).astype(np.uint8)
        return np.broadcast_to(found, key.shape)

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        at = self.space.place(self.direction, row, key)
        seen = self.seen[group if len(self.seen) > 1 else 0, at]
        return seen, seen

    def following(self, value: bool, group: NDArray, at: NDArray) -> NDArray:
        """The first place from `at` on that is `value`, the number of places where there is none."""
        groups, size = self.seen.shape
        if value not in self._places:
            self._places[value] = np.flatnonzero(self.seen == value)
        places = self._places[value]
        if not places.size:
            return np.full(at.shape, size)
        group = group if groups > 1 else np.zeros_like(group)
        start = group * size + np.minimum(at, size)
        if groups == 1:
            trues = self.count[0, np.minimum(at, size)]
            rank = trues if value else np.minimum(at, size) - trues
        else:
            rank = np.searchsorted(places, start)
        found = places[np.minimum(rank, len(places) - 1)] - group * size
        missing = (rank >= len(places)) | (found >= size)
        return np.asarray(np.where(missing, size, found))

    def _of_grid(self, grid: Grid) -> tuple[NDArray, NDArray, NDArray]:
        """Verdicts of the leaf tiles by their step along the direction, and how many are EMPTY and FULL."""
        if grid not in self._codes:
            first, step, number, width = self._windows(grid)
            starts = first + step * np.arange(number)
            seen = self.count[:, starts + width] - self.count[:, starts]
            codes = np.where(seen == 0, EMPTY, np.where(seen == width, FULL, PARTIAL)).astype(np.uint8)
            self._codes[grid] = codes, _running(codes == EMPTY), _running(codes == FULL)
        return self._codes[grid]

    def _windows(self, grid: Grid) -> tuple[int, int, int, int]:
        """First place, step, number and width of the stretches that leaf tiles cover."""
        if self.direction == ROW:
            return grid.row, grid.rows, grid.q_tiles, grid.rows
        if self.direction == KEY:
            return grid.key, grid.keys, grid.k_tiles, grid.keys
        if self.direction == NONE:
            return 0, 1, 1, 1
        step = _step(grid)
        number = ((grid.q_tiles - 1) * grid.rows + (grid.k_tiles - 1) * grid.keys) // step + 1
        width = grid.rows + grid.keys - 1
        if self.direction == DIFFERENCE:
            last_key = grid.key + grid.k_tiles * grid.keys - 1
            return grid.row - last_key + self.space.k_len - 1, step, number, width
        return grid.row + grid.key, step, number, width

    def _steps(self, tiles: Tiles) -> tuple[NDArray, NDArray]:
        """First and last step along the direction of the leaf tiles in each tile."""
        grid = tiles.grid
        if self.direction == NONE:
            zero = np.zeros(len(tiles), np.int64)
            return zero, zero
        (q0, q1), (k0, k1) = tiles.q_range, tiles.k_range
        if self.direction == ROW:
            return q0, q1 - 1
        if self.direction == KEY:
            return k0, k1 - 1
        if self.direction == DIFFERENCE:
            k0, k1 = grid.k_tiles - k1, grid.k_tiles - k0
        step = _step(grid)
        low = (q0 * grid.rows + k0 * grid.keys) // step
        return low, ((q1 - 1) * grid.rows + (k1 - 1) * grid.keys) // step


def _rows_and_keys(tiles: Tiles) -> tuple[NDArray, NDArray]:
    """The rows (tiles, rows) and the keys (tiles, keys) of leaf tiles."""
    row = tiles.row_range[0][:, None] + np.arange(tiles.grid.rows)
    return row, tiles.key_range[0][:, None] + np.arange(tiles.grid.keys)


def columns_of_tiles(verdicts: NDArray, tiles: Tiles) -> NDArray:
    """What is known of columns where no more is known than of their tiles."""
    found = np.where(verdicts & PARTIAL, ANY, verdicts).astype(np.uint8)
    return np.broadcast_to(found[:, None], (len(tiles), tiles.grid.keys))


def _running(seen: NDArray) -> NDArray:
    """How many of each row are True before every place, and in all."""
    total = np.zeros((len(seen), seen.shape[1] + 1), np.int32)
    np.cumsum(seen, axis=1, out=total[:, 1:])
    return total


def _step(grid: Grid) -> int:
    """The least distance of the stretches of two tiles along a diagonal."""
    return math.gcd(grid.rows if grid.q_tiles > 1 else 0, grid.keys if grid.k_tiles > 1 else 0) or 1


class Compare:
    """A comparison of something that hangs on the row with something that hangs on the key.

    The two are free of each other, so smallest and largest values decide an order exactly, and an equality
    needs no more than to know which values occur in which block.
    """

    def __init__(self, op: str, x: NDArray, y: NDArray):
        self.op = op
        self.x, self.y = Extremes(x, ROW), Extremes(y, KEY)
        self._matches: dict[Grid, Matches] = {}
        self.cost = 2 if op == "eq" else 0

    def verdicts(self, tiles: Tiles) -> NDArray:
        (x0, x1), (y0, y1) = self.x.of(tiles), self.y.of(tiles)
        undecided = PARTIAL if tiles.level == 0 else ANY
        if self.op in ("lt", "le"):
            full, some = (x1 < y0, x0 < y1) if self.op == "lt" else (x1 <= y0, x0 <= y1)
            return np.where(full, FULL, np.where(some, undecided, EMPTY)).astype(np.uint8)
        same = (x0 == x1) & (y0 == y1) & (x0 == y0)
        meet = (x0 <= y1) & (y0 <= x1) & ~same
        found = np.where(same, FULL, EMPTY).astype(np.uint8)
        at = np.flatnonzero(meet)
        if at.size:
            if tiles.grid not in self._matches:
                self._matches[tiles.grid] = Matches(self.x.values, self.y.values, tiles.grid)
            found[at] = np.where(self._matches[tiles.grid].may_meet(tiles.chosen(at)), undecided, EMPTY)
        return found

    def columns(self, tiles: Tiles) -> NDArray:
        row, key = _rows_and_keys(tiles)
        group = tiles.group[:, None]
        x = self.x.values[group if len(self.x.values) > 1 else 0, row]
        y = self.y.values[group if len(self.y.values) > 1 else 0, key]
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        if self.op == "eq":
            full = (low == y) & (high == y)
            some = (x[:, :, None] == y[:, None, :]).any(axis=1)
        else:
            full, some = (high < y, low < y) if self.op == "lt" else (high <= y, low <= y)
        return np.where(full, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        x = self.x.values[group if len(self.x.values) > 1 else 0, row]
        y = self.y.values[group if len(self.y.values) > 1 else 0, key]
        seen = x < y if self.op == "lt" else x <= y if self.op == "le" else x == y
        return seen, seen


class Blocks:
    """A boolean array over rows and keys, one entry for `block` of each."""

    cost = 0

    def __init__(self, space: Space, read: Load, block: int):
        self.space, self.read, self.block = space, read, block
        value = read.table.value
        zero = np.zeros(space.groups, np.int64)
        groups = np.arange(space.groups)
        lead = [
            np.broadcast_to(space.evaluate(index, groups, zero, zero), groups.shape)
            for index in read.indices[:-2]
        ]
        flat = np.ravel_multi_index(lead, value.shape[:-2]) if lead else zero
        leads, self.lead = np.unique(flat, return_inverse=True)
        self.array = value.reshape(-1, *value.shape[-2:])
        self.leads = leads
        self._levels: dict[tuple[Grid, int], NDArray] = {}
        self._sums: NDArray | None = None

    def verdicts(self, tiles: Tiles) -> NDArray:
        lead = self.lead[tiles.group]
        if self.block == 1:
            found: NDArray = self._level(tiles.grid, tiles.level)[lead, tiles.q, tiles.k]
            return found
        (r0, r1), (c0, c1) = (
            (first // self.block, last // self.block + 1)
            for first, last in (tiles.row_range, tiles.key_range)
        )
        sums = self._running_sums()
        seen = sums[lead, r1, c1] - sums[lead, r0, c1] - sums[lead, r1, c0] + sums[lead, r0, c0]
        undecided = PARTIAL if tiles.level == 0 else ANY
        full = seen == (r1 - r0) * (c1 - c0)
        return np.where(seen == 0, EMPTY, np.where(full, FULL, undecided)).astype(np.uint8)

    def columns(self, tiles: Tiles) -> NDArray:
        return columns_of_tiles(self.verdicts(tiles), tiles)

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        seen = self.array[self.leads[self.lead[group]], row // self.block, key // self.block]
        return seen, seen

    def _running_sums(self) -> NDArray:
        if self._sums is None:
            rows, keys = self.array.shape[1:]
            self._sums = np.zeros((len(self.leads), rows + 1, keys + 1), np.int64)
            for n, lead in enumerate(self.leads):
                np.cumsum(self.array[lead], axis=0, out=self._sums[n, 1:, 1:])
                np.cumsum(self._sums[n, 1:, 1:], axis=1, out=self._sums[n, 1:, 1:])
        return self._sums

    def _level(self, grid: Grid, level: int) -> NDArray:
        """The sets of verdicts (lead, q, k) of a level; each level joins the sets of the one below."""
        key = grid, level
        if key not in self._levels:
            if level:
                below = self._level(grid, level - 1)
                for axis in (1, 2):
                    below = np.bitwise_or.reduceat(below, np.arange(0, below.shape[axis], FACTOR), axis=axis)
                self._levels[key] = below
            else:
                self._levels[key] = np.stack([self._leaf_codes(grid, self.array[n]) for n in self.leads])
        return self._levels[key]

    def _leaf_codes(self, grid: Grid, array: NDArray) -> NDArray:
        part = array[
            grid.row : grid.row + grid.rows * grid.q_tiles, grid.key : grid.key + grid.keys * grid.k_tiles
        ].reshape(grid.q_tiles, grid.rows, grid.k_tiles, grid.keys)
        some = np.any(np.any(part, axis=1), axis=2)
        every = np.all(np.all(part, axis=1), axis=2)
        return np.where(every, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)


class Hidden:
    """A condition on values that may not be read: anything is possible."""

    cost = 0

    def verdicts(self, tiles: Tiles) -> NDArray:
        return np.full(len(tiles), ANY, np.uint8)

    def columns(self, tiles: Tiles) -> NDArray:
        return columns_of_tiles(self.verdicts(tiles), tiles)

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        shape = np.broadcast_shapes(group.shape, row.shape, key.shape)
        return np.ones(shape, bool), np.zeros(shape, bool)


class Opposite:
    """Another atom, negated."""

    def __init__(self, atom: Atom):
        self.atom = atom
        self.cost = atom.cost

    def verdicts(self, tiles: Tiles) -> NDArray:
        found: NDArray = NOT[self.atom.verdicts(tiles)]
        return found

    def columns(self, tiles: Tiles) -> NDArray:
        found: NDArray = NOT[self.atom.columns(tiles)]
        return found

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        upper, lower = self.atom.values(group, row, key)
        return ~lower, ~upper
