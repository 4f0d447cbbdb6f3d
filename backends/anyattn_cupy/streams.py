"""Arrays that outlive a call, on the streams of later ones.

What is copied from the host is there when the stream that copies it comes to that, and CuPy's pool gives
memory back to the stream that it was made on, so each stream has copies of its own. No host waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident
from typing import Any

from anyattn.arrays import Array
from anyattn_cupy.exchange import keep_until_done

__all__ = ["Kept"]

# `cudaStreamPerThread`: another stream in each thread.
_PER_THREAD = 2


class Kept:
    """Arrays of CuPy that the current stream has just made, for it and for others of its device."""

    def __init__(self, arrays: Iterable[Array], cupy: Any):
        self._first = tuple(arrays)
        self._of: dict[tuple[int, int], tuple[Array, ...]] = {}
        if self._first:
            stream = cupy.cuda.get_current_stream()
            self._of[_stream(stream)] = self._first
            self._done = cupy.cuda.Event(disable_timing=True)
            self._done.record(stream)

    def here(self, cupy: Any) -> tuple[Array, ...]:
        """The arrays for the current stream, the same at each call.

        A stream that is captured into a graph, which can wait for nothing outside of it, gets the first ones.
        """
        if not self._first:
            return ()
        stream = cupy.cuda.get_current_stream()
        where = _stream(stream)
        if where not in self._of:
            if stream.is_capturing():
                return self._first
            stream.wait_event(self._done)
            self._of[where] = tuple(x.copy() for x in self._first)
            keep_until_done(list(self._first), cupy)
        return self._of[where]


def _stream(stream: Any) -> tuple[int, int]:
    number = int(stream.ptr)
    return number, get_ident() if number == _PER_THREAD else 0
