"""What the distribution says of itself is true: version, entry points, declarations of backends."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from importlib.resources import files

import numpy as np
import pytest

import anyattn as aa
from anyattn.errors import UnsupportedCallError

BACKENDS = ["numba", "cupy", "torch"]


def test_version() -> None:
    assert aa.__version__ == distribution("anyattn").version


def test_entry_points() -> None:
    points = distribution("anyattn").entry_points
    assert {p.name: p.value for p in points if p.group == "anyattn.backends"} == {
        name: f"anyattn_{name}:backend" for name in BACKENDS
    }
    assert [p.value for p in points if p.group == "console_scripts"] == ["anyattn.cli:main"]


def test_is_typed() -> None:
    assert files("anyattn").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_declaration_imports_no_library(name: str) -> None:
    code = f"import sys; from anyattn_{name} import backend; print(backend.name, *sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, *modules = answer.stdout.split()
    assert found == name
    assert not {"numpy", "numba", "cupy", "torch", "jax"} & set(modules)


def test_cupy_without_a_device_refuses_with_one_sentence() -> None:
    x = np.zeros((3, 4))
    with pytest.raises(UnsupportedCallError) as caught:
        aa.attention(x, x, x, backend="cupy")
    reasons = caught.value.reasons["cupy"]
    # With a device it refuses arrays of NumPy.
    known = ("unavailable: pip install 'anyattn[cupy]'", "no CUDA device", "takes arrays of cupy.ndarray")
    assert reasons[0].startswith(known)
