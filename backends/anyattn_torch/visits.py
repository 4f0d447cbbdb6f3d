"""Which keys each block of rows visits: tiles of the mask's schedule, joined to spans.

A span is sliced, never gathered, and one block of rows of a chunk visits what any of its heads sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from anyattn.call import AttentionCall
from anyattn.schedule import Schedule, schedule

__all__ = ["Span", "Visit", "Visits"]

# Keys of a tile of the schedule.
KEYS = 128
# Calls of no more scores a head have one tile: a schedule would cost more than it saves.
FEW_SCORES = 1 << 14


@dataclass(frozen=True)
class Span:
    """Keys [start, end); every row sees all of them where `full`."""

    start: int
    end: int
    full: bool


@dataclass(frozen=True)
class Visit:
    """Rows [first, last) and the keys that any of them may see in any head of a chunk."""

    first: int
    last: int
    spans: tuple[Span, ...]


class Visits:
    """What chunks of a call visit, in blocks of `rows` rows and at most `keys` keys."""

    def __init__(self, call: AttentionCall, rows: int, keys: int):
        self.call, self.rows, self.keys = call, rows, keys
        self.plan: Schedule | None = None
        if call.visible is not None and call.q_len * call.k_len > FEW_SCORES:
            self.plan = schedule(call, rows=rows, keys=min(KEYS, keys))
        self.known: dict[Any, tuple[Visit, ...]] = {}

    def of(self, entries: Any, heads: range) -> tuple[Visit, ...]:
        """The visits of some batch entries (their flat indices) and query heads, in the order of the rows."""
        if self.plan is None:
            lines: tuple[int, ...] = (0,)
        else:
            lines = tuple(sorted({self.plan.line(0, int(b), h) for b in entries for h in heads}))
        if lines not in self.known:
            self.known[lines] = tuple(self._visits(lines))
        return self.known[lines]

    def _visits(self, lines: tuple[int, ...]) -> Iterator[Visit]:
        for block, first in enumerate(range(0, self.call.q_len, self.rows)):
            last = min(first + self.rows, self.call.q_len)
            if self.plan is None:
                whole = Span(0, self.call.k_len, full=self.call.visible is None)
                found = [whole] if self.call.k_len else []
            else:
                found = list(_spans(self.plan, [line + block for line in lines]))
            yield Visit(first, last, tuple(piece for span in found for piece in self._pieces(span)))

    def _pieces(self, span: Span) -> Iterator[Span]:
        """A span in pieces of one size, up to a tile."""
        count = -(-(span.end - span.start) // self.keys)
        size = -(-(span.end - span.start) // (count * KEYS)) * KEYS
        for start in range(span.start, span.end, size):
            yield Span(start, min(start + size, span.end), span.full)


def _spans(plan: Schedule, lines: list[int]) -> Iterator[Span]:
    """The spans of a block of rows that any of the lines visits, full where all of them see all."""
    import numpy

    tiles = plan.shape[1]
    seen, full = numpy.zeros(tiles, bool), numpy.ones(tiles, bool)
    for line in lines:
        here = numpy.zeros(tiles, bool)
        for first, end in plan.full.of(line):
            here[first:end] = True
        full &= here
        seen |= here
        for runs in (plan.partial, plan.gathered):
            for first, end in runs.of(line):
                seen[first:end] = True
    kinds = seen.astype(int) + (seen & full)
    edges = [0, *(numpy.flatnonzero(numpy.diff(kinds)) + 1).tolist(), tiles]
    for first, end in pairwise(edges):
        if end > first and kinds[first]:
            yield Span(first * plan.keys, min(end * plan.keys, plan.k_len), full=bool(kinds[first] == 2))
