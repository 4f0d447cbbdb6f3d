"""The operators Attention (opsets 23 to 25) and LinearAttention (27, in `onnx_linear`) of ONNX as functions.

Inputs come in the operator's order, attributes as keywords, and a tuple of `num_outputs` outputs goes back.
The main output is a translation; what only ONNX has (integer masks, masks that are too short, a V of another
dtype, the output of Q . K) is done here with array calls.
"""

from __future__ import annotations

from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.attention import attention as _attention
from anyattn.compat.onnx_linear import linear_attention
from anyattn.compat.renaming import renaming
from anyattn.describe import Options, describe
from anyattn.numbers import integer
from anyattn.reference.inspect import weights
from anyattn.reference.logits import Logits

__all__ = ["attention", "linear_attention"]

OPSETS = (23, 24, 25)
# TensorProto.DataType numbers that softmax_precision may have.
_PRECISIONS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_AFTER_SOFTMAX = 3


@renaming(
    {
        "q": "Q",
        "k": "K",
        "v": "V",
        "mask": "attn_mask",
        "bias": "attn_mask",
        "kv_lengths": "nonpad_kv_seqlen",
    }
)
def attention(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    num_outputs: int = 1,
    opset: int = 25,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Operator Attention of ONNX, opsets 23 to 25.

    Parameters
    ----------
    Q : array, shape (B, Hq, L, D) or (B, L, Hq * D)
        Arrays of any library.
    K : array, shape (B, Hkv, S, D) or (B, S, Hkv * D)
        Of the dtype of Q.
    V : array, shape (B, Hkv, S, Dv) or (B, S, Hkv * Dv)
        May have another floating dtype than Q; the call is then computed in one that holds both.
    attn_mask : array, broadcastable to (B, Hq, L, T), optional
        T = P + S. Boolean, True where a key takes part; numbers are added to the scores, integers as floats.
        From opset 24 on, a last axis shorter than T is continued with False or -inf, also where it is 1.
    past_key, past_value : arrays, shape (B, Hkv, P, D) and (B, Hkv, P, Dv), optional
        Go before K and V.
    nonpad_kv_seqlen : integer array, shape (B,), optional
        Opset 24. How many keys of each batch entry are valid. Not together with `past_key`.
    is_causal : 0 or 1
        Row r sees the keys j <= r + offset: offset is P, or `nonpad_kv_seqlen` - L where that is given,
        otherwise 0, which aligns the *upper left* corner.
    kv_num_heads, q_num_heads : int, optional
        Needed, and from opset 25 on allowed, with three axes only.
    left_window_size, right_window_size : int
        Opset 25. Row r sees the keys r + offset - left <= j <= r + offset + right; -1 is unbounded.
    qk_matmul_output_mode : 0, 1, 2 or 3
        What the fourth output is: scale * (Q . K); the same after `softcap`; the same after the masks, -inf
        where hidden; the softmax.
    scale : float, optional
        Default 1 / sqrt(D).
    softcap : float
        c > 0: the scaled scores become c * tanh(score / c). 0 leaves them alone.
    softmax_precision : 1, 10, 11 or 16, optional
        The least precision of the softmax, by TensorProto.DataType. It is computed in float32, or in float64
        for float64 inputs, and 11 (DOUBLE) computes the whole call in float64.
    num_outputs : 1, 2, 3 or 4
        How many outputs are returned.
    opset : 23, 24 or 25
        Whose rules hold. What an opset does not have is refused, and opset 23 broadcasts a mask whose last
        axis is 1.
    backend : str, optional
        As for `anyattn.attention`.

    Returns
    -------
    Y : array, shape (B, Hq, L, Dv) or (B, L, Hq * Dv)
        In the dtype of Q. A row that sees no key is 0.
    present_key, present_value : arrays, shape (B, Hkv, T, D) and (B, Hkv, T, Dv)
        Without `past_key` these are views of K and V.
    qk_matmul_output : array, shape (B, Hq, L, T)
        In the dtype of Q; computed as `reference` does, whatever the backend.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; the message names the argument.
    anyattn.errors.UnsupportedCallError
        If the backend that was asked for refuses, or none takes the call.

    Notes
    -----
    Where the text of the operator and its reference implementation (onnx 1.23) differ, the text is followed:
    mode 0 is not capped, Y has the dtype of Q where V has another, and causal order does not end at the rows
    of a mask that has one. Scores are scaled once, and 16-bit
    inputs are computed in float32, where the operator's function scales Q and K by the root of `scale` and
    rounds each step.
    """
    _check_attributes(opset, is_causal, qk_matmul_output_mode, softmax_precision, num_outputs)
    if opset < 25 and (left_window_size, right_window_size) != (-1, -1):
        raise ValueError(f"left_window_size, right_window_size: wanted opset 25, got opset {opset}")
    if opset < 24 and nonpad_kv_seqlen is not None:
        raise ValueError(f"nonpad_kv_seqlen: wanted opset 24 or 25, got opset {opset}")
    q, k, v = _split_heads(Q, K, V, q_num_heads, kv_num_heads, opset)
    k, v = _append(k, v, past_key, past_value)
    offset = _offset(Q, q, k, past_key, nonpad_kv_seqlen)
    present = (k, v)

    wide = _common_dtype(Q, V, softmax_precision)
    q, k, v = (_cast(x, wide) for x in (q, k, v))
    plain: dict[str, Any] = {"scale": scale}
    capped = plain | {"softcap": softcap or None}
    masked = capped | {
        "causal": bool(is_causal),
        "window": _window(left_window_size, right_window_size),
        "kv_lengths": nonpad_kv_seqlen,
        "q_offset": offset,
    }
    if attn_mask is not None:
        masked |= _mask_or_bias(attn_mask, q, int(k.shape[2]), opset)

    if Q.ndim == 4:
        y = _attention(q, k, v, backend=backend, **masked)
    else:
        y = _attention(*map(_heads_last, (q, k, v)), layout="blhd", backend=backend, **masked)
        y = arrays.namespace(y).reshape(y, (*y.shape[:2], y.shape[2] * y.shape[3]))
    outputs = [y, *present]
    if num_outputs == 4:
        options = (plain, capped, masked, masked)[qk_matmul_output_mode]
        outputs.append(_pairs(q, k, options, softmax=qk_matmul_output_mode == _AFTER_SOFTMAX))
    xp = arrays.namespace(Q)
    own = (Q.dtype, K.dtype, V.dtype, Q.dtype)
    with arrays.exactly(Q):
        cast = tuple(arrays.cast(xp, x, dtype) for x, dtype in zip(outputs, own, strict=False))
    return cast[:num_outputs]


def _check_attributes(opset: int, is_causal: int, mode: int, precision: int | None, outputs: int) -> None:
    """Raise unless each attribute is one of its few values."""
    choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("opset", opset, OPSETS),
        ("is_causal", is_causal, (0, 1)),
        ("qk_matmul_output_mode", mode, (0, 1, 2, 3)),
        ("softmax_precision", precision, (None, *_PRECISIONS)),
        ("num_outputs", outputs, (1, 2, 3, 4)),
    )
    for name, value, wanted in choices:
        if value not in wanted:
            raise ValueError(f"{name}: wanted one of {', '.join(map(str, wanted))}, got {value!r}")


def _split_heads(
    Q: Array, K: Array, V: Array, q_num_heads: int | None, kv_num_heads: int | None, opset: int
) -> tuple[Array, Array, Array]:
    """Q, K and V as (B, heads, length, dim)."""
    inputs = {"Q": Q, "K": K, "V": V}
    for name, x in inputs.items():
        arrays.check_plain(x, name)
        if x.ndim not in (3, 4) or x.ndim != Q.ndim:
            shapes = ", ".join(f"{each} {tuple(x.shape)}" for each, x in inputs.items())
            raise ValueError(f"{name}: wanted 4 axes on each of Q, K and V or 3 on each, got {shapes}")
        if x.shape[0] != Q.shape[0]:
            raise ValueError(f"{name}: wanted a batch of {Q.shape[0]} like Q, got shape {tuple(x.shape)}")
    _check_dtype("K", K, "Q", Q)
    counts = {"q_num_heads": q_num_heads, "kv_num_heads": kv_num_heads}
    if Q.ndim == 3:
        for name, count in counts.items():
            integer(count, f"{name}: Q, K and V have 3 axes", least=1)
        heads = (q_num_heads, kv_num_heads, kv_num_heads)
        q, k, v = (_unpack(name, x, n) for (name, x), n in zip(inputs.items(), heads, strict=True))
        return q, k, v
    for name, count, x in (("q_num_heads", q_num_heads, Q), ("kv_num_heads", kv_num_heads, K)):
        if count is not None and (opset >= 25 or count != x.shape[1]):
            wanted = "none" if opset >= 25 else f"none or {x.shape[1]}"
            raise ValueError(f"{name}: wanted {wanted} with inputs of 4 axes, got {count}")
    return Q, K, V


def _unpack(name: str, x: Array, heads: Any) -> Array:
    """(B, length, heads * dim) -> (B, heads, length, dim), a view."""
    batch, length, hidden = x.shape
    if hidden % heads:
        raise ValueError(f"{name}: wanted a last axis that {heads} heads divide, got shape {tuple(x.shape)}")
    return _heads_last(arrays.namespace(x).reshape(x, (batch, length, heads, hidden // heads)))


def _heads_last(x: Array) -> Array:
    """(B, heads, length, dim) <-> (B, length, heads, dim)."""
    return arrays.namespace(x).permute_dims(x, (0, 2, 1, 3))


def _append(k: Array, v: Array, past_key: Array | None, past_value: Array | None) -> tuple[Array, Array]:
    """Keys and values behind those of the past."""
    if (past_key is None) != (past_value is None):
        missing = "past_key" if past_key is None else "past_value"
        raise ValueError(f"{missing}: wanted past_key and past_value together, got one of them")
    if past_key is None or past_value is None:
        return k, v
    joined = []
    for name, past, x, like in (("past_key", past_key, k, "K"), ("past_value", past_value, v, "V")):
        arrays.check_beside(past, name, x, like)
        _check_dtype(name, past, like, x)
        batch, heads, _, dim = x.shape
        if past.ndim != 4 or (*past.shape[:2], past.shape[3]) != (batch, heads, dim):
            raise ValueError(
                f"{name}: wanted shape ({batch}, {heads}, length, {dim}), got {tuple(past.shape)}"
            )
        joined.append(arrays.namespace(x).concat([past, x], axis=2))
    return joined[0], joined[1]


def _check_dtype(name: str, x: Array, like_name: str, like: Array) -> None:
    if arrays.dtype_name(x) != arrays.dtype_name(like):
        raise TypeError(
            f"{name}: wanted dtype {arrays.dtype_name(like)} like {like_name}, got {arrays.dtype_name(x)}"
        )


def _offset(Q: Array, q: Array, k: Array, past_key: Array | None, lengths: Array | None) -> Any:
    """The position of row 0: how many valid keys precede the queries."""
    if lengths is None:
        return 0 if past_key is None else int(past_key.shape[2])
    if past_key is not None:
        raise ValueError("nonpad_kv_seqlen: wanted none where past_key and past_value are given")
    arrays.check_beside(lengths, "nonpad_kv_seqlen", Q, "Q")
    if arrays.kind(lengths) != "int" or tuple(lengths.shape) != (Q.shape[0],):
        raise ValueError(
            f"nonpad_kv_seqlen: wanted integers of shape ({Q.shape[0]},), "
            f"got {arrays.dtype_name(lengths)} {tuple(lengths.shape)}"
        )
    xp = arrays.namespace(lengths)
    # Unsigned integers would wrap.
    return arrays.cast(xp, lengths, arrays.index_dtype(xp, arrays.device(lengths))) - int(q.shape[2])


def _common_dtype(Q: Array, V: Array, softmax_precision: int | None) -> str:
    """The least dtype that holds the inputs, and accumulates in the precision that is asked for."""
    names = {arrays.dtype_name(Q), arrays.dtype_name(V)}
    if softmax_precision == 11 or "float64" in names:
        return "float64"
    return names.pop() if len(names) == 1 else "float32"


def _cast(x: Array, dtype: str) -> Array:
    """`x` in a dtype by its name, itself where it has it already."""
    if arrays.dtype_name(x) == dtype:
        return x
    xp = arrays.namespace(x)
    cast = xp.astype(x, getattr(xp, dtype))
    if arrays.dtype_name(cast) != dtype:
        raise TypeError(f"softmax_precision: {arrays.library(x)} has no {dtype} (JAX: jax_enable_x64)")
    return cast


def _window(left: int, right: int) -> tuple[int | None, int | None]:
    sides = {"left_window_size": left, "right_window_size": right}
    first, last = (integer(side, name, least=-1) for name, side in sides.items())
    return (None if first == -1 else first), (None if last == -1 else last)


def _mask_or_bias(attn_mask: Array, q: Array, length: int, opset: int) -> dict[str, Array]:
    """`mask=` or `bias=` of the contract: four axes, as long as the keys, boolean or floating."""
    arrays.check_beside(attn_mask, "attn_mask", q, "Q")
    if not 1 <= attn_mask.ndim <= 4:
        raise ValueError(f"attn_mask: wanted 1 to 4 axes, got shape {tuple(attn_mask.shape)}")
    xp, kind = arrays.namespace(attn_mask), arrays.kind(attn_mask)
    if kind == "int":
        attn_mask = _cast(attn_mask, "float64" if arrays.dtype_name(q) == "float64" else "float32")
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim) + (...,)]
    missing = length - int(attn_mask.shape[-1])
    if opset >= 24 and missing > 0:
        shape, value = (*attn_mask.shape[:-1], missing), False if kind == "bool" else -xp.inf
        rest = xp.full(shape, value, dtype=attn_mask.dtype, device=arrays.device(attn_mask))
        attn_mask = xp.concat([attn_mask, rest], axis=-1)
    return {"mask" if kind == "bool" else "bias": attn_mask}


def _pairs(q: Array, k: Array, options: dict[str, Any], softmax: bool) -> Array:
    """The scores of all pairs or their softmax, (B, Hq, L, T)."""
    call = describe("weights", q, k, None, Options(**options))
    with arrays.exactly(q):
        return weights(call) if softmax else Logits(call).block(0, call.k_len)[0]
