"""Every entry of `anyattn.masks` and `anyattn.scores`, with a few arguments each, and how they combine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, Same, call
from anyattn.testing.cases import makers

FAMILY = "vocabulary"


def mask(name: str, *args: Any, **kwargs: Any) -> Entry:
    """An entry of `anyattn.masks`."""
    return Entry("masks", name, args, kwargs)


def score(name: str, *args: Any, **kwargs: Any) -> Entry:
    """An entry of `anyattn.scores`."""
    return Entry("scores", name, args, kwargs)


B, HEADS, Q_LEN, K_LEN = 3, 2, 7, 11

MASKS: dict[str, Any] = {
    "causal": mask("causal"),
    "sliding_window(3)": mask("sliding_window", 3),
    "sliding_window(0, 4)": mask("sliding_window", 0, 4),
    "sliding_window(None, 2)": mask("sliding_window", None, 2),
    "sliding_window(2, None)": mask("sliding_window", 2, None),
    "sliding_window(None, None)": mask("sliding_window", None, None),
    "dilated(2, 3)": mask("dilated", 2, 3),
    "dilated(1, 1)": mask("dilated", 1, 1),
    "dilated(0, 2)": mask("dilated", 0, 2),
    "strided(1)": mask("strided", 1),
    "strided(4)": mask("strided", 4),
    "strided(50)": mask("strided", 50),
    "fixed(4)": mask("fixed", 4),
    "fixed(3, 2)": mask("fixed", 3, 2),
    "fixed(3, 3)": mask("fixed", 3, 3),
    "global_tokens(0)": mask("global_tokens", 0),
    "global_tokens(2)": mask("global_tokens", 2),
    "global_tokens of a list": mask("global_tokens", [1, 6, 10]),
    "global_tokens of an array": mask("global_tokens", Given("tokens", (9, 0))),
    "global_tokens of many": mask("global_tokens", [0, 2, 3, 5, 6, 7, 8, 9, 10, 90]),
    "prefix(0)": mask("prefix", 0),
    "prefix(4)": mask("prefix", 4),
    "prefix for each batch entry": mask("prefix", Given("n", (4, 0, 11))),
    "documents": mask("documents", Given("ids", (5, 5, 5, 2, 2, 9, 9, 9, 5, 5, 0))),
    "documents for each batch entry": mask("documents", Drawn("ids", (B, K_LEN), "int", "few ids")),
    "documents shorter than the keys": mask("documents", Given("ids", (0, 0, 0, 1, 1, 1, 1))),
    "documents longer than the keys": mask("documents", Given("ids", tuple(n // 4 for n in range(30)))),
    "padding": mask("padding", Given("lengths", (4, 11, 0))),
    "padding of a list": mask("padding", [1, 2, 3]),
    "block_sparse": mask("block_sparse", Drawn("blocks", (3, 4), "bool", "half true"), 3),
    "block_sparse for each head": mask(
        "block_sparse", Drawn("blocks", (HEADS, 4, 6), "bool", "half true"), 2
    ),
    "block_sparse of all axes": mask(
        "block_sparse", Drawn("blocks", (B, HEADS, 7, 11), "bool", "half true"), 1
    ),
    "block_sparse that broadcasts": mask(
        "block_sparse", Drawn("blocks", (B, 1, 1, 3), "bool", "half true"), 4
    ),
    "block_sparse of one block": mask("block_sparse", Given("blocks", ((True,),), "bool"), 64),
    "random_blocks(2, 2, 0)": mask("random_blocks", 2, 2, 0),
    "random_blocks(1, 3, 12345678901234)": mask("random_blocks", 1, 3, 12345678901234),
    "random_blocks(3, 1, 2)": mask("random_blocks", 3, 1, 2),
    "random_blocks of none": mask("random_blocks", 0, 2, 1),
    "random_blocks of more than there are": mask("random_blocks", 99, 4, 1),
    "dense": mask("dense", Drawn("dense", (Q_LEN, K_LEN), "bool", "half true")),
    "dense of all axes": mask("dense", Drawn("dense", (B, HEADS, Q_LEN, K_LEN), "bool", "half true")),
    "dense that broadcasts": mask("dense", Drawn("dense", (B, 1, 1, K_LEN), "bool", "half true")),
    "from_function": mask("from_function", Function(makers.by_batch_and_head)),
}

COMBINED: dict[str, Any] = {
    "and": mask("causal") & mask("strided", 3),
    "or": mask("sliding_window", 1) | mask("global_tokens", 2),
    "not": ~mask("sliding_window", 2),
    "not of an array": ~mask("dense", Drawn("dense", (1, HEADS, Q_LEN, K_LEN), "bool", "half true")),
    "nested": (mask("causal") & ~mask("dilated", 1, 2)) | (mask("prefix", 3) & mask("fixed", 2)),
    "big bird": mask("sliding_window", 1, 1) | mask("global_tokens", 1) | mask("random_blocks", 1, 2, 3),
    "documents and causal": mask("documents", Drawn("ids", (B, K_LEN), "int", "few ids")) & mask("causal"),
    "not nothing": ~mask("prefix", 0),
    "nothing": mask("causal") & ~mask("causal"),
}

TABLE = Drawn("table", (HEADS, 7))
SCORES: dict[str, Any] = {
    "alibi of slopes": score("alibi", Drawn("slopes", (HEADS,), how="positive")),
    "alibi of a head count": score("alibi", HEADS),
    "t5_bias(bidirectional)": score("t5_bias", Drawn("table", (32, HEADS)), True, 128),
    "t5_bias(one direction)": score("t5_bias", Drawn("table", (32, HEADS)), False, 128),
    "t5_bias(few buckets)": score("t5_bias", Drawn("table", (8, HEADS)), True, 9),
    "t5_bias(few buckets, one direction)": score("t5_bias", Drawn("table", (6, HEADS)), False, 8),
    "relative_bias": score("relative_bias", TABLE),
    "relative_bias of one entry": score("relative_bias", Drawn("table", (HEADS, 1))),
    "relative_bias wider than the keys": score("relative_bias", Drawn("table", (HEADS, 41))),
    "relative_bias_2d": score("relative_bias_2d", Drawn("table", (HEADS, 5, 3)), 3),
    "relative_keys": score("relative_keys", Same("q"), Drawn("table", (5, 8))),
    "relative_keys with scale": score("relative_keys", Same("q"), Drawn("table", (3, 8)), 0.5),
    "softcap": score("softcap", 0.8),
    "from_function": score("from_function", Function(makers.quadratic)),
    "a sum": score("alibi", HEADS) + score("relative_bias", TABLE),
    "a sum of three": score("alibi", HEADS) + score("relative_bias", TABLE) + score("softcap", 1.0),
    "then": score("relative_bias", TABLE).then(score("softcap", 0.5)),
    "then the other way": score("softcap", 0.5).then(score("relative_bias", TABLE)),
    "a sum, then": (score("alibi", HEADS) + score("from_function", Function(makers.quadratic))).then(
        score("softcap", 2.0)
    ),
}


def cases() -> Iterator[Case]:
    """Each entry at the default offset and at one where positions are negative."""
    sizes: dict[str, Any] = {"batch": (B,), "heads": HEADS, "q_len": Q_LEN, "k_len": K_LEN}
    for offset in (None, -3):
        for name, entry in (MASKS | {f"combined: {name}": entry for name, entry in COMBINED.items()}).items():
            yield call(
                f"masks.{name}, q_offset={offset}", FAMILY, f"masks: {name}", mask=entry, q_offset=offset,
                return_lse=True, **sizes,
            )  # fmt: skip
        for name, entry in SCORES.items():
            yield call(
                f"scores.{name}, q_offset={offset}", FAMILY, f"scores: {name}", score_mod=entry,
                q_offset=offset, return_lse=True, **sizes,
            )  # fmt: skip
    for heads in (1, 3, 6, 12):
        yield call(
            f"scores.alibi of {heads} heads", FAMILY, "slopes of head counts that are no power of two",
            heads=heads, score_mod=score("alibi", heads), return_lse=True,
        )  # fmt: skip
    for bidirectional in (True, False):
        yield call(
            f"scores.t5_bias over a long range, bidirectional={bidirectional}", FAMILY,
            "every bucket edge; (16, 128) has edges at exact powers that float logarithms miss", heads=2,
            q_len=3, k_len=300, dim=2, q_offset=150, return_lse=True,
            score_mod=score("t5_bias", Drawn("table", (32, 2)), bidirectional, 128),
        )  # fmt: skip
    for name in ("sliding_window(3)", "strided(4)", "random_blocks(2, 2, 0)", "dilated(2, 3)"):
        yield call(
            f"masks.{name} over blocks", FAMILY, "masks across key blocks", heads=1, q_len=150, k_len=300,
            dim=2, mask=MASKS[name], return_lse=True,
        )  # fmt: skip
    yield call(
        "scores.relative_keys, grouped heads, no batch", FAMILY, "one table for all heads", heads=4,
        kv_heads=2, score_mod=score("relative_keys", Same("q"), Drawn("table", (7, 8))), return_lse=True,
    )  # fmt: skip
    for layout in ("bhld", "blhd"):
        yield call(
            f"scores.relative_keys, batch, {layout}", FAMILY, "q of relative_keys lies as its layout says",
            batch=(2,), layout=layout, return_lse=True,
            score_mod=score("relative_keys", Same("q"), Drawn("table", (7, 8)), layout=layout),
        )  # fmt: skip
    empties: dict[str, dict[str, Any]] = {
        "no rows": {"q_len": 0},
        "no keys": {"k_len": 0},
        "an empty batch": {"batch": (0,)},
    }
    for name, empty in empties.items():
        yield call(
            f"scores.relative_keys, {name}", FAMILY, "an empty call has an empty result", return_lse=True,
            score_mod=score("relative_keys", Same("q"), Drawn("table", (7, 8))), **empty,
        )  # fmt: skip
    for dtype in ("float16", "bfloat16", "float64"):
        for name in ("relative_keys", "relative_bias", "t5_bias(few buckets)", "alibi of slopes"):
            yield call(
                f"scores.{name}, {dtype}", FAMILY, "tables of every dtype", dtype=dtype,
                score_mod=SCORES[name], return_lse=True, **sizes,
            )  # fmt: skip
