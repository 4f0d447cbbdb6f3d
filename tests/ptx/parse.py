"""PTX text to instructions: statements, operands, labels, and what a kernel declares.

The grammar is what NVRTC prints, inline assembly with its own scopes and registers included; anything else
is an error, not a guess.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "Address",
    "Instruction",
    "Kernel",
    "Literal",
    "Name",
    "Negated",
    "Operand",
    "Pair",
    "PtxError",
    "Vector",
    "width",
]


class PtxError(RuntimeError):
    """A program did what is not defined, or what the interpreter does not know."""


@dataclass(frozen=True)
class Name:
    """A register, a special register, a symbol or a label."""

    name: str


@dataclass(frozen=True)
class Negated:
    """A predicate register read as its opposite."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A number as it is written."""

    text: str


@dataclass(frozen=True)
class Vector:
    """Several operands, {a, b, ...}."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """d|p of shfl: a value and a predicate."""

    value: Operand
    predicate: Operand


@dataclass(frozen=True)
class Address:
    """A place in memory, [base + offset]."""

    base: Operand
    offset: int


Operand = Name | Negated | Literal | Vector | Pair | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction: `op` and what stands behind its dots, operands, guard, and where it comes from."""

    op: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Name | Negated | None
    where: str
    text: str

    @property
    def type(self) -> str:
        """The last type named, which most instructions work in."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Variable:
    """An array in shared or local memory; `size` 0 is dynamic shared memory."""

    name: str
    space: str
    align: int
    size: int


@dataclass
class Kernel:
    """A kernel of a module of PTX."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    most_threads: int = 1024

    @classmethod
    def parse(cls, text: str, name: str = "") -> Kernel:
        """Read the kernel called `name`, or the first one."""
        text = re.sub(r"//[^\n]*", "", text)
        wanted = name or r"[\w$]+"
        entry = re.search(rf"\.entry\s+({wanted})\s*(?:\((.*?)\))?([^{{]*)\{{", text, re.S)
        if entry is None:
            raise PtxError(f"there is no kernel {name!r}")
        kernel = cls(entry[1])
        kernel._read_parameters(entry[2] or "")
        threads = re.search(r"\.maxntid\s+([\d, ]+)", entry[3])
        if threads is not None:
            kernel.most_threads = 1
            for n in threads[1].split(","):
                kernel.most_threads *= int(n)
        head = text[: entry.start()]
        for found in re.finditer(_VARIABLE, head):
            kernel.variables.append(_variable(found))
        files = {
            int(n): path.rpartition("/")[2] for n, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)
        }
        _Reader(kernel, files, _functions(text)).read(_inside(text, entry.end()), [{}])
        return kernel

    def _read_parameters(self, text: str) -> None:
        offset = 0
        for part in _split(text):
            found = re.fullmatch(_PARAMETER, part, re.S)
            if found is None:
                raise PtxError(f"not a parameter: {part}")
            align, kind, name, count = found.groups()
            each = width(kind) // 8
            offset = _rounded(offset, int(align or each))
            self.parameters.append(Parameter(name, offset, each * int(count or 1)))
            offset += each * int(count or 1)

    def leaders(self) -> list[int]:
        """Where straight runs of instructions begin: after branches, at labels, where threads may wait."""
        found = {0, len(self.instructions), *self.labels.values()}
        for n, one in enumerate(self.instructions):
            if one.op in ("bra", "ret", "exit"):
                found.add(n + 1)
            if one.op in _WAIT:
                found.add(n)
        return sorted(found)


_PARAMETER = r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)(?:\s+\.ptr[^%]*?)?\s+([\w$]+)(?:\[(\d+)\])?"
_VARIABLE = r"(?:\.extern\s+)?\.(shared|local|global|const)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]"
_CALL = r"call(?:\.uni)?\s+(?:\(([^)]*)\)\s*,\s*)?([\w$]+)\s*,\s*\(([^)]*)\)"
_WAIT = ("bar", "barrier", "shfl", "vote", "redux", "ldmatrix", "mma")
_BITS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16}


