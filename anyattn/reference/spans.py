"""Which keys each block of rows visits: all of them, or what the schedule of the mask leaves.

Only attention itself visits less; weights are asked for whole, and statistics sum over all rows at once.
Keys are sliced, never gathered: of a tile with a few open columns all are scanned and masked, and one block
of rows visits what any batch entry or head sees. A mask costs what it lets through in kernels, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    from anyattn.schedule import schedule
    from anyattn.schedule.together import runs_together

    plan = schedule(call, rows=TILE, keys=TILE)
    blocks = plan.shape[0]
    groups = plan.groups[0] * plan.groups[1]
    for block in range(blocks):
        lines = [group * blocks + block for group in range(groups)]
        spans = tuple(Span(first, end, full) for first, end, full in runs_together(plan, lines))
        # Rows that see nothing still hang on q, k and v for automatic differentiation.
        nothing = (Span(0, 0, full=True),)
        yield Visit(block * TILE, min((block + 1) * TILE, call.q_len), spans or nothing)
