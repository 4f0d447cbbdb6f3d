"""Plans: the second call of a kind gives what a description of it would have given, from its own arrays."""

from __future__ import annotations

import array
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest

import anyattn as aa
from anyattn import dispatch, plan, registry
from anyattn.arrays import to_host
from anyattn.backend import CAPABILITIES, Backend
from anyattn.expr.nodes import Aligned, Load, load, rewrite
from anyattn.masks import causal, documents, prefix, random_blocks, sliding_window
from anyattn.reference import backend as reference
from anyattn.scores import alibi, relative_bias, t5_bias

HEADS, Q_LEN, K_LEN, DIM = 2, 5, 7, 4


class Planner(Backend):
    """Runs on `reference`, with the arrays of a later call in the places of those of the first."""

    name = "planner"
    arrays = ("*",)
    devices = ("*",)
    capabilities = frozenset(CAPABILITIES)
    prepared = 0
    ran = 0

    def run(self, call):
        return reference.run(call)

    def prepare(self, call):
        self.prepared += 1
        return self.serve(call)

    def serve(self, call):
        first = call.others

        def run(q, k, v, *others):
            self.ran += 1
            assert len(others) == len(first)
            new = {id(old): x for old, x in zip(first, others, strict=True)}

            def change(node):
                if isinstance(node, Load) and id(node.table.value) in new:
                    return load(replace(node.table, value=new[id(node.table.value)]), node.indices)
                if isinstance(node, Aligned) and id(node.value) in new:
                    return replace(node, value=new[id(node.value)])
                return node

            changed = {"q": q, "k": k, "v": v}
            for part in ("visible", "score"):
                root = getattr(call, part)
                changed[part] = None if root is None else rewrite(root, change)
            for part in ("kv_lengths", "offset", "sinks"):
                changed[part] = new.get(id(getattr(call, part)), getattr(call, part))
            for part, host in (("kv_lengths", "lengths_host"), ("offset", "offset_host")):
                if id(getattr(call, part)) in new:
                    changed[host] = np.asarray(changed[part])
            return reference.run(replace(call, **changed))

        return run


@pytest.fixture
def planner(install):
    backend = Planner()
    install(backend)
    with aa.use(backend="planner"):
        yield backend


def tensors(rng, batch=(3,), heads=HEADS, kv_heads=None, q_len=Q_LEN, k_len=K_LEN, dim=DIM):
    kv = heads if kv_heads is None else kv_heads
    shapes = (*batch, heads, q_len, dim), (*batch, kv, k_len, dim), (*batch, kv, k_len, dim + 1)
    return tuple(rng.standard_normal(shape).astype("f4") for shape in shapes)


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("f4")


def scaled(factor):
    return lambda s, b, h, i, j: s * factor


def times(table):
    return lambda s, b, h, i, j: s * table[h] + (i - j)


