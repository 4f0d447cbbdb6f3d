"""Where a traced function is defined, for what is wrong with all of it: its parameters and what it returns.

Such errors arise outside the function, so no traceback leads to a line. The definition is looked up in the
syntax tree of its file, by the first line of its code; lambdas on one line are told apart by their bodies.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from functools import cached_property
from typing import Any

from anyattn.expr.untraceable import Place, tree_of

__all__ = ["Definition"]

_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Definition:
    """A function, a method, a partial or a callable object, and its source, which is read when asked for."""

    def __init__(self, function: Any):
        self.function = function
        code = getattr(_function(function), "__code__", None)
        self.code = code if isinstance(code, types.CodeType) else None

    @cached_property
    def node(self) -> _Node | None:
        """The definition, or None where there is no source."""
        code = self.code
        tree = None if code is None else tree_of(code.co_filename)
        if code is None or tree is None:
            return None
        found = [node for node in ast.walk(tree) if _is_of(node, code)]
        return found[0] if len(found) == 1 else None  # type: ignore[return-value]

    @property
    def place(self) -> Place | None:
        """The line that the definition begins on."""
        if self.code is None:
            return None
        line = self.code.co_firstlineno if self.node is None else self.node.lineno
        return Place(self.code.co_filename, line, line, 0, 0)

    @property
    def result(self) -> tuple[Place | None, str]:
        """The line of the only `return`, or else of the definition, and what is returned there."""
        if isinstance(self.node, ast.Lambda):
            return self.place, ast.unparse(self.node.body)
        returns = [] if self.node is None else _returns(self.node)
        if self.code is None or len(returns) != 1 or returns[0].value is None:
            return self.place, "result"
        line = returns[0].lineno
        return Place(self.code.co_filename, line, line, 0, 0), ast.unparse(returns[0].value)

    def refuses(self, names: str) -> str | None:
        """What is wrong with the parameters of a function that is called with `names`, or None."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # of a built-in one
            return None
        try:
            inspect.signature(self.function).bind(*names.split(", "))
        except TypeError:
            given = [p.name for p in parameters.values() if p.default is not p.empty]
            own = [name for name in parameters if name not in given]
            if own and own[0] not in names.split(", "):  # "s" for the score
                names = names.replace("score", own[0])
            wanted = ", ".join([names, *(f"{name}=..." for name in given)])
            return f"wanted the parameters ({names}), got ({', '.join(own)}); write {self._written(wanted)}"
        return None

    def _written(self, parameters: str) -> str:
        if isinstance(self.node, ast.Lambda):
            return f"lambda {parameters}: {ast.unparse(self.node.body)}"
        if self.code is None:
            return f"lambda {parameters}: ..."
        bound = not isinstance(self.function, (types.FunctionType, functools.partial))
        own = f"{self.code.co_varnames[0]}, " if bound and self.code.co_argcount else ""
        return f"def {self.code.co_name}({own}{parameters}):"


def _function(function: Any) -> Any:
    """The Python function that a callable runs, as far as it has one."""
    while isinstance(function, (functools.partial, types.MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, types.FunctionType):
        return function
    return getattr(type(function), "__call__", None)  # noqa: B004


def _is_of(node: ast.AST, code: types.CodeType) -> bool:
    if isinstance(node, ast.Lambda) and code.co_name == "<lambda>":
        body = node.body
        own = (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset)
        return own in set(code.co_positions())
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name != code.co_name:
        return False
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno


def _returns(node: ast.AST) -> list[ast.Return]:
    """The `return` statements of a function, without those of functions inside it."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            found.append(child)
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            found += _returns(child)
    return found
