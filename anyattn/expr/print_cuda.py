"""CUDA C++ of a program: self-contained device functions that a kernel calls for an entry of its tile.

The text depends on the structure alone. Everything captured travels in one struct, `Captured`, that a kernel
takes by value, so its parameter list is the same for every mask. NVRTC has no INFINITY and no <stdint.h>, and
finds cuda_fp16.h only where the toolkit's headers are installed, so neither is used: 16-bit floats are
converted from their bits. `__device__` is the only word that is not C++14, which lets tests compile the same
text for the host. Do not compile with --use_fast_math: NaN must compare as NaN, and subnormal float16 come
from a multiplication.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from anyattn.arrays import Array
from anyattn.expr.nodes import Apply, Const, Expr, Symbol
from anyattn.expr.program import AlignedSlot, LoadSlot, Parameter, Program
from anyattn.expr.statements import Body, aligned_slots, body, computed_in, table_slots, whole_power

__all__ = ["cuda_arguments", "cuda_source"]

_AXES = ("b", "h", "row", "j")
_STORED = {
    "bool": "bool",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float16": "unsigned short",
    "bfloat16": "unsigned short",
    "float32": "float",
    "float64": "double",
}


def cuda_source(program: Program, accumulate: str, *, index: str = "long long", title: str = "") -> str:
    """CUDA C++ with the device functions `visible` and `score` of a program, where it has them.

    `bool visible(const Captured& c, Index b, Index h, Index row, Index i, Index j)` tells whether the key is
    seen, `Real score(Real s, const Captured& c, Index b, ...)` what becomes of the score s; both, and the
    types, are in the namespace `program`. The macros ANYATTN_VISIBLE and ANYATTN_SCORE are 1 where the
    function exists, else 0.

    Parameters
    ----------
    program : Program
    accumulate : {"float32", "float64"}
        The dtype in which floats are computed, `Real`.
    index : {"long long", "int"}
        `Index`, the type in which integers are computed. Integers are int64 in meaning; "int" is right only
        where the caller has proved that no integer of the program, on the way too, leaves 32 bits.
    title : str
        A line for the reader at the top, such as the mask that it was made for.
    """
    writer = _Writer(accumulate)
    functions = [
        writer.function(name, body(root))
        for name, root in (("visible", program.visible), ("score", program.score))
        if root is not None
    ]
    lines = [f"// Device functions of program {program.key}, floats in {accumulate}."]
    lines += [f"// {title}"] if title else []
    lines += [
        "// Captured values: p numbers, t tables (row-major, with their sizes), a arrays along",
        "// (b, h, row, j) with their strides, 0 where one entry serves all. Of the locals, r are the same",
        "// for all keys of a row and x are of one key.",
        "",
        f"#define ANYATTN_VISIBLE {int(program.visible is not None)}",
        f"#define ANYATTN_SCORE {int(program.score is not None)}",
        "",
        "namespace program {",
        "",
        f"typedef {_STORED[accumulate]} Real;",
        f"typedef {index} Index;",
        "",
        "struct Captured {",
        *(f"    {declared};" for declared, _ in _fields(program, accumulate, index)),
        "};",
    ]
    helpers = [text for name, text in _HELPERS.items() if name in writer.helpers]
    parts = ["\n".join(lines), *helpers, *functions, "}  // namespace program"]
    return "\n\n".join(parts) + "\n"


def cuda_arguments(
    program: Program,
    accumulate: str,
    aligned: tuple[Array, ...],
    addresses: tuple[int, ...],
    index: str = "long long",
) -> Any:
    """The struct `Captured` of a program as a NumPy scalar, which CuPy passes to a kernel by value.

    Parameters
    ----------
    program : Program
        Its tables are contiguous.
    accumulate, index : str
        As for `cuda_source`.
    aligned : tuple of array
        The aligned arrays as `aligned_view` gives them, with `strides` in bytes.
    addresses : tuple of int
        Where the entries of the tables, then of the aligned arrays, begin.
    """
    import numpy

    values: list[Any] = list(program.parameters)
    tables, arrays = addresses[: len(program.tables)], addresses[len(program.tables) :]
    for table, address in zip(program.tables, tables, strict=True):
        values += [address, *table.shape]
    for array, address in zip(aligned, arrays, strict=True):
        size = array.dtype.itemsize
        strides = [0 if n == 1 else step // size for n, step in zip(array.shape, array.strides, strict=True)]
        values += [address, *strides]
    fields = _fields(program, accumulate, index)
    names = [declared.rpartition(" ")[2].lstrip("*") for declared, _ in fields]
    layout = numpy.dtype(list(zip(names, (kind for _, kind in fields), strict=True)), align=True)
    return numpy.array(tuple(values) or (0,), layout)[()]


def _fields(program: Program, accumulate: str, index: str) -> list[tuple[str, str]]:
    """Each member of `Captured` with its NumPy dtype."""
    wide = "i8" if index == "long long" else "i4"
    kinds = {"bool": ("bool", "?"), "int": ("Index", wide), "float": ("Real", accumulate)}
    fields = [(f"{kinds[k][0]} p{n}", kinds[k][1]) for n, k in enumerate(program.parameter_kinds)]
    for table in table_slots(program):
        fields.append((f"const {_stored(table.dtype)}* t{table.slot}", "u8"))
        fields += [(f"Index t{table.slot}_n{axis}", wide) for axis in range(table.ndim)]
    for array in aligned_slots(program):
        fields.append((f"const {_stored(array.dtype)}* a{array.slot}", "u8"))
        fields += [(f"long long a{array.slot}_{axis}", "i8") for axis in _AXES]
    # An empty struct has one byte in C++ and none in NumPy.
    return fields or [("int nothing", "i4")]


def _stored(dtype: str) -> str:
    return _STORED[dtype.removesuffix("_")]


class _Text(NamedTuple):
    """An expression and how strongly its outermost operator binds."""

    text: str
    binds: int

    def within(self, binds: int) -> str:
        return self.text if self.binds >= binds else f"({self.text})"


_TERNARY, _LOGIC, _COMPARISON, _SHIFT, _SUM, _PRODUCT, _UNARY, _ATOM = range(8)
_INFIX = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "truediv": ("/", _PRODUCT)}
_LOGICAL = {"and": "&", "or": "|", "xor": "^"}
_COMPARISONS = {"lt": "<", "le": "<=", "eq": "==", "ne": "!=", "gt": ">", "ge": ">="}
_C_TYPES = {"bool": "bool", "int": "Index", "float": "Real"}


class _Writer:
    def __init__(self, accumulate: str):
        self.accumulate = accumulate
        self.helpers: set[str] = set()
        self.names: dict[int, str] = {}

    def function(self, name: str, parts: Body) -> str:
        self.names = {}
        lines = []
        for local, node in (*parts.row, *parts.key):
            lines.append(f"    const {_C_TYPES[node.kind]} {local} = {self.whole(node)};")
            self.names[id(node)] = local
        lines.append(f"    return {self.whole(parts.result)};")
        kind, first = ("Real", "Real s, ") if name == "score" else ("bool", "")
        arguments = f"{first}const Captured& c, Index b, Index h, Index row, Index i, Index j"
        return f"__device__ inline {kind} {name}({arguments}) {{\n" + "\n".join(lines) + "\n}"

    def whole(self, node: Expr) -> str:
        return self.expression(node).text

    def helper(self, name: str, *arguments: str) -> _Text:
        self.helpers.add(name)
        return _Text(f"{name}({', '.join(arguments)})", _ATOM)

    def expression(self, node: Expr) -> _Text:
        if id(node) in self.names:
            return _Text(self.names[id(node)], _ATOM)
        if isinstance(node, Const):
            return _constant(node.value, node.kind)
        if isinstance(node, Symbol):
            return _Text("s" if node.name == "score" else node.name, _ATOM)
        if isinstance(node, Parameter):
            return _Text(f"c.p{node.slot}", _ATOM)
        if isinstance(node, LoadSlot):
            return self.load(node)
        if isinstance(node, AlignedSlot):
            blocks = {"b": 1, "h": 1, "row": node.block, "j": node.block}
            steps = [f"{_divided(axis, n)} * c.a{node.slot}_{axis}" for axis, n in blocks.items()]
            return self.read(f"c.a{node.slot}[{' + '.join(steps)}]", node.dtype, node.kind)
        if isinstance(node, Apply):
            return self.apply(node)
        raise TypeError(f"{type(node).__name__} must be lowered before it is printed")

    def converted(self, node: Expr, kind: str) -> _Text:
        """`node` as a value of another kind."""
        if isinstance(node, Const):
            return _constant(node.value, kind)
        if node.kind == kind:
            return self.expression(node)
        return _Text(f"{_C_TYPES[kind]}({self.whole(node)})", _ATOM)

    def load(self, node: LoadSlot) -> _Text:
        table = f"c.t{node.table.slot}"
        flat = ""
        for axis, index in enumerate(node.indices):
            size = f"{table}_n{axis}"
            if index.kind == "float":
                inside = self.helper("inside_real", self.whole(index), size)
            else:
                inside = self.helper("inside", self.converted(index, "int").text, size)
            # Offsets are 64 bits wide, whatever `Index` is: a table may have more than 2**31 entries.
            first = f"({flat})" if axis > 1 else flat
            flat = f"{first} * {size} + {inside.text}" if axis else inside.text
        return self.read(f"{table}[{flat or '0'}]", node.table.dtype, node.kind)

    def read(self, text: str, dtype: str, kind: str) -> _Text:
        if dtype in ("float16", "bfloat16"):
            read = self.helper("half_value" if dtype == "float16" else "bfloat_value", text)
            return read if self.accumulate == "float32" else _Text(f"Real({read.text})", _ATOM)
        if kind == "bool" or dtype == self.accumulate:
            return _Text(text, _ATOM)
        return _Text(f"{_C_TYPES[kind]}({text})", _ATOM)

    def apply(self, node: Apply) -> _Text:
        op, inner = node.op, computed_in(node)
        if op == "where":
            condition, *picked = node.args
            x, y = (self.converted(a, node.kind).within(_LOGIC) for a in picked)
            return _Text(f"{self.expression(condition).within(_COMPARISON)} ? {x} : {y}", _TERNARY)
        if op in ("floordiv", "mod"):
            return self.quotient(node, inner)
        if op == "pow":
            return self.power(node)
        args = [self.converted(a, inner) for a in node.args]
        if op in _COMPARISONS:
            x, y = (a.within(_SHIFT) for a in args)
            return _Text(f"{x} {_COMPARISONS[op]} {y}", _COMPARISON)
        if op in _LOGICAL:
            # Parentheses where C++ wants none: few know where `&` binds among comparisons.
            chain = [isinstance(a, Apply) and a.op == op for a in node.args]
            texts = [a.within(_LOGIC if same else _UNARY) for a, same in zip(args, chain, strict=True)]
            return _Text(f" {_LOGICAL[op]} ".join(texts), _LOGIC)
        if op in _INFIX:
            sign, binds = _INFIX[op]
            return _Text(f"{args[0].within(binds)} {sign} {args[1].within(binds + 1)}", binds)
        if op == "neg":
            return _Text(f"-{args[0].within(_ATOM)}", _UNARY)
        if op == "not":
            # Binds tighter, but compilers warn of `!x & y` and `!x == y`.
            return _Text(f"!{args[0].within(_ATOM)}", _LOGIC)
        if op in ("minimum", "maximum", "sigmoid"):
            return self.helper(op, *(a.text for a in args))
        if op == "abs":
            if inner == "int":
                return self.helper("absolute", args[0].text)
            op = "fabs"
        return _Text(f"{op}({args[0].text})", _ATOM)

    def quotient(self, node: Apply, inner: str) -> _Text:
        x, y = (self.converted(a, inner) for a in node.args)
        if inner == "float":
            return self.helper(f"{node.op}_real", x.text, y.text)
        divisor = node.args[1]
        value = int(divisor.value) if isinstance(divisor, Const) else 0
        if value > 0 and value & (value - 1) == 0:
            if node.op == "mod":
                return _Text(f"({x.within(_UNARY)} & {value - 1})", _ATOM)
            return _Text(f"{x.within(_UNARY)} >> {value.bit_length() - 1}", _SHIFT)
        return self.helper(node.op, x.text, y.text)

    def power(self, node: Apply) -> _Text:
        exponent = whole_power(node)
        x = self.converted(node.args[0], node.kind)
        if exponent in (2, 3, 4):
            return _Text(" * ".join([x.within(_ATOM)] * exponent), _PRODUCT)
        if node.kind == "int":
            return self.helper("power", x.text, str(exponent))
        return _Text(f"pow({x.text}, {self.converted(node.args[1], 'float').text})", _ATOM)


def _constant(value: float, kind: str) -> _Text:
    if kind == "bool":
        return _Text("true" if value else "false", _ATOM)
    if kind == "int":
        return _Text(str(int(value)), _ATOM if value >= 0 else _UNARY)
    text = repr(float(value)).replace("inf", "(1e308 * 10)").replace("nan", "(1e308 * 10 - 1e308 * 10)")
    return _Text(f"Real({text})", _ATOM)


def _divided(name: str, block: int) -> str:
    if block & (block - 1) == 0:
        return f"({name} >> {block.bit_length() - 1})" if block > 1 else name
    return f"{name} / {block}"


# C++14 without headers; `Real` and `Index` are the types of the program.
_HELPERS = {
    "inside": """\
