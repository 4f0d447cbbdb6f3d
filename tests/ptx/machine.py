"""A launch: all threads of all blocks as lanes of NumPy arrays, instruction by instruction.

Threads that stand at the lowest instruction go first, so that those which went apart meet again where the
text lets them. Where an instruction wants others (a shuffle, a barrier) threads wait until these come; if all
that is left waits, that is an error. Registers begin with bits that are no sensible number.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from ptx import arithmetic, together
from ptx.memory import Arena, Memory, Order
from ptx.parse import Address, Instruction, Kernel, Literal, Name, Negated, Operand, PtxError, Vector, width
from ptx.traffic import Traffic, sectors, wavefronts

__all__ = ["Machine", "launch"]

NDArray = np.ndarray[Any, Any]

# Where generic addresses of memories that are not global begin.
WINDOWS = {"shared": 0x7E0000000000, "local": 0x7D0000000000, "param": 0x7C0000000000}
_WINDOW = 0x10000000000
_UNSET = 0xDEADBEEFDEADBEEF
NUMPY = {
    "pred": np.bool_, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    **{f"{sign}{bits}": np.dtype(f"{kind}{bits // 8}").type
       for sign, kind in (("b", "u"), ("u", "u"), ("s", "i")) for bits in (8, 16, 32, 64)},
}  # fmt: skip


class Machine:
    """One launch of a kernel.

    Parameters
    ----------
    kernel : Kernel
    grid, block : tuple of up to three int
    arguments : sequence of bytes
        The bytes of each parameter.
    shared : int
        Bytes of dynamic shared memory.
    arena : Arena
        Global memory.
    count : bool
        Whether to count memory traffic and instructions, in `traffic` and `mix`.

    Attributes
    ----------
    traffic : dict
        (file:line, memory, load or store) -> `Traffic`.
    mix : Counter
        (operation, type) -> instructions of warps, branches left out; counted like traffic.
    steps : int
        Instructions that were run, each for all threads that stood there.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[bytes],
        shared: int,
        arena: Arena,
        count: bool = False,
    ):
        self.kernel = kernel
        self.threads = int(np.prod(block))
        self.blocks = int(np.prod(grid))
        self.size = self.threads * self.blocks
        if self.threads % 32:
            raise PtxError(f"{kernel.name}: a block of {self.threads} threads is no whole number of warps")
        if self.threads > kernel.most_threads:
            raise PtxError(
                f"{kernel.name}: {self.threads} threads, and it was compiled for {kernel.most_threads}"
            )
        self.order = Order(self.size, self.threads)
        self.lane = np.arange(self.size) % 32
        self.special = _special(grid, block, self.size)
        self._place_parameters(arguments)
        granules = _granules(kernel)
        self._place_variables(shared, granules["shared"])
        unit = granules["global"]
        self.arena = arena
        self.memory["global"] = Memory(
            "global", arena.data[: arena.top], arena.known[: arena.top], unit, self.order
        )
        self.registers = {name: self._register(kind) for name, kind in kernel.registers.items()}
        self.alive = np.ones(self.size, bool)
        self.copies = together.Copies(self.size)
        self.traffic: dict[tuple[str, str, str], Traffic] = defaultdict(Traffic)
        self.mix: Counter[tuple[str, str]] = Counter()
        self.counts = count
        self.steps = 0
        self._all = np.arange(self.size)

    def _register(self, kind: str) -> NDArray:
        if kind == "pred":
            return np.zeros(self.size, bool)
        bits = width(kind)
        return np.full(self.size, _UNSET & ((1 << bits) - 1), f"u{bits // 8}")

    def _place_parameters(self, arguments: Sequence[bytes]) -> None:
        wanted = self.kernel.parameters
        if len(arguments) != len(wanted):
            raise PtxError(f"{self.kernel.name}: {len(arguments)} arguments for {len(wanted)} parameters")
        last = wanted[-1] if wanted else None
        self.parameters = np.zeros(last.offset + last.size if last else 0, np.uint8)
        for given, parameter in zip(arguments, wanted, strict=True):
            if len(given) != parameter.size:
                raise PtxError(f"{parameter.name}: {len(given)} bytes for {parameter.size}")
            self.parameters[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(
                given, np.uint8
            )

    def _place_variables(self, dynamic: int, granule: int) -> None:
        self.symbols = {p.name: p.offset for p in self.kernel.parameters}
        room = {"shared": 0, "local": 0}
        # Dynamic shared memory lies behind the static.
        for one in sorted(self.kernel.variables, key=lambda v: v.size == 0):
            if one.space not in room:
                continue
            at = -(-room[one.space] // one.align) * one.align
            self.symbols[one.name] = at
            room[one.space] = at + (one.size or dynamic)
        self.room = {**room, "param": len(self.parameters)}
        # Bytes between the blocks keep whole granules and vectors apart.
        self.pitch = {space: -(-size // 64) * 64 + 64 for space, size in room.items()}
        self.memory: dict[str, Memory] = {}
        for space, number in (("shared", self.blocks), ("local", self.size)):
            nbytes = number * self.pitch[space] if room[space] else 0
            data, known = np.full(nbytes, 0xFF, np.uint8), np.zeros(nbytes, bool)
            self.memory[space] = Memory(space, data, known, granule if space == "shared" else 1, self.order)

    # ---- operands

    def read(self, operand: Operand, kind: str) -> NDArray:
        """The values of an operand for all threads, or one for all of them, as a type of PTX."""
        wanted = np.dtype(NUMPY[kind])
        if isinstance(operand, Negated):
            return ~self.registers[operand.name]
        if isinstance(operand, Literal):
            return _literal(operand.text, kind)
        if isinstance(operand, Vector):
            raise PtxError(f"{operand} where one value is wanted")
        assert isinstance(operand, Name)
        held = self.registers.get(operand.name)
        if held is None:
            held = self.special.get(operand.name)
        if held is None:
            if operand.name not in self.symbols:
                raise PtxError(f"{operand.name} is no register or variable")
            return np.asarray(self.symbols[operand.name]).astype(wanted)
        if "b" in (held.dtype.kind, wanted.kind):
            return held
        if held.dtype.itemsize == wanted.itemsize:
            return held.view(wanted)
        return held.astype(f"u{wanted.itemsize}").view(wanted)

    def write(self, operand: Operand, values: Any, mask: NDArray | None) -> None:
        """Set a register of the threads in `mask`; a wider register is filled by the sign or by zeros."""
        assert isinstance(operand, Name)
        if operand.name == "_":
            return
        held, values = self.registers[operand.name], np.asarray(values)
        if held.dtype != bool and values.dtype != held.dtype:
            if values.dtype.itemsize != held.dtype.itemsize:
                if values.dtype.kind not in "iu":
                    raise PtxError(f"{values.dtype} for a register of {held.dtype}")
                values = values.astype(f"{values.dtype.kind}{held.dtype.itemsize}")
            values = values.view(held.dtype)
        if mask is None:
            held[...] = values
        else:
            np.copyto(held, values, where=mask)

    def lanes(self, mask: NDArray | None) -> NDArray:
        """The numbers of the threads in a mask."""
        return self._all if mask is None else np.flatnonzero(mask)

    def of(self, values: NDArray, lanes: NDArray) -> NDArray:
        """The values of some threads."""
        return values[lanes] if values.ndim else np.broadcast_to(values, len(lanes))

    def fail(self, instruction: Instruction, lane: int, what: str) -> NoReturn:
        """Raise, saying which thread did what and where."""
        thread, block = lane % self.threads, lane // self.threads
        raise PtxError(f"{what}: thread {thread} of block {block}, {instruction.where}: {instruction.text}")

    # ---- addresses

    def places(
        self, instruction: Instruction, operand: Operand, space: str, size: int, lanes: NDArray
    ) -> list[tuple[str, NDArray, NDArray]]:
        """Where an access of `size` bytes goes: (space, lanes, offsets) for each space that it touches."""
        assert isinstance(operand, Address)
        name = operand.base.name if isinstance(operand.base, Name) else ""
        narrow = name in self.registers and self.registers[name].dtype.itemsize == 4
        base = self.read(operand.base, "u32" if narrow else "u64")
        found = self.of(np.asarray(base), lanes).astype(np.int64) + operand.offset
        if space:
            return [(space, lanes, self._offsets(instruction, space, found, size, lanes))]
        of = np.zeros(len(lanes), np.int64)
        for n, start in enumerate(WINDOWS.values(), 1):
            of[(found >= start) & (found < start + _WINDOW)] = n
        parts = []
        for n, place in enumerate(("global", *WINDOWS)):
            here = of == n
            if here.any():
                start = WINDOWS.get(place, 0)
                offsets = self._offsets(instruction, place, found[here] - start, size, lanes[here])
                parts.append((place, lanes[here], offsets))
        return parts

    def _offsets(
        self, instruction: Instruction, space: str, at: NDArray, size: int, lanes: NDArray
    ) -> NDArray:
        """Offsets into the memory of a space, after checks."""
        if space == "global":
            at = at - Arena.BASE
            beyond = self.arena.outside(at, size)
        else:
            beyond = (at < 0) | (at + size > self.room[space])
        if beyond.any():
            worst = int(np.argmax(beyond))
            room = "" if space == "global" else f" of {self.room[space]}"
            what = f"goes beyond {space} memory, {size} bytes at {at[worst]}{room}"
            self.fail(instruction, int(lanes[worst]), what)
        if (at % size).any():
            self.fail(
                instruction,
                int(lanes[np.argmax(at % size != 0)]),
                f"misaligned, {size} bytes in {space} memory",
            )
        if space == "shared":
            return at + self.order.block_of[lanes] * self.pitch["shared"]
        return at + lanes * self.pitch["local"] if space == "local" else at

    def counted(
        self, instruction: Instruction, what: str, space: str, offsets: NDArray, size: int, lanes: NDArray
    ) -> None:
        """Count the traffic of one instruction."""
        if not self.counts or space not in ("shared", "global"):
            return
        made = wavefronts if space == "shared" else sectors
        self.traffic[instruction.where, space, what] += made(
            offsets, size, self.order.warp_of[lanes], lanes % 32
        )

    # ---- running

    def run(self) -> Machine:
        """Run all threads to their ends."""
        with np.errstate(all="ignore"):
            self._run()
        self.copies.finish(self)
        memory = self.memory["global"]
        self.arena.known[: self.arena.top] |= np.repeat(memory.known, memory.granule)
        return self

    def _run(self) -> None:
        leaders = self.kernel.leaders()
        following = dict(pairwise(leaders))
        end = leaders[-1]
        at = np.zeros(self.size, np.int64)
        waiting = np.zeros(self.size, bool)
        # The instruction at which all threads stand, as long as they do.
        together_at: int | None = 0
        while self.alive.any():
            first = together_at if together_at is not None else self._next(at, waiting)
            if first >= end:
                break
            active = self.alive if together_at is not None else self.alive & (at == first)
            mask = None if active.all() else active.copy()
            if together_at is None:
                stuck = (waiting | ~self.alive).all()
                waiting[active] = not stuck and self._waits(first, mask)
                if waiting[active].any():
                    continue
            stop = following[first]
            taken, target = None, stop
            for n in range(first, stop):
                one = self.kernel.instructions[n]
                self.steps += 1
                if one.op in ("bra", "ret", "exit"):
                    taken = self._guarded(one, mask)
                    taken = np.ones(self.size, bool) if taken is None else taken
                    target = self.kernel.labels[_label(one)] if one.op == "bra" else end
                else:
                    self._step(one, mask)
            if taken is None or not taken.any():
                taken = None
            if together_at is not None and (taken is None or np.array_equal(taken, active)):
                together_at = stop if taken is None else target
                if together_at == end:
                    break
                continue
            if together_at is not None:
                at[:] = stop
                together_at = None
            at[active] = stop
            if taken is not None:
                at[taken] = target
            self.alive &= at < end
            here = at[self.alive]
            if len(here) and (here == here[0]).all():
                together_at = int(here[0])

    def _next(self, at: NDArray, waiting: NDArray) -> int:
        """The instruction that runs next: the lowest at which threads do not wait, or need not any more."""
        moving = self.alive & ~waiting
        if moving.any():
            return int(at[moving].min())
        places = np.unique(at[self.alive])
        free = (n for n in places if not self._waits(n, self.alive & (at == n)))
        return int(next(free, places[0]))

    def _waits(self, place: int, mask: NDArray | None) -> bool:
        """Whether the instruction wants threads that are elsewhere."""
        one = self.kernel.instructions[place]
        if one.op not in together.TOGETHER:
            return False
        mask = self._guarded(one, mask)
        return (mask is None or mask.any()) and bool((together.missing(self, one, mask) & self.alive).any())

    def _guarded(self, one: Instruction, mask: NDArray | None) -> NDArray | None:
        """Those of `mask` whose guard lets an instruction run."""
        if one.guard is None:
            return mask
        held = self.read(one.guard, "pred")
        allowed = held if mask is None else mask & held
        return None if allowed.all() else allowed

    def _step(self, one: Instruction, mask: NDArray | None) -> None:
        mask = self._guarded(one, mask)
        if mask is not None and not mask.any():
            return
        meaning = arithmetic.MEANING.get(one.op) or together.MEANING.get(one.op) or _MEMORY.get(one.op)
        if meaning is None:
            raise PtxError(f"no meaning is known of {one.text} ({one.where})")
        if self.counts:
            warps = self.size // 32 if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
            self.mix[one.op, one.type] += warps
        meaning(self, one, mask)


def launch(
    text: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: Sequence[bytes],
    arena: Arena,
    shared: int = 0,
    count: bool = False,
) -> Machine:
    """Run a kernel of a module of PTX; arguments as the bytes of each parameter."""
    return Machine(Kernel.parse(text, name), grid, block, arguments, shared, arena, count).run()


def _special(grid: tuple[int, ...], block: tuple[int, ...], size: int) -> dict[str, NDArray]:
    """The special registers."""
    threads = int(np.prod(block))
    thread, number = np.arange(size) % threads, np.arange(size) // threads
    found = {"%laneid": np.arange(size) % 32, "%warpid": thread // 32}
    for axis, letter in enumerate("xyz"):
        before = [int(np.prod(extent[:axis])) for extent in (block, grid)]
        extents = [extent[axis] if axis < len(extent) else 1 for extent in (block, grid)]
        found[f"%tid.{letter}"] = thread // before[0] % extents[0]
        found[f"%ctaid.{letter}"] = number // before[1] % extents[1]
        found[f"%ntid.{letter}"] = np.full(size, extents[0])
        found[f"%nctaid.{letter}"] = np.full(size, extents[1])
    return {name: values.astype(np.uint32) for name, values in found.items()}


def _granules(kernel: Kernel) -> dict[str, int]:
    """Bytes of the narrowest access to each memory."""
    found = {"shared": 4, "global": 4}
    for one in kernel.instructions:
        if one.op in ("ld", "st", "atom", "red"):
            size = min(width(one.type) // 8, 4)
            for space in found:
                if _space(one) in (space, ""):
                    found[space] = min(found[space], size)
    return found


def _space(one: Instruction) -> str:
    """The memory that an access names; none is a generic address."""
    named = [m for m in one.modifiers if re.match(r"(shared|global|local|param|const)", m)]
    return re.match(r"[a-z]+", named[0])[0] if named else ""


def _label(one: Instruction) -> str:
    target = one.operands[-1]
    assert isinstance(target, Name)
    return target.name


def _literal(text: str, kind: str) -> NDArray:
    if text[:2].lower() == "0f":
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if text[:2].lower() == "0d":
        return np.uint64(int(text[2:], 16)).view(np.float64)
    if kind == "pred":
        return np.bool_(int(text))
    wanted = np.dtype(NUMPY[kind])
    bits = int(text.rstrip("U"), 0) & ((1 << 8 * wanted.itemsize) - 1)
    return np.asarray(bits, f"u{wanted.itemsize}").view(wanted)[()]


def _registers(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _load(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    targets, kind = _registers(one.operands[0]), one.type
    each = width(kind) // 8
    size = each * len(targets)
    lanes = machine.lanes(mask)
    for space, some, offsets in machine.places(one, one.operands[1], _space(one), size, lanes):
        fail = partial(_failed, machine, one, some)
        if space == "param":
            found = machine.parameters[offsets[:, None] + np.arange(size)]
        else:
            found = machine.memory[space].load(offsets, size, some, fail)
        machine.counted(one, "load", space, offsets, size, some)
        values = np.ascontiguousarray(found).view(NUMPY[kind if kind[0] != "f" else f"b{8 * each}"])
        here = None if len(some) == machine.size else _mask(machine.size, some)
        for n, target in enumerate(targets):
            full = np.zeros(machine.size, values.dtype)
            full[some] = values[:, n]
            machine.write(target, full, here)


def _store(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    sources = _registers(one.operands[1])
    bits = width(one.type)
    lanes = machine.lanes(mask)
    values = [machine.of(machine.read(source, f"b{bits}"), lanes) for source in sources]
    raw = np.stack(values, axis=1).view(np.uint8)
    for space, some, offsets in machine.places(one, one.operands[0], _space(one), raw.shape[1], lanes):
        if space == "param":
            machine.fail(one, int(some[0]), "writes a parameter")
        chosen = raw if len(some) == len(lanes) else raw[np.searchsorted(lanes, some)]
        machine.memory[space].store(offsets, chosen, some, partial(_failed, machine, one, some))
        machine.counted(one, "store", space, offsets, raw.shape[1], some)


def _convert_address(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    space = _space(one)
    start = np.uint64(WINDOWS.get(space, 0))
    value = machine.read(one.operands[1], one.type).astype(np.uint64)
    value = value - start if "to" in one.modifiers else value + start
    machine.write(one.operands[0], value.astype(NUMPY[one.type]), mask)


def _failed(machine: Machine, one: Instruction, lanes: NDArray, what: str, which: int) -> NoReturn:
    machine.fail(one, int(lanes[which]), what)


def _mask(size: int, lanes: NDArray) -> NDArray:
    found = np.zeros(size, bool)
    found[lanes] = True
    return found


_MEMORY = {"ld": _load, "ldu": _load, "st": _store, "cvta": _convert_address}
