"""Masks that let little through: the cost should follow what is seen, not the square of the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyattn import masks

from . import common

# About an eighth of the pairs or less, at LENGTH.
PATTERNS: dict[str, Callable[[int], masks.Mask]] = {
    "window": lambda length: masks.sliding_window(256, 0),
    "strided": lambda length: masks.causal() & (masks.sliding_window(128, 0) | masks.fixed(64)),
    "BigBird": lambda length: (
        masks.sliding_window(64, 64) | masks.global_tokens(64) | masks.random_blocks(2, 64, seed=1)
    ),
    # A list, which every library takes: the peers have tensors.
    "documents": lambda length: masks.documents([n // 300 for n in range(length)]) & masks.causal(),
}
LENGTH = 4096


class Sparse(common.Timed):
    """4 heads of 64."""

    params: Any = (common.ALL, tuple(PATTERNS))
    param_names = ("backend", "mask")
    length = LENGTH

    def setup(self, backend: str, pattern: str) -> None:
        mask = PATTERNS[pattern](self.length)
        self.call = common.call(backend, (1, 4, self.length, 64), mask=mask)

    def time_attention(self, backend: str, pattern: str) -> None:
        self.call()
