"""`linear_attention`: describe the call, let dispatch choose a backend and run it, give the result back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyattn import dispatch
from anyattn.arrays import Array
from anyattn.dynamo import linear, read_instead
from anyattn.linear.describe import FeatureMap, LinearOptions, describe

__all__ = ["linear_attention"]


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    rule: str = "linear",
    feature_map: FeatureMap | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    normalize: bool = False,
    causal: bool = True,
    scale: float | None = None,
    state: Array | tuple[Array, Array] | None = None,
    return_state: bool = False,
    cu_seqlens: Sequence[int] | Array | None = None,
    layout: str = "bhld",
    backend: str | None = None,
) -> Any:
    """Linear attention of arrays of any library: each token changes a state (D, Dv) and reads it.

    With g = `decay` and b = `beta`, for each token in turn

    - "linear": S = S + k (x) v
    - "gated": S = exp(g) S + k (x) v
    - "delta": S = S + b k (x) (v - S^T k)
    - "gated_delta": S = exp(g) S + b k (x) (v - exp(g) S^T k)

    and then o = scale S^T q. Time and memory grow with the length, not with its square; what runs is the
    chunked form of the recurrence. docs/linear-attention.md has the papers.

    Parameters
    ----------
    q : array, shape (..., Hq, L, D)
        Queries, float16, bfloat16, float32 or float64. Two axes (L, D) mean one head.
    k : array, shape (..., Hkv, L, D)
        Keys, of the library, device and dtype of q. Hkv divides Hq; query head h reads the state of head
        h // (Hq // Hkv). Leading axes broadcast as in matmul; heads never do.
    v : array, shape (..., Hkv, L, Dv)
        Values.
    rule : "linear", "gated", "delta" or "gated_delta", default "linear"
    feature_map : str or function, optional
        Applied to q and k first, in the accumulation dtype: "identity" (default), "elu+1", "relu", "softmax"
        (over the features), or a function of an array (..., D) that gives (..., F), such as those of
        `anyattn.feature_maps`. D is F in all shapes below.
    decay : float array, shape (..., Hkv, L) or (..., Hkv, L, D)
        For the gated rules: g, the logarithm of what is kept, of each head or of each channel of k. It has
        the rank of k or one axis fewer, in this order of axes in either layout, and any float dtype. -inf
        forgets everything before.
    beta : float array, shape (..., Hkv, L)
        For the delta rules: how much of the correction is written, in this order in either layout.
    normalize : bool, default False
        For the rules "linear" and "gated": divide by q . z with z = exp(g) z + k, 0 where that is 0. With
        features that are not negative and ``scale=1.0`` a row is a weighted mean of values.
    causal : bool, default True
        False, for the rule "linear" alone: every query reads the state after the last key, and there may be
        another number of queries than of keys.
    scale : float, optional
        Default 1 / sqrt(D) with the D of q as given.
    state : array, shape (..., Hkv, D, Dv), optional
        The state before the first token, in the accumulation dtype (float64 for float64 inputs, else
        float32); default zeros. With `normalize` a pair (S, z), z of shape (..., Hkv, D).
    return_state : bool, default False
        Also return the state after the last token, which continues the sequence in a later call.
    cu_seqlens : sequence or integer array, shape (N + 1,), optional
        N sequences are packed along the length of arrays without batch axes, (H, T, D): sequence n is the
        tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1, and states have a first axis of N.
    layout : "bhld" or "blhd", default "bhld"
        "blhd" takes and returns (..., L, H, D) for q, k, v and the result.
    backend : str, optional
        Run on this backend or fail with its reasons.

    Returns
    -------
    out : array, shape (..., Hq, L, Dv)
        In the library, dtype and device of q.
    state : array, or a pair of arrays with `normalize`
        Only with `return_state`; as the argument `state`, with all batch axes.

    Raises
    ------
    TypeError
        For a dtype, library or kind of argument that is not taken; the message names the argument.
    ValueError
        For shapes, devices or values that do not fit.
    anyattn.errors.UnsupportedCallError
        If the backend that was asked for refuses, with its reasons, or if none takes the call.
    """
    options = LinearOptions(
        rule=rule,
        feature_map=feature_map,
        decay=decay,
        beta=beta,
        normalize=normalize,
        causal=causal,
        scale=scale,
        state=state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        layout=layout,
    )
    call = describe(q, k, v, options)
    out, last, normalizer = dispatch.run(call, backend)
    out = call.restore(out)
    if not return_state:
        return out
    last = call.restore_state(last)
    return (out, (last, call.restore_state(normalizer, axes=1))) if normalize else (out, last)


# Before `torch.compile` reads a function that calls it.
read_instead(linear_attention, linear)
