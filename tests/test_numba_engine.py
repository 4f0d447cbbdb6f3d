"""The Numba engine where the conformance cases do not lead: which kernel, how work is cut, whose memory.

Expected values are those of the reference backend, which the same cases hold to the oracle.
"""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

import anyattn as aa
from anyattn import dispatch, masks, plan, scores
from anyattn.describe import Options, describe

pytest.importorskip("numba", reason="numba is not installed")

from anyattn_numba import arguments as a
from anyattn_numba import engine
from anyattn_numba.engine import Prepared
from anyattn_numba.hostarrays import address_of, as_numpy
from anyattn_numba.kernels import shape_for
from anyattn_numba.template import Template

BOUND = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 3e-6, "float64": 1e-14}


def drawn(shape, dtype="float32", seed=0):
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def inputs(batch, heads, kv_heads, q_len, k_len, head_dim, v_head_dim=None, dtype="float32"):
    return (
        drawn((batch, heads, q_len, head_dim), dtype, 1),
        drawn((batch, kv_heads, k_len, head_dim), dtype, 2),
        drawn((batch, kv_heads, k_len, v_head_dim or head_dim), dtype, 3),
    )


def assert_equals_reference(q, k, v, dtype="float32", **options):
    found, lse = aa.attention(q, k, v, backend="numba", return_lse=True, **options)
    wanted, sums = aa.attention(q, k, v, backend="reference", return_lse=True, **options)
    assert found.dtype == wanted.dtype
    for x, y in ((found, wanted), (lse, sums)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.array_equal(np.isfinite(x), np.isfinite(y))
        seen = np.isfinite(y)
        assert np.array_equal(x[~seen], y[~seen], equal_nan=True)
        size = max(1.0, np.abs(y[seen]).max(initial=0))
        assert np.abs(x[seen] - y[seen]).max(initial=0) <= BOUND[dtype] * size
    return found


def work_of(q, k, v, threads, **options):
    call = describe("attention", q, k, v, Options(**options))
    template = Template(call, shape_for(call.accumulate), {"Q": q, "K": k, "V": v}, lasting=False)
    return template.case(call.others, threads).work


class TestWork:
    """How a call is cut into items."""

    def test_every_query_is_in_one_item(self):
        for q_len, group in ((1, 4), (7, 3), (47, 2), (48, 1), (100, 2), (333, 1)):
            q, k, v = inputs(2, 2 * group, 2, q_len, 20, 8)
            items = work_of(q, k, v, 1).items
            seen = np.zeros((2, 2, group * q_len), int)
            for b, head, first, count in items[:, :4]:
                seen[b, head, first : first + count] += 1
            assert (seen == 1).all()

    def test_few_queries_of_a_group_share_an_item(self):
        assert len(work_of(*inputs(3, 8, 2, 1, 50, 16), 1).items) == 6

    def test_a_mask_that_tells_heads_apart_keeps_them_apart(self):
        blocks = np.zeros((1, 8, 1, 50), bool)
        blocks[0, :, 0] = np.arange(50) < 6 * (1 + np.arange(8))[:, None]
        q, k, v = inputs(1, 8, 2, 1, 50, 16)
        assert len(work_of(q, k, v, 1, mask=blocks).items) == 8
        assert_equals_reference(q, k, v, mask=blocks)

    def test_items_of_a_head_begin_with_the_longest(self):
        q, k, v = inputs(1, 2, 2, 480, 480, 8)
        items = work_of(q, k, v, 2, causal=True).items
        for head in range(2):
            first = items[items[:, 1] == head, 2]
            assert list(first) == sorted(first, reverse=True)

    def test_long_keys_of_few_items_are_split(self):
        q, k, v = inputs(1, 1, 1, 3, 5000, 16)
        work = work_of(q, k, v, 2)
        assert work.parts == 8
        assert work.items[0, 5] == 0
        assert (work.items[1:, 5] == work.items[:-1, 6]).all()
        assert work.items[-1, 6] == 5000

    def test_one_thread_splits_nothing(self):
        assert work_of(*inputs(1, 1, 1, 3, 5000, 16), 1).parts == 1


class TestSplitKeys:
    """Rows whose keys are shared out between items, and merged."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_values(self, dtype):
        with aa.use(threads=2):
            assert_equals_reference(*inputs(1, 2, 1, 1, 4099, 32, 16, dtype), dtype)
            assert_equals_reference(*inputs(1, 1, 1, 33, 3001, 12, 20, dtype), dtype)

    def test_sinks_count_once(self):
        with aa.use(threads=2):
            for sinks in ([3.0, -1.0], [12.0, 90.0]):
                assert_equals_reference(*inputs(1, 2, 1, 1, 3000, 16), sinks=np.array(sinks, "f4"))

    def test_masks(self):
        q, k, v = inputs(1, 1, 1, 2, 4000, 16)
        with aa.use(threads=2):
            for mask in (masks.fixed(64), masks.sliding_window(700), masks.dense(np.zeros((2, 4000), bool))):
                assert_equals_reference(q, k, v, mask=mask)

    def test_repeated_calls_give_the_same_bits(self):
        q, k, v = inputs(1, 1, 1, 5, 5000, 24)
        with aa.use(threads=2):
            first = aa.attention(q, k, v, backend="numba")
            for _ in range(10):
                assert np.array_equal(first, aa.attention(q, k, v, backend="numba"))


class TestFewQueries:
    """Lanes along the channels."""

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("queries", [1, 4, 5, 8])
    def test_values(self, queries, dtype):
        q, k, v = inputs(2, queries, 1, 1, 203, 32, 48, dtype)
        assert_equals_reference(q, k, v, dtype)
        assert_equals_reference(q, k, v, dtype, kv_lengths=[0, 131], softcap=2.0)

    @pytest.mark.parametrize("head_dims", [(30, 48), (32, 47)])
    def test_channels_that_fill_no_vectors(self, head_dims):
        assert_equals_reference(*inputs(1, 4, 2, 1, 90, *head_dims))

    def test_gathered_keys(self):
        q, k, v = inputs(1, 4, 2, 2, 900, 64, dtype="bfloat16")
        assert_equals_reference(q, k, v, "bfloat16", mask=masks.fixed(64) | masks.sliding_window(40))

    def test_strides(self):
        q, k, v = inputs(1, 4, 2, 1, 300, 64)
        wide = np.repeat(k, 2, axis=-1)
        assert_equals_reference(q, wide[..., ::2], v[:, :, ::-1])

    def test_hidden_values_do_not_matter(self):
        q, k, v = inputs(1, 4, 2, 2, 300, 32)
        seen = np.random.default_rng(5).random((1, 4, 2, 300)) < 0.5
        seen[..., 17] = False
        wanted = assert_equals_reference(q, k, v, mask=seen)
        k[:, :, 17], v[:, :, 17] = np.nan, np.inf
        found = aa.attention(q, k, v, mask=seen, backend="numba")
        assert np.abs(found - wanted).max() < 1e-6


class TestManyQueries:
    """A lane for each query."""

    @pytest.mark.parametrize("q_len", [9, 16, 31, 33, 48, 49, 97])
    def test_lengths_around_the_lanes(self, q_len):
        assert_equals_reference(*inputs(1, 2, 1, q_len, 75, 20, 13), causal=True)

    @pytest.mark.parametrize("v_head_dim", [1, 3, 4, 7, 8, 12, 13, 70])
    def test_channels_around_the_rows(self, v_head_dim):
        assert_equals_reference(*inputs(1, 1, 1, 20, 30, 5, v_head_dim))

    @pytest.mark.parametrize("k_len", [0, 1, 7, 8, 9, 127, 128, 129, 260])
    def test_lengths_around_the_chunk(self, k_len):
        assert_equals_reference(*inputs(1, 1, 1, 20, k_len, 5, 6))

    def test_hidden_values_do_not_matter(self):
        q, k, v = inputs(1, 2, 2, 60, 300, 32)
        seen = np.random.default_rng(5).random((1, 2, 60, 300)) < 0.5
        seen[..., 17] = False
        wanted = assert_equals_reference(q, k, v, mask=seen)
        k[:, :, 17], v[:, :, 17] = np.inf, np.nan
        found = aa.attention(q, k, v, mask=seen, backend="numba")
        assert np.abs(found - wanted).max() < 1e-6

    def test_a_row_with_nan_at_a_seen_key_is_alone(self):
        q, k, v = inputs(1, 1, 1, 50, 50, 16)
        v[0, 0, 30, 2] = np.nan
        found = assert_equals_reference(q, k, v, causal=True)
        assert np.isnan(found[0, 0, 30:, 2]).all()
        assert np.isfinite(found[0, 0, :30]).all()

    def test_scores_of_any_size(self):
        q, k, v = inputs(1, 1, 1, 30, 40, 4)
        for factor in (1e-30, 1e10, 3e18):
            assert_equals_reference(q * np.float32(factor), k * np.float32(factor), v)


class TestConvertedRows:
    """Keys and values that a thread converts once for all items of a head."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_values(self, dtype, threads):
        for n in range(2):  # the memory of the first call is that of the second
            shapes = (2, 4, 150, 12), (2, 2, 150, 12), (2, 2, 150, 7)
            q, k, v = (drawn(shape, dtype, 3 * n + m) for m, shape in enumerate(shapes))
            with aa.use(threads=threads):
                assert_equals_reference(q, k, v, dtype, causal=True)
                assert_equals_reference(q, k, v, dtype, kv_lengths=[150, 37], window=(40, 3), q_offset=0)
                assert_equals_reference(q, k, v, dtype, mask=masks.fixed(16) | masks.sliding_window(20))

    def test_numbers_apart_from_each_other(self):
        q, k, v = inputs(1, 2, 1, 100, 90, 12)
        wide = np.repeat(k, 2, axis=-1)[..., ::2]
        found, wanted = (aa.attention(q, x, v, causal=True, backend="numba") for x in (wide, k))
        assert np.array_equal(found, wanted)

    def test_long_keys_are_not_kept(self):
        room = {}
        for k_len in (4096, 16384):
            q, k, v = inputs(1, 1, 1, 96, k_len, 64, dtype="bfloat16")
            call = describe("attention", q, k, v, Options())
            tensors = {"Q": q, "K": k, "V": v}
            template = Template(call, shape_for("float32"), tensors, lasting=False, keep_rows=True)
            room[k_len] = template.word(a.SCRATCH_SIZE)
        assert room[4096] > 4096 * 128 * 4 > room[16384]


class TestMemory:
    """Whose memory is read and written."""

    def test_inputs_may_lie_anyhow_and_are_not_written(self):
        q, k, v = inputs(2, 2, 2, 20, 30, 8)
        odd = np.zeros(q.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(q.shape)
        odd[...] = q
        turned = np.asfortranarray(k)
        for x in (odd, turned, v):
            x.flags.writeable = False
        assert_equals_reference(odd, turned, v[:, :, ::-1])

    def test_one_row_for_all_keys(self):
        q, k, v = inputs(1, 2, 2, 20, 30, 8)
        assert_equals_reference(
            q, np.broadcast_to(k[:, :, :1], k.shape), np.broadcast_to(v[..., :1], v.shape)
        )

    def test_batch_axes_broadcast_in_place(self):
        q, k, v = drawn((3, 1, 2, 9, 8)), drawn((1, 4, 2, 9, 8)), drawn((4, 2, 9, 8))
        assert_equals_reference(q, k, v)

    def test_torch_memory_is_read_in_place(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        q, k, v = (torch.from_numpy(x) for x in inputs(1, 2, 2, 20, 30, 8))
        assert address_of(as_numpy(k, "torch")) == k.data_ptr()
        found = aa.attention(q, k, v, backend="numba")
        assert isinstance(found, torch.Tensor)
        assert torch.equal(
            found, torch.from_numpy(aa.attention(q.numpy(), k.numpy(), v.numpy(), backend="numba"))
        )
        half = [x.bfloat16() for x in (q, k, v)]
        assert aa.attention(*half, backend="numba").dtype == torch.bfloat16

    def test_jax_results_are_not_copied(self):
        jax = pytest.importorskip("jax", reason="jax is not installed")
        from anyattn_numba.hostarrays import address_of, empty_like, from_numpy

        memory = empty_like(np.dtype("f4"), (2, 3, 5), False, "jax")
        memory[...] = 1
        found = from_numpy(memory, None, "jax")
        assert isinstance(found, jax.Array)
        assert found.unsafe_buffer_pointer() == address_of(memory)

    def test_memory_beyond_the_result_is_small(self):
        q = drawn((1, 4, 20_000, 64))
        mask = masks.causal() & (masks.sliding_window(512, 0) | masks.global_tokens(64))
        aa.attention(q, q, q, mask=mask, backend="numba")
        tracemalloc.start()
        aa.attention(q, q, q, mask=mask, backend="numba")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - q.nbytes < 20e6


def changed(rng, x):
    """Other contents for `x`."""
    if x.dtype == bool:
        return rng.random(x.shape) < 0.5
    if x.dtype.kind == "i":
        return x[::-1].copy()
    return rng.standard_normal(x.shape).astype(x.dtype)


def spread(limits):
    return lambda b, h, i, j: abs(i - j) * 0.1 < limits[h]


GIVEN = {
    "everything": lambda rng: {
        "kv_lengths": rng.integers(0, 30, 2),
        "q_offset": rng.integers(0, 20, 2),
        "causal": True,
        "sinks": rng.standard_normal(4),
        "score_mod": scores.alibi(rng.random(4).astype("f4")),
        "bias": rng.standard_normal((2, 1, 12, 30)).astype("f4"),
        "mask": rng.random((12, 30)) < 0.8,
        "return_lse": True,
    },
    "lengths": lambda rng: {"kv_lengths": rng.integers(0, 30, 2).astype("i4")},
    "offsets": lambda rng: {"q_offset": rng.integers(-12, 30, 2), "window": (9, 4)},
    "mask": lambda rng: {"mask": rng.random((2, 4, 12, 30)) < 0.1 + 0.5 * (np.arange(30) > 20)},
    "floats in a mask": lambda rng: {"mask": masks.from_function(spread(3 * rng.random(4)))},
}  # fmt: skip


# Options of calls in which the number of keys changes.
GROWING = {
    "plain": lambda rng, k_len: {},
    "causal": lambda rng, k_len: {"causal": True, "sinks": rng.standard_normal(4).astype("f4")},
    "window": lambda rng, k_len: {"window": (9, 2), "softcap": 2.0},
    "lengths": lambda rng, k_len: {
        "kv_lengths": rng.integers(1, k_len + 1, 2),
        "q_offset": rng.integers(0, k_len, 2),
        "window": (30, None),
    },
    "scattered": lambda rng, k_len: {
        "mask": masks.causal() & (masks.strided(5) | masks.prefix(3)),
        "score_mod": scores.alibi(rng.random(4).astype("f4")),
    },
}


class TestPlans:
    """A call like one before, with other values in each of its arrays."""

    @pytest.fixture
    def prepared(self, monkeypatch):
        """What was prepared; no call is run in another way."""
        from anyattn_numba import backend

        made = []
        monkeypatch.setattr(plan, "_plans", {})
        monkeypatch.setattr(plan, "_families", {})
        monkeypatch.setattr(backend, "run", None, raising=False)
        monkeypatch.setattr(engine, "Prepared", lambda *a, **b: made.append(Prepared(*a, **b)) or made[-1])
        return made

    @pytest.mark.parametrize("kind", GIVEN)
    @pytest.mark.parametrize("group", [1, 2])
    def test_values(self, prepared, kind, group):
        rng = np.random.default_rng(0)
        for _ in range(3):
            q, k, v = inputs(2, 4, 4 // group, 12, 30, 16)
            options = GIVEN[kind](rng)
            found = aa.attention(q, k, v, backend="numba", **options)
            wanted = aa.attention(q, k, v, backend="reference", **options)
            for x, y in zip(found, wanted, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        assert len(prepared) == 1

    @pytest.mark.parametrize("kind", GROWING)
    @pytest.mark.parametrize("q_len", [1, 12])
    def test_more_and_fewer_keys(self, prepared, kind, q_len):
        """Keys that were joined anew, and as many of a buffer as are filled."""
        q, k, v = inputs(2, 4, 2, q_len, 1300, 16, 12)
        rng = np.random.default_rng(4)
        for n, k_len in enumerate((20, 21, 1200, 14, 1201)):
            keys = k[:, :, :k_len], v[:, :, :k_len]
            keys = [x.copy() for x in keys] if n % 2 else keys
            options = GROWING[kind](rng, k_len)
            with aa.use(threads=2):
                assert_equals_reference(q, *keys, **options)
        assert len(prepared) == 1

    def test_arrays_that_change_in_place(self, prepared):
        q, k, v = inputs(2, 4, 4, 12, 30, 16)
        lengths, offsets, sinks = np.array([5, 29]), np.array([3, 18]), np.zeros(4, "f4")
        slopes, bias, seen = np.ones(4, "f4"), np.zeros((2, 1, 12, 30), "f4"), np.ones((12, 30), bool)
        options = {"kv_lengths": lengths, "q_offset": offsets, "sinks": sinks, "causal": True, "bias": bias}
        options |= {"score_mod": scores.alibi(slopes), "mask": masks.dense(seen)}
        rng = np.random.default_rng(9)
        for x in (q, k, v, lengths, offsets, sinks, slopes, bias, seen):
            before = aa.attention(q, k, v, backend="numba", **options)
            x[...] = changed(rng, x)
            after = aa.attention(q, k, v, backend="numba", **options)
            assert not np.array_equal(before, after)
            wanted = aa.attention(q, k, v, backend="reference", **options)
            np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-5)
        assert len(prepared) == 1

    def test_wrong_values_are_refused_after_right_ones(self):
        q, k, v = inputs(2, 4, 4, 1, 30, 16)
        lengths = np.array([3, 30])
        wanted = aa.attention(q, k, v, backend="numba", kv_lengths=lengths)
        for wrong in (31, -1):
            lengths[0] = wrong
            with pytest.raises(ValueError, match="kv_lengths: wanted lengths between 0 and the 30 keys"):
                aa.attention(q, k, v, backend="numba", kv_lengths=lengths)
        lengths[0] = 3
        assert np.array_equal(aa.attention(q, k, v, backend="numba", kv_lengths=lengths), wanted)

    def test_no_array_is_kept(self, prepared):
        rng = np.random.default_rng(2)
        q, k, v = inputs(2, 4, 4, 12, 30, 16)
        seen, lengths, slopes = rng.random((12, 30)) < 0.5, np.array([4, 30]), np.ones(4, "f4")
        bias, sinks, offsets = np.zeros((12, 30), "f4"), np.zeros(4, "f4"), np.array([0, 3])
        alive = [weakref.ref(x) for x in (q, k, v, seen, lengths, slopes, bias, sinks, offsets)]
        options = {"kv_lengths": lengths, "q_offset": offsets, "sinks": sinks, "bias": bias, "mask": seen}
        for _ in range(2):
            aa.attention(q, k, v, backend="numba", score_mod=scores.alibi(slopes), **options)
        del q, k, v, seen, lengths, slopes, bias, sinks, offsets, options
        gc.collect()
        assert len(prepared) == 1
        assert not any(x() is not None for x in alive)

    def test_integers_may_outgrow_those_of_the_first_call(self):
        """Tile code has indices of 32 bits where all integers of a call fit them."""
        q, k, v = inputs(1, 2, 2, 12, 30, 16)
        small = np.arange(30) // 7
        options = [
            {"mask": masks.documents(ids), "q_offset": 0} for ids in (small, small + 2**40 * (small > 2))
        ]
        first, second = (describe("attention", q, k, v, Options(**o)) for o in options)
        found = engine.prepare(first)(q, k, v, *second.others)[0]
        wanted = aa.attention(q, k, v, backend="reference", **options[1])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

    def test_the_number_of_threads_is_that_of_each_call(self, prepared):
        controller = pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
        q, k, v = inputs(1, 1, 1, 1, 4000, 16)
        parts = []
        for limit in (1, 2, 1):
            with controller.threadpool_limits(limit, user_api="anyattn"):
                aa.attention(q, k, v, backend="numba")
            [one] = prepared
            parts.append(one.template.case((), limit).work.parts)
            assert one.template.case((), limit).threads == limit
        assert parts[0] == parts[2] == 1

    def test_torch_tensors(self, prepared):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        rng = np.random.default_rng(3)
        for _ in range(2):
            arrays = [*inputs(2, 4, 4, 12, 30, 16), changed(rng, np.zeros((12, 30), bool))]
            q, k, v, seen = map(torch.from_numpy, arrays)
            bias = torch.from_numpy(rng.standard_normal((12, 30))).bfloat16()
            found = aa.attention(q, k, v, backend="numba", mask=seen, bias=bias)
            wanted = aa.attention(q, k, v, backend="reference", mask=seen, bias=bias)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert len(prepared) == 1


class TestNames:
    """Names of compiled functions, by which machine code from several processes' caches is told apart."""

    def test_functions_made_for_other_dtypes_have_other_names(self):
        from anyattn_numba.kernels import KERNELS, _factory
        from anyattn_numba.pairs import entries_kernel

        found = {}

        def collect(function):
            if id(function) in found:
                return
            found[id(function)] = function
            for cell in function.py_func.__closure__ or ():
                if hasattr(cell.cell_contents, "py_func"):
                    collect(cell.cell_contents)

        for dtype in BOUND:
            shape = shape_for("float64" if dtype == "float64" else "float32")
            for kernel in (*KERNELS, "linear"):
                collect(_factory(kernel)(shape, dtype))
            for stored in (*BOUND, "bool"):
                collect(entries_kernel(shape, stored))
        made_with = {}
        for x in found.values():
            cells = [cell.cell_contents for cell in x.py_func.__closure__ or ()]
            values = [c.py_func.__qualname__ if hasattr(c, "py_func") else repr(c) for c in cells]
            values = [v for v in values if " at 0x" not in v]  # intrinsics, each made for a shape
            made_with.setdefault(x.py_func.__qualname__, []).append((x.py_func.__code__, values))
        assert len(made_with) > 100
        for name, makings in made_with.items():
            assert makings == makings[:1] * len(makings), name


def test_tensors_that_are_negated_lazily_go_to_another_backend():
    torch = pytest.importorskip("torch")
    x = torch.complex(torch.randn(1, 2, 9, 9), torch.randn(1, 2, 9, 9))
    lazily, plain = x.conj().imag, -x.imag
    assert lazily.is_neg()
    wanted = aa.attention(plain, plain, plain, backend="reference")
    for operands in ((lazily, plain, plain), (plain, plain, lazily)):
        with dispatch.recording() as ran:
            out = aa.attention(*operands)
        assert [one.backend for one in ran] == ["torch"]
        torch.testing.assert_close(out, wanted)
    with pytest.raises(aa.errors.UnsupportedCallError, match="negated lazily"):
        aa.attention(plain, plain, plain, bias=lazily[0, 0], backend="numba")


def test_python_threads_call_at_once_with_counts_of_their_own():
    """Plans, what lengths open, memory of threads and the workers meet."""
    rng = np.random.default_rng(40)
    q, k, v = inputs(2, 4, 2, 1, 1200, 16)
    wide = inputs(1, 4, 2, 70, 130, 16)
    lengths = [rng.integers(1, 1201, 2) for _ in range(4)]
    calls = [((q, k, v), {"kv_lengths": n, "causal": True}) for n in lengths]
    calls += [(wide, {"causal": True}), ((q, k, v), {})]
    wanted = [aa.attention(*call, backend="reference", **options) for call, options in calls]
    wrong, begin = [], threading.Barrier(4)

    def work(first):
        begin.wait()
        for n in range(first, first + 12):
            call, options = calls[n % len(calls)]
            with aa.use(threads=1 + n % 5, backend="numba"):
                found = aa.attention(*call, **options)
            if not np.allclose(found, wanted[n % len(calls)], rtol=1e-4, atol=1e-5):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_of_a_call_outlives_one_inside_that_wants_more():
    address, room = engine.scratch(100)
    other, more = engine.scratch(len(room) + 1000)
    assert other != address
    for begin, memory in ((address, room), (other, more)):
        assert begin % 64 == 0
        assert 0 <= begin - memory.ctypes.data < 64
    assert engine.scratch(100)[0] == other
