"""Walking over blocks of keys: a Python loop, or a real loop where the program is traced.

Unrolled under `jax.jit`, the blocks of 4096 keys take 1.0 to 1.8 GB and 4.8 s to compile; `lax.scan` takes 57
MB and 0.4 s, and is differentiable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.call import AttentionCall

if TYPE_CHECKING:
    from anyattn.linear.call import LinearCall

__all__ = ["BLOCK", "over_keys"]

# Keys a block: large enough for the products to run at speed, small enough for L * BLOCK scores to be little.
BLOCK = 256

Step = Callable[[Any, Any, int], tuple[Any, Array | None]]


def over_keys(
    call: AttentionCall | LinearCall,
    step: Step,
    carry: Any,
    start: int = 0,
    end: int | None = None,
    *,
    block: int | None = None,
    axis: int = -1,
) -> tuple[Any, Array | None]:
    """`step(carry, start, size) -> (carry, piece)` over keys [start, end), by default all, a block at a time.

    Pieces are joined along a negative `axis`; a block is BLOCK keys by default.
    """
    end = call.k_len if end is None else end
    block = BLOCK if block is None else block
    whole = (end - start) // block
    pieces = []
    if call.library == "jax" and whole > 1 and call.traced:
        carry, piece = _scan(call, step, carry, start, whole, block, axis)
        pieces.append(piece)
        start += whole * block
    # Without keys there is one empty block, so that results hang on q, k and v for automatic differentiation.
    for first in range(start, max(end, start + 1) if not pieces else end, block):
        carry, piece = step(carry, first, min(block, end - first))
        pieces.append(piece)
    found = [piece for piece in pieces if piece is not None]
    return carry, call.xp.concat(found, axis=axis) if found else None


def _scan(
    call: AttentionCall | LinearCall, step: Step, carry: Any, start: int, blocks: int, block: int, axis: int
) -> tuple[Any, Array | None]:
    starts = call.xp.arange(blocks, dtype=arrays.index_dtype(call.xp, None)) * block + start
    carry, pieces = sys.modules["jax"].lax.scan(lambda c, start: step(c, start, block), carry, starts)
    if pieces is None:
        return carry, None
    pieces = call.xp.moveaxis(pieces, 0, axis - 1)  # (blocks, ..., block, ...) -> (..., blocks, block, ...)
    before, after = pieces.shape[: axis - 1], pieces.shape[axis:][1:]
    return carry, call.xp.reshape(pieces, (*before, blocks * block, *after))
