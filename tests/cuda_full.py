"""A plugin of pytest that offers the `cupy` backend on the PTX interpreter to the conformance kit.

`pytest -p cuda_full --pyargs anyattn.testing --anyattn-backend=interpreted` holds the launch code and the
kernels, as NVRTC compiles them, to every case that the backend declares.
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_findable
from cuda_runs import Interpreted

MULTIPROCESSORS = (1, 3, 108)


class Varied(Interpreted):
    """On devices with one multiprocessor, a few and many, by the sizes of a call."""

    def run(self, call: Any) -> Any:
        lengths = call.q.shape[-2] + call.k.shape[-2]
        self.options["multiprocessors"] = MULTIPROCESSORS[lengths % len(MULTIPROCESSORS)]
        return super().run(call)


def pytest_configure(config: pytest.Config) -> None:
    """Make the backend findable, with memory for the longest cases."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    make_findable(patch, Varied(size=1 << 27))
