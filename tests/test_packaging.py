"""What the distribution says of itself is true: version, entry points, backends declared and not built."""

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
SHELLS = ["cupy"]


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


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_refuses_with_one_sentence(name: str) -> None:
    x = np.zeros((3, 4))
    with pytest.raises(UnsupportedCallError) as caught:
        aa.attention(x, x, x, backend=name)
    [reason] = caught.value.reasons[name]
    assert "not built yet" in reason or reason == f"unavailable: pip install 'anyattn[{name}]'"


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_declares_no_capability(name: str) -> None:
    [point] = distribution("anyattn").entry_points.select(group="anyattn.backends", name=name)
    assert point.load().capabilities == frozenset()
    assert len(point.load().unsupported(None)) == 1
