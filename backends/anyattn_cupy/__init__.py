"""CUDA C++ kernels through CuPy.

Dispatch imports this package to read the declaration below, so it imports neither CuPy nor NumPy: `launch`
and `inspect_launch` do, at the first call. From there `exchange` takes arrays of torch and JAX, `variants`
chooses a kernel and its tiles, `schedules` brings the schedule to the device, `filling` fills in what a
kernel reads, as `arguments` lays it out, and `source` joins the text that CuPy compiles from the files in
`kernels`. `capture` says what CUDA graphs can hold. Linear attention has `linear_launch` and
`linear_variants`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattn.backend import Backend
from anyattn.call import AttentionCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyattn.arrays import Array
    from anyattn.kernels.key import KernelKey
    from anyattn.linear.call import LinearCall

__all__ = ["backend"]


class CupyBackend(Backend):
    """Declaration of the `cupy` backend."""

    name = "cupy"
    arrays = ("cupy.ndarray", "torch.Tensor", "jax.Array")
    dtypes = frozenset({"float16", "bfloat16", "float32", "float64"})
    devices = ("cuda",)
    capabilities = frozenset(
        {
            "causal",
            "window",
            "mask",
            "bias",
            "score_mod",
            "softcap",
            "sinks",
            "kv_lengths",
            "q_offset",
            "dropout",
            "grouped_heads",
            "return_lse",
            "int8",
            "weights",
            "stats",
            "strict_masking",
            "linear_attention",
            "gated_rule",
            "delta_rule",
            "cu_seqlens",
        }
    )
    requires = ("cupy",)
    extra = "cupy"

    def unsupported(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        """Why this backend does not take the call."""
        from anyattn_cupy.devices import absent, too_old

        missing = absent()
        if missing is not None:
            return (missing,)
        reasons = super().unsupported(call)
        if call.library == "jax":
            if call.traced:
                reasons += ("runs nothing under jit: JAX tells nobody the stream of a compiled function",)
            elif not reasons:
                spread = max(len(x.sharding.device_set) for x in (call.q, call.k, call.v) if x is not None)
                reasons = (f"takes arrays on one device, not spread over {spread}",) if spread > 1 else ()
        if call.library == "torch" and not reasons and any(x.is_neg() for x in _floats(call)):
            reasons = ("reads memory as it is, not tensors that are negated lazily (Tensor.resolve_neg)",)
        if not reasons:
            import cupy

            old = too_old(cupy, call.q.__dlpack_device__()[1])
            reasons = () if old is None else (old,)
        return reasons

    def notes(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        """How the kernel that serves a call differs from what one would expect."""
        import cupy

        from anyattn_cupy import linear_launch
        from anyattn_cupy.exchange import current
        from anyattn_cupy.launch import remarks

        with current(call.q, cupy):
            if call.operation == "linear":
                return linear_launch.remarks(call, cupy)
            return remarks(call, cupy)

    def prepare(self, call: AttentionCall) -> Callable[..., tuple[Array, Array | None]] | None:
        """What serves calls like this one, or None where they have no rows."""
        import cupy

        from anyattn_cupy.capture import refuse_described
        from anyattn_cupy.exchange import as_cupy, current, given_back
        from anyattn_cupy.launch import prepare

        library = call.library
        with current(call.q, cupy):
            refuse_described(call.operation, cupy)
            prepared = prepare(call, cupy)
        if prepared is None:
            return None

        def run(q: Array, *others: Array) -> tuple[Array, Array | None]:
            with current(q, cupy):
                out, lse = prepared(*(as_cupy(x, cupy) for x in (q, *others)))
                return given_back(out, library), given_back(lse, library)

        return run

    def converted(self, name: str, value: Any) -> None:
        """Raise where a graph is captured that would not keep what an argument was converted to."""
        import cupy

        from anyattn_cupy.capture import refuse_converted

        refuse_converted(name, value, cupy)

    def source(self, call: AttentionCall) -> str:
        """CUDA C++ of the kernel that serves a call."""
        import cupy

        from anyattn_cupy.exchange import current
        from anyattn_cupy.listing import source_of

        with current(call.q, cupy):
            return source_of(call, cupy)

    def kernel_key(self, call: AttentionCall) -> KernelKey:
        """The complete key of that kernel."""
        import cupy

        from anyattn_cupy.exchange import current
        from anyattn_cupy.listing import key_of

        with current(call.q, cupy):
            return key_of(call, cupy)

    def run(self, call: AttentionCall | LinearCall) -> Any:
        """Run a call on the device of its arrays, on the current stream."""
        import cupy

        from anyattn_cupy.capture import refuse_described
        from anyattn_cupy.exchange import current, given_back
        from anyattn_cupy.inspect_launch import stats, weights
        from anyattn_cupy.launch import attend
        from anyattn_cupy.linear_launch import linear

        with current(call.q, cupy):
            refuse_described(call.operation, cupy)
            if call.operation == "linear":
                found = linear(call, cupy)
                return tuple(given_back(x, call.library) for x in found)
            if call.operation == "weights":
                return given_back(weights(call, cupy), call.library)
            if call.operation == "stats":
                return {name: given_back(x, call.library) for name, x in stats(call, cupy).items()}
            out, lse = attend(call, cupy)
            return given_back(out, call.library), given_back(lse, call.library)


def _floats(call: Any) -> list[Any]:
    """The arrays of a call that may hold floats."""
    linear = call.operation == "linear"
    beside = (call.decay, call.beta, call.state, call.normalizer) if linear else call.others
    return [x for x in (call.q, call.k, call.v, *beside) if x is not None]


backend = CupyBackend()
