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
from anyattn_torch import joined
from anyattn_torch.chunks import Chunk
from anyattn_torch.visits import Span, Visit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hidden", "Scores", "all_finite", "cleaned", "hide"]

# Words of Philox at once for each thread of a CPU: some 70 operations on each, whose results stay in its
# second level cache.
DRAWN_TOGETHER = 1 << 15
# Keys of a tile, counted from its first, and which of them are hidden from its rows.
Hidden = list[tuple[slice, "Tensor"]]


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

    def hidden(self, visit: Visit, span: Span) -> Hidden:
        """Where in the span which keys are hidden from the rows, broadcasting to that part of the tile."""
        return [
            (slice(start - span.start, end - span.start), self._hidden(visit, start, end))
            for start, end in span.masked
        ]

    def _hidden(self, visit: Visit, start: int, end: int) -> Tensor:
        assert self.call.visible is not None
        known = self.work.masks.get((visit.first, start, end))
        if known is not None:
            return known
        found = ~evaluate(self.call.visible, self.tile(visit, start, end))
        # Chunks share a mask while it is no larger than a few tiles: all of it may be quadratic.
        if self.work.one_mask and found.numel() * (len(self.work.masks) + 1) <= 4 * self.work.scores:
            self.work.masks[visit.first, start, end] = found
        return found

    def changed(self, s: Tensor, hidden: Hidden, visit: Visit, span: Span) -> Tensor:
        """Softcap, score function and bias of the products `s`, anything where hidden.

        `s` is overwritten. The result may be an array of the caller's, and is not to be written to, where the
        call has a score expression.
        """
        if self.call.score is None:
            return s
        # A hidden NaN must not index a table, and derivatives there must be finite.
        hide(s, hidden, 0.0)
        return evaluate(self.call.score, self.tile(visit, span.start, span.end), s).expand(s.shape)

    def masked(self, s: Tensor, hidden: Hidden) -> Tensor:
        """What `changed` gave with -inf where hidden."""
        if hidden and self.call.score is not None:
            room = self.work.buffer("weights", tuple(s.shape))
            s = s.clone() if room is None else room.copy_(s)
        hide(s, hidden, -torch.inf)
        return s

    def kept(self, visit: Visit, span: Span) -> Tensor | None:
        """What dropout multiplies the weights of a tile by, broadcasting to it; None without dropout."""
        if self.call.keep is None:
            return None
        rows, keys = visit.last - visit.first, span.end - span.start
        kept = self.work.buffer("kept", self.chunk.shape(rows, keys))
        if kept is None:
            return evaluate(self.call.keep, self.tile(visit, span.start, span.end))
        if self.work.drops_on_numba:
            joined.fill_kept(kept, self.call.keep, self.tile(visit, span.start, span.end))
            return kept
        step = max(DRAWN_TOGETHER * torch.get_num_threads() * rows // kept.numel(), 1)
        for first in range(visit.first, visit.last, step):
            part = Visit(first, min(first + step, visit.last), ())
            here = slice(first - visit.first, part.last - visit.first)
            kept[:, :, here] = evaluate(self.call.keep, self.tile(part, span.start, span.end))
        return kept

    def tile(self, visit: Visit, start: int, end: int) -> Tile:
        """The place of the rows of a visit and a range of keys, for the evaluation of expressions."""
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
                "j": torch.arange(start, end, dtype=index, device=device),
            },
            start=start,
            size=end - start,
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


def hide(x: Tensor, hidden: Hidden, value: float) -> None:
    """Write a value where keys are hidden."""
    for keys, where in hidden:
        x[..., keys].masked_fill_(where, value)


def all_finite(*arrays_: Tensor) -> bool:
    """Whether readable arrays have no NaN and no infinity; False also where a sum overflows."""
    return all(bool(torch.isfinite(x.sum())) for x in arrays_)


def cleaned(x: Tensor) -> Tensor:
    """`x` with 0 in the place of what is not finite."""
    return torch.where(torch.isfinite(x), x, 0.0)
