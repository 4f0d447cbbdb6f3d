"""q, k and v with the four axes that torch's own attention takes, without a copy."""

from __future__ import annotations

from anyattn.arrays import Array
from anyattn.call import AttentionCall

__all__ = ["four_axes", "one_batch_axis"]


def four_axes(call: AttentionCall) -> tuple[Array, Array, Array]:
    """q, k and v of a call whose batch axes can be one."""
    q, k, v = (one_batch_axis(x, call.batch_shape) for x in (call.q, call.k, call.v))
    return q, k, v


def one_batch_axis(x: Array, batch_shape: tuple[int, ...]) -> Array | None:
    """`x` (..., H, L, D) as (batch, H, L, D); None where that would copy it."""
    wide = x.expand(*batch_shape, *x.shape[-3:])
    if wide.ndim < 5:
        return wide if wide.ndim == 4 else wide[None]
    try:
        return wide.view(-1, *x.shape[-3:])
    except RuntimeError:  # strides that one axis cannot have
        return None
