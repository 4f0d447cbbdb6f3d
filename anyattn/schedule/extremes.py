"""Smallest and largest values of a line in every block of it, at every level of a grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.schedule.axes import ROW
from anyattn.schedule.grid import FACTOR, Grid, Tiles

__all__ = ["Extremes", "side"]

NDArray = np.ndarray[Any, Any]


def side(grid: Grid, direction: str) -> tuple[int, int, int]:
    """First index, size and number of the leaf tiles of a grid along rows or keys."""
    if direction == ROW:
        return grid.row, grid.rows, grid.q_tiles
    return grid.key, grid.keys, grid.k_tiles


class Extremes:
    """Minima and maxima of `values` (groups or 1, length), which run along the rows or the keys."""

    def __init__(self, values: NDArray, direction: str):
        self.values = values
        self.direction = direction
        self._levels: dict[tuple[Grid, int], tuple[NDArray, NDArray]] = {}

    def of(self, tiles: Tiles) -> tuple[NDArray, NDArray]:
        """Least and greatest value in each tile."""
        low, high = self._level(tiles.grid, tiles.level)
        group = tiles.group if len(self.values) > 1 else 0
        at = tiles.q if self.direction == ROW else tiles.k
        return low[group, at], high[group, at]

    def _level(self, grid: Grid, level: int) -> tuple[NDArray, NDArray]:
        key = grid, level
        if key not in self._levels:
            if level:
                low, high = self._level(grid, level - 1)
                heads = np.arange(0, low.shape[1], FACTOR)
                low = np.minimum.reduceat(low, heads, axis=1)
                high = np.maximum.reduceat(high, heads, axis=1)
            else:
                start, size, count = side(grid, self.direction)
                blocks = self.values[:, start : start + size * count].reshape(-1, count, size)
                low, high = blocks.min(axis=2), blocks.max(axis=2)
            self._levels[key] = low, high
        return self._levels[key]
