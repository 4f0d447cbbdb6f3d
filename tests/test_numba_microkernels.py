"""The Numba engine's micro-kernels against their plain definitions, in all lane counts that targets have.

LLVM cuts vectors that a processor lacks into ones that it has, so every shape runs on every processor. Sums
are of small whole numbers, which every order of adding gives exactly; sizes divide nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="numba is not installed")

from anyattn_numba import jit, memory, microkernels, narrow, rows, target, vectors  # noqa: E402

SHAPES = [
    target.Shape("float32", 16, 3, 8),
    target.Shape("float32", 8, 3, 4),
    target.Shape("float32", 4, 3, 4),
    target.Shape("float32", 2, 2, 3),
    target.Shape("float64", 8, 3, 8),
    target.Shape("float64", 4, 3, 4),
    target.Shape("float64", 2, 3, 4),
]
# What `jit.compiled` makes cannot be called from here.
callable_ = numba.njit(error_model="numpy")
# Written where nothing may be.
GUARD = -77.0
FEW_KEYS = 5


def exp_kernel(shape):
    """exp(source, target): of one vector."""
    lanes = vectors.Vectors(shape.element, shape.lanes)

    @jit.intrinsic
    def exp(typing_context, source, into):
        def code(context, builder, signature, arguments):
            source, into = arguments
            lanes.store(builder, lanes.exp(builder, lanes.load(builder, source)), into)
            return context.get_dummy_value()

        return numba.types.void(numba.types.int64, numba.types.int64), code

    return exp


class Kernels:
    """All micro-kernels of a shape in one compiled function, which takes half the time of one for each."""

    NAMES = ("score", "score_one", "weigh", "weigh_one", "soften", "largest", "transpose", "exp")
    NARROW = (
        "narrow_score",
        "narrow_score_one",
        "narrow_weigh",
        "narrow_score_bf16",
        "narrow_weigh_bf16",
        "narrow_soften",
    )

    def __init__(self, shape):
        self.shape = shape
        score, score_one = (microkernels.score_kernel(shape, n) for n in (shape.rows, 1))
        weigh, weigh_one = (microkernels.weigh_kernel(shape, n) for n in (shape.rows, 1))
        soften, largest = microkernels.soften_kernel(shape), microkernels.largest_kernel(shape)
        transpose, exp = memory.transpose_kernel(shape.element, shape.lanes), exp_kernel(shape)

        @callable_
        def wide(which, a, b, c, d, e, f, g, h, i):
            if which == 0:
                score(a, b, c, d, e, f, g, h, i)
            elif which == 1:
                score_one(a, b, c, d, e, f, g, h, i)
            elif which == 2:
                weigh(a, b, c, d, e, f, g)
            elif which == 3:
                weigh_one(a, b, c, d, e, f, g)
            elif which == 4:
                soften(a, b, c, d, e, f, g)
            elif which == 5:
                largest(a, b, c, d)
            elif which == 6:
                transpose(a, b, c, d)
            else:
                for n in range(c):
                    exp(a + n * d, b + n * d)

        self.wide = wide
        if shape.lanes < narrow.QUERIES:
            return
        together = shape.lanes // narrow.QUERIES
        small = "bfloat16" if shape.element == "float32" else shape.element
        n_score = narrow.narrow_score_kernel(shape, shape.element, together)
        n_score_one = narrow.narrow_score_kernel(shape, shape.element, 1)
        n_weigh = narrow.narrow_weigh_kernel(shape, shape.element)
        s_score = narrow.narrow_score_kernel(shape, small, together)
        s_weigh = narrow.narrow_weigh_kernel(shape, small)
        n_soften = narrow.narrow_soften_kernel(shape)

        @callable_
        def few(which, a, b, c, d, e, f, g, h, i, j, k):
            if which == 0:
                n_score(a, b, c, d, e, f, g, h, i)
            elif which == 1:
                n_score_one(a, b, c, d, e, f, g, h, i)
            elif which == 2:
                n_weigh(a, b, c, d, e, f, g, h, i, j, k)
            elif which == 3:
                s_score(a, b, c, d, e, f, g, h, i)
            elif which == 4:
                s_weigh(a, b, c, d, e, f, g, h, i, j, k)
            else:
                n_soften(a, b, c, d, e, f)

        self.few = few

    def __call__(self, name, *arguments):
        given = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments]
        wide = name in self.NAMES
        names, function, count = (self.NAMES, self.wide, 9) if wide else (self.NARROW, self.few, 11)
        function(names.index(name), *given, *[0] * (count - len(given)))


@lru_cache
def kernels(shape):
    return Kernels(shape)


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s.element}-{s.lanes}x{s.vectors}x{s.rows}")
def run(request):
    return kernels(request.param)


def whole(shape, *sizes, seed=0):
    """Small whole numbers."""
    return np.random.default_rng(seed).integers(-4, 5, sizes).astype(shape.element)


def guarded(shape, *sizes):
    """An array to write to, with more rows than asked for that are not to be written."""
    return np.full((sizes[0] + 3, *sizes[1:]), GUARD, shape.element)


def every_width(run):
    return [(n, n * run.shape.lanes) for n in range(1, run.shape.vectors + 1)]


@pytest.mark.parametrize("head_dim", [1, 2, 7, 13])
def test_score_is_the_product_of_keys_and_queries(run, head_dim):
    for name, count in (("score", run.shape.rows), ("score_one", 1)):
        for n, width in every_width(run):
            held = whole(run.shape, count, head_dim + 3)
            query = whole(run.shape, head_dim, width, seed=1)
            before = whole(run.shape, width, seed=2) * 8
            out, largest = guarded(run.shape, count, width), before.copy()
            run(name, n, held, held.strides[0], query, head_dim, out, largest)
            wanted = held[:, :head_dim] @ query
            assert np.array_equal(out[:count], wanted)
            assert np.all(out[count:] == GUARD)
            assert np.array_equal(largest, np.maximum(before, wanted.max(axis=0)))


@pytest.mark.parametrize("keys", [0, 1, 6, 11])
def test_weigh_adds_weighted_values_to_what_decays(run, keys):
    for name, count in (("weigh", run.shape.rows), ("weigh_one", 1)):
        for n, width in every_width(run):
            value = whole(run.shape, keys + 1, count + 2)
            weights = whole(run.shape, keys + 1, width, seed=1)
            factor = 2.0 ** whole(run.shape, width, seed=2)
            before, out = whole(run.shape, count, width, seed=3), guarded(run.shape, count, width)
            out[:count] = before
            run(name, n, value, value.strides[0], weights, keys, factor, out)
            assert np.array_equal(out[:count], factor * before + value[:keys, :count].T @ weights[:keys])
            assert np.all(out[count:] == GUARD)


@pytest.mark.parametrize("keys", [1, 5, 12])
def test_soften_is_the_exponential_with_what_it_changes(run, keys):
    element = run.shape.element
    eps = np.finfo(element).eps
    for n, width in every_width(run):
        rng = np.random.default_rng(keys)
        scores = rng.normal(0, 5, (keys + 3, width)).astype(element)
        before = rng.normal(0, 5, width).astype(element)
        total = rng.uniform(1, 9, width).astype(element)
        # A query that has seen nothing, now or ever.
        before[0], total[0] = -np.inf, 0
        before[1], total[1], scores[:keys, 1] = -np.inf, 0, -np.inf
        largest = np.maximum(before, scores[:keys].max(axis=0))
        given, sums, top = scores.copy(), total.copy(), before.copy()
        factor = np.full(width, GUARD, element)
        run("soften", n, given, keys, top, largest, sums, factor)
        base = np.where(largest == -np.inf, 0, largest).astype(np.float64)
        weights, decay = np.exp(scores[:keys] - base), np.exp(before - base)
        # abs(x) * e**x is 0.37 at most.
        np.testing.assert_allclose(given[:keys], weights, rtol=2 * eps, atol=eps)
        np.testing.assert_allclose(factor, decay, rtol=2 * eps, atol=eps)
        np.testing.assert_allclose(sums, total * decay + weights.sum(axis=0), rtol=(8 + keys) * eps)
        assert np.array_equal(top, largest)
        assert np.array_equal(given[keys:], scores[keys:])
        assert sums[1] == 0
        assert np.all(given[:keys, 1] == 0)


@pytest.mark.parametrize("keys", [0, 1, 7])
def test_largest_passes_over_nan(run, keys):
    for n, width in every_width(run):
        scores, before = whole(run.shape, keys + 1, width), whole(run.shape, width, seed=1)
        scores[keys] = 99
        scores[:keys, 0] = np.nan
        largest = before.copy()
        run("largest", n, scores, keys, largest)
        assert np.array_equal(largest, np.fmax(before, np.fmax.reduce(scores[:keys], axis=0, initial=-99)))


def test_transpose(run):
    lanes = run.shape.lanes
    source, into = whole(run.shape, lanes, lanes + 3), guarded(run.shape, lanes, lanes + 1)
    run("transpose", source, source.strides[0], into, into.strides[0])
    assert np.array_equal(into[:lanes, :lanes], source[:, :lanes].T)
    assert np.all(into[lanes:] == GUARD)
    assert np.all(into[:, lanes:] == GUARD)


def test_exp(run):
    element = run.shape.element
    info = np.finfo(element)
    least = np.log(info.smallest_normal)
    x = -np.concatenate([np.geomspace(1e-30, -least, 40000), np.linspace(0, -least, 40000), [0.0, -0.0]])
    x = np.resize(x.astype(element), -(-len(x) // run.shape.lanes) * run.shape.lanes)
    x = np.maximum(x, np.nextafter(info.dtype.type(least), info.dtype.type(0)))
    found = exp(run, x)
    true = np.exp(x.astype(np.longdouble))
    # What the module says, without a fused product; for float64 twice that where long double is no wider.
    bound = 2.2e-7 if element == "float32" else 2.3e-16 * (1 if np.finfo(np.longdouble).nmant > 60 else 2)
    assert np.all(abs(found / true - 1) <= bound + abs(x) * 0.62 * info.eps)
    assert np.all(found[x == 0] == 1)
    special = np.array([-np.inf, np.nan, 1.02 * least, -1e30, -info.max, 0, -0.0, 1], element)
    special = np.resize(special, max(len(special), run.shape.lanes))
    found = exp(run, special)[:8]
    assert np.array_equal(found[:7], [0, np.nan, 0, 0, 0, 1, 1], equal_nan=True)
    assert abs(found[7] / np.e - 1) < 1e-6


def exp(run, x):
    out = np.empty_like(x)
    lanes = run.shape.lanes
    run("exp", x, out, len(x) // lanes, lanes * x.itemsize)
    return out


def bfloat16_bits(x):
    """Numbers that bfloat16 has, as their bits."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


