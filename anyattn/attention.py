"""The front door: `attention`, and its two relatives that look at the weights.

Each describes the call (`describe`), lets dispatch choose a backend and run it, and gives the result back in
the caller's layout. `attention` goes this way once for each kind of call, and then by its plan (`plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from anyattn import dispatch, masks, plan, scores
from anyattn.arrays import Array
from anyattn.lookup import Cache
from anyattn.masks import Mask
from anyattn.options import Options, check_names
from anyattn.scores import Score

__all__ = ["attention", "attention_stats", "attention_weights"]

Window = tuple[int | None, int | None]
MaskLike = Mask | Callable[..., Any] | Array
ScoreLike = Score | Callable[..., Any]
Integers = int | Sequence[Any] | Array


def attention(
    q: Array,
    k: Array | Cache,
    v: Array | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    mask: MaskLike | None = None,
    bias: Array | None = None,
    score_mod: ScoreLike | None = None,
    softcap: float | None = None,
    sinks: Sequence[float] | Array | None = None,
    scale: float | None = None,
    kv_lengths: Integers | None = None,
    q_offset: Integers | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Array | None = None,
    layout: str = "bhld",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Scaled dot-product attention of arrays of any library.

    scale * (q . k) -> softcap -> score_mod -> + bias -> masks -> softmax (with sinks) -> dropout -> . v
    (Vaswani et al., "Attention Is All You Need", 2017). Everything combines with everything; masks AND
    together.

    Parameters
    ----------
    q : array, shape (..., Hq, Lq, D)
        Queries, float16, bfloat16, float32 or float64. Two axes (Lq, D) mean one head.
    k : array, shape (..., Hkv, Lk, D)
        Keys, of the library, device and dtype of q. Hkv divides Hq; query head h reads head h // (Hq // Hkv).
        Leading axes broadcast as in matmul; heads never do. Or a `KVCache` or `PagedKVCache`, which gives
        keys, values, lengths and offset.
    v : array, shape (..., Hkv, Lk, Dv)
        Values; None where `k` is a cache.
    causal : bool, default False
        Key j is seen from position i when j <= i.
    window : (left, right), optional
        Key j is seen when -left <= j - i <= right; None leaves a side unbounded.
    mask : Mask, function or boolean array, optional
        An expression of `anyattn.masks`, a function (b, h, i, j) -> bool, or True where seen, of shape (Lq,
        Lk) or broadcastable to (..., Hq, Lq, Lk) at the rank of the result.
    bias : float array, optional
        Added to the scores; shapes as for a boolean mask.
    score_mod : Score or function, optional
        An expression of `anyattn.scores` or a function (score, b, h, i, j) -> score.
    softcap : float, optional
        c > 0: the scaled scores become c * tanh(score / c).
    sinks : sequence or float array, shape (Hq,), optional
        Logits that join the softmax denominator only, not scaled.
    scale : float, optional
        Default 1 / sqrt(D).
    kv_lengths : int, sequence or integer array, optional
        Valid keys of each batch entry, broadcasting to the batch axes. Keys beyond never matter.
    q_offset : int, sequence or integer array, optional
        Position of query row 0 on the key axis: row r stands at i = r + q_offset. Default Lk - Lq, so that
        the last query sees the last key. With `kv_lengths` and an option that depends on i it must be given
        where Lq > 1 (0 for right-padded sequences, kv_lengths - Lq for a cache); where Lq = 1 it is
        kv_lengths - 1.
    dropout : float, default 0.0
        Probability p in [0, 1) with which a weight is 0 after the softmax; the others are divided by 1 - p.
        lse does not change. The same seed drops the same weights on every backend: Philox4x32-10 (Salmon et
        al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the counter (b, h, row, j), the key
        `dropout_seed`, and the upper 24 bits of the first word below p * 2**24 rounded up. Where p > 0 a seed
        must be given; draw another one for each layer and step.
    dropout_seed : int or integer array without axes, optional
        64 bits, negative numbers in two's complement. Another seed compiles nothing.
    layout : "bhld" or "blhd", default "bhld"
        "blhd" takes and returns (..., L, H, D). mask, bias and lse keep (..., Hq, Lq, Lk) order.
    return_lse : bool, default False
        Also return the natural logarithm of the softmax denominator, sinks included.
    backend : str, optional
        Run on this backend or fail with its reasons.

    Returns
    -------
    out : array, shape (..., Hq, Lq, Dv)
        In the library, dtype and device of q. A row that sees no key is 0.
    lse : array, shape (..., Hq, Lq)
        Only with `return_lse`; float32, or float64 for float64 inputs. -inf (or the sink) for a row that sees
        no key.

    Raises
    ------
    TypeError
        For a dtype, library or kind of argument that is not taken; the message names the argument.
    ValueError
        For shapes, devices or values that do not fit.
    anyattn.errors.UnsupportedCallError
        If the backend that was asked for refuses, with its reasons, or if none takes the call.
    """
    # A function is known by what it gives when it is traced: what it captures may have changed.
    mask = masks.from_function(mask) if callable(mask) else mask
    score_mod = scores.from_function(score_mod) if callable(score_mod) else score_mod
    # In the order of `options.ARGUMENTS`.
    options = (
        causal,
        window,
        mask,
        bias,
        score_mod,
        softcap,
        sinks,
        scale,
        kv_lengths,
        q_offset,
        dropout,
        dropout_seed,
        layout,
        return_lse,
        None,
        None,
    )
    if v is None and isinstance(k, Cache):
        k, v, options = k.arguments(q, options)
    signature = plan.signature(q, k, v, options, backend)
    result = plan.run(signature, q, k, v)
    if result is not None:
        return result
    if isinstance(k, Cache):
        raise TypeError("v: wanted None where k is a cache, which holds the values")
    # What a call like one before does without is not imported with the package.
    from anyattn.describe import describe
    from anyattn.planning import plan_of

    call = describe("attention", q, k, v, Options(*options))
    chosen = dispatch.choose(call, backend)
    made = plan_of(signature, call, chosen)
    if signature is not None and made is not None:
        plan.keep(signature, made)
        result = plan.run(signature, q, k, v)
        if result is not None:
            return result
    out, lse = dispatch.run_on(chosen, call)
    return (call.restore(out), call.restore_rows(lse)) if return_lse else call.restore(out)


