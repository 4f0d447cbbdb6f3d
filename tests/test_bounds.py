"""Bounds of integers: sound for random expressions, exact for one operation, and what calls are refused."""

from __future__ import annotations

import itertools
import operator
from types import SimpleNamespace

import numpy as np
import pytest

from anyattn import masks, scores
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
        sizes = SimpleNamespace(batch_shape=(2,), num_heads=8, q_len=1200, k_len=1200, offset_host=0)
        assert fits(lower(mask.expr, score.expr), index_ranges(sizes))

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
