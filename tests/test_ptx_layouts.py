"""The layouts of mma's fragments are those that CuTe publishes (CUTLASS, cute/atom/mma_traits_sm80.hpp).

CuTe gives the place of value V of thread T in a matrix that is stored column by column, as sums of digits of
T and V times strides: A is M x K, B is N x K, C is M x N.
"""

from __future__ import annotations

import numpy as np
import pytest
from ptx.fragments import LAYOUTS

# Strides of the digits of the thread, of base (4, 8), and of those of the value, of base 2: by shape, for A
# and B. C is that of all.
CUTE = {
    ("m16n8k16", 16): (((32, 1), (16, 8, 128)), ((16, 1), (8, 64))),
    ("m16n8k8", 16): (((32, 1), (16, 8)), ((16, 1), (8,))),
    ("m16n8k8", 32): (((16, 1), (8, 64)), ((8, 1), (32,))),
}
CUTE_C = ((32, 1), (16, 8))


def places(layout):
    """Where each value of each thread lies, (32, values)."""
    of_thread, of_value = layout
    thread, value = np.arange(32)[:, None], np.arange(2 ** len(of_value))
    at = thread % 4 * of_thread[0] + thread // 4 * of_thread[1]
    return at + sum((value >> n & 1) * stride for n, stride in enumerate(of_value))


@pytest.mark.parametrize("name", LAYOUTS, ids=str)
def test_fragments(name):
    shape, (a, b) = LAYOUTS[name], CUTE[name]
    assert (shape.a.row + 16 * shape.a.column).tolist() == places(a).tolist()
    assert (shape.b.column + 8 * shape.b.row).tolist() == places(b).tolist()
    assert (shape.c.row + 16 * shape.c.column).tolist() == places(CUTE_C).tolist()
