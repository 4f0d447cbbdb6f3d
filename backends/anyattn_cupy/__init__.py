"""CUDA C++ kernels through CuPy, for CuPy arrays and CUDA arrays of torch and JAX over DLPack.

Dispatch imports this package to read the declaration below, so it does not import CuPy. It has no kernels
yet: it declares what it will take and refuses every call.
"""

from __future__ import annotations

from typing import Any

from anyattn.backend import Backend

__all__ = ["backend"]


class CupyBackend(Backend):
    """Declaration of the `cupy` backend."""

    name = "cupy"
    arrays = ("cupy.ndarray", "torch.Tensor", "jax.Array")
    dtypes = frozenset({"float16", "bfloat16", "float32", "float64"})
    devices = ("cuda",)
    capabilities: frozenset[str] = frozenset()
    requires = ("cupy",)
    extra = "cupy"

    def unsupported(self, call: Any) -> tuple[str, ...]:
        """Return why this backend cannot run `call`."""
        return ("its CUDA kernels are not built yet",)


backend = CupyBackend()
