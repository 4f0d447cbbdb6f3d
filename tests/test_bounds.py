"""Bounds of integers: sound for random expressions, exact for one operation, and what calls are refused."""

from __future__ import annotations

import itertools
import operator
from types import SimpleNamespace

import numpy as np
import pytest

import anyattn as aa
from anyattn import masks, scores
from anyattn.describe import Options, describe
from anyattn.expr import bounds, nodes
from anyattn.expr.bounds import check_constants, check_integers, fits, index_ranges
from anyattn.expr.functions import floor, where
from anyattn.expr.nodes import SCORE, Aligned, B, Const, H, I, J, Table, load
from anyattn.expr.print_cuda import cuda_source
from anyattn.expr.program import lower

INT32 = 2**31 - 1
SIZES = SimpleNamespace(batch_shape=(2, 3), num_heads=4, q_len=5, k_len=7, offset_host=np.array([-2, 11]))


def table(values, label="t", dtype=None):
    values = np.asarray(values, dtype)
    return Table(values, "int", values.ndim, (None,) * values.ndim, label, host=False)


def number(value):
    return Const(value, "int")


# What an operation gives, in Python's own integers.
MEANING = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": lambda x, y: x // y if y else 0,
    "mod": lambda x, y: x % y if y else 0,
    "minimum": min,
    "maximum": max,
    "where": lambda c, x, y: x if c else y,
    "neg": operator.neg,
    "abs": abs,
    "pow": pow,
}


def test_the_range_of_one_operation_is_exact():
    ranges = [(a, b) for a in range(-4, 5) for b in range(a, 5)]
    for op, (x, y) in itertools.product(
        ("add", "sub", "mul", "floordiv", "minimum", "maximum"), itertools.product(ranges, ranges)
    ):
        values = [MEANING[op](a, b) for a in range(x[0], x[1] + 1) for b in range(y[0], y[1] + 1)]
        got = bounds._computed(nodes.apply(op, I, J), [x, y])
        assert got == (min(values), max(values)), (op, x, y)
    for x in ranges:
        for op in ("neg", "abs"):
            values = [MEANING[op](a) for a in range(x[0], x[1] + 1)]
            assert bounds._computed(nodes.apply(op, I), [x]) == (min(values), max(values)), (op, x)
        for n in range(6):
            values = [a**n for a in range(x[0], x[1] + 1)]
            assert bounds._computed(I**n, [x, (n, n)]) == (min(values), max(values)), (n, x)


def test_the_range_of_a_remainder_is_never_too_small_and_at_most_a_divisor_wide():
    ranges = [(a, b) for a in range(-4, 5) for b in range(a, 5)]
    for x, y in itertools.product(ranges, ranges):
        values = [MEANING["mod"](a, b) for a in range(x[0], x[1] + 1) for b in range(y[0], y[1] + 1)]
        low, high = bounds._computed(I % J, [x, y])
        assert low <= min(values) <= max(values) <= high, (x, y)
        assert min(y[0] + 1, 0) <= low <= high <= max(y[1] - 1, 0), (x, y)


