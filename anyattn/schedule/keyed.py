"""What the conditions on keys alone leave open in each column of a tile.

They are known column by column; of all other conditions only their possible verdicts on the tile count (its
signature). So what is possible in a column is a look-up by signature and by what the conditions on keys say
there, two small numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.atoms import Line
from anyattn.schedule.axes import KEY
from anyattn.schedule.formula import Formula
from anyattn.schedule.grid import Grid, Tiles
from anyattn.schedule.verdicts import EMPTY, FULL

__all__ = ["KeyConditions"]

NDArray = np.ndarray[Any, Any]

# Conditions on keys that are followed; what two or three say is joined into one by `formula`.
_MOST_LINES = 6
# Other conditions: their verdicts, three bits each, and the group are one int64.
_MOST_OTHERS = 12


class KeyConditions:
    """The conditions of a formula, those on keys apart; `useful` where there are such, and not too many."""

    def __init__(self, formula: Formula):
        self.formula = formula
        leaves = list(formula.leaves())
        self.lines = [x.atom for x in leaves if x.direction == KEY and isinstance(x.atom, Line)]
        self.by_key = [x for x in leaves if any(x.atom is line for line in self.lines)]
        self.others = [x for x in leaves if not any(x.atom is line for line in self.lines)]
        self.useful = 0 < len(self.lines) <= _MOST_LINES and len(self.others) <= _MOST_OTHERS
        self.varied = any(len(line.seen) > 1 for line in self.lines)
        self._said: dict[tuple[Grid, int], NDArray] = {}

    def signatures(self, tiles: Tiles, which: NDArray) -> tuple[NDArray, NDArray]:
        """The different signatures of some tiles, and the number of each tile's one.

        A signature holds three bits for each of the other conditions, and above them the group, 0 where
        conditions on keys are the same in all groups.
        """
        code = tiles.group[which] if self.varied else np.zeros(len(which), np.int64)
        wanted = np.zeros(len(tiles), bool)
        wanted[which] = True
        for leaf in self.others:
            code = code * 8 + leaf.verdicts(tiles, wanted)[which]
        found, of = np.unique(code, return_inverse=True)
        return found, of.reshape(-1)

    def group(self, signature: int) -> int:
        """The group that a signature is of."""
        return int(signature) >> 3 * len(self.others)

    def outcomes(self, grid: Grid, signatures: NDArray) -> NDArray:
        """Possible verdicts of a column, by signature and by what is said of it (signatures, 2 ** lines)."""
        said, of = np.meshgrid(np.arange(1 << len(self.lines)), np.arange(len(signatures)))
        zero = np.zeros(said.size, np.int64)
        columns, asked = Tiles(grid, 0, 0, zero, zero, zero), np.ones(said.size, bool)
        for n, leaf in enumerate(self.by_key):
            verdict = np.where(said.reshape(-1) >> n & 1, FULL, EMPTY)
            columns.known[id(leaf)] = verdict.astype(np.uint8), asked
        for n, leaf in enumerate(self.others):
            verdict = signatures[of.reshape(-1)] >> 3 * (len(self.others) - 1 - n) & 7
            columns.known[id(leaf)] = verdict.astype(np.uint8), asked
        return self.formula.verdicts(columns).reshape(said.shape)

    def said(self, grid: Grid, group: int) -> NDArray:
        """What is said of every column of a grid (k_tiles, keys), one bit a condition."""
        group = group if self.varied else 0
        if (grid, group) not in self._said:
            keys = slice(grid.key, grid.key + grid.keys * grid.k_tiles)
            said = np.zeros((grid.k_tiles, grid.keys), np.uint8)
            for n, line in enumerate(self.lines):
                seen = line.seen[group if len(line.seen) > 1 else 0, keys]
                said |= seen.reshape(said.shape).astype(np.uint8) << n
            self._said[grid, group] = said
        return self._said[grid, group]
