"""What of a call a CUDA graph may capture: each of its runs reads and writes the same memory again.

A graph repeats copies from the host of what is no longer there. And memory that a call gives back to CuPy's
pool when it returns is that of other arrays by then, unless the caller's allocator keeps it for the graph.
"""

from __future__ import annotations

from typing import Any

from anyattn.arrays import is_array
from anyattn.errors import UnsupportedCallError

__all__ = ["capturing", "refuse_converted", "refuse_described"]


def capturing(cupy: Any) -> bool:
    """Whether what is launched on the current stream goes into a graph."""
    return bool(cupy.cuda.get_current_stream().is_capturing())


def refuse_described(operation: str, cupy: Any) -> None:
    """Raise where a graph is captured, before a call is described and not prepared."""
    if capturing(cupy):
        what = "the first call of a kind" if operation == "attention" else f"operation {operation!r}"
        raise _refusal(
            f"a CUDA graph captures no call that copies from the host, as {what} does: make a call of "
            "`attention` like it before; one through a PagedKVCache, or with integer arrays of the device in "
            "a mask, copies every time"
        )


def refuse_converted(name: str, value: Any, cupy: Any) -> None:
    """Raise where a graph is captured that would go on to read or write memory which is not kept for it."""
    if not capturing(cupy):
        return
    if not is_array(value):
        raise _refusal(
            f"{name}: a CUDA graph does not capture {value!r}, which the host copies; give an array"
        )
    if cupy.cuda.get_allocator() == cupy.get_default_memory_pool().malloc:
        raise _refusal(
            f"{name} is converted in every call, and a CUDA graph would write to the memory of that after it "
            "was given to others: capture within cupy.cuda.using_allocator(pool.malloc), and keep the "
            "cupy.cuda.MemoryPool as long as the graph"
        )


def _refusal(reason: str) -> UnsupportedCallError:
    return UnsupportedCallError(f"backend 'cupy': {reason}", {"cupy": (reason,)})
