"""Each option of the call alone, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, call
from anyattn.testing.cases.makers import every_third_key, halve_far_keys

FAMILY = "each option"
BATCH, HEADS, Q_LEN, K_LEN = (2,), 4, 5, 9
FULL = (*BATCH, HEADS, Q_LEN, K_LEN)

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True},
    "window of both sides": {"window": (3, 1)},
    "window open to the left": {"window": (None, 1)},
    "window open to the right": {"window": (2, None)},
    "window open on both sides": {"window": (None, None)},
    "window of one key": {"window": (0, 0)},
    "mask expression": {"mask": Entry("masks", "strided", (3,))},
    "mask function": {"mask": Function(every_third_key)},
    "mask of two axes": {"mask": Drawn("mask", (Q_LEN, K_LEN), "bool", "mostly true")},
    "mask of all axes": {"mask": Drawn("mask", FULL, "bool", "mostly true")},
    "mask with axes of one": {"mask": Drawn("mask", (2, 1, 1, K_LEN), "bool", "mostly true")},
    "mask of rows": {"mask": Drawn("mask", (1, HEADS, Q_LEN, 1), "bool", "mostly true")},
    "bias of two axes": {"bias": Drawn("bias", (Q_LEN, K_LEN))},
    "bias of all axes": {"bias": Drawn("bias", FULL)},
    "bias with axes of one": {"bias": Drawn("bias", (1, HEADS, 1, K_LEN))},
    "score_mod expression": {
        "score_mod": Entry("scores", "alibi", (Drawn("slopes", (HEADS,), how="positive"),))
    },
    "score_mod function": {"score_mod": Function(halve_far_keys)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": Drawn("sinks", (HEADS,))},
    "sinks as a sequence": {"sinks": [0.5, -1.0, 2.0, 0.0]},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.4},
    "scale of zero": {"scale": 0.0},
    "kv_lengths": {"kv_lengths": Given("kv_lengths", (9, 4))},
    "kv_lengths as a sequence": {"kv_lengths": [3, 8]},
    "kv_lengths as one number": {"kv_lengths": 6},
    "q_offset": {"q_offset": 2, "causal": True},
    "return_lse": {"return_lse": True},
    "blhd": {"layout": "blhd"},
    "grouped heads": {"kv_heads": 2},
    "one key/value head": {"kv_heads": 1},
}


def cases() -> Iterator[Case]:
    """Each option of `OPTIONS` in each dtype."""
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        for name, options in OPTIONS.items():
            yield call(
                f"{name}, {dtype}", FAMILY, f"{name} by itself, so that a failure names its cause",
                batch=BATCH, heads=HEADS, q_len=Q_LEN, k_len=K_LEN, v_dim=6, dtype=dtype, **options,
            )  # fmt: skip
