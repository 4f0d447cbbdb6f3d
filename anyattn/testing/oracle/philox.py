"""Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).

Words are Python integers, or uint64 arrays of them.
"""

from __future__ import annotations

from typing import Any

_WORD = 0xFFFFFFFF
Words = tuple[Any, Any, Any, Any]


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = 10) -> Words:
    """Four 32-bit words from a 128-bit counter and a 64-bit key, each given as words, lowest first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = right >> 32 ^ c1 ^ k0, right & _WORD, left >> 32 ^ c3 ^ k1, left & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3
