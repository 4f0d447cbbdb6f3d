"""What linear attention reads of a chunk: rows, values, what tokens keep, and keys turned round.

What a task is made of apart from products (`anyattn_numba.linear_forward`). Rows are padded with 0 to whole
tiles, and chunks with rows of 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import types

from anyattn_numba import linear_arguments as a
from anyattn_numba.jit import carray, compiled
from anyattn_numba.linear_decay import since_kernel
from anyattn_numba.memory import pointer, read_word, transpose_kernel
from anyattn_numba.rows import reader
from anyattn_numba.target import Shape
from anyattn_numba.vector_math import exp_float32, exp_float64

__all__ = ["loading", "padding", "tile_of"]


def tile_of(shape: Shape) -> int:
    """What numbers of tokens and channels are padded to: whole vectors, and whole tiles of registers."""
    return max(shape.lanes, shape.rows)


@lru_cache
def padding(shape: Shape) -> Any:
    """padded(count): the next multiple of a tile."""
    tile = tile_of(shape)

    @compiled
    def padded(count: int) -> int:
        return (count + tile - 1) // tile * tile

    return padded


@lru_cache
def loading(shape: Shape, dtype: str) -> Any:
    """(load_rows, load_values, load_factors, turn) for arrays of a dtype."""
    lanes, size, padded = shape.lanes, shape.itemsize, padding(shape)
    kind = getattr(types, shape.element)
    read, read_wide = reader(dtype, shape.element), reader(shape.element, shape.element)
    transpose, since_start = transpose_kernel(shape.element, lanes), since_kernel(shape.element)
    exp = exp_float32 if shape.element == "float32" else exp_float64

    @compiled
    def load_rows(source: int, row: int, step: int, dim: int, count: int, target: int) -> None:
        """Rows of numbers as rows of whole tiles, as many as whole tiles have, the rest of them 0."""
        wide = padded(dim)
        for n in range(count):
            read(source + n * row, step, dim, 1.0, target + n * wide * size)
            rest = carray(pointer(target + (n * wide + dim) * size), wide - dim, kind)
            for c in range(wide - dim):
                rest[c] = 0
        empty = carray(pointer(target + count * wide * size), (padded(count) - count) * wide, kind)
        for n in range((padded(count) - count) * wide):
            empty[n] = 0

    @compiled
    def load_values(block: int, source: int, row: int, scratch: int, count: int) -> None:
        """The values of a chunk, beta times them, and the normalizer's column."""
        columns, v_dim = read_word(block + a.COLUMNS), read_word(block + a.V_HEAD_DIM)
        target, wide = scratch + read_word(block + a.AT_VALUES), padded(columns)
        betas = carray(pointer(scratch + read_word(block + a.AT_BETA)), count, kind)
        for n in range(padded(count)):
            here, known = target + n * wide * size, v_dim if n < count else 0
            if known:
                read(source + n * row, read_word(block + a.V_STEP), v_dim, betas[n], here)
            rest = carray(pointer(here + known * size), wide - known, kind)
            for c in range(wide - known):
                rest[c] = kind(1 if n < count and known + c < columns else 0)

    @compiled
    def load_factors(block: int, strand: int, scratch: int, first: int, count: int) -> None:
        """What each token keeps and writes, and what is kept since the start of the chunk."""
        channels, kept = read_word(block + a.CHANNELS), scratch + read_word(block + a.AT_KEPT)
        row = read_word(block + a.DECAY_ROW)
        at = read_word(strand + a.STRAND_DECAY) + first * row
        width = max(channels, 1)
        factors = carray(pointer(kept), count * width, kind)
        if channels == 1:
            read_wide(at, row, count, 1.0, kept)
        elif channels:
            for n in range(count):
                read_wide(
                    at + n * row, read_word(block + a.DECAY_STEP), channels, 1.0, kept + n * channels * size
                )
        for n in range(count * width):
            factors[n] = exp(factors[n]) if channels else kind(1)
        since_start(kept, width, count, scratch + read_word(block + a.AT_SINCE))
        betas = scratch + read_word(block + a.AT_BETA)
        row = read_word(block + a.BETA_ROW)
        if read_word(block + a.DELTA):
            read_wide(read_word(strand + a.STRAND_BETA) + first * row, row, count, 1.0, betas)
        else:
            ones = carray(pointer(betas), count, kind)
            for n in range(count):
                ones[n] = 1

    @compiled
    def turn(keys: int, row: int, dim: int, count: int, turned: int) -> None:
        """Keys side by side: (F, tokens)."""
        span = padded(count)
        for d in range(0, padded(dim), lanes):
            for n in range(0, span, lanes):
                transpose(keys + n * row + d * size, row, turned + (d * span + n) * size, span * size)

    return load_rows, load_values, load_factors, turn
