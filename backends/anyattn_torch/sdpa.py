"""torch's `scaled_dot_product_attention`, for calls that it means the same by.

Its causal order is aligned to the top left (row r sees keys up to r), ours to the bottom right; it has no
log-sum-exp, sink, softcap or score function, and knows masks as arrays only. Only its fused kernels are
used: the plain one ("math") keeps all Lq x Lk scores.
"""

from __future__ import annotations

import math
from typing import Any

from anyattn import arrays
from anyattn.arrays import FLOAT_DTYPES, Array
from anyattn.call import AttentionCall
from anyattn.expr.nodes import Aligned
from anyattn_torch.axes import four_axes, one_batch_axis

__all__ = ["attend", "attend_open", "memory", "refusal"]


def refusal(call: AttentionCall) -> str | None:
    """Why SDPA does not mean the same by a call, or has no fused kernel for it; None if it takes it."""
    return _other_meaning(call) or _other_mask(call) or _other_memory(call) or _no_kernel(call)


def attend(call: AttentionCall) -> tuple[Array, None]:
    """(out, None) of a call that has no `refusal`."""
    import torch

    q, k, v = four_axes(call)
    with arrays.exactly(call.q):
        # Not by its public name, in whose place users put that of anyattn.compat.torch.
        out = torch.ops.aten.scaled_dot_product_attention(q, k, v, **_options(call))
    return out.reshape(*call.batch_shape, *out.shape[1:]), None


def attend_open(
    q: Array, k: Array, v: Array, *, causal: bool, array: Array | None, scale: float | None
) -> Array | None:
    """Attention (batch, heads, length, dim) of sizes that torch's compiler leaves open; asks for none.

    None where SDPA may mean something else, or have no fused kernel. `array` is a boolean mask, or a bias.
    """
    import torch

    tensors = (q, k, v)
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[3]
    fits = (
        arrays.dtype_name(q) in FLOAT_DTYPES
        and all(x.dtype == q.dtype and x.device == q.device for x in tensors)
        and all(x.shape[0] == q.shape[0] and x.shape[3] == head_dim for x in tensors)
        and k.shape[1:3] == v.shape[1:3]
        and kv_heads > 0
        and heads % kv_heads == 0
        and all(x.stride(-1) == 1 for x in tensors)
        and (not causal or q.shape[2] == k.shape[2])
        and (scale is None or 0 < scale < math.inf)
        and (array is None or (array.dtype in (torch.bool, q.dtype) and array.device == q.device))
        and (array is None or _fits_open(array, (*q.shape[:3], k.shape[2])))
    )
    kind = arrays.device_kind(q)
    if not fits or _may_lack_kernel(
        kind, arrays.dtype_name(q), head_dim, heads > kv_heads, array is not None
    ):
        return None
    return torch.ops.aten.scaled_dot_product_attention(
        q, k, v, attn_mask=array, is_causal=causal, scale=scale, enable_gqa=heads > kv_heads
    )


def _fits_open(array: Array, wanted: tuple[int, ...]) -> bool:
    """Whether a mask or a bias without a gradient broadcasts to open sizes of the scores."""
    sizes = zip(reversed(array.shape), reversed(wanted), strict=False)
    return array.ndim in (2, 4) and not array.requires_grad and all(n in (1, whole) for n, whole in sizes)


def memory(call: AttentionCall) -> tuple[str, ...]:
    """What it keeps in memory."""
    found = ["forward and backward hold tiles of scores, not all Lq x Lk"]
    if "gradients" in call.features:
        found.append("SDPA has no derivatives of second order; anyattn_torch.routes.only('tiles') has")
    array = _array(call)
    if array is not None and arrays.dtype_name(array) == "bool":
        found.append(f"SDPA converts the mask {tuple(array.shape)} to {call.dtype}")
    if call.visible is not None:
        found.append("a NaN at a hidden key may reach the result; use(strict=True) takes own tiles")
    return tuple(found)


def _other_meaning(call: AttentionCall) -> str | None:
    for name, value in (("softcap", call.softcap), ("score_mod", call.score_mod), ("sinks", call.sinks)):
        if value is not None:
            return f"has no {name}"
    if call.keep is not None:
        return "draws what it drops from a generator, not from the seed of the call"
    if call.return_lse:
        return "does not return the lse"
    if call.kv_lengths is not None:
        return "reads keys beyond kv_lengths, where a NaN would reach the result"
    if call.window is not None and call.window != (None, None):
        return "has no window"
    if call.scale <= 0:
        return "splits the scale by its square root, which must be positive"
    return None


