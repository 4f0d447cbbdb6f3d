"""What Dynamo is told of the symbols that a user's function is read with inside a compiled function.

Two operators never reach a class that defines them (as of torch 2.13): reading a tensor at a tuple that has
symbols in it, and `~`. A `TorchFunctionMode` sees the first; for the second Dynamo gets the rule that it has
for `-`, `+` and `abs`.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anyattn.dynamo import MaskRecipe, SymbolRecipe, load

__all__ = ["Indexing", "learn_invert"]


class Indexing(TorchFunctionMode):  # type: ignore[misc]
    """Reading a tensor at symbols gives a symbol; all else that torch is asked for is done."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = function is torch.Tensor.__getitem__ or function is operator.getitem
        if reads and isinstance(args[1], tuple):
            for key in args[1]:
                if isinstance(key, SymbolRecipe):
                    return load(*args)
        for x in args:
            if isinstance(x, SymbolRecipe):
                return SymbolRecipe.__torch_function__(function, types, args, kwargs)
        return function(*args, **(kwargs or {}))


def learn_invert() -> None:
    """Let Dynamo call `__invert__` of masks and symbols; a torch that has a rule of its own keeps it."""
    builtin = getattr(sys.modules.get("torch._dynamo.variables.builtin"), "BuiltinVariable", None)
    if builtin is None or hasattr(builtin, "call_invert"):
        return

    def call_invert(self: Any, tx: Any, x: Any) -> Any:
        if not isinstance(x, UserDefinedObjectVariable) or x.python_type() not in (MaskRecipe, SymbolRecipe):
            return None
        return x.call_method(tx, "__invert__", [], {})

    from torch._dynamo.variables import UserDefinedObjectVariable

    builtin.call_invert = call_invert
    # Handlers are kept by the types of operands: one that only raises, if a `~` was met before.
    known = builtin.call_function_handler_cache
    for key in [key for key in known if key[0] is operator.invert]:
        del known[key]
