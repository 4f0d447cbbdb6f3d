"""Schedules on the device: uploaded once for each schedule and device, and kept as long as the schedule.

Each stream has copies of its own, as `streams` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.schedule import Schedule, schedule
from anyattn_cupy.streams import Kept

__all__ = ["DeviceSchedule", "device_schedule"]


@dataclass(frozen=True, eq=False)
class DeviceSchedule:
    """The arrays of a schedule, and the names that the argument block has for them.

    `by_head` tells whether heads have entries of their own.
    """

    names: tuple[str, ...]
    kept: Kept
    by_head: bool

    def arrays(self, cupy: Any) -> dict[str, Array]:
        """Those of the current stream."""
        return dict(zip(self.names, self.kept.here(cupy), strict=True))


_uploaded: WeakKeyDictionary[Schedule, dict[Any, DeviceSchedule]] = WeakKeyDictionary()


def device_schedule(call: AttentionCall, rows: int, keys: int, cupy: Any) -> DeviceSchedule | None:
    """The schedule of a call in tiles of rows x keys; None where every row sees every key."""
    if call.visible is None:
        return None
    made = schedule(call, rows=rows, keys=keys)
    known = _uploaded.setdefault(made, {})
    where = cupy, cupy.cuda.Device().id
    if where not in known:
        known[where] = _upload(made, cupy)
    return known[where]


def _upload(made: Schedule, cupy: Any) -> DeviceSchedule:
    spans = made.spans
    arrays = {
        "span_starts": spans.starts,
        "span_ends": spans.ends,
        "span_kinds": spans.kinds,
        "columns": spans.columns,
        "groups": spans.groups,
    }
    lines = spans.groups.reshape(-1, 1) * made.shape[0] + numpy.arange(made.shape[0])
    visited = numpy.concatenate([[0], numpy.cumsum(spans.ends[:, 1] - spans.ends[:, 0])])
    keys = numpy.diff(visited[spans.starts])[lines.reshape(-1)]
    if keys.size and keys.min() != keys.max():
        # The longest first, so that no long one is left alone at the end.
        arrays["order"] = numpy.argsort(-keys, kind="stable").astype(numpy.int32)
    kept = Kept((cupy.asarray(x) for x in arrays.values()), cupy)
    return DeviceSchedule(tuple(arrays), kept, made.groups[1] > 1)
