"""Linear attention by rule and length: a token should cost the same in a long sequence as in a short one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import anyattn as aa

from . import common
from .quadratic import least_seconds

RULES = ("linear", "gated", "gated each channel", "delta", "gated_delta")
LONG = 65536
HEADS, DIM = 8, 64


def call(backend: str, rule: str, length: int, heads: int = HEADS) -> Callable[[], Any]:
    """Causal linear attention of random numbers, called once so that everything is compiled."""
    if backend == common.PEER:
        raise NotImplementedError("torch has no linear attention")
    common.require(backend)
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((heads, length, DIM), dtype=np.float32) for _ in range(3))
    q /= 8
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    options: dict[str, Any] = {"rule": rule.split()[0], "backend": backend}
    if rule.startswith("gated"):
        shape = k.shape if rule.endswith("channel") else k.shape[:-1]
        options["decay"] = -random.random(shape, dtype=np.float32) / 10
    if rule.endswith("delta"):
        options["beta"] = random.random(k.shape[:-1], dtype=np.float32)

    def function() -> Any:
        return aa.linear_attention(q, k, v, **options)

    aa.linear_attention(*(x[:, :100] for x in (q, k, v)), **_first(options, 100))
    return function


def _first(options: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {name: x if isinstance(x, str) else x[:, :tokens] for name, x in options.items()}


class Long(common.Timed):
    """8 heads of 64, causal."""

    params: Any = (common.WHO, RULES)
    param_names = ("backend", "rule")
    length = LONG

    def setup(self, backend: str, rule: str) -> None:
        self.call = call(backend, rule, self.length)

    def time_linear_attention(self, backend: str, rule: str) -> None:
        self.call()

    def track_share_of_product(self, backend: str, rule: str) -> float:
        """Its rate over that of NumPy's float32 matrix product in the same process, on all threads.

        What counts is 4 D (D + 16.5) operations a token and head: a token writes to and reads from the state,
        and sees 16.5 tokens of a chunk of 32. What a rule does beside that is its own cost.
        """
        x = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
        product = 2 * 1024**3 / least_seconds(lambda: x @ x)
        useful = 4 * HEADS * self.length * DIM * (DIM + 16.5)
        return useful / least_seconds(self.call, 3) / product


class Scaling(common.Timed):
    """One head of 64 on one thread: twice the tokens should take twice the time."""

    params: Any = (common.WHO, RULES, (65536, 262144, 1048576))
    param_names = ("backend", "rule", "tokens")

    def setup(self, backend: str, rule: str, tokens: int) -> None:
        self.call = call(backend, rule, tokens, heads=1)

    def time_linear_attention(self, backend: str, rule: str, tokens: int) -> None:
        with aa.use(threads=1):
            self.call()


class Step(common.Timed):
    """One token of 32 sequences with 8 heads of 64, from the state that the last one left."""

    params: Any = (common.WHO, RULES)
    param_names = ("backend", "rule")

    def setup(self, backend: str, rule: str) -> None:
        self.call = call(backend, rule, 1, heads=32 * HEADS)

    def time_linear_attention(self, backend: str, rule: str) -> None:
        self.call()
