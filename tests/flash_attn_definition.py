"""FlashAttention's formulas, for the tests of what stands in for it."""

from __future__ import annotations

import numpy as np


def defined(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """(out, lse) by the formulas of `flash_attn_func`'s documentation."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    s = np.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    i, j = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], np.arange(k.shape[1])
    s = softcap * np.tanh(s / softcap) if softcap else s
    s = s if slopes is None else s - np.reshape(slopes, (-1, q.shape[2], 1, 1)) * abs(i - j)
    left, right = window
    hidden = (
        (j < i - left if left >= 0 else False) | (j > i + right if right >= 0 else False) | (causal & (j > i))
    )
    p = np.where(hidden, 0, np.exp(s))
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    p /= np.where(total == 0, 1, total)[..., None]
    return np.einsum("bhij,bjhd->bihd", p, v), lse


def turned(x, cos, sin, interleaved):
    """`x` (L, H, D) with its first features turned by row l of the tables (L, dims / 2)."""
    dims = 2 * cos.shape[-1]
    out = x.copy()
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2))
        if interleaved
        else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    a, b, c, s = x[..., first], x[..., second], cos[:, None], sin[:, None]
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    return out