# What a call may give, made anew for each call of a test.
SAME_KIND = {
    "plain": lambda rng: {},
    "causal": lambda rng: {"causal": True},
    "lse": lambda rng: {"return_lse": True, "causal": True},
    "numbers": lambda rng: {"window": (2, None), "scale": 0.5, "softcap": 3, "q_offset": 1},
    "numpy-number": lambda rng: {"scale": np.float64(0.25)},
    "expression": lambda rng: {"mask": causal() & sliding_window(3) | prefix(2)},
    "drawn": lambda rng: {"mask": random_blocks(1, 2, 7) | aa.masks.global_tokens([0, 3])},
    "mask": lambda rng: {"mask": rng.random((Q_LEN, K_LEN)) < 0.6},
    "bias": lambda rng: {"bias": floats(rng, 1, HEADS, 1, K_LEN)},
    "sinks": lambda rng: {"sinks": floats(rng, HEADS).astype("f8"), "return_lse": True},
    "lengths": lambda rng: {"kv_lengths": rng.integers(0, K_LEN + 1, 3)},
    "lengths-int32": lambda rng: {"kv_lengths": rng.integers(0, K_LEN + 1, 3).astype("i4")},
    "lists": lambda rng: {
        "kv_lengths": [3, 7, 0],
        "q_offset": (0, 1, -1),
        "sinks": [0.5, -1],
        "mask": random_blocks(2, 2, 7),
    },
    "one-length": lambda rng: {"kv_lengths": np.array(rng.integers(1, K_LEN))},
    "length": lambda rng: {"kv_lengths": 4, "q_offset": 2, "causal": True},
    "offsets": lambda rng: {"q_offset": rng.integers(-3, K_LEN, 3), "causal": True},
    "both": lambda rng: {
        "kv_lengths": rng.integers(0, 8, 3),
        "q_offset": rng.integers(0, 3, 3),
        "window": (1, 1),
    },
    "paper-alibi": lambda rng: {"score_mod": alibi(HEADS), "causal": True},
    "alibi": lambda rng: {"score_mod": alibi(floats(rng, HEADS)), "bias": floats(rng, Q_LEN, K_LEN)},
    "two-tables": lambda rng: {
        "score_mod": t5_bias(floats(rng, 4, HEADS), True, 5) + relative_bias(floats(rng, HEADS, 5)),
        "mask": aa.masks.dense(rng.random((Q_LEN, K_LEN)) < 0.6),
        "bias": floats(rng, HEADS, Q_LEN, K_LEN)[None],
        "sinks": floats(rng, HEADS),
        "kv_lengths": rng.integers(1, K_LEN + 1, 3),
        "q_offset": rng.integers(0, 3, 3),
    },
    "function": lambda rng: {"score_mod": times(floats(rng, HEADS)), "mask": lambda b, h, i, j: j <= i},
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME_KIND)
def test_the_second_call_runs_by_the_plan_of_the_first(planner, kind):
    rng = np.random.default_rng(5)
    for n in range(3):
        q, k, v = tensors(rng)
        options = SAME_KIND[kind](rng)
        found = aa.attention(q, k, v, **options)
        wanted = aa.attention(q, k, v, backend="reference", **options)
        for x, y in zip(found, wanted, strict=True) if options.get("return_lse") else [(found, wanted)]:
            np.testing.assert_array_equal(x, y)
        assert (planner.prepared, planner.ran) == (1, n + 1)


class Growing(Planner):
    """Makes what serves other numbers of keys of what it has; `sizes` are those that it was asked for."""

    def __init__(self):
        self.sizes = []

    def serve(self, call):
        def resized(k, v):
            self.sizes.append(k.shape[-2])
            assert k.shape[-2] == v.shape[-2]
            changed = {"k": k, "v": v}
            if isinstance(call.offset, int):
                changed |= dict.fromkeys(("offset", "offset_host"), k.shape[-2] - call.q_len)
            return self.serve(replace(call, **changed))

        run = super().serve(call)
        run.resized = resized
        return run


@pytest.fixture
def growing(install, monkeypatch):
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_families", {})
    backend = Growing()
    install(backend)
    with aa.use(backend="planner"):
        yield backend


