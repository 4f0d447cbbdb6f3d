"""Derivatives of expressions against finite differences in float64, and the choices where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import random_expressions as draw

import anyattn as aa
from anyattn import scores
from anyattn.describe import Options, describe
from anyattn.expr import nodes
from anyattn.expr.derive import derivative, gradient
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.nodes import SCORE, Aligned, Const, Expr, H, I, J, Load, load, rewrite, walk
from anyattn.expr.tables import table_of
from anyattn.expr.trace import trace_score

ROWS = np.array([0, 3, 17, 36])


def place(batch=draw.BATCH, heads=draw.HEADS, rows=ROWS, keys=draw.KEYS, offsets=draw.OFFSETS):
    """Where to evaluate: all batch entries, heads and keys, and a few rows."""
    row = np.asarray(rows)[:, None]
    symbols = {
        "b": np.arange(batch)[:, None, None, None],
        "h": np.arange(heads)[:, None, None],
        "row": row,
        "i": row + np.asarray(offsets)[:, None, None, None],
        "j": np.arange(keys),
    }
    return Tile(np, "cpu", np.int64, np.float64, symbols, 0, keys, np.asarray(rows))


TILE = place()
SHAPE = (draw.BATCH, draw.HEADS, len(ROWS), draw.KEYS)
RANDOM_SCORES = np.random.default_rng(0).standard_normal(SHAPE) * 2


def values(expr, score=RANDOM_SCORES, tile=TILE):
    with np.errstate(all="ignore"):
        return np.broadcast_to(evaluate(expr, tile, score), np.shape(score))


def difference(expr, variable, step, tile, score):
    """Central difference of fourth order in one node, and the size of what it subtracts."""

    def shifted(by):
        return values(rewrite(expr, lambda node: node + by if node is variable else node), score, tile)

    near = shifted(step), shifted(-step)
    far = shifted(2 * step), shifted(-2 * step)
    size = np.max(np.abs(near + far), axis=0)
    return (8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * step), size


def check(expr, variable, tile=TILE, score=RANDOM_SCORES):
    """The derivative, held to the differences wherever those of two steps agree; and how many do."""
    derived = derivative(expr, variable)
    with np.errstate(all="ignore"):
        wide, size = difference(expr, variable, 2e-3, tile, score)
        fine, _ = difference(expr, variable, 7e-4, tile, score)
        rounding = 1e-12 * size
        smooth = np.abs(wide - fine) <= 1e-7 * np.abs(fine) + 1e-8 + rounding
        error = np.abs(values(derived, score, tile) - fine)
        assert np.all(error[smooth] <= (1e-7 * np.abs(fine) + 1e-8 + rounding)[smooth]), (expr, variable)
    return derived, int(smooth.sum()), smooth.size


def reads(expr):
    return [n for n in walk(expr) if isinstance(n, (Load, Aligned)) and n.kind == "float"]


def numbers(expr):
    """Float constants, exponents apart: they are fixed in the structure."""
    powers = {id(n.args[1]) for n in walk(expr) if isinstance(n, nodes.Apply) and n.op == "pow"}
    return [n for n in walk(expr) if isinstance(n, Const) and n.kind == "float" and id(n) not in powers]


@pytest.mark.parametrize("block", range(8))
def test_random_scores_to_second_order(block):
    checked = smooth = second = 0
    for seed in range(30 * block, 30 * block + 30):
        expr = draw.random_score(seed, depth=4).expr()
        variables = [SCORE, *reads(expr)[:2], *numbers(expr)[:1]]
        for variable in variables:
            derived, good, of = check(expr, variable)
            smooth, checked = smooth + good, checked + of
            for other in (variable, SCORE):
                if any(node is other for node in walk(derived)):
                    _, good, of = check(derived, other)
                    smooth, checked, second = smooth + good, checked + of, second + 1
    assert second >= 10
    # The rest lies at jumps, kinks and poles, or is too curved for the steps.
    assert smooth >= 0.97 * checked


def bound(score_mod=None, heads=4, q_len=7, k_len=9, **options):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, heads, q_len, 4)), rng.standard_normal((2, heads, k_len, 4))
    score_mod = score_mod(q) if getattr(score_mod, "wants_queries", False) else score_mod
    return describe("attention", q, k, k, Options(score_mod=score_mod, **options)).score


def _relative_keys(q):
    return scores.relative_keys(q, np.random.default_rng(2).standard_normal((5, 4)))


_relative_keys.wants_queries = True
_table = np.random.default_rng(3).standard_normal((32, 32))
VOCABULARY = {
    "alibi": scores.alibi(4),
    "alibi of slopes": scores.alibi(np.array([0.5, 0.25, 0.1, 1.0])),
    "t5_bias": scores.t5_bias(_table[:, :4], True, 20),
    "t5_bias of a decoder": scores.t5_bias(_table[:, :4], False, 20),
    "relative_bias": scores.relative_bias(_table[:4, :7]),
    "relative_keys": _relative_keys,
    "softcap": scores.softcap(1.5),
    "from_function": scores.from_function(lambda s, b, h, i, j: aa.where(i > j, aa.sqrt(i - j) * s, s * s)),
    "sum": scores.alibi(4) + scores.softcap(2.0),
    "chain": scores.relative_bias(_table[:4, :7]).then(scores.softcap(2.0)),
}


@pytest.mark.parametrize("name", VOCABULARY)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "bias": _table[:7, :9]}], ids=["alone", "with softcap and bias"]
)
def test_vocabulary_to_second_order(name, options):
    expr = bound(VOCABULARY[name], **options)
    tile = place(2, 4, np.arange(7), 9, (2, 2))
    score = np.random.default_rng(4).standard_normal((2, 4, 7, 9)) * 2
    variables = [SCORE, *reads(expr)]
    assert "from_function" in name or "softcap" in name or len(variables) > 1
    for variable in variables:
        derived, smooth, of = check(expr, variable, tile, score)
        assert smooth == of
        for other in variables:
            _, smooth, of = check(derived, other, tile, score)
            assert smooth == of


TABLE = table_of(np.array([0.5, -1.5, 2.0, 0.25]), "table")


def test_gradient_names_every_read():
    once, again = load(TABLE, (H,)), load(TABLE, (J % 4,))
    unread = load(TABLE, (I % 4,))
    expr = SCORE * once + aa.tanh(again) + aa.floor(unread)
    found = gradient(expr)
    assert repr(found.score) == "table[h]"
    assert all(a is b for (a, _), b in zip(found.reads, (once, again), strict=True))
    np.testing.assert_array_equal(values(found.reads[0][1]), RANDOM_SCORES)
    # Reads where the derivative is 0 everywhere are left out.
    assert len(found.reads) == 2


def at(expr, score):
    """The value of a derivative at one score."""
    return float(values(expr, np.full(SHAPE, float(score)))[0, 0, 0, 0])


@pytest.mark.parametrize(
    ("function", "score", "first", "second"),
    [
        (lambda s: abs(s), 0.0, 0.0, 0.0),
        (lambda s: aa.minimum(s, 2 * s), 0.0, 1.5, 0.0),
        (lambda s: aa.maximum(s, 2 * s), 0.0, 1.5, 0.0),
        (lambda s: aa.clip(s, -1.0, 1.0), 1.0, 0.5, 0.0),
        (lambda s: aa.clip(s, -1.0, 1.0), 0.5, 1.0, 0.0),
        (lambda s: aa.clip(s, -1.0, 1.0), 3.0, 0.0, 0.0),
        (lambda s: aa.floor(s), 1.0, 0.0, 0.0),
        (lambda s: s // 2, 2.0, 0.0, 0.0),
        (lambda s: s % 2.0, 2.0, 1.0, 0.0),
        (lambda s: 7.0 % s, 2.0, -3.0, 0.0),
        (lambda s: aa.where(s > 0, s * s, -s), 0.0, -1.0, 0.0),
        (lambda s: aa.where(s >= 0, s * s, -s), 0.0, 0.0, 2.0),
        (lambda s: aa.sqrt(s), 0.0, math.inf, -math.inf),
        (lambda s: aa.sqrt(s * s), 0.0, 0.0, 0.0),
        (lambda s: aa.sqrt(0.0 * s), 1.0, 0.0, 0.0),
        (lambda s: aa.sqrt(1 + s * s), 0.0, 0.0, 1.0),
        (lambda s: s**0.5, 0.0, math.inf, -math.inf),
        (lambda s: (s * 0.0) ** 0.5, 1.0, 0.0, 0.0),
        (lambda s: s**0, 0.0, 0.0, 0.0),
        (lambda s: s**1, 0.0, 1.0, 0.0),
        (lambda s: s**2, 0.0, 0.0, 2.0),
        (lambda s: s**3, -2.0, 12.0, -12.0),
        (lambda s: 2.0**s, 3.0, 8 * math.log(2), 8 * math.log(2) ** 2),
        (lambda s: s**s, 1.0, 1.0, 2.0),
        (lambda s: s ** (0.0 * s), 0.0, 0.0, 0.0),
        (lambda s: aa.tanh(s), 400.0, 0.0, 0.0),
        (lambda s: aa.sigmoid(s), -800.0, 0.0, 0.0),
    ],
)
def test_choices_and_exact_values(function, score, first, second):
    expr = function(SCORE)
    once = derivative(expr, SCORE)
    assert at(once, score) == pytest.approx(first, rel=1e-14)
    assert at(derivative(once, SCORE), score) == pytest.approx(second, rel=1e-13)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, b, h, i, j: aa.where(i > j, aa.sqrt(i - j) * s, s),
        lambda s, b, h, i, j: aa.where(s > 0, aa.log(s), s),
        lambda s, b, h, i, j: aa.where(i != j, s / (i - j), s * s),
        lambda s, b, h, i, j: aa.sqrt(aa.where(s > 0, s, 0.0)),
        lambda s, b, h, i, j: aa.sqrt(aa.where(s > 0, s, 0.0) + aa.where(s > 1, s, 0.0)),
        lambda s, b, h, i, j: aa.where(s > 0, s, 0.0) ** 1.5,
        lambda s, b, h, i, j: aa.where(s > 0, s, 0.0) ** (0.0 * s),
        lambda s, b, h, i, j: aa.where(s > 0, s, 0.0) ** (1.0 + abs(s)),
        lambda s, b, h, i, j: aa.where(s < 0, aa.exp(1000 * s) * s, s),
        lambda s, b, h, i, j: aa.minimum(s, aa.exp(1000 * abs(s))),
        lambda s, b, h, i, j: aa.where(i > j, aa.where(s > 0, aa.log(s), 0.0), -s) * s,
    ],
)
def test_no_nan_from_what_is_not_picked(function):
    expr = trace_score(function)
    picked = np.isfinite(values(expr))
    assert picked.mean() > 0.4
    once = derivative(expr, SCORE)
    for found in (once, derivative(once, SCORE)):
        assert np.all(np.isfinite(values(found)[picked]))


def test_long_chains_stay_small():
    """Common parts are shared: a derivative grows as its expression does, not as its paths."""
    expr: Expr = SCORE
    for _ in range(20):
        expr = aa.clip(abs(expr) * 2.0, -1.0, 1.0)
    assert sum(1 for _ in walk(derivative(expr, SCORE))) < 20 * sum(1 for _ in walk(expr))


def test_every_operation_has_a_rule_or_gives_no_float():
    for op, rule in nodes.OPERATIONS.items():
        if rule.gives == "bool" or rule.takes == "bool":
            continue
        args = [SCORE + 1.5, SCORE + 2.5][: rule.arity]
        expr = nodes.apply(op, *([I > J] if op == "where" else []), *args)
        assert derivative(expr, SCORE).kind == "float"


def test_integers_have_no_derivative():
    expr = aa.where(SCORE > 0, I, J)
    assert repr(derivative(expr * 1.0, SCORE)) == "0.0"
    assert derivative(J * SCORE, SCORE).kind == "float"


def test_refusals():
    with pytest.raises(TypeError, match="variable: wanted a float, got i of kind int"):
        derivative(SCORE * I, I)
    deferred = scores.relative_keys(np.ones((1, 3, 2)), np.ones((3, 2))).expr
    with pytest.raises(TypeError, match="must be bound"):
        derivative(deferred, SCORE)
