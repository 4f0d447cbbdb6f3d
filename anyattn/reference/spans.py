"""Which keys each block of rows visits: all of them, or what the schedule of the mask leaves.

Only attention itself visits less; weights are asked for whole, and statistics sum over all rows at once.
Keys are sliced, never gathered: of a tile with a few open columns all are scanned and masked, and one block
of rows visits what any batch entry or head sees. A mask costs what it lets through in kernels, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from anyattn.call import AttentionCall

__all__ = ["Span", "Visit", "visits"]

# Rows and keys of a tile.
TILE = 256
# Calls of no more scores a head are done in one: a schedule would cost more than it saves.
FEW_SCORES = 1 << 18


@dataclass(frozen=True)
class Span:
    """Keys [start, end); every row sees all of them where `full`."""

    start: int
    end: int
    full: bool


@dataclass(frozen=True)
class Visit:
    """Rows [first, last) and the keys that any of them may see in any head and batch entry."""

    first: int
    last: int
    spans: tuple[Span, ...]


def visits(call: AttentionCall) -> list[Visit]:
    """What a call visits, all rows in order."""
    everything = Visit(0, call.q_len, (Span(0, call.k_len, full=call.visible is None),))
    large = call.k_len > TILE and call.q_len * call.k_len > FEW_SCORES
    if call.visible is None or not call.readable or not large:
        return [everything]
    return list(_scheduled(call))


def _scheduled(call: AttentionCall) -> Iterator[Visit]:
    import numpy

    from anyattn.schedule import schedule

    plan = schedule(call, rows=TILE, keys=TILE)
    blocks, tiles = plan.shape
    groups = plan.groups[0] * plan.groups[1]
    for block in range(blocks):
        seen, full = numpy.zeros(tiles, bool), numpy.ones(tiles, bool)
        for group in range(groups):
            line = group * blocks + block
            here = numpy.zeros(tiles, bool)
            for first, end in plan.full.of(line):
                here[first:end] = True
            full &= here
            seen |= here
            for runs in (plan.partial, plan.gathered):
                for first, end in runs.of(line):
                    seen[first:end] = True
        spans = tuple(
            Span(first * TILE, min(end * TILE, call.k_len), kind == 2)
            for first, end, kind in _runs(seen.astype(int) + (seen & full))
            if kind
        )
        # Rows that see nothing still hang on q, k and v for automatic differentiation.
        nothing = (Span(0, 0, full=True),)
        yield Visit(block * TILE, min((block + 1) * TILE, call.q_len), spans or nothing)


def _runs(kinds: object) -> Iterator[tuple[int, int, int]]:
    """(first, end, kind) of the runs of equal entries."""
    import numpy

    values = numpy.asarray(kinds)
    edges = [0, *(numpy.flatnonzero(numpy.diff(values)) + 1).tolist(), len(values)]
    for first, end in pairwise(edges):
        yield first, end, int(values[first])
