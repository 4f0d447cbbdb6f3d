"""Whether there is a CUDA device that CuPy can use, and what it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from anyattn_cupy.variants import Device

__all__ = ["absent", "current_device", "too_old"]

# Blocks of arguments lie in constant memory from 7.0 on alone (`__grid_constant__`).
_LEAST = 70


@lru_cache
def absent() -> str | None:
    """Why no CUDA device can be used, or None."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    # A driver that is missing, too old or broken is told by CuPy in exceptions of several kinds.
    except Exception as error:  # noqa: BLE001
        return f"no CUDA device: {type(error).__name__}: {error}"
    return None if count else "no CUDA device"


def too_old(cupy: Any, number: int) -> str | None:
    """Why a device cannot run the kernels, or None."""
    found = _describe(cupy, number).capability
    if found >= _LEAST:
        return None
    return f"wants compute capability {_LEAST / 10}, and device {number} has {found / 10}"


def current_device(cupy: Any) -> Device:
    """The device that CuPy runs kernels on now."""
    return _describe(cupy, cupy.cuda.Device().id)


@lru_cache
def _describe(cupy: Any, number: int) -> Device:
    device = cupy.cuda.Device(number)
    return Device(
        capability=int(device.compute_capability),
        shared_memory=device.attributes["MaxSharedMemoryPerBlockOptin"],
        multiprocessors=device.attributes["MultiProcessorCount"],
    )