def _other_mask(call: AttentionCall) -> str | None:
    """What keeps causal order, mask and bias from being SDPA's `is_causal` or `attn_mask`."""
    given = [x is not None for x in (call.mask, call.bias)].count(True) + call.causal
    if given > 1:
        return "takes one of causal order, mask and bias, or an Lq x Lk array of all that would be made anew"
    if call.causal and not (_top_left(call) or _sees_all(call)):
        return "aligns causal order to the first query and key, which here are not at one position"
    if call.mask is not None and not (isinstance(call.visible, Aligned) and call.visible.block == 1):
        return "takes masks as arrays, and this one is an expression"
    if call.bias is not None:
        if arrays.dtype_name(call.bias) != call.dtype:
            return f"rounds the bias from {arrays.dtype_name(call.bias)} to {call.dtype}"
        if arrays.needs_gradient(call.bias):
            return "keeps Lq x Lk scores for the gradient of a bias"
    return None


def _top_left(call: AttentionCall) -> bool:
    return call.q_len == call.k_len and isinstance(call.offset, int) and call.offset == 0


def _sees_all(call: AttentionCall) -> bool:
    return isinstance(call.offset, int) and call.offset >= call.k_len - 1


def _other_memory(call: AttentionCall) -> str | None:
    tensors = {"q": call.q, "k": call.k, "v": call.v}
    if 0 in (*call.batch_shape, call.num_heads, call.q_len, call.k_len, call.v_head_dim):
        return "has no fused kernel for empty arrays"
    if call.v_head_dim != call.head_dim:
        return f"has no fused kernel for values of {call.v_head_dim} channels beside {call.head_dim}"
    array = _array(call)
    if array is not None and len(call.batch_shape) > 1 and any(n > 1 for n in array.shape[:-3]):
        return "takes one batch axis, and to join those of the mask or bias would copy it"
    for name, x in tensors.items():
        if x.stride(-1) != 1:
            return f"has no fused kernel for {name} with channels that are not next to each other"
        if one_batch_axis(x, call.batch_shape) is None:
            return f"takes one batch axis, and to join those of {name} would copy it"
        if arrays.needs_gradient(x) and math.prod(x.shape[:-3]) < math.prod(call.batch_shape):
            return f"makes a gradient of {name} for each of the batch entries that share it"
    return None


def _no_kernel(call: AttentionCall) -> str | None:
    """Whether torch itself would choose its plain kernel; from shapes alone where there are no values."""
    import torch

    if call.traced:
        has_array = _array(call) is not None
        return _may_lack_kernel(call.device_kind, call.dtype, call.head_dim, call.group_size > 1, has_array)
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "does not tell which kernel it would run"
    q, k, v = four_axes(call)
    # 0 is SDPBackend.MATH.
    return "has no fused kernel for this call" if choose(q, k, v, **_options(call)) == 0 else None


def _may_lack_kernel(
    device_kind: str, dtype: str, head_dim: int, grouped: bool, has_array: bool
) -> str | None:
    """Why torch may choose its plain kernel, from what is known before tensors have values."""
    if device_kind == "cpu":
        return None
    if device_kind != "cuda":
        return f"may have no fused kernel on {device_kind}"
    if head_dim % 8 or head_dim > 256:
        return "may have no fused kernel for so many channels"
    if dtype == "float64":
        return "has no fused kernel for float64"
    if grouped and (dtype == "float32" or has_array):
        return "may have no fused kernel for grouped heads in float32 or with an array"
    return None


def _options(call: AttentionCall) -> dict[str, Any]:
    return {
        "attn_mask": _array_mask(call),
        "dropout_p": 0.0,
        "is_causal": call.causal and not _sees_all(call),
        "scale": call.scale,
        "enable_gqa": call.group_size > 1,
    }


def _array_mask(call: AttentionCall) -> Array | None:
    """The array of mask or bias with the four axes of the scores, of one entry where it broadcasts.

    SDPA makes numbers of a boolean mask, as many as it is given.
    """
    x = _array(call)
    return None if x is None else x.reshape(*(1, 1, *x.shape[:-2])[-2:], *x.shape[-2:])


def _array(call: AttentionCall) -> Array | None:
    return call.visible.value if isinstance(call.visible, Aligned) else call.bias
