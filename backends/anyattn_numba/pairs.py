"""What generated tile code is made with: its loop over pairs, and arrays along pairs as they are in a tile.

A tile has its queries side by side, an array along (b, h, row, j) has its keys side by side, so reading the
entry of a pair takes a cache line each. Such an array is read along its keys for one query after the other,
and transposed, before the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
from numba import types

from anyattn_numba import arguments as a
from anyattn_numba.jit import OPTIONS, carray, compiled, intrinsic, task
from anyattn_numba.memory import pointer, read_index, read_word, transpose_kernel
from anyattn_numba.parts import PartCompiler
from anyattn_numba.rows import ITEMSIZE, reader
from anyattn_numba.target import Shape, host

__all__ = ["entries_kernel", "entries_stride", "over_pairs", "padded_keys", "whole_vectors"]


class _Apart(PartCompiler):
    """No two arrays share memory: else a table that is read may be the scores that are written."""

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


def over_pairs(function: Callable[..., Any]) -> Any:
    """A compiled function whose arguments are arrays that share no memory with one that it writes."""
    return numba.njit(pipeline_class=_Apart, **OPTIONS)(function)


@intrinsic
def whole_vectors(typing_context: Any) -> Any:
    """Let LLVM use the widest vectors in this function; alone it takes half of 64 bytes.

    It is kept out of what calls it, which says nothing of the kind.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite lets only attributes through that it knows.
        builder.function.attributes.add("noinline")
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * host().vector_bytes}"')
        return context.get_dummy_value()

    return types.void(), code


def padded_keys(keys: int) -> int:
    """Places for the entries of so many keys: whole vectors of every length."""
    return (keys + 15) // 16 * 16


entries_stride = compiled(padded_keys)


@lru_cache
def entries_kernel(shape: Shape, dtype: str) -> Any:
    """entries(tile, source): target[n, lane] = array[b, h, row // block, j // block] as numbers of a shape.

    Of the queries and keys of a tile; `source` is the address of the words SOURCE_... of an array.
    """
    lanes, size, stored = shape.lanes, shape.itemsize, ITEMSIZE[dtype]
    kind = getattr(types, shape.element)
    read = reader(dtype, shape.element)
    transpose = transpose_kernel(shape.element, lanes)

    @task
    def entries(tile: int, source: int) -> int:
        keys, width = read_word(tile + a.TILE_KEYS), read_word(tile + a.TILE_WIDTH)
        first, columns = read_word(tile + a.TILE_FIRST), read_word(tile + a.TILE_COLUMNS)
        queries, block = read_word(tile + a.TILE_LANES), read_word(source + a.SOURCE_BLOCK)
        strides = source + a.SOURCE_STRIDES
        base = read_word(source + a.SOURCE) + read_word(tile + a.TILE_BATCH) * read_word(strides)
        of_head, of_row, step = read_word(strides + 8), read_word(strides + 16), read_word(strides + 24)
        padded = entries_stride(keys)
        stage = read_word(tile + a.TILE_ROW_VALUES) + width * read_word(source + a.SOURCE_ROOM)
        target = stage + padded * size * width * (1 + read_word(source + a.SOURCE_SLOT))
        before, last = base, stage
        for lane in range(width):
            h, row = read_word(queries + 8 * lane), read_word(queries + 8 * (width + lane))
            start = base + h * of_head + row // block * of_row
            line = stage + lane * padded * size
            if lane > 0 and start == before:
                copy, same = carray(pointer(line), padded, kind), carray(pointer(last), padded, kind)
                for n in range(padded):
                    copy[n] = same[n]
            elif columns == 0 and block == 1:
                read(start + first * step, step, keys, 1.0, line)
            else:
                for n in range(keys):
                    j = read_index(columns + 4 * n) if columns else first + n
                    read(start + j // block * step, stored, 1, 1.0, line + n * size)
            before, last = start, line
        for n in range(0, padded, lanes):
            for lane in range(0, width, lanes):
                transpose(
                    stage + (lane * padded + n) * size,
                    padded * size,
                    target + (n * width + lane) * size,
                    width * size,
                )
        return 0

    return entries