def width(kind: str) -> int:
    """Bits of a type of PTX."""
    return _BITS.get(kind) or int(re.fullmatch(r"[busf](\d+)", kind)[1])


@dataclass(frozen=True)
class _Function:
    """A device function: names of its results and parameters, and its body."""

    results: list[str]
    parameters: list[str]
    body: str


def _functions(text: str) -> dict[str, _Function]:
    """The device functions of a module that have bodies."""
    found = {}
    for one in re.finditer(r"\.func\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*\(([^)]*)\)\s*\{", text):
        results, parameters = ([part.split()[-1] for part in _split(x or "")] for x in (one[1], one[3]))
        found[one[2]] = _Function(results, parameters, _inside(text, one.end()))
    return found


class _Reader:
    """Reads bodies into a kernel; a function that is called stands where it is called, its names its own."""

    def __init__(self, kernel: Kernel, files: dict[int, str], functions: dict[str, _Function]):
        self.kernel = kernel
        self.files = files
        self.functions = functions
        self.where = "?"
        self.inner = 0

    def read(self, body: str, scopes: list[dict[str, str]], end: str | None = None) -> None:
        """Read a body; `end` is the label that a return goes to, of a function that is called."""
        kernel = self.kernel
        for statement in _statements(body):
            if statement == "{":
                scopes.append({})
            elif statement == "}":
                scopes.pop()
            elif statement.endswith(":"):
                kernel.labels[_resolved(statement[:-1], scopes)] = len(kernel.instructions)
            elif statement.startswith(".loc"):
                number, line = statement.split()[1:3]
                self.where = f"{self.files.get(int(number), '?')}:{line}"
            elif statement.startswith("."):
                self._read_declaration(statement, scopes)
            elif called := statement.startswith("call") and re.fullmatch(_CALL, statement):
                self._call(*called.groups(), scopes)
            elif end is not None and statement == "ret":
                kernel.instructions.append(_instruction(f"bra {end}", scopes, self.where))
            else:
                kernel.instructions.append(self._moved(_instruction(statement, scopes, self.where)))

    def _read_declaration(self, statement: str, scopes: list[dict[str, str]]) -> None:
        if declared := re.fullmatch(r"\.(?:reg|param)\s+\.(\w+)\s+(.*)", statement, re.S):
            for name in _names(declared[2]):
                self._declare(name, declared[1], scopes)
        elif found := re.fullmatch(_VARIABLE, statement):
            self.kernel.variables.append(_variable(found))
        elif not statement.startswith(".pragma"):
            raise PtxError(f"no meaning is known of {statement} ({self.where})")

    def _declare(self, name: str, kind: str, scopes: list[dict[str, str]]) -> None:
        """A register; those of the kernel itself keep their names."""
        own = name
        if len(scopes) > 1:
            self.inner += 1
            own = f"{name}@{self.inner}"
            scopes[-1][name] = own
        self.kernel.registers[own] = kind

    def _call(self, results: str | None, name: str, arguments: str, scopes: list[dict[str, str]]) -> None:
        if name not in self.functions:
            raise PtxError(f"there is no function {name} ({self.where})")
        function = self.functions[name]
        given = [_resolved(x, scopes) for x in (*_split(results or ""), *_split(arguments))]
        inner = dict(zip((*function.results, *function.parameters), given, strict=True))
        self.inner += 1
        inner |= {
            label: f"{label}@{self.inner}" for label in re.findall(r"^\s*([\w$]+):", function.body, re.M)
        }
        end = f"end@{self.inner}"
        # The first scope is that of the kernel.
        self.read(function.body, [{}, inner], end)
        self.kernel.labels[end] = len(self.kernel.instructions)

    def _moved(self, one: Instruction) -> Instruction:
        """What an instruction says; parameters of calls are registers."""
        if one.op not in ("ld", "st") or one.modifiers[0] != "param":
            return one
        value, address = one.operands if one.op == "ld" else one.operands[::-1]
        if not (isinstance(address, Address) and isinstance(address.base, Name)):
            return one
        if address.base.name not in self.kernel.registers or "@" not in address.base.name or address.offset:
            return one
        operands = (value, address.base) if one.op == "ld" else (address.base, value)
        kind = f"b{width(one.type)}"
        return Instruction("mov", (kind,), operands, one.guard, one.where, one.text)


