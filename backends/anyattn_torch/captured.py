"""Gradients of the score function: by the scores, and by the float arrays that it reads.

The rules are the compiler's (`anyattn.expr.derive`). What a rule gives where no gradient arrives, NaN or
infinite, enters no product.

An array read by index gets what arrives at each of its elements. It is summed first along the axes on which
the index does not depend. The rest is added one after the other: by `index_add_` on a CPU, and elsewhere by
`index_put_`, which CUDA sorts by element; so the same bits come every time on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from anyattn.expr.derive import gradient
from anyattn.expr.evaluate import Tile, evaluate_all, flat_index
from anyattn.expr.nodes import Aligned, Const, Expr, Load
from anyattn_torch.chunks import Chunk, Work
from anyattn_torch.tensors import score_arrays

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Captured"]


@dataclass(frozen=True)
class _Read:
    """A read of an array, the derivative by it, and the array's number."""

    node: Load | Aligned
    partial: Expr
    number: int


class Captured:
    """The sums of the gradients of a call's captured arrays, and how scores pass theirs on.

    `sums` has an entry for each of `score_arrays(call)`, None where it is not wanted: of arrays along the
    scores with joined batch axes, of others flat.
    """

    def __init__(self, work: Work, wanted: Sequence[bool]):
        self.work = work
        self.sums: list[Tensor | None] = []
        self.slope: Expr | None = None
        self.reads: list[_Read] = []
        if work.call.score is None:
            return
        rules = gradient(work.call.score)
        self.slope = None if _is_one(rules.score) else rules.score
        numbers = {}
        for part, yes in zip(score_arrays(work.call), wanted, strict=True):
            if yes:
                numbers[id(part)] = len(self.sums)
                x = work.join(part.value, 3) if isinstance(part, Aligned) else part.value.reshape(-1)
                self.sums.append(torch.zeros(x.shape, dtype=work.dtype, device=x.device))
            else:
                self.sums.append(None)
        for node, partial in rules.reads:
            number = numbers.get(id(node.table if isinstance(node, Load) else node))
            if number is not None:
                self.reads.append(_Read(node, partial, number))

    def through(self, chunk: Chunk, tile: Tile, ds: Tensor, score: Tensor) -> Tensor:
        """The gradient of the products, of that of the changed scores; captured arrays get theirs."""
        indices = [read.node.indices if isinstance(read.node, Load) else () for read in self.reads]
        roots = [read.partial for read in self.reads]
        slope, *values = evaluate_all(
            [
                _ONE if self.slope is None else self.slope,
                *roots,
                *(root for found in indices for root in found),
            ],
            tile,
            score,
        )
        partials, places = values[: len(roots)], values[len(roots) :]
        zero = ds == 0
        for read, partial, found in zip(self.reads, partials, indices, strict=True):
            own = [places.pop(0) for _ in found]
            g = ds if _is_one(read.partial) else (ds * partial).masked_fill_(zero, 0.0)
            total = self.sums[read.number]
            assert total is not None
            if isinstance(read.node, Load):
                _scatter(total, g, flat_index(read.node, own, tile))
            else:
                _add(chunk.part(total, heads=True), g, tile)
        return ds if self.slope is None else (ds * slope).masked_fill_(zero, 0.0)


_ONE = Const(1.0, "float")


def _is_one(root: Expr) -> bool:
    return isinstance(root, Const) and root.value == 1


def _add(total: Tensor, g: Tensor, tile: Tile) -> None:
    """Add a tile to the gradient of an array along the scores, (entries or 1, heads or 1, rows, keys)."""
    if total.shape[2] > 1:
        total = total[:, :, tile.first_row : tile.first_row + g.shape[2]]
    if total.shape[3] > 1:
        total = total[..., tile.start : tile.start + tile.size]
    total += g.sum_to_size(total.shape)


def _scatter(total: Tensor, g: Tensor, index: Tensor | None) -> None:
    """Add a tile to the elements at `index`."""
    if index is None:
        total += g.sum()
        return
    index = index.reshape((1,) * (g.ndim - index.ndim) + tuple(index.shape))
    g = g.sum_to_size(index.shape)
    if total.device.type == "cpu":
        total.index_add_(0, index.reshape(-1), g.reshape(-1))
    else:
        total.index_put_((index.reshape(-1),), g.reshape(-1), accumulate=True)
