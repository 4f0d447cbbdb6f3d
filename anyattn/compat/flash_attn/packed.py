"""`flash_attn_varlen_func` and its packed forms: sequences of different lengths end to end."""

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
from anyattn.compat.flash_attn.pages import check_pages, check_table, of_table
from anyattn.compat.renaming import renaming
from anyattn.compat.seeds import drawn_seed
from anyattn.dynamo import leave_out
from anyattn.numbers import boolean
from anyattn.varlen import packed_options, varlen_attention

__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


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
    k : array, shape (total keys, Hkv, D), or (pages, page_size, Hkv, D) with `block_table`
    v : array, shape (total keys, Hkv, Dv), or (pages, page_size, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : integer array, shape (batch + 1,)
        Where sequences begin and the last one ends; of keys in pages the differences alone count, which are
        the lengths of the sequences.
    max_seqlen_q, max_seqlen_k : int
        Lengths that no sequence exceeds; checked where the host can read the lengths.
    dropout_p, softmax_scale, causal, window_size, softcap, deterministic
        As for `flash_attn_func`, within each sequence.
    alibi_slopes : array, shape (Hq,) or (batch, Hq), optional
    return_attn_probs : bool, default False
    block_table : integer array, shape (batch, most pages of a sequence), optional
        Pages of each sequence, in order; a page stands once in a sequence, which is checked where the host
        can read the table. They are read where they lie, in a pool whose tokens all lie at one distance from
        each other in memory; another one is copied whole.

    Returns
    -------
    out : array, shape (total queries, Hq, Dv)
    softmax_lse : array, shape (Hq, total queries)
        Only with `return_attn_probs`.
    S_dmask : None
        Only with `return_attn_probs`.
    """
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
    longest = max_seqlen_q, max_seqlen_k
    in_order = boolean(deterministic, "deterministic")
    if block_table is not None:
        result = _in_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, block_table, in_order, own, options)
        return (*result, None) if return_attn_probs else result
    if in_order:
        check_deterministic(
            q, k, v, options | packed_options(q, k, v, cu_seqlens_q, cu_seqlens_k, mask=None, **own)
        )
    lengths: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    result = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **lengths, **own, **options)
    return (*result, None) if return_attn_probs else result


def _in_pages(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    longest: tuple[int, int],
    block_table: Array,
    deterministic: bool,
    own: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Attention of packed queries to keys in pages."""
    for name, x in (("k", k_pages), ("v", v_pages)):
        arrays.check_plain(x, name)
        if x.ndim != 4 or tuple(x.shape[:3]) != tuple(k_pages.shape[:3]):
            raise ValueError(
                f"{name}: wanted (pages, page_size, heads, dim) with block_table, alike in all axes but the "
                f"last, got shape {tuple(x.shape)}"
            )
    arrays.check_beside(cu_seqlens_k, "cu_seqlens_k", q, "q")
    check_table(block_table, "block_table", 2, int(cu_seqlens_k.shape[0]) - 1, q)
    xp = arrays.namespace(q)
    index = arrays.index_dtype(xp, arrays.device(q))
    with arrays.exactly(q):
        lengths = arrays.cast(xp, cu_seqlens_k[1:] - cu_seqlens_k[:-1], index)
        table = arrays.cast(xp, block_table, index)
        check_pages(table, lengths, k_pages, "block_table")
        pages = of_table(k_pages, v_pages, table, lengths, index)
        k, v = (arrays.moveaxis(xp, x, 0, 1) for x in (pages.k, pages.v))
    options |= packed_options(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlens=longest, mask=None, pages=pages, **own
    )
    if deterministic:
        check_deterministic(q, k, v, options)
    return attention(q, k, v, **options)


leave_out(_in_pages, "block_table is looked up on the host; call it outside of the compiled function")


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Stand in for `flash_attn.flash_attn_varlen_qkvpacked_func`.

    Parameters
    ----------
    qkv : array, shape (total, 3, H, D)
        q, k and v; read in place.
    cu_seqlens : integer array, shape (batch + 1,)
        Where sequences begin and the last one ends.
    max_seqlen : int
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_varlen_func`.

    Returns
    -------
    array or tuple
        As `flash_attn_varlen_func`.
    """
    q, k, v = unpacked(qkv, "qkv", ("total",), 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
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
) -> Any:
    """Stand in for `flash_attn.flash_attn_varlen_kvpacked_func`.

    Parameters
    ----------
    q : array, shape (total queries, Hq, D)
    kv : array, shape (total keys, 2, Hkv, D)
        k and v; read in place.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_varlen_func`.

    Returns
    -------
    array or tuple
        As `flash_attn_varlen_func`.
    """
    k, v = unpacked(kv, "kv", ("total",), 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
