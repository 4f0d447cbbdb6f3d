"""Blocks of keys chosen from the queries and keys: what choosing costs beside what it saves."""

from __future__ import annotations

from typing import Any

import numpy as np

import anyattn as aa

from . import common

BLOCK, HEADS, DIM = 64, 4, 64


class TopBlocks(common.Timed):
    """4 heads of 64; each block of 64 queries sees so many blocks of 64 keys, or all that are not later."""

    params: Any = (common.WHO, ("8 blocks", "32 blocks", "all"))
    param_names = ("backend", "count")
    length = 8192

    def setup(self, backend: str, count: str) -> None:
        common.require(backend)
        if backend == common.PEER:
            raise NotImplementedError("the peer would need the mask as an array")
        random = np.random.default_rng(0)
        self.q, self.k, self.v = random.standard_normal((3, 1, HEADS, self.length, DIM), dtype=np.float32)
        self.backend, self.mask = backend, None
        if count != "all":
            self.count = int(count.split()[0])
            self.mask = aa.masks.top_blocks(self.q, self.k, BLOCK, self.count)
        self.call()

    def call(self) -> Any:
        return aa.attention(self.q, self.k, self.v, mask=self.mask, causal=True, backend=self.backend)

    def time_choose(self, backend: str, count: str) -> None:
        if self.mask is None:
            raise NotImplementedError("nothing to choose")
        aa.masks.top_blocks(self.q, self.k, BLOCK, self.count)

    def time_attention(self, backend: str, count: str) -> None:
        self.call()
