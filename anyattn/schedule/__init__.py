"""Schedules: which tiles of (query, key) a mask leaves empty, fills, or opens in part.

`parts` says what decides it and reads arrays, `axes` finds along which direction each part changes,
`formula` joins `atoms` (and `mixed` ones, by `intervals`), `search` goes from coarse to fine tiles, `decide`
settles the rest by points, `columns` lists isolated keys, `result` is the product, `spans` the same for
compiled kernels, `together` for blocks of heads, `make` makes it and keeps it under its `key`.
"""

from __future__ import annotations

from anyattn.schedule.make import rows_without_keys, schedule
from anyattn.schedule.parts import Parts
from anyattn.schedule.result import QueryBlock, Runs, Schedule, Statistics
from anyattn.schedule.spans import GATHERED, MASKED, Spans
from anyattn.schedule.verdicts import EMPTY, FULL, PARTIAL

__all__ = [
    "EMPTY",
    "FULL",
    "GATHERED",
    "MASKED",
    "PARTIAL",
    "Parts",
    "QueryBlock",
    "Runs",
    "Schedule",
    "Spans",
    "Statistics",
    "rows_without_keys",
    "schedule",
]
