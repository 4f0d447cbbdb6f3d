"""Shapes: sizes that divide nothing, axes of 0 and 1, batch axes that broadcast, heads that are shared."""

from __future__ import annotations

from collections.abc import Iterator

from anyattn.testing.case import Case, Drawn, Entry, Given, call

FAMILY = "shapes"
LONG = "long"


def cases() -> Iterator[Case]:
    """All shape families."""
    yield from _features()
    yield from _lengths()
    yield from _batches()
    yield from _heads()
    yield from _long()


def _features() -> Iterator[Case]:
    for dim in (1, 8, 80, 96, 128, 257):
        for dtype in ("float32", "float16", "bfloat16"):
            yield call(
                f"D = {dim}, {dtype}", FAMILY,
                "head sizes of real models and sizes that no vector width divides", dim=dim, q_len=4,
                k_len=11, causal=True, dtype=dtype,
            )  # fmt: skip
    for dim, v_dim in ((8, 1), (1, 8), (5, 131), (64, 40), (16, 0)):
        yield call(
            f"D = {dim}, Dv = {v_dim}", FAMILY, "values need not be as wide as keys", dim=dim, v_dim=v_dim,
            causal=True, return_lse=True,
        )  # fmt: skip


def _lengths() -> Iterator[Case]:
    for q_len, k_len in ((1, 1), (1, 13), (13, 1), (3, 17), (17, 3), (7, 7), (33, 31), (31, 65)):
        for causal in (False, True):
            yield call(
                f"Lq = {q_len}, Lk = {k_len}, causal = {causal}", FAMILY,
                "the last query sees the last key, whichever is longer", q_len=q_len, k_len=k_len,
                causal=causal, return_lse=True,
            )  # fmt: skip
    for q_len, k_len in ((0, 5), (5, 0), (0, 0)):
        yield call(
            f"Lq = {q_len}, Lk = {k_len}",
            FAMILY,
            "empty axes are axes",
            q_len=q_len,
            k_len=k_len,
            return_lse=True,
        )
        yield call(
            f"Lq = {q_len}, Lk = {k_len}, sinks and bias", FAMILY, "options of empty axes", q_len=q_len,
            k_len=k_len, return_lse=True, sinks=Drawn("sinks", (2,)), bias=Drawn("bias", (q_len, k_len)),
            causal=True,
        )  # fmt: skip
        yield call(
            f"Lq = {q_len}, Lk = {k_len}, a table of distances", FAMILY, "tables of empty axes",
            operation="stats", batch=(2,), q_len=q_len, k_len=k_len, q_offset=Given("q_offset", (0, 3)),
            stats=("key_mass", "entropy", "max"),
            score_mod=Entry("scores", "t5_bias", (Drawn("table", (8, 2)), False, 8)),
        )  # fmt: skip


def _batches() -> Iterator[Case]:
    why = "batch axes broadcast as in matmul"
    broadcasts = {
        "q without batch": ((), (3,), (3,)),
        "k and v without batch": ((3,), (), ()),
        "v alone with batch": ((), (), (3,)),
        "axes of one": ((2, 1), (1, 3), (1, 3)),
        "k and v differ": ((2, 3), (3,), (2, 1)),
        "three axes": ((2, 1, 2), (1, 2), (2, 1, 1, 2)[1:]),
    }
    for name, (q_batch, k_batch, v_batch) in broadcasts.items():
        for layout in ("bhld", "blhd"):
            yield call(
                f"batch: {name}, {layout}", FAMILY, why, q_batch=q_batch, k_batch=k_batch, v_batch=v_batch,
                heads=4, kv_heads=2, layout=layout, return_lse=True, causal=True,
            )  # fmt: skip
    yield call("batch of 0", FAMILY, "an empty batch", batch=(0,), return_lse=True)
    yield call("batch of 2 and 0", FAMILY, "an empty batch", batch=(2, 0), causal=True)
    yield call(
        "batch of 0, many queries", FAMILY, "an empty batch of long sequences", batch=(0,), heads=1,
        q_len=130, dim=1, return_lse=True,
    )  # fmt: skip
    full = (2, 3, 2, 5, 9)
    yield call(
        "batch axes of mask and bias", FAMILY, "mask and bias broadcast to the result's batch axes",
        batch=(2, 3), mask=Drawn("mask", (2, 1, 1, 5, 9), "bool", "mostly true"),
        bias=Drawn("bias", (1, 3, 2, 1, 9)), return_lse=True,
    )  # fmt: skip
    yield call(
        "batch axes of the result from k alone", FAMILY, "the result's batch is not q's", q_batch=(),
        k_batch=(2, 3), bias=Drawn("bias", full), return_lse=True,
    )  # fmt: skip
    yield call(
        "kv_lengths of two batch axes", FAMILY, "lengths broadcast to the batch axes", batch=(2, 3),
        kv_lengths=Given("kv_lengths", ((9,), (4,))), return_lse=True,
    )  # fmt: skip
    yield call(
        "kv_lengths of the last batch axis", FAMILY, "lengths broadcast to the batch axes", q_batch=(2, 1),
        k_batch=(1, 3), kv_lengths=Given("kv_lengths", (9, 1, 4)), q_offset=Given("q_offset", ((2,), (-1,))),
        causal=True, return_lse=True,
    )  # fmt: skip


