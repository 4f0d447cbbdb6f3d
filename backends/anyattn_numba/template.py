"""Argument blocks of calls of one signature: what is the same in all of them, and what each one puts in.

A call gives its arrays, of which none is kept. What its mask opens may hang on the values in some of them
(lengths, say), and the work is cut anew where those differ from the last call's.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.expr.bounds import Range, index_ranges
from anyattn.expr.nodes import Aligned, Expr, Load, walk
from anyattn.expr.program import Program, lower
from anyattn.schedule.parts import parts_of
from anyattn_numba import arguments as a
from anyattn_numba.bands import band_of
from anyattn_numba.captures import Captures
from anyattn_numba.hostarrays import address_of, as_numpy
from anyattn_numba.kernels import entries_address, tile_address
from anyattn_numba.narrow import suits
from anyattn_numba.standins import Given, take_out
from anyattn_numba.target import Shape
from anyattn_numba.tiles import index_type, tile_memory
from anyattn_numba.work import Work, cut, offsets_of, spans_of

__all__ = ["Case", "Template", "put_work"]

NDArray = numpy.ndarray[Any, Any]

# Keys of a chunk. Scores, keys and values of one stay in the first or second cache.
_CHUNK = 128
_NARROW_CHUNK = 64
# Bytes of converted keys and values that a thread keeps at most.
_MOST_WIDE = 1 << 22
# Contents of more bytes are compared by their digest.
_MOST_BYTES = 4096
# Templates of up to so many keys are made of one another where all of them compute indices in 32 bits.
_MOST_KEYS = 1 << 24


@dataclass(frozen=True, eq=False)
class Case:
    """The work of calls in which all that decides it is the same, and a block with it."""

    decided_by: tuple[Any, ...]
    threads: int
    work: Work
    block: NDArray
    offsets: NDArray


class Template:
    """The arguments of calls of one signature.

    Parameters
    ----------
    call : AttentionCall
    shape : Shape
    tensors : dict of str to NumPy array
        Q, K and where there are V, OUT and scales (..., Lk, 1); their strides are those of all calls.
    lasting : bool
        Whether other calls of the signature are served, in which row 0 may stand anywhere from -Lq to Lk.

    Attributes
    ----------
    narrow : bool
        Whether all items have so few queries that lanes run along the channels.
    """

    def __init__(
        self,
        call: AttentionCall,
        shape: Shape,
        tensors: dict[str, NDArray],
        *,
        lasting: bool,
        keep_rows: bool = False,
    ):
        numbers: dict[int, int] = {}
        for n, x in enumerate(call.others):
            numbers.setdefault(id(x), n)
        visible, score, keep = roots = [
            None if root is None else take_out(root, numbers)
            for root in (call.visible, call.score, call.keep)
        ]
        self._library, self._accumulate = call.library, call.accumulate
        # Numbers of arrays in `AttentionCall.others`.
        self._offset = numbers.get(id(call.offset))
        self._sinks = numbers.get(id(call.sinks))
        scales = {a.K_SCALES: call.k_scales, a.V_SCALES: call.v_scales}
        self._scales = {place: numbers[id(x)] for place, x in scales.items() if x is not None}
        self._lengths = numbers.get(id(call.kv_lengths))
        integers = _numbers_in(visible, "int") | _numbers_in(score, "int")
        deciding = _numbers_in(visible) | integers | {self._offset}
        self._deciding = sorted(n for n in deciding if n is not None)
        self._cut = cut(call, shape)
        queries = int(self._cut.items[:, 3].max(initial=0))
        self.narrow = suits(shape, queries, call.head_dim, call.v_head_dim)
        self._parts = replace(parts_of(call), visible=visible if call.rows is None and call.q_len else None)
        self._band = None if self._parts.visible is None else band_of(self._parts, self._cut.rows)
        anywhere = lasting and self._offset is not None
        self._ranges = index_ranges(
            replace(call, offset_host=None) if anywhere else call, unread_offset=(-call.q_len, call.k_len)
        )
        self._program = program = lower(visible, score, keep) if any(x is not None for x in roots) else None
        self._captures = None if program is None else self._capture(call, program)
        # Other integers than lengths are read for each case.
        fixed = program is not None and not integers - {self._lengths}
        self._index = (
            self._index_type(program, call.others, self._ranges) if program is not None and fixed else None
        )
        self._resizes = lasting and (program is None or (fixed and self._is_narrow(call, program)))
        self._kept: list[NDArray] = []
        self._block = numpy.zeros(a.BLOCK_WORDS, numpy.int64)
        self._strides = {name: x.strides for name, x in tensors.items()}
        self._fill(call, shape, tensors, keep_rows and not self.narrow)
        self._case: Case | None = None

    def word(self, place: int) -> int:
        """A word that is the same in all calls."""
        return int(self._block[place // 8])

    def case(self, others: Sequence[Array], threads: int) -> Case:
        """The case of a call on some threads."""
        case = self._case
        if not self._deciding and case is not None and case.threads == threads:
            return case
        decided_by = (threads, *[_contents(as_numpy(others[n], self._library)) for n in self._deciding])
        if case is None or case.decided_by != decided_by:
            self._case = case = self._new_case(decided_by, others, threads)
        return case

    def resized(self, tensors: dict[str, NDArray]) -> Template | None:
        """The template of calls with another number of keys, K and V like these; None where it is not known.

        Row 0 of calls without an offset of their own stands at Lk - Lq.
        """
        k_len = tensors["K"].shape[-2]
        if not self._resizes or k_len > _MOST_KEYS or self.word(a.AT_WIDE_KEYS):
            return None
        other = copy(self)
        other._parts = parts = replace(self._parts, k_len=k_len, offset=k_len - self._parts.q_len)
        other._cut = self._cut.resized(k_len)
        other._band = None if self._band is None else self._band.resized(k_len)
        other._kept, other._block, other._case = list(self._kept), self._block.copy(), None
        other._put(a.K_LEN, k_len)
        for name, x in tensors.items():
            if x.strides != self._strides[name]:
                other._put_strides(getattr(a, f"{name}_BATCH"), x, parts.batch_shape)
        return other

    def put_others(self, block: NDArray, others: Sequence[Array]) -> list[Any]:
        """Put the addresses of a call's own arrays into its block; gives what must outlive its use."""
        if not others and self._captures is None:
            return []
        found = [as_numpy(x, self._library) for x in others]
        held: list[Any] = [found]
        if self._sinks is not None:
            sinks = numpy.ascontiguousarray(found[self._sinks])
            block[a.SINKS // 8] = address_of(sinks)
            held.append(sinks)
        for place, number in self._scales.items():
            block[place // 8] = address_of(found[number])
        if self._captures is not None:
            words, views = self._captures.words(found)
            block[a.CAPTURED // 8] = address_of(words)
            held += words, views
        return held

    def _new_case(self, decided_by: tuple[Any, ...], others: Sequence[Array], threads: int) -> Case:
        parts, block = self._parts, self._block.copy()
        if self._offset is not None:
            parts = replace(parts, offset=as_numpy(others[self._offset], self._library))
        offsets = offsets_of(parts)
        spans = None
        if parts.visible is not None:
            spans = spans_of(parts, self._band, others, offsets, self._cut.rows)
        work = self._cut.work(spans, threads)
        put_work(block, work)
        block[a.OFFSETS // 8] = address_of(offsets)
        if self._program is not None:
            index = self._index or self._index_type(self._program, others, self._ranges)
            block[a.TILE_CODE // 8] = tile_address(self._program, self._accumulate, index)
        return Case(decided_by, threads, work, block, offsets)

    def _index_type(self, program: Program, others: Sequence[Array], ranges: dict[str, Range]) -> str:
        """The type of indices in a call; lengths are taken to be any that a call may have."""

        def read(x: Any) -> Any:
            if not isinstance(x, Given):
                return x
            return numpy.array([0, ranges["j"][1] + 1]) if x.number == self._lengths else others[x.number]

        return index_type(replace(program, tables=tuple(map(read, program.tables))), ranges)

    def _is_narrow(self, call: AttentionCall, program: Program) -> bool:
        """Whether all templates of a number of keys compute indices in 32 bits."""
        ranges = self._ranges | {"j": (0, _MOST_KEYS - 1), "i": (-call.q_len, _MOST_KEYS + call.q_len)}
        return self._index_type(program, call.others, ranges) == "int32"

    def _capture(self, call: AttentionCall, program: Program) -> Captures:
        return Captures(
            program,
            call.accumulate,
            (call.batch_shape, call.num_heads, call.q_len, call.k_len),
            call.library,
            entries_address,
            [as_numpy(x, call.library) for x in call.others],
        )

    def _fill(self, call: AttentionCall, shape: Shape, tensors: dict[str, NDArray], keep_rows: bool) -> None:
        """The words that are the same in all calls."""
        put = self._put
        put(a.NUM_HEADS, call.num_heads)
        put(a.GROUP_SIZE, call.group_size)
        put(a.Q_LEN, call.q_len)
        put(a.K_LEN, call.k_len)
        put(a.HEAD_DIM, call.head_dim)
        put(a.V_HEAD_DIM, call.v_head_dim)
        for name, x in tensors.items():
            self._put_strides(getattr(a, f"{name}_BATCH"), x, call.batch_shape)
        if call.sinks is not None and self._sinks is None:
            put(a.SINKS, numpy.ascontiguousarray(as_numpy(call.sinks, call.library)))
        put(a.SCALE, int(numpy.float64(call.scale).view(numpy.int64)))
        put(a.HAS_SCORE, call.score is not None)
        put(a.HAS_KEEP, call.keep is not None)
        chunk = _NARROW_CHUNK if self.narrow else _CHUNK
        put(a.CHUNK, chunk)
        tile = 0 if self._program is None else tile_memory(self._program, call.accumulate, chunk)
        _lay_out(put, call, shape, chunk, tile, keep_rows and _converted(call, shape, tensors))

    def _put(self, place: int, value: int | NDArray) -> None:
        if isinstance(value, numpy.ndarray):
            self._kept.append(value)
            value = address_of(value)
        self._block[place // 8] = value

    def _put_strides(self, place: int, x: NDArray, batch_shape: tuple[int, ...]) -> None:
        """Offsets of the batch entries and strides of an array (..., H, L, D)."""
        offsets = numpy.zeros(batch_shape, numpy.int64)
        lead = x.shape[:-3]
        for axis, (size, stride) in enumerate(zip(lead, x.strides[: len(lead)], strict=True)):
            if size > 1:
                index = numpy.arange(size, dtype=numpy.int64) * stride
                offsets += index.reshape(-1, *[1] * (len(lead) - axis - 1))
        self._put(place, numpy.ascontiguousarray(offsets.reshape(-1)))
        for n, stride in enumerate(x.strides[-3:]):
            self._put(place + 8 + 8 * n, stride)


def put_work(block: NDArray, work: Work) -> None:
    """Put the items of a call and what they visit into its block."""
    block[a.NUM_ITEMS // 8], block[a.ITEMS // 8] = len(work.items), address_of(work.items)
    if work.spans is not None:
        spans = work.spans
        for n, x in enumerate((spans.starts, spans.ends, spans.kinds, spans.columns), a.SPAN_STARTS // 8):
            block[n] = address_of(x)


def _numbers_in(root: Expr | None, *kinds: str) -> set[int]:
    """Numbers of the given arrays of an expression, or of those of some kinds."""
    found = set()
    for node in () if root is None else walk(root):
        x = node.table.value if isinstance(node, Load) else node.value if isinstance(node, Aligned) else None
        if isinstance(x, Given) and (not kinds or node.kind in kinds):
            found.add(x.number)
    return found


def _contents(x: NDArray) -> bytes:
    if x.nbytes <= _MOST_BYTES:
        return x.tobytes()
    return blake2b(numpy.ascontiguousarray(x).view(numpy.uint8).data).digest()


def _converted(call: AttentionCall, shape: Shape, tensors: dict[str, NDArray]) -> bool:
    """Whether several items convert the same keys and values, and a thread has room for all of a head."""
    stored = call.dtype if call.k_scales is None else "int8"
    in_place = stored == shape.element and all(tensors[x].strides[-1] == shape.itemsize for x in "KV")
    nbytes = call.k_len * (call.head_dim + call.v_head_dim) * shape.itemsize
    return not in_place and call.group_size * call.q_len > shape.queries and nbytes <= _MOST_WIDE


def _lay_out(put: Any, call: AttentionCall, shape: Shape, chunk: int, tile: int, wide: bool) -> None:
    """Where the parts of a thread's memory begin."""
    size, width, lanes = shape.itemsize, shape.queries, shape.lanes
    d, dv = (-(-n // lanes) * lanes for n in (call.head_dim, call.v_head_dim))
    parts = {
        a.AT_LANES: 3 * width * 8,
        a.AT_STATE: 5 * width * size,
        a.AT_QUERY: d * width * size,
        a.AT_SUM: dv * width * size,
        a.AT_SCORE: chunk * width * size,
        a.AT_STAGE: max(d, dv) * width * size,
        a.AT_KEYS: chunk * call.head_dim * size,
        a.AT_VALUES: chunk * call.v_head_dim * size,
        a.AT_SEEN: chunk * width * size,
        a.AT_TILE: 8 * a.TILE_WORDS + tile * width,
    }
    if wide:
        parts |= {
            a.AT_WIDE_KEYS: call.k_len * call.head_dim * size,
            a.AT_WIDE_VALUES: call.k_len * call.v_head_dim * size,
            a.AT_WIDENED: 2 * -(-call.k_len // a.WIDENED),
        }
    at = 64
    for place, nbytes in parts.items():
        put(place, at)
        at += -(-nbytes // 64) * 64
    put(a.SCRATCH_SIZE, at)