few = pytest.mark.parametrize(
    "run", [s for s in SHAPES if s.lanes >= narrow.QUERIES], indirect=True,
    ids=lambda s: f"{s.element}-{s.lanes}",
)  # fmt: skip


@few
@pytest.mark.parametrize("wholes", [1, 3])
def test_narrow_score(run, wholes):
    shape, queries = run.shape, narrow.QUERIES
    together = shape.lanes // queries
    for name, count in (("narrow_score", together), ("narrow_score_one", 1), ("narrow_score_bf16", together)):
        head_dim = wholes * shape.lanes
        key, query = whole(shape, count, head_dim + 5), whole(shape, queries, head_dim + 1, seed=1)
        held = bfloat16_bits(key) if name.endswith("16") and shape.element == "float32" else key
        out = guarded(shape, count, shape.lanes)
        strides = out.strides[0], held, held.strides[0]
        run(name, held, held.strides[0], query, query.strides[0], head_dim, out, *strides)
        assert np.array_equal(out[:count, :queries], key[:, :head_dim] @ query[:, :head_dim].T)
        assert np.all(out[:, queries:] == GUARD)
        assert np.all(out[count:] == GUARD)


@few
# Four vectors of channels at a time, then one.
@pytest.mark.parametrize("wholes", [1, 5])
def test_narrow_weigh(run, wholes):
    shape, queries, keys = run.shape, narrow.QUERIES, FEW_KEYS
    for name in ("narrow_weigh", "narrow_weigh_bf16"):
        channels = wholes * shape.lanes
        value, weights = whole(shape, keys + 1, channels + 3), whole(shape, keys + 1, shape.lanes, seed=1)
        held = bfloat16_bits(value) if name.endswith("16") and shape.element == "float32" else value
        factor = 2.0 ** whole(shape, shape.lanes, seed=2)
        before = whole(shape, queries, channels, seed=3)
        out = guarded(shape, queries, channels + 2)
        out[:queries, :channels] = before
        pitch = weights.strides[0]
        run(name, held, held.strides[0], channels, weights, pitch, keys, factor, out, out.strides[0], held, 0)
        wanted = factor[:queries, None] * before + weights[:keys, :queries].T @ value[:keys, :channels]
        assert np.array_equal(out[:queries, :channels], wanted)
        assert np.all(out[:, channels:] == GUARD)
        assert np.all(out[queries:] == GUARD)


