"""Which weights dropout keeps, compiled for whole tiles: for a backend with slower integer operations.

What is compiled is the definition, `anyattn.philox.upper_bits`, on numbers instead of arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy
from numba import types
from numba.core.compiler_lock import global_compiler_lock

from anyattn import philox
from anyattn.kernels.cache import user_store
from anyattn.kernels.key import KernelKey, code_digest
from anyattn.kernels.numba_store import attach, numba_settings, numba_target, numba_versions
from anyattn_numba import atomics, jit, memory, parts, threads, vectors
from anyattn_numba.atomics import fetch_add
from anyattn_numba.hostarrays import address_of
from anyattn_numba.jit import OPTIONS, carray, inlined, task
from anyattn_numba.memory import pointer, read_real, read_word
from anyattn_numba.thread_count import thread_count

__all__ = ["fill_kept"]

NDArray = numpy.ndarray[Any, Any]

# The task's arguments: the line that comes next, sizes, the result, from which bits on a weight is kept and
# what it is times then; and of each word of Philox its address and its strides.
NEXT, HEADS, ROWS, KEYS, LINES, OUT, LEAST, SCALE = range(0, 64, 8)
KEY0, KEY1, X, Y, Z, W = range(64, 256, 32)
# Lines that a thread takes at once, and results for which another thread is woken up.
TAKEN = 16
FOR_A_THREAD = 1 << 15

_upper_bits = inlined(philox.upper_bits)


def fill_kept(out: NDArray, words: Sequence[NDArray], least: int, scale: float) -> None:
    """Write `scale` where a weight is kept, else 0.

    Parameters
    ----------
    out : array (batch, heads, rows, keys) of float32 or float64, contiguous
    words : six int64 arrays of four axes that broadcast to `out`, the first five with one key
        The key and the counter of Philox: two words of the seed; b, h, row and j of each weight.
    least : int
        The least of `anyattn.philox.upper_bits` with which a weight is kept.
    scale : float
    """
    if not out.flags.c_contiguous:
        raise ValueError(f"out: wanted a contiguous array, got strides {out.strides}")
    lines = int(numpy.prod(out.shape[:3]))
    factor = int(numpy.float64(scale).view(numpy.int64))
    arguments = [0, *out.shape[1:], lines, address_of(out), least, factor]
    held = []
    for word, keys in zip(words, (*(1,) * 5, out.shape[3]), strict=True):
        if word.dtype != numpy.int64 or word.shape[3] != keys:
            raise ValueError(f"words: wanted int64 of {keys} keys, got {word.dtype} of shape {word.shape}")
        spread = numpy.broadcast_to(numpy.ascontiguousarray(word), (*out.shape[:3], keys))
        held.append(spread)
        arguments += [address_of(spread), *spread.strides[:3]]
    block = numpy.array(arguments, numpy.int64)
    number = max(1, min(thread_count(), -(-lines // TAKEN), out.size // FOR_A_THREAD))
    status = threads.run(_address(out.dtype.name), address_of(block), number)
    if status:
        raise RuntimeError(f"numba: the kernel of dropout ended with status {status}")
    del held


@lru_cache
def kept_kernel(dtype: str) -> Any:
    """The task that fills lines of an array of a dtype, each the keys of a row, while there are some left."""
    kind = getattr(types, dtype)
    size = kind.bitwidth // 8

    @task
    def kept(block: int, worker: int) -> int:
        heads, rows, keys = read_word(block + HEADS), read_word(block + ROWS), read_word(block + KEYS)
        lines, target = read_word(block + LINES), read_word(block + OUT)
        least, scale = read_word(block + LEAST), kind(read_real(block + SCALE))
        while True:
            first = fetch_add(block + NEXT, TAKEN)
            if first >= lines:
                return 0
            for line in range(first, min(first + TAKEN, lines)):
                b, h, row = line // rows // heads, line // rows % heads, line % rows
                key0 = read_word(_place(block + KEY0, b, h, row))
                key1 = read_word(_place(block + KEY1, b, h, row))
                x = read_word(_place(block + X, b, h, row))
                y = read_word(_place(block + Y, b, h, row))
                z = read_word(_place(block + Z, b, h, row))
                w = carray(pointer(_place(block + W, b, h, row)), keys, types.int64)
                out = carray(pointer(target + size * keys * line), keys, kind)
                for j in range(keys):
                    out[j] = scale if _upper_bits(key0, key1, x, y, z, w[j]) >= least else kind(0)

    return kept


@inlined
def _place(word: int, b: int, h: int, row: int) -> int:
    """The address of what a word is for the keys of a row."""
    at: int = read_word(word) + b * read_word(word + 8)
    at += h * read_word(word + 16) + row * read_word(word + 24)
    return at


@lru_cache
def _address(dtype: str) -> int:
    key = KernelKey(
        backend="numba",
        kernel="kept",
        structure="",
        dtype=dtype,
        accumulate=dtype,
        head_dim=0,
        v_head_dim=0,
        target=numba_target(),
        settings=numba_settings(OPTIONS),
        versions=numba_versions(),
        code=code_digest("", [philox, atomics, jit, memory, parts, vectors, sys.modules[__name__]]),
    )
    dispatcher = kept_kernel(dtype)
    # llvmlite has a lock of its own, which a fork beside this would copy held.
    with global_compiler_lock:
        attach(dispatcher, key, user_store())
        return threads.address(dispatcher)
