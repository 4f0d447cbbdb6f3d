"""Memory by address, for compiled functions: argument blocks and scratch memory.

Kernels take addresses instead of arrays: a call then costs one foreign call whatever it passes, one machine
code serves all strides, and read-only arrays are no types of their own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import intrinsic
from anyattn_numba.vectors import INT64, Vectors

__all__ = ["pointer", "read_byte", "read_index", "read_real", "read_word", "transpose_kernel", "write_word"]


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as the pointer that `numba.carray` takes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


def _reader(stored: ir.Type, result: Any, widen: str = "") -> Any:
    @intrinsic
    def read(typing_context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(builder.inttoptr(arguments[0], stored.as_pointer()))
            return getattr(builder, widen)(value, INT64) if widen else value

        return result(types.int64), code

    return read


read_word = _reader(INT64, types.int64)
read_index = _reader(ir.IntType(32), types.int64, "sext")
read_byte = _reader(ir.IntType(8), types.int64, "zext")
read_real = _reader(ir.DoubleType(), types.float64)


@intrinsic
def write_word(typing_context: Any, address: Any, value: Any) -> Any:
    """Set the word at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], INT64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@lru_cache
def transpose_kernel(element: str, lanes: int) -> Any:
    """transpose(source, source_stride, target, target_stride): a square of `lanes` x `lanes` numbers.

    log2(lanes) rounds, in which rows at a distance exchange the lanes at that distance (Eklundh, 1972).
    """
    vectors = Vectors(element, lanes)
    pair = ir.VectorType(ir.IntType(32), lanes)

    @intrinsic
    def transpose(
        typing_context: Any, source: Any, source_stride: Any, target: Any, target_stride: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_stride, target, target_stride = arguments
            rows = []
            for r in range(lanes):
                at = builder.add(source, builder.mul(source_stride, ir.Constant(INT64, r)))
                rows.append(vectors.load(builder, at))
            distance = 1
            while distance < lanes:
                upper = [n if not n & distance else lanes + n - distance for n in range(lanes)]
                lower = [n + distance if not n & distance else lanes + n for n in range(lanes)]
                for r in range(lanes):
                    if not r & distance:
                        a, b = rows[r], rows[r + distance]
                        rows[r] = builder.shuffle_vector(a, b, ir.Constant(pair, upper))
                        rows[r + distance] = builder.shuffle_vector(a, b, ir.Constant(pair, lower))
                distance *= 2
            for r, row in enumerate(rows):
                vectors.store(
                    builder, row, builder.add(target, builder.mul(target_stride, ir.Constant(INT64, r)))
                )
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), code

    return transpose
