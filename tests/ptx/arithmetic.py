"""Instructions of one thread: arithmetic, comparisons, conversions, bits.

`MEANING` maps an opcode to a function of the machine, the instruction and the mask of threads. Values follow
the PTX ISA; the approximate functions (ex2, lg2, rcp, ...) are computed to the last bit instead, as the ISA
gives only bounds of their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.parse import Instruction, Name, PtxError, Vector, width

if TYPE_CHECKING:
    from ptx.machine import Machine

NDArray = np.ndarray[Any, Any]
Meaning = Callable[["Machine", Instruction, NDArray | None], None]

__all__ = ["MEANING", "bfloat_bits", "bfloat_values"]

MEANING: dict[str, Meaning] = {}
_INTEGER = "bus"
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def _means(*ops: str) -> Callable[[Meaning], Meaning]:
    def note(function: Meaning) -> Meaning:
        MEANING.update(dict.fromkeys(ops, function))
        return function

    return note


def bfloat_values(bits: NDArray) -> NDArray:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat_bits(values: NDArray) -> NDArray:
    """The bits of bfloat16 nearest to float32, ties to even; NaN is the one that hardware makes."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _flushed(one: Instruction, values: NDArray) -> NDArray:
    """With .ftz, subnormal float32 are 0 with their sign."""
    if "ftz" not in one.modifiers or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _inputs(machine: Machine, one: Instruction, kind: str) -> list[NDArray]:
    return [_flushed(one, np.asarray(machine.read(x, kind))) for x in one.operands[1:]]


def _give(machine: Machine, one: Instruction, values: Any, mask: NDArray | None) -> None:
    values = np.asarray(values)
    if "sat" in one.modifiers and values.dtype.kind == "f":
        values = np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)
    machine.write(one.operands[0], _flushed(one, values), mask)


@_means("mov")
def _mov(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    target, source = one.operands
    bits = width(one.type)
    if isinstance(target, Vector):
        each = bits // len(target.items)
        value = machine.read(source, f"b{bits}")
        for n, item in enumerate(target.items):
            if item != Name("_"):
                part = (value >> np.asarray(n * each, value.dtype)).astype(_UNSIGNED[each])
                machine.write(item, part, mask)
    elif isinstance(source, Vector):
        each = bits // len(source.items)
        whole = np.zeros((), _UNSIGNED[bits])
        for n, item in enumerate(source.items):
            part = machine.read(item, f"b{each}").astype(_UNSIGNED[bits])
            whole = whole | (part << np.asarray(n * each, whole.dtype))
        machine.write(target, whole, mask)
    else:
        machine.write(target, machine.read(source, one.type), mask)


@_means("add", "sub", "mul", "div", "rem", "min", "max", "mad", "fma")
def _binary(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    op, kind = one.op, one.type
    if kind[0] in _INTEGER and op in ("mul", "mad"):
        _multiply(machine, one, mask)
        return
    if kind.endswith("x2") or kind == "bf16":
        raise PtxError(f"no meaning is known of {one.text} ({one.where})")
    x, y, *rest = _inputs(machine, one, kind)
    if kind[0] in _INTEGER:
        values = _INTEGERS[op](x, y)
    elif op in ("mad", "fma"):
        # A product of two float32 is exact in float64; of two float64 nearly so in the 64 bits of x87.
        wide = np.longdouble if kind == "f64" else np.float64
        values = (x.astype(wide) * y + rest[0]).astype(x.dtype)
    else:
        values = _FLOATS[op](x, y)
        if op in ("min", "max") and "NaN" in one.modifiers:
            values = np.where(np.isnan(x) | np.isnan(y), np.nan, values).astype(x.dtype)
    _give(machine, one, values, mask)


def _quotient(x: NDArray, y: NDArray) -> NDArray:
    """Integers divided towards 0; by 0 it is not defined, and all ones here."""
    safe = np.where(y == 0, 1, y)
    whole = np.floor_divide(x, safe)
    towards = whole + ((whole < 0) & (whole * safe != x)).astype(whole.dtype)
    return np.where(y == 0, np.asarray(-1).astype(whole.dtype), towards).astype(whole.dtype)


def _remainder(x: NDArray, y: NDArray) -> NDArray:
    return np.where(y == 0, x, x - _quotient(x, y) * y).astype(np.result_type(x, y))


_INTEGERS = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": _quotient,
    "rem": _remainder,
}  # fmt: skip
_FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax,
}  # fmt: skip


