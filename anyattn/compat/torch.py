"""`torch.nn.functional.scaled_dot_product_attention`, argument by argument."""

from __future__ import annotations

from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.attention import attention
from anyattn.compat.autocast import autocast
from anyattn.compat.renaming import renaming
from anyattn.compat.seeds import drawn_seed

__all__ = ["scaled_dot_product_attention"]


@renaming(
    {
        "q": "query",
        "k": "key",
        "v": "value",
        "mask": "attn_mask",
        "bias": "attn_mask",
        "dropout": "dropout_p",
        "causal": "is_causal",
    }
)
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Stand in for `torch.nn.functional.scaled_dot_product_attention`.

    Parameters
    ----------
    query : array, shape (..., Hq, L, E)
        Tensors, or arrays of any library. Two axes (L, E) do as well.
    key : array, shape (..., H, S, E)
        All leading axes broadcast, those of heads too.
    value : array, shape (..., H, S, Ev)
        As `key`.
    attn_mask : array, broadcastable to (..., Hq, L, S), optional
        Boolean, True where a key takes part, or of float32 or the dtype of `query`, added to the scores; or
        what `torch.nn.attention.bias.causal_upper_left` or `causal_lower_right` gives.
    dropout_p : float, default 0.0
        Probability with which a weight is dropped, in training or not, as in torch; below 1. The seed comes
        from torch's generator (`torch.manual_seed` repeats it), or from NumPy's or CuPy's for their arrays.
    is_causal : bool, default False
        Row r sees the keys 0, ..., r: the *upper left* corner of the scores, where `anyattn.attention`
        aligns the lower right one. Not together with `attn_mask`.
    scale : float, optional
        Default 1 / sqrt(E).
    enable_gqa : bool, default False
        Let consecutive query heads share a key/value head.

    Returns
    -------
    array, shape (..., Hq, L, Ev)

    Raises
    ------
    TypeError, ValueError
        Where torch raises `RuntimeError` or `IndexError` for arguments that do not fit.

    Notes
    -----
    What differs from torch 2.13: a row that sees no key is 0 as there, and its gradient is 0; but where torch
    gives NaN for NaN at hidden keys, hidden keys do not matter here on backends that are strict about them.
    `value` has as many heads as `key` where `enable_gqa` is True, and E is at least 1. There is no choice by
    `torch.nn.attention.sdpa_kernel`: `anyattn.use(backend=)` chooses, and `anyattn.explain` tells.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal: wanted False where attn_mask is given, got True")
    for name, x in (("query", query), ("key", key), ("value", value)):
        arrays.check_plain(x, name)
        if x.ndim < (3 if enable_gqa else 2):
            wanted = "(..., heads, length, dim) where enable_gqa" if enable_gqa else "(..., length, dim)"
            raise ValueError(f"{name}: wanted axes {wanted}, got shape {tuple(x.shape)}")
    q_offset = 0
    if attn_mask is not None and type(attn_mask).__name__ == "CausalBias":
        q_offset, is_causal, attn_mask = _first_query(attn_mask, query, key), True, None
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    rank = max(query.ndim, key.ndim, value.ndim)
    query, key, value = (_with_axes(x, min(rank, 3)) for x in (query, key, value))
    if rank > 2 and not enable_gqa:
        query, key, value = _same_heads(query, key, value)
    mask = bias = None
    if attn_mask is not None:
        arrays.check_plain(attn_mask, "attn_mask")
        kind, dtype = arrays.kind(attn_mask), arrays.dtype_name(attn_mask)
        if kind != "bool" and dtype not in ("float32", arrays.dtype_name(query)):
            raise TypeError(
                f"attn_mask: wanted dtype bool, float32 or {arrays.dtype_name(query)} like query, got {dtype}"
            )
        placed = _with_axes(attn_mask, rank) if attn_mask.ndim > 2 else attn_mask
        mask, bias = (placed, None) if kind == "bool" else (None, placed)
    return attention(
        query,
        key,
        value,
        causal=is_causal,
        mask=mask,
        bias=bias,
        scale=scale,
        q_offset=q_offset,
        dropout=dropout_p,
        dropout_seed=drawn_seed(dropout_p, query, "dropout_p"),
    )


def _first_query(bias: Any, query: Array, key: Array) -> int:
    """The position of the first query under torch's own word for causal order, a tensor without entries."""
    lengths = int(query.shape[-2]), int(key.shape[-2])
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise ValueError(
            f"attn_mask: wanted a CausalBias of {lengths}, got one of {(bias.seq_len_q, bias.seq_len_kv)}"
        )
    return lengths[1] - lengths[0] if bias.variant.name == "LOWER_RIGHT" else 0


def _with_axes(x: Array, rank: int) -> Array:
    """`x` with leading axes of size 1 up to a rank."""
    return x[(None,) * (rank - x.ndim) + (...,)] if x.ndim < rank else x


def _same_heads(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Views with one number of heads, or the key/value head that all query heads share."""
    heads = {name: int(x.shape[-3]) for name, x in (("query", query), ("key", key), ("value", value))}
    if heads["key"] == heads["value"] == 1 or len(set(heads.values())) == 1:
        return query, key, value
    count = max(heads.values())
    for name, own in heads.items():
        if own not in (1, count):
            raise ValueError(
                f"{name}: wanted {count} heads or 1, got {own} (enable_gqa lets query heads share): {heads}"
            )

    def spread(x: Array) -> Array:
        return arrays.namespace(x).broadcast_to(x, (*x.shape[:-3], count, *x.shape[-2:]))

    return spread(query), spread(key), spread(value)
