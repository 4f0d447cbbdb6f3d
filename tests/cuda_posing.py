"""Arrays of the stand-in that pose as CuPy's, so that calls come by the front door.

Like CuPy's, they are computed with on the current device alone, and results lie there. What would make the
host wait for the device raises `HostWaitsError`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import cuda_standin
import numpy as np
from cuda_standin import Standin

from anyattn import arrays, plan
from anyattn_cupy import devices, filling, schedules

__all__ = ["HostWaitsError", "ndarray", "pose", "unpose"]


class HostWaitsError(AssertionError):
    """Something reads what a device computes."""


def _waits(*_: Any, **__: Any) -> Any:
    raise HostWaitsError("reads a value of a device")


class ndarray(cuda_standin.ndarray):  # noqa: N801
    """An array on a device, `number` of it."""

    standin: Any = None
    __bool__ = __int__ = __float__ = __index__ = __iter__ = item = tolist = _waits

    def __array_finalize__(self, obj: Any) -> None:
        super().__array_finalize__(obj)
        self.number = obj.number if isinstance(obj, ndarray) else self.standin.where[-1][0]

    @property
    def device(self) -> Any:
        return self.standin.cuda.Device(self.number)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(x, np.ndarray) and x.dtype.kind == "b" for x in keys):
            raise HostWaitsError("counts what a mask keeps")
        found = super().__getitem__(key)
        # CuPy has no scalars.
        return found if isinstance(found, ndarray) else super().__getitem__((*np.atleast_1d(key), ...))

    def astype(self, dtype: Any, **options: Any) -> Any:
        _plain(self)
        return super().astype(dtype, **options)

    def __array_ufunc__(self, ufunc: Any, method: str, *given: Any, **options: Any) -> Any:
        found = getattr(ufunc, method)(*map(_plain, given), **options)
        return cuda_standin.placed(self.standin.arena, found)


ndarray.__module__ = "cupy"


def _plain(x: Any) -> Any:
    """What NumPy computes with in place of an argument of a function of CuPy."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    if isinstance(x, ndarray):
        if x.number != x.standin.where[-1][0]:
            raise ValueError(f"an array of device {x.number}, and {x.standin.where[-1][0]} is current")
        return x.view(np.ndarray)
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return x


class _Namespace:
    """The array API of CuPy, by NumPy."""

    def __init__(self, standin: Standin):
        self.standin = standin

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found) or name in ("iinfo", "finfo"):
            return found

        def computed(*given: Any, device: Any = None, **options: Any) -> Any:
            with device or nullcontext():
                return cuda_standin.placed(self.standin.arena, found(*map(_plain, given), **options))

        return computed

    def __array_namespace_info__(self) -> Any:
        return SimpleNamespace(default_dtypes=lambda device: {"integral": np.dtype("int64")})

    # array-api-compat's (1.16) writes through a mask.
    clip = staticmethod(_waits)

    def asarray(self, x: Any, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Any:
        with device or nullcontext():
            return self.standin.asarray(np.asarray(x, dtype))

    def moveaxis(self, x: Any, source: int, destination: int) -> Any:
        return self.standin.moveaxis(x, source, destination)


def pose(monkeypatch: Any, standin: Standin) -> None:
    """Let arrays of a stand-in be CuPy's, and itself the module, until `unpose`."""
    namespace, of_others, place = _Namespace(standin), arrays.namespace, arrays.device
    monkeypatch.setattr(cuda_standin, "ndarray", ndarray)
    monkeypatch.setattr(ndarray, "standin", standin)
    monkeypatch.setattr(standin, "ndarray", ndarray, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", standin)
    monkeypatch.setattr(devices, "absent", lambda: None)
    monkeypatch.setattr(arrays, "namespace", lambda x: namespace if isinstance(x, ndarray) else of_others(x))
    monkeypatch.setattr(arrays, "device", lambda x: x.device if isinstance(x, ndarray) else place(x))


def unpose(standin: Standin) -> None:
    """Forget what would keep the memory of the device."""
    for forget in (
        filling.compiled.cache_clear,
        devices._describe.cache_clear,
        schedules._uploaded.clear,
        plan._plans.clear,
        plan._families.clear,
    ):
        forget()
    standin.close()
