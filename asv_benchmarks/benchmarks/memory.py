"""Time and memory of long sequences: `causal & (sliding_window | global_tokens)`, 8 heads of 64.

The memory is what the process holds at its peak during a call, beyond what it held before, inputs included,
and beyond the result. Only Linux lets a process reset its peak.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

import anyattn as aa

from . import common

HEADS, DIM = 8, 64
# The others take minutes or, for the peer's boolean mask, 10 GB.
LONGEST = {"numba": 100_000}


class Long:
    """One call of 8192 or 100,000 tokens."""

    params: Any = (common.ALL, (8_192, 100_000))
    param_names = ("backend", "tokens")
    rounds = 1
    number = 1
    repeat = (2, 3, 5.0)
    warmup_time = 0
    timeout = 300

    def setup(self, backend: str, tokens: int) -> None:
        if tokens > LONGEST.get(backend, 8_192):
            raise NotImplementedError(f"{backend} takes too long, or too much memory")
        mask = aa.masks.causal() & (aa.masks.sliding_window(512, 0) | aa.masks.global_tokens(64))
        # A short call first, for everything that is compiled and kept; the peer's mask is made in each.
        common.call(backend, (1, HEADS, 256, DIM), mask=mask)
        self.call = common.call(backend, (1, HEADS, tokens, DIM), called=False, mask=mask)

    def time_attention(self, backend: str, tokens: int) -> None:
        self.call()

    def track_extra_memory(self, backend: str, tokens: int) -> int:
        if sys.platform != "linux":
            raise NotImplementedError("only Linux tells the peak of a call")
        # Freed memory that the C library keeps would be used again, and counted as if nothing were taken.
        if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            library.malloc_trim(0)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        out = self.call()
        return max(0, _memory("VmHWM") - before - np.asarray(out).nbytes)

    track_extra_memory.unit = "bytes"


def _memory(name: str) -> int:
    """A size of this process in bytes, by its name in Linux's status file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise NotImplementedError(f"/proc/self/status has no {name}")
