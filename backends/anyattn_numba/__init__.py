"""CPU kernels compiled by Numba, for NumPy arrays and concrete CPU arrays of other libraries.

Dispatch imports this package to read the declaration below, so it imports neither Numba nor NumPy: `engine`
does, at the first call. From there `work` cuts a call into items, `arguments` lays out what a kernel reads,
`kernels` finds compiled code (`forward`, its steps in `blocks`, `microkernels` made of `vectors`; `tiles` for
masks and scores), and `threads` runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from anyattn.backend import CAPABILITIES, Backend
from anyattn.call import AttentionCall

if TYPE_CHECKING:
    from anyattn.kernels.key import KernelKey
    from anyattn.linear.call import LinearCall

__all__ = ["backend"]


class NumbaBackend(Backend):
    """Declaration of the `numba` backend."""

    name = "numba"
    arrays = ("*",)
    dtypes = frozenset({"float16", "bfloat16", "float32", "float64"})
    devices = ("cpu",)
    capabilities = frozenset(CAPABILITIES) - {
        "gradients",
        "traced",
        "deterministic_backward",
    }
    requires = ("numba",)
    extra = "numba"

    def unsupported(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        """Why this backend does not take the call."""
        reasons = super().unsupported(call)
        if not reasons and not hasattr(call.q, "__dlpack__"):
            reasons = (f"shares memory by DLPack, which {call.array_type} has not",)
        if not reasons and call.library == "torch" and any(x.is_neg() for x in _floats(call)):
            reasons = ("reads memory as it is, not tensors that are negated lazily (Tensor.resolve_neg)",)
        if not reasons and call.library == "jax":
            spread = max(len(x.sharding.device_set) for x in (call.q, call.k, call.v) if x is not None)
            if spread > 1:
                reasons = (f"takes arrays on one device, not spread over {spread}",)
        return reasons

    def notes(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        """What it copies."""
        if isinstance(call, AttentionCall):
            return super().notes(call)
        mapped = call.feature_map != "identity" or call.q.dtype != call.v.dtype
        return (f"holds features of q and k, and v, of all tokens in {call.accumulate}",) if mapped else ()

    def run(self, call: AttentionCall | LinearCall) -> Any:
        """Run a call."""
        from anyattn_numba import engine, inspect_engine

        if call.operation == "linear":
            from anyattn_numba.linear_engine import linear

            return linear(call)
        run = {"attention": engine.attend, "weights": inspect_engine.weights, "stats": inspect_engine.stats}
        return run[call.operation](call)

    def prepare(self, call: AttentionCall) -> Any:
        """What serves calls like this one, or None."""
        from anyattn_numba import engine

        return engine.prepare(call)

    def warm_up(self, dtypes: Collection[str]) -> Iterator[tuple[str, float]]:
        """Compile the kernels, what runs them on threads, and code for common masks and scores."""
        from anyattn_numba import warmup

        return warmup.warm_up(dtypes)

    def source(self, call: AttentionCall) -> str:
        """The code that is generated for a call, and what calls it."""
        from anyattn_numba import kernels

        return kernels.call_source(call)

    def kernel_key(self, call: AttentionCall) -> KernelKey:
        """The key of all code that a call of this kind runs."""
        from anyattn_numba import kernels

        return kernels.call_key(call)


def _floats(call: Any) -> list[Any]:
    """The arrays of a call that may hold floats."""
    others = (
        call.others
        if isinstance(call, AttentionCall)
        else (call.decay, call.beta, call.state, call.normalizer)
    )
    return [x for x in (call.q, call.k, call.v, *others) if x is not None]


backend = NumbaBackend()
