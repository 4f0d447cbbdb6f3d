"""The two products of attention, and the softmax between them, on one tile held in registers.

A lane is a query: a block has its queries side by side in vectors, its keys one below the other. Then K and V
are read as they lie in memory, a number of theirs at a time against all queries, nothing of them is packed or
transposed, and the softmax has no reduction across lanes: maximum and sum run down the keys.

    score    S[j, :]  = sum over d of K[j, d] Q[d, :]           largest[:] = max(largest[:], S[j, :])
    soften   P[j, :]  = exp(S[j, :] - largest[:]), its sum, and the factor for what was summed before
    weigh    O[c, :]  = factor[:] O[c, :] + sum over j of V[j, c] P[j, :]

Q (head_dim, queries), S and P (keys, queries) and O (v_head_dim, queries) are contiguous in the caller's
scratch memory. All addresses are int64, all strides bytes.

Each takes the number of vectors of queries first; there is one piece of code for each number, kept out of the
callers, which would be optimised as often as they are compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import cgutils, intrinsic
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT64, LINE, Vectors, fetch, offset

__all__ = ["accumulators", "by_vectors", "largest_kernel", "score_kernel", "soften_kernel", "weigh_kernel"]


# Weights within 2**8 of the smallest normal number are 0: of their products with values many would be
# subnormal. Rows of ALiBi are full of such weights, and took half as long again.
SPARE = 8
_numbers = itertools.count()


@lru_cache
def score_kernel(shape: Shape, rows: int, pitch: int | None = None) -> Any:
    """score(vectors, key, key_stride, query, head_dim, out, largest, value, value_stride) for `rows` keys.

    The rows of `query` and `out` are `pitch` vectors long, by default as many as are computed. The numbers
    of a key are contiguous. The keys that follow and what is at `value` are fetched: rows are too
    short for the processor to see in time that it will need them.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        key, key_stride, query, head_dim, out, largest, value, value_stride = arguments
        width = (pitch or vectors) * lanes.nbytes
        sums = accumulators(builder, lanes, rows, vectors)
        for row in sums:
            for sum_ in row:
                builder.store(lanes.constant(0.0), sum_)
        starts = [builder.add(key, builder.mul(key_stride, ir.Constant(INT64, r))) for r in range(rows)]
        following = builder.add(key, builder.mul(key_stride, ir.Constant(INT64, rows)))

        def multiply(first: Any, end: Any, coming: Any, stride: Any) -> None:
            with cgutils.for_range_slice(builder, first, end, ir.Constant(INT64, 1), intp=INT64) as (d, _):
                here = builder.add(query, builder.mul(d, ir.Constant(INT64, width)))
                values = [
                    lanes.load(builder, offset(builder, here, v * lanes.nbytes)) for v in range(vectors)
                ]
                step = builder.mul(d, ir.Constant(INT64, lanes.itemsize))
                for start, row in zip(starts, sums, strict=True):
                    factor = lanes.broadcast(builder, builder.add(start, step))
                    for sum_, value in zip(row, values, strict=True):
                        builder.store(lanes.muladd(builder, factor, value, builder.load(sum_)), sum_)
                number = builder.sub(d, first)
                line = builder.udiv(number, ir.Constant(INT64, rows))
                row_number = builder.urem(number, ir.Constant(INT64, rows))
                at = builder.add(coming, builder.mul(row_number, stride))
                fetch(builder, builder.add(at, builder.mul(line, ir.Constant(INT64, LINE))))

        half = builder.udiv(head_dim, ir.Constant(INT64, 2))
        multiply(ir.Constant(INT64, 0), half, following, key_stride)
        multiply(half, head_dim, value, value_stride)
        for v in range(vectors):
            top_at = offset(builder, largest, v * lanes.nbytes)
            top = lanes.load(builder, top_at)
            for r, row in enumerate(sums):
                found = builder.load(row[v])
                lanes.store(builder, found, offset(builder, out, r * width + v * lanes.nbytes))
                top = lanes.maximum(builder, found, top)
            lanes.store(builder, top, top_at)

    call = by_vectors(f"score_{rows}_{pitch}", shape, 8, code)

    @intrinsic
    def score(
        typing_context: Any,
        vectors: Any,
        key: Any,
        key_stride: Any,
        query: Any,
        head_dim: Any,
        out: Any,
        largest: Any,
        value: Any,
        value_stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 9), call

    return score


