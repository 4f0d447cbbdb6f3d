"""`flash_attn.flash_attn_func` of FlashAttention 2 and its packed forms, argument by argument."""

from __future__ import annotations

from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.attention import attention
from anyattn.compat.flash_attn.arguments import (
    NAMES,
    alibi,
    check_deterministic,
    unpacked,
    window_bounds,
)
from anyattn.compat.renaming import renaming
from anyattn.compat.seeds import drawn_seed
from anyattn.numbers import boolean

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]


@renaming(NAMES)
def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Stand in for `flash_attn.flash_attn_func` (Dao, "FlashAttention-2", 2023).

    Parameters
    ----------
    q : array, shape (batch, Lq, Hq, D)
        Any library, device and floating dtype that `anyattn.attention` takes.
    k : array, shape (batch, Lk, Hkv, D)
        Hkv divides Hq; consecutive query heads share a key/value head.
    v : array, shape (batch, Lk, Hkv, Dv)
        Dv may differ from D.
    dropout_p : float, default 0.0
        Probability with which a weight is dropped, below 1. The seed comes from torch's generator
        (`torch.manual_seed` repeats it), or from NumPy's or CuPy's for their arrays; the weights that
        FlashAttention drops for a state of the generator are others.
    softmax_scale : float, optional
        Default 1 / sqrt(D).
    causal : bool, default False
        The last query sees the last key: row r sees the keys j <= r + Lk - Lq.
    window_size : (left, right), default (-1, -1)
        Row r sees the keys r + Lk - Lq - left <= j <= r + Lk - Lq + right; -1 is unbounded.
    softcap : float, default 0.0
        c > 0: the scaled scores become c * tanh(score / c).
    alibi_slopes : array, shape (Hq,) or (batch, Hq), optional
        Adds -slope * abs(r + Lk - Lq - j) to the capped scores.
    deterministic : bool, default False
        Refuse a call whose gradients are wanted unless its backend declares `deterministic_backward`. The
        forward pass is deterministic in any case.
    return_attn_probs : bool, default False
        Also return the log of the softmax denominator, and None where FlashAttention gives the dropout
        pattern.

    Returns
    -------
    out : array, shape (batch, Lq, Hq, Dv)
        A row that sees no key is 0.
    softmax_lse : array, shape (batch, Hq, Lq)
        Only with `return_attn_probs`; float32, or float64 for float64 inputs.
    S_dmask : None
        Only with `return_attn_probs`.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    anyattn.errors.UnsupportedCallError
        For `deterministic` as above.

    Notes
    -----
    Where a row sees no key, `softmax_lse` is -inf; FlashAttention 2 writes +inf and FlashAttention 3 -inf.
    With `causal`, FlashAttention 2 computes ALiBi as slope * j, which differs from the bias above by a
    constant in each row: `out` is the same, and its `softmax_lse` is greater by slope * (r + Lk - Lq).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.check_plain(x, name)
        if x.ndim != 4:
            raise ValueError(f"{name}: wanted axes (batch, length, heads, dim), got shape {tuple(x.shape)}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: wanted a batch of {q.shape[0]} like q, got shape {tuple(x.shape)}")
    options: dict[str, Any] = {
        "causal": causal,
        "window": window_bounds(window_size),
        "score_mod": None if alibi_slopes is None else alibi(alibi_slopes, q, q.shape[0], q.shape[2]),
        "softcap": softcap or None,
        "scale": softmax_scale,
        "dropout": dropout_p,
        "dropout_seed": drawn_seed(dropout_p, q, "dropout_p"),
        "layout": "blhd",
        "return_lse": boolean(return_attn_probs, "return_attn_probs"),
    }
    if boolean(deterministic, "deterministic"):
        check_deterministic(q, k, v, options)
    result = attention(q, k, v, **options)
    return (*result, None) if return_attn_probs else result


def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Stand in for `flash_attn.flash_attn_qkvpacked_func`.

    Parameters
    ----------
    qkv : array, shape (batch, L, 3, H, D)
        q, k and v; read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.

    Returns
    -------
    array or tuple
        As `flash_attn_func`.
    """
    q, k, v = unpacked(qkv, "qkv", ("batch", "length"), 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Stand in for `flash_attn.flash_attn_kvpacked_func`.

    Parameters
    ----------
    q : array, shape (batch, Lq, Hq, D)
        As for `flash_attn_func`.
    kv : array, shape (batch, Lk, 2, Hkv, D)
        k and v; read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.

    Returns
    -------
    array or tuple
        As `flash_attn_func`.
    """
    k, v = unpacked(kv, "kv", ("batch", "length"), 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
