"""The two products for few queries, when reading keys and values once is all the time there is (decoding).

With a lane for each query most lanes would be empty, so here lanes run along the channels: a vector of a key
or value is loaded once and meets `QUERIES` queries. Meaning and scratch memory are those of `microkernels`,
but for Q, which is (queries, head_dim), O, which is (queries, v_head_dim), and S and P where nothing but the
softmax asks for scores: (keys, `QUERIES`) for each `QUERIES` queries.

16-bit and int8 keys and values are widened in registers; int8 ones wait for their scales, which change scores
and weights, not rows. While scores are computed, the values of the same keys are fetched, and while these are
weighed, the keys of the next chunk: the processor's own prefetching ends with each row, and memory rests
while nothing is asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import cgutils, intrinsic
from anyattn_numba.microkernels import SPARE, outlined
from anyattn_numba.rows import ITEMSIZE
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT32, INT64, LINE, Vectors, fetch, offset

__all__ = [
    "MOST_QUERIES",
    "QUERIES",
    "narrow_score_kernel",
    "narrow_soften_kernel",
    "narrow_weigh_kernel",
    "suits",
]

# Queries at a time, and in all: beyond, a lane for each is faster.
QUERIES = 4
MOST_QUERIES = 8
# Vectors of channels of a value at a time.
_CHANNELS = 4
# The cache to fetch to: by way of the first, with few buffers for lines under way, 2 to 9 % less came in.
_CACHE = 2


def suits(shape: Shape, queries: int, head_dim: int, v_head_dim: int) -> bool:
    """Whether items of at most so many queries are computed here.

    Channels must fill whole vectors, and the state of the queries must fit into one.
    """
    whole = head_dim % shape.lanes == 0 and v_head_dim % shape.lanes == 0
    return whole and 0 < queries <= min(MOST_QUERIES, shape.lanes) and shape.lanes >= QUERIES


def _load(builder: Any, lanes: Vectors, dtype: str, address: Any) -> Any:
    """A vector of stored numbers in the accumulation type."""
    if dtype == lanes.element:
        return lanes.load(builder, address)
    if dtype == "int8":
        kind = ir.VectorType(ir.IntType(8), lanes.lanes)
        stored = builder.load(builder.inttoptr(address, kind.as_pointer()))
        stored.align = 1
        return builder.sitofp(builder.sext(stored, lanes.integer), lanes.type)
    kind = ir.VectorType(ir.IntType(16), lanes.lanes)
    stored = builder.load(builder.inttoptr(address, kind.as_pointer()))
    stored.align = 2
    wide = builder.zext(stored, lanes.integer)
    return builder.bitcast(builder.shl(wide, ir.Constant(lanes.integer, [16] * lanes.lanes)), lanes.type)


@contextmanager
def _steps(builder: Any, at: Any, end: Any, step: Any) -> Iterator[Any]:
    """A loop that advances the number at `at` by `step` while that stays within `end`."""
    test, body, done = (builder.append_basic_block(name) for name in ("test", "body", "done"))
    builder.branch(test)
    builder.position_at_end(test)
    now = builder.load(at)
    following = builder.add(now, step)
    builder.cbranch(builder.icmp_signed("<=", following, end), body, done)
    builder.position_at_end(body)
    yield now
    builder.store(following, at)
    builder.branch(test)
    builder.position_at_end(done)


@lru_cache
def narrow_score_kernel(shape: Shape, dtype: str, keys: int) -> Any:
    """score(key, key_stride, query, query_stride, head_dim, out, pitch, value, value_stride).

    The scores of `keys` keys with `QUERIES` queries, `pitch` bytes from key to key; `keys` times `QUERIES` is
    the number of lanes, or fewer. The values of these keys are fetched.
    """
    lanes = Vectors(shape.element, shape.lanes)
    stored = ITEMSIZE[dtype]

    def code(builder: Any, arguments: list[Any]) -> None:
        key, key_stride, query, query_stride, head_dim, out, pitch, value, value_stride = arguments
        sums = [cgutils.alloca_once(builder, lanes.type) for _ in range(lanes.lanes)]
        for sum_ in sums:
            builder.store(lanes.constant(0.0), sum_)

        def row(start: Any, stride: Any, number: int, at: Any) -> Any:
            return builder.add(builder.add(start, builder.mul(stride, ir.Constant(INT64, number))), at)

        with cgutils.for_range(
            builder, builder.udiv(head_dim, ir.Constant(INT64, lanes.lanes)), intp=INT64
        ) as loop:
            at = builder.mul(loop.index, ir.Constant(INT64, stored * lanes.lanes))
            queries = [
                lanes.load(
                    builder,
                    row(query, query_stride, q, builder.mul(loop.index, ir.Constant(INT64, lanes.nbytes))),
                )
                for q in range(QUERIES)
            ]
            for n in range(keys):
                part = _load(builder, lanes, dtype, row(key, key_stride, n, at))
                for q in range(QUERIES):
                    sum_ = sums[n * QUERIES + q]
                    builder.store(lanes.muladd(builder, part, queries[q], builder.load(sum_)), sum_)
            # Where a line holds several vectors, each step fetches those of some of the rows.
            steps = max(1, min(keys, LINE // (stored * lanes.lanes)))
            some = keys // steps
            line = builder.mul(builder.udiv(loop.index, ir.Constant(INT64, steps)), ir.Constant(INT64, LINE))
            first = builder.mul(builder.urem(loop.index, ir.Constant(INT64, steps)), ir.Constant(INT64, some))
            start = builder.add(value, builder.mul(first, value_stride))
            for n in range(some):
                fetch(builder, row(start, value_stride, n, line), cache=_CACHE)
        # Pairs of vectors are added crosswise until lane n of the last one is the sum of vector n.
        rows = [builder.load(sum_) for sum_ in sums]
        distance = 1
        while len(rows) > 1:
            own = [n if not n & distance else lanes.lanes + n - distance for n in range(lanes.lanes)]
            other = [n + distance if not n & distance else lanes.lanes + n for n in range(lanes.lanes)]
            rows = [
                builder.fadd(
                    builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT32, lanes.lanes), own)),
                    builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT32, lanes.lanes), other)),
                )
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
            distance *= 2
        part_type = ir.VectorType(lanes.scalar, QUERIES)
        for n in range(keys):
            picked = ir.Constant(ir.VectorType(INT32, QUERIES), [n * QUERIES + q for q in range(QUERIES)])
            part = builder.shuffle_vector(rows[0], ir.Constant(lanes.type, ir.Undefined), picked)
            at = builder.add(out, builder.mul(pitch, ir.Constant(INT64, n)))
            done = builder.store(part, builder.inttoptr(at, part_type.as_pointer()))
            done.align = lanes.itemsize

    call = outlined(f"narrow_score_{dtype}_{keys}", shape, 9, code)

    @intrinsic
    def score(
        typing_context: Any,
        key: Any,
        key_stride: Any,
        query: Any,
        query_stride: Any,
        head_dim: Any,
        out: Any,
        pitch: Any,
        value: Any,
        value_stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 9), call

    return score


@lru_cache
def narrow_weigh_kernel(shape: Shape, dtype: str) -> Any:
    """weigh(value, value_stride, channels, weights, pitch, keys, factor, out, out_stride, key, key_stride).

    For `QUERIES` queries, whose weights are `pitch` bytes from key to key. `channels` is a multiple of the
    lanes. As many rows at `key` are fetched.
    """
    lanes = Vectors(shape.element, shape.lanes)
    stored = ITEMSIZE[dtype]

    def some(builder: Any, vectors: int, arguments: list[Any]) -> None:
        value, value_stride, weights, pitch, keys, factor, out, out_stride, key, key_stride = arguments
        sums = [[cgutils.alloca_once(builder, lanes.type) for _ in range(vectors)] for _ in range(QUERIES)]

        def place(q: int, v: int) -> Any:
            start = builder.add(out, builder.mul(out_stride, ir.Constant(INT64, q)))
            return offset(builder, start, v * lanes.nbytes)

        for q, row in enumerate(sums):
            decay = lanes.broadcast(builder, offset(builder, factor, q * lanes.itemsize))
            for v, sum_ in enumerate(row):
                builder.store(builder.fmul(lanes.load(builder, place(q, v)), decay), sum_)
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            start = builder.add(value, builder.mul(loop.index, value_stride))
            parts = [
                _load(builder, lanes, dtype, offset(builder, start, v * stored * lanes.lanes))
                for v in range(vectors)
            ]
            here = builder.add(weights, builder.mul(loop.index, pitch))
            for q, row in enumerate(sums):
                weight = lanes.broadcast(builder, offset(builder, here, q * lanes.itemsize))
                for sum_, part in zip(row, parts, strict=True):
                    builder.store(lanes.muladd(builder, part, weight, builder.load(sum_)), sum_)
            ahead = builder.add(key, builder.mul(loop.index, key_stride))
            for n in range(0, vectors * stored * lanes.lanes, LINE):
                fetch(builder, offset(builder, ahead, n), cache=_CACHE)
        for q, row in enumerate(sums):
            for v, sum_ in enumerate(row):
                lanes.store(builder, builder.load(sum_), place(q, v))

    def code(builder: Any, arguments: list[Any]) -> None:
        value, value_stride, channels, weights, pitch, keys, factor, out, out_stride, key, key_stride = (
            arguments
        )
        at = cgutils.alloca_once_value(builder, ir.Constant(INT64, 0))
        for vectors in (_CHANNELS, 1):
            wide = ir.Constant(INT64, vectors * lanes.lanes)
            with _steps(builder, at, channels, wide) as c:
                some(
                    builder,
                    vectors,
                    [
                        builder.add(value, builder.mul(c, ir.Constant(INT64, stored))),
                        value_stride,
                        weights,
                        pitch,
                        keys,
                        factor,
                        builder.add(out, builder.mul(c, ir.Constant(INT64, lanes.itemsize))),
                        out_stride,
                        builder.add(key, builder.mul(c, ir.Constant(INT64, stored))),
                        key_stride,
                    ],
                )

    call = outlined(f"narrow_weigh_{dtype}", shape, 11, code)

    @intrinsic
    def weigh(
        typing_context: Any,
        value: Any,
        value_stride: Any,
        channels: Any,
        weights: Any,
        pitch: Any,
        keys: Any,
        factor: Any,
        out: Any,
        out_stride: Any,
        key: Any,
        key_stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 11), call

    return weigh


@lru_cache
def narrow_soften_kernel(shape: Shape) -> Any:
    """soften(scores, keys, before, largest, total, factor), as `soften_kernel`'s, for `QUERIES` queries.

    The scores of a key follow those of the one before, so a vector has those of several keys; there is room
    for a vector more behind them. `before` and `largest` become the largest score of all.
    """
    lanes = Vectors(shape.element, shape.lanes)
    part_type = ir.VectorType(lanes.scalar, QUERIES)

    def shuffled(builder: Any, x: Any, places: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(INT32, len(places)), places)
        return builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), mask)

    def load(builder: Any, address: Any) -> Any:
        part = builder.load(builder.inttoptr(address, part_type.as_pointer()))
        part.align = lanes.itemsize
        return shuffled(builder, part, [n % QUERIES for n in range(lanes.lanes)])

    def store(builder: Any, x: Any, address: Any) -> None:
        part = shuffled(builder, x, list(range(QUERIES)))
        builder.store(part, builder.inttoptr(address, part_type.as_pointer())).align = lanes.itemsize

    def joined(builder: Any, x: Any, join: Any) -> Any:
        """In each place, `join` of what all keys have there."""
        distance = QUERIES
        while distance < lanes.lanes:
            x = join(x, shuffled(builder, x, [(n + distance) % lanes.lanes for n in range(lanes.lanes)]))
            distance *= 2
        return x

    def code(builder: Any, arguments: list[Any]) -> None:
        scores, keys, before, largest, total, factor = arguments
        numbers = builder.mul(keys, ir.Constant(INT64, QUERIES * lanes.itemsize))
        lanes.store(builder, lanes.constant(float("-inf")), builder.add(scores, numbers))
        vectors = builder.udiv(
            builder.add(numbers, ir.Constant(INT64, lanes.nbytes - 1)), ir.Constant(INT64, lanes.nbytes)
        )
        top = cgutils.alloca_once_value(builder, lanes.constant(float("-inf")))
        with cgutils.for_range(builder, vectors, intp=INT64) as loop:
            at = builder.add(scores, builder.mul(loop.index, ir.Constant(INT64, lanes.nbytes)))
            builder.store(lanes.maximum(builder, lanes.load(builder, at), builder.load(top)), top)
        old = load(builder, before)
        new = joined(builder, builder.load(top), lambda x, y: lanes.maximum(builder, x, y))
        new = lanes.maximum(builder, new, old)
        # -inf - -inf is NaN.
        none = builder.fcmp_ordered("==", new, lanes.constant(float("-inf")))
        base = builder.select(none, lanes.constant(0.0), new)
        decay = lanes.exp(builder, builder.fsub(old, base), SPARE)
        sum_ = cgutils.alloca_once_value(builder, lanes.constant(0.0))
        with cgutils.for_range(builder, vectors, intp=INT64) as loop:
            at = builder.add(scores, builder.mul(loop.index, ir.Constant(INT64, lanes.nbytes)))
            weight = lanes.exp(builder, builder.fsub(lanes.load(builder, at), base), SPARE)
            lanes.store(builder, weight, at)
            builder.store(builder.fadd(builder.load(sum_), weight), sum_)
        summed = joined(builder, builder.load(sum_), builder.fadd)
        summed = builder.fadd(builder.fmul(load(builder, total), decay), summed)
        for x, address in ((new, before), (new, largest), (decay, factor), (summed, total)):
            store(builder, x, address)

    call = outlined("narrow_soften", shape, 6, code)

    @intrinsic
    def soften(
        typing_context: Any, scores: Any, keys: Any, before: Any, largest: Any, total: Any, factor: Any
    ) -> Any:
        return types.void(*[types.int64] * 6), call

    return soften
