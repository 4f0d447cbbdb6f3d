"""Code for scores and masks: one small compiled function a program, which kernels call for a tile of scores.

The kernels themselves are the same for all masks and compiled once; what a mask or score function adds is
compiled alone, in a fraction of the time. The loop over the queries of a key runs over contiguous memory and
becomes vectors, of integers of 32 bits wherever these are proved to do. The function gets the address of a
tile (`anyattn_numba.arguments`), as a task does.
"""

from __future__ import annotations

from collections.abc import Mapping

from anyattn.expr.bounds import Range, fits
from anyattn.expr.print_numba import numba_source
from anyattn.expr.program import Program
from anyattn.expr.statements import aligned_slots, body, table_slots
from anyattn_numba.arguments import SOURCE_WORDS
from anyattn_numba.pairs import padded_keys
from anyattn_numba.target import host, shape_of

__all__ = ["index_type", "row_words", "tile_memory", "tile_source"]

_SIZE = {"float32": 4, "float64": 8}


def index_type(program: Program, ranges: Mapping[str, Range]) -> str:
    """The type in which integers are computed where indices have these ranges: int32 if none leaves it."""
    return "int32" if fits(program, ranges) else "int64"


def tile_source(program: Program, accumulate: str, index: str, title: str = "") -> str:
    """The module of a program with its function `tile`."""
    functions = numba_source(
        program, accumulate, index=index, split=True, entries=True, title=title, inline=_INLINE
    )
    return functions + _IMPORTS + "\n\n" + "\n".join(_Tile(program, accumulate, index).lines()) + "\n"


_INLINE = "from anyattn_numba.jit import inlined as inline"
_IMPORTS = """

from anyattn_numba import arguments as a
from anyattn_numba.atomics import invoke
from anyattn_numba.captured import array_of, captured_array
from anyattn_numba.jit import task
from anyattn_numba.memory import read_index, read_real, read_word
from anyattn_numba.pairs import entries_stride, over_pairs, whole_vectors
"""


