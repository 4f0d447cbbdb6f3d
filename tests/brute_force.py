"""What a mask lets through, pair by pair: the definition that schedules are held to."""

from __future__ import annotations

import array_api_compat.numpy as xp
import numpy as np

from anyattn.describe import Options, describe
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.schedule import EMPTY, FULL, PARTIAL
from anyattn.schedule.parts import parts_of


def parts(mask, q_len, k_len, batch=(), heads=1, **options):
    """What `attention` would give the schedule; the arrays take no memory."""
    q = np.broadcast_to(np.float32(0), (*batch, heads, q_len, 1))
    k = np.broadcast_to(np.float32(0), (*batch, heads, k_len, 1))
    call = describe("attention", q, k, k, Options(mask=mask, **options))
    return parts_of(call)


def dense(p):
    """What every row sees, (batch, heads, rows, keys), by evaluating all of it."""
    b = np.arange(p.batch_size).reshape(*p.batch_shape, 1, 1, 1)
    row = np.arange(p.q_len)[:, None]
    symbols = {
        "b": b,
        "h": np.arange(p.num_heads)[:, None, None],
        "row": row,
        "i": row + np.asarray(p.offset).reshape(*np.shape(p.offset), *(1,) * 3),
        "j": np.arange(p.k_len),
    }
    tile = Tile(xp, "cpu", np.dtype("int64"), np.dtype(p.accumulate), symbols, 0, p.k_len, None)
    with np.errstate(all="ignore"):
        seen = evaluate(p.visible, tile)
    seen = np.broadcast_to(seen, (*p.batch_shape, p.num_heads, p.q_len, p.k_len))
    return seen.reshape(p.batch_size, p.num_heads, p.q_len, p.k_len)


def tiled(seen, rows, keys):
    """Verdicts of the tiles of (rows, keys) of one head."""
    q, k = np.arange(0, seen.shape[0], rows), np.arange(0, seen.shape[1], keys)
    some = np.logical_or.reduceat(np.logical_or.reduceat(seen, q, axis=0), k, axis=1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(seen, q, axis=0), k, axis=1)
    return np.where(every, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)
