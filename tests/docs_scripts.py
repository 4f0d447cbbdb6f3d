"""The scripts in `docs`, which is no package, as modules for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def need_docs(*, whole_module: bool = False) -> None:
    """Skip the test, or the module that is being imported, where the distribution has no documentation."""
    if not DOCS.exists():
        pytest.skip("needs the source tree, for docs/", allow_module_level=whole_module)


def script(name: str) -> Any:
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
