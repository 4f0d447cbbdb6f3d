"""What launch code uses of CuPy, without a device: arrays in an arena, kernels in the PTX interpreter.

Kernels are compiled by the real NVRTC. Limits of launches are checked as the driver does, and arguments have
the widths that CuPy gives them. An array that NumPy made elsewhere has no address on a device, and asking for
it is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_compile import compiled
from numpy.lib.array_utils import byte_bounds
from ptx import Arena, Kernel, Machine

__all__ = ["Launch", "Standin", "argument_bytes", "ndarray"]

# Bytes of shared memory that a block can ask for.
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class ndarray(np.ndarray):  # noqa: N801
    """An array of an arena."""

    arena: _Memory | None = None
    block: _Block | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.arena = getattr(obj, "arena", None)
        self.block = getattr(obj, "block", None)

    @property
    def data(self) -> Any:
        assert self.arena is not None
        at = self.__array_interface__["data"][0] - self.arena.data.ctypes.data
        if not 0 <= at <= len(self.arena.data):
            raise ValueError("an array that NumPy made has no address on the device")
        return SimpleNamespace(ptr=Arena.BASE + at)

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return placed(self.arena, np.asarray(self).astype(dtype)) if copy or self.dtype != dtype else self

    def copy(self) -> ndarray:
        assert self.arena is not None
        self.arena.check_order(self)
        return placed(self.arena, self)


class _Block:
    """Memory that is given back when no array is left of it, and its pool keeps it no more."""

    def __init__(self, arena: _Memory, offset: int):
        self.arena, self.offset = arena, offset

    def __del__(self) -> None:
        self.arena.free(self.offset)


class _Pool:
    """A pool of memory: one that a graph has for its own keeps all that it gave out."""

    def __init__(self) -> None:
        self.kept: list[_Block] = []

    def malloc(self, nbytes: int) -> None:
        raise NotImplementedError("the stand-in asks its current pool itself")


class _Memory(Arena):
    """An arena that knows which copies from the host a stream may read: its own, and what it waited for."""

    def __init__(self, size: int):
        super().__init__(size)
        self.where = [(0, 0)]
        self.copies: list[tuple[slice, set[tuple[int, int]]]] = []
        self.pools = [_Pool()]

    def block(self, offset: int) -> _Block:
        """What keeps an allocation."""
        made = _Block(self, offset)
        if len(self.pools) > 1:
            self.pools[-1].kept.append(made)
        return made

    def unordered(self) -> list[slice]:
        """Memory that the current stream may find as it was before a copy."""
        return [place for place, seen in self.copies if self.where[-1] not in seen]

    def check_order(self, x: ndarray) -> None:
        at = x.data.ptr - Arena.BASE
        if any(place.start <= at < place.stop for place in self.unordered()):
            raise ValueError("the current stream has not waited for a copy from the host that it reads")


def placed(arena: Arena, x: Any) -> ndarray:
    """A contiguous copy in the arena."""
    x = np.asarray(x)
    return _view(arena, arena.place(x), x.shape, x.dtype)


def _view(arena: Arena, address: int, shape: tuple[int, ...], dtype: Any) -> ndarray:
    found = arena.read(address, shape, dtype).view(ndarray)
    found.arena, found.block = arena, arena.block(address - Arena.BASE)
    return found


class Launch(SimpleNamespace):
    """A launch: `source`, `grid`, `block`, `shared_memory`, `where`, and the `machine` after it ran.

    `where` is the number of the device and the stream that were current.
    """


class Standin:
    """The names of the module `cupy` that launch code uses.

    Parameters
    ----------
    capability : int
        Compute capability of the device, 80 for 8.0.
    size : int
        Bytes of its memory.
    count : bool
        Whether machines count memory traffic.
    multiprocessors : int
    change : callable
        What becomes of a source before it is compiled.
    """

    __version__ = "14.2.0"
    ndarray = ndarray
    asnumpy = staticmethod(np.array)

    def __init__(
        self,
        capability: int = 80,
        size: int = 1 << 22,
        count: bool = False,
        multiprocessors: int = 1,
        change: Callable[[str], str] = lambda source: source,
    ):
        self.arena = _Memory(size)
        self.capability = capability
        self.multiprocessors = multiprocessors
        self.count = count
        self.launches: list[Launch] = []
        self.change = change
        self.where = self.arena.where
        self.events: list[SimpleNamespace] = []
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.cuda = SimpleNamespace(
            get_current_stream=lambda: _Current(self, *self.where[-1]),
            Device=self._device,
            Stream=_Streams(self),
            Event=self._event,
            MemoryPool=_Pool,
            get_allocator=lambda: self.arena.pools[-1].malloc,
            using_allocator=self._using,
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 5)),
            runtime=SimpleNamespace(getDeviceCount=lambda: 1),
        )
        self.get_default_memory_pool = lambda: self.arena.pools[0]
        self.RawModule = functools.partial(_Module, self)

    def close(self) -> None:
        """Give memory back: a device is part of a cycle, which Python may take long to find."""
        self.launches.clear()
        self.arena.data = self.arena.known = np.empty(0, np.uint8)

    def _device(self, number: int | None = None) -> Any:
        attributes = {
            "MaxSharedMemoryPerBlockOptin": SHARED_MEMORY.get(self.capability, 48 * 1024),
            "MultiProcessorCount": self.multiprocessors,
        }
        found = _Current(self, self.where[-1][0] if number is None else number, 0)
        found.compute_capability, found.attributes = str(self.capability), attributes
        return found

    @contextmanager
    def _using(self, allocator: Any) -> Iterator[None]:
        self.arena.pools.append(allocator.__self__)
        try:
            yield
        finally:
            self.arena.pools.pop()

    def _event(self, disable_timing: bool) -> Any:
        """An event that is never done by itself."""
        event = SimpleNamespace(done=False, timed=not disable_timing, before=[])

        def record(stream: Any) -> None:
            event.before = [seen for _, seen in self.arena.copies if (stream.id, stream.ptr) in seen]

        event.record = record
        self.events.append(event)
        return event

    def synchronize(self) -> None:
        """Wait for all streams."""
        self.arena.copies.clear()

    def from_dlpack(self, x: Any) -> ndarray:
        """What an array of another library hands over, ordered before the current stream."""
        # The protocol calls the default stream 1.
        found = x.__dlpack__(stream=self.where[-1][1] or 1)
        for place, seen in self.arena.copies:
            if place.start <= found.data.ptr - Arena.BASE < place.stop:
                seen.add(self.where[-1])
        return found

    def asarray(self, x: Any) -> ndarray:
        """An array of the host with its strides; nobody has written what lies between its entries."""
        if isinstance(x, ndarray):
            return x
        x = np.asarray(x)
        if not x.size:
            return placed(self.arena, x)
        arena, (first, end) = self.arena, byte_bounds(x)
        start = arena.allocate(end - first)
        arena.copies.append((slice(start, start + end - first), {self.where[-1]}))
        at = start + x.__array_interface__["data"][0] - first
        known = (*x.shape, x.itemsize), bool, arena.known, at, (*x.strides, 1)
        np.ndarray(*known)[...] = True
        found = np.ndarray(x.shape, x.dtype, arena.data, at, x.strides).view(ndarray)
        found.arena, found.block = arena, arena.block(start)
        found[...] = x
        return found

    def ascontiguousarray(self, x: ndarray) -> ndarray:
        return x if x.flags.c_contiguous else placed(self.arena, x)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> ndarray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return _view(self.arena, Arena.BASE + self.arena.allocate(nbytes), shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> ndarray:
        return placed(self.arena, np.zeros(shape, dtype))

    def moveaxis(self, x: ndarray, source: int, destination: int) -> ndarray:
        return np.moveaxis(x, source, destination)

    def broadcast_to(self, x: ndarray, shape: tuple[int, ...]) -> ndarray:
        return np.broadcast_to(x, shape, subok=True)

    def reshape(self, x: ndarray, shape: tuple[int, ...]) -> ndarray:
        found = np.reshape(x, shape)
        return found if np.shares_memory(found, x) else placed(self.arena, found)


class _Current(SimpleNamespace):
    """A device, or a stream of one, in whose context launches are made there."""

    def __init__(self, standin: Standin, number: int, stream: int):
        super().__init__(standin=standin, id=number, stream=stream, ptr=stream)

    def is_capturing(self) -> bool:
        return (self.id, self.ptr) in self.standin.graphs

    def synchronize(self) -> None:
        """The host waits, and so does all that is launched later, for copies that this stream made."""
        copies = self.standin.arena.copies
        copies[:] = [(place, seen) for place, seen in copies if (self.id, self.ptr) not in seen]

    def begin_capture(self) -> None:
        self.standin.graphs[self.id, self.ptr] = _Graph()

    def end_capture(self) -> _Graph:
        return self.standin.graphs.pop((self.id, self.ptr))

    def wait_event(self, event: Any) -> None:
        for seen in event.before:
            seen.add((self.id, self.ptr))

    def __enter__(self) -> None:
        self.standin.where.append((self.id, self.stream))

    def __exit__(self, *_: Any) -> None:
        self.standin.where.pop()


class _Streams:
    """Makes streams of the current device."""

    def __init__(self, standin: Standin):
        self.standin = standin
        self.count = 0

    def __call__(self, non_blocking: bool = False) -> _Current:
        self.count += 1
        return self.at(0x5000 + self.count)

    def at(self, address: int) -> _Current:
        return _Current(self.standin, self.standin.where[-1][0], address)

    def from_external(self, stream: Any) -> _Current:
        return self.at(stream.__cuda_stream__()[1])


class _Graph:
    """Launches that were captured and not made."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def launch(self) -> None:
        for one in self.launches:
            one()


