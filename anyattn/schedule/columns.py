"""PARTIAL tiles in which only a few columns are open: their keys are listed, to be gathered, not scanned.

All tiles with the same signature (`keyed`) share one list of open columns for each tile of keys, whatever
their number: lists grow with the keys, not with the tiles.

The rule: columns are listed where a tile opens at most half of its keys. Measured on the CPU, with every n-th
key open, gathering a quarter, a half and three quarters of the keys takes 0.35, 0.6 and 0.85 to 0.95 of the
time of scanning all of them with the mask (Numba, at head sizes of 16 to 128); torch's tiles 0.6, 0.75, 0.9.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.grid import Grid, Tiles
from anyattn.schedule.keyed import KeyConditions
from anyattn.schedule.verdicts import EMPTY, FULL, PARTIAL

__all__ = ["SHARE", "ColumnLists"]

NDArray = np.ndarray[Any, Any]

# Of the keys of a tile, one in so many may be open.
SHARE = 2
# A mask that needs more lists than this opens no pattern of columns.
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
        # The lists of the conditions that were asked of last.
        self._conditions: KeyConditions | None = None
        self._known: dict[tuple[Grid, int, bytes], tuple[int, NDArray]] = {}
        self._codes: dict[tuple[Grid, int, bytes], NDArray] = {}

    def kinds(self, conditions: KeyConditions, tiles: Tiles, verdicts: NDArray) -> tuple[NDArray, NDArray]:
        """Tiles as rows of (place in `tiles`, first and end tile of keys), and the kind of each.

        A coarse tile comes back in several pieces where only some of its tiles of keys are listed.
        """
        k0, k1 = tiles.k_range
        pieces = np.stack([np.arange(len(tiles)), k0, k1], axis=1)
        partial = np.flatnonzero(verdicts == PARTIAL)
        if not conditions.useful or not partial.size:
            return pieces, verdicts
        if conditions is not self._conditions:
            self._conditions, self._known, self._codes = conditions, {}, {}
        signatures, which = conditions.signatures(tiles, partial)
        possible = conditions.outcomes(tiles.grid, signatures)
        kept = verdicts != PARTIAL
        all_pieces, all_kinds = [pieces[kept]], [verdicts[kept].astype(np.int64)]
        for n, outcomes in enumerate(possible):
            at = pieces[partial[which == n]]
            found = self._list(conditions, tiles.grid, conditions.group(signatures[n]), outcomes)
            if found is not None:
                number, listed = found
                at = _split(at, listed)
                all_kinds.append(np.where(listed[at[:, 1]], self.FIRST + number, PARTIAL))
            else:
                all_kinds.append(np.full(len(at), PARTIAL))
            all_pieces.append(at)
        return np.concatenate(all_pieces), np.concatenate(all_kinds)

    def stretches(self, conditions: KeyConditions, tiles: Tiles) -> tuple[NDArray, NDArray, NDArray]:
        """Which tiles, of which conditions on keys alone are open, columns settle; their pieces and kinds.

        A piece with a list may have tiles of keys of which no column is open.
        """
        done = np.zeros(len(tiles), bool)
        all_pieces, all_kinds = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
        if not conditions.useful or not len(tiles):
            return done, all_pieces[0], all_kinds[0]
        if conditions is not self._conditions:
            self._conditions, self._known, self._codes = conditions, {}, {}
        pieces = np.stack([np.arange(len(tiles)), *tiles.k_range], axis=1)
        signatures, which = conditions.signatures(tiles, np.arange(len(tiles)))
        for n, outcomes in enumerate(conditions.outcomes(tiles.grid, signatures)):
            group = conditions.group(signatures[n])
            found = self._list(conditions, tiles.grid, group, outcomes)
            if found is None or (outcomes & (outcomes - 1)).any():
                continue
            number, listed = found
            codes = self._of_tiles(conditions, tiles.grid, group, outcomes, listed)
            at = _split(pieces[which == n], codes)
            kinds = codes[at[:, 1]].astype(np.int64)
            columns = self.starts[number][at[:, 2]] > self.starts[number][at[:, 1]]
            kinds[kinds == EMPTY] = np.where(columns, self.FIRST + number, EMPTY)[kinds == EMPTY]
            done |= which == n
            all_pieces.append(at)
            all_kinds.append(kinds)
        return done, np.concatenate(all_pieces), np.concatenate(all_kinds)

    def _of_tiles(
        self, conditions: KeyConditions, grid: Grid, group: int, outcomes: NDArray, listed: NDArray
    ) -> NDArray:
        """Verdicts of the tiles of keys, EMPTY also of those that are listed."""
        known = grid, group, outcomes.tobytes()
        if known not in self._codes:
            verdicts = outcomes[conditions.said(grid, group)]
            every, some = (verdicts == FULL).all(axis=1), (verdicts != EMPTY).any(axis=1)
            codes = np.where(every, FULL, np.where(some & ~listed, PARTIAL, EMPTY)).astype(np.uint8)
            self._codes[known] = codes
        return self._codes[known]

    def _list(
        self, conditions: KeyConditions, grid: Grid, group: int, outcomes: NDArray
    ) -> tuple[int, NDArray] | None:
        """Number of the list of open columns, and for which tiles of keys it is to be used."""
        known = grid, group, outcomes.tobytes()
        if known not in self._known:
            if len(self.keys) >= _MOST_LISTS:
                return None
            said = conditions.said(grid, group)
            open_ = (outcomes != EMPTY)[said]
            number = open_.sum(axis=1)
            listed = (number > 0) & (number * SHARE <= grid.keys)
            columns = np.flatnonzero(open_ & listed[:, None])
            self._known[known] = len(self.keys), listed
            self.k_block.append(grid.k_block)
            self.starts.append(np.concatenate([[0], np.cumsum(np.where(listed, number, 0))]))
            self.keys.append(grid.key + columns)
            self.masked.append(bool((outcomes[said.reshape(-1)[columns]] != FULL).any()))
        return self._known[known]


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
