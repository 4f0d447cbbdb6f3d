"""Gradients of a call of `linear_attention`, and how far a correct program may be from them.

Gradients are sums of products over paths through the recurrence. `oracle.linear_derivatives` adds up their
absolute values, A; the programs that `bounds_linear` speaks of group the same sums, with numbers of the
forward that they compute to its gamma, so that an error is at most

    4 (gamma + u_p) A + u_in |gradient|

one for the numbers of the forward, one for the sums back, one for quotients of a normalised row, and one more
for the products at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn.testing.bounds import UNITS
from anyattn.testing.bounds_linear import feature_error, rounding
from anyattn.testing.oracle.linear import LinearDense
from anyattn.testing.oracle.linear_derivatives import differentiate

Array = Any


def linear_gradients(
    dense: LinearDense, dtype: str, dout: Array, shapes: dict[str, tuple[int, ...]], per_head: bool
) -> dict[str, tuple[Array, Array]]:
    """Gradient and bound, less the rounding of the result, by each name in `shapes`.

    `dout` has the shape of q's rows with every axis, (B, Hq, Lq, Dv); `per_head` says that a decay has no
    axis of channels.
    """
    units = UNITS[dtype]
    features = 4 * max((feature_error(dense.feature_map, x, units.u) for x in dense.unmapped), default=0.0)
    zeros = {
        "q": dense.q, "k": dense.k, "v": dense.v, "decay": dense.k, "beta": dense.k[..., 0],
        "state": dense.state, "z": dense.z,
    }  # fmt: skip
    found = {name: [np.zeros(x.shape), np.zeros(x.shape)] for name, x in zeros.items()}
    for (b, n, h), rows, heads, strand in dense.strands():
        keys = slice(dense.bounds[n], dense.bounds[n + 1])
        here: dict[str, Any] = {"q": (b, heads, rows), "state": (b, n, h), "z": (b, n, h)}
        each = 4 * (rounding(strand, units.u) + features + units.u_p)
        for place, factor in ((0, 1.0), (1, each)):
            parts = differentiate(strand, dout[b, heads, rows], magnitudes=bool(place))
            for name, part in parts._asdict().items():
                found[name][place][here.get(name, (b, h, keys))] += factor * part
    for name, x in zip("qk", dense.unmapped, strict=True):
        slope = np.broadcast_to(_slope(dense.feature_map, x), (*dense.batch_shape, *x.shape[-3:]))
        slope = slope.reshape(found[name][0].shape)
        found[name] = [part * slope for part in found[name]]
    return {
        name: tuple(_as_given(dense, name, x, shape, per_head) for x in found[name])
        for name, shape in shapes.items()
    }


def _slope(feature_map: Any, x: Array) -> Array:
    """Of the maps whose gradients cases ask for, the derivative, which is not negative."""
    match feature_map:
        case None | "identity":
            return np.ones(x.shape)
        case "elu+1":
            return np.exp(np.minimum(x, 0))
    raise ValueError(f"no derivative of {feature_map!r} is written down")


def _as_given(dense: LinearDense, name: str, x: Array, shape: tuple[int, ...], per_head: bool) -> Array:
    """A sum over all axes that an array of the caller does not have."""
    if name in ("state", "z"):
        # (B, N, ...), and one of the two is 1.
        x = x[0] if dense.packed else x[:, 0].reshape(*dense.batch_shape, *x.shape[2:])
    else:
        x = x.reshape(*dense.batch_shape, *x.shape[1:])
    if name == "decay" and per_head:
        x = x.sum(axis=-1)
    last = {"q": 2, "k": 2, "v": 2, "decay": 1 + (not per_head), "beta": 1, "state": 2, "z": 1}[name]
    if not dense.has_heads:
        x = np.take(x, 0, axis=x.ndim - last - 1)
    elif dense.layout == "blhd" and name in "qkv":
        x = np.swapaxes(x, -3, -2)
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(
        axis=tuple(n for n, size in enumerate(shape) if size == 1 and x.shape[n] != 1), keepdims=True
    )
