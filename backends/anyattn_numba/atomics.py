"""Atomic memory and calls by address, for compiled functions that share work between threads.

Numba has neither. An address is an int64; a word is the int64 at an address that 8 divides. Everything here
is one machine instruction or a call, inlined where it is used.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "RAISED",
    "call_c0",
    "call_c1",
    "call_c2",
    "compare_exchange",
    "exchange",
    "fetch_add",
    "invoke",
    "load",
    "pause",
    "store",
]

RAISED = -(2**63)
"""Status of a task that raised instead of returning one."""

_WORD = ir.IntType(64)
_C_INT = ir.IntType(32)
# Tells the processor that a loop waits: it saves power and does not mispredict the loop's end.
_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "amd64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),  # yield
    "arm64": ("llvm.aarch64.hint", (1,)),
}


def _intrinsic(function: Callable[..., Any]) -> Any:
    # Numba's is typed as what it decorates, which takes one argument more than callers give.
    return intrinsic(function)


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@_intrinsic
def load(typing: Any, address: Any) -> Any:
    """The word at an address; what its writer wrote before it is seen (sequentially consistent)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@_intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Set the word at an address; who loads it sees what was written before it (release)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _word(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_intrinsic
def exchange(typing: Any, address: Any, value: Any) -> Any:
    """Set the word at an address and return the one that was there (sequentially consistent)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@_intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the word at an address and return the one that was there (sequentially consistent)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@_intrinsic
def compare_exchange(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Set the word at an address if it is the expected one; whether it was (sequentially consistent)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, expected, value = arguments
        pair = builder.cmpxchg(_word(builder, address), expected, value, "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@_intrinsic
def pause(typing: Any) -> Any:
    """One turn of a loop that waits for a word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        hint = _PAUSE.get(platform.machine().lower())
        if hint is not None:
            name, values = hint
            kind = ir.FunctionType(ir.VoidType(), [_C_INT] * len(values))
            function = builder.module.declare_intrinsic(name, fnty=kind)
            builder.call(function, [_C_INT(value) for value in values])
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def invoke(typing: Any, function: Any, arguments: Any, worker: Any) -> Any:
    """Call a compiled `int64(int64, int64)` whose address `threads.address` gave; RAISED if it raised."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = context.call_conv.get_function_type(types.int64, (types.int64, types.int64))
        # Numba's convention: a place for the result and one for the exception, then the arguments.
        with builder.goto_entry_block():  # not once more in each turn of a loop
            places = [builder.alloca(place.pointee) for place in kind.args[:2]]
        function = builder.inttoptr(values[0], kind.as_pointer())
        code = builder.call(function, [*places, *values[1:]])
        returned = builder.icmp_signed("==", code, code.type(0))
        return builder.select(returned, builder.load(places[0]), _WORD(RAISED))

    return types.int64(types.int64, types.int64, types.int64), generate


@_intrinsic
def call_c0(typing: Any, function: Any) -> Any:
    """Call a C function `int f(void)` by its address."""
    return types.int32(types.int64), _call_c


@_intrinsic
def call_c1(typing: Any, function: Any, first: Any) -> Any:
    """Call a C function `int f(void*)` by its address."""
    return types.int32(types.int64, types.int64), _call_c


@_intrinsic
def call_c2(typing: Any, function: Any, first: Any, second: Any) -> Any:
    """Call a C function `int f(void*, void*)` by its address."""
    return types.int32(types.int64, types.int64, types.int64), _call_c


def _call_c(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    function, *arguments = values
    kind = ir.FunctionType(_C_INT, [_WORD] * len(arguments))
    return builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)
