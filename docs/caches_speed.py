"""Writes the speed table of `caches.md`: a step of decoding and an append, for each kind of cache.

Run it as `python docs/caches_speed.py`. Kinds are measured in turn, so that what else the machine does meets
all of them, as processor time of one thread; the least of the rounds counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from caches_table import PAGE, with_table

import anyattn as aa

sys.path.append(str(Path(__file__).parent.parent / "asv_benchmarks"))

from benchmarks import caches

KEYS, ROUNDS = 4096, 30


def measured() -> dict[str, tuple[Callable[[], Any], Callable[[], None] | None]]:
    """What is measured by name: attention from one query of each sequence, and appending a token."""
    found: dict[str, Any] = {kind: caches.step("numba", kind, KEYS) for kind in caches.KINDS}
    # Heads of a token side by side, as pages have them, in one buffer.
    shape = 2, caches.SEQUENCES, KEYS, caches.KV_HEADS, caches.DIM
    k, v = np.moveaxis(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), -2, -3)
    q = np.ones((caches.SEQUENCES, caches.HEADS, 1, caches.DIM), np.float32)
    found["the same arrays as (L, H, D)"] = (lambda: aa.attention(q, k, v, backend="numba"), None)
    return found


def least(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of processor time of each call, the least of the rounds."""
    found = dict.fromkeys(calls, np.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], 1000 * (time.process_time() - start))
    return found


if __name__ == "__main__":
    with aa.use(threads=1):
        both = measured()
        decode = least({name: call for name, (call, _) in both.items()})
        append = least({name: call for name, (_, call) in both.items() if call is not None})
    lines = []
    for name, taken in decode.items():
        added = f" {append[name]:.2f} ms" if name in append else ""
        lines.append(f"| {name} | {taken:.1f} ms | {taken / decode['buffer']:.2f} |{added} |")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), 4, lines), encoding="utf-8")
