"""Leaf tiles that the analysis leaves open: points that prove them PARTIAL, else all their points.

A tile is PARTIAL when one of its points is seen and another is not. Points are tried where atoms change; of
tiles in which they all agree, those columns are evaluated that no condition settles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from anyattn.schedule.atoms import Line
from anyattn.schedule.axes import DIFFERENCE, KEY, ROW, SUM, Space
from anyattn.schedule.formula import Formula
from anyattn.schedule.grid import Tiles
from anyattn.schedule.verdicts import EMPTY, FULL, PARTIAL

__all__ = ["Decision", "decide"]

NDArray = np.ndarray[Any, Any]

# Points evaluated at once.
_CHUNK = 1 << 20
# So few points are evaluated sooner than witnesses are found.
_FEW = 1 << 18
# How many places of an atom's own are tried as rows and keys of witnesses.
_TRIED = 4
# Tiles of more points than this (whole rows of a picture) are dear to evaluate: more points are tried.
_LARGE = 1 << 14
_MORE = 64
# Of the additive recurrence whose points fill a square most evenly (Roberts, 2018).
_STEPS = 0.7548776662466927, 0.5698402909980532


class Decision:
    """Verdicts of leaf tiles, one bit each, and how many were found by points and by evaluation."""

    def __init__(self, verdicts: NDArray):
        self.verdicts = verdicts
        self.by_witness = 0
        self.by_evaluation = 0


def decide(formula: Formula, space: Space, tiles: Tiles, possible: NDArray) -> Decision:
    """The verdicts of leaf tiles of which `possible` sets of verdicts are known."""
    decision = Decision(possible.copy())
    open_ = np.flatnonzero(possible & (possible - 1))
    seen = possible[open_] & EMPTY == 0
    hidden = possible[open_] & FULL == 0
    area = tiles.grid.rows * tiles.grid.keys
    # What is not EMPTY has a point that is seen, what is not FULL one that is not.
    for group, row, key in _witnesses(formula, space, tiles, open_):
        where = np.flatnonzero(~(seen & hidden))
        if len(where) * area <= _FEW:
            break
        upper, lower = formula.values(group[where], row[where], key[where])
        seen[where] |= upper
        hidden[where] |= ~lower
    proved = seen & hidden
    decision.verdicts[open_[proved]] = PARTIAL
    decision.by_witness = int(proved.sum())
    rest = open_[~proved]
    decision.by_evaluation = len(rest)
    step = max(1, _CHUNK // area)
    for start in range(0, len(rest), step):
        part = rest[start : start + step]
        decision.verdicts[part] = _evaluated(formula, tiles.chosen(part))
    return decision


def _evaluated(formula: Formula, tiles: Tiles) -> NDArray:
    """The verdicts of tiles, of which those columns are evaluated that no condition settles."""
    grid = tiles.grid
    possible = formula.columns(tiles, {})
    seen, hidden = (possible & EMPTY == 0).any(axis=1), (possible & FULL == 0).any(axis=1)
    open_ = possible & (possible - 1) != 0
    tile, column = np.nonzero(open_ & ~(seen & hidden)[:, None])
    step = max(1, _CHUNK // grid.rows)
    for start in range(0, len(tile), step):
        at, key = tile[start : start + step], column[start : start + step]
        row = tiles.row_range[0][at][:, None] + np.arange(grid.rows)
        upper, lower = formula.values(tiles.group[at][:, None], row, (tiles.key_range[0][at] + key)[:, None])
        shape = (len(at), grid.rows)
        seen[at[np.broadcast_to(upper, shape).any(axis=1)]] = True
        hidden[at[~np.broadcast_to(lower, shape).all(axis=1)]] = True
    return np.where(seen & hidden, PARTIAL, np.where(seen, FULL, EMPTY)).astype(np.uint8)


def _witnesses(
    formula: Formula, space: Space, tiles: Tiles, which: NDArray
) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """Points of the tiles: at their edges, where atoms of one direction have either value, and anywhere."""
    group = tiles.group[which]
    row0, row1 = (x[which] for x in tiles.row_range)
    key0, key1 = (x[which] for x in tiles.key_range)
    for row, key in _spread(row0, row1, key0, key1):
        yield group, row, key
    lines = [leaf.atom for leaf in formula.leaves() if isinstance(leaf.atom, Line)]
    rows = list(_candidates([x for x in lines if x.direction == ROW], group, row0, row1))
    keys = list(_candidates([x for x in lines if x.direction == KEY], group, key0, key1))
    for row in rows:
        for key in keys:
            yield group, row, key
    for line in lines:
        if line.direction not in (DIFFERENCE, SUM):
            continue
        for value in (True, False):
            for key in keys:
                ends = (space.place(line.direction, r, key) for r in (row0, row1))
                at = line.following(value, group, np.minimum(*ends))
                shift = at - (space.k_len - 1) + key if line.direction == DIFFERENCE else at - key
                yield group, np.clip(shift, row0, row1), key
            for row in rows:
                ends = (space.place(line.direction, row, k) for k in (key0, key1))
                at = line.following(value, group, np.minimum(*ends))
                shift = row - (at - (space.k_len - 1)) if line.direction == DIFFERENCE else at - row
                yield group, row, np.clip(shift, key0, key1)
    if tiles.grid.rows * tiles.grid.keys > _LARGE:
        for n in range(1, _MORE + 1):
            down, across = (n * step % 1 for step in _STEPS)
            row = row0 + ((row1 - row0 + 1) * down).astype(np.int64)
            yield group, row, key0 + ((key1 - key0 + 1) * across).astype(np.int64)


def _spread(row0: NDArray, row1: NDArray, key0: NDArray, key1: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
    """Corners, the centre, and some points that share no row, key or diagonal."""
    rows, keys = row1 - row0, key1 - key0
    for a, c in ((0, 0), (7, 7), (0, 7), (7, 0), (3, 4), (1, 5), (5, 2), (2, 6), (6, 1)):
        yield row0 + rows * a // 7, key0 + keys * c // 7


def _candidates(lines: list[Line], group: NDArray, first: NDArray, last: NDArray) -> Iterator[NDArray]:
    """Ends and middle of a range, and the first places in it where an atom has either value."""
    yield first
    yield last
    yield (first + last) // 2
    for line in lines:
        for value in (True, False):
            at = first
            for _ in range(_TRIED):
                at = line.following(value, group, at)
                yield np.clip(at, first, last)
                at = at + 1