@few
@pytest.mark.parametrize("keys", [1, 4, 11])
def test_narrow_soften(run, keys):
    """Scores of all keys side by side; what a query has not seen yet, and never sees, is -inf."""
    element, queries, lanes = run.shape.element, narrow.QUERIES, run.shape.lanes
    eps, rng = np.finfo(element).eps, np.random.default_rng(keys)
    scores = rng.normal(0, 5, (keys, queries)).astype(element)
    before = rng.normal(0, 5, queries).astype(element)
    total = rng.uniform(1, 9, queries).astype(element)
    before[0], total[0] = -np.inf, 0
    before[1], total[1], scores[:, 1] = -np.inf, 0, -np.inf
    scores[-1, 2] = before[2] + 3
    # What lies behind would be the largest.
    room = np.full(keys * queries + lanes + 3, -GUARD, element)
    room[: scores.size] = scores.ravel()
    state = np.full((4, queries + 1), GUARD, element)
    state[0, :queries], state[2, :queries] = before, total
    run("narrow_soften", room, keys, *state)
    top = np.maximum(before, scores.max(axis=0))
    base = np.where(top == -np.inf, 0, top).astype(np.float64)
    weights, decay = np.exp(scores - base), np.exp(before - base)
    found = room[: scores.size].reshape(keys, queries)
    np.testing.assert_allclose(found, weights, rtol=2 * eps, atol=eps)
    np.testing.assert_allclose(state[3, :queries], decay, rtol=2 * eps, atol=eps)
    summed = total * decay + weights.sum(axis=0)
    np.testing.assert_allclose(state[2, :queries], summed, rtol=(8 + keys) * eps)
    assert np.array_equal(state[:2, :queries], [top, top])
    assert np.all(state[:, queries:] == GUARD)
    assert np.all(room[scores.size + lanes :] == -GUARD)


