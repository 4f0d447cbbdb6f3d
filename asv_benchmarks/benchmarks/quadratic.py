"""The quadratic core: every query sees every key, or every key before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import anyattn as aa

from . import common


class Dense(common.Timed):
    """8 heads of 64."""

    params: Any = (common.ALL, (128, 512, 2048))
    param_names = ("backend", "length")

    def setup(self, backend: str, length: int) -> None:
        self.call = common.call(backend, (1, 8, length, 64))

    def time_attention(self, backend: str, length: int) -> None:
        self.call()

    def track_share_of_product(self, backend: str, length: int) -> float:
        """Its rate over the best of NumPy's float32 matrix product in the same process, on all threads."""
        x = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
        product = 2 * 1024**3 / least_seconds(lambda: x @ x)
        return 4 * 8 * length**2 * 64 / least_seconds(self.call) / product


class Threads(common.Timed):
    """8 heads of 64 on one thread and on two."""

    params: Any = (common.ALL, (512, 2048), (1, 2))
    param_names = ("backend", "length", "threads")

    def setup(self, backend: str, length: int, threads: int) -> None:
        if backend not in common.BACKENDS:
            raise NotImplementedError("a peer's threads are those of its process")
        call = common.call(backend, (1, 8, length, 64))

        def limited() -> Any:
            with aa.use(threads=threads):
                return call()

        self.call = limited

    def time_attention(self, backend: str, length: int, threads: int) -> None:
        self.call()


class Causal(common.Timed):
    """8 heads of 64; half of the pairs."""

    params: Any = (common.ALL, (128, 512, 2048))
    param_names = ("backend", "length")

    def setup(self, backend: str, length: int) -> None:
        self.call = common.call(backend, (1, 8, length, 64), causal=True)

    def time_attention(self, backend: str, length: int) -> None:
        self.call()


class Padded(common.Timed):
    """A batch of 8 sequences of different lengths, 12 heads of 64: an encoder."""

    params: Any = (common.ALL, (128, 512))
    param_names = ("backend", "length")

    def setup(self, backend: str, length: int) -> None:
        lengths = [length * share // 16 for share in (16, 5, 9, 12, 3, 14, 7, 10)]
        self.call = common.call(backend, (8, 12, length, 64), kv_lengths=lengths)

    def time_attention(self, backend: str, length: int) -> None:
        self.call()


def least_seconds(call: Callable[[], Any], samples: int = 7) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
