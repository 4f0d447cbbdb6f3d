"""What decays cost a chunk of linear attention: weights that fade from key to query, factors for the state.

A token t keeps a[t] = exp(decay) of each channel, so a key j weighs q[t] . (a[j+1] ... a[t] k[j]) for it.
Keys are taken from the last to the first, and before key j all later queries are multiplied by a[j+1]:
factors are multiplied as the recurrence multiplies them, never divided, so that strong decays neither
overflow nor cost digits, and 0 forgets. At the end queries have faded to the state before the chunk.

A product that is nearly subnormal becomes 0: arithmetic with subnormal numbers takes a hundred times as long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import carray, cgutils, compiled, intrinsic
from anyattn_numba.memory import pointer
from anyattn_numba.microkernels import by_vectors
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT64, Vectors, offset

__all__ = ["fade_head_kernel", "fade_kernel", "fade_keys_kernel"]

# As for the weights of attention (`anyattn_numba.microkernels`).
_LEAST = {"float32": 2.0**-118, "float64": 2.0**-1014}


@lru_cache
def fade_kernel(shape: Shape) -> Any:
    """fade(vectors, query, stride, factors, key, head_dim, lane, out), a decay for each channel.

    query[d, lanes after `lane`] *= factors[d], then out = sum over d of query[d, :] key[d]; a lane is a
    query, and the rows of `query` are `stride` apart.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        query, stride, factors, key, head_dim, lane, out = arguments
        later = _lanes(builder, lanes, vectors, ">", lane)
        sums = [cgutils.alloca_once(builder, lanes.type) for _ in range(vectors)]
        for total in sums:
            builder.store(lanes.constant(0.0), total)
        with cgutils.for_range(builder, head_dim, intp=INT64) as loop:
            step = builder.mul(loop.index, ir.Constant(INT64, lanes.itemsize))
            factor = lanes.broadcast(builder, builder.add(factors, step))
            channel = lanes.broadcast(builder, builder.add(key, step))
            row = builder.add(query, builder.mul(loop.index, stride))
            for v, total in enumerate(sums):
                at = offset(builder, row, v * lanes.nbytes)
                before = lanes.load(builder, at)
                faded = _kept(builder, lanes, builder.fmul(before, factor))
                after = builder.select(later[v], faded, before)
                lanes.store(builder, after, at)
                builder.store(lanes.muladd(builder, after, channel, builder.load(total)), total)
        for v, total in enumerate(sums):
            lanes.store(builder, builder.load(total), offset(builder, out, v * lanes.nbytes))

    call = by_vectors("fade", shape, 7, code)

    @intrinsic
    def fade(
        typing_context: Any,
        vectors: Any,
        query: Any,
        stride: Any,
        factors: Any,
        key: Any,
        head_dim: Any,
        lane: Any,
        out: Any,
    ) -> Any:
        return types.void(*[types.int64] * 8), call

    return fade


def _lanes(builder: Any, lanes: Vectors, vectors: int, comparison: str, lane: Any) -> list[Any]:
    """Which lanes of so many vectors compare to a lane; numbers of lanes are floats, as what is chosen."""
    one = lanes.splat(builder, builder.sitofp(lane, lanes.scalar))
    numbers = (
        ir.Constant(lanes.type, [float(v * lanes.lanes + n) for n in range(lanes.lanes)])
        for v in range(vectors)
    )
    return [builder.fcmp_ordered(comparison, number, one) for number in numbers]


def _kept(builder: Any, lanes: Vectors, value: Any) -> Any:
    """`value`, 0 where it is nearly subnormal."""
    kind = ir.FunctionType(lanes.type, [lanes.type])
    absolute = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fabs.{lanes.suffix}")
    tiny = builder.fcmp_ordered("<", builder.call(absolute, [value]), lanes.constant(_LEAST[lanes.element]))
    return builder.select(tiny, lanes.constant(0.0), value)


@lru_cache
def fade_head_kernel(shape: Shape) -> Any:
    """fade_head(vectors, weights, factors, keys, query, head_dim), one decay for all channels.

    `weights` (keys, lanes) become faded, 0 for keys that come after the lane's query, and `query`
    (head_dim, lanes) fades to before the chunk. `factors` are those of the keys.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        weights, factors, keys, query, head_dim = arguments
        width, last = vectors * lanes.nbytes, builder.sub(keys, ir.Constant(INT64, 1))
        none, one = lanes.constant(0.0), lanes.constant(1.0)
        left = [cgutils.alloca_once(builder, lanes.type) for _ in range(vectors)]
        for fade in left:
            builder.store(none, fade)
        # The factor of the key that was taken before; of the last, nothing is left to be multiplied.
        factor = cgutils.alloca_once(builder, lanes.type)
        builder.store(one, factor)
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            key = builder.sub(last, loop.index)
            later, own = (_lanes(builder, lanes, vectors, sign, key) for sign in (">", "=="))
            row = builder.add(weights, builder.mul(key, ir.Constant(INT64, width)))
            for v, fade in enumerate(left):
                at = offset(builder, row, v * lanes.nbytes)
                faded = _kept(builder, lanes, builder.fmul(builder.load(fade), builder.load(factor)))
                faded = builder.select(later[v], faded, builder.select(own[v], one, none))
                builder.store(faded, fade)
                weight = builder.fmul(lanes.load(builder, at), faded)
                seen = builder.or_(later[v], own[v])
                lanes.store(builder, builder.select(seen, weight, none), at)
            step = builder.mul(key, ir.Constant(INT64, lanes.itemsize))
            builder.store(lanes.broadcast(builder, builder.add(factors, step)), factor)
        for fade in left:
            builder.store(_kept(builder, lanes, builder.fmul(builder.load(fade), builder.load(factor))), fade)
        with cgutils.for_range(builder, head_dim, intp=INT64) as loop:
            row = builder.add(query, builder.mul(loop.index, ir.Constant(INT64, width)))
            for v, fade in enumerate(left):
                at = offset(builder, row, v * lanes.nbytes)
                lanes.store(builder, builder.fmul(lanes.load(builder, at), builder.load(fade)), at)

    call = by_vectors("fade_head", shape, 5, code)

    @intrinsic
    def fade_head(
        typing_context: Any,
        vectors: Any,
        weights: Any,
        factors: Any,
        keys: Any,
        query: Any,
        head_dim: Any,
    ) -> Any:
        return types.void(*[types.int64] * 6), call

    return fade_head


@lru_cache
def fade_keys_kernel(element: str) -> Any:
    """fade_keys(keys, factors, channels, left, head_dim, count): keys as the end of the chunk keeps them.

    `left` (head_dim,) becomes what it keeps of the state before. `factors` are (count, channels), channels 1
    or `head_dim`.
    """
    kind, least = getattr(types, element), _LEAST[element]

    @compiled
    def fade_keys(keys: int, factors: int, channels: int, left: int, head_dim: int, count: int) -> None:
        kept = carray(pointer(left), head_dim, kind)
        factor = carray(pointer(factors), (count, channels), kind)
        rows = carray(pointer(keys), (count, head_dim), kind)
        tiny, none = kind(least), kind(0)
        for d in range(head_dim):
            kept[d] = 1
        for back in range(count):
            j = count - 1 - back
            for d in range(head_dim):
                rows[j, d] *= kept[d]
            if channels == 1:
                now = factor[j, 0]
                for d in range(head_dim):
                    faded = kept[d] * now
                    kept[d] = none if faded < tiny else faded
            else:
                for d in range(head_dim):
                    faded = kept[d] * factor[j, d]
                    kept[d] = none if faded < tiny else faded

    return fade_keys