class Drawn:
    """A random integer expression and, from Python's integers, its value at a point."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.tables = [
            table([3, -(2**31), 17], "small", "int32"),
            table([2**40, -(2**62)], "wide"),
            table([2**32 - 1, 5], "unsigned", "uint32"),
        ]

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def __call__(self, depth):
        """(expression, function of {symbol: value} that gives the values of all its integer operations)."""
        form = self.pick(["leaf", *MEANING, "mul", "add"]) if depth else "leaf"
        if form == "leaf":
            return self.leaf()
        if form == "pow":
            x, n = self(depth - 1), self.pick([0, 1, 2, 3, 7])
            return x[0] ** n, self.values(form, x, (None, lambda at: (n, [])))
        arity = {"where": 2, "neg": 1, "abs": 1}.get(form, 2)
        args = [self(depth - 1) for _ in range(arity)]
        if form == "where":
            condition = I < J
            return where(condition, args[0][0], args[1][0]), self.values(
                form, (None, lambda at: (at["i"] < at["j"], [])), *args
            )
        return nodes.apply(form, *(x for x, _ in args)), self.values(form, *args)

    def values(self, form, *args):
        def value(at):
            found = [f(at) for _, f in args]
            own = MEANING[form](*(v for v, _ in found))
            return own, [own, *itertools.chain.from_iterable(below for _, below in found)]

        return value

    def leaf(self):
        kind = self.pick(["symbol", "symbol", "const", "table"])
        if kind == "symbol":
            symbol = self.pick([B, H, nodes.ROW, I, J])
            return symbol, lambda at: (at[symbol.name], [])
        if kind == "const":
            c = self.pick([0, 1, -1, 7, -13, 1000, 100_000, 2**31 - 1, -(2**33), 2**61])
            return number(c), lambda at: (c, [c])
        read, index = self.pick(self.tables), self.pick([H, J, B])
        last = len(read.value) - 1
        return load(read, (index,)), lambda at: (
            (v := int(read.value[min(at[index.name], last)])),
            [v],
        )


def points(rng, count):
    offsets = SIZES.offset_host
    for _ in range(count):
        row = int(rng.integers(SIZES.q_len))
        yield {
            "b": int(rng.integers(6)),
            "h": int(rng.integers(4)),
            "row": row,
            "i": row + int(offsets[rng.integers(2)]),
            "j": int(rng.integers(SIZES.k_len)),
        }


@pytest.mark.parametrize("bits", [32, 64])
def test_no_integer_of_what_is_taken_leaves_the_indices(bits):
    limit = {32: INT32, 64: 2**63 - 1}[bits]
    taken = refused = 0
    for seed in range(1500):
        drawn = Drawn(seed)
        expr, values = drawn(3)
        root = expr < J
        program = lower(root, None)
        proved = fits(program, index_ranges(SIZES), bits=bits)
        try:
            check_integers(root, SIZES, bits, "mask", "numpy")
        except ValueError:
            refused += 1
            assert not proved
            continue
        taken += 1
        assert proved
        for at in points(drawn.rng, 20):
            assert all(-limit - 1 <= v <= limit for v in values(at)[1]), root
    assert min(taken, refused) > 100, (taken, refused)


def test_ranges_of_the_indices():
    assert index_ranges(SIZES) == {"b": (0, 5), "h": (0, 3), "row": (0, 4), "i": (-2, 15), "j": (0, 6)}
    assert index_ranges(SIZES, past=10)["i"] == (-2, 25)
    assert index_ranges(SIZES, past=10)["j"] == (0, 16)
    unknown = SimpleNamespace(batch_shape=(), num_heads=1, q_len=5, k_len=7, offset_host=None)
    assert "i" not in index_ranges(unknown)
    assert index_ranges(unknown, unread_offset=(-5, 7))["i"] == (-5, 11)
    empty = SimpleNamespace(batch_shape=(0,), num_heads=0, q_len=0, k_len=0, offset_host=np.zeros(0, int))
    assert set(index_ranges(empty).values()) == {(0, 0)}


class TestFits:
    def test_the_vocabulary_fits_32_bits(self):
        ids = np.repeat(np.arange(4), 300)
        mask = masks.causal() & masks.sliding_window(512) | masks.global_tokens(64) | masks.documents(ids)
        score = scores.alibi(8).then(scores.relative_bias(np.zeros((8, 33), "f4")))
        x = np.zeros((2, 8, 1200, 4), "f4")
        call = describe(
            "attention", x, x, x, Options(mask=mask, score_mod=score, kv_lengths=[7, 9], q_offset=0)
        )
        program = lower(call.visible, call.score)
        assert fits(program, index_ranges(call))
        assert not fits(program, index_ranges(call), bits=11)

    @pytest.mark.parametrize(
        ("expr", "expected"),
        [
            (I * (INT32 // 15) >= J, True),
            (I * (INT32 // 15 + 1) >= J, False),
            (I % 2**40 >= J, False),
            (J < 2**31, False),
            (J < INT32, True),
            (load(table([5, INT32]), (J,)) == I, True),
            (load(table([5, INT32]), (J,)) + 1 == I, False),
            (load(table([5, 2**31]), (J,)) == I, False),
            (abs(load(table([-(2**31)]), (J,))) == I, False),
            (load(table([-(2**31)]), (J,)) == I, True),
            (load(table([2**32 - 1, 7], dtype="uint32"), (J,)) == I, False),
            (load(table([3], dtype="int8"), (J,)) * 2**24 == I, True),
            (Aligned(np.array([[2**31]]), "int", 1, "a", any_rank=False) > J, False),
            (Aligned(np.array([[2**30]]), "int", 1, "a", any_rank=False) > J, True),
            (Aligned(np.array([[True]]), "bool", 2**32, "a", any_rank=False), False),
            ((SCORE > 2.0**50) & (floor(SCORE) > 1e30), True),
        ],
    )
    def test_what_32_bits_hold(self, expr, expected):
        assert fits(lower(expr, None), index_ranges(SIZES)) is expected
        assert fits(lower(None, where(expr, SCORE, 0.0)), index_ranges(SIZES)) is expected

    def test_positions_that_are_not_known_are_not_assumed(self):
        sizes = SimpleNamespace(batch_shape=(), num_heads=1, q_len=5, k_len=7, offset_host=None)
        assert not fits(lower(I >= J, None), index_ranges(sizes))
        assert fits(lower(nodes.ROW >= J, None), index_ranges(sizes))
        assert fits(lower(I >= J, None), index_ranges(sizes, unread_offset=(-5, 7)))

    def test_lengths_beyond_32_bits_do_not_fit(self):
        sizes = SimpleNamespace(batch_shape=(), num_heads=1, q_len=5, k_len=2**31 + 1, offset_host=0)
        assert not fits(lower(nodes.ROW >= 2, None), index_ranges(sizes))

    def test_a_long_table_does_not_fit(self):
        long = np.broadcast_to(np.zeros(1, "i1"), (2**31,))
        assert not fits(lower(load(table(long), (J,)) > I, None), index_ranges(SIZES))
        assert fits(lower(load(table(long[:-1]), (J,)) > I, None), index_ranges(SIZES))


@pytest.mark.parametrize("expr", [I % 2**33 > J, I // -(2**31 + 1) > J])
def test_constants_of_the_code_are_held_to_its_indices(expr):
    program = lower(expr, None)
    with pytest.raises(ValueError, match="32-bit indices cannot hold the constant"):
        check_constants(program, 32)
    with pytest.raises(ValueError, match="32-bit indices cannot hold the constant"):
        cuda_source(program, "float32", index="int")
    check_constants(program, 64)
    assert "Index" in cuda_source(program, "float32")
    assert "Index" in cuda_source(lower(I % INT32 > J, None), "float32", index="int")


X = np.random.default_rng(0).standard_normal((1, 1, 64, 4)).astype("f4")
WIDE = np.array([2**63 + 5] * 64, "u8")


def bound(x=X, **options):
    call = describe("attention", x, x, x, Options(**options))
    return call.visible if call.score is None else call.score


class TestCalls:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"mask": lambda b, h, i, j: i + (2**63 - 1) >= j},
                r"mask: \(i \+ 9223372036854775807\) may be 9223372036854775807 to 9223372036854775870 in",
            ),
            (
                {"score_mod": lambda s, b, h, i, j: s + i**99},
                r"score_mod: \(i \*\* 99\) may be 0 to 2\*\*256 in",
            ),
            ({"score_mod": lambda s, b, h, i, j: s * -(i**11)}, r"\(i \*\* 11\) may be 0 to 2\*\*65 in"),
            ({"mask": lambda b, h, i, j: WIDE[j] > i}, r"mask: WIDE\[j\] may be 9223372036854775813 in"),
            ({"window": (5, None), "q_offset": 2**62 + 100}, r"q_offset: \(i - j\) may be "),
            (
                {"mask": lambda b, h, i, j: (i + i + i + i + i + i + i + i + i + i + i + i + i) * 2**60 > j},
                r"mask: \(\.\.\. \* 1152921504606846976\) may be",
            ),
        ],
    )
    def test_integers_beyond_int64_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            bound(**options)

    def test_the_error_names_the_limit(self):
        with pytest.raises(ValueError, match="may be") as caught:
            bound(mask=lambda b, h, i, j: i * 2**57 >= j)
        assert str(caught.value) == (
            "mask: (i * 144115188075855872) may be 0 to 9079256848778919936 in this call; wanted integers "
            "from -4611686018427387904 to 4611686018427387904, as the indices of numpy have 64 bits"
        )

    def test_a_table_is_held_to_its_values_not_to_its_dtype(self):
        ids = np.arange(64)
        steps = ids.astype("u8")
        bound(mask=lambda b, h, i, j: steps[j] * 2**50 > i * ids[i])
        ids[3] = 2**60
        with pytest.raises(ValueError, match=r"mask: \(i \* ids\[i\]\) may be 0 to 2\*\*65 in"):
            bound(mask=lambda b, h, i, j: steps[j] * 2**50 > i * ids[i])
        bound(mask=lambda b, h, i, j: ids[i] == ids[j])
        hashes = np.array([2**63 - 1, -(2**63)] * 32)
        assert aa.attention_weights(X, X, mask=masks.documents(hashes))[0, 0, 0, 1::2].max() == 0

    @pytest.mark.parametrize(
        ("condition", "seen"),
        [
            (lambda b, h, i, j: (j < 2**70) & (i >= -(2**70)) & (j < 2**70) & (i >= -(2**70)), True),
            (lambda b, h, i, j: (j > 2**70) | (i <= -(2**70)) | (j == 2**70) | (i > 2**70), False),
            (lambda b, h, i, j: (j != 2**70) & (j != 2**70), True),
        ],
    )
    def test_a_constant_beyond_all_indices_compares_as_it_should(self, condition, seen):
        weights = aa.attention_weights(X, X, mask=condition)
        assert bool((weights > 0).all()) is seen
        assert bool((weights == 0).all()) is not seen

    def test_the_largest_entries_of_a_table_are_not_beyond_constants(self):
        ends = np.array([2**63 - 1, -(2**63)] * 32)
        seen = aa.attention_weights(X, X, mask=lambda b, h, i, j: ends[j] > 2**80) > 0
        assert not seen.any()
        seen = aa.attention_weights(X, X, mask=lambda b, h, i, j: ends[j] <= -(2**63)) > 0
        np.testing.assert_array_equal(seen[0, 0], np.broadcast_to(ends < 0, (64, 64)))

    def test_an_index_beyond_all_reads_the_edge(self):
        t = np.array([1.0, 2.0, 5.0])

        def score(s, b, h, i, j):
            return s * 0 + aa.where(j > 0, t[aa.minimum(j, 0) + 2**61], t[j - 2**61])

        np.testing.assert_allclose(
            aa.attention_weights(X, X, score_mod=score)[0, 0, 3, :2],
            np.exp([1, 5]) / (np.e + 63 * np.exp(5)),
            1e-6,
        )

    def test_schedules_hold_up_to_the_limit(self):
        far = 2**62 - 64
        for mask in (
            lambda b, h, i, j: i + far >= j + far,
            lambda b, h, i, j: i - far >= j - far,
            lambda b, h, i, j: i * (2**56) - j * (2**56) >= 0,
            lambda b, h, i, j: (i + far) - far >= j,
        ):
            np.testing.assert_allclose(
                aa.attention(X, X, X, mask=mask, backend="reference"),
                aa.attention(X, X, X, causal=True, backend="reference"),
                rtol=1e-6,
            )


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self):
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        if jax.config.jax_enable_x64:
            pytest.skip("the indices of JAX have 64 bits here")
        return jax

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (
                lambda b, h, i, j: i * 40_000_000 >= j,
                r"mask: \(i \* 40000000\) may be 0 to 2520000000 in this call; wanted integers from",
            ),
            (
                lambda b, h, i, j: (i * 100_000) * (j + 30_000) % 5 < 2,
                r"mask: \(\(i \* 100000\) \* \(j \+ 30000\)\)",
            ),
            (lambda b, h, i, j: j % 2**40 < i, r"mask: 1099511627776 in \(j % 1099511627776\); wanted"),
            (
                masks.documents([2**40] * 64),
                "documents: ids: wanted integers of 32 bits, as the indices of jax",
            ),
        ],
    )
    def test_integers_beyond_int32_are_refused(self, jax, mask, message):
        with pytest.raises(ValueError, match=message):
            bound(jax.numpy.asarray(X), mask=mask)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda x: aa.attention(x, x, x, mask=mask))(X)

    def test_the_error_names_the_limit(self, jax):
        with pytest.raises(ValueError, match="may be") as caught:
            bound(jax.numpy.asarray(X), score_mod=lambda s, b, h, i, j: s + i**6)
        assert str(caught.value) == (
            "score_mod: (i ** 6) may be 0 to 62523502209 in this call; wanted integers from -2147483647 to "
            "2147483647, as the indices of jax have 32 bits; jax_enable_x64 gives them 64"
        )

    @pytest.mark.parametrize(
        "mask",
        [
            lambda b, h, i, j: (i * 100_000 * 300 + j) % 7 < 3,
            lambda b, h, i, j: (i * 1000) * (j + 30_000) % 5 < 2,
            lambda b, h, i, j: i * 34_000_000 >= j * 34_000_000,
        ],
    )
    def test_what_is_taken_means_what_it_means_in_int64(self, jax, mask):
        x = jax.numpy.asarray(X)
        weights = aa.attention_weights(X, X, mask=mask)
        np.testing.assert_allclose(aa.attention_weights(x, x, mask=mask), weights, atol=1e-6)
        np.testing.assert_allclose(aa.attention(x, x, x, mask=mask), weights @ X, atol=1e-5)

    def test_unsigned_tables_are_held_to_their_values(self, jax):
        large = jax.numpy.full(64, 4_000_000_000, "uint32")
        x = jax.numpy.asarray(X)
        with pytest.raises(ValueError, match=r"mask: large\[j\] may be 4000000000 in this call"):
            bound(x, mask=lambda b, h, i, j: large[j] > i)
        small = jax.numpy.arange(64, dtype="uint32")
        seen = aa.attention_weights(x, x, mask=lambda b, h, i, j: small[j] * 30_000_000 > i) > 0
        np.testing.assert_array_equal(seen[0, 0], np.broadcast_to(np.arange(64) > 0, (64, 64)))

    def test_what_cannot_be_read_is_trusted(self, jax):
        x = jax.numpy.asarray(X)

        def out(ids, offset):
            return aa.attention(x, x, x, mask=lambda b, h, i, j: ids[j] * 1000 + i >= j, q_offset=offset)

        ids = np.arange(64, dtype="i4")
        expected = aa.attention(X, X, X, mask=lambda b, h, i, j: ids[j] * 1000 + i >= j, q_offset=-3)
        np.testing.assert_allclose(jax.jit(out)(ids, -3), expected, atol=1e-5)

    def test_positions_that_cannot_be_read_are_those_about_the_keys(self, jax):
        x = jax.numpy.asarray(X)

        def out(offset, factor):
            return aa.attention(x, x, x, mask=lambda b, h, i, j: i * factor >= j, q_offset=offset)

        jax.jit(lambda offset: out(offset, 16_000_000))(0)
        with pytest.raises(ValueError, match=r"\(i \* 17000000\) may be -1088000000 to 2159000000"):
            jax.jit(lambda offset: out(offset, 17_000_000))(0)

    def test_wide_numbers_beside_floats_are_floats(self, jax):
        x = jax.numpy.asarray(X)

        def score(s, b, h, i, j):
            return aa.where(s < 2**50, s + j / 2**35, s - 2**40)

        np.testing.assert_allclose(
            aa.attention_weights(x, x, score_mod=score),
            aa.attention_weights(X, X, score_mod=score),
            atol=1e-6,
        )

    def test_constant_indices_beyond_all_read_the_edges(self, jax):
        x = jax.numpy.asarray(X)
        t = Table(jax.numpy.asarray([1.0, 3.0, 7.0]), "float", 1, (None,), "t", host=False)
        score = 0 * SCORE + where(J < 1, load(t, (number(2**40),)), load(t, (number(-(2**40)),)))
        weights = aa.attention_weights(x, x, score_mod=scores.Score(score, "edges"))
        np.testing.assert_allclose(weights[0, 0, 3, 0], np.exp(6) / (np.exp(6) + 63), rtol=1e-5)

    def test_a_table_longer_than_the_indices_is_refused(self, jax):
        long = np.broadcast_to(np.zeros(1, "f4"), (2**31 + 1,))
        table = Table(long, "float", 1, (None,), "long", host=True)
        with pytest.raises(ValueError, match=r"long: wanted at most 2\*\*31 entries"):
            bound(jax.numpy.asarray(X), score_mod=scores.Score(SCORE + load(table, (J,)), "long"))
