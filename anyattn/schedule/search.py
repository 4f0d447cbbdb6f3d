"""From coarse tiles to fine ones: what a coarse tile settles for all its leaves is never divided.

A tile is divided along the rows or the keys alone where nothing else is open, and where that is the keys, not
at all if lists of columns can say the rest: otherwise some hundred single rows and columns that are scattered
over a million tokens would cut it into millions of leaves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.atoms import Line
from anyattn.schedule.axes import KEY, NONE, ROW, Space
from anyattn.schedule.columns import ColumnLists
from anyattn.schedule.decide import decide
from anyattn.schedule.formula import Formula
from anyattn.schedule.grid import Grid, Tiles
from anyattn.schedule.keyed import KeyConditions
from anyattn.schedule.verdicts import EMPTY, PARTIAL

__all__ = ["Found", "search"]

NDArray = np.ndarray[Any, Any]

# Tiles judged at once: bounds the memory of a search that keeps many.
_CHUNK = 1 << 14


class Found:
    """Rectangles of leaf tiles of one kind, EMPTY ones left out, and how the tiles were decided.

    Rows of `boxes` are group, first and end tile along the rows, first and end along the keys, kind: a
    verdict, or one of `ColumnLists`.
    """

    def __init__(self) -> None:
        self.boxes: list[NDArray] = []
        self.by_analysis = 0
        self.by_witness = 0
        self.by_evaluation = 0

    def add(self, tiles: Tiles, pieces: NDArray, kinds: NDArray, first_group: int) -> None:
        """Add pieces (place in `tiles`, first and end tile of keys) of tiles."""
        kept = kinds != EMPTY
        pieces, kinds = pieces[kept], kinds[kept]
        at, k0, k1 = pieces.T
        (q0, q1), grid = tiles.q_range, tiles.grid
        columns = (
            tiles.group[at] + first_group,
            q0[at] + grid.q_block,
            q1[at] + grid.q_block,
            k0 + grid.k_block,
            k1 + grid.k_block,
            kinds,
        )
        self.boxes.append(np.stack(columns, axis=1).astype(np.int32))


def search(
    formula: Formula, space: Space, grid: Grid, found: Found, lists: ColumnLists, first_group: int
) -> None:
    """Add the tiles of a grid that are not EMPTY to `found`, and lists of their columns to `lists`."""
    conditions = KeyConditions(formula)
    by_lines = all(isinstance(leaf.atom, Line) for leaf in formula.leaves())
    stack = [Tiles.all(grid, grid.top, space.groups)]
    while stack:
        tiles = stack.pop()
        if len(tiles) > _CHUNK:
            stack += [tiles.chosen(slice(n, n + _CHUNK)) for n in range(0, len(tiles), _CHUNK)]
            continue
        verdicts = formula.verdicts(tiles)
        if tiles.level == 0:
            decision = decide(formula, space, tiles, verdicts)
            verdicts = decision.verdicts
            found.by_witness += decision.by_witness
            found.by_evaluation += decision.by_evaluation
            found.by_analysis += len(tiles) - decision.by_witness - decision.by_evaluation
        else:
            settled = verdicts & (verdicts - 1) == 0
            if not settled.all():
                rest = tiles.chosen(~settled)
                if by_lines:
                    rows, keys = _open(formula, rest)
                    said = np.flatnonzero(keys & ~rows)
                    done, pieces, kinds = lists.stretches(conditions, rest.chosen(said))
                    found.add(rest.chosen(said), pieces, kinds, first_group)
                    found.by_analysis += _leaves(rest.chosen(said[done]))
                    rows[said[done]] = keys[said[done]] = False
                    stack += _divided(rest, rows, keys)
                else:
                    stack.append(rest.parts())
            # EMPTY stands for "nothing to add" in what goes on below.
            verdicts = np.where(settled, verdicts, EMPTY)
            found.by_analysis += _leaves(tiles.chosen(settled))
        found.add(tiles, *lists.kinds(conditions, tiles, verdicts), first_group)


def _leaves(tiles: Tiles) -> int:
    """How many leaf tiles there are in some tiles."""
    (q0, q1), (k0, k1) = tiles.q_range, tiles.k_range
    return int(((q1 - q0) * (k1 - k0)).sum())


def _open(formula: Formula, tiles: Tiles) -> tuple[NDArray, NDArray]:
    """Along which axes tiles are to be divided: rows, and keys; those of a formula of lines.

    Conditions on rows go first: columns may be listed when nothing else is open.
    """
    rows, keys, both = (np.zeros(len(tiles), bool) for _ in range(3))
    for leaf in formula.leaves():
        if leaf.direction == NONE:
            continue
        verdict = leaf.verdicts(tiles)
        several = verdict & (verdict - 1) != 0
        if leaf.direction == ROW:
            rows |= several
        elif leaf.direction == KEY:
            keys |= several
        else:
            # It is in part open in every leaf, but not in every column of one.
            both |= several | (verdict == PARTIAL)
    both |= ~rows & ~keys
    return rows | both, keys & ~rows | both


def _divided(tiles: Tiles, rows: NDArray, keys: NDArray) -> list[Tiles]:
    """The tiles of the level below along the axes that are open, as far as there is one."""
    rows, keys = rows & (tiles.q_level > 0), keys & (tiles.k_level > 0)
    kinds = ((True, True), (True, False), (False, True))
    chosen = ((of, np.flatnonzero((rows == of[0]) & (keys == of[1]))) for of in kinds)
    return [tiles.chosen(which).parts(*of) for of, which in chosen if which.size]
