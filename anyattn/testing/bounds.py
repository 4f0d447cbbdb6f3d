"""How far a correct implementation may be from the oracle, element by element.

Nothing here is tuned to what some implementation happens to reach; every bound is a first-order forward error
bound (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., chapters 3 and 4: a sum or dot
product of n terms in any order errs by at most n·u times the sum of the absolute terms) applied to the
contract's formula, with

    u        unit roundoff of the accumulation dtype (2^-24 for float32, 2^-53 for float64)
    u_in     unit roundoff of q's dtype (2^-11 float16, 2^-8 bfloat16, 2^-24, 2^-53)
    A        scale · Σ_d |q_d|·|k_d|, what the score's products add up to without cancellation
    E        absolute error of a final score:
             u·[(D + 4)·A·L + 8·(|scores of every stage| + |changes between stages|)], L the slope of the
             score modification; tanh and exp are taken to be right to 4 units in the last place, 8 covers
             their arguments
    ε        relative error of a softmax weight:
             exp(E + Σ p·exp(E) − 1 + u·[6·(|s| + max |s|) + 2·Lk + 32]) − 1. The sum is the denominator's
             share; 6 pays for s − m, its conversion to base 2, and for rescaling once for every key block,
             whose exponents telescope to at most 2·max |s|; 2·Lk pays for the sum and for a product in each
             of Lk blocks

and from them

    weights  p·(ε + u_in)
    out      Σ p·kept·|v|·(ε + (2·Lk + 16)·u + u_p) + u_in·|out|, where u_p = u_in for 16-bit dtypes, because
    kernels may
             round the weights to the inputs' type before P·V (contract, section 1), and 0 otherwise; kept is
             what dropout multiplies a weight by: 0, or 1 / (1 − its probability), else 1
    lse      Σ p·E + u·[6·max |s| + 2·Lk + 32] + 2·u·|lse|
    key_mass Σ_rows p·ε + (Lq + 32)·u·key_mass
    entropy  Σ p·ε·(1 + |ln p|) + bound of lse + (2·Lk + 32)·u·Σ p·(|s| + |lse| + |ln p|), which allows lse −
    Σ p·s

Gradients follow by the same rules from the formulas of `oracle.gradients`; 16-bit backends may round p, ds
and out to q's dtype. Underflow adds the smallest normal number of the accumulation dtype, and half the
spacing of subnormals of q's dtype, for each term of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattn.testing.oracle import derivatives as formulas
from anyattn.testing.oracle.dense import Dense

Array = Any


@dataclass(frozen=True)
class Units:
    """Rounding of one input dtype and of the dtype that it accumulates in."""

    u: float
    u_in: float
    floor: float
    """Smallest normal number of the accumulation dtype."""
    floor_in: float
    """Half the spacing of the subnormals of the input dtype."""

    @property
    def u_p(self) -> float:
        """Rounding of weights before P·V."""
        return self.u_in if self.u_in > self.u else 0.0

    @property
    def floor_p(self) -> float:
        """Underflow of weights before P·V."""
        return self.floor_in if self.u_in > self.u else 0.0


UNITS = {
    "float16": Units(2.0**-24, 2.0**-11, 2.0**-126, 2.0**-25),
    "bfloat16": Units(2.0**-24, 2.0**-8, 2.0**-126, 2.0**-134),
    "float32": Units(2.0**-24, 2.0**-24, 2.0**-126, 2.0**-150),
    # The oracle itself works in float64: its own error is as large as that of what it judges.
    "float64": Units(2.0**-52, 2.0**-52, 2.0**-1022, 2.0**-1074),
}


@dataclass(frozen=True)
class Bounds:
    """Bounds of everything that one call may return, arrays in the (B, Hq, ...) order of `Dense`."""

    dense: Dense
    units: Units
    p: Array
    lse: Array
    out: Array
    score: Array
    """E of each pair, 0 where it does not reach the softmax."""
    relative: Array
    """ε of each pair."""
    denominator: Array
    """Σ p·(exp(E) − 1) of each row, (B, Hq, Lq)."""
    largest: Array
    """max |s| of each row over all that has a weight, the sink too, (B, Hq, Lq)."""

    @classmethod
    def of(cls, dense: Dense, dtype: str) -> Bounds:
        """Evaluate a call and its error model."""
        units = UNITS[dtype]
        p, lse = dense.softmax()
        with np.errstate(all="ignore"):
            score = _score_error(dense, units)
            counted = np.where(p > 0, p, 0.0)
            denominator = (counted * np.expm1(score)).sum(axis=3)
            largest = _largest(dense, p, lse)
            size = np.where(dense.seen & np.isfinite(dense.final), np.abs(dense.final), 0.0)
            rounding = units.u * (6 * (size + largest[..., None]) + 2 * dense.pairs.shape[3] + 32)
            relative = np.expm1(score + denominator[..., None] + rounding)
        return cls(dense, units, p, lse, dense.output(p), score, relative, denominator, largest)

    @property
    def _counted(self) -> Array:
        return np.where(self.p > 0, self.p, 0.0)

    @property
    def _left(self) -> Array:
        """What dropout leaves of the weights."""
        return self._counted * self.dense.kept

    def weights(self) -> Array:
        """Bound of p, (B, Hq, Lq, Lk)."""
        return self._counted * (self.relative + self.units.u_in) + self.units.floor + self.units.floor_in

    def output(self) -> Array:
        """Bound of out, (B, Hq, Lq, Dv)."""
        units, dense = self.units, self.dense
        each = self._left * (self.relative + (2 * self._keys + 16) * units.u + units.u_p)
        each = each + np.where(dense.seen, (units.floor + units.floor_p) * np.maximum(dense.kept, 1), 0.0)
        size = np.where(np.isfinite(dense.v), np.abs(dense.v), 0.0)
        out = np.where(np.isfinite(self.out), np.abs(self.out), 0.0)
        return each @ size + units.u_in * out + units.floor_in

    def logsumexp(self) -> Array:
        """Bound of lse, (B, Hq, Lq)."""
        lse = np.where(np.isfinite(self.lse), np.abs(self.lse), 0.0)
        return self.denominator + self.units.u * (6 * self.largest + 2 * self._keys + 32 + 2 * lse)

    def merged(self, parts: int) -> tuple[Array, Array]:
        """Bounds of out and lse where `anyattn.merge` joins that many parts.

        Each part's lse errs by as much as the whole's may, which moves its share, and each part's out is
        rounded to q's dtype before the sum.
        """
        size = np.where(np.isfinite(self.dense.v), np.abs(self.dense.v), 0.0)
        lse = 2 * self.logsumexp() + 16 * parts * self.units.u
        extra = (2 * lse + self.units.u_in + 16 * parts * self.units.u)[..., None] * (self._left @ size)
        return self.output() + extra + parts * self.units.floor_in, lse

    def key_mass(self) -> Array:
        """Bound of Σ over rows of p, (B, Hq, Lk)."""
        rows = self.dense.pairs.shape[2]
        counted = self._counted
        each = counted * (self.relative + (rows + 32) * self.units.u)
        return each.sum(axis=2) + (rows + 1) * self.units.floor

    def entropy(self) -> Array:
        """Bound of −Σ p ln p, (B, Hq, Lq)."""
        counted = self._counted
        with np.errstate(all="ignore"):
            log_p = np.where(counted > 0, np.abs(np.log(counted)), 0.0)
        size = np.where(np.isfinite(self.dense.final), np.abs(self.dense.final), 0.0)
        lse = np.where(np.isfinite(self.lse), np.abs(self.lse), 0.0)
        spread = (counted * (size + lse[..., None] + log_p)).sum(axis=3)
        first = (counted * self.relative * (1 + log_p)).sum(axis=3)
        return first + self.logsumexp() + (2 * self._keys + 32) * self.units.u * spread + self.units.floor

    def largest_weight(self) -> Array:
        """Bound of the largest weight of a row, (B, Hq, Lq)."""
        return (self._counted * (self.relative + 8 * self.units.u)).max(
            axis=3, initial=0.0
        ) + self.units.floor

    @property
    def _keys(self) -> int:
        return int(self.dense.pairs.shape[3])


def gradient_bounds(
    bounds: Bounds,
    shapes: Mapping[str, tuple[int, ...]],
    dout: Array,
    dlse: Array,
    parameters: Mapping[str, Array],
    rebuild: Callable[[Mapping[str, Array]], Any] | None,
) -> dict[str, Array]:
    """Bounds of `oracle.gradients`, in the shapes of the arguments.

    `dout` and `dlse` are in the order of `Dense`. Second derivatives of the score modification and of the
    soft cap are taken to be at most 1 in absolute value, which the kit's cases keep.
    """
    dense, units = bounds.dense, bounds.units
    p, relative = bounds._counted, bounds.relative
    flowing = p > 0
    rows, keys, group = dense.pairs.shape[2], dense.pairs.shape[3], dense.pairs.shape[1]
    features = dense.v.shape[-1]

    with np.errstate(all="ignore"):
        reach = dense.kept * np.einsum("bhrd,bhjd->bhrj", np.abs(dout), np.abs(dense.v))
        dp = np.where(flowing, reach, 0.0)
        along = (p * dp).sum(axis=3)[..., None] + np.abs(dlse)[..., None]
        size = p * (dp + along)
        error = size * (
            2 * (relative + bounds.denominator[..., None]) + (features + keys + 16) * units.u + 3 * units.u_p
        )
        slope = np.abs(formulas.score_slope(dense) * formulas.softcap_slope(dense))
        slope_error = bounds.score + 8 * units.u * (1 + slope)
        error_product = np.where(flowing, error * slope + size * slope_error, 0.0) * abs(dense.scale)
        size_product = np.where(flowing, size * slope, 0.0) * abs(dense.scale)

        key = np.where(np.isfinite(dense.k), np.abs(dense.k), 0.0)
        query = np.where(np.isfinite(dense.q), np.abs(dense.q), 0.0)
        dq = (error_product + (keys + 8) * units.u * size_product) @ key
        summed = rows * group + math.prod(dense.batch_shape) + 8
        dk = np.swapaxes(error_product + summed * units.u * size_product, 2, 3) @ query
        each = p * dense.kept * (relative + summed * units.u + units.u_p)
        dv = np.swapaxes(each, 2, 3) @ np.abs(dout)

    def to_argument(x: Array, name: str) -> Array:
        return formulas.argument_gradient(x, dense, shapes[name])

    found = {"q": to_argument(dq, "q"), "k": to_argument(dk, "k"), "v": to_argument(dv, "v")}
    terms = math.prod(dense.pairs.shape[:3]) + keys
    if "bias" in shapes:
        found["bias"] = formulas.unbroadcast(dense.as_result(error + terms * units.u * size), shapes["bias"])
    if dense.sinks is not None:
        share = formulas.sink_share(dense, bounds.lse)
        reach = along[..., 0]
        sink_error = (
            bounds.logsumexp() + relative.max(axis=3, initial=0.0) + (terms + features) * units.u + units.u_p
        )
        found["sinks"] = (share * reach * 2 * np.expm1(sink_error)).sum(axis=(0, 2))
    for name, values in parameters.items():
        assert rebuild is not None
        slopes = formulas.parameter_slopes(dense, name, parameters, rebuild)
        flat = [
            ((error + size * (bounds.score + terms * units.u)) * np.abs(np.where(flowing, one, 0.0))).sum()
            + (size * bounds.score).sum()
            for one in slopes
        ]
        found[name] = np.asarray(flat).reshape(np.shape(values)) + found.get(name, 0.0)
    return {name: bound + terms * (units.floor + units.floor_p) for name, bound in found.items()}


def _score_error(dense: Dense, units: Units) -> Array:
    """E: absolute error of each final score, 0 where the pair does not reach the softmax."""
    head_dim = dense.q.shape[-1]
    products = abs(dense.scale) * np.einsum("bhrd,bhjd->bhrj", np.abs(dense.q), np.abs(dense.k))
    slope = np.abs(formulas.score_slope(dense))
    size = np.abs(dense.final)
    if dense.softcap is not None:
        size = size + np.abs(dense.capped) * slope
    if dense.score_mod is not None:
        size = (
            size
            + np.abs(dense.capped) * slope
            + np.abs(dense.modified)
            + np.abs(dense.modified - dense.capped)
        )
    if dense.final is not dense.modified:
        size = size + np.abs(dense.modified) + np.abs(dense.final - dense.modified)
    error = units.u * ((head_dim + 4) * products * slope + 8 * size)
    return np.where(dense.seen & np.isfinite(dense.final) & np.isfinite(error), error, 0.0)


def _largest(dense: Dense, p: Array, lse: Array) -> Array:
    """max |s| over what has a weight: a score so low that its weight is 0 drops out of every rescaling."""
    size = np.where(p > 0, np.abs(dense.final), 0.0).max(axis=3, initial=0.0)
    if dense.sinks is not None:
        counts = formulas.sink_share(dense, lse) > 0
        size = np.maximum(size, np.where(counts, np.abs(dense.sinks)[None, :, None], 0.0))
    return size
