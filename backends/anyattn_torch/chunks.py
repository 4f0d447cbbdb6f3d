"""A call cut into chunks: some batch entries times some key/value heads, whose tiles are computed at once.

Batch axes along which all arrays broadcast alike are joined to one. Chunks go along the longest of those that
are left and, where the tiles of one entry fill a chunk, along the heads; Python walks over the rest. So a
chunk of any array is a view, stretched or not along one batch axis, and nothing that broadcasts is expanded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import torch

from anyattn.call import AttentionCall
from anyattn.expr.nodes import Aligned, depends_on, walk
from anyattn_torch import routes
from anyattn_torch.visits import Visits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chunk", "KeySum", "Keys", "Rows", "Work"]

# Scores of a tile, all heads of a chunk together: on a CPU two such blocks fit its second level cache;
# elsewhere, and where each tile is recorded, many heads at once cost least.
CPU_SCORES = 1 << 18
DEVICE_SCORES = 1 << 24
# Rows and keys of a tile.
CPU_TILE = (128, 512)
DEVICE_TILE = (512, 1024)


class Work:
    """The chunks of a call and what they have in common.

    Attributes
    ----------
    sizes : tuple of int
        The joined batch axes.
    dtype : torch.dtype
        The dtype in which tiles are computed.
    readable : bool
        Whether the host may look at values.
    drops_on_numba : bool
        Whether Numba tells which weights dropout keeps.
    """

    def __init__(self, call: AttentionCall):
        self.call = call
        self.readable = call.readable
        self.dtype: torch.dtype = getattr(torch, call.accumulate)
        self.aligned = _aligned(call)
        lead = {id(x): x.ndim - rest for x, rest in self._arrays()}
        shapes = [tuple(x.shape[: lead[id(x)]]) if lead[id(x)] > 0 else () for x, _ in self._arrays()]
        self.groups = _joined(call.batch_shape, shapes)
        self.sizes = tuple(math.prod(call.batch_shape[a] for a in axes) for axes in self.groups) or (1,)
        self.inner = max(range(len(self.sizes)), key=self.sizes.__getitem__)
        rows, keys = CPU_TILE if self.readable else DEVICE_TILE
        self.rows, self.keys = max(min(rows, call.q_len), 1), max(min(keys, call.k_len), 1)
        self.scores = CPU_SCORES if self.readable else DEVICE_SCORES
        self.visits = Visits(call, self.rows, self.keys)
        self.buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.masks: dict[tuple[int, int, int], Tensor] = {}
        self.drops_on_numba = routes.drops_on_numba(call)

    def _arrays(self) -> list[tuple[Tensor, int]]:
        """The arrays with batch axes, and how many axes stand behind these."""
        call = self.call
        found = [(call.q, 3), (call.k, 3), (call.v, 3), *((node.value, 3) for node in self.aligned)]
        return found if call.sinks is None else [*found, (call.sinks, 1)]

    def join(self, x: Tensor, rest: int) -> Tensor:
        """`x` with the joined batch axes before its last `rest` ones."""
        own = (1,) * (len(self.call.batch_shape) + rest - x.ndim) + tuple(x.shape)
        lead = own[: len(self.call.batch_shape)]
        sizes = [math.prod(lead[a] for a in axes) for axes in self.groups] or [1]
        return x.reshape(*sizes, *own[len(lead) :])

    @cached_property
    def one_mask(self) -> bool:
        """Whether all batch entries and heads have one mask."""
        call = self.call
        return (
            call.visible is not None
            and isinstance(call.offset, int)
            and not depends_on(call.visible, "b", "h")
            and all(node.kind != "bool" or math.prod(node.value.shape[:-2]) == 1 for node in self.aligned)
        )

    @cached_property
    def entries(self) -> Tensor:
        """The flat index of every batch entry."""
        count = torch.arange(math.prod(self.sizes), device=self.call.device)
        return count.reshape(self.sizes)

    def chunks(self) -> Iterator[Chunk]:
        """All chunks, in order."""
        call = self.call
        if 0 in (*self.sizes, call.num_heads, call.q_len):
            return
        items = max(self.scores // (call.group_size * self.rows * self.keys), 1)
        kv_heads = min(items, call.num_kv_heads)
        together = max(items // call.num_kv_heads, 1)
        outer = [range(n) if axis != self.inner else range(1) for axis, n in enumerate(self.sizes)]
        for place in product(*outer):
            for start in range(0, self.sizes[self.inner], together):
                end = min(start + together, self.sizes[self.inner])
                where = tuple(
                    (start, end) if axis == self.inner else (at, at + 1) for axis, at in enumerate(place)
                )
                for head in range(0, call.num_kv_heads, kv_heads):
                    yield Chunk(self, where, (head, min(head + kv_heads, call.num_kv_heads)))

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Room for a tile that is kept from tile to tile; None where operations are recorded."""
        if not self.readable:
            return None
        found = self.buffers.get((name, shape))
        if found is None:
            size = math.prod(shape)
            room = self.buffers.get((name, ()))
            if room is None or room.numel() < size:
                room = torch.empty(size, dtype=self.dtype, device=self.call.device)
                self.buffers = {key: x for key, x in self.buffers.items() if key[0] != name}
                self.buffers[name, ()] = room
            found = self.buffers[name, shape] = room[:size].view(shape)
        return found


