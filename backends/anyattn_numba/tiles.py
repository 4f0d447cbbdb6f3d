"""Code for scores and masks: one small compiled function a program, which kernels call for a tile of scores.

The kernels themselves are the same for all masks and compiled once; what a mask or score function adds is
compiled alone, in a fraction of the time. The loop over the queries of a key runs over contiguous memory and
becomes vectors. The function gets the address of a tile (`anyattn_numba.arguments`), as a task does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy

from anyattn.expr.print_numba import numba_arguments, numba_source
from anyattn.expr.program import Program
from anyattn.expr.statements import aligned_slots, body, table_slots
from anyattn_numba.hostarrays import as_numpy

__all__ = ["capture", "row_values", "tile_source"]

_TYPES = {"int": "int64", "bool": "boolean"}


def tile_source(program: Program, accumulate: str, title: str = "") -> str:
    """The module of a program with its function `tile`."""
    functions = numba_source(program, accumulate, split=True, title=title)
    return functions + _IMPORTS + "\n\n" + "\n".join(_tile(program, accumulate)) + "\n"


_IMPORTS = """

from numba import carray

from anyattn_numba import arguments as a
from anyattn_numba.captured import captured_array
from anyattn_numba.memory import pointer, read_index, read_real, read_word
"""


def _tile(program: Program, accumulate: str) -> list[str]:
    """The lines of `tile`."""
    roots = {"visible": program.visible, "score": program.score}
    given = {name: root for name, root in roots.items() if root is not None}
    row = {name: body(root).row for name, root in given.items()}
    slots = [*table_slots(program), *aligned_slots(program)]
    numbers = len(program.parameter_kinds)
    names = [f"p{n}" for n in range(numbers)] + [f"c{n}" for n in range(len(slots))]
    captured = "".join(f", {name}" for name in names)
    lines = [f"ARRAY{n} = CAPTURED[{numbers + n}]" for n in range(len(slots))]
    lines += ["", "", '@numba.njit(error_model="numpy", nogil=True)', "def tile(tile, worker):"]
    lines += [
        f"    real = types.{accumulate}",
        "    keys, width = read_word(tile + a.TILE_KEYS), read_word(tile + a.TILE_WIDTH)",
        "    b, action = read_word(tile + a.TILE_BATCH), read_word(tile + a.TILE_ACTION)",
        "    first, columns = read_word(tile + a.TILE_FIRST), read_word(tile + a.TILE_COLUMNS)",
        "    lanes, held = read_word(tile + a.TILE_LANES), read_word(tile + a.TILE_ROW_VALUES)",
        "    scores, seen = read_word(tile + a.TILE_SCORES), read_word(tile + a.TILE_SEEN)",
        "    heads = carray(pointer(lanes), width, types.int64)",
        "    rows = carray(pointer(lanes + 8 * width), width, types.int64)",
        "    positions = carray(pointer(lanes + 16 * width), width, types.int64)",
        "    captured = read_word(tile + a.TILE_CAPTURED)",
    ]
    at = 0
    for n, kind in enumerate(program.parameter_kinds):
        read = "read_real" if kind == "float" else "read_word"
        to = {"int": "{}", "bool": "{} != 0", "float": "real({})"}[kind]
        lines.append(f"    p{n} = " + to.format(f"{read}(captured + {at})"))
        at += 8
    for n, slot in enumerate(slots):
        ndim = getattr(slot, "ndim", 4)
        lines.append(f"    c{n} = captured_array(captured + {at}, ARRAY{n})")
        at += 8 * (1 + 2 * ndim)
    of_lane = "b, heads[lane], rows[lane], positions[lane]"
    place = 0
    for name, parts in row.items():
        for n, (_, node) in enumerate(parts):
            kind = _TYPES.get(node.kind, accumulate)
            lines.append(f"    {name}_{n} = carray(pointer(held + {place} * width), width, types.{kind})")
            place += 8
    for name, parts in row.items():
        if parts:
            together = ", ".join(f"{name}_{n}[lane]" for n in range(len(parts)))
            lines += [
                "    for lane in range(width):",
                f"        {together}{',' if len(parts) == 1 else ''} = {name}_row({of_lane}{captured})",
            ]
    where = of_lane + ", j" + captured

    def shared(name: str) -> str:
        values = [f"{name}_{n}[lane]" for n in range(len(row[name]))]
        return "(" + ", ".join(values) + ("," if len(values) == 1 else "") + ")"

    def loop(target: str, statements: list[str]) -> list[str]:
        return [
            "        for n in range(keys):",
            "            j = read_index(columns + 4 * n) if columns else first + n",
            f"            line = carray(pointer({target} + n * width * {_SIZE[accumulate]}), width, real)",
            "            for lane in range(width):",
            *("                " + s for s in statements),
        ]

    score = ["s = line[lane]"]
    if "score" in given:
        score.append(f"s = score(s, {shared('score')}, {where})")
    if "visible" in given:
        visible = f"visible({shared('visible')}, {where})"
        lines += ["    if action == a.SEEN:"]
        lines += loop("seen", [f"line[lane] = real(1) if {visible} else real(0)"])
        lines += ["    elif action == a.SCORE_AND_HIDE:"]
        lines += loop("scores", [*score, f"line[lane] = s if {visible} else real(-np.inf)"])
    if "score" in given:
        lines += [f"    {'elif' if 'visible' in given else 'if'} action == a.SCORE:"]
        lines += loop("scores", [*score, "line[lane] = s"])
    lines.append("    return 0")
    return lines


_SIZE = {"float32": 4, "float64": 8}


def row_values(program: Program) -> int:
    """How many values tile code keeps for each lane."""
    return sum(len(body(root).row) for root in (program.visible, program.score) if root is not None)


def capture(
    program: Program, accumulate: str, aligned: tuple[Any, ...], library: str
) -> tuple[Any, list[Any]]:
    """What tile code reads at TILE_CAPTURED, an int64 array, and the arrays that must outlive the call.

    Numbers by slot, then of each array its address, shape and strides.
    """
    words: list[int] = []
    kept = []
    program = replace(program, tables=tuple(as_numpy(x, library) for x in program.tables))
    for value in numba_arguments(program, accumulate, aligned):
        if isinstance(value, numpy.ndarray):
            kept.append(value)
            words += [value.__array_interface__["data"][0], *value.shape, *value.strides]
        elif isinstance(value, numpy.floating):
            words.append(int(numpy.float64(value).view(numpy.int64)))
        else:
            words.append(int(value))
    return numpy.array(words, numpy.int64), kept
