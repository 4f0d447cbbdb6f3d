"""How near the Numba engine comes to what the machine can do: `python asv_benchmarks/roofline.py OUT.svg`.

Two limits: the best rate of NumPy's float32 matrix product, and the rate at which memory is read. A call lies
below them at its arithmetic intensity: operations of the pairs that it visits by bytes of q, k, v and out,
each once. Needs matplotlib. Every time is the least of several, all threads together.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.pop("OPENBLAS_CORETYPE", None)

import matplotlib
import numpy as np

matplotlib.use("svg")

import matplotlib.pyplot as plt
from benchmarks import common

import anyattn as aa

CAUSAL = aa.masks.causal()
CALLS = {
    "dense 2048": ((1, 8, 2048, 64), None, {}),
    "dense 128, D 32": ((1, 12, 128, 32), None, {}),
    "causal 2048, D 128": ((1, 32, 2048, 128), (1, 8, 2048, 128), {"causal": True}),
    "window 512": ((1, 8, 16384, 64), None, {"mask": aa.masks.sliding_window(512)}),
    "BigBird": (
        (1, 8, 8192, 64),
        None,
        {"mask": aa.masks.sliding_window(128, 128) | aa.masks.global_tokens(64)},
    ),
    "every 64th": (
        (1, 8, 8192, 64),
        None,
        {"mask": CAUSAL & (aa.masks.sliding_window(128) | aa.masks.fixed(64))},
    ),
    "decode 8192": ((8, 32, 1, 128), (8, 8, 8192, 128), {}),
}


def least(function: Callable[[], object], seconds: float = 2.0) -> float:
    """Seconds of the quickest of many calls."""
    found, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        function()
        found = min(found, time.perf_counter() - began)
    return found


def limits() -> tuple[float, float]:
    """Operations and bytes a second: of a matrix product, and of dot products of what fits in no cache."""
    x = np.ones((2048, 2048), np.float32)
    rate = 2 * 2048**3 / least(lambda: x @ x)
    parts = np.array_split(np.ones(1 << 27, np.float32), os.cpu_count() or 1)

    def read() -> None:
        readers = [threading.Thread(target=np.dot, args=(part, part)) for part in parts]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    return rate, sum(part.nbytes for part in parts) / least(read)


def visited(q_shape: tuple[int, ...], k_len: int, options: dict[str, object]) -> int:
    """Pairs of a query and a key that are seen, over batch and heads."""
    mask = CAUSAL if options.get("causal") else options.get("mask")
    batch, heads, q_len, _ = q_shape
    density = 1.0 if mask is None else mask.picture(q_len, k_len).density  # type: ignore[attr-defined]
    return round(batch * heads * q_len * k_len * density)


def main() -> None:
    """Measure, print a table and draw."""
    target = Path(sys.argv[1])
    peak, bandwidth = limits()
    print(f"float32 product {peak / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    edge = np.geomspace(1, 2**12, 200)
    axes.plot(edge, np.minimum(peak, edge * bandwidth) / 1e9, color="black")
    for name, (q_shape, kv_shape, options) in CALLS.items():
        kv = kv_shape or q_shape
        function = common.call("numba", q_shape, kv_shape, **options)
        operations = 4 * visited(q_shape, kv[2], options) * q_shape[3]
        nbytes = 4 * 2 * (math.prod(q_shape) + math.prod(kv))
        intensity, rate = operations / nbytes, operations / least(function)
        limit = min(peak, intensity * bandwidth)
        print(f"{name:20s} {rate / 1e9:7.1f} GFLOP/s, {rate / limit:.0%} of the limit")
        axes.plot(intensity, rate / 1e9, "o", label=f"{name}: {rate / limit:.0%} of the limit")
    axes.legend(loc="lower right")
    axes.set_xlabel("operations a byte of q, k, v and out")
    axes.set_ylabel("GFLOP/s of the pairs that are seen")
    axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
