"""What a case must give: the oracle's values, how far a result may be from them, the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from anyattn.testing import oracle
from anyattn.testing.bounds import UNITS, Bounds, gradient_bounds
from anyattn.testing.bounds_linear import linear_bounds
from anyattn.testing.case import ACCUMULATION, CACHES, Case, Value
from anyattn.testing.linear_gradients import linear_gradients
from anyattn.testing.oracle.linear import recur

Array = Any

ORACLE = SimpleNamespace(
    masks=oracle.masks,
    scores=oracle.scores,
    feature_maps=oracle.feature_maps,
    functions=oracle.functions,
    capture=oracle.functions.Captured,
)


@dataclass(frozen=True)
class Expected:
    """One array that a call must return."""

    values: Array
    bound: Array
    dtype: str
    nan_or_inf: bool = False
    """Whether NaN may also come as infinity: the contract leaves open what lse is beside a NaN or +inf
    score."""


def expected(case: Case, arrays: Mapping[str, Value] | None = None) -> dict[str, Expected]:
    """Every array that a case returns, by name ("out", "lse", "state", "weights", ... or a statistic's)."""
    if case.operation == "linear":
        return _linear(case, case.arrays() if arrays is None else arrays)
    dense, options = _dense(case, case.arrays() if arrays is None else arrays)
    bounds = Bounds.of(dense, case.dtype)
    wide = ACCUMULATION[case.dtype]
    if case.operation in ("attention", "packed", *CACHES):
        found = {"out": Expected(*_both(dense, bounds.out, bounds.output(), features=True), case.dtype)}
        if options["return_lse"]:
            found["lse"] = Expected(*_both(dense, bounds.lse, bounds.logsumexp()), wide, nan_or_inf=True)
        return _packed(found, options["rows"]) if case.operation == "packed" else found
    if case.operation == "merge":
        out, lse = bounds.merged(len(case.cuts) + 1)
        return {
            "out": Expected(*_both(dense, bounds.out, out, features=True), case.dtype),
            "lse": Expected(*_both(dense, bounds.lse, lse), wide, nan_or_inf=True),
        }
    if case.operation == "weights":
        rows = options["rows"]
        chosen = slice(None) if rows is None else np.asarray(rows, np.int64)
        values, bound = (x[:, :, chosen] for x in (bounds.p, bounds.weights()))
        return {"weights": Expected(*_both(dense, values, bound), case.dtype)}
    named = {"key_mass": bounds.key_mass, "entropy": bounds.entropy, "max": bounds.largest_weight}
    arguments, keywords = case.arguments({n: x.values for n, x in (arrays or case.arrays()).items()}, ORACLE)
    values = oracle.stats(*arguments, **keywords)
    return {name: Expected(x, dense.as_result(named[name]()), wide) for name, x in values.items()}


def _linear(case: Case, arrays: Mapping[str, Value]) -> dict[str, Expected]:
    arguments, keywords = case.arguments({name: value.values for name, value in arrays.items()}, ORACLE)
    returned = ["out"]
    if keywords.pop("return_state", False):
        returned += ["state", "normalizer"] if keywords.get("normalize") else ["state"]
    dense = oracle.LinearDense.of(*arguments, **keywords)
    values, bounds = dense.together(recur), linear_bounds(dense, case.dtype)
    wide = ACCUMULATION[case.dtype]
    return {
        name: Expected(values[name], bounds[name], case.dtype if name == "out" else wide) for name in returned
    }


@dataclass(frozen=True)
class Cotangents:
    """What a gradient case multiplies the results by before it sums them."""

    dout: Array
    dlse: Array | None


def cotangents(case: Case) -> Cotangents:
    """Drawn from the case's name, representable in the dtypes of the results."""
    lse_shape = (*case.batch_shape, *case.q[-3:-1]) if len(case.q) > 2 else case.q[:-1]
    out_shape = (*lse_shape, case.v[-1])
    rng = np.random.default_rng(len(case.name))
    # Eighths are exact in every dtype of the contract.
    dout = rng.integers(-16, 17, out_shape) / 8
    dlse = rng.integers(-16, 17, lse_shape) / 8 if case.options.get("return_lse") else None
    if case.layout == "blhd" and len(case.q) > 2:
        dout = np.swapaxes(dout, -3, -2)
    return Cotangents(dout, dlse)


def differentiable(case: Case, arrays: Mapping[str, Value]) -> list[str]:
    """Names of the arrays that a gradient case differentiates by: all of floats."""
    return [name for name, value in arrays.items() if value.dtype not in ("int", "bool")]


def expected_gradients(case: Case, arrays: Mapping[str, Value] | None = None) -> dict[str, Expected]:
    """Gradients of Σ dout·out + Σ dlse·lse by every float array of the case."""
    arrays = case.arrays() if arrays is None else arrays
    if case.operation == "linear":
        return _expected_linear_gradients(case, arrays)
    dense, _ = _dense(case, arrays)
    plain = {name: value.values for name, value in arrays.items()}
    (q, k, v), keywords = case.arguments(plain, ORACLE)
    keywords.pop("return_lse", None)
    weights_of = cotangents(case)
    captured = {
        name: plain[name]
        for name in differentiable(case, arrays)
        if name not in ("q", "k", "v", "bias", "sinks")
    }
    if _captures_q(case):
        captured["q"] = plain["q"]

    def rebuild(moved: Mapping[str, Array]) -> Any:
        return case.arguments({**plain, **moved}, ORACLE)[1]["score_mod"]

    values = oracle.gradients(
        q, k, v, dout=weights_of.dout, dlse=weights_of.dlse, parameters=captured, rebuild=rebuild, **keywords
    )
    bounds = Bounds.of(dense, case.dtype)
    dout = weights_of.dout
    if case.layout == "blhd" and dense.has_heads:
        dout = np.swapaxes(dout, -3, -2)
    dlse = (
        np.zeros(bounds.lse.shape) if weights_of.dlse is None else weights_of.dlse.reshape(bounds.lse.shape)
    )
    limits = gradient_bounds(
        bounds,
        {name: plain[name].shape for name in plain},
        dout.reshape(bounds.out.shape),
        dlse,
        captured,
        rebuild,
    )
    found = {}
    for name in differentiable(case, arrays):
        dtype = arrays[name].dtype
        rounding = bounds.units.u_in if dtype == case.dtype else np.finfo(dtype).eps
        limit = limits[name] + rounding * np.abs(values[name]) + bounds.units.floor_in
        found[name] = Expected(values[name], limit, dtype)
    return found


def _expected_linear_gradients(case: Case, arrays: Mapping[str, Value]) -> dict[str, Expected]:
    arguments, keywords = case.arguments({name: value.values for name, value in arrays.items()}, ORACLE)
    keywords.pop("return_state", None)
    dense, dout = oracle.LinearDense.of(*arguments, **keywords), cotangents(case).dout
    if case.layout == "blhd" and dense.has_heads:
        dout = np.swapaxes(dout, -3, -2)
    shapes = {name: arrays[name].values.shape for name in differentiable(case, arrays)}
    per_head = "decay" in arrays and arrays["decay"].values.ndim < arguments[1].ndim
    gradients = linear_gradients(
        dense, case.dtype, dout.reshape(*dense.q.shape[:3], dense.v.shape[-1]), shapes, per_head
    )
    found = {}
    for name, (values, bound) in gradients.items():
        units = UNITS[arrays[name].dtype]
        found[name] = Expected(
            values, bound + units.u_in * np.abs(values) + units.floor_in + UNITS[case.dtype].floor,
            arrays[name].dtype,
        )  # fmt: skip
    return found


def mismatch(actual: Array, wanted: Expected, label: str) -> str | None:
    """Why an array is not what is wanted, naming the worst element, or None."""
    if actual.shape != wanted.values.shape:
        return f"{label}: shape {actual.shape}, wanted {wanted.values.shape}"
    actual = actual.astype(np.float64)
    odd = np.isnan(wanted.values)
    allowed = ~np.isfinite(actual) if wanted.nan_or_inf else np.isnan(actual)
    infinite = np.isinf(wanted.values)
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - wanted.values)
    fine = np.where(odd, allowed, np.where(infinite, actual == wanted.values, error <= wanted.bound))
    if fine.all():
        return None
    with np.errstate(all="ignore"):
        ratio = np.where(
            fine, -1.0, np.where(np.isfinite(error / wanted.bound), error / wanted.bound, np.inf)
        )
    bound = np.broadcast_to(wanted.bound, fine.shape)
    at = tuple(int(n) for n in np.unravel_index(np.argmax(ratio), ratio.shape))
    return (
        f"{label}: {np.count_nonzero(~fine)} of {fine.size} elements are wrong; worst at {at}: "
        f"got {actual[at]!r}, wanted {wanted.values[at]!r} ± {bound[at]:.3g} "
        f"(error / bound = {ratio[at]:.3g})"
    )


