"""Verdicts on tiles, and sets of them: the values that the analysis computes with.

A tile of a mask is EMPTY (nobody sees anything), FULL (all see all) or PARTIAL. Where it is not known which,
or where many tiles are looked at together, the analysis has the set of verdicts that are possible, as bits of
a uint8; logic on sets is one look-up in a table of 8 x 8 sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["AND", "AND_APART", "ANY", "EMPTY", "FULL", "NOT", "OR", "OR_APART", "PARTIAL", "XOR", "XOR_APART"]

NDArray = np.ndarray[Any, Any]

EMPTY, FULL, PARTIAL = 1, 2, 4
ANY = EMPTY | FULL | PARTIAL


def _and(x: int, y: int, apart: bool) -> int:
    if EMPTY in (x, y):
        return EMPTY
    if FULL in (x, y):
        return x if y == FULL else y
    # Two masks with gaps may miss each other, unless one says which rows and the other which keys.
    return PARTIAL if apart else PARTIAL | EMPTY


def _or(x: int, y: int, apart: bool) -> int:
    return _not(_and(_not(x), _not(y), apart))


def _xor(x: int, y: int, apart: bool) -> int:
    if x == EMPTY or y == EMPTY:
        return y if x == EMPTY else x
    if x == FULL or y == FULL:
        return _not(y if x == FULL else x)
    return PARTIAL if apart else ANY


def _not(x: int) -> int:
    return x & PARTIAL | (FULL if x & EMPTY else 0) | (EMPTY if x & FULL else 0)


def _of_sets(rule: Callable[[int, int, bool], int], apart: bool) -> NDArray:
    table = np.zeros((8, 8), np.uint8)
    singles = (EMPTY, FULL, PARTIAL)
    for a in range(8):
        for b in range(8):
            for x in singles:
                for y in singles:
                    if a & x and b & y:
                        table[a, b] |= rule(x, y, apart)
    return table


AND, OR, XOR = (_of_sets(rule, False) for rule in (_and, _or, _xor))
AND_APART, OR_APART, XOR_APART = (_of_sets(rule, True) for rule in (_and, _or, _xor))
NOT = np.array([_not(x) for x in range(8)], np.uint8)
