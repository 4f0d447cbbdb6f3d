"""PARTIAL tiles in which only a few columns are open: their keys are listed, to be gathered, not scanned.

What a condition on keys opens in a tile is known column by column; of the other conditions only their verdict
on the tile counts. So all tiles with the same verdicts of the others (a signature) share one list of open
columns for each tile of keys, whatever their number, and lists grow with the keys, not with the tiles.

The rule: columns are listed where a tile opens at most a quarter of its keys. A gathered key costs about two
to four scanned ones: its k and v rows come one by one, and without the neighbours' cache lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.atoms import Line
from anyattn.schedule.axes import KEY
from anyattn.schedule.formula import Formula, Leaf
from anyattn.schedule.grid import Grid, Tiles
from anyattn.schedule.verdicts import EMPTY, FULL, PARTIAL

__all__ = ["SHARE", "ColumnLists"]

NDArray = np.ndarray[Any, Any]

SHARE = 4
# Signatures beyond this are not worth their lists: an atom with many verdicts on many tiles is no pattern.
_MOST_LISTS = 64


class ColumnLists:
    """The lists of open columns of all signatures met; a tile's kind is FIRST + the number of its list."""

    FIRST = 8

    def __init__(self) -> None:
        # Of each list: its first tile of keys, where the keys of each tile from there on begin, the keys, and
        # whether some rows of a tile may not see them all.
        self.k_block: list[int] = []
        self.starts: list[NDArray] = []
        self.keys: list[NDArray] = []
        self.masked: list[bool] = []

    def kinds(self, formula: Formula, tiles: Tiles, verdicts: NDArray) -> tuple[NDArray, NDArray]:
        """Tiles as rows of (place in `tiles`, first and end tile of keys), and the kind of each.

        A coarse tile comes back in several pieces where only some of its tiles of keys are listed.
        """
        k0, k1 = tiles.k_range
        pieces = np.stack([np.arange(len(tiles)), k0, k1], axis=1)
        partial = np.flatnonzero(verdicts == PARTIAL)
        leaves = list(formula.leaves())
        by_key = [x for x in leaves if x.direction == KEY and isinstance(x.atom, Line)]
        if not by_key or not partial.size:
            return pieces, verdicts
        others = [x for x in leaves if not any(x is y for y in by_key)]
        varied = any(isinstance(x.atom, Line) and len(x.atom.seen) > 1 for x in by_key)
        signature = np.stack(
            [tiles.group[partial] * varied, *(x.verdicts(tiles)[partial] for x in others)], axis=1
        )
        rows, which = np.unique(signature, axis=0, return_inverse=True)
        if len(self.keys) + len(rows) > _MOST_LISTS:
            return pieces, verdicts
        kept = verdicts != PARTIAL
        all_pieces, all_kinds = [pieces[kept]], [verdicts[kept].astype(np.int64)]
        for n, row in enumerate(rows):
            at = partial[which.reshape(-1) == n]
            number, listed = self._list(formula, tiles.grid, by_key, others, row)
            split = _split(pieces[at], listed)
            all_pieces.append(split)
            all_kinds.append(np.where(listed[split[:, 1]], self.FIRST + number, PARTIAL))
        return np.concatenate(all_pieces), np.concatenate(all_kinds)

    def _list(
        self, formula: Formula, grid: Grid, by_key: list[Leaf], others: list[Leaf], signature: NDArray
    ) -> tuple[int, NDArray]:
        """Number of the list of a signature, and for which tiles of keys it is to be used."""
        size = grid.keys * grid.k_tiles
        group = int(signature[0])
        columns = Tiles(grid, 0, np.full(size, group), np.zeros(size, np.int64), np.arange(size))
        for leaf in by_key:
            assert isinstance(leaf.atom, Line)
            seen = leaf.atom.seen[group if len(leaf.atom.seen) > 1 else 0, grid.key : grid.key + size]
            columns.known[id(leaf)] = np.where(seen, FULL, EMPTY).astype(np.uint8)
        for leaf, verdict in zip(others, signature[1:], strict=True):
            columns.known[id(leaf)] = np.full(size, verdict, np.uint8)
        possible = formula.verdicts(columns)
        open_ = (possible != EMPTY).reshape(grid.k_tiles, grid.keys)
        number = open_.sum(axis=1)
        listed = (number > 0) & (number * SHARE <= grid.keys)
        starts = np.concatenate([[0], np.cumsum(np.where(listed, number, 0))])
        keys = grid.key + np.flatnonzero(open_ & listed[:, None])
        chosen = possible.reshape(open_.shape)[listed]
        masked = bool(((chosen != EMPTY) & (chosen != FULL)).any())
        return self._number(grid.k_block, starts, keys, masked), listed

    def _number(self, k_block: int, starts: NDArray, keys: NDArray, masked: bool) -> int:
        for n, known in enumerate(self.keys):
            same = self.k_block[n] == k_block and self.masked[n] == masked
            if same and np.array_equal(known, keys) and np.array_equal(self.starts[n], starts):
                return n
        self.k_block.append(k_block)
        self.starts.append(starts)
        self.keys.append(keys)
        self.masked.append(masked)
        return len(self.keys) - 1


def _split(pieces: NDArray, listed: NDArray) -> NDArray:
    """`pieces`, cut along the keys wherever `listed` changes."""
    cuts = np.flatnonzero(listed[1:] != listed[:-1]) + 1
    first = np.searchsorted(cuts, pieces[:, 1], side="right")
    number = np.searchsorted(cuts, pieces[:, 2], side="left") - first + 1
    of = np.repeat(np.arange(len(pieces)), number)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)
    result = pieces[of]
    if cuts.size:
        inner = nth > 0
        result[inner, 1] = cuts[(first[of] + nth - 1)[inner]]
        inner = nth < number[of] - 1
        result[inner, 2] = cuts[(first[of] + nth)[inner]]
    return result