@pytest.mark.parametrize(
    ("lanes", "queries", "head_dim", "whether"),
    [(16, 8, 64, True), (16, 9, 64, False), (16, 1, 40, False), (4, 4, 12, True), (4, 5, 12, False),
     (2, 2, 12, False), (8, 8, 8, True), (8, 0, 8, False)],
)  # fmt: skip
def test_narrow_suits_what_one_vector_holds(lanes, queries, head_dim, whether):
    shape = target.Shape("float32", lanes, 3, 4)
    assert narrow.suits(shape, queries, head_dim, head_dim) is whether


# Stored dtype: bits of its fraction, least exponent of a normal number, largest number, bits of infinity.
FORMATS = {
    "float16": (10, -14, 65504.0, 0x7C00),
    "bfloat16": (7, -126, float.fromhex("0x1.fep127"), 0x7F80),
}


def value_of(bits, dtype):
    """The numbers that 16 bits stand for, as float64: by the definition of the format."""
    fraction, least, _, infinite = FORMATS[dtype]
    size = bits.astype(np.int64) & 0x7FFF
    exponent, digits = size >> fraction, size & ((1 << fraction) - 1)
    normal = np.ldexp(1 + digits / 2.0**fraction, exponent + least - 1)
    found = np.where(exponent == 0, np.ldexp(digits / 2.0**fraction, least), normal)
    found = np.where(size == infinite, np.inf, np.where(size > infinite, np.nan, found))
    return np.where(bits & 0x8000, -found, found)


def nearest(x, dtype):
    """The nearest number of a format, of two the even one."""
    fraction, least, largest, _ = FORMATS[dtype]
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 1))
    step = np.ldexp(1.0, np.maximum(exponent - 1, least) - fraction)
    rounded = np.round(x / step) * step
    return np.where(abs(rounded) > largest, np.copysign(np.inf, x), rounded)


