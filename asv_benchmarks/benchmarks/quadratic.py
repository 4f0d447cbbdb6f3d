"""The quadratic core: every query sees every key, or every key before it."""

from __future__ import annotations

from typing import Any

from . import common


class Dense(common.Timed):
    """8 heads of 64."""

    params: Any = (common.WHO, (128, 512, 2048))
    param_names = ("backend", "length")

    def setup(self, backend: str, length: int) -> None:
        self.call = common.call(backend, (1, 8, length, 64))

    def time_attention(self, backend: str, length: int) -> None:
        self.call()


class Causal(common.Timed):
    """8 heads of 64; half of the pairs."""

    params: Any = (common.WHO, (128, 512, 2048))
    param_names = ("backend", "length")

    def setup(self, backend: str, length: int) -> None:
        self.call = common.call(backend, (1, 8, length, 64), causal=True)

    def time_attention(self, backend: str, length: int) -> None:
        self.call()


class Padded(common.Timed):
    """A batch of 8 sequences of different lengths, 12 heads of 64: an encoder."""

    params: Any = (common.WHO, (128, 512))
    param_names = ("backend", "length")

    def setup(self, backend: str, length: int) -> None:
        lengths = [length * share // 16 for share in (16, 5, 9, 12, 3, 14, 7, 10)]
        self.call = common.call(backend, (8, 12, length, 64), kv_lengths=lengths)

    def time_attention(self, backend: str, length: int) -> None:
        self.call()