ANY_LENGTH = {
    "plain": lambda rng: {},
    "causal": lambda rng: {"causal": True, "return_lse": True},
    "window": lambda rng: {"window": (2, 0), "sinks": floats(rng, HEADS)},
    "lengths": lambda rng: {"kv_lengths": rng.integers(0, 5, 3), "q_offset": np.arange(3), "window": (1, 0)},
    "expression": lambda rng: {"mask": sliding_window(2) | prefix(1), "score_mod": alibi(floats(rng, HEADS))},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("kind", ANY_LENGTH)
def test_another_number_of_keys_needs_no_description(growing, kind, layout):
    rng = np.random.default_rng(30)
    for n, k_len in enumerate((6, 7, 7, 9, 5), 1):
        q, k, v = tensors(rng, q_len=2, k_len=k_len)
        if layout == "blhd":
            q, k, v = (np.ascontiguousarray(x.swapaxes(-3, -2)) for x in (q, k, v))
        options = ANY_LENGTH[kind](rng) | {"layout": layout}
        found = aa.attention(q, k, v, **options)
        wanted = aa.attention(q, k, v, backend="reference", **options)
        for x, y in zip(found, wanted, strict=True) if options.get("return_lse") else [(found, wanted)]:
            np.testing.assert_array_equal(x, y)
        assert (growing.prepared, growing.ran) == (1, n)
    assert growing.sizes == [7, 9, 5]
    # The first plan, the last of the others, and the one of `reference`, which prepares nothing.
    assert len(plan._plans) == 2


def test_one_head_of_two_axes_may_have_other_numbers_of_keys(growing):
    rng = np.random.default_rng(31)
    for k_len in (4, 5):
        q, k, v = (floats(rng, length, DIM) for length in (2, k_len, k_len))
        found = aa.attention(q, k, v, causal=True)
        np.testing.assert_array_equal(found, aa.attention(q, k, v, causal=True, backend="reference"))
    assert growing.sizes == [5]


NOT_ANY_LENGTH = {
    "bias": lambda rng, n: {"bias": floats(rng, 1, n)},
    "mask": lambda rng, n: {"mask": rng.random((2, n)) < 0.7},
    "list": lambda rng, n: {"kv_lengths": [1, 2, 3]},
    "offset": lambda rng, n: {"q_offset": 3, "causal": True},
    "drawn": lambda rng, n: {"mask": random_blocks(1, 2, 7)},
    "wide": lambda rng, n: {"mask": aa.masks.from_function(lambda b, h, i, j: j * 2**40 >= i)},
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_ANY_LENGTH)
def test_what_hangs_on_the_number_of_keys_is_described(growing, kind):
    rng = np.random.default_rng(32)
    for k_len in (6, 7):
        q, k, v = tensors(rng, q_len=2, k_len=k_len)
        options = NOT_ANY_LENGTH[kind](rng, k_len)
        np.testing.assert_array_equal(
            aa.attention(q, k, v, **options), aa.attention(q, k, v, backend="reference", **options)
        )
    assert growing.sizes == []


def test_another_number_of_keys_is_checked(growing):
    q, k, v = tensors(np.random.default_rng(33))
    lengths = np.array([1, 2, 3])
    aa.attention(q, k, v, kv_lengths=lengths)
    lengths[0] = 6
    aa.attention(q, k[..., :6, :], v[..., :6, :], kv_lengths=lengths)
    with pytest.raises(ValueError, match="kv_lengths: wanted lengths between 0 and the 5 keys"):
        aa.attention(q, k[..., :5, :], v[..., :5, :], kv_lengths=lengths)
    with pytest.raises(ValueError, match="v: wanted length 5 like k"):
        aa.attention(q, k[..., :5, :], v)
    with pytest.raises(ValueError, match="k: wanted axes"):
        aa.attention(q, k[0, 0, 0], v, layout="blhd")
    assert growing.sizes == [6, 5]


def test_a_backend_that_comes_first_is_asked_about_another_number_of_keys(install):
    class Short(Planner):
        name = "short"

        def unsupported(self, call):
            return () if call.k_len < 7 else ("takes 6 keys at most",)

    install(Growing(), Short())
    q, k, v = tensors(np.random.default_rng(34))
    with aa.use(order=("short", "planner")), dispatch.recording() as records:
        aa.attention(q, k, v)
        aa.attention(q, k[..., :6, :], v[..., :6, :])
    assert [r.backend for r in records] == ["planner", "short"]


def test_lengths_of_a_decoding_step_set_its_offsets(planner):
    rng = np.random.default_rng(6)
    for lengths in ([1, 4, 7], [7, 2, 5]):
        q, k, v = tensors(rng, q_len=1)
        options = {"kv_lengths": np.array(lengths), "window": (1, 0)}
        np.testing.assert_array_equal(
            aa.attention(q, k, v, **options), aa.attention(q, k, v, backend="reference", **options)
        )
    assert (planner.prepared, planner.ran) == (1, 2)


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 4), (7, 4), (7, 3)],
        [(4, 5, 4), (2, 7, 4), (2, 7, 3)],
        [(2, 1, 4, 5, 4), (3, 2, 7, 4), (1, 1, 2, 7, 3)],
        [(1, 2, 0, 4), (1, 2, 7, 4), (1, 2, 7, 4)],
        [(1, 2, 5, 4), (1, 2, 0, 4), (1, 2, 0, 4)],
    ],
)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_results_come_in_the_layout_of_the_call(planner, shapes, layout):
    rng = np.random.default_rng(7)
    for n in range(2):
        q, k, v = (floats(rng, *shape) for shape in shapes)
        if layout == "blhd" and q.ndim > 2:
            q, k, v = (np.moveaxis(x, -3, -2) for x in (q, k, v))
        options = {"layout": layout, "causal": True, "return_lse": True}
        found = aa.attention(q, k, v, **options)
        wanted = aa.attention(q, k, v, backend="reference", **options)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, y)
        assert planner.ran == n + 1


