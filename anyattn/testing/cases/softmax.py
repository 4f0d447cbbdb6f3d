"""Scores and softmax: their order, sinks, sizes that overflow."""

from __future__ import annotations

from collections.abc import Iterator

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, call
from anyattn.testing.cases import makers

FAMILY = "softmax"


def cases() -> Iterator[Case]:
    """Order of the stages, sinks, large logits, dtypes of bias and sinks."""
    why = "scale, softcap, score_mod, bias, masks, in this order"
    double = Function(makers.quadratic)
    yield call("softcap before score_mod", FAMILY, why, softcap=0.7, score_mod=double, return_lse=True)
    yield call(
        "score_mod before bias", FAMILY, why, score_mod=double, bias=Drawn("bias", (5, 9)), return_lse=True
    )
    yield call("softcap before bias", FAMILY, why, softcap=0.7, bias=Drawn("bias", (5, 9)), return_lse=True)
    yield call(
        "the whole order", FAMILY, why, scale=1.1, softcap=0.7, score_mod=double, bias=Drawn("bias", (5, 9)),
        causal=True, sinks=Drawn("sinks", (2,)), return_lse=True,
    )  # fmt: skip
    yield call(
        "softcap and a mask", FAMILY, "a soft cap after the mask would let hidden keys in", softcap=0.5,
        causal=True, mask=Drawn("mask", (5, 9), "bool", "half true"), return_lse=True,
    )  # fmt: skip
    yield call(
        "all masks at once", FAMILY, "masks AND together", batch=(2,), causal=True, window=(3, None),
        mask=Entry("masks", "strided", (2,)), kv_lengths=[9, 5], q_offset=4, return_lse=True,
    )  # fmt: skip
    yield call(
        "minus infinity from score_mod", FAMILY, "gives weight 0; a row with nothing else is empty",
        score_mod=Function(makers.minus_infinity), q_offset=0, return_lse=True,
    )  # fmt: skip
    yield call(
        "minus infinity from score_mod, sinks", FAMILY, "lse of an empty row is the sink", q_offset=0,
        score_mod=Function(makers.minus_infinity), sinks=Drawn("sinks", (2,)), return_lse=True,
    )  # fmt: skip

    yield call(
        "sinks are not scaled", FAMILY, "sinks join unscaled, after softcap and bias", scale=0.1, softcap=0.5,
        sinks=Given("sinks", (3.0, -3.0), "float32"), bias=Drawn("bias", (5, 9)), return_lse=True,
    )  # fmt: skip
    yield call(
        "a sink above every score",
        FAMILY,
        "the maximum may be the sink",
        sinks=[80.0, 200.0],
        return_lse=True,
    )
    yield call("a sink far below", FAMILY, "no underflow of the rest", sinks=[-200.0, -1e30], return_lse=True)
    yield call(
        "sinks of grouped heads", FAMILY, "one sink for each query head", heads=6, kv_heads=2,
        sinks=Drawn("sinks", (6,)), return_lse=True,
    )  # fmt: skip

    large = {"q": "hundreds", "k": "hundreds"}
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        yield call(
            f"logits of 1e4, {dtype}", FAMILY,
            "scores of any finite size neither overflow nor lose the softmax", recipes=large, scale=1.0,
            return_lse=True, dtype=dtype,
        )  # fmt: skip
        yield call(
            f"logits of 1e4 with sinks and causal, {dtype}", FAMILY, "the same with everything about it",
            recipes=large, scale=1.0, causal=True, sinks=[5.0, 12000.0], return_lse=True, dtype=dtype,
        )  # fmt: skip
    yield call(
        "logits of 1e4, all below zero", FAMILY, "the maximum is far below 0", return_lse=True,
        bias=Given("bias", (tuple(-1e4 + j for j in range(9)),), "float32"),
    )  # fmt: skip
    yield call(
        "logits of 1e4, blocks", FAMILY, "rescaling by exp of -1e4", recipes=large, scale=1.0, heads=1,
        q_len=3, k_len=400, return_lse=True,
    )  # fmt: skip
    yield call(
        "logits of 1e4 under a soft cap", FAMILY, "tanh saturates", recipes=large, scale=1.0, softcap=30.0,
        return_lse=True,
    )  # fmt: skip
    yield call(
        "logits of 1e4, weights", FAMILY, "weights of the same", recipes=large, scale=1.0, operation="weights"
    )
    yield call(
        "logits of 1e4, stats", FAMILY, "entropy of the same", recipes=large, scale=1.0, operation="stats",
        stats=("entropy", "max", "key_mass"),
    )  # fmt: skip
    yield call(
        "equal scores", FAMILY, "weights of exactly 1/Lk", recipes={"q": "ones", "k": "ones"}, return_lse=True
    )

    for other in ("float16", "bfloat16", "float32", "float64"):
        for dtype in ("float32", "float16"):
            yield call(
                f"{other} bias and sinks, {dtype}", FAMILY, "bias and sinks may have any real float dtype",
                dtype=dtype, bias=Drawn("bias", (5, 9), other), sinks=Drawn("sinks", (2,), other),
                return_lse=True,
            )  # fmt: skip