def attention_weights(
    q: Array,
    k: Array,
    *,
    rows: int | Sequence[int] | Array | None = None,
    backend: str | None = None,
    **options: Any,
) -> Array:
    """The softmax weights of `attention`, all rows or chosen ones.

    Parameters
    ----------
    q, k : arrays
        As for `attention`.
    rows : int, sequence or integer array of shape (R,), optional
        Query rows to return, in this order; default all.
    backend : str, optional
        As for `attention`.
    **options
        causal, window, mask, bias, score_mod, softcap, sinks, scale, kv_lengths, q_offset and layout of
        `attention`, with the same meaning.

    Returns
    -------
    array, shape (..., Hq, R, Lk)
        In the dtype of q and in this order for either layout. A row that sees no key is 0; with sinks a row
        sums to less than 1.
    """
    from anyattn.describe import describe

    check_names("attention_weights", "weights", options)
    call = describe("weights", q, k, None, Options(rows=rows, **options))
    return call.restore_rows(dispatch.run(call, backend))


def attention_stats(
    q: Array, k: Array, *, stats: Sequence[str] = ("key_mass",), backend: str | None = None, **options: Any
) -> dict[str, Array]:
    """Summaries of the softmax weights p, without the weights being held.

    Parameters
    ----------
    q, k : arrays
        As for `attention`.
    stats : sequence of str
        Any of "key_mass": the sum of p over the rows, (..., Hq, Lk); "entropy": -sum over keys of p ln p,
        (..., Hq, Lq), in nats, a sink's own term left out; "max": the largest weight of a row, (..., Hq, Lq).
    backend : str, optional
        As for `attention`.
    **options
        As for `attention_weights`.

    Returns
    -------
    dict of str to array
        In the order of `stats`, float32, or float64 for float64 inputs.
    """
    from anyattn.describe import describe

    check_names("attention_stats", "stats", options)
    call = describe("stats", q, k, None, Options(stats=stats, **options))
    found = dispatch.run(call, backend)
    return {name: call.restore_rows(found[name]) for name in call.stats}
