"""Kernels by name and dtype, as addresses: compiled once a machine, kept in the user's cache folder."""

from __future__ import annotations

import threading
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

from anyattn.call import AttentionCall
from anyattn.expr.bounds import index_ranges
from anyattn.expr.program import Program, lower
from anyattn.forks import held_over_forks
from anyattn.kernels.cache import user_store
from anyattn.kernels.key import KernelKey, code_digest
from anyattn.kernels.numba_store import attach, numba_settings, numba_target, numba_versions
from anyattn.kernels.source import load_source
from anyattn_numba import threads
from anyattn_numba.jit import OPTIONS
from anyattn_numba.pairs import entries_kernel
from anyattn_numba.target import Shape, host, shape_of
from anyattn_numba.tiles import index_type, tile_source

__all__ = [
    "KERNELS",
    "call_key",
    "call_source",
    "entries_address",
    "kernel_address",
    "shape_for",
    "tile_address",
    "tile_key",
]

KERNELS = ("forward", "decode", "combine", "weights", "stats")
"""Names of the kernels of attention, its weights and statistics; "linear" is that of linear attention."""

_lock = held_over_forks(threading.Lock())
_tiles: dict[tuple[str, str, str], int] = {}


@lru_cache
def shape_for(accumulate: str) -> Shape:
    """The register tile of this process."""
    return shape_of(host(), accumulate)


@lru_cache
def kernel_address(kernel: str, dtype: str, stored_dtype: str | None = None) -> int:
    """The address of a task: one of `KERNELS`, or "linear".

    "forward" and "decode" have a variant for keys and values of `stored_dtype` "int8".
    """
    accumulate = "float64" if dtype == "float64" else "float32"
    of_rows = () if stored_dtype is None else (stored_dtype,)
    dispatcher = _factory(kernel)(shape_for(accumulate), dtype, *of_rows)
    with _lock:
        name = "_".join((kernel, *of_rows))
        attach(dispatcher, _key(name, "", dtype, accumulate, _OWN_CODE), user_store())
        return threads.address(dispatcher)


def _factory(kernel: str) -> Any:
    from anyattn_numba.decode import decode_kernel
    from anyattn_numba.forward import forward_kernel
    from anyattn_numba.inspect import stats_kernel, weights_kernel
    from anyattn_numba.linear_forward import linear_kernel
    from anyattn_numba.results import combine_kernel

    return {
        "forward": forward_kernel,
        "decode": decode_kernel,
        "combine": combine_kernel,
        "weights": weights_kernel,
        "stats": stats_kernel,
        "linear": linear_kernel,
    }[kernel]


@lru_cache
def entries_address(dtype: str, accumulate: str) -> int:
    """The address of the code that reads arrays of a dtype along pairs (`anyattn_numba.pairs`)."""
    dispatcher = entries_kernel(shape_for(accumulate), dtype)
    with _lock:
        attach(dispatcher, _key("entries", "", dtype, accumulate, _OWN_CODE), user_store())
        return threads.address(dispatcher)


def tile_key(program: Program, accumulate: str, source: str) -> KernelKey:
    """The key of the tile code of a program."""
    return _key("tile", program.text, accumulate, accumulate, code_digest(_OWN_CODE + source))


def tile_address(program: Program, accumulate: str, index: str) -> int:
    """The address of the tile code of a program."""
    known = (program.key, accumulate, index)
    found = _tiles.get(known)
    if found is None:
        with _lock:
            source = tile_source(program, accumulate, index)
            key = tile_key(program, accumulate, source)
            store = user_store()
            module = load_source(key, source, store)
            attach(module.tile, key, store)
            found = _tiles[known] = threads.address(module.tile)
    return found


def call_source(call: AttentionCall) -> str:
    """The code that is generated for a call, and what calls it."""
    program = lower(call.visible, call.score, call.keep)
    kernels = "forward.py (decode.py for few queries)" if call.operation == "attention" else "inspect.py"
    head = f"# {kernels} of anyattn_numba, for {call.dtype} with sums in {call.accumulate}, "
    if not program.functions:
        return f"{head}calls no generated code:\n# score unchanged, every key visible\n"
    source = tile_source(program, call.accumulate, index_type(program, index_ranges(call)))
    return f"{head}calls `tile` for each tile of scores.\n{source}"


def call_key(call: AttentionCall) -> KernelKey:
    """The key of all code that a call of this kind runs: kernels, which serve all sizes, and its own."""
    program = lower(call.visible, call.score, call.keep)
    code = code_digest(_OWN_CODE + call_source(call))
    name = f"{call.operation}_int8" if "int8" in call.features else call.operation
    return _key(name, program.text, call.dtype, call.accumulate, code)


def _key(kernel: str, structure: str, dtype: str, accumulate: str, code: str) -> KernelKey:
    shape = shape_for(accumulate)
    return KernelKey(
        backend="numba",
        kernel=kernel,
        structure=structure,
        dtype=dtype,
        accumulate=accumulate,
        head_dim=0,
        v_head_dim=0,
        target=numba_target(),
        tiles={"lanes": shape.lanes, "vectors": shape.vectors, "rows": shape.rows},
        settings=numba_settings(OPTIONS),
        versions=numba_versions(),
        code=code,
    )


def _own_modules() -> tuple[ModuleType, ...]:
    """The modules whose functions end up in machine code."""
    names = (
        "arguments",
        "atomics",
        "blocks",
        "captured",
        "decode",
        "forward",
        "inspect",
        "jit",
        "linear_arguments",
        "linear_decay",
        "linear_forward",
        "linear_loads",
        "linear_products",
        "memory",
        "microkernels",
        "narrow",
        "normalise",
        "pairs",
        "parts",
        "results",
        "rows",
        "target",
        "vector_math",
        "vectors",
    )
    return tuple(import_module(f"anyattn_numba.{name}") for name in names)


# Of the files as they are imported: one that changes later is not what this process compiles.
_OWN_CODE = code_digest("", _own_modules())
