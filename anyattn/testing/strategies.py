"""A hypothesis strategy that draws whole calls: shapes, options, masks, scores, special values.

What it draws is a `Case`, so that a failing call is data that can be put among the cases, and the values
follow from a drawn seed, so that shrinking works on the structure.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hypothesis import strategies as st

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, Plant, Same, call
from anyattn.testing.cases import makers

__all__ = ["calls", "masks", "scores"]

EVERYTHING = frozenset(
    [
        "bias",
        "causal",
        "dropout",
        "grouped_heads",
        "kv_lengths",
        "mask",
        "q_offset",
        "return_lse",
        "score_mod",
        "sinks",
        "softcap",
        "stats",
        "strict_masking",
        "weights",
        "window",
    ]
)
SIZES = st.integers(0, 12) | st.sampled_from([1, 17, 130, 259])
SPECIALS = (float("nan"), float("inf"), float("-inf"))


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    dtypes: Collection[str] = ("float16", "bfloat16", "float32", "float64"),
    capabilities: Collection[str] = EVERYTHING,
) -> Case:
    """Whole calls within what a backend declares.

    Parameters
    ----------
    dtypes, capabilities
        What the calls may use.

    Returns
    -------
    A strategy of `Case`. Every call is one that the contract gives a meaning: with lengths and positions the
    offset is said, special values stand where the oracle follows IEEE, large logits are left to the written
    cases.
    """
    able = frozenset(capabilities)
    operation = draw(st.sampled_from(sorted({"attention"} | (able & {"weights", "stats"}))))
    batch, q_batch, k_batch = draw(st.sampled_from(BATCHES))
    two_axes = not batch and draw(st.integers(0, 7)) == 0
    kv_heads = 1 if two_axes else draw(st.integers(1, 3))
    group = draw(st.integers(1, 3)) if "grouped_heads" in able and not two_axes else 1
    heads, q_len, k_len = kv_heads * group, draw(SIZES), draw(SIZES)
    dim = draw(st.sampled_from([1, 3, 8, 16]))

    def option(name: str, values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | st.none() | values) if name in able else None

    layout = draw(st.sampled_from(["bhld", "blhd"]))
    shapes: list[tuple[int, ...]] = [(q_len, k_len), (1, k_len)]
    if not two_axes:
        ones = (1,) * len(batch)
        shapes += [(*batch, heads, q_len, k_len), (*ones, heads, 1, k_len), (*batch, 1, q_len, 1)]
    shape = st.sampled_from(shapes)
    lengths = option("kv_lengths", _lengths(batch, k_len))
    options: dict[str, Any] = {
        "causal": "causal" in able and draw(st.booleans()),
        "window": option("window", st.tuples(*(st.none() | st.integers(0, 6),) * 2)),
        "mask": option(
            "mask",
            shape.map(lambda s: Drawn("mask", s, "bool", "mostly true")) | masks(q_len, k_len),
        ),
        "bias": option("bias", shape.map(lambda s: Drawn("bias", s))),
        "score_mod": option(
            "score_mod", scores(heads, dim, layout, own_q=q_batch == batch and len(batch) < 2)
        ),
        "softcap": option("softcap", st.sampled_from([0.5, 2.0, 30.0])),
        "sinks": option("sinks", st.just(Drawn("sinks", (heads,)))),
        "scale": draw(st.none() | st.sampled_from([0.25, 1.0, -0.5])),
        "layout": layout,
        "kv_lengths": lengths,
    }
    if "q_offset" in able:
        must = lengths is not None and q_len != 1
        offset = _offsets(batch)
        options["q_offset"] = draw(offset if must else st.none() | offset)
    elif lengths is not None:
        options["kv_lengths"] = None
    if operation == "attention" and "return_lse" in able:
        options["return_lse"] = draw(st.booleans())
    if operation == "attention" and "dropout" in able and draw(st.integers(0, 3)) == 0:
        options["dropout"] = draw(st.sampled_from([0.1, 0.5]))
        options["dropout_seed"] = draw(st.integers(-(2**63), 2**64 - 1))
    if operation == "stats":
        options["stats"] = ("key_mass", "entropy", "max")
    if operation == "weights" and q_len:
        options["rows"] = draw(st.none() | st.lists(st.integers(0, q_len - 1), max_size=3))
    plants: list[Plant] = []
    if options["kv_lengths"] is not None and draw(st.booleans()):
        plants.append(Plant("k", "beyond kv_lengths", draw(st.sampled_from(SPECIALS))))
    if "strict_masking" in able and k_len and draw(st.integers(0, 3)) == 0:
        # A weight of 0 from a score of -inf times NaN in v: the contract leaves open which of the two wins.
        in_v = operation == "attention" and "minus_infinity" not in repr(options["score_mod"])
        array = draw(st.sampled_from(["k", "v"] if in_v else ["k"]))
        plants.append(
            Plant(array, (..., draw(st.integers(0, k_len - 1)), 0), draw(st.sampled_from(SPECIALS)))
        )
    also = {"strict_masking"} if any(plant.at != "beyond kv_lengths" for plant in plants) else frozenset()
    return call(
        f"drawn {draw(st.integers(0, 10**6))}", "drawn", "a whole call drawn by hypothesis", q_batch=q_batch,
        k_batch=k_batch, heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, dim=dim,
        v_dim=draw(st.sampled_from([1, 5, 8])), two_axes=two_axes,
        dtype=draw(st.sampled_from(sorted(dtypes))), operation=operation, plants=tuple(plants), also=also,
        **options,
    )  # fmt: skip


BATCHES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((), (), ()),
    ((2,), (2,), (2,)),
    ((2,), (), (2,)),
    ((2,), (2,), (1,)),
    ((2, 3), (2, 1), (3,)),
    ((0,), (0,), (1,)),
]
"""The call's batch axes, those of q, those of k and v."""