def test_arrays_that_change_in_place_are_read_again(planner):
    rng = np.random.default_rng(8)
    q, k, v = tensors(rng)
    slopes, bias, seen = floats(rng, HEADS), floats(rng, Q_LEN, K_LEN), np.ones((Q_LEN, K_LEN), bool)
    lengths, ids = np.array([3, 7, 0]), np.array([0, 0, 1, 1, 1, 2, 2])
    held = causal() & documents(ids) & seen
    options = {"mask": held, "score_mod": alibi(slopes), "bias": bias, "kv_lengths": lengths, "q_offset": 0}
    for change in (q, k, v, slopes, bias, lengths, ids, seen):
        before = aa.attention(q, k, v, **options)
        if change.dtype == bool:
            change[:] = False
        elif change.dtype == int:
            change[:] = np.roll(change, 1)
        else:
            change *= -2
        after = aa.attention(q, k, v, **options)
        assert not np.array_equal(before, after)
        np.testing.assert_array_equal(after, aa.attention(q, k, v, backend="reference", **options))
    # Integers in expressions belong to the signature.
    assert planner.prepared == 2


def test_integers_of_an_expression_are_those_of_the_call(planner):
    """A plan of the same integers must not read them in the array of the call that it was made for."""
    q, k, v = tensors(np.random.default_rng(28))
    ids = np.array([0, 0, 1, 1, 1, 2, 2])
    same = ids.copy()
    wanted = aa.attention(q, k, v, mask=documents(ids))
    ids[:] = 0
    assert not np.array_equal(aa.attention(q, k, v, mask=documents(ids)), wanted)
    np.testing.assert_array_equal(aa.attention(q, k, v, mask=documents(same)), wanted)
    assert (planner.prepared, planner.ran) == (2, 3)


def test_numbers_of_an_expression_do_not_change(planner):
    q, k, v = tensors(np.random.default_rng(29))
    slopes = array.array("d", [0.5, 0.25])
    held = alibi(slopes)
    wanted = aa.attention(q, k, v, score_mod=held)
    slopes[0] = 9.0
    np.testing.assert_array_equal(aa.attention(q, k, v, score_mod=held), wanted)
    np.testing.assert_array_equal(aa.attention(q, k, v, score_mod=held, backend="reference"), wanted)


def test_a_change_of_shape_or_dtype_in_place_is_seen(planner):
    rng = np.random.default_rng(9)
    q, k, v = tensors(rng, batch=())
    table = floats(rng, HEADS)
    held = alibi(table)
    aa.attention(q, k, v, score_mod=held)
    table.resize(1, HEADS, refcheck=False)
    with pytest.raises(ValueError, match="slopes"):
        aa.attention(q, k, v, score_mod=held)
    table.resize(HEADS, refcheck=False)
    q.resize(HEADS, DIM, Q_LEN, refcheck=False)
    with pytest.raises(ValueError, match="features"):
        aa.attention(q, k, v, score_mod=held)


def test_one_array_twice_is_not_two_arrays(planner):
    rng = np.random.default_rng(10)
    q, k, v = tensors(rng)
    one, two = floats(rng, HEADS), floats(rng, HEADS)
    for first, second in ((one, one), (one, two), (two, one), (two, two)):
        options = {"score_mod": alibi(first) + alibi(second)}
        np.testing.assert_array_equal(
            aa.attention(q, k, v, **options), aa.attention(q, k, v, backend="reference", **options)
        )
    assert planner.prepared == 2


