"""What `torch.compile` reads in the place of the front door.

Its tracer, Dynamo, follows the bytecode of a function, and cannot follow what anyattn does with expressions,
caches and locks. Where a function has an attribute `_torchdynamo_inline` it reads that one instead. So inside
a compiled function the entries of `masks` and `scores` give recipes, nested tuples of numbers and tensors;
users' functions are called with symbols, which give recipes too; and `attention` hands its recipe and its
tensors to one call of the graph (`anyattn_torch.graph`), which makes of them what they stand for.

Nothing here runs outside of a trace, but for what is marked as constant, and nothing imports torch before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import unwrap
from types import CodeType
from typing import Any

from anyattn import arrays, masks, scores
from anyattn.attention import attention, attention_stats, attention_weights
from anyattn.errors import TraceError
from anyattn.expr import functions
from anyattn.kv_cache import KVCache
from anyattn.masks import Mask
from anyattn.rope import rope
from anyattn.scores import Score

__all__ = [
    "MaskRecipe",
    "ScoreRecipe",
    "SymbolRecipe",
    "install",
    "keep_outside",
    "leave_out",
    "linear",
    "load",
    "packed",
    "read_instead",
]


class MaskRecipe:
    """Stands for a `Mask` in a compiled function."""

    def __init__(self, recipe: Any):
        self.recipe = recipe

    def __and__(self, other: Any) -> MaskRecipe:
        return _and(self, other)

    def __rand__(self, other: Any) -> MaskRecipe:
        return _rand(self, other)

    def __or__(self, other: Any) -> MaskRecipe:
        return _or(self, other)

    def __ror__(self, other: Any) -> MaskRecipe:
        return _ror(self, other)

    def __invert__(self) -> MaskRecipe:
        return MaskRecipe(("not", self.recipe))


class ScoreRecipe:
    """Stands for a `Score` in a compiled function."""

    def __init__(self, recipe: Any):
        self.recipe = recipe

    def __add__(self, other: Any) -> ScoreRecipe:
        return _plus(self, other)

    def __radd__(self, other: Any) -> ScoreRecipe:
        return _rplus(self, other)

    def then(self, other: Any) -> ScoreRecipe:
        """The score `other(self(s))`."""
        return _then(self, other)


class SymbolRecipe:
    """Stands for an expression of indices and scores, while Dynamo reads a user's function."""

    def __init__(self, recipe: Any):
        self.recipe = recipe

    # fmt: off
    def __add__(self, other: Any) -> SymbolRecipe: return _apply("add", self, other)
    def __radd__(self, other: Any) -> SymbolRecipe: return _apply("add", other, self)
    def __sub__(self, other: Any) -> SymbolRecipe: return _apply("sub", self, other)
    def __rsub__(self, other: Any) -> SymbolRecipe: return _apply("sub", other, self)
    def __mul__(self, other: Any) -> SymbolRecipe: return _apply("mul", self, other)
    def __rmul__(self, other: Any) -> SymbolRecipe: return _apply("mul", other, self)
    def __truediv__(self, other: Any) -> SymbolRecipe: return _apply("truediv", self, other)
    def __rtruediv__(self, other: Any) -> SymbolRecipe: return _apply("truediv", other, self)
    def __floordiv__(self, other: Any) -> SymbolRecipe: return _apply("floordiv", self, other)
    def __rfloordiv__(self, other: Any) -> SymbolRecipe: return _apply("floordiv", other, self)
    def __mod__(self, other: Any) -> SymbolRecipe: return _apply("mod", self, other)
    def __rmod__(self, other: Any) -> SymbolRecipe: return _apply("mod", other, self)
    def __pow__(self, other: Any) -> SymbolRecipe: return _apply("pow", self, other)
    def __rpow__(self, other: Any) -> SymbolRecipe: return _apply("pow", other, self)
    def __neg__(self) -> SymbolRecipe: return _apply("neg", self)
    def __pos__(self) -> SymbolRecipe: return self
    def __abs__(self) -> SymbolRecipe: return _apply("abs", self)
    def __invert__(self) -> SymbolRecipe: return _apply("not", self)
    def __and__(self, other: Any) -> SymbolRecipe: return _apply("and", self, other)
    def __rand__(self, other: Any) -> SymbolRecipe: return _apply("and", other, self)
    def __or__(self, other: Any) -> SymbolRecipe: return _apply("or", self, other)
    def __ror__(self, other: Any) -> SymbolRecipe: return _apply("or", other, self)
    def __xor__(self, other: Any) -> SymbolRecipe: return _apply("xor", self, other)
    def __rxor__(self, other: Any) -> SymbolRecipe: return _apply("xor", other, self)
    def __lt__(self, other: Any) -> SymbolRecipe: return _apply("lt", self, other)
    def __le__(self, other: Any) -> SymbolRecipe: return _apply("le", self, other)
    def __gt__(self, other: Any) -> SymbolRecipe: return _apply("gt", self, other)
    def __ge__(self, other: Any) -> SymbolRecipe: return _apply("ge", self, other)
    def __eq__(self, other: Any) -> Any: return _apply("eq", self, other)
    def __ne__(self, other: Any) -> Any: return _apply("ne", self, other)
    # fmt: on
    __hash__ = object.__hash__

    def __getitem__(self, key: Any) -> SymbolRecipe:
        return _apply("load", self, *(key if isinstance(key, tuple) else (key,)))

    def __bool__(self) -> bool:
        raise TraceError(
            "a traced condition has no truth value: write aa.where(condition, x, y) instead of `if`, "
            "`&` `|` `~` instead of `and` `or` `not`"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A captured tensor met a symbol: it is indexed by one, or an operand beside one."""
        import torch

        if function is torch.Tensor.__getitem__:
            return _apply("load", *args)
        return _apply("torch " + function.__name__, *args)


def _apply(operation: str, *args: Any) -> SymbolRecipe:
    return SymbolRecipe((operation, *[_recipe(x) for x in args]))


def _recipe(value: Any) -> Any:
    if isinstance(value, (MaskRecipe, ScoreRecipe, SymbolRecipe)):
        return value.recipe
    if isinstance(value, (Mask, Score)):
        return _made_before(value)
    if isinstance(value, list):
        return ("list", *[_recipe(x) for x in value])
    if isinstance(value, dict):
        return ("dict", *[("tuple", name, _recipe(x)) for name, x in value.items()])
    if isinstance(value, tuple):
        return ("tuple", *[_recipe(x) for x in value])
    return value


def _mask(value: Any) -> Any:
    return _function("mask", value, ("b", "h", "i", "j")) if _is_function(value) else _recipe(value)


def _score(value: Any) -> Any:
    if _is_function(value):
        return _function("score", value, ("score", "b", "h", "i", "j"))
    return _recipe(value)


def _is_function(value: Any) -> bool:
    known = isinstance(value, (MaskRecipe, ScoreRecipe, Mask, Score))
    return not known and not hasattr(value, "shape") and callable(value)


def _function(kind: str, function: Callable[..., Any], names: tuple[str, ...]) -> Any:
    from anyattn_torch.symbols import Indexing

    _learn_invert()
    symbols = [SymbolRecipe(("symbol", name)) for name in names]
    with Indexing():
        return ("function", kind, _recipe(function(*symbols)))


def load(tensor: Any, keys: tuple[Any, ...]) -> SymbolRecipe:
    """The recipe of a captured tensor's element."""
    for key in keys:
        if key is None or key is Ellipsis or isinstance(key, slice):
            raise TraceError(
                "a traced function computes one number at each index: index every axis of a captured tensor "
                "by a number or an expression, or take the part outside the function"
            )
    return _apply("load", tensor, *keys)


def _learn_invert() -> None:
    from anyattn_torch import symbols

    symbols.learn_invert()


_learn_invert._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _made_before(value: Mask | Score) -> Any:
    """A mask or score that was made outside: its key, and the tensors that stand in it."""
    key, paths = _remember(value)
    found = []
    for path in paths:
        x: Any = value
        for step in path:
            x = x[step] if isinstance(step, int) else getattr(x, step)
        found.append(x)
    return ("object", key, *found)


def _remember(value: Mask | Score) -> Any:
    from anyattn_torch import recipes

    return recipes.remember(value)


_remember._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _numbered(recipe: Any, tensors: list[Any]) -> Any:
    """A recipe with numbers of tensors in their place."""
    if isinstance(recipe, tuple):
        return tuple([_numbered(x, tensors) for x in recipe])
    # Numbers first: of one that stays open in the graph, Dynamo does not say what attributes it has.
    if not isinstance(recipe, (bool, int, float, str)) and hasattr(recipe, "shape"):
        tensors.append(recipe)
        return ("tensor", len(tensors) - 1)
    return recipe


def _attention(q: Any, k: Any, v: Any = None, **options: Any) -> Any:
    from anyattn_torch.graph import attention_in_graph

    if not hasattr(k, "shape"):
        k, v, options = _of_cache(q, k, v, options)
    if v is None:
        raise TypeError("v: wanted an array, got NoneType")
    tensors = [q, k, v]
    return attention_in_graph(tensors, _options(options, tensors))


def _of_cache(q: Any, cache: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Keys, values and options that say what a cache says, whose lengths the graph is given as they are."""
    import torch

    if v is not None:
        raise TypeError("v: wanted None where k is a cache, which holds the values")
    if type(cache) is not KVCache or cache.window is not None or cache.k.dtype != q.dtype:
        raise TypeError(
            "k: a compiled function attends to a KVCache without a window in the dtype of q, or to arrays; "
            "call attention with any other cache outside of it"
        )
    for name in ("kv_lengths", "q_offset"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: wanted None with a cache, which knows it")
    k, v = cache.k, cache.v
    if any(options.get(name) is not None for name in ("mask", "bias", "score_mod")):
        # Some of these count keys. A number that changes compiles once more, then it is a size of the graph.
        k, v = k[..., : cache.longest, :], v[..., : cache.longest, :]
    blhd = options.get("layout") == "blhd"
    lengths = torch.as_tensor(cache._lengths).to(k.device)
    found = {"kv_lengths": lengths, "q_offset": lengths - q.shape[-3 if blhd else -2]}
    if blhd:
        k, v = k.transpose(-2, -3), v.transpose(-2, -3)
    return k, v, {**options, **found}


def packed(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Any:
    """`varlen_attention` in a compiled function."""
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return _attention(q, k, v, **starts, **options)


def linear(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """`linear_attention` in a compiled function."""
    from anyattn_torch.graph import call_in_graph

    tensors = [q, k, v]
    return call_in_graph("linear_attention", 3, tensors, _options(options, tensors))


def _weights(q: Any, k: Any, **options: Any) -> Any:
    from anyattn_torch.graph import call_in_graph

    tensors = [q, k]
    return call_in_graph("attention_weights", 2, tensors, _options(options, tensors))


def _stats(q: Any, k: Any, **options: Any) -> Any:
    from anyattn_torch.graph import call_in_graph

    tensors = [q, k]
    found = call_in_graph("attention_stats", 2, tensors, _options(options, tensors))
    return dict(zip(options.get("stats", ("key_mass",)), found, strict=True))


def _rope(x: Any, positions: Any, **options: Any) -> Any:
    from anyattn_torch.graph import call_in_graph

    tensors = [x]
    return call_in_graph("rope", 1, tensors, _options({"positions": positions, **options}, tensors))


def _options(options: dict[str, Any], tensors: list[Any]) -> Any:
    """The recipes of keyword arguments by name; their tensors are added to `tensors`."""
    found = []
    for name, value in options.items():
        if value is not None:
            recipe = (
                _mask(value) if name == "mask" else _score(value) if name == "score_mod" else _recipe(value)
            )
            found.append((name, recipe))
    return _numbered(tuple(found), tensors)


def _and(self: Any, other: Any) -> MaskRecipe:
    return MaskRecipe(("and", _mask(self), _mask(other)))


def _rand(self: Any, other: Any) -> MaskRecipe:
    return MaskRecipe(("and", _mask(other), _mask(self)))


def _or(self: Any, other: Any) -> MaskRecipe:
    return MaskRecipe(("or", _mask(self), _mask(other)))


def _ror(self: Any, other: Any) -> MaskRecipe:
    return MaskRecipe(("or", _mask(other), _mask(self)))


def _plus(self: Any, other: Any) -> ScoreRecipe:
    return ScoreRecipe(("plus", _score(self), _score(other)))


def _rplus(self: Any, other: Any) -> ScoreRecipe:
    return ScoreRecipe(("plus", _score(other), _score(self)))


def _then(self: Any, other: Any) -> ScoreRecipe:
    return ScoreRecipe(("then", _score(self), _score(other)))


def _entry(kind: type, module: str, name: str) -> Callable[..., Any]:
    def entry(*args: Any, **options: Any) -> Any:
        _learn_invert()
        positional = ("tuple", *[_recipe(x) for x in args])
        return kind(
            ("entry", module, name, positional, tuple([(key, _recipe(x)) for key, x in options.items()]))
        )

    return entry


def _from_mask_function(function: Any) -> MaskRecipe:
    return MaskRecipe(_mask(function))


def _from_score_function(function: Any) -> ScoreRecipe:
    return ScoreRecipe(_score(function))


def _call(name: str) -> Callable[..., SymbolRecipe]:
    def call(*args: Any) -> SymbolRecipe:
        return _apply(name, *args)

    return call


def _dtype_name(x: Any) -> str:
    return str(x.dtype).rpartition(".")[2]


def _device(x: Any) -> Any:
    return x.device


def _namespace(x: Any) -> Any:
    from array_api_compat import torch

    return torch


def read_instead(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Let Dynamo read `replacement` where a compiled function calls `function`."""
    function._torchdynamo_inline = replacement  # type: ignore[attr-defined]


def leave_out(function: Callable[..., Any], reason: str) -> None:
    """Break the graph where a compiled function calls `function`, or say why with ``fullgraph=True``."""
    inner: Any = unwrap(function)
    both: tuple[Any, Any] = (function, inner)
    for each in both:
        each._torchdynamo_disable, each._torchdynamo_disable_msg = True, reason
    _outside.append(inner.__code__)
    keep_outside()


# The code of functions that are left out.
_outside: list[CodeType] = []


def keep_outside() -> None:
    """Let Dynamo pass over what functions that are left out call, which it would compile one by one."""
    eval_frame: Any = sys.modules.get("torch._C._dynamo.eval_frame")
    # Private names, which older torch has not and a later one may rename: they save compile time alone.
    with suppress(AttributeError):
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        for code in _outside:
            eval_frame.set_code_exec_strategy(code, strategy)


_HOST = "a cache counts its tokens on the host; add them outside of the compiled function"


def install() -> None:
    """Give the front door, the entries and the functions of traced functions what Dynamo is to read."""
    inline: dict[Callable[..., Any], Callable[..., Any]] = {attention: _attention, rope: _rope}
    inline[attention_weights] = _weights
    inline[attention_stats] = _stats
    for name in masks.__all__:
        if name not in ("Mask", "from_function"):
            inline[getattr(masks, name)] = _entry(MaskRecipe, "masks", name)
    for name in scores.__all__:
        if name not in ("Score", "from_function"):
            inline[getattr(scores, name)] = _entry(ScoreRecipe, "scores", name)
    inline[masks.from_function] = _from_mask_function
    inline[scores.from_function] = _from_score_function
    for name in functions.__all__:
        inline[getattr(functions, name)] = _call(name)
    # Operators of what was made outside, beside a recipe. Dynamo has no rule for `~`.
    inline |= {Mask.__and__: _and, Mask.__rand__: _rand, Mask.__or__: _or, Mask.__ror__: _ror}
    inline |= {Score.__add__: _plus, Score.__radd__: _rplus, Score.then: _then}
    # Caches would be guarded as they were before the call that fills them, or warned of.
    inline |= {arrays.dtype_name: _dtype_name, arrays._library_of_type: arrays._find_library}
    inline |= {arrays.device: _device, arrays.namespace: _namespace}
    for function, replacement in inline.items():
        read_instead(function, replacement)
    for method in (KVCache.__init__, KVCache.append, KVCache.extend, KVCache.crop, KVCache.reorder):
        leave_out(method, _HOST)