class _Module:
    def __init__(self, standin: Standin, *, code: str, options: tuple[str, ...]):
        if not all(isinstance(option, str) for option in options):
            raise TypeError(f"options are {options}")
        self.standin = standin
        self.device = standin.where[-1][0]
        architecture = f"compute_{standin.capability}"
        self.source = standin.change(code)
        self.ptx = compiled(self.source, architecture, tuple(options)).ptx

    def get_function(self, name: str) -> _Function:
        return _Function(self, Kernel.parse(self.ptx, name))


class _Function:
    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, module: _Module, kernel: Kernel):
        self.standin = module.standin
        self.source = module.source
        self.device = module.device
        self.kernel = kernel

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        if self.device != self.standin.where[-1][0]:
            raise RuntimeError(f"CUDA_ERROR_INVALID_HANDLE: a module of device {self.device}")
        limits = SHARED_MEMORY[self.standin.capability]
        sizes = (*grid, 1, 1)[:3]
        if not all(1 <= n <= most for n, most in zip(sizes, (2**31 - 1, 65535, 65535), strict=True)):
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}")
        if not 1 <= np.prod(block) <= 1024:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: block {block}")
        if not shared_mem <= self.max_dynamic_shared_size_bytes <= limits:
            allowed = self.max_dynamic_shared_size_bytes
            raise RuntimeError(
                f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory, {allowed} of {limits}"
            )
        raw = [argument_bytes(x) for x in args]
        graph = self.standin.graphs.get(self.standin.where[-1])
        if graph is None:
            self._run(grid, block, raw, shared_mem)
        else:
            graph.launches.append(functools.partial(self._run, grid, block, raw, shared_mem))

    def _run(self, grid: tuple[int, ...], block: tuple[int, ...], raw: list[bytes], shared_mem: int) -> None:
        arena, count = self.standin.arena, self.standin.count
        hidden = [(place, arena.known[place].copy()) for place in arena.unordered()]
        for place, _ in hidden:
            arena.known[place] = False
        try:
            machine = Machine(self.kernel, grid, block, raw, shared_mem, arena, count).run()
        finally:
            for place, known in hidden:
                arena.known[place] = known
        made = Launch(
            source=self.source,
            grid=grid,
            block=block,
            shared_memory=shared_mem,
            machine=machine,
            where=self.standin.where[-1],
        )
        self.standin.launches.append(made)


def argument_bytes(x: Any) -> bytes:
    """An argument as CuPy passes it: Python's numbers in 64 bits, NumPy's arrays by value."""
    if isinstance(x, ndarray):
        return np.uint64(x.data.ptr).tobytes()
    if isinstance(x, np.ndarray):
        return x.tobytes()
    if isinstance(x, (bool, int, float)):
        return np.asarray(x).tobytes()
    if isinstance(x, (np.number, np.bool_)):
        return x.tobytes()
    raise TypeError(f"Unsupported type {type(x)}")
