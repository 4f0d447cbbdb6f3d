"""Expressions: tracing Python functions, kinds, captured arrays, and values that equal Python's."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

import anyattn as aa
from anyattn.errors import TraceError
from anyattn.expr import nodes
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.trace import trace_mask, trace_score

SLOPES = np.array([0.5, 0.25])


def values(expr, rows=range(-4, 5), keys=range(7), heads=2, score=0.0):
    """`expr` at every (h, i, j), through the array-API evaluator."""
    i = np.asarray(rows, dtype=np.int64)[:, None]
    symbols = {
        "b": np.zeros((1, 1, 1), dtype=np.int64),
        "h": np.arange(heads)[:, None, None],
        "row": i - i.min(),
        "i": i,
        "j": np.asarray(keys, dtype=np.int64),
    }
    tile = Tile(np, "cpu", np.int64, np.float64, symbols, 0, len(keys), None)
    shape = (heads, len(rows), len(keys))
    return np.broadcast_to(evaluate(expr, tile, np.full(shape, score)), shape)


def expected(function, rows=range(-4, 5), keys=range(7), heads=2):
    return np.array([[[function(0, h, i, j) for j in keys] for i in rows] for h in range(heads)])


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, i, j: (i - j) // 3 == -1,
        lambda b, h, i, j: (i - j) % 3 == 2,
        lambda b, h, i, j: (i - j) % -3 == -2,
        lambda b, h, i, j: (j <= i) & ~(j == 2) | (h == 1),
        lambda b, h, i, j: (j < i) ^ (h == 0),
        lambda b, h, i, j: (i**2 > j) == (j < 3),
        lambda b, h, i, j: abs(i) - -j != 4,
        lambda b, h, i, j: i + 2 * j <= 3,
    ],
)
def test_masks_mean_what_python_means(function):
    expr = trace_mask(function)
    assert expr.kind == "bool"
    # Python's ~ on a bool is not logical: compare through NumPy bools.
    plain = expected(lambda *index: function(*map(np.int64, index)))
    np.testing.assert_array_equal(values(expr), plain.astype(bool))


@pytest.mark.parametrize(
    ("traced", "plain"),
    [
        (
            lambda s, b, h, i, j: aa.where(j > i, j / (i + 10), -j),
            lambda b, h, i, j: j / (i + 10) if j > i else -j,
        ),
        (lambda s, b, h, i, j: aa.exp(-abs(i - j)), lambda b, h, i, j: math.exp(-abs(i - j))),
        (lambda s, b, h, i, j: aa.log(1 + abs(i)), lambda b, h, i, j: math.log(1 + abs(i))),
        (lambda s, b, h, i, j: aa.tanh(i * 0.1), lambda b, h, i, j: math.tanh(i * 0.1)),
        (lambda s, b, h, i, j: aa.sqrt(j), lambda b, h, i, j: math.sqrt(j)),
        (lambda s, b, h, i, j: aa.sigmoid(i), lambda b, h, i, j: 1 / (1 + math.exp(-i))),
        (lambda s, b, h, i, j: aa.floor(i / 3), lambda b, h, i, j: math.floor(i / 3)),
        (lambda s, b, h, i, j: aa.clip(i, -2, 1), lambda b, h, i, j: min(max(i, -2), 1)),
        (lambda s, b, h, i, j: aa.minimum(i, j) + aa.maximum(i, 2), lambda b, h, i, j: min(i, j) + max(i, 2)),
        (lambda s, b, h, i, j: SLOPES[h] * (i - j), lambda b, h, i, j: SLOPES[h] * (i - j)),
        (lambda s, b, h, i, j: 2.0 ** (i - j), lambda b, h, i, j: 2.0 ** (i - j)),
    ],
)
def test_scores_mean_what_python_means(traced, plain):
    np.testing.assert_allclose(values(trace_score(traced)), expected(plain), rtol=1e-14)


def test_sigmoid_of_large_scores_does_not_overflow():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = values(trace_score(lambda s, b, h, i, j: aa.sigmoid(s * 1000)), score=-5.0)
    assert np.all(found == 0)


def test_sigmoid_of_low_scores_keeps_its_digits():
    found = values(trace_score(lambda s, b, h, i, j: aa.log(aa.sigmoid(s))), score=-50.0)
    np.testing.assert_allclose(found, -50.0, rtol=1e-14)


class TestCapture:
    """Arrays reach an expression from wherever a function may hold them."""

    def check(self, function):
        bound = aa.attention_weights(np.ones((2, 3, 4)), np.ones((2, 3, 4)), score_mod=function, q_offset=0)
        logits = -np.array([0.5, 0.25])[:, None, None] * np.abs(np.arange(3)[:, None] - np.arange(3))
        p = np.exp(logits)
        np.testing.assert_allclose(bound, p / p.sum(-1, keepdims=True), rtol=1e-14)

    def test_global(self):
        self.check(lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j))

    def test_closure(self):
        slopes = SLOPES.copy()
        self.check(lambda s, b, h, i, j: s - slopes[h] * abs(i - j))

    def test_default(self):
        self.check(lambda s, b, h, i, j, slopes=SLOPES: s - slopes[h] * abs(i - j))

    def test_sequence(self):
        slopes = [0.5, 0.25]
        self.check(lambda s, b, h, i, j: s - slopes[h] * abs(i - j))

    def test_helper_function(self):
        def slope(h):
            return SLOPES[h]

        self.check(lambda s, b, h, i, j: s - slope(h) * abs(i - j))

    def test_partial(self):
        def score(s, b, h, i, j, slopes):
            return s - slopes[h] * abs(i - j)

        self.check(functools.partial(score, slopes=SLOPES))

    def test_two_axes_at_once_and_one_by_one(self):
        table = SLOPES[:, None] * np.arange(3)
        self.check(lambda s, b, h, i, j: s - table[h, abs(i - j)])
        self.check(lambda s, b, h, i, j: s - table[h][abs(i - j)])

    def test_parts_known_before_the_call(self):
        both = np.stack([np.zeros(2), SLOPES])
        self.check(lambda s, b, h, i, j: s - both[1][h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - aa.where(h == 0, SLOPES[0], SLOPES[1]) * abs(i - j))

    def test_size_of_a_captured_array(self):
        self.check(lambda s, b, h, i, j: s - SLOPES[h % len(SLOPES)] * abs(i - j) * (3 - SLOPES.shape[0]))

    def test_method(self):
        class Holder:
            def score(self, s, b, h, i, j):
                return s - SLOPES[h] * abs(i - j)

        self.check(Holder().score)

    def test_floor_may_index(self):
        self.check(lambda s, b, h, i, j: s - SLOPES[aa.floor(h / 1)] * abs(i - j))

    def test_out_of_range_reads_the_nearest_edge(self):
        table = np.array([1.0, 2.0, 3.0])
        got = aa.attention_weights(
            np.zeros((1, 5, 4)), np.zeros((1, 5, 4)), score_mod=lambda s, b, h, i, j: s + table[j - 1]
        )
        logits = np.array([1.0, 1.0, 2.0, 3.0, 3.0])
        np.testing.assert_allclose(got[0, 0], np.exp(logits) / np.exp(logits).sum(), rtol=1e-14)

    def test_the_function_itself_is_not_changed(self):
        slopes = SLOPES

        def score(s, b, h, i, j):
            return s - slopes[h]

        trace_score(score)
        assert score(1.0, 0, 1, 0, 0) == 0.75


class TestRefusals:
    """What cannot be traced is said with the line and what to write."""

    @pytest.mark.parametrize(
        ("function", "hint"),
        [
            (lambda s, b, h, i, j: s if i > j else -s, "aa.where"),
            (lambda s, b, h, i, j: s + max(i, j), "aa.maximum"),
            (lambda s, b, h, i, j: s * (i > j and i > 3), "`and`"),
            (lambda s, b, h, i, j: aa.where(0 < j < i, s, 0.0), "chained comparison"),
            (lambda s, b, h, i, j: s + math.exp(i), "aa.exp"),
            (lambda s, b, h, i, j: s + np.exp(i), "ufunc"),
            (lambda s, b, h, i, j: s + SLOPES, "index every axis"),
            (lambda s, b, h, i, j: s + SLOPES[s], "aa.floor"),
            (lambda s, b, h, i, j: s + SLOPES[h, i], "2 indices for an array of 1 axes"),
            (lambda s, b, h, i, j: s + "x", "builtins.str"),
        ],
    )
    def test_score(self, function, hint):
        with pytest.raises(TraceError, match="score_mod function") as error:
            trace_score(function)
        assert hint in str(error.value)
        assert "test_expressions.py" in str(error.value)

    def test_logic_on_numbers(self):
        with pytest.raises(TraceError, match="join conditions"):
            trace_mask(lambda b, h, i, j: i & j)

    def test_mask_that_gives_a_number(self):
        with pytest.raises(TraceError, match="gives int; wanted a condition"):
            trace_mask(lambda b, h, i, j: i - j)

    def test_score_that_gives_a_condition(self):
        with pytest.raises(TraceError, match="gives a condition; wanted a score"):
            trace_score(lambda s, b, h, i, j: i > j)

    def test_wrong_number_of_parameters(self):
        with pytest.raises(TraceError, match=r"could not be traced with \(b, h, i, j\)"):
            trace_mask(lambda i, j: i > j)


def test_repr_reads_like_code():
    assert (
        repr(trace_mask(lambda b, h, i, j: (j <= i) & ((i - j) % 4 == 0)))
        == "((j <= i) & (((i - j) % 4) == 0))"
    )
    assert (
        repr(trace_score(lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j)))
        == "(score - (SLOPES[h] * abs((i - j))))"
    )


def test_walk_visits_shared_nodes_once():
    shared = nodes.I + nodes.J
    root = shared * shared
    assert sum(node is shared for node in nodes.walk(root)) == 1