def test_values_that_do_not_pass_are_refused_in_a_planned_call(planner):
    q, k, v = tensors(np.random.default_rng(11))
    lengths, offsets = np.array([1, 2, 3]), np.array([0, 1, 2])
    for n in range(2):
        aa.attention(q, k, v, kv_lengths=lengths, q_offset=offsets, causal=True)
        assert planner.ran == n + 1
    for wrong in (-1, K_LEN + 1):
        lengths[1] = wrong
        with pytest.raises(ValueError, match="kv_lengths: wanted lengths between 0 and the 7 keys"):
            aa.attention(q, k, v, kv_lengths=lengths, q_offset=offsets, causal=True)
    lengths[1] = 2
    offsets[0] = 2**63 - 1
    with pytest.raises(ValueError, match="q_offset: wanted integers that fit"):
        aa.attention(q, k, v, kv_lengths=lengths, q_offset=offsets, causal=True)
    assert planner.ran == 2


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("offset", [list, np.array], ids=["list", "array"])
@pytest.mark.parametrize("length", [list, np.array], ids=["list", "array"])
def test_lengths_and_offsets_are_lists_or_arrays(planner, length, offset, q_len):
    rng = np.random.default_rng(35)
    for shift in (0, 1):
        q, k, v = tensors(rng, q_len=q_len)
        options = {"kv_lengths": length([6, 3, 7]), "q_offset": offset([shift, 2, 4]), "causal": True}
        np.testing.assert_array_equal(
            aa.attention(q, k, v, **options), aa.attention(q, k, v, backend="reference", **options)
        )
    assert (planner.prepared, planner.ran) == (1 + (offset is list), 2)


def test_an_offset_far_away_is_described(planner):
    q, k, v = tensors(np.random.default_rng(12))
    for offset in (0, 10**6, -(10**6)):
        options = {"q_offset": np.full(3, offset), "window": (2, 2)}
        np.testing.assert_array_equal(
            aa.attention(q, k, v, **options), aa.attention(q, k, v, backend="reference", **options)
        )
    assert (planner.prepared, planner.ran) == (3, 1)


# Pairs of calls that differ in what decides the result; the second must not find the plan of the first.
DIFFERENT = {
    "scale": ({"scale": 0.5}, {"scale": 0.25}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.5}),
    "causal": ({"causal": True}, {"causal": False}),
    "window": ({"window": (1, 0)}, {"window": (0, 1)}),
    "offset": ({"causal": True, "q_offset": 0}, {"causal": True, "q_offset": 1}),
    "length": ({"kv_lengths": 3}, {"kv_lengths": 4}),
    "constant": ({"mask": sliding_window(1)}, {"mask": sliding_window(2)}),
    "sinks": ({"sinks": [0.0, 1.0]}, {"sinks": [0.0, 2.0]}),
    "offsets": ({"q_offset": [0, 1, 2], "causal": True}, {"q_offset": [2, 1, 0], "causal": True}),
    "operator": ({"mask": causal() & prefix(2)}, {"mask": causal() | prefix(2)}),
    "operands": (
        {"score_mod": lambda s, b, h, i, j: s * (i - j)},
        {"score_mod": lambda s, b, h, i, j: s * (j - i)},
    ),
    "shared": (
        {"score_mod": lambda s, b, h, i, j: s + (i - j) * (i + j) - (i - j)},
        {"score_mod": lambda s, b, h, i, j: s + (i - j) * (i + j) - (i + j)},
    ),
    "captured-number": ({"score_mod": scaled(2)}, {"score_mod": scaled(3)}),
    "table": ({"score_mod": alibi([0.5, 0.25])}, {"score_mod": alibi([0.5, 0.125])}),
    "captured": ({"score_mod": times([0.5, 0.25])}, {"score_mod": times([0.5, 0.125])}),
    "tokens": ({"mask": aa.masks.global_tokens([1])}, {"mask": aa.masks.global_tokens([2])}),
    "drawn": ({"mask": random_blocks(1, 2, 7)}, {"mask": random_blocks(1, 2, 8)}),
    "rows": ({"mask": causal(positions=False)}, {"mask": causal()}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_calls_that_differ_have_plans_of_their_own(planner, kind):
    q, k, v = tensors(np.random.default_rng(13))
    found = [aa.attention(q, k, v, **options) for options in DIFFERENT[kind]]
    for x, options in zip(found, DIFFERENT[kind], strict=True):
        np.testing.assert_array_equal(x, aa.attention(q, k, v, backend="reference", **options))
    assert not np.array_equal(*found, equal_nan=True)
    assert planner.ran == planner.prepared == 2


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"return_lse": False}, {"return_lse": 0}),
        ({"window": (1, 0)}, {"window": (True, 0)}),
        ({"window": (1, 0)}, {"window": (1.0, 0)}),
        ({"softcap": 1}, {"softcap": True}),
        ({"q_offset": 1}, {"q_offset": 1.0}),
        ({"kv_lengths": [1, 2, 3]}, {"kv_lengths": [True, 2, 3]}),
        ({"kv_lengths": [1, 2, 3]}, {"kv_lengths": [1.0, 2, 3]}),
        ({"kv_lengths": 1}, {"kv_lengths": True}),
        ({"dropout": 0.0}, {"dropout": "0.0"}),
        ({"dropout_seed": 1}, {"dropout_seed": 1.0}),
    ],
)
def test_a_plan_does_not_make_a_wrong_type_right(planner, right, wrong):
    q, k, v = tensors(np.random.default_rng(14))
    aa.attention(q, k, v, **right)
    with pytest.raises(TypeError, match=next(iter(wrong))):
        aa.attention(q, k, v, **wrong)