def _multiply(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    kind, bits = one.type, width(one.type)
    x, y = (np.asarray(machine.read(v, kind)) for v in one.operands[1:3])
    if "wide" in one.modifiers:
        table = _SIGNED if kind[0] == "s" else _UNSIGNED
        product = x.astype(table[2 * bits]) * y.astype(table[2 * bits])
        kind = f"{kind[0]}{2 * bits}"
    elif "hi" in one.modifiers:
        product = _high(x, y, bits)
    else:
        product = x * y
    if one.op == "mad":
        product = product + machine.read(one.operands[3], kind)
    machine.write(one.operands[0], product, mask)


def _high(x: NDArray, y: NDArray, bits: int) -> NDArray:
    if bits < 64:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return ((x.astype(wide) * y.astype(wide)) >> wide(bits)).astype(x.dtype)
    return ((x.astype(object) * y.astype(object)) >> 64).astype(x.dtype)


def _unary(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    kind = "u32" if one.op == "brev" else one.type
    [x] = _inputs(machine, one, kind)
    _give(machine, one, _UNARY[one.op](x), mask)


def _leading_zeros(x: NDArray) -> NDArray:
    bits = 8 * x.dtype.itemsize
    found = np.zeros(x.shape, np.uint32)
    for n in range(bits):
        found += (x >> np.asarray(n, x.dtype)) == 0
    return found


def _reversed(x: NDArray) -> NDArray:
    found = np.zeros_like(x)
    for n in range(32):
        found |= ((x >> np.uint32(n)) & np.uint32(1)) << np.uint32(31 - n)
    return found


_UNARY: dict[str, Callable[[NDArray], NDArray]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "not": np.invert,
    "cnot": lambda x: (x == 0).astype(x.dtype), "clz": _leading_zeros, "brev": _reversed,
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
}  # fmt: skip
_means(*_UNARY)(_unary)


@_means("copysign")
def _copysign(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    sign, size = _inputs(machine, one, one.type)
    _give(machine, one, np.copysign(size, sign), mask)


@_means("and", "or", "xor")
def _logic(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    join = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[one.op]
    machine.write(one.operands[0], join(*_inputs(machine, one, one.type)), mask)


@_means("lop3")
def _logic3(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    a, b, c = (machine.read(x, "b32") for x in one.operands[1:4])
    table = int(machine.read(one.operands[4], "u32"))
    found = np.zeros((), np.uint32)
    for n in range(8):
        if table >> n & 1:
            found = found | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    machine.write(one.operands[0], found, mask)


@_means("shl", "shr")
def _shift(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    x, by = machine.read(one.operands[1], one.type), np.asarray(machine.read(one.operands[2], "u32"))
    bits = width(one.type)
    near = np.minimum(by, bits - 1).astype(x.dtype)
    found = x << near if one.op == "shl" else x >> near
    # Shifts are clamped: by the width or more nothing is left but the sign.
    rest = x >> np.asarray(bits - 1, x.dtype) if one.op == "shr" and one.type[0] == "s" else np.zeros_like(x)
    machine.write(one.operands[0], np.where(by >= bits, rest, found).astype(x.dtype), mask)


@_means("shf")
def _funnel(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    low, high, by = (machine.read(x, "u32").astype(np.uint64) for x in one.operands[1:])
    by = np.minimum(by, np.uint64(32)) if "clamp" in one.modifiers else by & np.uint64(31)
    both = high << np.uint64(32) | low
    found = (both << by) >> np.uint64(32) if "l" in one.modifiers else both >> by
    machine.write(one.operands[0], found.astype(np.uint32), mask)


@_means("bfi")
def _insert_bits(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    a, b = (machine.read(x, one.type).astype(np.uint64) for x in one.operands[1:3])
    at, length = (machine.read(x, "u32").astype(np.uint64) & np.uint64(0xFF) for x in one.operands[3:])
    bits = np.uint64(width(one.type))
    at, length = np.minimum(at, bits), np.minimum(length, bits)
    field = _ones(length) << np.minimum(at, np.uint64(63))
    field = np.where(at >= bits, np.uint64(0), field) & _ones(bits)
    machine.write(one.operands[0], ((b & ~field) | ((a << at) & field)).astype(_UNSIGNED[int(bits)]), mask)


def _ones(count: Any) -> NDArray:
    """So many low bits."""
    count = np.asarray(count, np.uint64)
    return np.where(
        count >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1)
    )


@_means("bfe")
def _extract_bits(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    bits = width(one.type)
    a = machine.read(one.operands[1], f"u{bits}").astype(np.uint64)
    at, length = (machine.read(x, "u32").astype(np.int64) & 0xFF for x in one.operands[2:])
    field = np.where(at >= bits, np.uint64(0), a >> np.minimum(at, 63).astype(np.uint64))
    # Of the field, what lies within the register: the rest is its sign too.
    held = _ones(np.clip(bits - at, 0, length))
    found = field & held
    if one.type[0] == "s":
        top = np.clip(at + length - 1, 0, bits - 1).astype(np.uint64)
        negative = (length > 0) & ((a >> top & np.uint64(1)) == 1)
        found = np.where(negative, found | ~held, found)
    machine.write(one.operands[0], found.astype(_UNSIGNED[bits]), mask)


@_means("prmt")
def _permute_bytes(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    if one.modifiers != ("b32",):
        raise PtxError(f"no meaning is known of {one.text} ({one.where})")
    a, b, select = (machine.read(x, "u32").astype(np.uint64) for x in one.operands[1:])
    both = b << np.uint64(32) | a
    found = np.zeros((), np.uint64)
    for n in range(4):
        chosen = select >> np.uint64(4 * n)
        byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7) == 1, np.uint64(0xFF), np.uint64(0))
        found = found | np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * n)
    machine.write(one.operands[0], found.astype(np.uint32), mask)


@_means("selp")
def _select(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    a, b, chosen = (
        machine.read(x, kind) for x, kind in zip(one.operands[1:], (one.type, one.type, "pred"), strict=True)
    )
    machine.write(one.operands[0], np.where(chosen, a, b), mask)


_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _compared(how: str, x: NDArray, y: NDArray) -> NDArray:
    odd = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros((), bool)
    if how in ("num", "nan"):
        return odd if how == "nan" else ~odd
    if x.dtype.kind == "f" and how[-1] == "u":
        return _ORDERED[how[:-1]](x, y) | odd
    return _ORDERED[how](x, y) & ~odd


@_means("setp")
def _set_predicate(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    x, y = (_flushed(one, np.asarray(machine.read(v, one.type))) for v in one.operands[1:3])
    found = _compared(one.modifiers[0], x, y)
    if len(one.operands) == 4:
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[one.modifiers[1]]
        found = join(found, machine.read(one.operands[3], "pred"))
    machine.write(one.operands[0], found, mask)


@_means("testp")
def _test(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    x = machine.read(one.operands[1], one.type)
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda v: ~np.isnan(v),
    }
    machine.write(one.operands[0], tests[one.modifiers[0]](x), mask)


_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@_means("cvt")
def _convert(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    to, of = one.modifiers[-2:]
    if to.endswith("x2"):
        high, low = (machine.read(x, "f32") for x in one.operands[1:])
        high, low = (_narrowed(x, to[:-2]).astype(np.uint32) for x in (high, low))
        machine.write(one.operands[0], high << np.uint32(16) | low, mask)
        return
    value = np.asarray(machine.read(one.operands[1], of))
    if of == "bf16":
        value = bfloat_values(value)
    elif value.dtype.kind == "f":
        value = _flushed(one, value)
    rounding = next((m for m in one.modifiers if m in _WHOLE), None)
    if rounding is not None and value.dtype.kind == "f":
        value = _WHOLE[rounding](value)
    if to in ("bf16", "f16"):
        found = _narrowed(value, to)
    elif to[0] == "f":
        found = _rounded(value, to, one)
    elif value.dtype.kind == "f":
        found = _to_integer(value, to)
    else:
        found = value.astype(_numpy_integer(to))
    _give(machine, one, found, mask)


def _narrowed(value: NDArray, to: str) -> NDArray:
    """The bits of float16 or bfloat16."""
    return bfloat_bits(value) if to == "bf16" else np.asarray(value.astype(np.float16)).view(np.uint16)


def _rounded(value: NDArray, to: str, one: Instruction) -> NDArray:
    kind = {"f32": np.float32, "f64": np.float64}[to]
    found = value.astype(kind)
    if value.dtype == np.float64 and kind is np.float32 and {"rz", "rm", "rp"} & set(one.modifiers):
        raise PtxError(f"no meaning is known of {one.text} ({one.where})")
    return found


def _to_integer(value: NDArray, to: str) -> NDArray:
    """NaN gives 0, and what is too large the nearest integer of the type."""
    info = np.iinfo(_numpy_integer(to))
    top = np.nextafter(np.float64(2) ** (info.bits - (info.min < 0)), 0)
    wide = np.nan_to_num(value.astype(np.float64), nan=0.0)
    found = np.clip(wide, float(info.min), top).astype(info.dtype)
    return np.where(wide > top, info.dtype.type(info.max), found)


def _numpy_integer(kind: str) -> Any:
    return (_SIGNED if kind[0] == "s" else _UNSIGNED)[width(kind)]


@_means("membar", "fence", "pragma", "nanosleep", "prefetch", "griddepcontrol")
def _nothing(machine: Machine, one: Instruction, mask: NDArray | None) -> None:
    """Fences and hints change no value here: memory is seen at once."""
