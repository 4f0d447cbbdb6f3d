"""From coarse tiles to fine ones: what a coarse tile settles for all its leaves is never divided."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.axes import Space
from anyattn.schedule.columns import ColumnLists
from anyattn.schedule.decide import decide
from anyattn.schedule.formula import Formula
from anyattn.schedule.grid import Grid, Tiles
from anyattn.schedule.keyed import KeyConditions
from anyattn.schedule.verdicts import EMPTY

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
                stack.append(tiles.chosen(~settled).parts())
            # EMPTY stands for "nothing to add" in what goes on below.
            verdicts = np.where(settled, verdicts, EMPTY)
            (q0, q1), (k0, k1) = tiles.q_range, tiles.k_range
            found.by_analysis += int(((q1 - q0) * (k1 - k0))[settled].sum())
        found.add(tiles, *lists.kinds(conditions, tiles, verdicts), first_group)
