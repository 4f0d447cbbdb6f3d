"""What several lines of a schedule visit as one: for backends that compute blocks of heads at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anyattn.schedule.result import Schedule

__all__ = ["runs_together"]


def runs_together(plan: Schedule, lines: Iterable[int]) -> Iterator[tuple[int, int, bool]]:
    """Runs of keys that any of the lines visits: first key, the one past the last, whether all see all of it.

    Tiles of which a few columns are gathered count as a whole.
    """
    tiles = plan.shape[1]
    seen, full = np.zeros(tiles, bool), np.ones(tiles, bool)
    for line in lines:
        here = np.zeros(tiles, bool)
        for first, end in plan.full.of(line):
            here[first:end] = True
        full &= here
        seen |= here
        for runs in (plan.partial, plan.gathered):
            for first, end in runs.of(line):
                seen[first:end] = True
    kinds = seen.astype(int) + (seen & full)
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), tiles]
    for first, end in pairwise(edges):
        if end > first and kinds[first]:
            yield first * plan.keys, min(end * plan.keys, plan.k_len), bool(kinds[first] == 2)
