"""Derivatives of the output and of lse, dense and in float64.

With p = exp(s - lse), out = Σ p·kept·v (kept is 1 without dropout) and cotangents dout, dlse:
dv = Σ p·kept·dout, ds = p·(kept·(dout·v) − dout·out + dlse), and the sink's share exp(sink − lse) gets the
same with v = 0. A hidden pair, and one whose score is −inf, has p = 0 and passes nothing on, whatever is in
k, v or bias there.

How a score modification passes ds on is found by a complex step, f'(x) = Im f(x + i·ε)/ε, which has no
cancellation and so is exact to rounding: Squire and Trapp, "Using Complex Variables to Estimate Derivatives"
(1998).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anyattn.testing.oracle.dense import Dense
from anyattn.testing.oracle.scores import Score, from_function

Array = Any
STEP = 1e-30


def gradients(
    q: Array,
    k: Array,
    v: Array,
    *,
    dout: Array,
    dlse: Array | None = None,
    parameters: Mapping[str, Array] | None = None,
    rebuild: Callable[[Mapping[str, Array]], Any] | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Gradients of Σ dout·out + Σ dlse·lse.

    Parameters
    ----------
    q, k, v, **options
        The call, as in `attention`.
    dout, dlse
        Cotangents in the shapes of the two results.
    parameters, rebuild
        Float arrays that the score modification captured, and the function that builds it from other values
        of them.

    Returns
    -------
    dict
        "q", "k", "v" and, where given, "bias" and "sinks", each in the shape of its argument, and one entry
        for each of `parameters`.
    """
    dense = Dense.of(q, k, v, **options)
    p, lse = dense.softmax()
    out = dense.output(p)
    dout = _canonical(dout, dense, out.shape)
    dlse = np.zeros(lse.shape) if dlse is None else np.asarray(dlse, np.float64).reshape(lse.shape)

    with np.errstate(all="ignore"):
        dp = dense.kept * np.einsum("bhrd,bhjd->bhrj", dout, dense.v)
        along = (dout * out).sum(axis=-1)
        flowing = p > 0
        dfinal = np.where(flowing, p * (dp - along[..., None] + dlse[..., None]), 0.0)
        dproduct = _through_score(dense, dfinal)
        pull = np.where(flowing[..., None], dproduct[..., None] * dense.scale, 0.0)
        dq = np.where(pull == 0, 0.0, pull * dense.k[:, :, None]).sum(axis=3)
        dk = np.where(pull == 0, 0.0, pull * dense.q[:, :, :, None]).sum(axis=2)
        left = p * dense.kept
        dv = np.where(flowing[..., None], left[..., None] * dout[:, :, :, None], 0.0).sum(axis=2)

    result = {
        "q": argument_gradient(dq, dense, np.shape(q)),
        "k": argument_gradient(dk, dense, np.shape(k)),
        "v": argument_gradient(dv, dense, np.shape(v)),
    }
    if options.get("bias") is not None:
        result["bias"] = unbroadcast(dense.as_result(dfinal), np.shape(options["bias"]))
    if dense.sinks is not None:
        result["sinks"] = (sink_share(dense, lse) * (dlse - along)).sum(axis=(0, 2))
    for name, values in (parameters or {}).items():
        assert rebuild is not None
        slopes = parameter_slopes(dense, name, parameters or {}, rebuild)
        flat = np.asarray([np.where(dfinal == 0, 0.0, dfinal * slope).sum() for slope in slopes])
        result[name] = flat.reshape(np.shape(values)) + result.get(name, 0.0)
    return result


def sink_share(dense: Dense, lse: Array) -> Array:
    """The part of the softmax that the sink takes, (B, Hq, Lq)."""
    assert dense.sinks is not None
    with np.errstate(all="ignore"):
        sink = np.broadcast_to(dense.sinks[None, :, None], lse.shape)
        return np.where(sink == -np.inf, 0.0, np.exp(sink - lse))


def score_slope(dense: Dense) -> Array:
    """d(modified score) / d(capped score) of each pair, 1 without a score modification."""
    if dense.score_mod is None:
        return np.ones(dense.pairs.shape)
    with np.errstate(all="ignore"):
        return np.imag(dense.pairs.fill(dense.score_mod(dense.capped + 1j * STEP, dense.pairs))) / STEP


def softcap_slope(dense: Dense) -> Array:
    """d(capped score) / d(scaled product) of each pair, 1 without a soft cap."""
    if dense.softcap is None:
        return np.ones(dense.pairs.shape)
    with np.errstate(all="ignore"):
        return 1 - np.tanh(dense.product / dense.softcap) ** 2


def parameter_slopes(
    dense: Dense, name: str, parameters: Mapping[str, Array], rebuild: Callable[[Mapping[str, Array]], Any]
) -> list[Array]:
    """d(modified score) / d(element) for each element, in row-major order, of the captured array `name`."""
    values = np.asarray(parameters[name], np.float64)
    slopes = []
    for index in np.ndindex(values.shape):
        moved = values.astype(np.complex128)
        moved[index] += 1j * STEP
        built = rebuild({**parameters, name: moved})
        modify = built if isinstance(built, Score) else from_function(built)
        with np.errstate(all="ignore"):
            slopes.append(np.imag(dense.pairs.fill(modify(dense.capped, dense.pairs))) / STEP)
    return slopes


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an argument of this shape was broadcast."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    stretched = tuple(axis for axis, n in enumerate(shape) if n == 1 and gradient.shape[axis] != 1)
    return gradient.sum(axis=stretched, keepdims=True)


def argument_gradient(gradient: Array, dense: Dense, shape: tuple[int, ...]) -> Array:
    """Take (B, Hq, L, features) to the axes of q, k or v, summing over all that shared an element."""
    if not dense.has_heads:
        return gradient[0, 0]
    gradient = gradient.reshape(*dense.batch_shape, *gradient.shape[1:])
    heads = shape[-2] if dense.layout == "blhd" else shape[-3]
    group = gradient.shape[-3] // heads if heads else 1
    gradient = gradient.reshape(*gradient.shape[:-3], heads, group, *gradient.shape[-2:]).sum(axis=-3)
    if dense.layout == "blhd":
        gradient = np.swapaxes(gradient, -3, -2)
    return unbroadcast(gradient, shape)


def _through_score(dense: Dense, dfinal: Array) -> Array:
    slope = score_slope(dense) * softcap_slope(dense)
    return np.where(dfinal == 0, 0.0, dfinal * slope)


def _canonical(x: Array, dense: Dense, shape: tuple[int, ...]) -> Array:
    x = np.asarray(x, np.float64)
    if dense.has_heads and dense.layout == "blhd":
        x = np.swapaxes(x, -3, -2)
    return x.reshape(shape)