@lru_cache
def row_functions(dtype, element):
    read, write = rows.reader(dtype, element), rows.writer(dtype, element)

    @callable_
    def both(which, a, b, c, factor, d, e):
        if which == 0:
            read(a, b, c, factor, d)
        else:
            write(a, c, factor, d, e)

    return both


def read(stored, dtype, element="float32", factor=1.0):
    out = np.full(len(stored) + 1, GUARD, element)
    row_functions(dtype, element)(
        0, stored.ctypes.data, stored.strides[0], len(stored), factor, out.ctypes.data, 0
    )
    assert out[-1] == GUARD
    return out[:-1]


def write(x, dtype, element="float32", factor=1.0, step=1):
    stored = np.uint16 if dtype in FORMATS else dtype
    x = np.ascontiguousarray(x, element)
    out = np.zeros(len(x) * step + 1, stored)
    row_functions(dtype, element)(1, x.ctypes.data, 0, len(x), factor, out.ctypes.data, step * out.itemsize)
    kept = out[: len(x) * step].reshape(len(x), step)
    assert out[-1] == 0
    assert np.all(kept[:, 1:] == 0)
    return kept[:, 0]


ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_16_bit_number_is_read_and_written_back(dtype):
    wanted = value_of(ALL_BITS, dtype)
    for stored in (ALL_BITS, np.repeat(ALL_BITS, 3)[::3], np.flip(np.flip(ALL_BITS).copy())):
        found = read(stored, dtype)
        assert np.array_equal(found, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(found[wanted == 0]), [False, True])
    number = ~np.isnan(wanted)
    for step in (1, 2):
        back = write(found, dtype, step=step)
        assert np.array_equal(back[number], ALL_BITS[number])
        assert np.all(np.isnan(value_of(back[~number], dtype)))


def test_subnormal_numbers_are_read_where_the_thread_takes_them_for_0():
    torch = pytest.importorskip("torch", reason="torch sets the processor to it")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot be set to it")
    try:
        found = read(ALL_BITS[:0x400], "float16")
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(found, np.arange(0x400) * 2.0**-24)


@pytest.mark.parametrize("dtype", FORMATS)
def test_writing_rounds_to_nearest_and_ties_to_even(dtype):
    infinite = FORMATS[dtype][3]
    exact = value_of(np.arange(infinite, dtype=np.uint16), dtype)
    ties = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    beyond = [FORMATS[dtype][2] * (1 + 2.0**-n) for n in range(5, 12)]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_001, dtype=np.uint32)
    bits = bits[(bits >> 23 & 0xFF) < 0xFF]
    x = np.concatenate(
        [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf)),
         np.minimum(beyond, np.finfo(np.float32).max).astype(np.float32), np.float32([np.inf, 1e-45]),
         bits.view(np.float32)]
    )  # fmt: skip
    x = np.concatenate([x, -x]).astype(np.float32)
    found = value_of(write(x, dtype), dtype)
    wanted = nearest(x.astype(np.float64), dtype)
    assert np.array_equal(found, wanted)
    assert np.array_equal(np.signbit(found), np.signbit(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 37])
def test_rows_are_scaled_and_may_have_gaps(dtype, count):
    x = np.random.default_rng(0).integers(-99, 99, 2 * count).astype(dtype)[::2]
    assert np.array_equal(read(x, dtype, dtype, 0.5), x * 0.5)
    assert np.array_equal(write(x, dtype, dtype, 0.25, step=3), x * 0.25)


@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(element, bad):
    inner = rows.all_finite(element)
    finite = callable_(lambda source, stride, count, length: inner(source, stride, count, length))
    x = np.full((5, 23), np.finfo(element).max, element)
    for row, column in ((0, 0), (4, 18), (2, 7)):
        y = x.copy()
        y[row, column] = bad
        assert not finite(y.ctypes.data, y.strides[0], 5, 19)
    x[:, 19:] = bad
    assert finite(x.ctypes.data, x.strides[0], 5, 19)
    assert finite(x.ctypes.data, x.strides[0], 0, 19)
