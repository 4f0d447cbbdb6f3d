"""CPU kernels compiled by Numba, for NumPy arrays and concrete CPU arrays of other libraries.

Dispatch imports this package to read the declaration below, so it imports neither Numba nor NumPy. It has no
kernels yet: it declares what it will take and refuses every call.
"""

from __future__ import annotations

from typing import Any

from anyattn.backend import Backend

__all__ = ["backend"]


class NumbaBackend(Backend):
    """Declaration of the `numba` backend."""

    name = "numba"
    arrays = ("numpy.ndarray", "torch.Tensor", "jax.Array")
    dtypes = frozenset({"float16", "bfloat16", "float32", "float64"})
    devices = ("cpu",)
    capabilities: frozenset[str] = frozenset()
    requires = ("numba",)
    extra = "numba"

    def unsupported(self, call: Any) -> tuple[str, ...]:
        """Return why this backend cannot run `call`."""
        return ("its CPU kernels are not built yet",)


backend = NumbaBackend()
