"""A program as text for people: an assignment for each part that is used twice, then the results."""

from __future__ import annotations

from collections.abc import Sequence

from anyattn.expr.nodes import OPERATIONS, Apply, Expr, walk
from anyattn.expr.program import AlignedSlot, LoadSlot, Program
from anyattn.expr.statements import times_read

__all__ = ["listing"]


class _Words:
    """Text that stands for an argument in the form of an operator."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def listing(program: Program, labels: Sequence[str] = ()) -> str:
    """The program as assignments, and what its arguments are.

    Parameters
    ----------
    program : Program
    labels : sequence of str
        What to call the tables and then the aligned arrays, by slot.
    """
    nodes = {id(node): node for root in program.functions.values() for node in walk(root)}
    uses = times_read(nodes.values())
    lines: list[str] = []
    texts: dict[int, str] = {}
    for node in nodes.values():
        text = _text(node, texts)
        if uses[id(node)] > 1 and isinstance(node, (Apply, LoadSlot)):
            name = f"x{len(lines)}"
            lines.append(f"{name} = {_bare(text, node)}")
            text = name
        texts[id(node)] = text
    for name, root in program.functions.items():
        lines.append(f"{name} = {_bare(texts[id(root)], root)}")
    if not lines:
        lines.append("score unchanged, every key visible")
    kinds = program.parameter_kinds
    lines += [f"# p{n}: {kinds[n]}, here {value}" for n, value in enumerate(program.parameters)]
    slots = [("t", n, x) for n, x in enumerate(program.tables)]
    slots += [("a", n, x) for n, x in enumerate(program.aligned)]
    names = [*labels, *[""] * len(slots)]
    for (letter, n, x), label in zip(slots, names, strict=False):
        lines.append(f"# {letter}{n}: {x.dtype} {tuple(x.shape)}, {label}".rstrip(", "))
    return "\n".join(lines) + "\n"


def _text(node: Expr, texts: dict[int, str]) -> str:
    args = [_Words(texts[id(child)]) for child in node.children]
    if isinstance(node, Apply):
        form = OPERATIONS[node.op].form
        return form.format(*args) if form else f"{node.op}({', '.join(map(repr, args))})"
    if isinstance(node, LoadSlot):
        return f"t{node.table.slot}[{', '.join(map(repr, args))}]"
    if isinstance(node, AlignedSlot):
        part = "" if node.block == 1 else f" // {node.block}"
        return f"a{node.slot}[b, h, row{part}, j{part}]"
    return repr(node)


def _bare(text: str, node: Expr) -> str:
    """Text without the parentheses that an operator's form puts around all of it."""
    form = OPERATIONS[node.op].form if isinstance(node, Apply) else None
    whole = form is not None and text.startswith("(") and text.endswith(")")
    return text[1:-1] if whole else text
