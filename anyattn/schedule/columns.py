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
# A mask that needs more lists than this opens no pattern of columns.
_MOST_LISTS = 64
# Conditions on keys that are followed; what two or three say is joined into one by `formula`.
_MOST_LINES = 6
# Other conditions: their verdicts, three bits each, and the group are one int64.
_MOST_OTHERS = 12


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
        # What is known of the conditions of one formula.
        self._formula: Formula | None = None
        self._known: dict[tuple[Any, ...], tuple[int, NDArray]] = {}
        self._combined: dict[tuple[Any, ...], NDArray] = {}

    def kinds(self, formula: Formula, tiles: Tiles, verdicts: NDArray) -> tuple[NDArray, NDArray]:
        """Tiles as rows of (place in `tiles`, first and end tile of keys), and the kind of each.

        A coarse tile comes back in several pieces where only some of its tiles of keys are listed.
        """
        k0, k1 = tiles.k_range
        pieces = np.stack([np.arange(len(tiles)), k0, k1], axis=1)
        partial = np.flatnonzero(verdicts == PARTIAL)
        leaves = list(formula.leaves())
        lines = [x.atom for x in leaves if x.direction == KEY and isinstance(x.atom, Line)]
        if not 0 < len(lines) <= _MOST_LINES or not partial.size:
            return pieces, verdicts
        if formula is not self._formula:
            self._formula, self._known, self._combined = formula, {}, {}
        by_key = [x for x in leaves if any(x.atom is line for line in lines)]
        others = [x for x in leaves if not any(x.atom is line for line in lines)]
        if len(others) > _MOST_OTHERS:
            return pieces, verdicts
        code = tiles.group[partial] * any(len(line.seen) > 1 for line in lines)
        for leaf in others:
            code = code * 8 + leaf.verdicts(tiles)[partial]
        signatures, which = np.unique(code, return_inverse=True)
        possible = _outcomes(formula, tiles.grid, by_key, others, signatures)
        kept = verdicts != PARTIAL
        all_pieces, all_kinds = [pieces[kept]], [verdicts[kept].astype(np.int64)]
        for n, outcomes in enumerate(possible):
            at = pieces[partial[which == n]]
            found = self._list(tiles.grid, int(signatures[n]) >> 3 * len(others), lines, outcomes)
            if found is not None:
                number, listed = found
                at = _split(at, listed)
                all_kinds.append(np.where(listed[at[:, 1]], self.FIRST + number, PARTIAL))
            else:
                all_kinds.append(np.full(len(at), PARTIAL))
            all_pieces.append(at)
        return np.concatenate(all_pieces), np.concatenate(all_kinds)

    def _list(
        self, grid: Grid, group: int, lines: list[Line], outcomes: NDArray
    ) -> tuple[int, NDArray] | None:
        """Number of the list of open columns, and for which tiles of keys it is to be used.

        `outcomes` are the possible verdicts of a column by what `lines` say of it, in bits.
        """
        where = (grid, group)
        if where not in self._combined:
            keys = slice(grid.key, grid.key + grid.keys * grid.k_tiles)
            combined = np.zeros(grid.keys * grid.k_tiles, np.uint8)
            for n, line in enumerate(lines):
                combined |= line.seen[group if len(line.seen) > 1 else 0, keys].astype(np.uint8) << n
            self._combined[where] = combined
        combined = self._combined[where]
        known = (*where, outcomes.tobytes())
        if known not in self._known:
            if len(self.keys) >= _MOST_LISTS:
                return None
            open_ = (outcomes != EMPTY)[combined].reshape(grid.k_tiles, grid.keys)
            number = open_.sum(axis=1)
            listed = (number > 0) & (number * SHARE <= grid.keys)
            open_ &= listed[:, None]
            starts = np.concatenate([[0], np.cumsum(np.where(listed, number, 0))])
            columns = np.flatnonzero(open_)
            masked = bool((outcomes[combined[columns]] != FULL).any())
            self._known[known] = len(self.keys), listed
            self.k_block.append(grid.k_block)
            self.starts.append(starts)
            self.keys.append(grid.key + columns)
            self.masked.append(masked)
        return self._known[known]


def _outcomes(
    formula: Formula, grid: Grid, by_key: list[Leaf], others: list[Leaf], signatures: NDArray
) -> NDArray:
    """Possible verdicts of a column (signatures, 2 ** lines), by all that `by_key` may say of it.

    A signature has three bits for each of `others`: its possible verdicts on the tile.
    """
    combinations = 1 << len(by_key)
    said, of = np.meshgrid(np.arange(combinations), np.arange(len(signatures)))
    zero = np.zeros(said.size, np.int64)
    columns = Tiles(grid, 0, zero, zero, zero)
    for n, leaf in enumerate(by_key):
        columns.known[id(leaf)] = np.where(said.reshape(-1) >> n & 1, FULL, EMPTY).astype(np.uint8)
    for n, leaf in enumerate(others):
        verdict = signatures[of.reshape(-1)] >> 3 * (len(others) - 1 - n) & 7
        columns.known[id(leaf)] = verdict.astype(np.uint8)
    return formula.verdicts(columns).reshape(said.shape)


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
