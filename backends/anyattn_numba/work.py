"""The work of a call cut into items: blocks of queries, the keys that each visits, and in which order.

An item is what one thread does alone: up to `Shape.queries` queries that share a key/value head. Items of a
head follow each other, so that its keys stay in the cache, those with most keys first, so that threads end
together. Few queries of many heads (decoding) are put side by side in the lanes of one item where the mask
does not tell heads apart; few items with many keys are split over the keys, and their parts merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

from anyattn.call import AttentionCall
from anyattn.schedule import Spans, schedule
from anyattn_numba.arguments import ITEM_WORDS
from anyattn_numba.target import Shape

__all__ = ["Work", "items_of"]

NDArray = numpy.ndarray[Any, Any]

# Keys of a schedule's tile: narrow ones waste less along the diagonal, wide ones make shorter schedules.
TILE_KEYS = 32
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


def items_of(call: AttentionCall, shape: Shape, threads: int) -> Work:
    """The work of a call on some threads; of the rows that it asks for without a schedule."""
    batch = math.prod(call.batch_shape)
    q_len, k_len, group = call.q_len, call.k_len, call.group_size
    q_len = q_len if call.rows is None else int(call.rows.shape[0])
    block = _block_rows(q_len, shape)
    spans = None
    # Statistics add up the rows of one head.
    together = group > 1 and q_len < shape.queries and call.operation != "stats"
    if call.visible is not None and call.rows is None and q_len > 0:
        made = schedule(call, rows=q_len if together else block, keys=TILE_KEYS)
        if together and made.groups[1] > 1:
            together = False
            made = schedule(call, rows=block, keys=TILE_KEYS)
        spans = made.spans
    lanes = group * q_len if together else q_len
    size = shape.queries if together else block
    first = numpy.arange(0, lanes, size, dtype=numpy.int64)
    count = numpy.minimum(lanes - first, size)
    heads = call.num_kv_heads if together else call.num_heads
    blocks = len(first)
    b, h, n = (x.ravel() for x in numpy.indices((batch, heads, blocks)))
    items = numpy.zeros((len(b), ITEM_WORDS), numpy.int64)
    items[:, 0] = b
    items[:, 1] = h if together else h // group
    items[:, 2] = first[n] + (0 if together else (h % group) * q_len)
    items[:, 3] = count[n]
    items[:, 4] = -1
    items[:, 6] = k_len
    items[:, 7] = -1
    if spans is None:
        pairs = items[:, 3] * k_len
    else:
        per_group = 1 if together else blocks
        line = spans.groups[b, h * group if together else h].astype(numpy.int64) * per_group
        line += 0 if together else n
        items[:, 4] = line
        pairs = spans.pairs[line] // max(q_len if together else block, 1) * items[:, 3]
        order = numpy.lexsort((-pairs, items[:, 1], b))
        items, pairs = items[order], pairs[order]
    total = int(pairs.sum())
    parts = _parts(len(items), k_len, threads)
    if parts > 1:
        bounds = numpy.linspace(0, -(-k_len // TILE_KEYS), parts + 1).astype(numpy.int64) * TILE_KEYS
        bounds[-1] = k_len
        items = numpy.repeat(items, parts, axis=0)
        part = numpy.tile(numpy.arange(parts), len(items) // parts)
        items[:, 5], items[:, 6], items[:, 7] = bounds[part], bounds[part + 1], part
    return Work(numpy.ascontiguousarray(items), spans, parts, total)


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
