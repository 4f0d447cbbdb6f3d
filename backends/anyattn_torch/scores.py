"""The scores of a tile, with everything that changes and hides them, and their derivatives.

Strict masking: a hidden (row, key) contributes nothing even where k, v or bias is NaN or infinite there. Its
weight is exactly 0, and what a 0 would multiply is looked at: where the host may read values, once a call;
elsewhere all of it is taken with care, in the tiles where something is hidden.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from anyattn import arrays
from anyattn.expr.evaluate import Tile, evaluate
from anyattn_torch.chunks import Chunk
from anyattn_torch.visits import Span, Visit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scores", "all_finite", "cleaned"]


class Scores:
    """The scores of a chunk."""

    def __init__(self, chunk: Chunk):
        self.chunk, self.work, self.call = chunk, chunk.work, chunk.work.call
        self.aligned = {
            id(node): chunk.part(self.work.join(node.value, 3), heads=True) for node in self.work.aligned
        }

    def products(self, q: Tensor, k: Tensor, rows: int) -> Tensor:
        """scale * (q . k), (entries, query heads, rows, keys); q is scaled."""
        shape = self.chunk.packed(rows, k.shape[1])
        s = torch.bmm(q, k.transpose(1, 2), out=self.work.buffer("scores", shape))
        return s.view(self.chunk.shape(rows, k.shape[1]))

    def seen(self, visit: Visit, span: Span) -> Tensor | None:
        """Which keys the rows see, broadcasting to the tile; None where they see all."""
        if span.full or self.call.visible is None:
            return None
        return evaluate(self.call.visible, self.tile(visit, span))

    def changed(self, s: Tensor, hidden: Tensor | None, visit: Visit, span: Span) -> Tensor:
        """Softcap, score function and bias of the products `s`, -inf where hidden. `s` is overwritten."""
        if self.call.score is not None:
            if hidden is not None:
                # A hidden NaN must not index a table, and derivatives there must be finite.
                s.masked_fill_(hidden, 0.0)
            changed = evaluate(self.call.score, self.tile(visit, span), s).expand(s.shape)
            return changed if hidden is None else changed.masked_fill(hidden, -torch.inf)
        return s if hidden is None else s.masked_fill_(hidden, -torch.inf)

    def tile(self, visit: Visit, span: Span) -> Tile:
        """The place of a tile, for the evaluation of expressions."""
        index = torch.int64
        device = self.call.device
        row = torch.arange(visit.first, visit.last, dtype=index, device=device)[:, None]
        return Tile(
            xp=self.call.xp,
            device=device,
            index=index,
            accumulate=self.work.dtype,
            symbols={
                "b": self.entries,
                "h": self.heads,
                "row": row,
                "i": row + self.offset,
                "j": torch.arange(span.start, span.end, dtype=index, device=device),
            },
            start=span.start,
            size=span.end - span.start,
            rows=None,
            first_row=visit.first,
            aligned=self.aligned,
        )

    @cached_property
    def entries(self) -> Tensor:
        """The flat indices of the batch entries, (entries, 1, 1, 1)."""
        return self.chunk.part(self.work.entries).reshape(-1, 1, 1, 1)

    @cached_property
    def heads(self) -> Tensor:
        """The query heads, (heads, 1, 1)."""
        heads = self.chunk.heads
        return torch.arange(heads.start, heads.stop, device=self.call.device).reshape(-1, 1, 1)

    @cached_property
    def offset(self) -> Any:
        """The position of row 0, an int or (entries, 1, 1, 1)."""
        offset = self.call.offset
        if not arrays.is_array(offset):
            return offset
        full = offset.expand(self.call.batch_shape).reshape(self.work.sizes)
        return self.chunk.part(full).reshape(-1, 1, 1, 1)


def all_finite(*arrays_: Tensor) -> bool:
    """Whether readable arrays have no NaN and no infinity; False also where a sum overflows."""
    return all(bool(torch.isfinite(x.sum())) for x in arrays_)


def cleaned(x: Tensor) -> Tensor:
    """`x` with 0 in the place of what is not finite."""
    return torch.where(torch.isfinite(x), x, 0.0)
