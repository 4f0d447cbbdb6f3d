"""Instructions of several threads: shuffles, votes, barriers, matrices, asynchronous copies, atomics.

Where the ISA wants threads to run an instruction together, those named must be there: a thread that is
elsewhere, or a lane that is read and takes no part, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.arithmetic import bfloat_values
from ptx.fragments import LAYOUTS, Fragment, matrix_8x8
from ptx.parse import Instruction, Name, Operand, Pair, PtxError, Vector, width

if TYPE_CHECKING:
    from ptx.machine import Machine

NDArray = np.ndarray[Any, Any]
Meaning = Callable[["Machine", Instruction, NDArray | None], None]

__all__ = ["MEANING", "TOGETHER", "Copies", "missing"]

MEANING: dict[str, Meaning] = {}


def _means(*ops: str) -> Callable[[Meaning], Meaning]:
    def note(function: Meaning) -> Meaning:
        MEANING.update(dict.fromkeys(ops, function))
        return function

    return note


def _warps(values: NDArray, machine: Machine) -> NDArray:
    """Values by warp and lane."""
    return np.broadcast_to(values, machine.size).reshape(-1, 32)


# Where an instruction names the threads of a warp that run it together; None: it wants whole warps.
_MEMBERS = {"shfl": 4, "vote": 2, "redux": 2, "bar": 0, "ldmatrix": None, "mma": None}
TOGETHER = frozenset({*_MEMBERS, "barrier"})
"""Opcodes that threads run together."""


def missing(machine: Machine, one: Instruction, mask: NDArray | None) -> NDArray:
    """Threads that an instruction wants which those in `mask` run, and that are elsewhere or have ended."""
    if one.op in ("bar", "barrier") and one.modifiers[0] != "warp":
        here = np.ones(machine.size, bool) if mask is None else mask
        blocks = np.unique(machine.order.block_of[here])
        return ~here & np.isin(machine.order.block_of, blocks)
    here = _warps(np.True_ if mask is None else mask, machine)
    return (_wanted(machine, one, here) & ~here).reshape(-1)


def _wanted(machine: Machine, one: Instruction, here: NDArray) -> NDArray:
    """The threads that an instruction wants, bool (warps, 32)."""
    place = _MEMBERS[one.op]
    if place is None:
        return np.broadcast_to(here.any(axis=1)[:, None], here.shape)
    named = _warps(machine.read(one.operands[place], "u32"), machine)
    wanted = (named[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1) == 1
    every = np.where(here[:, :, None], wanted, True).all(axis=1)
    wanted = np.where(here[:, :, None], wanted, False).any(axis=1)
    unlike = here.any(axis=1) & (every != wanted).any(axis=1)
    if unlike.any():
        machine.fail(one, int(np.argmax(unlike)) * 32, "threads of one warp name different members")
    outside = here & ~wanted
    if outside.any():
        machine.fail(one, int(np.argmax(outside.reshape(-1))), "the thread is not among its members")
    return wanted


def _together(machine: Machine, one: Instruction, mask: NDArray | None) -> NDArray:
    """The threads that take part, bool (warps, 32), which must be all that are wanted.

    That threads which have ended are not waited for since sm_70 is nothing to rely on.
    """
    absent = missing(machine, one, mask)
    if absent.any():
        machine.fail(one, int(np.argmax(absent)), "is waited for and elsewhere")
    return _warps(np.True_ if mask is None else mask, machine)


@_means("shfl")
def _shuffle(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    target, source, by, clamp, _ = one.operands
    here = _together(machine, one, mask)
    values = _warps(machine.read(source, "b32"), machine)
    by, clamp = (_warps(machine.read(x, "u32"), machine).astype(np.int64) for x in (by, clamp))
    lane, by = np.arange(32)[None], by & 31
    # A warp is cut into segments by the upper bits of the clamp; its lower bits end a segment.
    segment = (clamp >> 8) & 31
    first, last = lane & segment, (lane & segment) | (clamp & 31 & ~segment)
    how = one.modifiers[1]
    if how == "idx":
        from_ = first | (by & ~segment)
    else:
        from_ = {"up": lane - by, "down": lane + by, "bfly": lane ^ by}[how]
    valid = from_ >= last if how == "up" else from_ <= last
    from_ = np.where(valid, from_, lane)
    unseen = here & ~np.take_along_axis(here, from_, axis=1)
    if unseen.any():
        machine.fail(one, int(np.argmax(unseen.reshape(-1))), "reads a lane that takes no part")
    if isinstance(target, Pair):
        machine.write(target.predicate, valid.reshape(-1), mask)
        target = target.value
    machine.write(target, np.take_along_axis(values, from_, axis=1).reshape(-1), mask)


@_means("vote")
def _vote(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    here = _together(machine, one, mask)
    said = _warps(machine.read(one.operands[1], "pred"), machine)
    how = one.modifiers[1]
    if how == "ballot":
        machine.write(one.operands[0], _ballot(said & here), mask)
        return
    some, every = (said & here).any(axis=1), (said | ~here).all(axis=1)
    found = {"any": some, "all": every, "uni": ~some | every}[how]
    machine.write(one.operands[0], np.repeat(found, 32), mask)


@_means("redux")
def _reduce(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    here = _together(machine, one, mask)
    values = _warps(machine.read(one.operands[1], one.type), machine)
    join = _JOIN[one.modifiers[1]]
    found = np.zeros(values.shape, values.dtype)
    for n in np.flatnonzero(here.any(axis=1)):
        found[n] = join.reduce(values[n][here[n]], dtype=values.dtype)
    machine.write(one.operands[0], found.reshape(-1), mask)


@_means("activemask")
def _active(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    here = _warps(np.True_ if mask is None else mask, machine)
    machine.write(one.operands[0], _ballot(here), mask)


def _ballot(said: NDArray) -> NDArray:
    """One bit for each lane of a warp that says so, for each thread."""
    bits = (said.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1)
    return np.repeat(bits.astype(np.uint32), 32)


@_means("bar", "barrier")
def _barrier(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    order = machine.order
    if one.modifiers[0] == "warp":
        here = _together(machine, one, mask)
        order.warp_epoch[here.any(axis=1)] += 1
        return
    names = [x for x in one.modifiers if x in ("sync", "red", "arrive")]
    if names not in (["sync"], ["red"]):
        raise PtxError(f"no meaning is known of {one.text} ({one.where})")
    absent = missing(machine, one, mask)
    if absent.any():
        machine.fail(one, int(np.argmax(absent)), "is elsewhere while its block waits at a barrier")
    here = np.ones(machine.size, bool) if mask is None else mask
    if names == ["red"]:
        _reduce_block(machine, one, here, mask)
    order.block_epoch[np.unique(order.block_of[here])] += 1


def _reduce_block(machine: Machine, one: Instruction, here: NDArray, mask: NDArray | None) -> None:
    said = np.broadcast_to(machine.read(one.operands[-1], "pred"), machine.size).reshape(-1, machine.threads)
    here = here.reshape(-1, machine.threads)
    how = next(m for m in one.modifiers if m in ("or", "and", "popc"))
    found = {
        "or": (said & here).any(axis=1),
        "and": (said | ~here).all(axis=1),
        "popc": (said & here).sum(axis=1).astype(np.uint32),
    }[how]
    machine.write(one.operands[0], np.repeat(found, machine.threads), mask)


@_means("ldmatrix")
def _load_matrices(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    here = _together(machine, one, mask)
    targets = one.operands[0].items if isinstance(one.operands[0], Vector) else (one.operands[0],)
    warps = np.flatnonzero(here.any(axis=1))
    count = len(targets)
    lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
    [(_, _, offsets)] = machine.places(one, one.operands[1], "shared", 16, lanes)

    def fail(what: str, which: int) -> None:
        machine.fail(one, int(lanes[which]), what)

    raw = machine.memory["shared"].load(offsets, 16, lanes, fail)
    # Eight addresses are one matrix: it is read in one wavefront where they lie in different banks.
    machine.counted(one, "load", "shared", offsets, 16, lanes)
    matrices = raw.view(np.uint16).reshape(len(warps), count, 8, 8)
    layout = matrix_8x8("trans" in one.modifiers)
    halves = np.ascontiguousarray(matrices[:, :, layout.row, layout.column]).view(np.uint32)[..., 0]
    for n, target in enumerate(targets):
        full = np.zeros((len(here), 32), np.uint32)
        full[warps] = halves[:, n]
        machine.write(target, full.reshape(-1), mask)


@_means("mma")
def _multiply_matrices(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    here = _together(machine, one, mask)
    *_, rows, columns, to, of_a, of_b, from_ = one.modifiers
    name = next(m for m in one.modifiers if m.startswith("m") and "n" in m)
    bits = width("b32" if of_a == "tf32" else of_a)
    if (rows, columns, to, from_, of_a) != ("row", "col", "f32", "f32", of_b) or (name, bits) not in LAYOUTS:
        raise PtxError(f"no meaning is known of {one.text} ({one.where})")
    shape = LAYOUTS[name, bits]
    warps = np.flatnonzero(here.any(axis=1))
    into, a, b, c = (x.items for x in one.operands)

    def matrix(items: tuple[Operand, ...], layout: Fragment, kind: str, size: tuple[int, int]) -> NDArray:
        words = np.stack([_warps(machine.read(x, "b32"), machine)[warps] for x in items], axis=-1)
        found = np.zeros((len(warps), *size), np.float32)
        found[:, layout.row, layout.column] = _elements(words, kind)
        return found

    product = matrix(a, shape.a, of_a, (shape.m, shape.k)) @ matrix(b, shape.b, of_b, (shape.k, shape.n))
    result = product + matrix(c, shape.c, "f32", (shape.m, shape.n))
    held = result[:, shape.c.row, shape.c.column]
    for n, target in enumerate(into):
        full = np.zeros((len(here), 32), np.float32)
        full[warps] = held[:, :, n]
        machine.write(target, full.reshape(-1), mask)


def _elements(words: NDArray, kind: str) -> NDArray:
    """float32 of the elements in registers (..., registers)."""
    words = np.ascontiguousarray(words)
    if kind == "f32":
        return words.view(np.float32)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    halves = words.view(np.uint16)
    return halves.view(np.float16).astype(np.float32) if kind == "f16" else bfloat_values(halves)


@dataclass
class _Copy:
    """One cp.async instruction: the threads of it that have not waited, where to, what, in which group."""

    lanes: NDArray
    offsets: NDArray
    values: NDArray
    group: NDArray


class Copies:
    """Asynchronous copies under way: bytes arrive when the thread that began them waits, not before."""

    def __init__(self, threads: int):
        self.under_way: list[_Copy] = []
        self.group = np.zeros(threads, np.int64)

    def wait(self, machine: Machine, here: NDArray, keep: int | None) -> None:
        """Let arrive what belongs to all but the newest `keep` groups of the threads `here`; None is all."""
        rest = []
        for one in self.under_way:
            done = here[one.lanes]
            if keep is not None:
                done = done & (one.group < self.group[one.lanes] - keep)
            if done.any():
                machine.memory["shared"].arrive(one.offsets[done], one.values[done], one.lanes[done])
            if not done.all():
                left = ~done
                rest.append(_Copy(one.lanes[left], one.offsets[left], one.values[left], one.group[left]))
        self.under_way = rest

    def finish(self, machine: Machine) -> None:
        """Fail if a thread ended without waiting for its copies."""
        if self.under_way:
            lane = int(self.under_way[0].lanes[0])
            thread, block = lane % machine.threads, lane // machine.threads
            raise PtxError(f"ends while cp.async is under way: thread {thread} of block {block}")


@_means("cp")
def _copy_async(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    what = one.modifiers[1:]
    lanes = machine.lanes(mask)
    copies = machine.copies
    here = np.ones(machine.size, bool) if mask is None else mask
    if what == ("commit_group",):
        copies.group[lanes] += 1
    elif what == ("wait_group",):
        copies.wait(machine, here, int(machine.read(one.operands[0], "u32")))
    elif what == ("wait_all",):
        copies.wait(machine, here, None)
    elif one.modifiers[0] == "async" and what[0] in ("ca", "cg") and "mbarrier" not in what:
        _begin_copy(machine, one, lanes)
    else:
        raise PtxError(f"no meaning is known of {one.text} ({one.where})")


def _begin_copy(machine: Machine, one: Instruction, lanes: NDArray) -> None:
    into, source, size, *read = one.operands
    nbytes = int(machine.read(size, "u32"))
    if nbytes not in (4, 8, 16) or ("cg" in one.modifiers and nbytes != 16):
        machine.fail(one, int(lanes[0]), f"copies {nbytes} bytes")
    wanted = (
        machine.of(np.asarray(machine.read(read[0], "u32")), lanes) if read else np.full(len(lanes), nbytes)
    )
    if (wanted > nbytes).any():
        machine.fail(
            one, int(lanes[np.argmax(wanted > nbytes)]), f"reads more than the {nbytes} bytes that it copies"
        )
    values = np.zeros((len(lanes), nbytes), np.uint8)
    some = wanted > 0
    if ((wanted != nbytes) & some).any():
        raise PtxError(f"copies of part of {nbytes} bytes are not known: {one.text} ({one.where})")
    fail = partial(_failed, machine, one)
    if some.any():
        from_ = lanes[some]
        [(_, _, offsets)] = machine.places(one, source, "global", nbytes, from_)
        values[some] = machine.memory["global"].load(offsets, nbytes, from_, partial(fail, from_))
        machine.counted(one, "load", "global", offsets, nbytes, from_)
    [(_, _, offsets)] = machine.places(one, into, "shared", nbytes, lanes)
    machine.memory["shared"].claim(offsets, nbytes, lanes, partial(fail, lanes))
    machine.counted(one, "store", "shared", offsets, nbytes, lanes)
    machine.copies.under_way.append(_Copy(lanes, offsets, values, machine.copies.group[lanes].copy()))


def _failed(machine: Machine, one: Instruction, lanes: NDArray, what: str, which: int) -> None:
    machine.fail(one, int(lanes[which]), what)


_JOIN: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@_means("atom", "red")
def _atomic(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    target = one.operands[0] if one.op == "atom" else Name("_")
    address, *given = one.operands[1:] if one.op == "atom" else one.operands
    kind, lanes = one.type, machine.lanes(mask)
    size = width(kind) // 8
    named = next((m for m in one.modifiers if m in ("shared", "global", "shared_cta")), "")
    values = [machine.of(np.asarray(machine.read(x, kind)), lanes) for x in given]
    how = next(m for m in one.modifiers if m in (*_JOIN, "exch", "cas", "inc", "dec"))
    old = np.zeros(machine.size, values[0].dtype)
    for space, some, offsets in machine.places(one, address, named.partition("_")[0], size, lanes):
        machine.memory[space].atomic(offsets, size, some, partial(_failed, machine, one, some))
        words = machine.memory[space].words(values[0].dtype)
        which = np.searchsorted(lanes, some)
        # One thread after the other, in the order of their numbers: the order is not defined.
        for lane, at, n in zip(some, offsets // size, which, strict=True):
            old[lane] = words[at]
            words[at] = _changed(how, words[at], [x[n] for x in values])
    machine.write(target, old, mask)


def _changed(how: str, held: Any, given: list[Any]) -> Any:
    if how == "exch":
        return given[0]
    if how == "cas":
        return given[1] if held == given[0] else held
    if how == "inc":
        return 0 if held >= given[0] else held + 1
    if how == "dec":
        return given[0] if held == 0 or held > given[0] else held - 1
    return _JOIN[how](held, given[0])
