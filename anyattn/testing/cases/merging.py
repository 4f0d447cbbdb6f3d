"""`merge`: attention over parts of the keys, joined, is attention over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Given, call

FAMILY = "merge"


def cases() -> Iterator[Case]:
    """Sinks in one part, parts that some rows or all rows do not see, empty parts, layouts, dtypes."""
    rows = Given("mask", tuple((row not in (1, 4),) for row in range(5)), "bool")
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("lse = logsumexp of the parts", {}),
        "sinks": ("lse holds the sinks, so one part has them", {"sinks": Drawn("sinks", (4,))}),
        "causal": ("parts that a row does not see at all", {"causal": True, "sinks": Drawn("sinks", (4,))}),
        "rows that see nothing": ("all parts -inf give 0 and -inf", {"mask": rows}),
        "rows that see only a sink": (
            "0 and the sink's logit",
            {"mask": rows, "sinks": Drawn("sinks", (4,))},
        ),
        "mask and bias": (
            "arrays are cut with the keys",
            {"mask": Drawn("mask", (5, 9), "bool", "half true"), "bias": Drawn("bias", (2, 4, 5, 9))},
        ),
    }
    for name, (why, chosen) in options.items():
        for layout in ("bhld", "blhd"):
            yield _case(f"merge: {name}, {layout}", why, layout=layout, **chosen)
    for dtype in ("float16", "bfloat16", "float64"):
        yield _case(f"merge: {dtype}", "every dtype", dtype=dtype, causal=True, sinks=Drawn("sinks", (4,)))
    yield _case("merge: an empty part", "(0, -inf) is the identity", cuts=(0, 4, 4))
    yield _case("merge: one part", "nothing to join", cuts=())
    yield _case("merge: a part for each key", "many parts", cuts=tuple(range(1, 9)))
    yield _case(
        "merge: logits of 1e4", "shares that underflow", scale=1.0, recipes={"q": "hundreds", "k": "hundreds"}
    )
    yield call(
        "merge: two axes", FAMILY, "no head axis", two_axes=True, operation="merge", cuts=(3,), causal=True,
        also={"return_lse", "q_offset"},
    )  # fmt: skip


def _case(name: str, why: str, cuts: tuple[int, ...] = (2, 7), **options: Any) -> Case:
    return call(
        name, FAMILY, why, batch=(2,), heads=4, kv_heads=2, operation="merge", cuts=cuts,
        also={"return_lse", "q_offset"}, **options,
    )  # fmt: skip
