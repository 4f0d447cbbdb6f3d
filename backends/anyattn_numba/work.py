"""The work of a call cut into items: blocks of queries, the keys that each visits, and in which order.

An item is what one thread does alone: up to `Shape.queries` queries that share a key/value head. Items of a
head follow each other, so that its keys stay in the cache, those with most keys first, so that threads end
together. Few queries of many heads (decoding) are put side by side in the lanes of one item where the mask
does not tell heads apart; few items with many keys are split over the keys, and their parts merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from anyattn.arrays import Array, to_host
from anyattn.call import AttentionCall
from anyattn.expr.nodes import Apply, Const, Expr, J, walk
from anyattn.schedule import Spans, schedule
from anyattn.schedule.parts import Parts, parts_of, readable
from anyattn_numba.arguments import ITEM_WORDS
from anyattn_numba.bands import Band
from anyattn_numba.standins import Given, put_in
from anyattn_numba.target import Shape

__all__ = ["Cut", "Work", "cut", "offsets_of", "spans_of", "threads_for"]

NDArray = numpy.ndarray[Any, Any]

# Keys of a schedule's tile: narrow ones waste less along the diagonal, wide ones make shorter schedules.
TILE_KEYS = 32
# Decoding 4096 keys from pages of 16 that alternate took 2.2 times as long in tiles of two.
LEAST_TILE_KEYS = 8
# Products of a pair and a channel that another thread is worth: entering it takes microseconds, waking it up
# some tens.
_WORK_FOR_THREADS = 1 << 21
# Keys that a part of a split item has at least.
LEAST_KEYS = 512


@dataclass(frozen=True, eq=False)
class Work:
    """The items of a call.

    Attributes
    ----------
    items : int64 array (n, ITEM_WORDS)
        In the order in which they are handed out; see `anyattn_numba.arguments`.
    spans : Spans or None
        What the lines of the items visit; None: every key.
    parts : int
        Into how many parts the keys are split; 1: not at all.
    pairs : int
        Pairs (query, key) that are computed.
    """

    items: NDArray
    spans: Spans | None
    parts: int
    pairs: int


@dataclass(frozen=True, eq=False)
class Cut:
    """How calls of some sizes are cut, before it is known what their masks open.

    Attributes
    ----------
    rows : int
        Queries of a block, and of a tile of the schedule.
    items : int64 array (n, ITEM_WORDS)
        Those of a call without a mask.
    heads : int64 array (n,)
        The first query head of each.
    blocks : int64 array (n,)
        The number of each one's block among those of its head.
    lines : int
        Blocks of a head.
    """

    rows: int
    items: NDArray
    heads: NDArray
    blocks: NDArray
    lines: int
    k_len: int

    def resized(self, k_len: int) -> Cut:
        """The same for another number of keys."""
        items = self.items.copy()
        items[:, 6] = k_len
        return replace(self, items=items, k_len=k_len)

    def work(self, spans: Spans | None, threads: int) -> Work:
        """The work where a mask opens `spans` of keys (None: all), on some threads."""
        items = self.items
        if spans is None:
            pairs = items[:, 3] * self.k_len
        else:
            line = spans.groups[items[:, 0], self.heads].astype(numpy.int64) * self.lines + self.blocks
            pairs = spans.pairs[line] // self.rows * items[:, 3]
            order = numpy.lexsort((-pairs, items[:, 1], items[:, 0]))
            items, pairs = items[order], pairs[order]
            items[:, 4] = line[order]
        total = int(pairs.sum())
        parts = _parts(len(items), self.k_len, threads)
        if parts > 1:
            bounds = numpy.linspace(0, -(-self.k_len // TILE_KEYS), parts + 1).astype(numpy.int64) * TILE_KEYS
            bounds[-1] = self.k_len
            items = numpy.repeat(items, parts, axis=0)
            part = numpy.tile(numpy.arange(parts), len(items) // parts)
            items[:, 5], items[:, 6], items[:, 7] = bounds[part], bounds[part + 1], part
        return Work(items, spans, parts, total)


def cut(call: AttentionCall, shape: Shape) -> Cut:
    """How calls of the sizes and the structure of `call` are cut; of the rows that it asks for."""
    batch = math.prod(call.batch_shape)
    q_len, group = call.q_len, call.group_size
    q_len = q_len if call.rows is None else int(call.rows.shape[0])
    # Statistics add up the rows of one head.
    together = group > 1 and q_len < shape.queries and call.operation != "stats"
    if together and q_len > 0 and call.visible is not None and call.rows is None:
        together = not readable(parts_of(call)).by_head
    block = _block_rows(q_len, shape)
    lanes = group * q_len if together else q_len
    size = shape.queries if together else block
    first = numpy.arange(0, lanes, size, dtype=numpy.int64)
    count = numpy.minimum(lanes - first, size)
    heads = call.num_kv_heads if together else call.num_heads
    b, h, n = (x.ravel() for x in numpy.indices((batch, heads, len(first))))
    items = numpy.zeros((len(b), ITEM_WORDS), numpy.int64)
    items[:, 0] = b
    items[:, 1] = h if together else h // group
    items[:, 2] = first[n] + (0 if together else (h % group) * q_len)
    items[:, 3] = count[n]
    items[:, 4] = -1
    items[:, 6] = call.k_len
    items[:, 7] = -1
    return Cut(
        rows=max(q_len, 1) if together else block,
        items=items,
        heads=h * group if together else h,
        blocks=numpy.zeros_like(n) if together else n,
        lines=1 if together else len(first),
        k_len=call.k_len,
    )


def offsets_of(parts: Parts) -> NDArray:
    """The position of row 0 of each batch entry, int64 (batch_size,), contiguous."""
    offsets = numpy.broadcast_to(numpy.asarray(parts.offset, numpy.int64), parts.batch_shape)
    return numpy.ascontiguousarray(offsets.reshape(-1))


def spans_of(parts: Parts, band: Band | None, others: Sequence[Array], offsets: NDArray, rows: int) -> Spans:
    """What blocks of `rows` queries visit.

    Parameters
    ----------
    parts : Parts
        Of a mask with `Given` in the places of the arrays `others`.
    band : Band or None
        The mask, if it is one.
    others : sequence of array
    offsets : int64 array (batch_size,)
    rows : int
    """
    if band is not None:
        found = band.spans(lambda x: to_host(others[x.number] if isinstance(x, Given) else x), offsets)
        if found is not None:
            return found
    assert parts.visible is not None
    keys = tile_keys(parts.visible)
    return schedule(replace(parts, visible=put_in(parts.visible, others)), rows=rows, keys=keys).spans


def tile_keys(visible: Expr) -> int:
    """Keys of a schedule's tile: TILE_KEYS, or fewer where the mask has blocks (pages) that a tile cuts."""
    sizes = [
        int(node.args[1].value)
        for node in walk(visible)
        if isinstance(node, Apply) and node.op == "floordiv" and node.args[0] is J
        if isinstance(node.args[1], Const)
    ]
    size = math.gcd(TILE_KEYS, *sizes)
    return size if size >= LEAST_TILE_KEYS else TILE_KEYS


def _block_rows(q_len: int, shape: Shape) -> int:
    """Rows of a block: whole vectors, and blocks of a like size."""
    blocks = -(-q_len // shape.queries)
    rows = -(-q_len // max(blocks, 1))
    return max(-(-rows // shape.lanes) * shape.lanes, shape.lanes)


def _parts(items: int, k_len: int, threads: int) -> int:
    """Into how many parts the keys are split so that all threads have something to do."""
    if threads == 1 or items == 0 or items >= 2 * threads:
        return 1
    return max(1, min(-(-4 * threads // items), k_len // LEAST_KEYS))


def threads_for(work: Work, products: int, threads: int, pieces: int) -> int:
    """How many of `threads` threads share work of so many products a pair, in so many pieces."""
    return 1 if work.pairs * products < _WORK_FOR_THREADS else max(1, min(threads, pieces))