// The nearest index of an axis.
__device__ inline long long inside(Index index, Index size) {
    const Index low = index > 0 ? index : 0;
    return low < size - 1 ? low : size - 1;
}""",
    "inside_real": """\
// The nearest index of an axis; NaN gives 0, and what is too large for an integer is not converted.
__device__ inline long long inside_real(Real index, Index size) {
    const Real last = Real(size - 1), low = index > 0 ? index : Real(0);
    const long long near = (long long)(low < last ? low : last);
    return near < size - 1 ? near : size - 1;
}""",
    "half_value": """\
// float16 from its bits: the exponent is moved, subnormal numbers come right by the multiplication by 2**112.
__device__ inline float half_value(unsigned short bits) {
    union { unsigned int bits; float value; } size, special;
    size.bits = (bits & 0x7fffu) << 13;
    special.bits = size.bits | 0x7f800000u;
    const float value = size.bits >= 0x0f800000u ? special.value : size.value * 5.192296858534828e33f;
    return bits & 0x8000u ? -value : value;
}""",
    "bfloat_value": """\
// bfloat16 from its bits, the upper half of a float32.
__device__ inline float bfloat_value(unsigned short bits) {
    union { unsigned int bits; float value; } whole;
    whole.bits = (unsigned int)bits << 16;
    return whole.value;
}""",
    "absolute": """\
