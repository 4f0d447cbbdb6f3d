"""What a call costs before and after its arithmetic: the smallest call through the front door."""

from __future__ import annotations

from typing import Any

from . import common

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "kv_lengths": {"kv_lengths": [3]},
}


class Tiny(common.Timed):
    """One head, one query, four keys of 8."""

    params: Any = (common.ALL, tuple(OPTIONS))
    param_names = ("backend", "options")

    def setup(self, backend: str, options: str) -> None:
        self.call = common.call(backend, (1, 1, 1, 8), (1, 1, 4, 8), **OPTIONS[options])

    def time_attention(self, backend: str, options: str) -> None:
        self.call()
