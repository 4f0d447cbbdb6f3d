"""Where a value of the rows occurs among the keys: the join behind `ids[i] == ids[j]`."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.axes import KEY, ROW
from anyattn.schedule.extremes import side
from anyattn.schedule.grid import FACTOR, Grid, Tiles

__all__ = ["Matches"]

NDArray = np.ndarray[Any, Any]

# A tile above the leaves with more distinct values than this is divided unasked: dividing costs less.
_MANY = 64
_CHUNK = 1 << 20


class Matches:
    """Distinct values of `x` (groups or 1, rows) and `y` (groups or 1, keys) in the tiles of a grid.

    Values are numbered by rank. For the rows there is a list of ranks of each tile; for the keys one sorted
    list of (group, rank, tile), in which a rank is looked up from a tile on.
    """

    def __init__(self, x: NDArray, y: NDArray, grid: Grid):
        self.grid = grid
        x_group, x_tile, x_value = _distinct(x, *side(grid, ROW))
        y_group, y_tile, y_value = _distinct(y, *side(grid, KEY))
        order = np.unique(np.concatenate([x_value, y_value]))
        self.ranks = len(order)
        self.x_groups, self.y_groups = len(x), len(y)
        self.x = (x_group, x_tile, np.searchsorted(order, x_value))
        self.codes = np.sort((y_group * self.ranks + np.searchsorted(order, y_value)) * grid.k_tiles + y_tile)
        self._lists: dict[int, tuple[NDArray, NDArray]] = {}

    def may_meet(self, tiles: Tiles) -> NDArray:
        """Whether a row and a key of each tile have the same value; True too above leaves of many values."""
        starts, _ = self._list(tiles.level)
        at = tiles.q if self.x_groups == 1 else tiles.group * self.grid.count(tiles.level)[0] + tiles.q
        number = starts[at + 1] - starts[at]
        found = np.ones(len(tiles), bool)
        asked = np.flatnonzero(number <= _MANY) if tiles.level else np.arange(len(tiles))
        k0, k1 = tiles.k_range
        while asked.size:
            total = np.cumsum(number[asked])
            chunk = asked[: max(1, int(np.searchsorted(total, _CHUNK)))]
            asked = asked[len(chunk) :]
            found[chunk] = self._look_up(tiles, chunk, at[chunk], number[chunk], k0, k1)
        return found

    def _look_up(
        self, tiles: Tiles, chunk: NDArray, at: NDArray, number: NDArray, k0: NDArray, k1: NDArray
    ) -> NDArray:
        starts, ranks = self._list(tiles.level)
        tile = np.repeat(np.arange(len(chunk)), number)
        first = np.cumsum(number) - number
        rank = ranks[np.repeat(starts[at] - first, number) + np.arange(len(tile))]
        group = tiles.group[chunk][tile] if self.y_groups > 1 else 0
        base = (group * self.ranks + rank) * self.grid.k_tiles
        place = np.searchsorted(self.codes, base + k0[chunk][tile])
        code = self.codes[np.minimum(place, len(self.codes) - 1)]
        hit = (place < len(self.codes)) & (code < base + k1[chunk][tile])
        return np.bincount(tile, weights=hit, minlength=len(chunk)) > 0

    def _list(self, level: int) -> tuple[NDArray, NDArray]:
        """Where the ranks of each tile of rows begin, and the ranks."""
        if level not in self._lists:
            group, tile, rank = self.x
            count = self.grid.count(level)[0]
            pairs = np.unique((group * count + tile // FACTOR**level) * self.ranks + rank)
            starts = np.searchsorted(pairs, np.arange(self.x_groups * count + 1) * self.ranks)
            self._lists[level] = starts, pairs % self.ranks
        return self._lists[level]


def _distinct(values: NDArray, start: int, size: int, count: int) -> tuple[NDArray, NDArray, NDArray]:
    """Group, block and value of the distinct values in each block of a line."""
    blocks = np.sort(values[:, start : start + size * count].reshape(-1, count, size), axis=2)
    new = np.ones(blocks.shape, bool)
    np.not_equal(blocks[:, :, 1:], blocks[:, :, :-1], out=new[:, :, 1:])
    group, block, place = np.nonzero(new)
    return group, block, blocks[group, block, place]
