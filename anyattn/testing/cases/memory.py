"""Strides and read-only arrays: inputs are taken as they lie and never written to."""

from __future__ import annotations

from collections.abc import Iterator

from anyattn.testing.case import Case, Drawn, Given, call
from anyattn.testing.memory import MEMORIES

FAMILY = "memory"


def cases() -> Iterator[Case]:
    """Each way of lying in memory, in each layout and several dtypes."""
    for memory, meaning in MEMORIES.items():
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            for layout in ("bhld", "blhd"):
                yield call(
                    f"{memory} arrays, {layout}, {dtype}", FAMILY, meaning, batch=(3,), heads=4, kv_heads=2,
                    memory=memory, layout=layout, dtype=dtype, causal=True, return_lse=True,
                    bias=Drawn("bias", (3, 4, 5, 9)), mask=Drawn("mask", (3, 1, 5, 9), "bool", "mostly true"),
                    kv_lengths=Given("kv_lengths", (9, 9, 9) if memory == "repeated" else (9, 7, 3)),
                    q_offset=2,
                )  # fmt: skip
        yield call(
            f"{memory} arrays, two axes", FAMILY, meaning, two_axes=True, memory=memory, return_lse=True
        )
        yield call(
            f"{memory} arrays, blocks", FAMILY, meaning, heads=2, q_len=9, k_len=270, dim=3, memory=memory,
            causal=True, return_lse=True,
        )  # fmt: skip
        for operation in ("weights", "stats"):
            yield call(
                f"{memory} arrays, {operation}",
                FAMILY,
                meaning,
                operation=operation,
                memory=memory,
                causal=True,
            )
