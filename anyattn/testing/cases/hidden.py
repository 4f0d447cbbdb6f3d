"""What is hidden does not matter: strict masking, lengths, rows that see nothing (contract, section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Given, Plant, call

FAMILY = "hidden"
STRICT = {"strict_masking"}
INF, NAN = float("inf"), float("nan")
SPECIALS = {"nan": NAN, "inf": INF, "-inf": -INF}


def cases() -> Iterator[Case]:
    """Lengths, hidden pairs, seen special values, empty rows."""
    yield from _beyond_lengths()
    yield from _hidden_pairs()
    yield from _seen_specials()
    yield from _empty_rows()


def _beyond_lengths() -> Iterator[Case]:
    why = "keys at or beyond kv_lengths never matter, whatever is in them"
    for word, value in SPECIALS.items():
        planted = tuple(Plant(array, "beyond kv_lengths", value) for array in ("k", "v"))
        lengths = Given("kv_lengths", (9, 4, 0))
        yield call(
            f"{word} beyond kv_lengths",
            FAMILY,
            why,
            batch=(3,),
            kv_lengths=lengths,
            plants=planted,
            return_lse=True,
        )
        yield call(
            f"{word} beyond kv_lengths, with everything", FAMILY, why, batch=(3,), heads=4, kv_heads=2,
            kv_lengths=lengths, q_offset=Given("q_offset", (4, -1, 0)), causal=True, softcap=2.0,
            bias=Drawn("bias", (5, 9)), sinks=Drawn("sinks", (4,)), plants=planted, return_lse=True,
        )  # fmt: skip
        for dtype in ("float16", "bfloat16", "float64"):
            yield call(
                f"{word} beyond kv_lengths, {dtype}", FAMILY, why, batch=(3,), kv_lengths=lengths,
                dtype=dtype, plants=planted, return_lse=True,
            )  # fmt: skip
        for operation in ("weights", "stats"):
            yield call(
                f"{word} beyond kv_lengths, {operation}", FAMILY, why, batch=(3,), operation=operation,
                kv_lengths=lengths, plants=planted[:1],
            )  # fmt: skip
    yield call(
        "nan beyond kv_lengths, two axes", FAMILY, why, two_axes=True, kv_lengths=6, return_lse=True,
        plants=(Plant("k", "beyond kv_lengths", NAN), Plant("v", "beyond kv_lengths", NAN)),
    )  # fmt: skip
    yield call(
        "nan beyond kv_lengths, blocks", FAMILY, why, batch=(2,), heads=1, q_len=2, k_len=300, dim=4,
        kv_lengths=[129, 3],
        plants=(Plant("k", "beyond kv_lengths", NAN), Plant("v", "beyond kv_lengths", NAN)), return_lse=True,
    )  # fmt: skip


def _hidden_pairs() -> Iterator[Case]:
    why = "a hidden (row, key) contributes nothing even if k, v or bias is NaN or infinite there"
    hides: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window": (2, 1)},
        "mask array": {"mask": Drawn("mask", (5, 9), "bool", "half true")},
        "mask expression": {
            "mask": Entry("masks", "documents", (Given("ids", (0, 0, 1, 1, 1, 2, 2, 3, 3)),))
        },
        "negated mask": {"mask": ~Entry("masks", "prefix", (8,)) | Entry("masks", "causal")},
    }
    for word, value in SPECIALS.items():
        for name, options in hides.items():
            yield call(
                f"{word} in k and v, hidden from some rows by {name}", FAMILY, why, also=STRICT,
                plants=(Plant("k", (0, 7, 2), value), Plant("v", (1, 6, 3), value)), return_lse=True,
                **options,
            )  # fmt: skip
        yield call(
            f"{word} in bias at hidden pairs", FAMILY, why, also=STRICT, bias=Drawn("bias", (5, 9)),
            causal=True, plants=(Plant("bias", (0, 7), value), Plant("bias", (3, 8), value)), return_lse=True,
        )  # fmt: skip
        yield call(
            f"{word} in weights and hidden keys", FAMILY, why, also=STRICT, operation="weights", causal=True,
            plants=(Plant("k", (0, 8), value),), kv_heads=1, heads=2,
        )  # fmt: skip
        yield call(
            f"{word} in stats and hidden keys", FAMILY, why, also=STRICT, operation="stats", causal=True,
            stats=("key_mass", "entropy", "max"), window=(None, -0), plants=(Plant("k", (0, 0), value),),
            mask=~Entry("masks", "prefix", (1,)),
        )  # fmt: skip
    for dtype in ("float16", "bfloat16", "float64"):
        yield call(
            f"nan in k and v, hidden from some rows, {dtype}", FAMILY, why, also=STRICT, causal=True,
            dtype=dtype, plants=(Plant("k", (0, 7), NAN), Plant("v", (1, 6), NAN)), return_lse=True,
        )  # fmt: skip
    yield call(
        "nan in a row of q", FAMILY, "a NaN query spoils its row and no other", causal=True,
        plants=(Plant("q", (0, 2, 1), NAN),), return_lse=True,
    )  # fmt: skip
    yield call(
        "nan in a query that sees nothing", FAMILY, why, also=STRICT, return_lse=True, sinks=[0.5, 1.0],
        mask=Given("mask", tuple((row != 2,) for row in range(5)), "bool"), plants=(Plant("q", (0, 2), NAN),),
    )  # fmt: skip
    yield call(
        "nan in a key of another block", FAMILY, why, also=STRICT, heads=1, q_len=260, k_len=300, dim=2,
        causal=True, plants=(Plant("k", (0, 299, 0), NAN), Plant("v", (0, 150, 1), INF)), return_lse=True,
    )  # fmt: skip


def _seen_specials() -> Iterator[Case]:
    why = "NaN and infinity at seen keys propagate as IEEE says"
    for word, value in SPECIALS.items():
        yield call(
            f"{word} at a seen value", FAMILY, why, plants=(Plant("v", (0, 3, 2), value),), return_lse=True
        )
        yield call(
            f"{word} in a seen bias", FAMILY, why, bias=Drawn("bias", (2, 5, 9)), return_lse=True,
            plants=(Plant("bias", (1, 2, 3), value),),
        )  # fmt: skip
        yield call(
            f"{word} at a seen value, blocks", FAMILY, why, heads=1, q_len=2, k_len=300, dim=2,
            plants=(Plant("v", (0, 5, 1), value),), return_lse=True,
        )  # fmt: skip
    yield call("nan at a seen key", FAMILY, why, plants=(Plant("k", (0, 3, 2), NAN),), return_lse=True)
    for operation, chosen in {"weights": {}, "stats": {"stats": ("key_mass", "entropy", "max")}}.items():
        extra: dict[str, Any] = chosen
        yield call(
            f"nan at a seen key beside hidden ones, {operation}", FAMILY,
            "the weight of a hidden key is 0 all the same",
            operation=operation, also=STRICT, mask=Drawn("mask", (1, 9), "bool", "half true"),
            plants=(Plant("k", (0, slice(0, 4)), NAN), Plant("k", (1, 5, 1), INF)), **extra,
        )  # fmt: skip
    yield call(
        "inf at a seen key", FAMILY, "scores of both infinities, by the sign of the query",
        plants=(Plant("k", (0, 3, 2), INF),), return_lse=True,
    )  # fmt: skip
    yield call(
        "inf and -inf at seen values", FAMILY, why, return_lse=True,
        plants=(Plant("v", (0, 3, 2), INF), Plant("v", (0, 4, 2), -INF)),
    )  # fmt: skip


def _empty_rows() -> Iterator[Case]:
    why = "a row that sees no key gives 0, and lse -inf or the sink's logit"
    some = Given("mask", tuple((row not in (1, 4),) for row in range(5)), "bool")
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        yield call(f"rows that see nothing, {dtype}", FAMILY, why, mask=some, return_lse=True, dtype=dtype)
        yield call(
            f"rows that see nothing but a sink, {dtype}", FAMILY, why, mask=some, sinks=Drawn("sinks", (2,)),
            return_lse=True, dtype=dtype,
        )  # fmt: skip
    yield call("no key is seen at all", FAMILY, why, mask=Given("mask", ((False,),), "bool"), return_lse=True)
    yield call(
        "more queries than keys, causal", FAMILY, "rows before the first key", q_len=9, k_len=3, causal=True,
        return_lse=True,
    )  # fmt: skip
    yield call("lengths of 0", FAMILY, why, batch=(2,), kv_lengths=[0, 9], return_lse=True, sinks=[1.0, -2.0])
    yield call(
        "minus infinity as sink", FAMILY, "a sink of -inf is no sink", mask=some, return_lse=True,
        sinks=Given("sinks", (-INF, 0.5), "float32"),
    )  # fmt: skip
    nothing: dict[str, Any] = {"mask": Given("mask", ((False,),), "bool")}
    nothing["sinks"] = Given("sinks", (INF, NAN), "float32")
    yield call("sinks that are not finite and no key", FAMILY, why, return_lse=True, **nothing)
    yield call("sinks that are not finite and no key, weights", FAMILY, why, operation="weights", **nothing)
    yield call(
        "sinks that are not finite and no key, stats", FAMILY, why, operation="stats",
        stats=("key_mass", "entropy", "max"), **nothing,
    )  # fmt: skip
    beside = Given("mask", tuple(((head == 2, False) * 4 + (head == 2,),) for head in range(3)), "bool")
    yield call(
        "sinks that are not finite, beside a head that sees keys", FAMILY, "tiles that another head opens",
        heads=3, kv_heads=1, mask=beside, sinks=Given("sinks", (INF, NAN, 0.5), "float32"), return_lse=True,
    )  # fmt: skip
    undefined: dict[str, Any] = {"heads": 3, "kv_heads": 1, "mask": some}
    undefined["sinks"] = Given("sinks", (NAN, INF, 0.5), "float32")
    why_beside = "rows of one tile that see keys are NaN, those that see none are 0"
    sinks = "sinks of NaN and of infinity"
    yield call(sinks, FAMILY, why_beside, return_lse=True, **undefined)
    yield call(f"{sinks}, weights", FAMILY, why_beside, operation="weights", **undefined)
    yield call(
        f"{sinks}, stats", FAMILY, why_beside, operation="stats", stats=("entropy", "max"), **undefined
    )
    for word, mask in {"": None, ", and a mask": some}.items():
        yield call(
            f"bias of -inf{word}", FAMILY,
            "-inf gives weight 0, and a row with nothing else is treated as empty",
            bias=Drawn("bias", (2, 5, 9)), mask=mask, return_lse=True,
            plants=(Plant("bias", (0, 1), -INF), Plant("bias", (slice(None), 3, slice(0, 8)), -INF)),
        )  # fmt: skip
        yield call(
            f"bias of -inf and a sink{word}", FAMILY, "lse of such a row is the sink's logit",
            bias=Drawn("bias", (2, 5, 9)), mask=mask, return_lse=True, sinks=Drawn("sinks", (2,)),
            plants=(Plant("bias", (0, 1), -INF),),
        )  # fmt: skip
    yield call(
        "rows that see nothing, weights", FAMILY, "their weights are 0", operation="weights", mask=some
    )
    yield call(
        "rows that see nothing, stats", FAMILY, "their weights are 0", operation="stats", mask=some,
        stats=("key_mass", "entropy", "max"),
    )  # fmt: skip
    yield call(
        "the first block of keys is -inf", FAMILY, "a running maximum of -inf must not make NaN", heads=1,
        q_len=2, k_len=400, dim=2, bias=Drawn("bias", (1, 400)),
        plants=(Plant("bias", (0, slice(0, 300)), -INF),), return_lse=True,
    )  # fmt: skip
