"""Where a value of the rows occurs among the keys: the join behind `ids[i] == ids[j]`."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.axes import KEY, ROW
from anyattn.schedule.extremes import side
from anyattn.schedule.grid import FACTOR, Grid, Tiles

__all__ = ["Matches"]

NDArray = np.ndarray[Any, Any]

# Pairs of tiles with a common value that are listed; of a mask with more only those that are asked for.
_MOST_PAIRS = 1 << 21
# A tile above the leaves with more distinct values than this is divided unasked: dividing costs less.
_MANY = 64
# Values of a tile that are tried before all of them: they settle most tiles of masks that keep many.
_TRIED = 4
_CHUNK = 1 << 18


class Matches:
    """Distinct values of `x` (groups or 1, rows) and `y` (groups or 1, keys) in the tiles of a grid.

    Values are numbered by rank. Where few pairs of a tile of rows and a tile of keys share a value, these
    pairs are listed. Otherwise the ranks of a tile of rows are looked up among the keys.
    """

    def __init__(self, x: NDArray, y: NDArray, grid: Grid):
        self.grid = grid
        x_group, x_tile, x_value = _distinct(x, *side(grid, ROW))
        y_group, y_tile, y_value = _distinct(y, *side(grid, KEY))
        x_rank, y_rank, self.ranks = _ranked(x_value, y_value)
        self.x_groups, self.y_groups = len(x), len(y)
        # (group, rank, tile) of the keys as one number each, in order.
        self.codes = np.sort((y_group * self.ranks + y_rank) * grid.k_tiles + y_tile)
        self.pairs = self._common(x_group * self.ranks + x_rank, x_tile) if len(x) == len(y) else None
        starts = np.searchsorted(x_group * grid.q_tiles + x_tile, np.arange(len(x) * grid.q_tiles + 1))
        # Of each level: where the ranks of each tile of rows begin, the ranks, and how many it has.
        self._lists = [(starts, x_rank, np.diff(starts))]
        self._pairs: dict[int, NDArray] = {}

    def may_meet(self, tiles: Tiles) -> NDArray:
        """Whether a row and a key of each tile have the same value; True too above leaves of many values."""
        if self.pairs is not None:
            return self._listed(tiles, *self.pairs)
        _, _, counts = self._list(tiles.level)
        count = counts[self._line(tiles)]
        asked = np.flatnonzero(count <= _MANY) if tiles.level else np.arange(len(tiles))
        found = np.ones(len(tiles), bool)
        found[asked] = False
        step = _CHUNK // _TRIED
        for n in range(0, len(asked), step):
            part = asked[n : n + step]
            found[part] = self._met(tiles.chosen(part), _TRIED)
        rest = asked[~found[asked] & (count[asked] > _TRIED)]
        if rest.size:
            found[rest] = self._joined(tiles.chosen(rest))
        return found

    def _line(self, tiles: Tiles) -> NDArray:
        """The place of the rows of each tile in a list."""
        return tiles.q if self.x_groups == 1 else tiles.group * self.grid.count(tiles.level)[0] + tiles.q

    def _met(self, tiles: Tiles, most: int) -> NDArray:
        """Whether one of the first `most` ranks of each tile occurs among its keys."""
        starts, ranks, counts = self._list(tiles.level)
        line = self._line(tiles)
        of, at = _spread(starts[line], np.minimum(counts[line], most))
        low, high = (self._code(tiles.group[of], ranks[at], k[of]) for k in tiles.k_range)
        place = self._place(low)
        hit = self.codes[np.minimum(place, len(self.codes) - 1)] < high
        hit &= place < len(self.codes)
        return np.bincount(of, weights=hit, minlength=len(tiles)) > 0

    def _joined(self, tiles: Tiles) -> NDArray:
        """Whether any rank of each tile occurs among its keys: once for all tiles of the same rows."""
        starts, ranks, counts = self._list(tiles.level)
        q_count, k_count = self.grid.count(tiles.level)
        row = tiles.group * q_count + tiles.q
        order = np.argsort(row, kind="stable")
        first = np.flatnonzero(np.diff(row[order], prepend=-1))
        owners = tiles.chosen(order[first])
        k0, k1 = (k[order] for k in tiles.k_range)
        low, high = np.minimum.reduceat(k0, first), np.maximum.reduceat(k1, first)
        line = self._line(owners)
        wanted, met = row * k_count + tiles.k, []
        of, at = _spread(starts[line], counts[line])
        for n in range(0, len(of), _CHUNK):
            one, rank = of[n : n + _CHUNK], ranks[at[n : n + _CHUNK]]
            group = owners.group[one]
            place = self._place(self._code(group, rank, low[one]))
            end = self._code(group, rank, high[one])
            # Every round takes the next tile of keys that has the rank.
            while one.size:
                code = self.codes[np.minimum(place, len(self.codes) - 1)]
                on = (place < len(self.codes)) & (code < end)
                one, place, end, code = one[on], place[on] + 1, end[on], code[on]
                met.append(row[order[first]][one] * k_count + code % self.grid.k_tiles // FACTOR**tiles.level)
        return np.isin(wanted, np.concatenate(met))

    def _place(self, code: NDArray) -> NDArray:
        """Where the codes from `code` on begin; looked up in order, which takes a quarter of the time."""
        order, place = np.argsort(code), np.empty(len(code), np.int64)
        place[order] = np.searchsorted(self.codes, code[order])
        return place

    def _code(self, group: NDArray, rank: NDArray, tile: NDArray) -> NDArray:
        return ((group if self.y_groups > 1 else 0) * self.ranks + rank) * self.grid.k_tiles + tile

    def _common(self, wanted: NDArray, tile: NDArray) -> tuple[NDArray, NDArray, NDArray] | None:
        """Group, tile of rows and tile of keys of all pairs with a common value, where they are few."""
        x = np.sort(wanted * self.grid.q_tiles + tile)
        values, x_first, x_count = _lengths(x // self.grid.q_tiles)
        keyed, y_first, y_count = _lengths(self.codes // self.grid.k_tiles)
        place = np.minimum(np.searchsorted(keyed, values), len(keyed) - 1)
        here = np.flatnonzero(keyed[place] == values)
        place, x_first, x_count = place[here], x_first[here], x_count[here]
        if int((x_count * y_count[place]).sum()) > _MOST_PAIRS:
            return None
        of, at = _spread(x_first, x_count)
        n, k = _spread(y_first[place[of]], y_count[place[of]])
        code = x[at[n]]
        q_tiles = self.grid.q_tiles
        return code // q_tiles // self.ranks, code % q_tiles, self.codes[k] % self.grid.k_tiles

    def _listed(self, tiles: Tiles, group: NDArray, q: NDArray, k: NDArray) -> NDArray:
        q_count, k_count = self.grid.count(tiles.level)
        if tiles.level not in self._pairs:
            edge = FACTOR**tiles.level
            self._pairs[tiles.level] = _unique((group * q_count + q // edge) * k_count + k // edge)
        known = self._pairs[tiles.level]
        if not known.size:
            return np.zeros(len(tiles), bool)
        wanted = (tiles.group if self.x_groups > 1 else 0) * q_count * k_count + tiles.q * k_count + tiles.k
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.asarray(known[place] == wanted)

    def _list(self, level: int) -> tuple[NDArray, NDArray, NDArray]:
        """Where the ranks of each tile of rows begin, the ranks, and their number or one above `_MANY`."""
        while level >= len(self._lists):
            below = len(self._lists) - 1
            starts, ranks, counts = self._lists[below]
            few, many = np.flatnonzero(counts <= _MANY), np.flatnonzero(counts > _MANY)
            old, new = (self.grid.count(n)[0] for n in (below, below + 1))
            of, at = _spread(starts[few], counts[few])
            line = few[of]
            pairs = _unique((line // old * new + line % old // FACTOR) * self.ranks + ranks[at])
            starts = np.searchsorted(pairs, np.arange(self.x_groups * new + 1) * self.ranks)
            counts = np.diff(starts)
            counts[many // old * new + many % old // FACTOR] = _MANY + 1
            self._lists.append((starts, pairs % self.ranks, counts))
        return self._lists[level]


def _distinct(values: NDArray, start: int, size: int, count: int) -> tuple[NDArray, NDArray, NDArray]:
    """Group, block and value of the distinct values in each block of a line."""
    blocks = np.sort(values[:, start : start + size * count].reshape(-1, count, size), axis=2)
    new = np.ones(blocks.shape, bool)
    np.not_equal(blocks[:, :, 1:], blocks[:, :, :-1], out=new[:, :, 1:])
    group, block, place = np.nonzero(new)
    return group, block, blocks[group, block, place]


def _ranked(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray, int]:
    """Numbers from 0 that are equal where values are, and how many numbers there are."""
    if x.dtype.kind == "i" and y.dtype.kind == "i":
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        # Numbers of documents: subtracting takes a hundredth of the time of looking them up.
        if int(high) - int(low) < 4 * (len(x) + len(y)):
            return x - low, y - low, int(high - low) + 1
    order = _unique(np.concatenate([x, y]))
    return np.searchsorted(order, x), np.searchsorted(order, y), len(order)


def _unique(values: NDArray) -> NDArray:
    """The different values in order, by sorting: `numpy.unique` hashes, 20 times as long for a million."""
    values = np.sort(values)
    first: NDArray = values[np.append(True, values[1:] != values[:-1])[: len(values)]]
    return first


def _lengths(values: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """The different values of a sorted array, where each begins, and how often it is there."""
    first = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    return values[first], first, np.diff(first, append=len(values))


def _spread(start: NDArray, count: NDArray) -> tuple[NDArray, NDArray]:
    """Of stretches of some array: the number of its stretch, and the place, of every entry."""
    of = np.repeat(np.arange(len(count)), count)
    return of, np.repeat(start - (np.cumsum(count) - count), count) + np.arange(len(of))
