"""Which keys each block of rows visits: tiles of the mask's schedule, joined to spans.

A span is sliced, never gathered, and one block of rows of a chunk visits what any of its heads sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anyattn.call import AttentionCall
from anyattn.schedule import Schedule, schedule
from anyattn.schedule.together import runs_together

__all__ = ["Span", "Visit", "Visits"]

# Keys of a tile of the schedule.
KEYS = 128
# Calls of no more scores a head have one tile: a schedule would cost more than it saves.
FEW_SCORES = 1 << 14


@dataclass(frozen=True)
class Span:
    """Keys [start, end); all rows see those outside of the ranges `masked`."""

    start: int
    end: int
    masked: tuple[tuple[int, int], ...]


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
                runs = [(0, self.call.k_len, self.call.visible is None)] if self.call.k_len else []
            else:
                runs = list(runs_together(self.plan, [line + block for line in lines]))
            yield Visit(first, last, tuple(self._spans(runs)))

    def _spans(self, runs: list[tuple[int, int, bool]]) -> Iterator[Span]:
        """Runs (first key, end, whether all is seen) that touch, joined and cut to pieces of one size."""
        for first, end in _touching(runs):
            count = -(-(end - first) // self.keys)
            size = -(-(end - first) // (count * KEYS)) * KEYS
            for start in range(first, end, size):
                stop = min(start + size, end)
                masked = ((max(a, start), min(b, stop)) for a, b, full in runs if not full)
                yield Span(start, stop, tuple((a, b) for a, b in masked if a < b))


def _touching(runs: list[tuple[int, int, bool]]) -> Iterator[tuple[int, int]]:
    """The ranges of keys that runs cover without a gap."""
    start = 0
    for n, (first, end, _) in enumerate(runs):
        start = first if n == 0 or runs[n - 1][1] != first else start
        if n + 1 == len(runs) or runs[n + 1][0] != end:
            yield start, end