def _names(text: str) -> Iterator[str]:
    """Names that a declaration lists; %r<3> is %r0, %r1 and %r2."""
    for one in _split(text):
        counted = re.fullmatch(r"(%\w+)<(\d+)>", one)
        yield from (f"{counted[1]}{n}" for n in range(int(counted[2]))) if counted else (one,)


def _variable(found: re.Match[str]) -> Variable:
    return Variable(found[3], found[1], int(found[2]), int(found[4] or 0))


def _rounded(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _inside(text: str, start: int) -> str:
    """The text from `start` to the brace that closes it."""
    depth = 1
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[start : start + brace.start()]
    raise PtxError("a brace is not closed")


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolons; braces that open and close scopes; labels with their colons."""
    several = ""
    for line in body.splitlines():
        one = " ".join(line.split())
        if not one:
            continue
        if several or one[0] in "{}":
            several += one + " "
        elif one.startswith(".loc"):
            yield one
        elif one.find(";") == len(one) - 1 and ":" not in one:
            # Most lines are a statement.
            yield one[:-1].rstrip()
        else:
            several = one + " "
        if several and one[-1] in ";{}:":
            yield from _statements_within(several)
            several = ""
    yield from _statements_within(several)


def _statements_within(text: str) -> Iterator[str]:
    """The statements of a text that ends between two."""
    current, depth = "", 0
    for part in re.split("([;{}:])", text):
        blank = not current.strip()
        if blank and part in ("{", "}"):
            yield part
            current = ""
        elif part == ";" and depth == 0:
            if not blank:
                yield re.sub(r"\s+", " ", current.strip())
            current = ""
        elif part == ":" and re.fullmatch(r"\s*[\w$]+\s*", current):
            yield current.strip() + ":"
            current = ""
        else:
            current += part
            depth += {"{": 1, "}": -1}.get(part, 0)
    if current.strip():
        raise PtxError(f"the text ends within {current.strip()!r}")


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    if "{" not in text and "(" not in text:
        return [part.strip() for part in text.split(",") if part]
    parts = re.split(r",(?![^{\[(]*[}\])])", text)
    return [part.strip() for part in parts if part.strip()]


def _instruction(text: str, scopes: list[dict[str, str]], where: str) -> Instruction:
    guard, rest = None, text
    if text.startswith("@"):
        mark, rest = text.split(maxsplit=1)
        guard = _operand(mark[1:], scopes)
    op, _, operands = rest.partition(" ")
    name, *modifiers = op.replace("::", "_").split(".")
    return Instruction(
        op=name,
        modifiers=tuple(modifiers),
        operands=tuple(_operand(part, scopes) for part in _split(operands)),
        guard=guard,
        where=where,
        text=text,
    )


def _operand(text: str, scopes: list[dict[str, str]]) -> Operand:
    if text.startswith("%") and "|" not in text:
        return _named(_resolved(text, scopes))
    if text.startswith("{"):
        return Vector(tuple(_operand(part, scopes) for part in _split(text[1:-1])))
    if text.startswith("["):
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        return Address(_operand(base, scopes), int(offset or "0", 0))
    if text.startswith("!"):
        return Negated(_resolved(text[1:].strip(), scopes))
    if "|" in text:
        value, predicate = text.split("|")
        return Pair(_operand(value.strip(), scopes), _operand(predicate.strip(), scopes))
    if text[0].isdigit() or text[0] == "-":
        return Literal(text)
    return _named(_resolved(text, scopes))


@functools.cache
def _named(name: str) -> Name:
    return Name(name)


def _resolved(name: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name
