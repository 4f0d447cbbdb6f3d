"""CUDA C++ of a program: self-contained device functions that a kernel calls for an entry of its tile.

The text depends on the structure alone. Everything captured travels in one struct, `Captured`, that a kernel
takes by value, so its parameter list is the same for every mask. NVRTC has no INFINITY and no <stdint.h>, and
finds cuda_fp16.h only where the toolkit's headers are installed, so neither is used: 16-bit floats are
converted from their bits. `__device__` is the only word that is not C++14, which lets tests compile the same
text for the host. Do not compile with --use_fast_math: NaN must compare as NaN. CuPy compiles with -ftz=true
always, so subnormal float32 count as 0, and float16 are converted without any.
"""

from __future__ import annotations

from typing import Any

from anyattn.arrays import Array
from anyattn.expr.bounds import check_constants
from anyattn.expr.program import AlignedSlot, LoadSlot, Program
from anyattn.expr.statements import Body, aligned_slots, body, table_slots
from anyattn.expr.writer import ATOM, Form, Text, Writer, called

__all__ = ["cuda_arguments", "cuda_source"]

_FUNCTIONS = {"visible": "bool", "score": "Real", "keep": "Real"}
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
    """CUDA C++ with the device functions `visible`, `score` and `keep` of a program, where it has them.

    `bool visible(const Captured& c, Index b, Index h, Index row, Index i, Index j)` tells whether the key is
    seen, `Real score(Real s, const Captured& c, Index b, ...)` what becomes of the score s, `Real keep(const
    Captured& c, ...)` what the weight is multiplied by; they, and the types, are in the namespace `program`.
    The macros ANYATTN_VISIBLE, ANYATTN_SCORE and ANYATTN_KEEP are 1 where the function exists, else 0.

    Parameters
    ----------
    program : Program
    accumulate : {"float32", "float64"}
        The dtype in which floats are computed, `Real`.
    index : {"long long", "int"}
        `Index`, the type in which integers are computed. Integers are int64 in meaning; "int" is right only
        where `bounds.fits` has proved for the call that no integer of the program leaves 32 bits.
    title : str
        A line for the reader at the top, such as the mask that it was made for.

    Raises
    ------
    ValueError
        If a constant of the code does not fit `index`.
    """
    check_constants(program, 64 if index == "long long" else 32)
    writer = _Writer(accumulate)
    functions = [writer.function(name, body(root)) for name, root in program.functions.items()]
    lines = [f"// Device functions of program {program.key}, floats in {accumulate}."]
    lines += [f"// {title}"] if title else []
    lines += [
        "// Captured values: p numbers, t tables (row-major, with their sizes), a arrays along",
        "// (b, h, row, j) with their strides, 0 where one entry serves all. Of the locals, r are the same",
        "// for all keys of a row and x are of one key.",
        "",
        *(f"#define ANYATTN_{name.upper()} {int(name in program.functions)}" for name in _FUNCTIONS),
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
    parts = ["\n".join(lines), *called(_HELPERS, functions), *functions, "}  // namespace program"]
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


# How strongly the operators bind. Parentheses stand where C++ wants none: few know where `&` binds among
# comparisons, and compilers warn of `!x & y` and `!x == y`.
_TERNARY, _LOGIC, _COMPARISON, _SHIFT, _SUM, _PRODUCT, _UNARY = range(7)


def _compared(sign: str) -> Form:
    return Form(f"{{}} {sign} {{}}", _COMPARISON, (_SHIFT, _SHIFT))


def _joined(sign: str) -> Form:
    return Form(f"{{}} {sign} {{}}", _LOGIC, (_UNARY, _UNARY), chains=True)


_FORMS: dict[str, Form | str] = {
    "add": Form("{} + {}", _SUM, (_SUM, _PRODUCT)),
    "sub": Form("{} - {}", _SUM, (_SUM, _PRODUCT)),
    "mul": Form("{} * {}", _PRODUCT, (_PRODUCT, _UNARY)),
    "truediv": Form("{} / {}", _PRODUCT, (_PRODUCT, _UNARY)),
    "floordiv int": "floordiv",
    "floordiv constant": "floordiv",
    "floordiv power": Form("{} >> {}", _SHIFT, (_UNARY, ATOM)),
    "floordiv float": "floordiv_real",
    "mod int": "mod",
    "mod constant": "mod",
    "mod power": Form("({} & {})", ATOM, (_UNARY, ATOM)),
    "mod float": "mod_real",
    "pow 2": Form("{0} * {0}", _PRODUCT, (ATOM,)),
    "pow 3": Form("{0} * {0} * {0}", _PRODUCT, (ATOM,)),
    "pow 4": Form("{0} * {0} * {0} * {0}", _PRODUCT, (ATOM,)),
    "pow int": "power",
    "pow float": "pow",
    "neg": Form("-{}", _UNARY, (ATOM,)),
    "abs int": "absolute",
    "abs float": "fabs",
    "minimum": "minimum",
    "maximum": "maximum",
    "lt": _compared("<"),
    "le": _compared("<="),
    "gt": _compared(">"),
    "ge": _compared(">="),
    "eq": _compared("=="),
    "ne": _compared("!="),
    "and": _joined("&"),
    "or": _joined("|"),
    "xor": _joined("^"),
    "not": Form("!{}", _LOGIC, (ATOM,)),
    "where": Form("{} ? {} : {}", _TERNARY, (_COMPARISON, _LOGIC, _LOGIC)),
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "sqrt": "sqrt",
    "sigmoid": "sigmoid",
    "floor": "floor",
    "philox": "philox",
}


class _Writer(Writer):
    forms = _FORMS
    half = "half_value"
    bfloat = "bfloat_value"

    def __init__(self, accumulate: str):
        super().__init__(accumulate, {"bool": "bool", "int": "Index", "float": "Real"}, (accumulate,))

    def function(self, name: str, parts: Body) -> str:
        self.names = {}
        lines = []
        for local, node in (*parts.row, *parts.key):
            lines.append(f"    const {self.kinds[node.kind]} {local} = {self.whole(node)};")
            self.names[id(node)] = local
        lines.append(f"    return {self.whole(parts.result)};")
        kind, first = _FUNCTIONS[name], "Real s, " if name == "score" else ""
        arguments = f"{first}const Captured& c, Index b, Index h, Index row, Index i, Index j"
        return f"__device__ inline {kind} {name}({arguments}) {{\n" + "\n".join(lines) + "\n}"

    def constant(self, value: float, kind: str) -> Text:
        if kind == "bool":
            return Text("true" if value else "false")
        if kind == "int":
            return Text(str(int(value)), ATOM if value >= 0 else _UNARY)
        text = repr(float(value)).replace("inf", "(1e308 * 10)").replace("nan", "(1e308 * 10 - 1e308 * 10)")
        return Text(f"Real({text})")

    def parameter(self, slot: int) -> str:
        return f"c.p{slot}"

    def element(self, node: LoadSlot, indices: list[str]) -> str:
        table = f"c.t{node.table.slot}"
        flat = ""
        for axis, (x, index) in enumerate(zip(node.indices, indices, strict=True)):
            size = f"{table}_n{axis}"
            inside = f"{'inside_real' if x.kind == 'float' else 'inside'}({index}, {size})"
            # Offsets are 64 bits wide, whatever `Index` is: a table may have more than 2**31 entries.
            first = f"({flat})" if axis > 1 else flat
            flat = f"{first} * {size} + {inside}" if axis else inside
        return f"{table}[{flat or '0'}]"

    def entry(self, node: AlignedSlot, row: Text, j: Text) -> str:
        indices = ("b", "h", row.within(_PRODUCT), j.within(_PRODUCT))
        steps = [f"{x} * c.a{node.slot}_{axis}" for x, axis in zip(indices, _AXES, strict=True)]
        return f"c.a{node.slot}[{' + '.join(steps)}]"


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
// float16 from its bits: the exponent is moved; subnormal numbers are so many times 2**-24.
__device__ inline float half_value(unsigned short bits) {
    union { unsigned int bits; float value; } whole;
    const unsigned int size = (bits & 0x7fffu) << 13;
    whole.bits = size >= 0x0f800000u ? size | 0x7f800000u : size + 0x38000000u;
    const float value = size < 0x00800000u ? float(bits & 0x3ffu) * 5.9604644775390625e-8f : whole.value;
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
    "philox": """\
// The upper 24 bits of the first word of Philox4x32-10 (Salmon et al., 2011).
__device__ inline Index philox(Index key0, Index key1, Index b, Index h, Index row, Index j) {
    unsigned int k0 = (unsigned int)key0, k1 = (unsigned int)key1;
    unsigned int x = (unsigned int)b, y = (unsigned int)h, z = (unsigned int)row, w = (unsigned int)j;
    for (int n = 0; n < 10; ++n) {
        const unsigned long long left = 0xD2511F53ull * x, right = 0xCD9E8D57ull * z;
        x = (unsigned int)(right >> 32) ^ y ^ k0, y = (unsigned int)right;
        z = (unsigned int)(left >> 32) ^ w ^ k1, w = (unsigned int)left;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return Index(x >> 8);
}""",
}
