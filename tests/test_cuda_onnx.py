"""ONNX's own cases through the launch code and kernels of `cupy`, on the PTX interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from docs_scripts import need_docs, script
from missing import missing

pytestmark = pytest.mark.usefixtures("nvrtc", "interpreted")


@pytest.mark.parametrize("part", range(6))
def test_shipped_cases(part):
    if find_spec("onnx") is None:
        missing("onnx, whose cases these are, is not installed")
    need_docs()
    shipped = script("onnx_cases")
    cases = [*shipped.cases().items(), *shipped.cases("LinearAttention").items()]
    assert len(cases) == 93 + 14
    wrong = {name: shipped.outcome(case, "interpreted", "numpy") for name, case in cases[part::6]}
    assert {name: what for name, what in wrong.items() if what} == {}
