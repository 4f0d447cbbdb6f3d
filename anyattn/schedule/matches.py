"""Where a value of the rows occurs among the keys: the join behind `ids[i] == ids[j]`."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.axes import KEY, ROW
from anyattn.schedule.extremes import side
from anyattn.schedule.grid import FACTOR, Grid, Tiles

__all__ = ["Matches"]

NDArray = np.ndarray[Any, Any]

# Pairs of tiles with a common value that are listed; a mask with more keeps so many tiles that looking up
# value by value finds one soon.
_MOST_PAIRS = 1 << 21
# A tile above the leaves with more distinct values than this is divided unasked: dividing costs less.
_MANY = 64
_CHUNK = 1 << 20


class Matches:
    """Distinct values of `x` (groups or 1, rows) and `y` (groups or 1, keys) in the tiles of a grid.

    Values are numbered by rank. Where few pairs of a tile of rows and a tile of keys share a value, these
    pairs are listed. Otherwise each rank of a tile of rows is looked up among the keys.
    """

    def __init__(self, x: NDArray, y: NDArray, grid: Grid):
        self.grid = grid
        x_group, x_tile, x_value = _distinct(x, *side(grid, ROW))
        y_group, y_tile, y_value = _distinct(y, *side(grid, KEY))
        order = np.unique(np.concatenate([x_value, y_value]))
        self.ranks = len(order)
        self.x_groups, self.y_groups = len(x), len(y)
        self.x = (x_group, x_tile, np.searchsorted(order, x_value))
        # (group, rank, tile) of the keys as one number each, in order.
        self.codes = np.sort((y_group * self.ranks + np.searchsorted(order, y_value)) * grid.k_tiles + y_tile)
        self.pairs = self._common() if len(x) == len(y) else None
        self._lists: dict[int, tuple[NDArray, NDArray]] = {}
        self._pairs: dict[int, NDArray] = {}

    def may_meet(self, tiles: Tiles) -> NDArray:
        """Whether a row and a key of each tile have the same value; True too above leaves of many values."""
        if self.pairs is not None:
            return self._listed(tiles, *self.pairs)
        starts, _ = self._list(tiles.level)
        at = tiles.q if self.x_groups == 1 else tiles.group * self.grid.count(tiles.level)[0] + tiles.q
        number = starts[at + 1] - starts[at]
        asked = np.flatnonzero(number <= _MANY) if tiles.level else np.arange(len(tiles))
        found = np.ones(len(tiles), bool)
        found[asked] = False
        # A few ranks of each first: they settle most tiles of masks that keep many.
        first, some = np.zeros(len(tiles), np.int64), 4
        while asked.size:
            count = np.minimum(number - first, some)
            step = max(1, _CHUNK // some)
            for n in range(0, len(asked), step):
                part = asked[n : n + step]
                found[part] = self._look_up(tiles, part, starts[at[part]] + first[part], count[part])
            first += some
            some *= 4
            asked = asked[~found[asked] & (first[asked] < number[asked])]
        return found

    def _look_up(self, tiles: Tiles, part: NDArray, start: NDArray, count: NDArray) -> NDArray:
        """Whether one of `count` ranks from `start` on occurs among the keys of a tile."""
        _, ranks = self._list(tiles.level)
        tile = np.repeat(np.arange(len(part)), count)
        first = np.cumsum(count) - count
        rank = ranks[np.repeat(start - first, count) + np.arange(len(tile))]
        group = tiles.group[part][tile] if self.y_groups > 1 else 0
        base = (group * self.ranks + rank) * self.grid.k_tiles
        k0, k1 = (x[part][tile] for x in tiles.k_range)
        place = np.searchsorted(self.codes, base + k0)
        code = self.codes[np.minimum(place, len(self.codes) - 1)]
        hit = (place < len(self.codes)) & (code < base + k1)
        return np.bincount(tile, weights=hit, minlength=len(part)) > 0

    def _common(self) -> tuple[NDArray, NDArray, NDArray] | None:
        """Group, tile of rows and tile of keys of all pairs with a common value, where they are few."""
        group, tile, rank = self.x
        keyed = self.codes // self.grid.k_tiles
        wanted = group * self.ranks + rank
        first = np.searchsorted(keyed, wanted)
        count = np.searchsorted(keyed, wanted, side="right") - first
        if count.sum() > _MOST_PAIRS:
            return None
        of = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
        return group[of], tile[of], self.codes[first[of] + nth] % self.grid.k_tiles

    def _listed(self, tiles: Tiles, group: NDArray, q: NDArray, k: NDArray) -> NDArray:
        q_count, k_count = self.grid.count(tiles.level)
        if tiles.level not in self._pairs:
            edge = FACTOR**tiles.level
            self._pairs[tiles.level] = np.unique((group * q_count + q // edge) * k_count + k // edge)
        known = self._pairs[tiles.level]
        if not known.size:
            return np.zeros(len(tiles), bool)
        wanted = (tiles.group if self.x_groups > 1 else 0) * q_count * k_count + tiles.q * k_count + tiles.k
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.asarray(known[place] == wanted)

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
