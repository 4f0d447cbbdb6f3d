"""`attention_weights` and `attention_stats`: every option reaches them too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, call
from anyattn.testing.cases.each_option import BATCH, HEADS, K_LEN, OPTIONS, Q_LEN

FAMILY = "around"
STATS = ("key_mass", "entropy", "max")


def cases() -> Iterator[Case]:
    """Each option alone, rows, each statistic, dtypes."""
    for operation in ("weights", "stats"):
        wanted: dict[str, Any] = {"stats": STATS} if operation == "stats" else {}
        for name, options in OPTIONS.items():
            if "return_lse" in options:
                continue
            yield call(
                f"{operation}: {name}", FAMILY, f"{name} in attention_{operation}", batch=BATCH, heads=HEADS,
                q_len=Q_LEN, k_len=K_LEN, operation=operation, **options,
                **wanted,
            )  # fmt: skip
        for dtype in ("float16", "bfloat16", "float64"):
            yield call(
                f"{operation}: {dtype}", FAMILY, "weights come in q's dtype, stats in the accumulation dtype",
                heads=4, kv_heads=2, operation=operation, dtype=dtype, sinks=Drawn("sinks", (4,)),
                causal=True, **wanted,
            )  # fmt: skip
        for q_len, k_len in ((0, 4), (4, 0), (1, 1), (9, 300), (3, 7), (7, 3)):
            yield call(
                f"{operation}: Lq = {q_len}, Lk = {k_len}", FAMILY, "lengths", operation=operation,
                causal=True, q_len=q_len, k_len=k_len, **wanted,
            )  # fmt: skip
        yield call(f"{operation}: two axes", FAMILY, "no head axis", operation=operation, two_axes=True)
    for rows in ([0], [4, 1], [2, 2], []):
        yield call(
            f"weights: rows {rows}", FAMILY, "chosen rows, in the order asked for", operation="weights",
            rows=rows, batch=(2,), causal=True, bias=Drawn("bias", (5, 9)),
        )  # fmt: skip
    for one in STATS:
        yield call(
            f"stats: {one} alone", FAMILY, "only what is asked for", operation="stats", stats=(one,),
            batch=(2,), sinks=Drawn("sinks", (2,)), causal=True,
        )  # fmt: skip
    yield call("stats: default", FAMILY, "key_mass is the default", operation="stats")
    yield call(
        "stats: blocks of rows and keys", FAMILY, "sums over many tiles", operation="stats", stats=STATS,
        heads=2, kv_heads=1, q_len=270, k_len=300, dim=3, window=(40, 3),
    )  # fmt: skip
