"""Blocks of keys chosen from the queries and keys: what choosing costs beside what it saves."""

from __future__ import annotations

from typing import Any

import numpy as np

import anyattn as aa
from anyattn.top_blocks import top_blocks

from . import common

BLOCK, HEADS, DIM = 64, 4, 64


class Attention(common.Timed):
    """4 heads of 64, causal; blocks of 64 queries see so many of the blocks of 64 keys so far, or all."""

    params: Any = (common.WHO, ("8 blocks", "32 blocks", "all"))
    param_names = ("backend", "count")
    length = 8192

    def setup(self, backend: str, count: str) -> None:
        q, k, v = tensors(backend, self.length)
        mask = None
        if count != "all":
            mask = aa.masks.top_blocks(q, k, BLOCK, int(count.split()[0]), causal=True)
        self.call = lambda: aa.attention(q, k, v, mask=mask, causal=True, backend=backend)
        self.call()

    def time_attention(self, backend: str, count: str) -> None:
        self.call()


class Choice(common.Timed):
    """The choice itself, which is made by the array library."""

    params: Any = (common.WHO, ("8 blocks", "32 blocks"))
    param_names = ("backend", "count")
    length = 8192

    def setup(self, backend: str, count: str) -> None:
        if backend != "reference":
            raise NotImplementedError("no backend chooses")
        q, k, _ = tensors(backend, self.length)
        self.call = lambda: top_blocks(q, k, BLOCK, int(count.split()[0]), causal=True)

    def time_choice(self, backend: str, count: str) -> None:
        self.call()


def tensors(backend: str, length: int) -> Any:
    """Random queries, keys and values for a backend that takes mask expressions."""
    common.require(backend)
    if backend == common.PEER:
        raise NotImplementedError("the peer would need the mask as an array")
    return np.random.default_rng(0).standard_normal((3, 1, HEADS, length, DIM), dtype=np.float32)
