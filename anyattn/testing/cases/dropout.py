"""Dropout: which weights are dropped hangs on the seed and the pair alone, and lse on nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, Plant, call
from anyattn.testing.cases import makers

FAMILY = "dropout"
NAN = float("nan")


def cases() -> Iterator[Case]:
    """Each dtype and each shape that kernels take apart, with the options that stand beside dropout."""
    why = "a softmax weight is 0 or 1 / (1 - p) times itself, the log sum is as it was"
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        yield call(
            f"dropout, {dtype}", FAMILY, why, batch=(2,), heads=4, kv_heads=2, v_dim=6, dtype=dtype,
            dropout=0.3, dropout_seed=5, return_lse=True,
        )  # fmt: skip
        yield call(
            f"dropout and a decoding step, {dtype}", FAMILY, "kernels of few queries", batch=(2,), heads=8,
            kv_heads=2, q_len=1, k_len=300, dtype=dtype, causal=True, kv_lengths=[300, 131], dropout=0.5,
            dropout_seed=-3, sinks=Drawn("sinks", (8,)),
        )  # fmt: skip
        yield call(
            f"dropout and everything, {dtype}", FAMILY, "all tile code at once", q_batch=(2, 1), k_batch=(3,),
            heads=4, kv_heads=2, layout="blhd", dtype=dtype, causal=True, window=(6, None), softcap=2.0,
            mask=Drawn("mask", (5, 9), "bool", "mostly true"), bias=Drawn("bias", (5, 9)), q_offset=3,
            score_mod=Entry("scores", "alibi", (4,)), sinks=Drawn("sinks", (4,)), kv_lengths=[9, 4, 0],
            dropout=0.1, dropout_seed=2**63 + 12345, return_lse=True,
        )  # fmt: skip
    yield call(
        "dropout over several tiles", FAMILY, "the counter is that of the call, not of a tile", heads=2,
        q_len=70, k_len=300, dim=3, causal=True, dropout=0.4, dropout_seed=9, return_lse=True,
    )  # fmt: skip
    yield call(
        "dropout and gathered keys", FAMILY, "j is the key, not its place", heads=1, q_len=37, k_len=150,
        dim=5, mask=Entry("masks", "fixed", (40, 2)), dropout=0.4, dropout_seed=9,
    )  # fmt: skip
    yield call(
        "dropout, a seed in an array", FAMILY, "frameworks draw seeds on devices", dropout=0.25,
        dropout_seed=Given("seed", 77), two_axes=True,
    )  # fmt: skip
    yield call(
        "dropout of nearly all", FAMILY, "the rest is 20 times as large", dropout=0.95, dropout_seed=1,
        return_lse=True, k_len=40, dtype="float16",
    )  # fmt: skip
    yield call("dropout of nearly none", FAMILY, "p below 2**-24", dropout=1e-9, dropout_seed=0)
    yield call("dropout, no keys", FAMILY, "nothing to drop", k_len=0, dropout=0.5, dropout_seed=1)
    yield call("dropout, no queries", FAMILY, "no rows", q_len=0, dropout=0.5, dropout_seed=1)
    yield call(
        "dropout, -inf from score_mod", FAMILY, "rows that see nothing stay 0", dropout=0.5, dropout_seed=1,
        score_mod=Function(makers.minus_infinity), q_offset=0, return_lse=True,
    )  # fmt: skip
    yield call(
        "dropout, nan is hidden from some rows", FAMILY, "strict masking, with weights that are 0 or not",
        causal=True, dropout=0.5, dropout_seed=1, also={"strict_masking"},
        plants=(Plant("k", (0, 7, 0), NAN), Plant("v", (1, 6, 2), NAN)),
    )  # fmt: skip