def _heads() -> Iterator[Case]:
    for heads, kv_heads in ((4, 2), (6, 2), (6, 3), (5, 1), (1, 1), (8, 4)):
        for layout in ("bhld", "blhd"):
            yield call(
                f"{heads} query heads on {kv_heads}, {layout}", FAMILY,
                "query head h reads key/value head h // (Hq // Hkv), not h % Hkv", batch=(2,), heads=heads,
                kv_heads=kv_heads, layout=layout, sinks=Drawn("sinks", (heads,)), return_lse=True,
            )  # fmt: skip
    yield call("no heads", FAMILY, "the head axis may be empty", heads=0, kv_heads=0, return_lse=True)
    for layout in ("bhld", "blhd"):
        yield call(
            f"two axes, {layout}", FAMILY, "no head axis: h is 0, and both layouts are the same",
            two_axes=True, causal=True, layout=layout, return_lse=True,
        )  # fmt: skip
    yield call(
        "two axes with options", FAMILY, "options of a call without head axis", two_axes=True,
        mask=Drawn("mask", (5, 9), "bool", "mostly true"), bias=Drawn("bias", (1, 9)), sinks=[0.5],
        kv_lengths=7, return_lse=True,
    )  # fmt: skip


def _long() -> Iterator[Case]:
    why = "several key blocks of 128 or 256, the last one partial"
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        for q_len, k_len in ((3, 301), (130, 515), (77, 257)):
            yield call(
                f"Lq = {q_len}, Lk = {k_len}, {dtype}", LONG, why, heads=1, q_len=q_len, k_len=k_len, dim=4,
                causal=True, sinks=[0.5], return_lse=True, dtype=dtype,
            )  # fmt: skip
    yield call(
        "a window over many blocks", LONG, "whole key blocks are hidden from a row", heads=1, q_len=290,
        k_len=290, dim=4, window=(5, 0), return_lse=True,
    )  # fmt: skip
    yield call(
        "a row maximum that grows from block to block", LONG, "rescaling of what was summed before", heads=1,
        q_len=4, k_len=700, dim=4, bias=Given("bias", (tuple(j / 10 for j in range(700)),), "float32"),
        return_lse=True,
    )  # fmt: skip
    yield call(
        "a row maximum that falls from block to block", LONG, "later blocks hardly count", heads=1, q_len=4,
        k_len=700, dim=4, bias=Given("bias", (tuple(-j / 10 for j in range(700)),), "float32"),
        return_lse=True,
    )  # fmt: skip
    yield call(
        "lengths inside blocks", LONG, "lengths end inside, at the edge of and before a block", batch=(4,),
        heads=1, q_len=2, k_len=520, dim=4, kv_lengths=Given("kv_lengths", (1, 256, 257, 519)), q_offset=0,
        return_lse=True,
    )  # fmt: skip
    yield call(
        "only the last key block is seen", LONG, "blocks that come before hold nothing", heads=1, q_len=3,
        k_len=600, dim=4, window=(2, 0), return_lse=True,
    )  # fmt: skip
    yield call(
        "long grouped heads, dense mask", LONG, "mask rows are cut into key blocks", heads=4, kv_heads=2,
        q_len=19, k_len=400, dim=8, return_lse=True, mask=Drawn("mask", (4, 19, 400), "bool", "half true"),
    )  # fmt: skip
