"""Global and shared memory of a launch, and who touched which bytes when.

Every access is checked: bounds, alignment, bytes that nobody has written, bytes that `cp.async` has still to
write, and races. Two accesses of which one writes race unless they are ordered: by one thread, by a barrier
of the block between them, or in one warp by a barrier of the warp. Nothing orders the blocks of a launch,
so what two blocks touch and one of them writes is a race always. Instructions of one warp are not taken to
be ordered, as threads of a warp run on their own since sm_70.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Arena", "Memory", "Order", "Shadow"]

NDArray = np.ndarray[Any, Any]

_SEVERAL = -2


class Arena:
    """Global memory that outlives a launch: allocations with guard bytes between them.

    Attributes
    ----------
    data : uint8 array
    known : bool array
        Bytes that somebody has written.
    """

    BASE = 0x7F0000000000
    _ALIGN = 256
    _UNIT = 16

    def __init__(self, size: int = 1 << 24):
        self.data = np.zeros(size, np.uint8)
        self.known = np.zeros(size, bool)
        self._owner = np.zeros(size // self._UNIT, np.int32)
        self._ends = [0]
        self._starts = [0]
        self.top = self._ALIGN

    def allocate(self, nbytes: int) -> int:
        """The offset of so many new bytes."""
        at = self.top
        self.top = at + -(-max(nbytes, 1) // self._ALIGN) * self._ALIGN + self._ALIGN
        if self.top > len(self.data):
            raise MemoryError(f"the arena of {len(self.data)} bytes is full")
        self._starts.append(at)
        self._ends.append(at + nbytes)
        self._owner[at // self._UNIT : -(-(at + nbytes) // self._UNIT)] = len(self._ends) - 1
        return at

    def free(self, at: int) -> None:
        """Give an allocation back: nothing may touch it from now on."""
        number = int(self._owner[at // self._UNIT])
        self.known[at : self._ends[number]] = False
        self._owner[at // self._UNIT : -(-self._ends[number] // self._UNIT)] = 0
        self._starts[number] = -1

    def allocations(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each allocation that was not given back."""
        found = zip(self._starts[1:], self._ends[1:], strict=True)
        return [(at, end - at) for at, end in found if at >= 0]

    def place(self, array: NDArray) -> int:
        """The address of a copy of an array, contiguous."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at = self.allocate(len(raw))
        self.data[at : at + len(raw)] = raw
        self.known[at : at + len(raw)] = True
        return self.BASE + at

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray:
        """An array as it lies in memory."""
        at, count = address - self.BASE, int(np.prod(shape))
        return self.data[at : at + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def outside(self, offsets: NDArray, nbytes: int) -> NDArray:
        """Which accesses are not within one allocation."""
        inside = (offsets >= 0) & (offsets + nbytes <= self.top)
        first = np.where(inside, offsets, 0)
        owner = self._owner[first // self._UNIT]
        ends = np.asarray(self._ends)[owner]
        return ~inside | (owner == 0) | (first + nbytes > ends)


class Order:
    """How many barriers each block and each warp has passed: what orders the accesses of threads."""

    def __init__(self, threads: int, block: int):
        self.block_of = np.arange(threads) // block
        self.warp_of = np.arange(threads) // 32
        self.block_epoch = np.ones(threads // block, np.int32)
        self.warp_epoch = np.ones(-(-threads // 32), np.int32)


class Shadow:
    """Who read and wrote each granule of a memory last; threads are numbered over all blocks."""

    def __init__(self, granules: int, order: Order):
        self.order = order
        # 0 is nobody: numbers of threads, warps and blocks are kept one higher.
        self._writer, self._write_epoch, self._write_turn = (np.zeros(granules, np.int32) for _ in range(3))
        self._atomic = np.zeros(granules, bool)
        self._reader, self._read_warp, self._read_block = (np.zeros(granules, np.int32) for _ in range(3))
        self._read_epoch, self._read_turn = (np.zeros(granules, np.int32) for _ in range(2))

    def read(self, at: NDArray, lanes: NDArray) -> NDArray:
        """Note a read of granules (n, g) by n threads; which of them race, (n, g)."""
        order = self.order
        block, warp = order.block_of[lanes][:, None], order.warp_of[lanes][:, None]
        epoch, turn = order.block_epoch[block], order.warp_epoch[warp]
        race = self._unordered_write(at, lanes[:, None], block, warp, epoch, turn)
        nobody = self._reader[at] == 0
        fresh = nobody | ((self._read_block[at] == block + 1) & (self._read_epoch[at] < epoch))
        # Readers of one warp before its barrier are ordered before whatever this read is ordered before.
        fresh |= (self._read_warp[at] == warp + 1) & (self._read_turn[at] < turn)
        for kept, mine in (
            (self._reader, lanes[:, None]),
            (self._read_warp, warp),
            (self._read_block, block),
        ):
            now = np.where(fresh | (kept[at] == mine + 1), mine + 1, _SEVERAL)
            kept[at] = now
            # Of lanes that read one granule in one instruction the last is kept: they are several.
            several = (kept[at] != mine + 1) | (now == _SEVERAL)
            kept[at[several]] = _SEVERAL
        self._read_epoch[at] = np.broadcast_to(epoch, at.shape)
        self._read_turn[at] = np.broadcast_to(turn, at.shape)
        return race

    def write(self, at: NDArray, lanes: NDArray, atomic: bool = False) -> NDArray:
        """Note a write, or an atomic operation; which granules race."""
        order = self.order
        mine = lanes[:, None]
        block, warp = order.block_of[lanes][:, None], order.warp_of[lanes][:, None]
        epoch, turn = order.block_epoch[block], order.warp_epoch[warp]
        race = self._unordered_write(at, mine, block, warp, epoch, turn)
        if atomic:
            race &= ~self._atomic[at]
        reader = self._reader[at]
        ordered = (self._read_block[at] == block + 1) & (
            (self._read_epoch[at] < epoch)
            | ((self._read_warp[at] == warp + 1) & (self._read_turn[at] < turn))
        )
        race |= (reader != 0) & (reader != mine + 1) & ~ordered
        self._writer[at] = np.broadcast_to(mine + 1, at.shape)
        if not atomic:
            race |= self._writer[at] != mine + 1
        self._write_epoch[at] = np.broadcast_to(epoch, at.shape)
        self._write_turn[at] = np.broadcast_to(turn, at.shape)
        self._atomic[at] = atomic
        return race

    def _unordered_write(
        self, at: NDArray, lane: NDArray, block: NDArray, warp: NDArray, epoch: NDArray, turn: NDArray
    ) -> NDArray:
        writer = self._writer[at]
        by = np.maximum(writer - 1, 0)
        ordered = (self.order.block_of[by] == block) & (
            (self._write_epoch[at] < epoch)
            | ((self.order.warp_of[by] == warp) & (self._write_turn[at] < turn))
        )
        return (writer != 0) & (by != lane) & ~ordered


class Memory:
    """One address space of a launch. Offsets are into `data`, after bounds were checked.

    Attributes
    ----------
    name : str
        For messages.
    granule : int
        Bytes that are followed as one: the narrowest access of the kernel.
    """

    def __init__(self, name: str, data: NDArray, known: NDArray, granule: int, order: Order):
        self.name = name
        self.data = data
        self.granule = granule
        self.known = known.reshape(-1, granule).all(axis=1)
        self.pending = np.zeros(len(self.known), bool)
        self.shadow = Shadow(len(self.known), order)
        self._views = {size: data.view(f"u{size}") for size in (1, 2, 4, 8)}

    def load(self, offsets: NDArray, size: int, lanes: NDArray, fail: Callable[[str, int], Any]) -> NDArray:
        """`size` bytes at each offset, uint8 (n, size); `fail` gets what is wrong, and for which of them."""
        at = self._granules(offsets, size)
        self._refuse(self.pending[at], "reads what cp.async has not been waited for", fail)
        self._refuse(~self.known[at], f"reads {self.name} memory that nobody has written", fail)
        self._refuse(self.shadow.read(at, lanes), f"races: reads {self.name} memory that is written", fail)
        return self._gather(offsets, size)

    def store(
        self, offsets: NDArray, values: NDArray, lanes: NDArray, fail: Callable[[str, int], Any]
    ) -> None:
        """Store uint8 (n, size) at each offset."""
        at = self._granules(offsets, values.shape[1])
        self._refuse(self.pending[at], "writes where cp.async has not been waited for", fail)
        self._refuse(self.shadow.write(at, lanes), f"races: writes {self.name} memory that is in use", fail)
        self.known[at] = True
        self._scatter(offsets, values)

    def claim(self, offsets: NDArray, size: int, lanes: NDArray, fail: Callable[[str, int], Any]) -> None:
        """Begin an asynchronous write: nobody may touch the bytes before it has arrived."""
        at = self._granules(offsets, size)
        self._refuse(self.pending[at], "copies to where cp.async has not been waited for", fail)
        self._refuse(
            self.shadow.write(at, lanes), f"races: copies to {self.name} memory that is in use", fail
        )
        self.pending[at] = True

    def arrive(self, offsets: NDArray, values: NDArray, lanes: NDArray) -> None:
        """End it: the bytes are there for the thread that waited, for others after a barrier."""
        at = self._granules(offsets, values.shape[1])
        self.pending[at] = False
        self.known[at] = True
        self.shadow.write(at, lanes)
        self._scatter(offsets, values)

    def atomic(self, offsets: NDArray, size: int, lanes: NDArray, fail: Callable[[str, int], Any]) -> None:
        """Note an atomic operation."""
        at = self._granules(offsets, size)
        self._refuse(self.pending[at], "changes what cp.async has not been waited for", fail)
        self._refuse(~self.known[at], f"changes {self.name} memory that nobody has written", fail)
        race = self.shadow.write(at, lanes, atomic=True)
        self._refuse(race, f"races: changes {self.name} memory that is in use otherwise", fail)

    def words(self, kind: Any) -> NDArray:
        """All of the memory as an array of a type."""
        return self.data.view(kind)

    def _granules(self, offsets: NDArray, size: int) -> NDArray:
        return offsets[:, None] // self.granule + np.arange(max(size // self.granule, 1))

    def _gather(self, offsets: NDArray, size: int) -> NDArray:
        unit = min(size, 8)
        found = self._views[unit][offsets[:, None] // unit + np.arange(size // unit)]
        return found.view(np.uint8).reshape(len(offsets), size)

    def _scatter(self, offsets: NDArray, values: NDArray) -> None:
        size = values.shape[1]
        unit = min(size, 8)
        at = offsets[:, None] // unit + np.arange(size // unit)
        self._views[unit][at] = np.ascontiguousarray(values).view(f"u{unit}")

    def _refuse(self, wrong: NDArray, what: str, fail: Callable[[str, int], Any]) -> None:
        if wrong.any():
            fail(what, int(np.argmax(wrong.any(axis=1))))
