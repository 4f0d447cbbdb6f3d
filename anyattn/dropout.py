"""Dropout of the softmax weights, as an expression of what each of them is multiplied by.

The weight of (b, h, row, j) is kept where the first word of Philox4x32-10 with that counter, and the seed as
its key, is large enough: so every backend, in whatever tiles and on however many threads, drops the same
ones. 24 bits of the word are compared as an integer, which 32-bit integers hold and no rounding touches. The
seed is an array of two words, whatever the caller gave, so that another one makes no other kernel and no
other plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.expr.bind import Geometry, bind, check_same_place
from anyattn.expr.functions import where
from anyattn.expr.nodes import ROW, Apply, B, Const, Expr, H, J, Table, apply, load
from anyattn.expr.relocate import Relocation
from anyattn.numbers import integer, real

__all__ = ["Dropout", "drawn_from", "dropout_of", "kept_scale", "key_words"]

_BITS = 24
_WORD = 1 << 32


@dataclass(frozen=True, eq=False)
class Dropout:
    """A probability of dropout in a call whose b, row and j are found by a relocation."""

    probability: Any
    place: Relocation


def dropout_of(dropout: Any, seed: Any, geometry: Geometry) -> tuple[Expr | None, Array | None]:
    """What weights are multiplied by, bound, and the words of the seed that it reads; None without dropout.

    Raises
    ------
    TypeError, ValueError
        If the probability is not in [0, 1), or the seed no integer of 64 bits. 1 would divide by 0.
    """
    place = None
    if isinstance(dropout, Dropout):
        dropout, place = dropout.probability, dropout.place
    probability = real(dropout, "dropout")
    if not 0 <= probability < 1:
        raise ValueError(f"dropout: wanted a probability in [0, 1), got {probability}")
    if seed is not None:
        _check_seed(seed, geometry)
    if probability == 0:
        return None, None
    if seed is None:
        raise ValueError(f"dropout_seed: wanted an integer to draw dropout={probability} from, got None")
    words = key_words(seed, geometry.xp, geometry.device)
    table = Table(words, "int", 1, (None,), "dropout_seed", host=False)
    key = (load(table, (Const(n, "int"),)) for n in range(2))
    drawn = apply("philox", *key, B, H, ROW, J)
    keep: Expr = where(drawn >= math.ceil(probability * 2**_BITS), 1 / (1 - probability), 0.0)
    keep = keep if place is None else place(keep, "dropout")
    return bind(keep, geometry, "dropout"), words


def kept_scale(keep: Expr) -> float:
    """What weights that are kept are multiplied by, from what `dropout_of` gave."""
    assert isinstance(keep, Apply)
    assert isinstance(keep.args[1], Const)
    return float(keep.args[1].value)


def drawn_from(keep: Expr) -> tuple[tuple[Expr, ...], int]:
    """The key and the counter of what `dropout_of` gave, and from which bits on a weight is kept."""
    drawn = keep.children[0]
    bits, least = drawn.children
    assert isinstance(least, Const)
    return bits.children, int(least.value)


def _check_seed(seed: Any, geometry: Geometry) -> None:
    if not arrays.is_array(seed):
        number = integer(seed, "dropout_seed")
        if not -(1 << 63) <= number < 1 << 64:
            raise ValueError(f"dropout_seed: wanted an integer of 64 bits, got {number}")
        return
    if arrays.kind(seed) != "int" or seed.ndim:
        raise TypeError(
            f"dropout_seed: wanted an integer or an integer array without axes, "
            f"got {arrays.dtype_name(seed)} {tuple(seed.shape)}"
        )
    check_same_place(seed, "dropout_seed", geometry)


def key_words(seed: Any, xp: Namespace, device: Any) -> Array:
    """The lower and the upper word of a seed, an integer or an array of one, as int32 (2,).

    Negative numbers are what their 64 bits are in two's complement.
    """
    if not arrays.is_array(seed):
        words = (int(seed) % _WORD, (int(seed) >> 32) % _WORD)
        return xp.asarray([n - (n >> 31) * _WORD for n in words], dtype=xp.int32, device=device)
    if int(xp.iinfo(arrays.index_dtype(xp, device)).bits) == 64:
        wide = arrays.cast(xp, seed, xp.int64)
        high = wide >> 32
        low = wide & (_WORD - 1)
        low = low - (low >> 31) * _WORD
    else:
        low, high = seed, xp.where(seed < 0, -1, 0)
    return xp.stack([arrays.cast(xp, low, xp.int32), arrays.cast(xp, high, xp.int32)])
