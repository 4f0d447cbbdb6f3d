"""PyTorch's own attention (SDPA, FlexAttention) and tiles of torch calls, for torch tensors of any device.

Dispatch imports this package to read the declaration below, so it does not import torch. It has no kernels
yet: it declares what it will take and refuses every call.
"""

from __future__ import annotations

from typing import Any

from anyattn.backend import Backend

__all__ = ["backend"]


class TorchBackend(Backend):
    """Declaration of the `torch` backend."""

    name = "torch"
    arrays = ("torch.Tensor",)
    dtypes = frozenset({"float16", "bfloat16", "float32", "float64"})
    devices = ("*",)
    capabilities: frozenset[str] = frozenset()
    requires = ("torch",)
    extra = "torch"

    def unsupported(self, call: Any) -> tuple[str, ...]:
        """Return why this backend cannot run `call`."""
        return ("its translation to SDPA and FlexAttention is not built yet",)


backend = TorchBackend()
