"""Where a row stands: `q_offset`, its defaults, lengths, and what is counted by position or by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, call
from anyattn.testing.cases import makers

FAMILY = "positions"

BY_POSITION: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "mask": {"mask": Entry("masks", "sliding_window", (2, 2))},
    "score_mod": {"score_mod": Entry("scores", "alibi", (2,))},
    "function": {"score_mod": Function(makers.floored_score)},
}


def cases() -> Iterator[Case]:
    """Offsets as numbers and arrays, with and without lengths, for everything that hangs on i."""
    for name, options in BY_POSITION.items():
        for q_len, k_len in ((4, 9), (9, 4)):
            yield call(
                f"default offset, {name}, Lq = {q_len}", FAMILY, "the default is Lk - Lq, negative or not",
                q_len=q_len, k_len=k_len, return_lse=True, **options,
            )  # fmt: skip
        for offset in (0, 2, -3, 50):
            yield call(
                f"q_offset = {offset}, {name}", FAMILY, "row r stands at r + q_offset", q_offset=offset,
                return_lse=True, **options,
            )  # fmt: skip
        yield call(
            f"q_offset for each batch entry, {name}", FAMILY, "an array of offsets", batch=(3,),
            q_offset=Given("q_offset", (0, 4, -2)), return_lse=True, **options,
        )  # fmt: skip
        yield call(
            f"right-padded sequences, {name}", FAMILY, "q_offset = 0 with kv_lengths", batch=(3,),
            kv_lengths=Given("kv_lengths", (9, 4, 2)), q_offset=0, return_lse=True, **options,
        )  # fmt: skip
        yield call(
            f"a cache, {name}", FAMILY, "q_offset = kv_lengths - Lq", batch=(3,), q_len=2,
            kv_lengths=Given("kv_lengths", (9, 4, 2)), q_offset=Given("q_offset", (7, 2, 0)), return_lse=True,
            **options,
        )  # fmt: skip
        yield call(
            f"one query of a cache, {name}", FAMILY, "with lengths and one row the default is kv_lengths - 1",
            batch=(3,), q_len=1, kv_lengths=Given("kv_lengths", (9, 4, 1)), return_lse=True, **options,
        )  # fmt: skip
        yield call(
            f"one query without lengths, {name}", FAMILY, "the default of one row is Lk - 1", batch=(3,),
            q_len=1, return_lse=True, **options,
        )  # fmt: skip
    yield call(
        "lengths without positions", FAMILY, "nothing hangs on i, so no offset has to be said", batch=(2,),
        kv_lengths=[5, 9], mask=Drawn("mask", (5, 9), "bool", "mostly true"), bias=Drawn("bias", (5, 9)),
        return_lse=True,
    )  # fmt: skip
    yield call(
        "an offset that nothing needs", FAMILY, "is allowed and changes nothing", q_offset=3, return_lse=True
    )
    yield call(
        "kv_lengths of every key", FAMILY, "lengths equal to Lk hide nothing", batch=(2,), kv_lengths=[9, 9],
        return_lse=True,
    )  # fmt: skip
    for dtype in ("int32", "int64"):
        yield call(
            f"lengths and offsets of {dtype}", FAMILY, "any integer dtype", batch=(2,), causal=True,
            kv_lengths=Given("kv_lengths", (9, 4), dtype), q_offset=Given("q_offset", (1, 3), dtype),
            return_lse=True,
        )  # fmt: skip
    for mask, arguments in {
        "causal": (), "sliding_window": (2,), "dilated": (2, 2), "strided": (3,), "global_tokens": (2,),
        "documents": (Given("ids", (0, 0, 1, 1, 1, 2, 2, 3, 3)),), "random_blocks": (2, 2, 7),
    }.items():  # fmt: skip
        yield call(
            f"positions=False: {mask}", FAMILY, "the row number in place of the position", q_offset=3,
            mask=Entry("masks", mask, arguments, {"positions": False}), return_lse=True,
        )  # fmt: skip
    for score, arguments in {
        "alibi": (2,),
        "t5_bias": (Drawn("table", (8, 2)), True, 6),
        "relative_bias": (Drawn("table", (2, 5)),),
    }.items():
        yield call(
            f"positions=False: {score}", FAMILY, "the row number in place of the position", q_offset=3,
            score_mod=Entry("scores", score, arguments, {"positions": False}), return_lse=True,
        )  # fmt: skip
    by_row = Entry("masks", "dense", (Drawn("dense", (5, 9), "bool", "half true"),)) | Entry(
        "masks", "block_sparse", (Drawn("blocks", (3, 5), "bool", "half true"), 2)
    )
    yield call(
        "arrays are indexed by row", FAMILY, "mask, bias, dense and block_sparse do not move with q_offset",
        q_offset=4, mask=by_row, bias=Drawn("bias", (5, 9)), return_lse=True,
    )  # fmt: skip
