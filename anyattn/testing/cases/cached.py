"""Decoding against a cache is attention over the tokens that went into it, for every mask and score.

Tokens are appended in pieces. A ring has forgotten what lies between the first tokens and the last ones, and
the mask of its cases hides that from attention over all tokens too. Rows of int8 cases are such that rounding
them changes nothing. `every` are the masks and scores of the whole vocabulary, of which a backend that
compiles makes a kernel each: a family of its own, which runs where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import CACHES, Case, Drawn, call
from anyattn.testing.cases.vocabulary import COMBINED, HEADS, K_LEN, MASKS, Q_LEN, SCORES, B, mask

FAMILY = "caches"
EVERY = "every mask in caches"

# One of each kind: what their arguments mean is held elsewhere.
EVERYWHERE = (
    "causal",
    "sliding_window(3)",
    "dilated(2, 3)",
    "strided(4)",
    "fixed(3, 2)",
    "global_tokens of an array",
    "prefix for each batch entry",
    "documents for each batch entry",
    "padding",
    "from_function",
)
# Arrays along rows and keys, which are refused where keys lie elsewhere.
ALONG_KEYS = ("block_sparse for each head", "random_blocks(2, 2, 0)", "dense of all axes")
JOINED = ("nested", "documents and causal")
SCORED = (
    "alibi of slopes",
    "t5_bias(few buckets)",
    "relative_bias",
    "relative_bias_2d",
    "from_function",
    "then",
)
VOCABULARY: dict[str, dict[str, Any]] = {
    **{f"masks.{name}": {"mask": entry} for name, entry in (MASKS | COMBINED).items()},
    **{f"scores.{name}": {"score_mod": entry} for name, entry in SCORES.items()},
}
# What of it is an array along rows and keys, or along rows, or hangs on the number of keys.
OF_A_BUFFER = ("block_sparse", "dense", "random_blocks", "relative_keys", "not of an array", "big bird")


def every() -> Iterator[Case]:
    """Every mask and score of the vocabulary in every cache that takes it."""
    for kind in CACHES:
        for name, options in VOCABULARY.items():
            if kind == "buffer" or not any(word in name for word in OF_A_BUFFER):
                yield case(f"{kind}: {name}, once more", "every argument there is", kind, EVERY, **options)


def cases() -> Iterator[Case]:
    """Every kind of mask and score in every cache, sequences of unlike lengths, options, dtypes and int8."""
    for kind in CACHES:
        chosen = {name: MASKS[name] for name in EVERYWHERE} | {name: COMBINED[name] for name in JOINED}
        if kind == "buffer":
            chosen |= {name: MASKS[name] for name in ALONG_KEYS}
        for name, entry in chosen.items():
            yield case(f"{kind}: masks.{name}", "the mask counts tokens, wherever they lie", kind, mask=entry)
        for name in SCORED:
            yield case(f"{kind}: scores.{name}", "so does the score", kind, score_mod=SCORES[name])
        for q_len in (1, 2):
            unlike: dict[str, Any] = {
                "kv_lengths": (K_LEN, 4, 0),
                "q_offset": (K_LEN - q_len, 4 - q_len, -q_len),
            }
            yield case(
                f"{kind}: sequences of unlike lengths, {q_len} queries", "each ends where it ends", kind,
                q_len=q_len, causal=True, **unlike,
            )  # fmt: skip
        options: dict[str, Any] = {"causal": True, "window": (5, 0), "softcap": 1.5, "layout": "blhd"}
        options |= {"heads": 6, "kv_heads": 2, "sinks": Drawn("sinks", (6,)), "dim": 16, "v_dim": 32}
        yield case(f"{kind}: options", "each is handed on", kind, **options)
        for dtype in ("float16", "bfloat16", "float64"):
            yield case(f"{kind}: {dtype}", "every dtype", kind, dtype=dtype, causal=True)
        exact: dict[str, Any] = {"recipes": {"k": "int8 rows", "v": "int8 rows"}, "also": {"int8"}}
        yield case(f"{kind}: int8, options", "scales go where keys go", kind, **options, **exact)
        # Each dtype has kernels of its own for int8, which take seconds to compile.
        for dtype in ("float32", "bfloat16", "float64"):
            # With 16 channels and one or all queries kernels for few and for many queries read int8.
            for q_len in (1, 2) if kind == "ring" else (1, K_LEN):
                yield case(
                    f"{kind}: int8, {dtype}, {q_len} queries", "a scale for each token and head", kind,
                    dtype=dtype, q_len=q_len, causal=True, heads=4, kv_heads=2, dim=16, v_dim=16, **exact,
                )  # fmt: skip


def case(name: str, why: str, kind: str, family: str = FAMILY, also: Any = (), **options: Any) -> Case:
    """A call through a cache of a kind; of a ring, one that asks for nothing that it has forgotten."""
    sizes: dict[str, Any] = {"batch": (B,), "heads": HEADS, "q_len": Q_LEN, "k_len": K_LEN}
    needs = {"kv_lengths", "q_offset", *also}
    if kind == "ring":
        sizes["q_len"] = 2
        # Of 6 places, the earlier of two queries has the 4 tokens before its own.
        kept = mask("sliding_window", 4, None) | mask("prefix", 2)
        options["mask"] = options["mask"] & kept if "mask" in options else kept
    if kind != "buffer":
        needs |= {"mask"}
    return call(
        f"caches: {name}", family, why, operation=kind, cuts=(4, 5, 9), also=needs, return_lse=True,
        **sizes | options,
    )  # fmt: skip
