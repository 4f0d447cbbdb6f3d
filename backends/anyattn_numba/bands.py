"""Spans of masks that leave each row one stretch of keys, straight from the ends of these.

Causal masks, windows, prefixes and key lengths, joined by `and`: each comparison holds the key to one side of
a bound that never falls from a row to the next. Most calls have no other mask. `anyattn.schedule`, which
takes any, takes milliseconds, and where lengths change in every call, that was the price of a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy

from anyattn.arrays import namespace
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.nodes import Apply, Const, Expr, Load, Symbol, depends_on, walk
from anyattn.expr.program import canonical
from anyattn.schedule import MASKED, Spans
from anyattn.schedule.parts import Parts

__all__ = ["Band", "band_of"]

NDArray = numpy.ndarray[Any, Any]

# Masked spans begin and end at multiples of so many keys, a register tile: a rest is computed key by key.
_KEYS = 8
# Numbers and factors beyond are left to `anyattn.schedule`: sums of a few products must not leave int64.
_MOST, _MOST_FACTOR = 1 << 40, 1 << 8


# A factor, a table, and the flat index at which each batch entry reads it.
_Entry = tuple[int, Any, NDArray]


@dataclass(frozen=True)
class _Bound:
    """constant + of_position * i + of_row * row + entries: the first key, or one past the last (`upper`)."""

    upper: bool
    constant: int
    of_position: int
    of_row: int
    entries: tuple[_Entry, ...]


class Band:
    """A mask whose rows see the keys from the largest lower to the least upper bound.

    No bound falls from a row to the next, and all are the same for all heads.

    Parameters
    ----------
    bounds : sequence of bound
    parts : Parts
        Whose mask it is.
    rows : int
        Queries of a block.
    """

    def __init__(self, bounds: Sequence[_Bound], parts: Parts, rows: int):
        self._bounds = bounds
        self._k_len = parts.k_len
        self._batch_size, self._num_heads = parts.batch_size, parts.num_heads
        first = numpy.arange(0, parts.q_len, rows, dtype=numpy.int64)
        last = numpy.minimum(first + rows, parts.q_len) - 1
        self._rows = last - first + 1
        # Where all rows of a block see the same keys, one row tells of it.
        self._same = rows == 1 or parts.q_len == 1 or not any(b.of_position + b.of_row for b in bounds)
        self._ends = first[None] if self._same else numpy.stack([first, last])

    def resized(self, k_len: int) -> Band:
        """The same bounds over another number of keys."""
        other = copy(self)
        other._k_len = k_len
        return other

    def spans(self, array_of: Callable[[Any], NDArray], offsets: NDArray) -> Spans | None:
        """What blocks of queries visit; None where a number is too large to be computed with here.

        Parameters
        ----------
        array_of : callable
            Gives the NumPy array that takes the place of a table's value.
        offsets : int64 array (batch_size,)
            Positions of row 0.
        """
        low: Any = numpy.zeros((1, *self._ends.shape), numpy.int64)
        high: Any = low + self._k_len
        if (offsets == offsets[:1]).all():
            offsets = offsets[:1]
        for bound in self._bounds:
            of_batch: Any = numpy.full(1, bound.constant, numpy.int64)
            if bound.of_position:
                if _largest(offsets) > _MOST:
                    return None
                of_batch = of_batch + bound.of_position * offsets
            for factor, table, at in bound.entries:
                found = array_of(table).reshape(-1)[at]
                if _largest(found) > _MOST:
                    return None
                of_batch = of_batch + factor * found.astype(numpy.int64)
            value = of_batch[:, None, None] + (bound.of_position + bound.of_row) * self._ends
            if bound.upper:
                high = numpy.minimum(high, value)
            else:
                low = numpy.maximum(low, value)
        if self._same:
            return self._spans([(0, low[:, 0], numpy.maximum(low, high)[:, 0])])
        return self._spans(_covering(low[:, 0], low[:, 1], high[:, 0], high[:, 1], self._k_len))

    def _spans(self, found: list[tuple[int, NDArray, NDArray]]) -> Spans:
        """Spans of these kinds, from keys (groups, blocks) to before others, one of each in a line."""
        groups, blocks, each = max(len(end) for _, _, end in found), len(self._rows), len(found)
        ends = numpy.empty((groups, blocks, each, 2), numpy.int64)
        for n, (_, begin, end) in enumerate(found):
            ends[:, :, n, 0], ends[:, :, n, 1] = begin, end
        lines = groups * blocks
        kinds = numpy.zeros((lines, each), numpy.uint8)
        kinds[:] = [kind for kind, _, _ in found]
        of_entry = numpy.zeros((self._batch_size, self._num_heads), numpy.int32)
        if groups > 1:
            of_entry += numpy.arange(groups, dtype=numpy.int32)[:, None]
        visited = (ends[..., 1] - ends[..., 0]).sum(axis=-1)
        return Spans(
            starts=numpy.arange(0, each * lines + 1, each, dtype=numpy.int64),
            ends=ends.reshape(-1, 2),
            kinds=kinds.reshape(-1),
            columns=numpy.zeros(0, numpy.int32),
            groups=of_entry,
            pairs=(visited * self._rows).reshape(-1),
        )


def _covering(
    begin: NDArray, all_from: NDArray, all_to: NDArray, end: NDArray, k_len: int
) -> list[tuple[int, NDArray, NDArray]]:
    """The keys of blocks that all rows see, some before them and some after.

    The first row of each block sees the keys from `begin` to before `all_to`, the last one those from
    `all_from` to before `end`.
    """
    empty, left, right = end <= begin, begin < all_from, all_to < end
    begin = numpy.where(left, begin // _KEYS * _KEYS, begin)
    all_from = numpy.where(left, -(-all_from // _KEYS) * _KEYS, all_from)
    all_to = numpy.where(right, all_to // _KEYS * _KEYS, all_to)
    end = numpy.where(right, numpy.minimum(-(-end // _KEYS) * _KEYS, k_len), end)
    end = numpy.where(empty, begin, end)
    # Where no key is seen by all rows, the last of the three has them all.
    apart = all_to <= all_from
    all_from, all_to = numpy.where(apart, begin, all_from), numpy.where(apart, begin, all_to)
    return [(0, all_from, all_to), (MASKED, begin, all_from), (MASKED, all_to, end)]


def band_of(parts: Parts, rows: int) -> Band | None:
    """The band that the mask of `parts` is, for blocks of `rows` queries, or None."""
    assert parts.visible is not None
    bounds = []
    joined = [canonical(parts.visible)]
    while joined:
        part = joined.pop()
        if isinstance(part, Apply) and part.op == "and":
            joined += part.args
            continue
        bound = _bound(part, parts.batch_size)
        if bound is None:
            return None
        bounds.append(bound)
    return Band(bounds, parts, rows)


def _bound(part: Expr, batch_size: int) -> _Bound | None:
    """The bound that a comparison sets to the key, where it is a sum over i, row and tables of the batch."""
    if not isinstance(part, Apply) or part.op not in ("lt", "le"):
        return None
    left, right = part.args
    # The comparison says that the sum of these is not above 0.
    terms = [(1, left), (-1, right)]
    constant, factors, entries = int(part.op == "lt"), dict.fromkeys(("i", "row", "j"), 0), []
    while terms:
        factor, node = terms.pop()
        if node.kind != "int" or abs(factor) > _MOST_FACTOR:
            return None
        if isinstance(node, Const):
            constant += factor * int(node.value)
        elif isinstance(node, Symbol) and node.name in factors:
            factors[node.name] += factor
        elif isinstance(node, Load) and (at := _flat_index(node, batch_size)) is not None:
            entries.append((factor, node.table.value, at))
        elif isinstance(node, Apply) and node.op in ("add", "sub"):
            terms += (factor, node.args[0]), (factor if node.op == "add" else -factor, node.args[1])
        elif isinstance(node, Apply) and node.op == "neg":
            terms.append((-factor, node.args[0]))
        elif isinstance(node, Apply) and node.op == "mul" and isinstance(node.args[0], Const):
            terms.append((factor * int(node.args[0].value), node.args[1]))
        elif isinstance(node, Apply) and node.op == "mul" and isinstance(node.args[1], Const):
            terms.append((factor * int(node.args[1].value), node.args[0]))
        else:
            return None
    of_key = factors["j"]
    slope = factors["i"] + factors["row"]
    if of_key not in (1, -1) or slope * of_key > 0 or abs(constant) > _MOST:
        return None
    # j + rest <= 0 is j < 1 - rest, and -j + rest <= 0 is rest <= j.
    upper = of_key == 1
    return _Bound(
        upper,
        upper - of_key * constant,
        -of_key * factors["i"],
        -of_key * factors["row"],
        tuple((-of_key * factor, table, at) for factor, table, at in entries),
    )


def _flat_index(node: Load, batch_size: int) -> NDArray | None:
    """Where in its flattened table each batch entry reads, if nothing else than it decides."""
    if any(depends_on(index, "h", "row", "i", "j", "score") for index in node.indices):
        return None
    if any(isinstance(inner, Load) or index.kind != "int" for index in node.indices for inner in walk(index)):
        return None
    entries = numpy.arange(batch_size, dtype=numpy.int64)
    tile = Tile(namespace(entries), None, numpy.int64, numpy.float64, {"b": entries}, 0, 1, None)
    at = numpy.zeros(batch_size, numpy.int64)
    for index, size in zip(node.indices, node.table.value.shape, strict=True):
        at = at * size + numpy.clip(evaluate(index, tile), 0, max(size - 1, 0))
    return at


def _largest(x: NDArray) -> int:
    return max(abs(int(x.min())), abs(int(x.max()))) if x.size else 0
