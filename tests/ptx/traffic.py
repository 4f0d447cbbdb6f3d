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
    _, phase = np.unique(phase, return_inverse=True)
    pairs = np.unique(np.stack([np.repeat(phase, words), word.reshape(-1)]), axis=1)
    number = int(phase.max()) + 1
    used = np.zeros((number, 32), int)
    np.add.at(used, (pairs[0], pairs[1] % 32), 1)
    taken = int(used.max(axis=1).sum())
    different = np.bincount(pairs[0], minlength=number)
    return Traffic(len(np.unique(warps)), taken, int((-(-different // 32)).sum()))


def sectors(offsets: NDArray, size: int, warps: NDArray, lanes: NDArray) -> Traffic:
    """Sectors of global memory; `lanes` are not needed, as a warp's sectors are merged."""
    _, of = np.unique(warps, return_inverse=True)
    parts = np.arange(0, size, min(size, 32))
    touched = np.stack([np.repeat(of, len(parts)), ((offsets[:, None] + parts) // 32).reshape(-1)])
    taken = np.unique(touched, axis=1).shape[1]
    each = np.unique(np.stack([of, offsets]), axis=1)[0]
    least = int((-(-np.bincount(each) * size // 32)).sum())
    return Traffic(int(of.max()) + 1, taken, least)
