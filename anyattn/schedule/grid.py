"""Tiles of one size on a regular grid, at several sizes: what the search divides and the atoms judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["FACTOR", "Grid", "Tiles", "grids"]

NDArray = np.ndarray[Any, Any]

# A tile of one level is FACTOR x FACTOR tiles of the level below. At 1,048,576 tokens a band takes as long
# with 2 as with 4, and 2.5 times as long with 8.
FACTOR = 4


@dataclass(frozen=True, eq=False)
class Grid:
    """`q_tiles` x `k_tiles` tiles of `rows` x `keys`; the first begins at (`row`, `key`).

    `q_block` and `k_block` are the numbers of its first tile among all tiles of the schedule. The tiles that
    a length cuts short make grids of their own.
    """

    row: int
    rows: int
    q_tiles: int
    q_block: int
    key: int
    keys: int
    k_tiles: int
    k_block: int

    def count(self, level: int) -> tuple[int, int]:
        """Tiles of a level along rows and keys."""
        edge = FACTOR**level
        return -(-self.q_tiles // edge), -(-self.k_tiles // edge)

    @property
    def top(self) -> int:
        """The lowest level with at most 256 tiles."""
        level = 0
        while np.prod(self.count(level)) > 256:
            level += 1
        return level


def grids(q_len: int, k_len: int, rows: int, keys: int) -> list[Grid]:
    """The grids that cover (q_len, k_len): whole tiles, and those at the two far edges."""
    found = []
    for row, height, q_tiles, q_block in _sides(q_len, rows):
        for key, width, k_tiles, k_block in _sides(k_len, keys):
            found.append(Grid(row, height, q_tiles, q_block, key, width, k_tiles, k_block))
    return found


def _sides(length: int, size: int) -> list[tuple[int, int, int, int]]:
    whole, rest = divmod(length, size)
    sides = [(0, size, whole, 0)] if whole else []
    return [*sides, (whole * size, rest, 1, whole)] if rest else sides


@dataclass(frozen=True, eq=False)
class Tiles:
    """Some tiles of one level: their group and their place among the tiles of the level.

    Levels along rows and keys differ only where a formula consists of lines (`search`).
    """

    grid: Grid
    q_level: int
    k_level: int
    group: NDArray
    q: NDArray
    k: NDArray
    # What has been found out of these tiles, by formula, and of which.
    known: dict[int, tuple[NDArray, NDArray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.q)

    @classmethod
    def all(cls, grid: Grid, level: int, groups: int) -> Tiles:
        """Every tile of a level for every group."""
        shape = (groups, *grid.count(level))
        group, q, k = (x.reshape(-1) for x in np.indices(shape))
        return cls(grid, level, level, group, q, k)

    def chosen(self, which: NDArray | slice) -> Tiles:
        """Those tiles that a mask or an index array picks."""
        levels = self.q_level, self.k_level
        return Tiles(self.grid, *levels, self.group[which], self.q[which], self.k[which])

    @property
    def level(self) -> int:
        """The larger level, 0 of leaf tiles."""
        return max(self.q_level, self.k_level)

    @cached_property
    def q_range(self) -> tuple[NDArray, NDArray]:
        """First leaf tile along the rows and the one past the last."""
        edge = FACTOR**self.q_level
        return self.q * edge, np.minimum((self.q + 1) * edge, self.grid.q_tiles)

    @cached_property
    def k_range(self) -> tuple[NDArray, NDArray]:
        """First leaf tile along the keys and the one past the last."""
        edge = FACTOR**self.k_level
        return self.k * edge, np.minimum((self.k + 1) * edge, self.grid.k_tiles)

    @cached_property
    def row_range(self) -> tuple[NDArray, NDArray]:
        """First and last row."""
        first, end = self.q_range
        return self.grid.row + first * self.grid.rows, self.grid.row + end * self.grid.rows - 1

    @cached_property
    def key_range(self) -> tuple[NDArray, NDArray]:
        """First and last key."""
        first, end = self.k_range
        return self.grid.key + first * self.grid.keys, self.grid.key + end * self.grid.keys - 1

    def parts(self, rows: bool = True, keys: bool = True) -> Tiles:
        """The tiles of the level below, along rows, keys or both, that make up these."""
        q_level, k_level = self.q_level - rows, self.k_level - keys
        q_count, k_count = self.grid.count(q_level)[0], self.grid.count(k_level)[1]
        side, whole = np.arange(FACTOR), np.zeros(1, np.int64)
        q = self.q[:, None, None] * (FACTOR if rows else 1) + (side if rows else whole)[:, None]
        k = self.k[:, None, None] * (FACTOR if keys else 1) + (side if keys else whole)
        inside = (q < q_count) & (k < k_count)
        q, k = np.broadcast_arrays(q, k)
        group = np.broadcast_to(self.group[:, None, None], inside.shape)
        return Tiles(self.grid, q_level, k_level, group[inside], q[inside], k[inside])