def test_arrays_of_another_kind_have_plans_of_their_own(planner):
    rng = np.random.default_rng(15)
    q, k, v = tensors(rng)
    unaligned = np.frombuffer(b"\0" + q.tobytes(), "u1")[1:].view("f4").reshape(q.shape)
    others = [
        (q, k, v),
        (q[::-1], k, v),
        (q, k[:, ::-1], v),
        (q, k, v[..., :3]),
        (q[:1], k, v),
        (unaligned, k, v),
        tuple(x.astype("f8") for x in (q, k, v)),
    ]
    for n, call in enumerate(others):
        np.testing.assert_array_equal(aa.attention(*call), aa.attention(*call, backend="reference"))
        assert planner.prepared == n + 1
    with pytest.raises(TypeError, match="q: wanted dtype"):
        aa.attention(*(x.view("i4") for x in (q, k, v)))
    with pytest.raises(ValueError, match="k: wanted 4 features"):
        aa.attention(q, k[..., :3], v)


def test_settings_and_backends_are_part_of_the_signature(install, monkeypatch):
    one, two = Planner(), Planner()
    two.name = "numba"
    install(one, two)
    q, k, v = tensors(np.random.default_rng(16))

    def ran(**options):
        with dispatch.recording() as records:
            aa.attention(q, k, v, **options)
        [record] = records
        assert record.operation == "attention"
        return record.backend

    for _ in range(2):
        monkeypatch.delenv("ANYATTN_BACKEND", raising=False)
        assert ran() == "numba"
        assert ran(backend="planner") == "planner"
        assert ran(backend="reference") == "reference"
        with aa.use(backend="planner"):
            assert ran() == "planner"
        with aa.use(order=["planner", "numba"]):
            assert ran() == "planner"
        two.capabilities -= {"strict_masking"}
        with aa.use(strict=True):
            assert ran(causal=True) == "reference"
        two.capabilities |= {"strict_masking"}
        with aa.use(threads=2):
            assert ran() == "numba"
        monkeypatch.setenv("ANYATTN_BACKEND", "planner")
        assert ran() == "planner"
    assert (one.prepared, two.prepared) == (4, 2)
    monkeypatch.setenv("ANYATTN_BACKEND", "nobody")
    with pytest.raises(aa.errors.UnknownBackendError):
        aa.attention(q, k, v)


def test_negative_zero_is_another_number(planner):
    q, k, v = tensors(np.random.default_rng(17))
    for scale in (0.0, -0.0, 0.0):
        aa.attention(q, k, v, scale=scale)
    assert (planner.prepared, planner.ran) == (2, 3)


def test_plans_go_with_the_backends_that_were_discovered(planner, install):
    q, k, v = tensors(np.random.default_rng(17))
    aa.attention(q, k, v)
    other = Planner()
    install(other)
    aa.attention(q, k, v)
    assert (planner.ran, other.ran) == (1, 1)


def test_a_refresh_begins_another_generation():
    before = registry.generation()
    registry.refresh()
    assert registry.generation() is not before


