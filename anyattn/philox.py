"""Philox4x32-10, a counter-based random generator: the same words everywhere from a key and a counter.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

__all__ = ["philox4x32"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


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