@dataclass(frozen=True)
class Chunk:
    """Batch entries `where`, a range along each joined axis, and key/value heads."""

    work: Work
    where: tuple[tuple[int, int], ...]
    kv_heads: tuple[int, int]

    @cached_property
    def entries(self) -> int:
        start, end = self.where[self.work.inner]
        return end - start

    @cached_property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.work.call.group_size

    @cached_property
    def items(self) -> int:
        """Batch entries times key/value heads: products of matrices in a tile."""
        return self.entries * (self.kv_heads[1] - self.kv_heads[0])

    @property
    def flat(self) -> list[int]:
        """The flat indices of its batch entries."""
        found = [0]
        for size, (start, end) in zip(self.work.sizes, self.where, strict=True):
            found = [n * size + at for n in found for at in range(start, end)]
        return found

    @cached_property
    def heads(self) -> range:
        """Its query heads."""
        return range(self.kv_heads[0] * self.group, self.kv_heads[1] * self.group)

    def shape(self, rows: int, *last: int) -> tuple[int, ...]:
        """(entries, query heads, rows, *last)."""
        return (self.entries, len(self.heads), rows, *last)

    def packed(self, rows: int, *last: int) -> tuple[int, ...]:
        """(items, group * rows, *last): the rows that share keys, as one matrix."""
        return (self.items, self.group * rows, *last)

    def part(self, x: Tensor, heads: bool | None = None) -> Tensor:
        """The part of a joined array (..., heads, ...): (entries or 1, heads or 1, ...).

        `heads` says whether its heads are those of the queries; None leaves that axis out of it.
        """
        for axis, (start, end) in enumerate(self.where):
            if x.shape[axis] != 1:
                x = x.narrow(axis, start, end - start)
        lead = len(self.where)
        x = x.reshape(x.shape[self.work.inner], *x.shape[lead:])
        if heads is None or x.shape[1] == 1:
            return x
        first, end = (self.heads.start, self.heads.stop) if heads else self.kv_heads
        return x.narrow(1, first, end - first)


class Rows:
    """Rows of queries, of a part (entries or 1, query heads, Lq, n), in the dtype of the tiles."""

    def __init__(self, chunk: Chunk, x: Tensor, scale: float | None = None):
        self.chunk = chunk
        x = x.to(chunk.work.dtype)
        x = x if scale is None else x * scale
        self.shared = x.shape[0] != chunk.entries
        self.x = x if self.shared else x.reshape(chunk.items, chunk.group, *x.shape[2:])

    def block(self, first: int, last: int) -> Tensor:
        """(items, group * rows, n)."""
        x = self.x[:, :, first:last]
        if self.shared:
            x = x.expand(self.chunk.shape(last - first, x.shape[3]))
        elif self.chunk.group == 1:
            return x[:, 0]
        return x.reshape(self.chunk.packed(last - first, x.shape[3]))


class Keys:
    """Keys or values, of a part (entries or 1, key/value heads, Lk, n), in the dtype of the tiles.

    Of int8, with `scales` (entries or 1, key/value heads, Lk), only blocks are ever in that dtype.
    """

    def __init__(self, chunk: Chunk, x: Tensor, scales: Tensor | None = None):
        self.chunk = chunk
        x = x.to(chunk.work.dtype) if scales is None else x
        self.shared = x.shape[0] != chunk.entries
        self.x = x if self.shared else x.reshape(chunk.items, *x.shape[2:])
        self.scales = None
        if scales is not None:
            self.scales = scales[..., None] if self.shared else scales.reshape(chunk.items, -1, 1)

    def block(self, start: int, end: int) -> Tensor:
        """(items, keys, n)."""
        x = self.x[..., start:end, :]
        if self.scales is not None:
            x = x.to(self.chunk.work.dtype) * self.scales[..., start:end, :]
        if not self.shared:
            return x
        return x.expand(self.chunk.entries, *x.shape[1:]).reshape(self.chunk.items, *x.shape[2:])


class KeySum:
    """A sum over rows for each key: a part (entries or 1, key/value heads, Lk, n) of a gradient."""

    def __init__(self, chunk: Chunk, total: Tensor):
        self.chunk = chunk
        self.shared = total.shape[0] != chunk.entries
        self.total = total if self.shared else total.view(chunk.items, *total.shape[2:])

    def add(self, start: int, end: int, left: Tensor, right: Tensor) -> None:
        """Add left^T . right, of (items, rows, keys) and (items, rows, n)."""
        if not self.shared:
            self.total[:, start:end].baddbmm_(left.transpose(1, 2), right)
            return
        room = self.total[:, :, start:end]
        product = torch.bmm(left.transpose(1, 2), right)
        room += product.view(self.chunk.entries, *room.shape[1:]).sum(0, keepdim=True)


def _aligned(call: AttentionCall) -> list[Aligned]:
    """The arrays of the expressions of a call that lie along all axes of the scores."""
    found: dict[int, Aligned] = {}
    for root in (call.visible, call.score):
        if root is not None:
            found.update((id(node), node) for node in walk(root) if isinstance(node, Aligned))
    return list(found.values())


def _joined(batch: tuple[int, ...], shapes: list[tuple[int, ...]]) -> list[list[int]]:
    """Batch axes of more than one entry, neighbours in one group where all arrays broadcast alike."""
    groups: list[list[int]] = []
    before: tuple[bool, ...] | None = None
    for axis, n in enumerate(batch):
        if n == 1:
            continue
        back = len(batch) - axis
        pattern = tuple(len(own) >= back and own[-back] != 1 for own in shapes)
        if pattern == before:
            groups[-1].append(axis)
        else:
            groups.append([axis])
        before = pattern
    return groups