class _Tile:
    """The lines of a program's loop over pairs and of `tile`, which gets everything ready for it."""

    def __init__(self, program: Program, accumulate: str, index: str):
        self.program = program
        self.accumulate = accumulate
        self.index = index
        self.shape = shape_of(host(), accumulate)
        self.row = {
            name: [node.kind for _, node in body(root).row] for name, root in program.functions.items()
        }
        self.numbers = [f"p{n}" for n in range(len(program.parameter_kinds))]
        self.tables = [f"t{n}" for n in range(len(table_slots(program)))]
        self.aligned = [f"a{n}" for n in range(len(aligned_slots(program)))]
        self.shared = [f"{name}_{n}" for name, kinds in self.row.items() for n in range(len(kinds))]
        # Arguments of the loop after the first two.
        self.passed = [
            *("keys", "width", "first", "columns", "b", "heads", "rows", "positions"),
            *(self.shared + self.numbers + self.tables + self.aligned),
        ]

    def lines(self) -> list[str]:
        return [*self.types(), "", "", *self.loop(), "", "", *self.tile()]

    def types(self) -> list[str]:
        """Types of arrays."""
        first = len(self.numbers)
        lines = [f"TABLE{n} = CAPTURED[{first + n}]" for n in range(len(self.tables))]
        lines += [
            "WORDS = types.Array(types.int64, 1, 'C')",
            f"INT = types.Array(types.{self.index}, 1, 'C')",
        ]
        lines += ["BOOL = types.Array(types.boolean, 1, 'C')"]
        lines += [f"FLOAT = types.Array(types.{self.accumulate}, 1, 'C')"]
        lines += [f"TILE = types.Array(types.{self.accumulate}, 2, 'C')"]
        return lines

    def query(self) -> str:
        """Arguments of the printed functions that tell the query."""
        return f"np.{self.index}(b), heads[lane], rows[lane], positions[lane]"

    def loop(self) -> list[str]:
        """The function `pairs`, which changes the scores of a tile."""
        captured = [*self.numbers, *self.tables, *(f"{name}[n, lane]" for name in self.aligned)]
        lanes, vectors = self.shape.lanes, self.shape.vectors

        def over(name: str, statement: str) -> list[str]:
            held = [f"{name}_{n}[lane]" for n in range(len(self.row[name]))]
            row = f"({', '.join(held)}{',' if len(held) == 1 else ''})"
            first = ["out[n, lane]"] if name == "score" else []
            call = f"{name}({', '.join([*first, row, self.query(), 'j', *captured])})"
            return [
                "        for n in range(keys):",
                f"            j = np.{self.index}(read_index(columns + 4 * n) if columns else first + n)",
                "            for lane in range(lanes):",
                f"                out[n, lane] = {statement.format(call)}",
            ]

        lines = ["@over_pairs", f"def pairs(out, action, {', '.join(self.passed)}):"]
        lines += ["    whole_vectors()"]
        # LLVM chooses vectors for a length that it knows a multiple and a bound of, and leaves no rest.
        lines += [f"    lanes = min(width // {lanes}, {vectors}) * {lanes}"]
        if "score" in self.row:
            lines += ["    if action < a.SEEN:", *over("score", "{}")]
        if "visible" in self.row:
            hidden = f"np.{self.accumulate}(0 if action == a.SEEN else -np.inf)"
            lines += ["    if action == a.SCORE_AND_HIDE or action == a.SEEN:", f"        hidden = {hidden}"]
            lines += over("visible", "out[n, lane] if {} else hidden")
        if "keep" in self.row:
            lines += ["    if action == a.KEEP:", *over("keep", "out[n, lane] * {}")]
        return lines

    def tile(self) -> list[str]:
        """The function `tile`."""
        real = f"np.{self.accumulate}"
        lines = [
            "@task",
            "def tile(tile, worker):",
            "    keys, width = read_word(tile + a.TILE_KEYS), read_word(tile + a.TILE_WIDTH)",
            "    b, action = read_word(tile + a.TILE_BATCH), read_word(tile + a.TILE_ACTION)",
            "    first, columns = read_word(tile + a.TILE_FIRST), read_word(tile + a.TILE_COLUMNS)",
            "    queries, room = read_word(tile + a.TILE_LANES), read_word(tile + a.TILE_ROW_VALUES)",
            "    captured = read_word(tile + a.TILE_CAPTURED)",
            "    target = read_word(tile + (a.TILE_SEEN if action == a.SEEN else a.TILE_SCORES))",
            "    out = array_of(target, keys, width, TILE)",
        ]
        if "visible" in self.row:
            lines += [
                "    if action == a.SEEN:",
                "        for n in range(keys):",
                "            for lane in range(width):",
                f"                out[n, lane] = {real}(1)",
            ]
        of_lane = ["heads", "rows", "positions"]
        wide = of_lane if self.index == "int64" else [f"wide_{name}" for name in of_lane]
        for n, name in enumerate(wide):
            lines.append(f"    {name} = array_of(queries + {8 * n} * width, 0, width, WORDS)")
        held = [] if self.index == "int64" else [(name, "int") for name in of_lane]
        held += [(f"{name}_{n}", kind) for name, kinds in self.row.items() for n, kind in enumerate(kinds)]
        for n, (name, kind) in enumerate(held):
            lines.append(f"    {name} = array_of(room + {8 * n} * width, 0, width, {kind.upper()})")
        at = 0
        for name, kind in zip(self.numbers, self.program.parameter_kinds, strict=True):
            read = f"{'read_real' if kind == 'float' else 'read_word'}(captured + {at})"
            value = {"int": f"np.{self.index}({read})", "bool": f"{read} != 0", "float": f"{real}({read})"}
            lines.append(f"    {name} = {value[kind]}")
            at += 8
        for n, slot in enumerate(table_slots(self.program)):
            lines.append(f"    t{n} = captured_array(captured + {at}, TABLE{n})")
            at += 8 * (1 + 2 * slot.ndim)
        given = ", ".join([self.query(), *self.numbers, *self.tables])
        body_ = [
            f"{name}[lane] = {name_}[lane]"
            for name, name_ in zip(of_lane, wide, strict=True)
            if name != name_
        ]
        for name, kinds in self.row.items():
            if kinds:
                together = ", ".join(f"{name}_{n}[lane]" for n in range(len(kinds)))
                body_.append(f"{together}{',' if len(kinds) == 1 else ''} = {name}_row({given})")
        if body_:
            lines += ["    for lane in range(width):", *("        " + line for line in body_)]
        for n, name in enumerate(self.aligned):
            source = f"captured + {at + n * 8 * SOURCE_WORDS}"
            if "keep" in self.row:  # which reads none of them
                lines.append("    if action != a.KEEP:")
            indent = "        " if "keep" in self.row else "    "
            lines.append(f"{indent}invoke(read_word({source}), tile, {source})")
            before = f"{8 * row_words(self.program)} + {(1 + n) * self.shape.itemsize} * entries_stride(keys)"
            lines.append(f"    {name} = array_of(room + ({before}) * width, keys, width, TILE)")
        lines += [f"    pairs(out, action, {', '.join(self.passed)})", "    return 0"]
        return lines


def row_words(program: Program) -> int:
    """How many words tile code keeps of each query: its indices narrowed, and what is the same in its row."""
    return 3 + sum(len(body(root).row) for root in program.functions.values())


def tile_memory(program: Program, accumulate: str, keys: int) -> int:
    """How many bytes of memory tile code wants for each query of a tile of up to so many keys."""
    arrays = len(program.aligned)
    entries = 1 + arrays if arrays else 0
    return 8 * row_words(program) + entries * padded_keys(keys) * _SIZE[accumulate]
