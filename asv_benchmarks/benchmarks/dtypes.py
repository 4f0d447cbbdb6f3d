"""The same causal call in each dtype."""

from __future__ import annotations

from typing import Any

from . import common


class Dtypes(common.Timed):
    """8 heads of 64, 1024 tokens, causal."""

    params: Any = (common.ALL, ("float32", "float16", "bfloat16", "float64"))
    param_names = ("backend", "dtype")
    length = 1024

    def setup(self, backend: str, dtype: str) -> None:
        self.call = common.call(backend, (1, 8, self.length, 64), dtype=dtype, causal=True)

    def time_attention(self, backend: str, dtype: str) -> None:
        self.call()
