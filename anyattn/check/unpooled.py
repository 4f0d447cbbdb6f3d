"""A plugin of pytest that lets CuPy ask the device for the memory of each array, for compute-sanitizer."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["pytest_configure"]


def pytest_configure() -> None:
    """Leave CuPy's pool."""
    if find_spec("cupy") is not None:
        import cupy

        cupy.cuda.set_allocator(None)
