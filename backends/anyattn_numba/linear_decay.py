"""What order and decays do to weights in a chunk of linear attention: they fade from key to query.

A token t keeps a[t] = exp(decay) of each channel, so a key j weighs q[t] . (a[j+1] ... a[t] k[j]) for it.
Queries are taken from the first to the last, and before query t all earlier keys are multiplied by a[t]:
factors are multiplied as the recurrence multiplies them, never divided, so that strong decays neither
overflow nor cost digits, and 0 forgets. At the end keys have faded to the end of the chunk.

A product that is nearly subnormal becomes 0: arithmetic with subnormal numbers takes a hundred times as long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import carray, cgutils, compiled, intrinsic
from anyattn_numba.memory import pointer
from anyattn_numba.microkernels import accumulators, by_vectors
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT64, Vectors, offset

__all__ = ["fade_kernel", "seen_kernel", "since_kernel"]

# Upper bits of an exponent, and the least number that has one of them.
_UPPER = {"float32": 0xF0, "float64": 0x7F0}
_LEAST = {"float32": 2.0**-111, "float64": 2.0**-1007}
_SUMS = 4


@lru_cache
def seen_kernel(shape: Shape) -> Any:
    """seen(vectors, weights, row, kept, factors, first, count, strict, left): what rows see of some lanes.

    A lane is a key, number 0 the first, and queries `first` to `count` are rows of `weights`, `row` bytes
    apart, from the address of query 0. A weight is multiplied by its query's factor and by what the tokens
    after the key keep up to the query; it is 0 where the key comes later, or is the query's own if `strict`.
    `left` becomes what is kept of each key at the end.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        weights, row, kept, factors, first, count, strict, left = arguments
        none, one = lanes.constant(0.0), lanes.constant(1.0)
        fades = [cgutils.alloca_once(builder, lanes.type) for _ in range(vectors)]
        for fade in fades:
            builder.store(none, fade)
        loosely = builder.icmp_signed("==", strict, ir.Constant(INT64, 0))
        loosely = _everywhere(builder, lanes, loosely)
        step = ir.Constant(INT64, 1)
        with cgutils.for_range_slice(builder, first, count, step, intp=INT64) as (query, _):
            earlier, own = (_lanes(builder, lanes, vectors, sign, query) for sign in ("<", "=="))
            number = builder.mul(query, ir.Constant(INT64, lanes.itemsize))
            now = lanes.broadcast(builder, builder.add(kept, number))
            factor = lanes.broadcast(builder, builder.add(factors, number))
            here = builder.add(weights, builder.mul(query, row))
            for v, fade in enumerate(fades):
                at = offset(builder, here, v * lanes.nbytes)
                faded = _kept(builder, lanes, builder.fmul(builder.load(fade), now))
                faded = builder.select(own[v], one, faded)
                builder.store(faded, fade)
                weight = builder.fmul(builder.fmul(lanes.load(builder, at), factor), faded)
                visible = builder.or_(earlier[v], builder.and_(own[v], loosely))
                lanes.store(builder, builder.select(visible, weight, none), at)
        for v, fade in enumerate(fades):
            lanes.store(builder, builder.load(fade), offset(builder, left, v * lanes.nbytes))

    call = by_vectors("seen", shape, 8, code)

    @intrinsic
    def seen(
        typing_context: Any,
        vectors: Any,
        weights: Any,
        row: Any,
        kept: Any,
        factors: Any,
        first: Any,
        count: Any,
        strict: Any,
        left: Any,
    ) -> Any:
        return types.void(*[types.int64] * 9), call

    return seen