def test_what_has_no_signature_is_described(planner):
    class Named(np.ndarray):
        pass

    rng = np.random.default_rng(18)
    q, k, v = tensors(rng)
    ids = np.zeros(600, int)  # more bytes than are compared
    described = [
        ((q.view(Named), k, v), {}),
        ((q, k, v), {"q_offset": np.array(1), "causal": True}),
        ((q[..., :1, :], k, v), {"kv_lengths": np.array(3), "causal": True}),
        ((q, k, v), {"mask": documents(ids)}),
        ((q, k, v), {"score_mod": aa.scores.relative_keys(q, floats(rng, 5, DIM))}),
        ((q, k, v), {"mask": random_blocks(1, 2, 7), "q_offset": np.array([0, 1, 2])}),
        ((q, k, v), {"mask": aa.masks.global_tokens(np.array([1, 2]))}),
        ((q, k, v), {"mask": lambda b, h, i, j: i * 2**60 >= j, "q_offset": np.array([-3, -3, -3])}),
        ((q[:, :0], k[:, :0], v[:, :0]), {}),
        ((q, k, v), {"kv_lengths": [np.int64(3), 4, 5]}),
    ]
    for call, options in described:
        for _ in range(2):
            found = aa.attention(*call, **options)
            np.testing.assert_array_equal(found, aa.attention(*call, backend="reference", **options))
        assert planner.ran == 0, options


def test_no_offset_is_planned_where_one_would_be_refused(planner):
    """The check of integers that a description makes holds for all offsets that a plan takes."""
    q, k, v = tensors(np.random.default_rng(19))
    options = {"mask": aa.masks.from_function(lambda b, h, i, j: i * 2**60 >= j)}
    aa.attention(q, k, v, q_offset=np.array([-4, -4, -4]), **options)
    with pytest.raises(ValueError, match="wanted integers"):
        aa.attention(q, k, v, q_offset=np.array([-4, 6, -4]), **options)


def test_a_backend_without_prepare_runs_each_call(install):
    class Duck:
        name, arrays, dtypes, devices = "duck", ("*",), frozenset({"float32"}), ("*",)
        capabilities, requires, extra = frozenset(CAPABILITIES), (), None

        def unsupported(self, call):
            return ()

        def notes(self, call):
            return ()

        def run(self, call):
            return reference.run(call)

    install(Duck())
    q, k, v = tensors(np.random.default_rng(20))
    for _ in range(2):
        found = aa.attention(q, k, v, causal=True, backend="duck")
        np.testing.assert_array_equal(found, aa.attention(q, k, v, causal=True, backend="reference"))


def test_a_prepared_function_gives_a_pair(planner):
    planner.prepare = lambda call: lambda q, k, v: q
    with pytest.raises(TypeError, match=r"backend 'planner' gave ndarray; wanted a pair \(out, lse\)"):
        aa.attention(*tensors(np.random.default_rng(21)))


def test_every_planned_call_is_recorded(planner):
    q, k, v = tensors(np.random.default_rng(22))
    with dispatch.recording() as outer:
        aa.attention(q, k, v, causal=True)
        with dispatch.recording() as inner:
            aa.attention(q, k, v, causal=True)
            aa.attention(q, k, v, causal=True)
    assert planner.prepared == 1
    assert [r.backend for r in outer] == ["planner"] * 3
    assert inner == outer[1:]
    assert inner[0].features == outer[0].features >= {"causal"}


def test_plans_hold_no_array(install):
    class Forgetful(Planner):
        def prepare(self, call):
            shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
            return lambda q, k, v, *others: (np.zeros(shape, "f4"), None)

    install(Forgetful())
    rng = np.random.default_rng(23)
    q, k, v = tensors(rng)
    bias, sinks, slopes = floats(rng, Q_LEN, K_LEN), floats(rng, HEADS), floats(rng, HEADS)
    lengths, seen = np.array([1, 2, 3]), rng.random((Q_LEN, K_LEN)) < 0.5
    gone = [weakref.ref(x) for x in (q, k, v, bias, sinks, lengths, slopes, seen)]
    with aa.use(backend="planner"):
        for _ in range(2):
            options = {"bias": bias, "sinks": sinks, "kv_lengths": lengths, "q_offset": 0}
            aa.attention(q, k, v, score_mod=alibi(slopes), mask=seen, **options)
    del q, k, v, bias, sinks, lengths, slopes, seen, options
    gc.collect()
    assert [ref() for ref in gone] == [None] * 8


