"""Calls that are differentiated by every float array in them, where the library can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, Plant, Same, call
from anyattn.testing.cases import makers
from anyattn.testing.cases.each_option import BATCH, HEADS, K_LEN, OPTIONS, Q_LEN

FAMILY = "gradients"
NAN, INF = float("nan"), float("inf")
GRADIENTS = frozenset({"gradients"})
STRICT = GRADIENTS | {"strict_masking"}


def cases() -> Iterator[Case]:
    """Each option, then what makes NaN in careless derivatives, then what is summed over."""
    for name, options in OPTIONS.items():
        yield call(
            f"gradient: {name}", FAMILY, f"{name} by itself", batch=BATCH, heads=HEADS, q_len=Q_LEN,
            k_len=K_LEN, dim=4, v_dim=3, also=GRADIENTS, **options,
        )  # fmt: skip
    for dtype in ("float16", "bfloat16", "float64"):
        yield call(
            f"gradient: everything, {dtype}", FAMILY, "every dtype", batch=(2,), heads=4, kv_heads=2,
            dtype=dtype, also=GRADIENTS, causal=True, softcap=2.0, bias=Drawn("bias", (1, 4, 5, 9)),
            sinks=Drawn("sinks", (4,)), return_lse=True,
            score_mod=Entry("scores", "alibi", (Drawn("slopes", (4,), how="positive"),)),
        )  # fmt: skip
    yield from _special()
    yield from _summed()
    yield from _captured()
    yield from _dropped()


def _special() -> Iterator[Case]:
    some = Given("mask", tuple((row not in (1, 4),) for row in range(5)), "bool")
    yield call(
        "gradient: rows that see nothing", FAMILY, "their gradients are 0, not NaN", mask=some,
        return_lse=True, also=GRADIENTS,
    )  # fmt: skip
    yield call(
        "gradient: rows that see only a sink", FAMILY, "d lse / d sink is 1 there", mask=some,
        return_lse=True, sinks=Drawn("sinks", (2,)), also=GRADIENTS,
    )  # fmt: skip
    yield call(
        "gradient: more queries than keys, causal", FAMILY, "empty rows by position", q_len=9, k_len=4,
        causal=True, return_lse=True, also=GRADIENTS,
    )  # fmt: skip
    yield call("gradient: no keys", FAMILY, "zeros", k_len=0, return_lse=True, also=GRADIENTS)
    yield call("gradient: no queries", FAMILY, "zeros", q_len=0, return_lse=True, also=GRADIENTS)
    yield call(
        "gradient: bias of -inf", FAMILY, "no NaN from (-inf) - (-inf)", return_lse=True, also=GRADIENTS,
        bias=Drawn("bias", (2, 5, 9)),
        plants=(Plant("bias", (0, 1), -INF), Plant("bias", (1, 2, slice(0, 5)), -INF)),
    )  # fmt: skip
    yield call(
        "gradient: -inf from score_mod", FAMILY, "no NaN from where", return_lse=True, also=GRADIENTS,
        q_offset=0, score_mod=Function(makers.minus_infinity),
    )  # fmt: skip
    yield call(
        "gradient: nan in hidden keys and values", FAMILY, "what is hidden does not matter", also=STRICT,
        causal=True,
        mask=~Entry("masks", "dense", (Given("hidden", ((False, False, True, *((False,) * 6)),), "bool"),)),
        plants=(Plant("k", (0, 2), NAN), Plant("v", (1, 2), NAN), Plant("v", (0, 2, 0), INF)),
        return_lse=True,
    )  # fmt: skip
    yield call(
        "gradient: nan in hidden keys under a captured factor", FAMILY,
        "the factor's derivative is the score, which is NaN where hidden",
        also=STRICT, causal=True, q_offset=0,
        score_mod=Function(makers.affine, (Drawn("factor", (2,)), Drawn("shift", (9,)))), softcap=2.0,
        plants=(Plant("k", (0, 7), NAN), Plant("k", (1, 8), INF)), return_lse=True,
    )  # fmt: skip
    yield call(
        "gradient: nan beyond kv_lengths", FAMILY, "what is hidden does not matter", batch=(2,),
        also=GRADIENTS, kv_lengths=Given("kv_lengths", (9, 4)), return_lse=True,
        plants=(Plant("k", "beyond kv_lengths", NAN), Plant("v", "beyond kv_lengths", NAN)),
    )  # fmt: skip
    yield call(
        "gradient: nan in bias at hidden pairs", FAMILY, "what is hidden does not matter", also=STRICT,
        causal=True, bias=Drawn("bias", (2, 5, 9)),
        plants=(Plant("bias", (0, 1, 7), NAN), Plant("bias", (1, 0, 8), INF)), return_lse=True,
    )  # fmt: skip
    yield call(
        "gradient: logits of 1e4", FAMILY, "no overflow on the way back", also=GRADIENTS, scale=1.0,
        recipes={"q": "hundreds", "k": "hundreds"}, dtype="float64", return_lse=True,
    )  # fmt: skip


def _summed() -> Iterator[Case]:
    why = "the gradient of a broadcast array is summed over what it was broadcast to"
    for layout in ("bhld", "blhd"):
        yield call(
            f"gradient: batch axes that broadcast, {layout}", FAMILY, why, q_batch=(2, 1), k_batch=(1, 3),
            v_batch=(3,), heads=4, kv_heads=2, layout=layout, dim=4, also=GRADIENTS, return_lse=True,
            causal=True,
        )  # fmt: skip
    yield call(
        "gradient: q without batch",
        FAMILY,
        why,
        q_batch=(),
        k_batch=(3,),
        dim=4,
        also=GRADIENTS,
        return_lse=True,
    )
    yield call(
        "gradient: bias that broadcasts", FAMILY, why, batch=(2,), dim=4, also=GRADIENTS,
        bias=Drawn("bias", (2, 1, 1, 9)),
    )  # fmt: skip
    yield call(
        "gradient: bias of keys", FAMILY, why, batch=(2,), dim=4, also=GRADIENTS, bias=Drawn("bias", (1, 9))
    )
    yield call(
        "gradient: two axes",
        FAMILY,
        "no head axis",
        two_axes=True,
        also=GRADIENTS,
        return_lse=True,
        causal=True,
    )
    yield call(
        "gradient: blocks", FAMILY, "several key blocks", heads=1, q_len=6, k_len=300, dim=3, also=GRADIENTS,
        causal=True, return_lse=True, sinks=[0.5],
    )  # fmt: skip
    yield call(
        "gradient: same bits", FAMILY, "backward twice", heads=4, kv_heads=2, q_len=33, k_len=65, causal=True,
        also=GRADIENTS | {"deterministic_backward"},
    )  # fmt: skip


def _captured() -> Iterator[Case]:
    table = Drawn("table", (2, 5))
    scores = {
        "alibi": Entry("scores", "alibi", (Drawn("slopes", (2,), how="positive"),)),
        "t5_bias": Entry("scores", "t5_bias", (Drawn("table", (8, 2)), True, 6)),
        "relative_bias": Entry("scores", "relative_bias", (table,)),
        "relative_keys": Entry("scores", "relative_keys", (Same("q"), Drawn("table", (5, 4)))),
        "a sum": Entry("scores", "alibi", (Drawn("slopes", (2,), how="positive"),))
        + Entry("scores", "relative_bias", (table,)),
        "then softcap": Entry("scores", "relative_bias", (table,)).then(Entry("scores", "softcap", (1.5,))),
        "a function": Function(makers.affine, (Drawn("factor", (2,)), Drawn("shift", (9,)))),
        "an index out of range": Function(makers.off_the_table, (Drawn("table", (2, 4)),)),
        "quadratic": Function(makers.quadratic),
    }
    for name, score_mod in scores.items():
        yield call(
            f"gradient: score_mod {name}", FAMILY, "captured float arrays have gradients too", batch=(2,),
            dim=4, score_mod=score_mod, softcap=2.0 if name == "quadratic" else None, also=GRADIENTS,
            return_lse=True,
        )  # fmt: skip


def _dropped() -> Iterator[Case]:
    why = "what is dropped takes no part, the rest as much more"
    options: dict[str, Any] = {"dropout": 0.3, "dropout_seed": 5, "return_lse": True, "also": GRADIENTS}
    yield call("gradient: dropout", FAMILY, why, batch=(2,), heads=4, kv_heads=2, dim=4, **options)
    for dtype in ("float16", "float64"):
        yield call(
            f"gradient: dropout and everything, {dtype}", FAMILY, why, batch=(2,), heads=4, kv_heads=2,
            dtype=dtype, causal=True, softcap=2.0, bias=Drawn("bias", (1, 4, 5, 9)),
            sinks=Drawn("sinks", (4,)), score_mod=Entry("scores", "alibi", (4,)), layout="blhd", **options,
        )  # fmt: skip
    yield call(
        "gradient: dropout, blocks and rows that see nothing", FAMILY, why, heads=1, q_len=6, k_len=300,
        dim=3, causal=True, q_offset=-2, **options,
    )  # fmt: skip
    yield call(
        "gradient: dropout, nan is hidden", FAMILY, why, mask=Drawn("mask", (5, 9), "bool", "half true"),
        plants=(Plant("k", (0, 3, 0), NAN), Plant("v", (0, 3, 0), INF)),
        kv_lengths=3, q_offset=0, **(options | {"also": STRICT}),
    )  # fmt: skip
