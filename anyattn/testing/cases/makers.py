"""Python functions that cases give as `mask` and `score_mod`, for the library and for the oracle.

A maker takes the side's functions (`where`, `clip`, `exp`, ...) and its captured arrays; see `case.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Made = Callable[..., Any]


def every_third_key(_f: Any) -> Made:
    """Keys whose distance is a multiple of three, `%` of negative numbers included."""
    return lambda b, h, i, j: (i - j) % 3 == 0


def floored_blocks(_f: Any) -> Made:
    """Blocks of four aligned to position 0: wrong with truncating division where i or i - j is negative."""
    return lambda b, h, i, j: (i // 4 == j // 4) | ((i - j) // 4 == -1)


def modulo_of_negative_divisor(_f: Any) -> Made:
    """`%` takes the divisor's sign, as in Python."""
    return lambda b, h, i, j: (i - j) % -3 >= -1


def by_batch_and_head(_f: Any) -> Made:
    """Every index at once."""
    return lambda b, h, i, j: (b + 2 * h + i + j) % 4 != 0


def not_and_or(_f: Any) -> Made:
    """Comparisons and logic on booleans."""
    return lambda b, h, i, j: ~((j > i) & (j != 0)) | (abs(i - j) <= 1) ^ (h >= 1)


def constant_true(_f: Any) -> Made:
    """A mask that looks at no index."""
    return lambda b, h, i, j: True


def looked_up(_f: Any, table: Any) -> Made:
    """A captured boolean table."""
    return lambda b, h, i, j: table[h, j]


def halve_far_keys(f: Any) -> Made:
    """`where` in a score."""
    return lambda score, b, h, i, j: f.where(abs(i - j) > 3, score * 0.5, score)


def slope(_f: Any, slopes: Any) -> Made:
    """ALiBi as a user writes it."""
    return lambda score, b, h, i, j: score - slopes[h] * abs(i - j)


def off_the_table(_f: Any, table: Any) -> Made:
    """Indices below 0 and beyond the end: a captured array never wraps, it reads its edge."""
    return lambda score, b, h, i, j: score + table[h, i - j + 2]


def off_the_table_by_batch(_f: Any, table: Any) -> Made:
    """The same along every axis."""
    return lambda score, b, h, i, j: score + table[b - 1, h + 1, j * 2 - 5]


def floored_score(_f: Any) -> Made:
    """Integer division and remainder of negative numbers as values."""
    return lambda score, b, h, i, j: score + (i - j) // 3 * 0.25 + (j - i) % 4 * 0.125


def everything_offered(f: Any) -> Made:
    """Each function that a traced function may call."""

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        distance = f.sqrt(abs(i - j) + 1.0)
        bent = f.tanh(score) + f.sigmoid(score) + f.exp(f.minimum(score, 2.0) * 0.25)
        steps = f.floor(distance) - f.maximum(f.clip(j - i, -2, 2), 0) + f.log(distance)
        return f.where(h == 0, bent, score) - steps * 0.125

    return score_mod


def quadratic(_f: Any) -> Made:
    """A slope other than one, for derivatives."""
    return lambda score, b, h, i, j: score * (1.0 + 0.1 * score)


def affine(_f: Any, factor: Any, shift: Any) -> Made:
    """Two captured float arrays, one multiplied with the score."""
    return lambda score, b, h, i, j: score * factor[h] + shift[j]


def minus_infinity(f: Any) -> Made:
    """Hides keys by score instead of by mask."""
    return lambda score, b, h, i, j: f.where((j > i) | (i == 2), -float("inf"), score)


def to_float(_f: Any, table: Any) -> Made:
    """A captured integer array in arithmetic with the score."""
    return lambda score, b, h, i, j: score + table[j] * 0.5


def number(_f: Any) -> Made:
    """Not a mask: a number where a truth value is wanted."""
    return lambda b, h, i, j: i - j


def squares(_f: Any) -> Made:
    """A feature map: squares, never 0."""
    return lambda x: x * x + 0.25
