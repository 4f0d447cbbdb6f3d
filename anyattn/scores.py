"""Score modifications: what is done to scale * (q . k) before the softmax, as small expressions.

A score is a function s -> f(s) that may depend on the batch entry b, the query head h, the position i and the
key j. `(f + g)(s) = f(s) + g(s) - s` adds what each adds; `f.then(g)(s) = g(f(s))` chains. Every entry takes
`positions=False` where it uses i, to measure from the row number instead of the position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.expr.functions import clip, tanh, where
from anyattn.expr.nodes import ROW, SCORE, Deferred, Expr, H, I, J, Symbol, load, rewrite
from anyattn.expr.tables import table_of
from anyattn.numbers import boolean, integer, is_integer, real

if TYPE_CHECKING:
    from anyattn.expr.bind import Geometry
    from anyattn.expr.trace import Read

__all__ = [
    "Score",
    "alibi",
    "from_function",
    "relative_bias",
    "relative_bias_2d",
    "relative_keys",
    "softcap",
    "t5_bias",
]


class Score:
    """A score modification; made by the functions of `anyattn.scores`, combined with `+` and `then`."""

    __slots__ = ("_words", "expr", "reads")
    __array_ufunc__ = None

    def __init__(self, expr: Expr, words: str, reads: tuple[Read, ...] = ()):
        self.expr = expr
        # Arrays, with their names, whose values were read while a function was traced.
        self.reads = reads
        self._words = words

    def __repr__(self) -> str:
        return self._words

    def __add__(self, other: Any) -> Score:
        other = as_score(other)
        words = f"{self!r} + {other!r}"
        return Score(self.expr + other.expr - SCORE, words, self.reads + other.reads)

    def __radd__(self, other: Any) -> Score:
        return as_score(other) + self

    def then(self, other: Any) -> Score:
        """The score `other(self(s))`."""
        other = as_score(other)
        first = f"({self!r})" if " + " in self._words else repr(self)
        words = f"{first}.then({other!r})"
        return Score(substitute_score(other.expr, self.expr), words, self.reads + other.reads)


def as_score(value: Any) -> Score:
    """A `Score` from a score or a function (score, b, h, i, j) -> score."""
    if isinstance(value, Score):
        return value
    if callable(value) and not arrays.is_array(value):
        return from_function(value)
    raise TypeError(
        f"score_mod: wanted a score of anyattn.scores or a function (score, b, h, i, j) -> score, "
        f"got {type(value).__name__}"
    )


def substitute_score(outer: Expr, inner: Expr) -> Expr:
    """`outer` with `inner` in the place of the score."""
    return rewrite(outer, lambda node: inner if isinstance(node, Symbol) and node.name == "score" else node)


def alibi(slopes: int | Sequence[float] | Array, *, positions: bool = True) -> Score:
    """s - slope_h * abs(i - j) (Press et al., "Train Short, Test Long", 2022).

    Parameters
    ----------
    slopes : int or sequence or float array of shape (Hq,)
        A slope for each query head, or the number of query heads for the paper's slopes: 2**(-8 / n), 2**(-16
        / n), ... for n heads, n a power of two; other counts take those of the next lower power of two, then
        every second one of twice that power, as the paper's code does.
    """
    words = f"alibi({slopes if is_integer(slopes) else '<slopes>'})"
    if is_integer(slopes):
        slopes = _paper_slopes(integer(slopes, "alibi: slopes", least=1))
    table = table_of(slopes, "alibi: slopes", ("h",))
    if table.kind == "bool":
        raise TypeError("alibi: slopes: wanted real numbers, got bool")
    return Score(SCORE - load(table, (H,)) * abs(_query(positions) - J), words)


def t5_bias(table: Array, bidirectional: bool, max_distance: int, *, positions: bool = True) -> Score:
    """s + table[bucket(j - i), h] (Raffel et al., "T5", 2020, section 2.1).

    Parameters
    ----------
    table : float array, shape (buckets, Hq)
        The weights of the model's relative attention bias.
    bidirectional : bool
        Whether keys after the query have buckets of their own (an encoder); otherwise they share bucket 0.
    max_distance : int
        Distance from which on all keys share the last bucket.
    """
    weights = table_of(table, "t5_bias: table", (None, "h"))
    if weights.kind != "float":
        raise TypeError(f"t5_bias: table: wanted a float array of shape (buckets, Hq), got {weights.kind}")
    bidirectional = boolean(bidirectional, "t5_bias: bidirectional")
    buckets = int(weights.value.shape[0])
    if bidirectional and buckets % 2:
        raise ValueError(
            f"t5_bias: table: wanted an even number of buckets for both directions, got {buckets}"
        )
    max_distance = integer(max_distance, "t5_bias: max_distance", least=1)
    one_side = buckets // 2 if bidirectional else buckets
    if max_distance <= one_side // 2:
        raise ValueError(
            f"t5_bias: max_distance: wanted more than the {one_side // 2} distances that have "
            f"a bucket of their own, got {max_distance}"
        )
    nearest = table_of(_t5_buckets(one_side, max_distance), "t5_bias buckets")
    distance = J - _query(positions)
    # A table read clamps: distances beyond the last entry share its bucket, negative ones share bucket 0.
    bucket: Expr = load(nearest, (abs(distance) if bidirectional else -distance,))
    if bidirectional:
        bucket = bucket + where(distance > 0, one_side, 0)
    shown = f"<table {tuple(weights.value.shape)}>, {bidirectional}, {max_distance}"
    return Score(SCORE + load(weights, (bucket, H)), f"t5_bias({shown})")


def relative_bias(table: Array, *, positions: bool = True) -> Score:
    """s + table[h, clip(i - j, -R, R) + R], with table of shape (Hq, 2R + 1)."""
    weights = table_of(table, "relative_bias: table", ("h", None))
    if weights.kind != "float":
        raise TypeError(f"relative_bias: table: wanted a float array, got {weights.kind}")
    reach = _reach(weights.value.shape[1], "relative_bias: table", "(Hq, 2R + 1)")
    distance = clip(_query(positions) - J, -reach, reach) + reach
    return Score(SCORE + load(weights, (H, distance)), f"relative_bias(<table {tuple(weights.value.shape)}>)")


def relative_bias_2d(table: Array, width: int, *, positions: bool = True) -> Score:
    """s + table[h, clip(y_i - y_j, -Ry, Ry) + Ry, clip(x_i - x_j, -Rx, Rx) + Rx] of the pixels of an image.

    Token n is the pixel (y, x) = (n // width, n % width). (Liu et al., "Swin Transformer", 2021: there Ry and
    Rx are the height and width of a window less one, so nothing is clipped.)

    Parameters
    ----------
    table : float array, shape (Hq, 2 Ry + 1, 2 Rx + 1)
    width : int
        Pixels in a row.
    positions : bool, default True
        Count i from the position; False: from the row.
    """
    weights = table_of(table, "relative_bias_2d: table", ("h", None, None))
    if weights.kind != "float":
        raise TypeError(f"relative_bias_2d: table: wanted a float array, got {weights.kind}")
    width = integer(width, "relative_bias_2d: width", least=1)
    reach = [
        _reach(size, "relative_bias_2d: table", "(Hq, 2 Ry + 1, 2 Rx + 1)")
        for size in weights.value.shape[1:]
    ]
    i = _query(positions)
    apart = (i // width - J // width, i % width - J % width)
    at = [clip(distance, -far, far) + far for distance, far in zip(apart, reach, strict=True)]
    words = f"relative_bias_2d(<table {tuple(weights.value.shape)}>, {width})"
    return Score(SCORE + load(weights, (H, *at)), words)


def relative_keys(
    q: Array, table: Array, scale: float | None = None, *, positions: bool = True, layout: str = "bhld"
) -> Score:
    """s + scale * q . table[clip(j - i, -R, R) + R] (Shaw et al., "Relative Position Representations", 2018).

    Parameters
    ----------
    q : float array, shape (..., Hq, Lq, D)
        The queries of the call, in its `layout`. A function of `anyattn.compile` takes those of each call by
        the name `q`.
    table : float array, shape (2R + 1, D)
        A key vector for each relative position -R, ..., R.
    scale : float, optional
        Default 1 / sqrt(D), as `attention` scales.
    """
    for name, x in (("q", q), ("table", table)):
        if not arrays.is_array(x) or arrays.kind(x) != "float":
            raise TypeError(f"relative_keys: {name}: wanted a float array, got {type(x).__name__}")
    if layout not in ("bhld", "blhd"):
        raise ValueError(f"relative_keys: layout: wanted 'bhld' or 'blhd', got {layout!r}")
    if table.ndim != 2 or q.ndim < 2 or table.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"relative_keys: wanted q (..., Hq, Lq, D) and table (2R + 1, D), "
            f"got {tuple(q.shape)} and {tuple(table.shape)}"
        )
    reach = _reach(table.shape[0], "relative_keys: table", "(2R + 1, D)")
    factor = 1 / math.sqrt(table.shape[-1]) if scale is None else real(scale, "relative_keys: scale")
    i = _query(positions)
    inner = ("row", "h") if layout == "blhd" else ("h", "row")
    axes = (*(None for _ in q.shape[:-3]), *(inner if q.ndim > 2 else ("row",)), None)
    # Both take part in a product that only the call can make, and neither is read by index before.
    held = (
        table_of(q, "relative_keys: q", axes, fixed=""),
        table_of(table, "relative_keys: table"),
    )

    def rows_of(xp: Namespace, q: Array) -> Array:
        queries = arrays.moveaxis(xp, q, -3, -2) if layout == "blhd" and q.ndim > 2 else q
        return xp.expand_dims(queries, axis=0) if queries.ndim == 2 else queries

    def derive(xp: Namespace, accumulate: str, q: Array, table: Array) -> Array:
        wide = getattr(xp, accumulate)
        queries = arrays.cast(xp, rows_of(xp, q), wide) * factor
        return xp.matmul(queries, xp.permute_dims(arrays.cast(xp, table, wide), (1, 0)))

    def settle(geometry: Geometry, q: Array, table: Array, products: Array | None = None) -> Expr:
        from anyattn.expr.bind import batch_indices, check_same_place

        check_same_place(q, "relative_keys: q", geometry)
        check_same_place(table, "relative_keys: table", geometry)
        queries = rows_of(geometry.xp, q)
        batch = queries.shape[:-3]
        full = geometry.batch_shape
        fits = len(batch) <= len(full) and all(
            n in (1, m) for n, m in zip(reversed(batch), reversed(full), strict=False)
        )
        wanted = (geometry.num_heads, geometry.q_len, table.shape[-1])
        if not fits or queries.shape[-3:] != wanted:
            raise ValueError(
                f"relative_keys: q: wanted the queries of the call, of shape {(*full, *wanted)}, "
                f"got {tuple(queries.shape)}"
            )
        if products is None:
            products = derive(geometry.xp, geometry.accumulate, q, table)
        read = table_of(products, "relative_keys")
        distance = clip(J - i, -reach, reach) + reach
        return load(read, (*batch_indices(tuple(batch), full), H, ROW, distance))

    label = f"relative_keys(<q {tuple(q.shape)}>, <table {tuple(table.shape)}>)"
    return Score(SCORE + Deferred(settle, "float", (H, ROW, i, J), label, held, derive=derive), label)


def softcap(c: float) -> Score:
    """c * tanh(s / c) (Gemma 2, 2024)."""
    c = soft_cap(c, "softcap: c")
    # A division takes a kernel as long as all of tanh; 1 / c may be infinite in float32 where c is tiny.
    return Score(c * tanh(SCORE * (1 / c) if c > 1e-30 else SCORE / c), f"softcap({c})")


def from_function(function: Callable[..., Any]) -> Score:
    """A score from a Python function (score, b, h, i, j) -> score, which is called once, with symbols."""
    from anyattn.expr.trace import trace_score, words

    reads: list[Read] = []
    expr = trace_score(function, reads)
    return Score(expr, f"from_function({words(function, expr)})", tuple(reads))


def soft_cap(c: Any, label: str) -> float:
    """A soft cap, checked."""
    cap = real(c, label)
    if cap <= 0:
        raise ValueError(f"{label}: wanted a positive number, got {cap} (no softcap leaves scores alone)")
    return cap


def _query(positions: bool) -> Expr:
    return I if boolean(positions, "positions") else ROW


def _reach(entries: int, label: str, shape: str) -> int:
    if entries % 2 == 0:
        raise ValueError(f"{label}: wanted shape {shape}, an odd number of relative positions, got {entries}")
    return entries // 2


def _paper_slopes(heads: int) -> list[float]:
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]


def _t5_buckets(buckets: int, max_distance: int) -> list[int]:
    """Bucket of each distance 0, 1, ..., up to the first that reads the last bucket.

    The paper's bucket is e + floor(log(d / e) / log(m / e) * (n - e)) with e = n // 2 exact buckets of n and
    m the greatest distance; compared in integers, so that no rounding of a logarithm moves an edge.
    """
    exact = buckets // 2
    bucket, found = 0, []
    for distance in range(max_distance + 1):
        if distance <= exact:
            bucket = min(distance, buckets - 1)
        while (
            bucket + 1 < buckets
            and distance > exact
            and _reaches(distance, bucket + 1 - exact, exact, buckets - exact, max_distance)
        ):
            bucket += 1
        found.append(bucket)
    return found


def _reaches(distance: int, step: int, exact: int, steps: int, max_distance: int) -> bool:
    """Whether log(distance / exact) / log(max_distance / exact) * steps >= step."""
    return bool(distance**steps * exact**step >= max_distance**step * exact**steps)
