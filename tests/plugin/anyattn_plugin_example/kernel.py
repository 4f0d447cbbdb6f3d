"""The arithmetic of the `einsum` backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anyattn.call import AttentionCall


def attend(call: AttentionCall) -> tuple[np.ndarray, np.ndarray | None]:
    """Return out (..., Hq, Lq, Dv), and lse (..., Hq, Lq) if the call asks for it."""
    batch, heads, rows, keys = call.batch_shape, call.num_heads, call.q_len, call.k_len
    q, k, v = (
        np.broadcast_to(x, (*batch, *x.shape[-3:])).astype(call.accumulate, copy=False)
        for x in (call.q, call.k, call.v)
    )
    bias = None if call.bias is None else np.broadcast_to(call.bias, (*batch, heads, rows, keys))
    offset = np.broadcast_to(call.offset, batch)
    lengths = np.broadcast_to(keys if call.kv_lengths is None else call.kv_lengths, batch)
    out = np.empty((*batch, heads, rows, v.shape[-1]), dtype=call.q.dtype)
    lse = np.empty((*batch, heads, rows), dtype=call.accumulate)
    # A NaN or an infinity at a key that a row sees makes that row NaN, which is no accident.
    with np.errstate(invalid="ignore"):
        for entry in np.ndindex(*batch):
            valid = lengths[entry]
            out[entry], lse[entry] = _attend_entry(
                call,
                q[entry],
                k[entry][:, :valid],
                v[entry][:, :valid],
                None if bias is None else bias[entry][..., :valid],
                _seen(call, offset[entry], valid),
            )
    return out, lse if call.return_lse else None


def _seen(call: AttentionCall, offset: int, valid: int) -> np.ndarray:
    """Return which of `valid` keys each row sees, (Lq, valid)."""
    ahead = np.arange(valid) - (np.arange(call.q_len)[:, None] + offset)
    seen = np.ones(ahead.shape, dtype=bool)
    if call.causal:
        seen &= ahead <= 0
    left, right = call.window or (None, None)
    if left is not None:
        seen &= ahead >= -left
    if right is not None:
        seen &= ahead <= right
    return seen


def _attend_entry(
    call: AttentionCall,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    seen: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one batch entry: q (Hq, Lq, D), k (Hkv, Lk, D), v (Hkv, Lk, Dv)."""
    heads, rows = q.shape[:2]
    groups = q.reshape(len(k), call.group_size, rows, q.shape[-1])
    scores = call.scale * np.einsum("ngld,nkd->nglk", groups, k).reshape(heads, rows, k.shape[1])
    if call.softcap is not None:
        scores = call.softcap * np.tanh(scores / call.softcap)
    if bias is not None:
        scores = scores + bias.astype(call.accumulate, copy=False)
    scores = np.where(seen, scores, -np.inf)

    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    if call.sinks is not None:
        sinks = call.sinks.astype(call.accumulate, copy=False)[:, None, None]
        top = np.maximum(top, sinks)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if call.sinks is not None:
        total = total + np.exp(sinks - top)

    shared = weights.reshape(len(k), call.group_size, rows, k.shape[1])
    out = np.einsum("nglk,nkd->ngld", shared, v).reshape(heads, rows, v.shape[-1])
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return out / np.where(total == 0, 1, total), lse
