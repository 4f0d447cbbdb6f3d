"""`flash_attn_varlen_func`: sequences of different lengths end to end."""

from __future__ import annotations

from typing import Any

from anyattn.arrays import Array
from anyattn.compat.flash_attn.arguments import NAMES, alibi, check_deterministic, window_bounds
from anyattn.compat.renaming import renaming
from anyattn.compat.seeds import drawn_seed
from anyattn.numbers import boolean
from anyattn.varlen import packed_options, varlen_attention

__all__ = ["flash_attn_varlen_func"]


@renaming(NAMES)
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
) -> Any:
    """Stand in for `flash_attn.flash_attn_varlen_func`.

    Parameters
    ----------
    q : array, shape (total queries, Hq, D)
    k : array, shape (total keys, Hkv, D)
    v : array, shape (total keys, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : integer array, shape (batch + 1,)
        Where sequences begin and the last one ends.
    max_seqlen_q, max_seqlen_k : int
        Lengths that no sequence exceeds; checked where the host can read the lengths.
    dropout_p, softmax_scale, causal, window_size, softcap, deterministic
        As for `flash_attn_func`, within each sequence.
    alibi_slopes : array, shape (Hq,) or (batch, Hq), optional
    return_attn_probs : bool, default False
    block_table : None
        Keys in pages are taken by `flash_attn_with_kvcache` alone.

    Returns
    -------
    out : array, shape (total queries, Hq, Dv)
    softmax_lse : array, shape (Hq, total queries)
        Only with `return_attn_probs`.
    S_dmask : None
        Only with `return_attn_probs`.
    """
    if block_table is not None:
        raise NotImplementedError("block_table: keys in pages are taken by flash_attn_with_kvcache alone")
    sequences = int(cu_seqlens_q.shape[0]) - 1
    score = None if alibi_slopes is None else alibi(alibi_slopes, q, sequences, q.shape[-2])
    own: dict[str, Any] = {
        "causal": boolean(causal, "causal"),
        "window": window_bounds(window_size),
        "score_mod": score,
        "dropout": dropout_p,
    }
    options: dict[str, Any] = {
        "softcap": softcap or None,
        "scale": softmax_scale,
        "dropout_seed": drawn_seed(dropout_p, q, "dropout_p"),
        "return_lse": boolean(return_attn_probs, "return_attn_probs"),
    }
    if boolean(deterministic, "deterministic"):
        check_deterministic(
            q, k, v, options | packed_options(q, k, v, cu_seqlens_q, cu_seqlens_k, mask=None, **own)
        )
    longest: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    result = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **longest, **own, **options)
    return (*result, None) if return_attn_probs else result
