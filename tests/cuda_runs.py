"""Calls through the front door and the launch code of the `cupy` backend, on the PTX interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_standin import Standin

from anyattn.backend import Backend
from anyattn.describe import Options, describe
from anyattn_cupy import (
    CupyBackend,
    devices,
    filling,
    inspect_launch,
    launch,
    linear_launch,
    listing,
    schedules,
)

__all__ = ["Interpreted", "described", "placed_arrays"]


def placed_arrays(standin: Standin, dtype: str, q_len: int, k_len: int, dim: int) -> list[Any]:
    """q, k and v of two heads on a device."""
    rng = np.random.default_rng(1)
    return [standin.asarray(rng.standard_normal((2, n, dim)).astype(dtype)) for n in (q_len, k_len, k_len)]


def described(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The description of a call with arrays of a device."""
    made = describe("attention", *(np.array(x) for x in (q, k, v)), Options(**options))
    for name, x in zip("qkv", (q, k, v), strict=True):
        object.__setattr__(made, name, x)
    return made


class Interpreted(CupyBackend):
    """The backend on arrays of NumPy, which it carries to a stand-in for a device and back.

    Attributes
    ----------
    standin : Standin
        Of the last call.
    """

    name = "interpreted"
    arrays = ("numpy.ndarray",)
    devices = ("cpu",)
    requires = ()

    def __init__(self, capability: int = 80, **options: Any):
        self.capability = capability
        self.options = options

    # Each call has a device of its own.
    prepare = Backend.prepare

    def make(self, capability: int, **options: Any) -> Standin:
        """A device for one call."""
        return Standin(capability, **options)

    def unsupported(self, call: Any) -> tuple[str, ...]:
        return Backend.unsupported(self, call)

    def notes(self, call: Any) -> tuple[str, ...]:
        remarks = linear_launch.remarks if call.operation == "linear" else launch.remarks
        return remarks(call, self.make(self.capability, **self.options))

    def source(self, call: Any) -> str:
        return listing.source_of(call, self.make(self.capability, **self.options))

    def kernel_key(self, call: Any) -> Any:
        return listing.key_of(call, self.make(self.capability, **self.options))

    def run(self, call: Any) -> Any:
        # Each call has a device of its own; caches would keep the memory of all that there were.
        for forget in (
            filling.compiled.cache_clear,
            devices._describe.cache_clear,
            schedules._uploaded.clear,
        ):
            forget()
        if hasattr(self, "standin"):
            self.standin.close()
        self.standin = self.make(self.capability, **self.options)
        if call.operation == "weights":
            return np.array(inspect_launch.weights(call, self.standin))
        if call.operation == "stats":
            return {name: np.array(x) for name, x in inspect_launch.stats(call, self.standin).items()}
        if call.operation == "linear":
            found = linear_launch.linear(call, self.standin)
            return tuple(None if x is None else np.array(x) for x in found)
        out, lse = launch.attend(call, self.standin)
        return np.array(out), None if lse is None else np.array(lse)
