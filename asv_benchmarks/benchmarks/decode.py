"""One new query against a long cache: the limit is how fast memory can be read."""

from __future__ import annotations

from typing import Any

from . import common


class Decode(common.Timed):
    """A batch of 4, 32 query heads on 8 key/value heads of 128."""

    params: Any = (common.ALL, (512, 4096), ("float32", "bfloat16"))
    param_names = ("backend", "keys", "dtype")

    def setup(self, backend: str, keys: int, dtype: str) -> None:
        self.call = common.call(backend, (4, 32, 1, 128), (4, 8, keys, 128), dtype)

    def time_attention(self, backend: str, keys: int, dtype: str) -> None:
        self.call()
