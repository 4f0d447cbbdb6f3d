"""What printers of source share: which form of a language writes a node, and where parentheses are needed.

A language is a table of forms and a few methods, for what it says in words of its own (constants, arguments,
reads of arrays, functions). The dispatch over nodes, conversions between kinds, divisions by constants and
powers are here once, so that all languages agree on them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from anyattn.expr.nodes import Apply, Const, Expr, Symbol
from anyattn.expr.program import AlignedSlot, LoadSlot, Parameter
from anyattn.expr.statements import computed_in, whole_power

__all__ = ["ATOM", "Form", "Text", "Writer", "called"]

# Binds stronger than any operator: a name, a number, a call, an element.
ATOM = 100


class Text(NamedTuple):
    """An expression and how strongly its outermost operator binds."""

    text: str
    binds: int = ATOM

    def within(self, binds: int) -> str:
        return self.text if self.binds >= binds else f"({self.text})"


@dataclass(frozen=True)
class Form:
    """How an operator is written.

    Attributes
    ----------
    text : str
        With a pair of braces for each operand.
    binds : int
        How strongly the operator binds.
    operands : tuple of int
        How strongly each operand must bind to stand without parentheses.
    chains : bool
        Whether an operand of the same operation stands without them too.
    """

    text: str
    binds: int
    operands: tuple[int, ...]
    chains: bool = False


class Writer(ABC):
    """Writes expressions over named parts in one language.

    Attributes
    ----------
    forms : mapping
        For each operation its form, or the name of the function to call: under "name kind" where it is
        computed in integers or floats in a way of its own, "floordiv constant" for an integer divisor that is
        known and not 0, "floordiv power" and "mod power" where that is a power of two (the second operand is
        then the shift, or the mask), else under its name.
    half, bfloat : str
        The functions that read 16-bit floats, as float32, from their bits.
    kinds : mapping
        The types of the kinds, which convert when they are called.
    stored : set of str
        The dtypes whose elements are of their kind's type as they are.
    """

    forms: Mapping[str, Form | str]
    half: str
    bfloat: str

    def __init__(self, accumulate: str, kinds: Mapping[str, str], stored: Iterable[str]):
        self.accumulate = accumulate
        self.kinds = kinds
        self.stored = frozenset(stored)
        self.names: dict[int, str] = {}

    @abstractmethod
    def constant(self, value: float, kind: str) -> Text: ...

    @abstractmethod
    def parameter(self, slot: int) -> str: ...

    @abstractmethod
    def element(self, node: LoadSlot, indices: list[str]) -> str:
        """The element of a table at indices that were not brought inside it yet."""

    @abstractmethod
    def entry(self, node: AlignedSlot, row: Text, j: Text) -> str:
        """The entry of an aligned array at (b, h, row, j)."""

    def whole(self, node: Expr) -> str:
        return self.expression(node).text

    def expression(self, node: Expr) -> Text:
        if id(node) in self.names:
            return Text(self.names[id(node)])
        if isinstance(node, Const):
            return self.constant(node.value, node.kind)
        if isinstance(node, Symbol):
            return Text("s" if node.name == "score" else node.name)
        if isinstance(node, Parameter):
            return Text(self.parameter(node.slot))
        if isinstance(node, LoadSlot):
            # A float may be too large for an integer: it is brought inside before it is converted.
            indices = [self.converted(x, "float" if x.kind == "float" else "int") for x in node.indices]
            text = self.element(node, [x.text for x in indices])
            return self.read(text, node.table.dtype, node.kind)
        if isinstance(node, AlignedSlot):
            row, j = (self.divided(Text(name), node.block) for name in ("row", "j"))
            return self.read(self.entry(node, row, j), node.dtype, node.kind)
        if isinstance(node, Apply):
            return self.apply(node)
        raise TypeError(f"{type(node).__name__} must be lowered before it is printed")

    def converted(self, node: Expr, kind: str) -> Text:
        """`node` as a value of another kind."""
        if isinstance(node, Const):
            return self.constant(node.value, kind)
        if node.kind == kind:
            return self.expression(node)
        return Text(f"{self.kinds[kind]}({self.whole(node)})")

    def read(self, text: str, dtype: str, kind: str) -> Text:
        """What an array holds, as a value of the kind."""
        if dtype in ("float16", "bfloat16"):
            text, dtype = f"{self.half if dtype == 'float16' else self.bfloat}({text})", "float32"
        if kind == "bool" or dtype in self.stored:
            return Text(text)
        return Text(f"{self.kinds[kind]}({text})")

    def apply(self, node: Apply) -> Text:
        inner = computed_in(node)
        if node.op == "pow" and whole_power(node) in (2, 3, 4):
            return self.formed(
                self.forms[f"pow {whole_power(node)}"], self.converted(node.args[0], node.kind)
            )
        if node.op in ("floordiv", "mod") and inner == "int":
            return self.quotient(node)
        kinds = ("bool", node.kind, node.kind) if node.op == "where" else (inner,) * len(node.args)
        args = [self.converted(x, kind) for x, kind in zip(node.args, kinds, strict=True)]
        form = self.forms.get(f"{node.op} {inner}") or self.forms[node.op]
        if isinstance(form, Form) and form.chains:
            same = [isinstance(x, Apply) and x.op == node.op for x in node.args]
            args = [Text(x.text) if chain else x for x, chain in zip(args, same, strict=True)]
        return self.formed(form, *args)

    def quotient(self, node: Apply) -> Text:
        x, y = (self.converted(a, "int") for a in node.args)
        divisor = node.args[1]
        value = int(divisor.value) if isinstance(divisor, Const) else 0
        if value > 0 and value & (value - 1) == 0:
            return self.divided(x, value, node.op)
        return self.formed(self.forms[f"{node.op} constant" if value else f"{node.op} int"], x, y)

    def divided(self, x: Text, divisor: int, op: str = "floordiv") -> Text:
        """x // divisor or x % divisor, both integers, the divisor positive."""
        if op == "floordiv" and divisor == 1:
            return x
        if divisor & (divisor - 1):
            return self.formed(self.forms[f"{op} constant"], x, self.constant(divisor, "int"))
        operand = divisor - 1 if op == "mod" else divisor.bit_length() - 1
        return self.formed(self.forms[f"{op} power"], x, self.constant(operand, "int"))

    def formed(self, form: Form | str, *operands: Text) -> Text:
        if isinstance(form, str):
            return Text(f"{form}({', '.join(x.text for x in operands)})")
        texts = [x.within(binds) for x, binds in zip(operands, form.operands, strict=True)]
        return Text(form.text.format(*texts), form.binds)


def called(helpers: Mapping[str, str], texts: Iterable[str]) -> list[str]:
    """The helpers that the texts call, and those that these call, in the order of the table."""
    found: set[str] = set()
    waiting = list(texts)
    while waiting:
        names = {name for name in re.findall(r"\b(\w+)\(", waiting.pop()) if name in helpers}
        waiting += [helpers[name] for name in names - found]
        found |= names
    return [text for name, text in helpers.items() if name in found]
