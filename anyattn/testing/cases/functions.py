"""Users' Python functions as `mask` and `score_mod` (contract section 3, last paragraph)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, call
from anyattn.testing.cases import makers

FAMILY = "functions"


def cases() -> Iterator[Case]:
    """Masks, scores, and what they capture."""
    sizes: dict[str, Any] = {"batch": (2,), "heads": 2, "q_len": 6, "k_len": 10}
    masks = {
        "floor of a negative quotient": (Function(makers.floored_blocks), "// floors, it does not truncate"),
        "remainder by a negative divisor": (
            Function(makers.modulo_of_negative_divisor),
            "% takes the divisor's sign",
        ),
        "every index": (Function(makers.by_batch_and_head), "b and h reach the function, not only i and j"),
        "logic": (Function(makers.not_and_or), "~ & | ^ and comparisons"),
        "constant": (Function(makers.constant_true), "a function need not look at its indices"),
        "captured booleans": (
            Function(makers.looked_up, (Drawn("seen", (2, 10), "bool", "mostly true"),)),
            "tables",
        ),
        "function inside an expression": (
            Entry("masks", "from_function", (Function(makers.every_third_key),))
            | Entry("masks", "prefix", (2,)),
            "from_function combines as every entry does",
        ),
    }
    for offset in (None, -4, 3):
        for name, (mask, why) in masks.items():
            yield call(
                f"mask function: {name}, q_offset={offset}", FAMILY, why, q_offset=offset, mask=mask, **sizes
            )

    scores = {
        "alibi by hand": (
            Function(makers.slope, (Drawn("slopes", (2,), how="positive"),)),
            "captured floats",
        ),
        "out of range": (
            Function(makers.off_the_table, (Drawn("table", (2, 5)),)),
            "an index out of range reads the nearest edge",
        ),
        "out of range along each axis": (
            Function(makers.off_the_table_by_batch, (Drawn("table", (2, 2, 4)),)),
            "each axis clamps by itself",
        ),
        "floor division and remainder": (Function(makers.floored_score), "// and % floor in scores too"),
        "every function": (Function(makers.everything_offered), "what the contract offers inside functions"),
        "quadratic": (Function(makers.quadratic), "not linear in the score"),
        "two captured arrays": (
            Function(makers.affine, (Drawn("factor", (2,), "float64"), Drawn("shift", (10,)))),
            "captured floats of another dtype compute in the accumulation dtype",
        ),
        "captured integers": (
            Function(makers.to_float, (Given("table", (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)),)),
            "integers meet the score",
        ),
    }
    for offset in (None, -4, 3):
        for name, (score_mod, why) in scores.items():
            yield call(
                f"score function: {name}, q_offset={offset}", FAMILY, why, q_offset=offset,
                score_mod=score_mod, return_lse=True, **sizes,
            )  # fmt: skip
    for dtype in ("float16", "bfloat16", "float64"):
        yield call(
            f"score function: alibi by hand, {dtype}", FAMILY, "scores compute in the accumulation dtype",
            dtype=dtype, score_mod=Function(makers.slope, (Drawn("slopes", (2,), how="positive"),)), **sizes,
        )  # fmt: skip
