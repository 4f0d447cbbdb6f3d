"""Packed sequences through the launch code and kernels of `cupy`, on the PTX interpreter."""

from __future__ import annotations

import pytest

from anyattn.testing.cases import packed
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_values

pytestmark = pytest.mark.usefixtures("nvrtc", "interpreted")


@pytest.mark.parametrize("case", list(packed.cases()), ids=lambda case: case.name)
def test_each_sequence_computes_what_it_computes_alone(case):
    check_values(case, LIBRARIES["numpy"], "interpreted")