@lru_cache
def weigh_kernel(shape: Shape, rows: int, pitch: int | None = None) -> Any:
    """weigh(vectors, value, value_stride, weights, keys, factor, out) for `rows` channels.

    The rows of `weights` and `out` are `pitch` vectors long, by default as many as are computed. The numbers
    of a value are contiguous.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        value, value_stride, weights, keys, factor, out = arguments
        width = (pitch or vectors) * lanes.nbytes
        sums = accumulators(builder, lanes, rows, vectors)
        for v in range(vectors):
            decay = lanes.load(builder, offset(builder, factor, v * lanes.nbytes))
            for r, row in enumerate(sums):
                before = lanes.load(builder, offset(builder, out, r * width + v * lanes.nbytes))
                builder.store(builder.fmul(before, decay), row[v])
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            here = builder.add(weights, builder.mul(loop.index, ir.Constant(INT64, width)))
            values = [lanes.load(builder, offset(builder, here, v * lanes.nbytes)) for v in range(vectors)]
            start = builder.add(value, builder.mul(loop.index, value_stride))
            for r, row in enumerate(sums):
                channel = lanes.broadcast(builder, offset(builder, start, r * lanes.itemsize))
                for sum_, weight in zip(row, values, strict=True):
                    builder.store(lanes.muladd(builder, channel, weight, builder.load(sum_)), sum_)
        for r, row in enumerate(sums):
            for v, sum_ in enumerate(row):
                lanes.store(builder, builder.load(sum_), offset(builder, out, r * width + v * lanes.nbytes))

    call = by_vectors(f"weigh_{rows}_{pitch}", shape, 6, code)

    @intrinsic
    def weigh(
        typing_context: Any,
        vectors: Any,
        value: Any,
        value_stride: Any,
        weights: Any,
        keys: Any,
        factor: Any,
        out: Any,
    ) -> Any:
        return types.void(*[types.int64] * 7), call

    return weigh


@lru_cache
def soften_kernel(shape: Shape) -> Any:
    """soften(vectors, scores, keys, before, largest, total, factor).

    `before` is the largest score until now and becomes `largest`; `total` is the sum of weights. A query
    whose largest score is -inf has seen nothing.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        scores, keys, before, largest, total, factor = arguments
        width = vectors * lanes.nbytes
        bases, sums = [], [cgutils.alloca_once(builder, lanes.type) for _ in range(vectors)]
        for v, sum_ in enumerate(sums):
            at = v * lanes.nbytes
            top = lanes.load(builder, offset(builder, largest, at))
            # -inf - -inf is NaN.
            none = builder.fcmp_ordered("==", top, lanes.constant(float("-inf")))
            base = builder.select(none, lanes.constant(0.0), top)
            old = lanes.load(builder, offset(builder, before, at))
            decay = lanes.exp(builder, builder.fsub(old, base), SPARE)
            lanes.store(builder, decay, offset(builder, factor, at))
            lanes.store(builder, top, offset(builder, before, at))
            summed = lanes.load(builder, offset(builder, total, at))
            builder.store(builder.fmul(summed, decay), sum_)
            bases.append(base)
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            here = builder.add(scores, builder.mul(loop.index, ir.Constant(INT64, width)))
            for v, sum_ in enumerate(sums):
                at = offset(builder, here, v * lanes.nbytes)
                power = builder.fsub(lanes.load(builder, at), bases[v])
                weight = lanes.exp(builder, power, SPARE)
                lanes.store(builder, weight, at)
                builder.store(builder.fadd(builder.load(sum_), weight), sum_)
        for v, sum_ in enumerate(sums):
            lanes.store(builder, builder.load(sum_), offset(builder, total, v * lanes.nbytes))

    call = by_vectors("soften", shape, 6, code)

    @intrinsic
    def soften(
        typing_context: Any,
        vectors: Any,
        scores: Any,
        keys: Any,
        before: Any,
        largest: Any,
        total: Any,
        factor: Any,
    ) -> Any:
        return types.void(*[types.int64] * 7), call

    return soften


@lru_cache
def largest_kernel(shape: Shape) -> Any:
    """largest_of(vectors, scores, keys, largest): the maximum of `largest` and of each lane's scores."""
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        scores, keys, largest = arguments
        (tops,) = accumulators(builder, lanes, 1, vectors)
        for v, top in enumerate(tops):
            builder.store(lanes.load(builder, offset(builder, largest, v * lanes.nbytes)), top)
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            here = builder.mul(loop.index, ir.Constant(INT64, vectors * lanes.nbytes))
            here = builder.add(scores, here)
            for v, top in enumerate(tops):
                value = lanes.load(builder, offset(builder, here, v * lanes.nbytes))
                builder.store(lanes.maximum(builder, value, builder.load(top)), top)
        for v, top in enumerate(tops):
            lanes.store(builder, builder.load(top), offset(builder, largest, v * lanes.nbytes))

    call = by_vectors("largest", shape, 3, code)

    @intrinsic
    def largest_of(typing_context: Any, vectors: Any, scores: Any, keys: Any, largest: Any) -> Any:
        return types.void(*[types.int64] * 4), call

    return largest_of


def accumulators(builder: Any, lanes: Vectors, rows: int, vectors: int) -> list[list[Any]]:
    """Places for `rows` x `vectors` sums, which become registers."""
    return [[cgutils.alloca_once(builder, lanes.type) for _ in range(vectors)] for _ in range(rows)]


def by_vectors(
    name: str, shape: Shape, count: int, code: Callable[[Any, int, list[Any]], None]
) -> Callable[[Any, Any, Any, Any], Any]:
    """The call of a function of its own that runs `code` for the number of vectors that it is given first."""

    def choose(builder: Any, arguments: list[Any]) -> None:
        done = builder.append_basic_block("done")
        choice = builder.switch(arguments[0], done)
        for vectors in range(1, shape.vectors + 1):
            body = builder.append_basic_block(f"vectors_{vectors}")
            choice.add_case(ir.Constant(INT64, vectors), body)
            builder.position_at_end(body)
            code(builder, vectors, arguments[1:])
            builder.branch(done)
        builder.position_at_end(done)

    return outlined(name, shape, count + 1, choose)


def outlined(
    name: str, shape: Shape, count: int, code: Callable[[Any, list[Any]], None]
) -> Callable[[Any, Any, Any, Any], Any]:
    """The call of a function of `count` int64 that holds `code`, one for all callers of a task.

    Machine code may share it by its name, which therefore is no other function's in this process.
    """
    label = f"anyattn_{name}_{shape.element}_{shape.lanes}x{shape.vectors}_{next(_numbers)}"

    def define(module: ir.Module) -> Any:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * count), label)
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        code(builder, list(function.args))
        builder.ret_void()
        return function

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.globals.get(label) or define(builder.module)
        builder.call(function, arguments)
        return context.get_dummy_value()

    return call
