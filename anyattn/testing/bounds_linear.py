"""How far a correct `linear_attention` may be from the oracle, element by element.

As in `bounds`, these are first-order forward error bounds (Higham, chapters 3, 4 and 8) of the contract's
formula, for implementations that go token by token, by chunks of any size, or by solving for the whole
length. With

    E_ts     exp of the sum of the decays of the tokens after s up to t, 1 without decay
    W_ts     sum over channels of |q_t| E_ts |k_s|, what a weight adds up to without cancellation
    T        inverse of I + N, N_ts = beta_t k_t . E_ts k_s for s < t: the delta rules write U = T R; I for
             the other rules
    R        beta (|v| + |k| E |S0|), or |v|; then |T| R is what U adds up to without cancellation
    gamma    2 u (F + L + L sum |decay| + 32) + 4 (relative error of a feature)

and from them the errors of

    U        (gamma + u_p) |T| (R + |N| |T| R), |N| without cancellation
    out      scale ((gamma + 2 u_p) W |T| R + (gamma + u_p) |q| E |S0| + W (error of U)) + u_in |out|
    state    the same with |k| in the place of W, without scale and rounding to q's dtype

where u_p, as in `bounds`, lets 16-bit kernels round weights, U and the state that they multiply to q's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from anyattn.testing.bounds import UNITS, Units
from anyattn.testing.oracle.feature_maps import performer
from anyattn.testing.oracle.linear import LinearDense, Strand, recur

Array = Any


def linear_bounds(dense: LinearDense, dtype: str) -> dict[str, Array]:
    """Bounds of "out", "state" and "normalizer", in the shapes of the results."""
    units = UNITS[dtype]
    features = 4 * max((feature_error(dense.feature_map, x, units.u) for x in dense.unmapped), default=0.0)
    return dense.together(_strand_bounds(units, features))


def _strand_bounds(units: Units, features: float) -> Callable[[Strand], tuple[Array, Array, Array]]:
    def bound(strand: Strand) -> tuple[Array, Array, Array]:
        length, dim = strand.k.shape
        decay = np.zeros((length, dim)) if strand.decay is None else strand.decay
        gamma = rounding(strand, units.u) + features
        between, since = _decays(decay)
        key, query = np.abs(strand.k), np.abs(strand.q)
        last = between[-1] if length else np.zeros((0, dim))
        kept = since[-1] if length else np.ones(dim)

        weights = np.einsum("grd,rsd,sd->grs", query, between, key) if strand.causal else None
        if weights is None:
            weights = np.einsum("grd,sd->grs", query, key)
            reading = query
        else:
            reading = query * since
        written, error = _written(strand, between, since, gamma + units.u_p)
        own, old = gamma + 2 * units.u_p, gamma + units.u_p

        def carried(start: Array, values: Array, wrong: Array) -> tuple[Array, Array]:
            """Bounds of what rows read and of the last state, before scale and rounding to the result."""
            least = units.floor * (length + dim + 1)
            read = weights @ (own * values + wrong) + old * (reading @ start)
            left = (last * key).T @ (own * values + wrong) + old * kept[:, None] * start
            return read + least * (1 + query.sum(axis=-1, keepdims=True)), left + least

        rows, state = carried(np.abs(strand.state), written, error)
        ones = np.ones((length, 1))
        total_error, z = carried(np.abs(strand.z)[:, None], ones, 0 * ones)
        out, _, _ = recur(strand)
        rows = abs(strand.scale) * rows
        if strand.normalize:
            total = (weights @ ones + (reading @ np.abs(strand.z))[..., None])[..., 0]
            total = total[..., None]
            empty = total == 0
            rows = np.where(empty, 0.0, (rows + np.abs(out) * total_error) / np.where(empty, 1.0, total))
            rows = rows * (1 + 4 * gamma) + 4 * units.u * np.abs(out)
        return rows + (units.u_in + 4 * units.u) * np.abs(out) + units.floor_in, state, z[:, 0]

    return bound


def rounding(strand: Strand, u: float) -> float:
    """2 u (F + L + L sum |decay| + 32): gamma but for the error of features."""
    length, dim = strand.k.shape
    summed = 0.0
    if strand.decay is not None:
        finite = np.where(np.isfinite(strand.decay), np.abs(strand.decay), 0.0)
        summed = float(finite.sum(axis=0).max(initial=0.0))
    terms: float = dim + length + length * summed + 32
    return 2 * u * terms


def _decays(decay: Array) -> tuple[Array, Array]:
    """E_ts (L, L, F), 0 for s > t, and what is left at t of the state before the first token, (L, F)."""
    length, dim = decay.shape
    between, since = np.zeros((length, length, dim)), np.zeros((length, dim))
    with np.errstate(all="ignore"):
        for t in range(length):
            since[t] = np.exp(decay[: t + 1].sum(axis=0))
            for s in range(t + 1):
                between[t, s] = np.exp(decay[s + 1 : t + 1].sum(axis=0))
    return between, since


def _written(strand: Strand, between: Array, since: Array, each: float) -> tuple[Array, Array]:
    """What the tokens write, added up without cancellation, and how wrong it may be, (L, Dv) each."""
    if strand.beta is None:
        return np.abs(strand.v), np.zeros(strand.v.shape)
    beta, key, length = strand.beta[:, None], np.abs(strand.k), len(strand.beta)
    below = np.tril(np.ones((length, length)), -1)
    signed = below * beta * np.einsum("td,tsd,sd->ts", strand.k, between, strand.k)
    plain = below * np.abs(beta) * np.einsum("td,tsd,sd->ts", key, between, key)
    inverse = np.abs(np.linalg.inv(np.eye(length) + signed))
    right = np.abs(beta) * (np.abs(strand.v) + (key * since) @ np.abs(strand.state))
    written = inverse @ right
    return written, each * inverse @ (right + plain @ written)


def feature_error(given: Any, x: Array, u: float) -> float:
    """Relative error of a feature: rounding, and that of an exponent in absolute terms."""
    if x.size == 0 or given in (None, "identity", "relu"):
        return 0.0
    largest = float(np.abs(x).max())
    if isinstance(given, performer):
        y = np.abs(x) * math.sqrt(given.scale)
        size = np.einsum("...d,md->...m", y, np.abs(given.directions)).max() + (y * y).sum(axis=-1).max()
        return u * (8 + (int(x.shape[-1]) + 8) * float(size))
    if given == "softmax":
        return u * (8 + int(x.shape[-1]) + 4 * largest)
    return u * (8 + 4 * largest)
