"""Philox against the known answers that its authors publish with Random123 (kat_vectors)."""

from __future__ import annotations

import numpy as np
import pytest

from anyattn.philox import philox4x32, upper_bits, upper_bits_of_32

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


KNOWN = [
    ((0, 0), (0, 0, 0, 0), 0x6627E8D5),
    ((ONES, ONES), (ONES,) * 4, 0x408F276D),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "array_api_strict", "dask.array"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("key", "counter", "word"), KNOWN)
def test_the_words_of_every_library(key, counter, word, signed, library):
    """64 bits hold a word as it is or with its sign; the first word is that of the authors."""
    xp = pytest.importorskip(library)
    words = [n - (n >> 31 << 32) if signed else n for n in (*key, *counter)]
    if library == "jax":
        xp = xp.numpy
        if not signed:
            arrays = [xp.asarray([n], dtype=xp.uint32) for n in words]
            assert int(upper_bits_of_32(*arrays)[0]) == word >> 8
            return
        with pytest.importorskip("jax").enable_x64(True):
            assert int(upper_bits(*(xp.asarray([n]) for n in words))[0]) == word >> 8
        return
    assert int(upper_bits(*(xp.asarray([n]) for n in words))[0]) == word >> 8


def test_shapes_broadcast_as_the_words_of_philox4x32():
    b, row, j = (np.arange(n, dtype=np.int64) for n in (2, 5, 7))
    h = np.arange(3, dtype=np.int64)[:, None, None]
    found = upper_bits(np.int64(5), np.int64(9), b[:, None, None, None], h, row[:, None], j)
    wanted = philox4x32(9 << 32 | 5, (b[:, None, None, None], h, row[:, None], j))[0] >> 8
    assert np.array_equal(found, wanted)
    narrow = [np.asarray(x).astype(np.uint32) for x in (5, 9, b[:, None, None, None], h, row[:, None], j)]
    assert np.array_equal(upper_bits_of_32(*narrow), wanted)
