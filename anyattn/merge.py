"""`merge`: attention over a key set from attention over its disjoint parts."""

from __future__ import annotations

from collections.abc import Sequence

from anyattn import arrays
from anyattn.arrays import Array

__all__ = ["merge"]


def merge(outs: Sequence[Array], lses: Sequence[Array], layout: str = "bhld") -> tuple[Array, Array]:
    """Join partial results of `attention(..., return_lse=True)` over disjoint sets of keys.

    lse = logsumexp of the parts' lse, out = sum over parts of exp(lse_p - lse) * out_p. A part that saw
    nothing, (0, -inf), changes nothing. An lse holds the sinks, so give sinks to one part only.

    Parameters
    ----------
    outs : sequence of arrays, shape (..., Hq, Lq, Dv)
        Or (..., Lq, Hq, Dv) with `layout="blhd"`, or (Lq, Dv) without heads.
    lses : sequence of arrays, shape (..., Hq, Lq)
        In this order for either layout; (Lq,) without heads.
    layout : "bhld" or "blhd", default "bhld"

    Returns
    -------
    out : array
        In the shape and dtype of the parts.
    lse : array
        In the shape and dtype of the parts' lse.

    Raises
    ------
    ValueError
        If there is no part, or shapes do not agree.
    TypeError
        If the parts are not arrays of one library and dtype.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name}: wanted a list or tuple of parts, got {type(parts).__name__}")
    _check(outs, lses, layout)
    with arrays.exactly(outs[0]):
        return _join(outs, lses, layout)


def _join(outs: Sequence[Array], lses: Sequence[Array], layout: str) -> tuple[Array, Array]:
    xp = arrays.namespace(outs[0])
    columns = [_column(xp, lse, out, layout) for out, lse in zip(outs, lses, strict=True)]
    top = columns[0]
    for column in columns[1:]:
        top = xp.maximum(top, column)
    top = arrays.stop_gradient(top)
    # exp(-inf - -inf) would be NaN where no part saw anything; +inf must stay, so that it still gives NaN.
    top = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    shares = [xp.exp(column - top) for column in columns]
    total = sum(shares[1:], shares[0])
    seen = total != 0
    total = xp.where(seen, total, xp.ones_like(total))
    joined = 0
    for out, share in zip(outs, shares, strict=True):
        wide = arrays.cast(xp, out, share.dtype)
        # A part without weight adds nothing, also where its values are not finite.
        joined = joined + xp.where(share == 0, xp.zeros_like(wide), wide * (share / total))
    lse = xp.where(seen, top + xp.log(total), xp.full_like(total, -xp.inf))
    lse = arrays.moveaxis(xp, lse, -3, -2) if layout == "blhd" and outs[0].ndim > 2 else lse
    return arrays.cast(xp, joined, outs[0].dtype), lse[..., 0]


def _column(xp: arrays.Namespace, lse: Array, out: Array, layout: str) -> Array:
    column = xp.expand_dims(lse, axis=-1)
    return arrays.moveaxis(xp, column, -3, -2) if layout == "blhd" and out.ndim > 2 else column


def _check(outs: Sequence[Array], lses: Sequence[Array], layout: str) -> None:
    if layout not in ("bhld", "blhd"):
        raise ValueError(f"layout: wanted 'bhld' or 'blhd', got {layout!r}")
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs, lses: wanted one lse a part and at least one part, got {len(outs)} and {len(lses)}"
        )
    for name, parts in (("outs", outs), ("lses", lses)):
        for part in parts:
            if not arrays.is_array(part) or arrays.kind(part) != "float":
                what = (
                    f"{type(part).__name__} of {part.dtype}" if arrays.is_array(part) else type(part).__name__
                )
                raise TypeError(f"{name}: wanted float arrays, got {what}")
            arrays.check_beside(part, name, outs[0], "outs[0]")
            if part.dtype != parts[0].dtype:
                raise TypeError(f"{name}: wanted one dtype, got {parts[0].dtype} and {part.dtype}")
            if tuple(part.shape) != tuple(parts[0].shape):
                raise ValueError(
                    f"{name}: wanted one shape, got {tuple(parts[0].shape)} and {tuple(part.shape)}"
                )
    shape = tuple(outs[0].shape[:-1])
    if layout == "blhd" and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if tuple(lses[0].shape) != shape:
        raise ValueError(
            f"lses: wanted shape {shape} for outs of {tuple(outs[0].shape)}, got {tuple(lses[0].shape)}"
        )
