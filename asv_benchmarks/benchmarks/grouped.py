"""Query heads that share key/value heads."""

from __future__ import annotations

from typing import Any

from . import common


class Grouped(common.Timed):
    """16 query heads of 128, causal: multi-query (1), grouped (4) and multi-head (16) attention."""

    params: Any = (common.ALL, (1, 4, 16))
    param_names = ("backend", "key/value heads")

    def setup(self, backend: str, heads: int) -> None:
        self.call = common.call(backend, (1, 16, 512, 128), (1, heads, 512, 128), causal=True)

    def time_attention(self, backend: str, heads: int) -> None:
        self.call()
