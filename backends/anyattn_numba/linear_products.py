"""The product that chunks of linear attention are made of: two products in one tile of registers.

Built as the products of attention are (`anyattn_numba.microkernels`): `rows` x `vectors` accumulators, to
which vectors of one factor are added, times a number of each row of the other. Here a lane is a column of the
result: the caller's queries, keys and values are read, and rows of the result written, where they lie.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import cgutils, intrinsic
from anyattn_numba.microkernels import accumulators, by_vectors
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT64, LINE, Vectors, fetch, offset

__all__ = ["ADD", "NEW", "SOLVE", "product_kernel"]

# What `product` does with what it finds.
NEW, ADD, SOLVE = range(3)


@lru_cache
def product_kernel(shape: Shape) -> Any:
    """product(vectors, how, left, left_row, right, right_row, inner, factors, ...) for `shape.rows` rows.

    The others: weights, weights_row, values, values_row, count, out, out_row, coming. With `first` = left @
    right, over `inner` numbers, and `second` = weights @ values, over `count`:

        NEW    out = factors first + second
        ADD    out = factors out + second
        SOLVE  out = factors first + out + second, then row r += sum over s < r of weights[r, count + s] row s

    `factors` are one a row, contiguous; numbers of a row are contiguous, rows any bytes apart. `inner` lines
    of memory from `coming` on are fetched meanwhile: a chunk is too short for the processor to see in time
    which comes next.
    """
    lanes, rows = Vectors(shape.element, shape.lanes), shape.rows

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        how, left, left_row, right, right_row, inner, factors, *others = arguments
        weights, weights_row, values, values_row, count, out, out_row, coming = others
        sums = accumulators(builder, lanes, rows, vectors)
        places = [
            [offset(builder, at, v * lanes.nbytes) for v in range(vectors)]
            for at in _starts(builder, out, out_row, rows)
        ]

        def add_product(a: Any, a_row: Any, b: Any, b_row: Any, length: Any, fetched: Any = None) -> None:
            starts = _starts(builder, a, a_row, rows)
            with cgutils.for_range(builder, length, intp=INT64) as loop:
                here = builder.add(b, builder.mul(loop.index, b_row))
                columns = [
                    lanes.load(builder, offset(builder, here, v * lanes.nbytes)) for v in range(vectors)
                ]
                if fetched is not None:
                    line = builder.mul(loop.index, ir.Constant(INT64, LINE))
                    fetch(builder, builder.add(fetched, line))
                step = builder.mul(loop.index, ir.Constant(INT64, lanes.itemsize))
                for start, row in zip(starts, sums, strict=True):
                    factor = lanes.broadcast(builder, builder.add(start, step))
                    for sum_, column in zip(row, columns, strict=True):
                        builder.store(lanes.muladd(builder, factor, column, builder.load(sum_)), sum_)

        def factor_of(r: int) -> Any:
            return lanes.broadcast(builder, offset(builder, factors, r * lanes.itemsize))

        adds = builder.icmp_signed("==", how, ir.Constant(INT64, ADD))
        solves = builder.icmp_signed("==", how, ir.Constant(INT64, SOLVE))
        with builder.if_else(adds) as (then, otherwise):
            with then:
                for r, row in enumerate(sums):
                    factor = factor_of(r)
                    for sum_, place in zip(row, places[r], strict=True):
                        builder.store(builder.fmul(lanes.load(builder, place), factor), sum_)
            with otherwise:
                for row in sums:
                    for sum_ in row:
                        builder.store(lanes.constant(0.0), sum_)
                add_product(left, left_row, right, right_row, inner, coming)
                for r, row in enumerate(sums):
                    factor = factor_of(r)
                    for sum_ in row:
                        builder.store(builder.fmul(builder.load(sum_), factor), sum_)
                with builder.if_then(solves):
                    for r, row in enumerate(sums):
                        for sum_, place in zip(row, places[r], strict=True):
                            found = builder.fadd(builder.load(sum_), lanes.load(builder, place))
                            builder.store(found, sum_)
        add_product(weights, weights_row, values, values_row, count)
        with builder.if_then(solves):
            own = builder.add(weights, builder.mul(count, ir.Constant(INT64, lanes.itemsize)))
            starts = _starts(builder, own, weights_row, rows)
            for s in range(rows):
                for r in range(s + 1, rows):
                    weight = lanes.broadcast(builder, offset(builder, starts[r], s * lanes.itemsize))
                    for known, sum_ in zip(sums[s], sums[r], strict=True):
                        found = lanes.muladd(builder, weight, builder.load(known), builder.load(sum_))
                        builder.store(found, sum_)
        for row, own_places in zip(sums, places, strict=True):
            for sum_, place in zip(row, own_places, strict=True):
                lanes.store(builder, builder.load(sum_), place)

    call = by_vectors("product", shape, 15, code)

    @intrinsic
    def product(
        typing_context: Any,
        vectors: Any,
        how: Any,
        left: Any,
        left_row: Any,
        right: Any,
        right_row: Any,
        inner: Any,
        factors: Any,
        weights: Any,
        weights_row: Any,
        values: Any,
        values_row: Any,
        count: Any,
        out: Any,
        out_row: Any,
        coming: Any,
    ) -> Any:
        return types.void(*[types.int64] * 16), call

    return product


def _starts(builder: Any, address: Any, stride: Any, rows: int) -> list[Any]:
    return [builder.add(address, builder.mul(stride, ir.Constant(INT64, r))) for r in range(rows)]
