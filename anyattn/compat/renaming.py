"""Errors of the contract in the words of the function that was called.

A translated call is checked once, by `anyattn.attention`, under the contract's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["renaming"]

P = ParamSpec("P")
R = TypeVar("R")
# Messages of anyattn open with the arguments that they are about; others are left alone.
_ABOUT_ARGUMENTS = re.compile(r"[a-z_]+(, [a-z_]+)*:")


def renaming(names: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let errors about arguments use other names for them: {"q": "query"}."""
    words = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, names))})(?!\w)")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError, NotImplementedError) as error:
                message = error.args[0] if error.args else None
                if isinstance(message, str) and _ABOUT_ARGUMENTS.match(message):
                    error.args = (words.sub(lambda word: names[word[0]], message), *error.args[1:])
                raise

        return call

    return decorate