def _lengths(batch: tuple[int, ...], k_len: int) -> st.SearchStrategy[Any]:
    one = st.integers(0, k_len)
    if len(batch) != 1 or batch[0] == 0:
        return one
    each = st.lists(one, min_size=batch[0], max_size=batch[0])
    return one | each | each.map(lambda values: Given("kv_lengths", tuple(values)))


def _offsets(batch: tuple[int, ...]) -> st.SearchStrategy[Any]:
    one = st.integers(-5, 12)
    if len(batch) != 1 or batch[0] == 0:
        return one
    each = st.lists(one, min_size=batch[0], max_size=batch[0])
    return one | each.map(lambda values: Given("q_offset", tuple(values)))


def masks(q_len: int, k_len: int) -> st.SearchStrategy[Any]:
    """Mask expressions: an entry, or entries combined."""
    small = st.integers(1, 5)
    side = st.none() | st.integers(0, 5)

    def entry(name: str, *args: st.SearchStrategy[Any], place: bool = True) -> st.SearchStrategy[Any]:
        keywords = st.sampled_from([{}, {"positions": False}]) if place else st.just({})
        return st.builds(lambda a, k: Entry("masks", name, a, k), st.tuples(*args), keywords)

    blocks = st.builds(
        lambda size: Entry(
            "masks", "block_sparse",
            (Drawn(f"blocks{size}", (-(-q_len // size), -(-k_len // size)), "bool", "mostly true"), size),
        ),
        small,
    )  # fmt: skip
    single = st.one_of(
        entry("causal"),
        entry("sliding_window", side, side),
        entry("dilated", small, small),
        entry("strided", small),
        st.tuples(small, small).map(lambda n: Entry("masks", "fixed", (max(n), min(n)))),
        entry("global_tokens", st.integers(0, 4) | st.lists(st.integers(0, 12), max_size=4)),
        entry("prefix", st.integers(0, 14), place=False),
        entry("documents", st.just(Drawn("ids", (max(k_len, 1),), "int", "few ids"))),
        entry("random_blocks", st.integers(0, 3), small, st.integers(0, 2**64 - 1)),
        st.just(Function(makers.floored_blocks)).map(lambda f: Entry("masks", "from_function", (f,))),
        st.just(Function(makers.by_batch_and_head)).map(lambda f: Entry("masks", "from_function", (f,))),
        blocks,
    )
    return st.recursive(
        single,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            inner.map(lambda a: ~a),
        ),
        max_leaves=4,
    )


def scores(heads: int, dim: int, layout: str = "bhld", *, own_q: bool = True) -> st.SearchStrategy[Any]:
    """An entry, a function, or a sum or chain of two; `own_q` allows `relative_keys`."""
    reach = st.integers(0, 6)
    entries: list[st.SearchStrategy[Any]] = [
        st.just(Entry("scores", "alibi", (heads,))),
        st.just(Entry("scores", "alibi", (Drawn("slopes", (heads,), how="positive"),), {"positions": False})),
        st.builds(
            lambda buckets, both: Entry(
                "scores", "t5_bias", (Drawn(f"buckets{buckets}", (buckets, heads)), both, buckets)
            ),
            st.sampled_from([8, 16]),
            st.booleans(),
        ),
        reach.map(lambda n: Entry("scores", "relative_bias", (Drawn(f"table{n}", (heads, 2 * n + 1)),))),
        st.sampled_from([0.5, 3.0]).map(lambda c: Entry("scores", "softcap", (c,))),
        st.just(Entry("scores", "from_function", (Function(makers.quadratic),))),
        st.just(Entry("scores", "from_function", (Function(makers.halve_far_keys),))),
        st.just(
            Entry("scores", "from_function", (Function(makers.off_the_table, (Drawn("edge", (heads, 4)),)),))
        ),
        st.just(Entry("scores", "from_function", (Function(makers.minus_infinity),))),
    ]
    if own_q:
        entries.append(
            reach.map(
                lambda n: Entry(
                    "scores",
                    "relative_keys",
                    (Same("q"), Drawn(f"keys{n}", (2 * n + 1, dim))),
                    {"layout": layout},
                )
            )
        )
    single = st.one_of(entries)
    return st.one_of(
        single,
        st.builds(lambda a, b: a + b, single, single),
        st.builds(lambda a, b: a.then(b), single, single),
    )