def test_there_are_not_ever_more_plans(planner, monkeypatch):
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_MOST_PLANS", 4)
    q, k, v = tensors(np.random.default_rng(24))
    for n in range(1, 7):
        aa.attention(q, k, v, q_offset=n)
        assert len(plan._plans) == min(n, 4)
    aa.attention(q, k, v, q_offset=6)
    assert planner.prepared == 6
    aa.attention(q, k, v, q_offset=1)
    assert planner.prepared == 7


def test_many_threads_plan_at_once(planner, monkeypatch):
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_MOST_PLANS", 3)
    rng = np.random.default_rng(25)
    calls = [(tensors(rng), {"q_offset": n % 5, "causal": True}) for n in range(10)]
    wanted = [aa.attention(*call, backend="reference", **options) for call, options in calls]
    failed = []

    def work(first):
        for n in range(first, first + 40):
            call, options = calls[n % 10]
            try:
                found = aa.attention(*call, backend="planner", **options)
                np.testing.assert_array_equal(found, wanted[n % 10])
            except BaseException as error:
                failed.append(error)
                raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(plan._plans) <= 3


def test_torch_tensors_are_planned_while_nothing_is_differentiated(planner):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v = (torch.from_numpy(x) for x in tensors(np.random.default_rng(26)))
    wanted = aa.attention(q, k, v, causal=True, backend="reference")
    for n in range(2):
        assert torch.equal(aa.attention(q, k, v, causal=True), wanted)
        assert (planner.prepared, planner.ran) == (1, n + 1)
    v.requires_grad_()
    out = aa.attention(q, k, v, causal=True)
    assert out.requires_grad
    assert planner.ran == 2
    with torch.no_grad():
        assert not aa.attention(q, k, v, causal=True).requires_grad
        assert planner.ran == 3
    v.requires_grad_(False)
    seen = torch.func.vmap(lambda x: aa.attention(x, k[0], v[0], causal=True))(q)
    assert torch.allclose(seen, torch.stack([aa.attention(x, k[0], v[0], causal=True) for x in q]))
    imaginary = torch.complex(q, q).conj().imag
    assert imaginary.is_neg()
    before = planner.prepared
    aa.attention(imaginary, k, v)
    aa.attention(torch.complex(q, q).imag, k, v)
    assert planner.prepared == before + 2
    memory = bytearray(1) + q.numpy().tobytes()
    unaligned = torch.frombuffer(memory, dtype=torch.float32, offset=1).reshape(q.shape)
    before = planner.prepared
    assert torch.equal(aa.attention(unaligned, k, v, causal=True), wanted)
    assert planner.prepared == before + 1
    slopes = torch.ones(HEADS, requires_grad=True)
    ran = planner.ran
    assert aa.attention(q, k, v, score_mod=alibi(slopes)).requires_grad
    assert planner.ran == ran


def test_jax_arrays_are_planned_and_tracers_are_not(planner):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k, v = (jax.numpy.asarray(x) for x in tensors(np.random.default_rng(27)))
    wanted = to_host(aa.attention(q, k, v, causal=True, backend="reference"))
    for n in range(2):
        np.testing.assert_array_equal(to_host(aa.attention(q, k, v, causal=True)), wanted)
        assert (planner.prepared, planner.ran) == (1, n + 1)
    jitted = jax.jit(lambda x: aa.attention(x, k, v, causal=True))(q)
    np.testing.assert_allclose(to_host(jitted), wanted, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(not jax.config.jax_enable_x64):
        aa.attention(q, k, v, causal=True)
    assert (planner.prepared, planner.ran) == (2, 3)
    layouts = pytest.importorskip("jax.experimental.layout")
    turned = layouts.Format(layouts.Layout((0, 2, 1, 3)), k.sharding)
    other = aa.attention(q, jax.device_put(k, turned), v, causal=True)
    np.testing.assert_array_equal(to_host(other), wanted)
    assert (planner.prepared, planner.ran) == (3, 4)
    gradient = jax.grad(lambda x: aa.attention(x, k, v, causal=True).sum())(q)
    assert float(abs(gradient).sum()) > 0
    assert planner.ran == 4
