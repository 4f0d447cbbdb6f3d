"""From a recipe, which `anyattn.dynamo` makes inside a compiled function, to the arguments of `attention`.

A recipe is nested tuples whose first entry says what the rest is; ("tensor", n) is the n-th of the tensors
that go with it. As text it is the name of what an operation of the graph computes, so it holds numbers and
names only: floats as hexadecimal text, and of masks and scores that were made before a key under which they
are kept here.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

import torch

from anyattn import arrays, masks, scores
from anyattn.errors import TraceError
from anyattn.expr import functions
from anyattn.expr.captures import arrays_of
from anyattn.expr.nodes import Aligned, Deferred, Expr, Load, Size, Table, load, rewrite, walk
from anyattn.expr.structure import is_given, structure
from anyattn.expr.tables import table_of
from anyattn.masks import Mask
from anyattn.scores import Score

__all__ = ["as_text", "options_of", "read", "remember", "with_derived"]

Tensors = Sequence[torch.Tensor]

# Masks and scores that were made outside of a compiled function, without their tensors, by what they are
# apart from these: the last used ones, as nobody tells when a graph that names one is gone.
_known: OrderedDict[str, Mask | Score] = OrderedDict()
_KEPT = 1024
_lock = threading.Lock()


def remember(value: Mask | Score) -> tuple[str, tuple[tuple[str | int, ...], ...]]:
    """The key of a mask or score, and the ways to its tensors: names of attributes and places in tuples."""
    found = structure(value.expr)
    if found.text is None:
        key = uuid4().hex
    else:
        content = [type(value).__name__, found.text]
        for part in found.arrays:
            if is_given(part):
                content.append(f"{part.kind} {part.value.ndim}")
            else:
                content.append(f"{part.value.dtype} {part.value.shape} {part.value.tobytes().hex()}")
        key = hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]
    given, paths = _given(value.expr), _paths(value.expr)
    bare = copy.copy(value)
    bare.expr, bare.reads = _over(value.expr, [None] * len(given)), ()
    with _lock:
        _known[key] = bare
        _known.move_to_end(key)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return key, tuple(("expr", *paths[id(part)], "value") for part in given)


def _given(root: Expr) -> list[Table | Aligned]:
    """The parts of an expression that hold a caller's tensor, each once."""
    found: dict[int, Table | Aligned] = {}
    for node in walk(root):
        for part in arrays_of(node):
            if is_given(part):
                found.setdefault(id(part), part)
    return list(found.values())


def _paths(root: Expr) -> dict[int, tuple[str | int, ...]]:
    """The way from a node to each part of it that holds an array."""
    found: dict[int, tuple[str | int, ...]] = {}
    todo: list[tuple[Expr, tuple[str | int, ...]]] = [(root, ())]
    seen: set[int] = set()
    while todo:
        node, path = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, (Load, Size)):
            found.setdefault(id(node.table), (*path, "table"))
        elif isinstance(node, Deferred):
            for n, table in enumerate(node.tables):
                found.setdefault(id(table), (*path, "tables", n))
        elif isinstance(node, Aligned):
            found.setdefault(id(node), path)
        todo += [(child, (*path, "children", n)) for n, child in enumerate(node.children)]
    return found


def as_text(recipe: Any) -> str:
    """A recipe as text, which `read` takes."""
    return repr(_plain(recipe))


def _plain(recipe: Any) -> Any:
    if isinstance(recipe, (tuple, list)):
        return tuple(_plain(x) for x in recipe)
    if isinstance(recipe, (bool, str)) or recipe is None:
        return recipe
    if isinstance(recipe, (float, torch.SymFloat)):
        return ("float", float(recipe).hex())
    return int(recipe)


@lru_cache(maxsize=1024)
def read(text: str) -> dict[str, Any]:
    """The recipes of options by name."""
    return dict(ast.literal_eval(text))


def _derives(recipe: Any) -> bool:
    """Whether a score reads arrays that are computed from tensors."""
    if not isinstance(recipe, tuple):
        return False
    if recipe[:1] == ("object",):
        return any(isinstance(n, Deferred) and n.derive is not None for n in walk(_bare(recipe[1]).expr))
    return recipe[:3] == ("entry", "scores", "relative_keys") or any(_derives(x) for x in recipe)


def with_derived(text: str, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], str]:
    """The tensors, those that a score derives from them, and the recipe of a call that reads these."""
    options = read(text)
    if not _derives(options.get("score_mod")):
        return tensors, text
    accumulate = "float64" if tensors[0].dtype == torch.float64 else "float32"
    xp = arrays.namespace(tensors[0])
    found = [
        node.derive(xp, accumulate, *(table.value for table in node.tables))
        for node in walk(_made(options["score_mod"], tensors).expr)
        if isinstance(node, Deferred) and node.derive is not None
    ]
    places = (("tensor", len(tensors) + n) for n in range(len(found)))
    recipe = options | {"score_mod": ("derived", options["score_mod"], *places)}
    return [*tensors, *found], as_text(tuple(recipe.items()))


