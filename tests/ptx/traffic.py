"""What an access costs: wavefronts of shared memory, sectors of global memory.

Shared memory has 32 banks of 4 bytes. A warp's access of 4 bytes a thread or less is one wavefront if no two
threads want different words of one bank; of 8 and 16 bytes it is done by half and quarter warps. Global
memory moves in sectors of 32 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Traffic", "sectors", "wavefronts"]

NDArray = np.ndarray[Any, Any]


@dataclass
class Traffic:
    """Requests of warps, what they took (wavefronts or sectors), and the least that could serve them."""

    requests: int = 0
    taken: int = 0
    least: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.requests += other.requests
        self.taken += other.taken
        self.least += other.least
        return self


def wavefronts(offsets: NDArray, size: int, warps: NDArray, lanes: NDArray) -> Traffic:
    """Wavefronts of shared memory; offsets are in bytes, of threads given by warp and lane."""
    words = max(size // 4, 1)
    # Threads that are served together.
    phase = warps * words + lanes * words // 32
    word = offsets[:, None] // 4 + np.arange(words)
    phases, of = np.unique(phase, return_inverse=True)
    of, word = _different(np.repeat(of, words), word.reshape(-1))
    used = np.bincount(of * 32 + word % 32, minlength=32 * len(phases)).reshape(-1, 32)
    different = used.sum(axis=1)
    return Traffic(len(np.unique(warps)), int(used.max(axis=1).sum()), int((-(-different // 32)).sum()))


def _different(first: NDArray, second: NDArray) -> tuple[NDArray, NDArray]:
    """The different pairs of two columns of numbers that are not negative."""
    span = int(second.max()) + 1
    pairs = np.unique(first * span + second)
    return pairs // span, pairs % span


def sectors(offsets: NDArray, size: int, warps: NDArray, lanes: NDArray) -> Traffic:
    """Sectors of global memory; `lanes` are not needed, as a warp's sectors are merged."""
    _, of = np.unique(warps, return_inverse=True)
    parts = np.arange(0, size, min(size, 32))
    touched, _ = _different(np.repeat(of, len(parts)), ((offsets[:, None] + parts) // 32).reshape(-1))
    places, _ = _different(of, offsets)
    least = int((-(-np.bincount(places) * size // 32)).sum())
    return Traffic(int(of.max()) + 1, len(touched), least)
