"""Weights divided by their sum, and what is summed up of them, on vectors.

As in `microkernels`, a lane is a query and addresses are int64:

    normalise    P[j, :] = factor[:] exp(S[j, :] - largest[:]), and what its -P ln P adds to the entropy
    gather       mass[j] = sum over lanes of P[j, :]             peak[:] = max(peak[:], P[j, :])
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types

from anyattn_numba.jit import cgutils, intrinsic
from anyattn_numba.microkernels import accumulators, by_vectors
from anyattn_numba.target import Shape
from anyattn_numba.vectors import INT64, Vectors, offset

__all__ = ["gather_kernel", "normalise_kernel"]


@lru_cache
def normalise_kernel(shape: Shape) -> Any:
    """normalise(vectors, scores, keys, largest, factor, log_total, entropy): scores become weights.

    `factor` is 1 over the sum of weights, 0 for a lane whose weights shall be 0 whatever its scores are;
    `log_total` is the log of that sum. A score of -inf adds nothing to the entropy.
    """
    lanes = Vectors(shape.element, shape.lanes)

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        scores, keys, largest, factor, log_total, entropy = arguments
        zero, lowest = lanes.constant(0.0), lanes.constant(float("-inf"))
        (sums,) = accumulators(builder, lanes, 1, vectors)
        given = []
        for v, sum_ in enumerate(sums):
            at = v * lanes.nbytes
            top, times, log = (
                lanes.load(builder, offset(builder, x, at)) for x in (largest, factor, log_total)
            )
            # -inf - -inf is NaN.
            base = builder.select(builder.fcmp_ordered("==", top, lowest), zero, top)
            given.append((base, times, log, builder.fcmp_ordered("==", times, zero)))
            builder.store(lanes.load(builder, offset(builder, entropy, at)), sum_)
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            here = builder.add(scores, builder.mul(loop.index, ir.Constant(INT64, vectors * lanes.nbytes)))
            for v, (sum_, (base, times, log, none)) in enumerate(zip(sums, given, strict=True)):
                at = offset(builder, here, v * lanes.nbytes)
                score = lanes.load(builder, at)
                power = builder.fsub(score, base)
                weight = builder.fmul(lanes.exp(builder, power), times)
                weight = builder.select(none, zero, weight)
                lanes.store(builder, weight, at)
                surprise = builder.fmul(weight, builder.fsub(log, power))
                hidden = builder.fcmp_ordered("==", score, lowest)
                surprise = builder.select(hidden, zero, surprise)
                builder.store(builder.fadd(builder.load(sum_), surprise), sum_)
        for v, sum_ in enumerate(sums):
            lanes.store(builder, builder.load(sum_), offset(builder, entropy, v * lanes.nbytes))

    call = by_vectors("normalise", shape, 6, code)

    @intrinsic
    def normalise(
        typing_context: Any,
        vectors: Any,
        scores: Any,
        keys: Any,
        largest: Any,
        factor: Any,
        log_total: Any,
        entropy: Any,
    ) -> Any:
        return types.void(*[types.int64] * 7), call

    return normalise


@lru_cache
def gather_kernel(shape: Shape) -> Any:
    """gather(vectors, weights, keys, mass, peak): a sum of each key, and the largest of each lane.

    Both are NaN where a weight is.
    """
    lanes = Vectors(shape.element, shape.lanes)
    pair = ir.VectorType(ir.IntType(32), lanes.lanes)

    def across(builder: Any, x: Any) -> Any:
        """The sum of the lanes: halves are added to each other."""
        half = lanes.lanes // 2
        while half:
            other = [(n + half) % lanes.lanes for n in range(lanes.lanes)]
            x = builder.fadd(x, builder.shuffle_vector(x, x, ir.Constant(pair, other)))
            half //= 2
        return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    def code(builder: Any, vectors: int, arguments: list[Any]) -> None:
        weights, keys, mass, peak = arguments
        (peaks,) = accumulators(builder, lanes, 1, vectors)
        for v, place in enumerate(peaks):
            builder.store(lanes.load(builder, offset(builder, peak, v * lanes.nbytes)), place)
        with cgutils.for_range(builder, keys, intp=INT64) as loop:
            here = builder.add(weights, builder.mul(loop.index, ir.Constant(INT64, vectors * lanes.nbytes)))
            sum_ = None
            for v, place in enumerate(peaks):
                weight = lanes.load(builder, offset(builder, here, v * lanes.nbytes))
                before = builder.load(place)
                # Also where the weight is NaN; a NaN that was there stays.
                taken = builder.or_(
                    builder.fcmp_ordered(">", weight, before), builder.fcmp_unordered("uno", weight, weight)
                )
                builder.store(builder.select(taken, weight, before), place)
                sum_ = weight if sum_ is None else builder.fadd(sum_, weight)
            there = builder.add(mass, builder.mul(loop.index, ir.Constant(INT64, lanes.itemsize)))
            builder.store(across(builder, sum_), builder.inttoptr(there, lanes.scalar.as_pointer()))
        for v, place in enumerate(peaks):
            lanes.store(builder, builder.load(place), offset(builder, peak, v * lanes.nbytes))

    call = by_vectors("gather", shape, 4, code)

    @intrinsic
    def gather(typing_context: Any, vectors: Any, weights: Any, keys: Any, mass: Any, peak: Any) -> Any:
        return types.void(*[types.int64] * 5), call

    return gather
