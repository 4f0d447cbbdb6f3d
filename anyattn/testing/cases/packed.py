"""Sequences end to end: each computes what it computes alone (`varlen_attention`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, Plant, call
from anyattn.testing.cases import makers

FAMILY = "packed"

# A sequence without queries, one without keys, a step of decoding, one of a single token, more queries than
# keys, and an empty one at the end.
Q_LENGTHS = (5, 0, 3, 1, 1, 7, 0)
K_LENGTHS = (9, 4, 0, 6, 1, 2, 0)
NAN = float("nan")


def cases() -> Iterator[Case]:
    """Each option that counts within a sequence, dtypes, tiles of several sequences or of a part of one."""
    yield case("nothing else", "keys of other sequences are not seen")
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        yield case(
            f"causal, {dtype}", "positions begin anew, rows before the first key see nothing", dtype=dtype,
            causal=True, heads=4, kv_heads=2, v_dim=6,
        )  # fmt: skip
    yield case(
        "everything", "each counts within its sequence", heads=4, kv_heads=2, causal=True, window=(3, 0),
        softcap=2.0, sinks=Drawn("sinks", (4,)), scale=0.7, dropout=0.3, dropout_seed=5,
        score_mod=Entry("scores", "alibi", (4,)),
    )  # fmt: skip
    yield case(
        "masks of each sequence", "b is the number of the sequence",
        mask=Entry("masks", "prefix", (Given("n", (2, 1, 0, 1, 0, 1, 3)),)) | Entry("masks", "causal"),
    )  # fmt: skip
    yield case(
        "functions of every index", "b, h, i and j within a sequence",
        mask=Function(makers.by_batch_and_head),
        score_mod=Entry("scores", "relative_bias", (Drawn("table", (2, 7)),)),
    )  # fmt: skip
    yield case(
        "nan in sequences beside", "a sequence spoils no other, and one without queries nothing",
        causal=True, also={"strict_masking"},
        plants=(Plant("k", (0, 10, 1), NAN), Plant("v", (1, 11, 2), NAN), Plant("k", (1, 19, 0), NAN)),
    )  # fmt: skip
    yield case(
        "several tiles", "sequences longer than a tile, and tiles of many sequences", (70, *(3,) * 30, 1),
        (133, *(5,) * 30, 40), causal=True, heads=2, kv_heads=1, dim=3,
    )  # fmt: skip
    yield case("no tokens", "sequences of nothing", (0, 0), (0, 0), causal=True)


def case(
    name: str, why: str, q_lengths: tuple[int, ...] = Q_LENGTHS, k_lengths: tuple[int, ...] = K_LENGTHS,
    **options: Any,
) -> Case:  # fmt: skip
    """A call of sequences with so many queries and keys."""
    starts: dict[str, Any] = {
        f"cu_seqlens_{name}": Given(f"cu_seqlens_{name}", (0, *accumulate(lengths)), "int32")
        for name, lengths in (("q", q_lengths), ("k", k_lengths))
    }
    return call(
        f"packed: {name}", FAMILY, why, operation="packed", q_len=sum(q_lengths), k_len=sum(k_lengths),
        layout="blhd", return_lse=True, **starts, **options,
    )  # fmt: skip
