"""CUDA C++ kernels through CuPy.

Dispatch imports this package to read the declaration below, so it imports neither CuPy nor NumPy: `launch`
does, at the first call. From there `variants` chooses a kernel and its tiles, `schedules` brings the schedule
to the device, `arguments` lays out what a kernel reads, and `source` joins the text that CuPy compiles from
the files in `kernels`.
"""

from __future__ import annotations

from typing import Any

from anyattn.backend import Backend
from anyattn.call import AttentionCall

__all__ = ["backend"]


class CupyBackend(Backend):
    """Declaration of the `cupy` backend."""

    name = "cupy"
    arrays = ("cupy.ndarray",)
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
            "grouped_heads",
            "return_lse",
            "strict_masking",
        }
    )
    requires = ("cupy",)
    extra = "cupy"

    def unsupported(self, call: AttentionCall) -> tuple[str, ...]:
        """Why this backend does not take the call."""
        from anyattn_cupy.devices import absent

        missing = absent()
        if missing is not None:
            return (missing,)
        reasons = super().unsupported(call)
        if not reasons:
            import cupy

            from anyattn_cupy.launch import refusal

            with call.q.device:
                found = refusal(call, cupy)
            reasons = () if found is None else (found,)
        return reasons

    def run(self, call: AttentionCall) -> Any:
        """Run a call on the device of its arrays, on the current stream."""
        import cupy

        from anyattn_cupy.launch import attend

        with call.q.device:
            return attend(call, cupy)


backend = CupyBackend()
