"""Philox against the known answers that its authors publish with Random123 (kat_vectors)."""

from __future__ import annotations

import numpy as np
import pytest

from anyattn.philox import philox4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES << 32 | ONES, (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key, counter, words):
    assert tuple(int(w) for w in philox4x32(key, counter)) == words


def test_counters_broadcast():
    alone = philox4x32(7, (3, 5, 0, 0))
    grid = philox4x32(7, (np.arange(4)[:, None], np.arange(6), 0, 0))
    assert grid[0].shape == (4, 6)
    assert [int(w[3, 5]) for w in grid] == [int(w) for w in alone]


def test_negative_counters_wrap_to_32_bits():
    assert int(philox4x32(1, (-1, 0, 0, 0))[0]) == int(philox4x32(1, (ONES, 0, 0, 0))[0])