def _with_derived(score: Score, derived: Tensors) -> Score:
    """A score that takes what it would derive."""
    left = list(derived)

    def change(node: Expr) -> Expr:
        if isinstance(node, Deferred) and node.derive is not None:
            return replace(node, tables=(*node.tables, table_of(left.pop(0), "derived")))
        return node

    other = copy.copy(score)
    other.expr = rewrite(score.expr, change)
    return other


def options_of(text: str, tensors: Tensors) -> dict[str, Any]:
    """The keyword arguments of `attention` or `varlen_attention` that a recipe stands for."""
    return {name: _made(recipe, tensors) for name, recipe in read(text).items()}


def _made(recipe: Any, tensors: Tensors) -> Any:
    """What a recipe stands for."""
    if not isinstance(recipe, tuple):
        return recipe
    what, *rest = recipe
    if what == "float":
        return float.fromhex(rest[0])
    if what == "tensor":
        return tensors[rest[0]]
    if what == "function":
        return _traced(rest[0], rest[1], tensors)
    if what == "object":
        return _remembered(rest[0], [_made(x, tensors) for x in rest[1:]])
    if what == "entry":
        module, name, args, options = rest
        entry = getattr({"masks": masks, "scores": scores}[module], name)
        return entry(*_made(args, tensors), **{key: _made(x, tensors) for key, x in options})
    parts = [_made(x, tensors) for x in rest]
    if what in ("list", "tuple"):
        return parts if what == "list" else tuple(parts)
    if what == "dict":
        return dict(parts)
    if what == "derived":
        return _with_derived(parts[0], parts[1:])
    if what == "then":
        return parts[0].then(parts[1])
    joined: Any = _JOINED[what](*parts)
    return joined


_JOINED: dict[str, Callable[..., Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.invert,
    "plus": operator.add,
}


def _remembered(key: str, tensors: list[torch.Tensor]) -> Mask | Score:
    """A mask or score that was made before, over other tensors."""
    value = copy.copy(_bare(key))
    value.expr = _over(value.expr, tensors)
    return value


def _bare(key: str) -> Mask | Score:
    """A mask or score that was made before, without tensors."""
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    raise RuntimeError(
        f"a compiled graph names a mask or score that this process has not made, or whose graph did not run "
        f"while {_KEPT} others did: build it inside the compiled function, or compile again after "
        f"torch._dynamo.reset()"
    )


def _over(root: Expr, tensors: Sequence[torch.Tensor | None]) -> Expr:
    """An expression with these in the places of the caller's tensors."""
    new = {id(part): replace(part, value=x) for part, x in zip(_given(root), tensors, strict=True)}

    def change(node: Expr) -> Expr:
        if isinstance(node, Load):
            return load(new.get(id(node.table), node.table), node.indices)  # type: ignore[arg-type]
        if isinstance(node, Size):
            return replace(node, table=new.get(id(node.table), node.table))  # type: ignore[arg-type]
        if isinstance(node, Deferred):
            return replace(node, tables=tuple(new.get(id(t), t) for t in node.tables))  # type: ignore[misc]
        found: Any = new.get(id(node), node)
        return found  # type: ignore[no-any-return]

    return rewrite(root, change) if new else root


def _traced(kind: str, recipe: Any, tensors: Tensors) -> Mask | Score:
    """The mask or score of a function that Dynamo read."""
    held = tuple(tensors)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return _value(recipe, {"b": b, "h": h, "i": i, "j": j}, held)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return _value(recipe, {"score": s, "b": b, "h": h, "i": i, "j": j}, held)

    return masks.from_function(mask) if kind == "mask" else scores.from_function(score)


def _value(recipe: Any, symbols: dict[str, Any], held: Any) -> Any:
    """The value of a function's recipe, by the operators that the function used."""
    if not isinstance(recipe, tuple):
        return recipe
    what, *rest = recipe
    if what == "float":
        return float.fromhex(rest[0])
    if what == "symbol":
        return symbols[rest[0]]
    if what == "tensor":
        return held[rest[0]]
    args = [_value(x, symbols, held) for x in rest]
    if what == "tuple":
        return tuple(args)
    if what == "load":
        index = args[1] if len(args) == 2 else tuple(args[1:])
        return args[0][index]
    if what in _OPERATORS:
        return _OPERATORS[what](*args)
    if what in functions.__all__:
        return getattr(functions, what)(*args)
    name = what.removeprefix("torch ").strip("_")
    if name not in _OF_TENSORS:
        known = ", ".join(functions.__all__)
        raise TraceError(f"torch.{name} is not known in a traced function; anyattn has {known}")
    operation, swapped = _OF_TENSORS[name]
    return _OPERATORS[operation](*(args[::-1] if swapped else args))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "abs": operator.abs,
    "not": operator.invert,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}

# What Dynamo calls an operator between a tensor, which it puts first, and something else; whether it swapped
# them.
_OF_TENSORS: dict[str, tuple[str, bool]] = {name: (name, False) for name in _OPERATORS}
_OF_TENSORS |= {f"r{name}": (name, True) for name in _OPERATORS}
_OF_TENSORS |= {f"bitwise_{name}": (name, False) for name in ("and", "or", "xor")}
_OF_TENSORS |= {
    "div": ("truediv", False),
    "true_divide": ("truediv", False),
    "rdiv": ("truediv", True),
    "floor_divide": ("floordiv", False),
    "remainder": ("mod", False),
}