@lru_cache
def fade_kernel(shape: Shape) -> Any:
    """fade(vectors, keys, row, kept, query, head_dim, lane, out), a decay for each channel.

    keys[d, lanes before `lane`] *= kept[d], then out = sum over d of query[d] keys[d, :]; a lane is a key,
    and the rows of `keys` are `row` bytes apart.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        keys, row, kept, query, head_dim, lane, out = arguments
        earlier = _lanes(builder, lanes, vectors, "<", lane)
        # More than one sum, or each would wait for the one before.
        sums = accumulators(builder, lanes, _SUMS, vectors)
        for total in sums:
            for sum_ in total:
                builder.store(lanes.constant(0.0), sum_)

        def add_channel(d: Any, total: list[Any]) -> None:
            step = builder.mul(d, ir.Constant(INT64, lanes.itemsize))
            factor = lanes.broadcast(builder, builder.add(kept, step))
            channel = lanes.broadcast(builder, builder.add(query, step))
            here = builder.add(keys, builder.mul(d, row))
            for v, sum_ in enumerate(total):
                at = offset(builder, here, v * lanes.nbytes)
                before = lanes.load(builder, at)
                faded = _kept(builder, lanes, builder.fmul(before, factor))
                after = builder.select(earlier[v], faded, before)
                lanes.store(builder, after, at)
                builder.store(lanes.muladd(builder, after, channel, builder.load(sum_)), sum_)

        one, most = ir.Constant(INT64, 1), ir.Constant(INT64, _SUMS)
        whole = builder.sub(head_dim, builder.urem(head_dim, most))
        with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), whole, most, intp=INT64) as (d, _):
            for n, total in enumerate(sums):
                add_channel(builder.add(d, ir.Constant(INT64, n)), total)
        with cgutils.for_range_slice(builder, whole, head_dim, one, intp=INT64) as (d, _):
            add_channel(d, sums[0])
        for v in range(vectors):
            found = builder.load(sums[0][v])
            for total in sums[1:]:
                found = builder.fadd(found, builder.load(total[v]))
            lanes.store(builder, found, offset(builder, out, v * lanes.nbytes))

    call = by_vectors("fade", shape, 7, code)

    @intrinsic
    def fade(
        typing_context: Any,
        vectors: Any,
        keys: Any,
        row: Any,
        kept: Any,
        query: Any,
        head_dim: Any,
        lane: Any,
        out: Any,
    ) -> Any:
        return types.void(*[types.int64] * 8), call

    return fade


@lru_cache
def since_kernel(element: str) -> Any:
    """since(kept, channels, count, out): out[t] = kept[0] ... kept[t], both (count, channels)."""
    kind, least = getattr(types, element), _LEAST[element]

    @compiled
    def since(kept: int, channels: int, count: int, out: int) -> None:
        factors = carray(pointer(kept), (count, channels), kind)
        products = carray(pointer(out), (count, channels), kind)
        tiny, none = kind(least), kind(0)
        for d in range(channels):
            products[0, d] = factors[0, d]
        for t in range(1, count):
            for d in range(channels):
                found = products[t - 1, d] * factors[t, d]
                products[t, d] = none if found < tiny else found

    return since


def _lanes(builder: Any, lanes: Vectors, vectors: int, comparison: str, lane: Any) -> list[Any]:
    """Which lanes of so many vectors compare to a lane; numbers of lanes are floats, as what is chosen."""
    one = lanes.splat(builder, builder.sitofp(lane, lanes.scalar))
    numbers = (
        ir.Constant(lanes.type, [float(v * lanes.lanes + n) for n in range(lanes.lanes)])
        for v in range(vectors)
    )
    return [builder.fcmp_ordered(comparison, number, one) for number in numbers]


def _everywhere(builder: Any, lanes: Vectors, flag: Any) -> Any:
    """A truth value in every lane."""
    number = builder.uitofp(flag, lanes.scalar)
    return builder.fcmp_ordered("!=", lanes.splat(builder, number), lanes.constant(0.0))


def _kept(builder: Any, lanes: Vectors, value: Any) -> Any:
    """`value`, 0 where it is nearly subnormal: where the exponent has none of its upper bits."""
    bits = ir.Constant(lanes.integer, [_UPPER[lanes.element] << lanes.mantissa] * lanes.lanes)
    none = ir.Constant(lanes.integer, None)
    found = builder.and_(builder.bitcast(value, lanes.integer), bits)
    return builder.select(builder.icmp_signed("==", found, none), lanes.constant(0.0), value)
