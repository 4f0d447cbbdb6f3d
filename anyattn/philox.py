"""Philox4x32-10, a counter-based random generator: the same words everywhere from a key and a counter.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

__all__ = ["philox4x32", "upper_bits", "upper_bits_of_32"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(key: int, counter: tuple[Any, Any, Any, Any]) -> tuple[numpy.ndarray[Any, Any], ...]:
    """Four uint32 words for every counter.

    Parameters
    ----------
    key : int
        64 bits, low word first.
    counter : four integers or integer arrays of broadcastable shapes
        The counter's words, taken modulo 2**32.

    Returns
    -------
    tuple of four numpy.ndarray of uint32
    """
    import numpy as np

    low = np.uint64(0xFFFFFFFF)
    words = [np.asarray(c).astype(np.int64).astype(np.uint64) & low for c in counter]
    keys = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(_ROUNDS):
        product0 = words[0] * np.uint64(_MULTIPLIERS[0])
        product1 = words[2] * np.uint64(_MULTIPLIERS[1])
        words = [
            (product1 >> np.uint64(32)) ^ words[1] ^ np.uint64(keys[0]),
            product1 & low,
            (product0 >> np.uint64(32)) ^ words[3] ^ np.uint64(keys[1]),
            product0 & low,
        ]
        keys = [(k + w) & 0xFFFFFFFF for k, w in zip(keys, _WEYL, strict=True)]
    return tuple(w.astype(np.uint32) for w in words)


def upper_bits(key0: Any, key1: Any, x: Any, y: Any, z: Any, w: Any) -> Any:
    """The upper 24 bits of the first word of `philox4x32`, by operators that arrays of all libraries have.

    Parameters
    ----------
    key0, key1, x, y, z, w : int64 arrays of broadcastable shapes
        The words of the key and of the counter, lowest first, of each its lower 32 bits. Products are taken
        modulo 2**64, so `x` and `z` have an axis: NumPy warns of the overflow of numbers.

    Returns
    -------
    int64 array
    """
    x, z = x & _MASK, z & _MASK
    for n in range(_ROUNDS):
        left, right = x * _MULTIPLIERS[0], z * _MULTIPLIERS[1]
        # What is in the upper halves of y and w never comes down; one mask a word and round is enough.
        x, y = ((right >> 32) ^ (y ^ (key0 + n * _WEYL[0]))) & _MASK, right
        z, w = ((left >> 32) ^ (w ^ (key1 + n * _WEYL[1]))) & _MASK, left
    return x >> 8


def upper_bits_of_32(key0: Any, key1: Any, x: Any, y: Any, z: Any, w: Any) -> Any:
    """`upper_bits` of uint32 arrays, for libraries whose integers have no more bits; gives uint32."""
    import numpy as np

    for n in range(_ROUNDS):
        left, right = _halves(x, _MULTIPLIERS[0]), _halves(z, _MULTIPLIERS[1])
        k0, k1 = (key + np.uint32(n * step & _MASK) for key, step in zip((key0, key1), _WEYL, strict=True))
        x, y = right[0] ^ (y ^ k0), right[1]
        z, w = left[0] ^ (w ^ k1), left[1]
    return x >> 8


def _halves(x: Any, multiplier: int) -> tuple[Any, Any]:
    """The upper and the lower 32 bits of a product, by products of halves."""
    high, low = multiplier >> 16, multiplier & 0xFFFF
    x_high, x_low = x >> 16, x & 0xFFFF
    lowest, first, second = x_low * low, x_low * high, x_high * low
    middle = (lowest >> 16) + (first & 0xFFFF) + (second & 0xFFFF)
    upper = x_high * high + (first >> 16) + (second >> 16) + (middle >> 16)
    return upper, ((middle & 0xFFFF) << 16) | (lowest & 0xFFFF)
