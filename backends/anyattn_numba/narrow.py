"""The two products for few queries, when reading keys and values once is all the time there is (decoding).

With a lane for each query most lanes would be empty, so here lanes run along the channels: a vector of a key
or value is loaded once and meets `QUERIES` queries. Meaning and scratch memory are those of `microkernels`,
but for Q, which is (queries, head_dim), and O, which is (queries, v_head_dim).

16-bit and int8 keys and values are widened in registers; int8 ones wait for their scales, which change scores
and weights, not rows. While scores are computed, the values of the same keys and
the keys of the next chunk are fetched: the processor's own prefetching ends with each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import cgutils, intrinsic
from anyattn_numba.microkernels import outlined
from anyattn_numba.rows import ITEMSIZE
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT32, INT64, Vectors, fetch, offset

__all__ = ["MOST_QUERIES", "QUERIES", "narrow_score_kernel", "narrow_weigh_kernel", "suits"]

# Queries at a time, and in all: beyond, a lane for each is faster.
QUERIES = 4
MOST_QUERIES = 8
# Vectors of channels of a value at a time.
_CHANNELS = 4


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
    """score(key, key_stride, query, query_stride, head_dim, out, next_key, value, value_stride).

    The scores of `keys` keys with `QUERIES` queries; `keys` times `QUERIES` is the number of lanes, or fewer.
    What is at `next_key` and `value` is fetched.
    """
    lanes = Vectors(shape.element, shape.lanes)
    stored = ITEMSIZE[dtype]

    def code(builder: Any, arguments: list[Any]) -> None:
        key, key_stride, query, query_stride, head_dim, out, next_key, value, value_stride = arguments
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
                fetch(builder, row(value, value_stride, n, at))
                fetch(builder, row(next_key, key_stride, n, at))
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
            done = builder.store(
                part, builder.inttoptr(offset(builder, out, n * lanes.nbytes), part_type.as_pointer())
            )
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
        next_key: Any,
        value: Any,
        value_stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 9), call

    return score


@lru_cache
def narrow_weigh_kernel(shape: Shape, dtype: str) -> Any:
    """weigh(value, value_stride, channels, weights, keys, factor, out, out_stride) for `QUERIES` queries.

    `channels` is a multiple of the lanes. `weights` are (keys, lanes) and `factor` (lanes,): those of the
    queries come first.
    """
    lanes = Vectors(shape.element, shape.lanes)
    stored = ITEMSIZE[dtype]

    def some(builder: Any, vectors: int, arguments: list[Any]) -> None:
        value, value_stride, weights, keys, factor, out, out_stride = arguments
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
            here = builder.add(weights, builder.mul(loop.index, ir.Constant(INT64, lanes.nbytes)))
            for q, row in enumerate(sums):
                weight = lanes.broadcast(builder, offset(builder, here, q * lanes.itemsize))
                for sum_, part in zip(row, parts, strict=True):
                    builder.store(lanes.muladd(builder, part, weight, builder.load(sum_)), sum_)
        for q, row in enumerate(sums):
            for v, sum_ in enumerate(row):
                lanes.store(builder, builder.load(sum_), place(q, v))

    def code(builder: Any, arguments: list[Any]) -> None:
        value, value_stride, channels, weights, keys, factor, out, out_stride = arguments
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
                        keys,
                        factor,
                        builder.add(out, builder.mul(c, ir.Constant(INT64, lanes.itemsize))),
                        out_stride,
                    ],
                )

    call = outlined(f"narrow_weigh_{dtype}", shape, 8, code)

    @intrinsic
    def weigh(
        typing_context: Any,
        value: Any,
        value_stride: Any,
        channels: Any,
        weights: Any,
        keys: Any,
        factor: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 8), call

    return weigh
