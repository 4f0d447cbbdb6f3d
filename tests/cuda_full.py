"""A plugin of pytest that offers the `cupy` backend on the PTX interpreter to the conformance kit.

`pytest -p cuda_full --pyargs anyattn.testing --anyattn-backend=interpreted` holds the launch code and the
kernels, as NVRTC compiles them, to every case that the backend declares.
"""

from __future__ import annotations

import pytest
from conftest import make_findable
from cuda_runs import Interpreted


def pytest_configure(config: pytest.Config) -> None:
    """Make the backend findable, with memory for the longest cases."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    make_findable(patch, Interpreted(size=1 << 27))