def _dense(case: Case, arrays: Mapping[str, Value]) -> tuple[oracle.Dense, dict[str, Any]]:
    """The written-out call, and the options that say what to return."""
    arguments, keywords = case.arguments({name: value.values for name, value in arrays.items()}, ORACLE)
    what = {"return_lse": keywords.pop("return_lse", False), "rows": keywords.pop("rows", None)}
    keywords.pop("stats", None)
    if case.operation == "packed":
        rows, keys = (np.diff(keywords.pop(name)) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        what["rows"] = rows
        arguments = [_padded(x, n) for x, n in zip(arguments, (rows, keys, keys), strict=True)]
        keywords |= {"kv_lengths": keys, "q_offset": keys - rows}
    return oracle.Dense.of(*arguments, **keywords), what


def _padded(x: Array, lengths: Array) -> Array:
    """Sequences (T, ...) that lie end to end as (N, longest, ...), each from 0 on."""
    found = np.zeros((len(lengths), lengths.max(initial=0), *x.shape[1:]), x.dtype)
    for own, part in zip(found, np.split(x, np.cumsum(lengths)[:-1]), strict=True):
        own[: len(part)] = part
    return found


def _packed(found: Mapping[str, Expected], lengths: Array) -> dict[str, Expected]:
    """Results (N, L, H, Dv) and (N, H, L) of padded sequences as (T, H, Dv) and (H, T) of packed ones."""

    def joined(x: Array, name: str) -> Array:
        axis = 0 if name == "out" else -1
        rows = [np.take(own, np.arange(n), axis) for own, n in zip(x, lengths, strict=True)]
        return np.concatenate(rows, axis)

    return {
        name: replace(one, values=joined(one.values, name), bound=joined(one.bound, name))
        for name, one in found.items()
    }


def _both(dense: oracle.Dense, values: Array, bound: Array, *, features: bool = False) -> tuple[Array, Array]:
    return (
        dense.as_result(values, rows_and_features=features),
        dense.as_result(bound, rows_and_features=features),
    )


def _captures_q(case: Case) -> bool:
    return "Same(name='q')" in repr(case.options.get("score_mod"))