__device__ inline Index absolute(Index x) { return x < 0 ? -x : x; }""",
    "minimum": """\
// The smaller one; NaN if either is.
template <class T> __device__ inline T minimum(T x, T y) { return (x < y) | (x != x) ? x : y; }""",
    "maximum": """\
// The larger one; NaN if either is.
template <class T> __device__ inline T maximum(T x, T y) { return (x > y) | (x != x) ? x : y; }""",
    "floordiv": """\
// x // y rounds down; 0 where y is 0, as in NumPy.
__device__ inline Index floordiv(Index x, Index y) {
    const Index d = y != 0 ? y : 1, quotient = x / d, remainder = x % d;
    return y == 0 ? 0 : quotient - ((remainder != 0) & ((remainder < 0) != (d < 0)));
}""",
    "mod": """\
// x % y has the sign of y; 0 where y is 0, as in NumPy.
__device__ inline Index mod(Index x, Index y) {
    const Index d = y != 0 ? y : 1, remainder = x % d;
    return (remainder != 0) & ((remainder < 0) != (d < 0)) ? remainder + d : remainder;
}""",
    "mod_real": """\
// x % y has the sign of y.
__device__ inline Real mod_real(Real x, Real y) {
    const Real remainder = fmod(x, y);
    return (remainder != 0) & ((remainder < 0) != (y < 0)) ? remainder + y : remainder;
}""",
    "floordiv_real": """\
// x // y: the quotient of what fmod leaves, so that rounding does not make it one too many.
__device__ inline Real floordiv_real(Real x, Real y) {
    const Real remainder = fmod(x, y);
    const Real quotient = (x - remainder) / y - Real((remainder != 0) & ((remainder < 0) != (y < 0)));
    const Real whole = floor(quotient);
    return y == 0 ? x / y : whole + Real(quotient - whole > Real(0.5));
}""",
    "power": """\
__device__ inline Index power(Index x, int n) {
    Index result = 1;
    for (int k = 0; k < n; ++k) result *= x;
    return result;
}""",
    "sigmoid": """\
// 1 / (1 + exp(-x)), where exp(-x) may be too large.
__device__ inline Real sigmoid(Real x) {
    const Real t = exp(x < 0 ? x : -x);
    return (x < 0 ? t : Real(1)) / (Real(1) + t);
}""",
}
