"""What `anyattn warmup` compiles: every kernel of a dtype, the threads, and code for common masks and scores.

Tile code depends on the structure of a mask and not on lengths, windows, slopes or caps, so one of each kind
serves all. It is other code only where a batch has one entry, whose lengths are no table to look up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy

from anyattn import scores
from anyattn.describe import Options, describe
from anyattn.expr.bounds import index_ranges
from anyattn.expr.program import Program, lower
from anyattn_numba import threads
from anyattn_numba.kernels import KERNELS, kernel_address, tile_address
from anyattn_numba.tiles import index_type

__all__ = ["COMMON", "warm_up"]

_BATCH, _HEADS, _LENGTH = 2, 2, 40
_LENGTHS = [_LENGTH, _LENGTH - 7]

COMMON: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"causal": True},
    "sliding window": lambda: {"window": (8, 0)},
    "key lengths or padding": lambda: {"kv_lengths": _LENGTHS, "q_offset": 0},
    "causal, key lengths": lambda: {"kv_lengths": _LENGTHS, "q_offset": 0, "causal": True},
    "ALiBi": lambda: {"score_mod": scores.alibi(_HEADS)},
    "causal, ALiBi": lambda: {"score_mod": scores.alibi(_HEADS), "causal": True},
    "soft cap": lambda: {"softcap": 30.0},
    "causal, soft cap": lambda: {"softcap": 30.0, "causal": True},
}
"""Options of calls, by what they are called."""


def warm_up(dtypes: Collection[str]) -> Iterator[tuple[str, float]]:
    """What was compiled or loaded, and the seconds it took."""
    yield "threads", _seconds(threads.warm_up)
    for dtype in dtypes:
        for kernel in (*KERNELS, "linear"):
            yield f"{kernel}, {dtype}", _seconds(kernel_address, kernel, dtype)
    for accumulate in dict.fromkeys("float64" if dtype == "float64" else "float32" for dtype in dtypes):
        for name, options in COMMON.items():
            program, index = _program(accumulate, options())
            yield f"{name}, scores in {accumulate}", _seconds(tile_address, program, accumulate, index)


def _program(dtype: str, options: dict[str, Any]) -> tuple[Program, str]:
    """The masks and scores of a call as tile code has them, and the type of its integers."""
    x = numpy.zeros((_BATCH, _HEADS, _LENGTH, 8), dtype)
    call = describe("attention", x, x, x, Options(**options))
    program = lower(call.visible, call.score)
    return program, index_type(program, index_ranges(call))


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
