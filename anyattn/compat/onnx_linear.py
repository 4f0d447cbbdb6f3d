"""Operator LinearAttention of ONNX (opset 27) as a function: packed heads and states of other dtypes.

Inputs come in the operator's order, attributes as keywords, and a tuple of `num_outputs` outputs goes back.
"""

from __future__ import annotations

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.compat.renaming import renaming
from anyattn.linear.front import linear_attention as _linear_attention
from anyattn.numbers import integer

__all__ = ["linear_attention"]


@renaming({"q": "query", "k": "key", "v": "value", "state": "past_state", "rule": "update_rule"})
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    past_state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    *,
    kv_num_heads: int,
    q_num_heads: int,
    chunk_size: int = 64,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
    num_outputs: int = 1,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Operator LinearAttention of ONNX, opset 27.

    Parameters
    ----------
    query : array, shape (B, T, Hq * D)
        Float16, bfloat16 or float32.
    key : array, shape (B, T, Hkv * D)
        Of the dtype of `query`.
    value : array, shape (B, T, Hkv * Dv)
        Of the dtype of `query`.
    past_state : array, shape (B, Hkv, D, Dv), optional
        Default zeros.
    decay : array, shape (B, T, Hkv * D) or (B, T, Hkv), optional
        In log space; for the rules "gated" and "gated_delta".
    beta : array, shape (B, T, Hkv) or (B, T, 1), optional
        For the rules "delta" and "gated_delta".
    kv_num_heads, q_num_heads : int
        `kv_num_heads` divides `q_num_heads`.
    chunk_size : int
        A hint that changes no result.
    scale : float
        0 is 1 / sqrt(D).
    update_rule : "linear", "gated", "delta" or "gated_delta"
        The recurrence.
    num_outputs : 1 or 2
        How many outputs are returned.
    backend : str, optional
        As for `anyattn.attention`.

    Returns
    -------
    output : array, shape (B, T, Hq * Dv)
        In the dtype of `query`.
    present_state : array, shape (B, Hkv, D, Dv)
        The state after the last token.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; the message names the argument.
    anyattn.errors.UnsupportedCallError
        If the backend that was asked for refuses, or none takes the call.

    Notes
    -----
    The state is computed in float32, and `present_state` has the dtype of `past_state`, or of `query` without
    one, as in the operator's reference implementation.
    """
    integer(chunk_size, "chunk_size", least=1)
    if num_outputs not in (1, 2):
        raise ValueError(f"num_outputs: wanted one of 1, 2, got {num_outputs!r}")
    q, k, v = (
        _own_heads(x, label, heads, count)
        for x, label, (heads, count) in (
            (query, "query", (q_num_heads, "q_num_heads")),
            (key, "key", (kv_num_heads, "kv_num_heads")),
            (value, "value", (kv_num_heads, "kv_num_heads")),
        )
    )
    xp = arrays.namespace(query)
    if decay is not None:
        _check_packed(decay, "decay", (kv_num_heads, kv_num_heads * k.shape[-1]))
        each = decay.shape[-1] != kv_num_heads
        heads_last = _own_heads(decay, "decay", kv_num_heads, "kv_num_heads")
        decay = xp.moveaxis(heads_last if each else heads_last[..., 0], 2, 1)
    if beta is not None:
        _check_packed(beta, "beta", (kv_num_heads, 1))
        beta = xp.moveaxis(xp.broadcast_to(beta, (*beta.shape[:-1], kv_num_heads)), 2, 1)
    kept = query if past_state is None else past_state
    if past_state is not None:
        wide = "float64" if arrays.dtype_name(query) == "float64" else "float32"
        past_state = arrays.cast(xp, past_state, getattr(xp, wide))
    y, state = _linear_attention(
        q,
        k,
        v,
        rule=update_rule,
        decay=decay,
        beta=beta,
        scale=scale or None,
        state=past_state,
        return_state=True,
        layout="blhd",
        backend=backend,
    )
    with arrays.exactly(query):
        state = arrays.cast(xp, state, kept.dtype)
    return (xp.reshape(y, (*y.shape[:2], y.shape[2] * y.shape[3])), state)[:num_outputs]


def _check_packed(x: Array, label: str, sizes: tuple[int, ...]) -> None:
    """Raise unless `x` is (B, T, one of `sizes`)."""
    arrays.check_plain(x, label)
    if x.ndim != 3 or x.shape[-1] not in sizes:
        wanted = " or ".join(f"(B, T, {size})" for size in dict.fromkeys(sizes))
        raise ValueError(f"{label}: wanted shape {wanted}, got {tuple(x.shape)}")


def _own_heads(x: Array, label: str, heads: int, count: str) -> Array:
    """(B, T, H * D) -> (B, T, H, D)."""
    integer(heads, count, least=1)
    arrays.check_plain(x, label)
    if x.ndim != 3 or x.shape[-1] % heads:
        raise ValueError(f"{label}: wanted shape (B, T, {heads} * D), got {tuple(x.shape)}")
    return arrays.namespace(x).reshape(x, (*x.shape[:2], heads, x.shape[2] // heads))
