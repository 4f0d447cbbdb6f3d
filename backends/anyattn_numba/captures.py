"""What tile code reads at TILE_CAPTURED: the numbers and arrays of a program, as words.

Numbers by slot, then of each table its address, shape and strides, then of each array along (b, h, row, j)
the words SOURCE_....
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from anyattn.expr.program import AlignedSlot, Program
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn_numba.hostarrays import address_of, as_numpy
from anyattn_numba.standins import Given
from anyattn_numba.tiles import row_words

__all__ = ["Captures"]

NDArray = numpy.ndarray[Any, Any]


class Captures:
    """The words of a program, in which arrays of another call of the same signature can be put.

    Parameters
    ----------
    program : Program
        With a `Given` in the place of each array that each call gives.
    accumulate : {"float32", "float64"}
    sizes : (batch_shape, num_heads, q_len, k_len)
    library : str
        Of the arrays.
    entries_address : callable
        (dtype, accumulate) to the address of the code that reads arrays of a dtype along pairs.
    others : sequence of NumPy array
        Arrays of the kinds that calls give.
    """

    def __init__(
        self,
        program: Program,
        accumulate: str,
        sizes: tuple[tuple[int, ...], int, int, int],
        library: str,
        entries_address: Callable[[str, str], int],
        others: Sequence[NDArray] = (),
    ):
        self._sizes = sizes
        self._kept: list[NDArray] = []
        # Where an address stands, whose of `others` it is, and the slot of one along pairs.
        self._given: list[tuple[int, int, AlignedSlot | None]] = []
        words: list[int] = []
        for kind, number in zip(program.parameter_kinds, program.parameters, strict=True):
            bits = numpy.float64(number).view(numpy.int64) if kind == "float" else number
            words.append(int(bits))
        slots: list[tuple[Any, AlignedSlot | None]] = [(x, None) for x in program.tables]
        slots += zip(program.aligned, aligned_slots(program), strict=True)
        for x, slot in slots:
            if slot is not None:
                code = entries_address(slot.dtype, accumulate)
                words += [code, slot.block, 8 * row_words(program), slot.slot]
            if isinstance(x, Given):
                self._given.append((len(words), x.number, slot))
            found = others[x.number] if isinstance(x, Given) else as_numpy(x, library)
            found = found if slot is None else self._along_pairs(found, slot)
            if not isinstance(x, Given):
                self._kept.append(found)
            words += [address_of(found), *found.shape, *found.strides]
        self._words = numpy.array(words, numpy.int64)

    def words(self, others: Sequence[NDArray]) -> tuple[NDArray, list[NDArray]]:
        """The words for a call with these arrays, and what must outlive it."""
        if not self._given:
            return self._words, []
        words, held = self._words.copy(), []
        for at, number, slot in self._given:
            x = others[number]
            if slot is not None:
                x = self._along_pairs(x, slot)
                held.append(x)
            # Lengths and offsets are checked copies, whose strides need not be those of the caller's.
            words[at] = address_of(x)
            words[at + 1 + x.ndim : at + 1 + 2 * x.ndim] = x.strides
        return words, held

    def _along_pairs(self, x: NDArray, slot: AlignedSlot) -> NDArray:
        found: NDArray = aligned_view(numpy, x, slot.block, *self._sizes)
        return found
