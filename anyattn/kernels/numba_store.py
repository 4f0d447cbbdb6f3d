"""Numba's machine code in anyattn's cache, in place of Numba's own disk cache.

Numba's own (0.68) loads code compiled by another process for another signature when several write at once,
does not notice a changed intrinsic, raises on a truncated file, aborts the process on altered machine code
and lets a full disk out of the call. Here every signature is one entry under its complete key.

There is no public way to replace that cache, so this file touches private parts of Numba: a dispatcher's
`_cache` and its five methods, and `CompileResult._reduce` and `_rebuild`. They are all used here and looked
for first; where they differ, kernels are compiled in every process and a message says so.
"""

from __future__ import annotations

import pickle
from functools import lru_cache
from inspect import signature
from typing import Any

import llvmlite
import numba
import numpy
from numba.core import config
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys

from anyattn.kernels.cache import Store, say
from anyattn.kernels.key import KernelKey, common_versions

__all__ = ["attach", "numba_settings", "numba_target", "numba_versions"]

# What Numba asks of a dispatcher's cache.
_METHODS = {"cache_path", "disable", "enable", "flush", "load_overload", "save_overload"}


def attach(dispatcher: Any, key: KernelKey, store: Store | None) -> bool:
    """Let a jitted function load its machine code from `store` and keep it there.

    Parameters
    ----------
    dispatcher : numba dispatcher
        Of a module of `load_source`, not compiled yet, and without `cache=True`.
    key : KernelKey
        Of the source; the types of the arguments are added here.
    store : Store or None
        None: nothing is kept.

    Returns
    -------
    bool
        Whether machine code is kept.
    """
    if store is None:
        return False
    flaw = _incompatibility()
    if flaw is None and not hasattr(dispatcher, "_cache"):
        flaw = f"{type(dispatcher).__name__} has no _cache"
    if flaw is not None:
        say(f"kernels are not kept: Numba {numba.__version__} is not as anyattn knows it: {flaw}")
        return False
    dispatcher._cache = _SignatureCache(key, store)
    return True


def numba_target() -> str:
    """Triple, name and features of the CPU that Numba compiles for."""
    return " ".join(_codegen(cpu_target.target_context))


def numba_versions() -> dict[str, str]:
    """The versions that a Numba kernel's key holds."""
    return {
        **common_versions(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": numpy.__version__,
    }


def numba_settings(options: dict[str, Any]) -> dict[str, str]:
    """The compiler's settings for a Numba kernel's key: options of `njit`, and what the environment sets."""
    names = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "USING_SVML")
    found = {f"NUMBA_{name}": str(getattr(config, name, None)) for name in names}
    for name, value in options.items():
        # The order of a set of flags is another one in each process.
        found[name] = repr(sorted(value) if isinstance(value, (set, frozenset)) else value)
    return found


class _SignatureCache:
    """What Numba asks of a dispatcher's cache."""

    def __init__(self, key: KernelKey, store: Store):
        self._key = key
        self._store = store

    @property
    def cache_path(self) -> str:
        return str(self._store.folder)

    def enable(self) -> None:
        """Numba's switch; ANYATTN_CACHE is ours."""

    def disable(self) -> None:
        """Numba's switch; ANYATTN_CACHE is ours."""

    def flush(self) -> None:
        """`recompile` asks for this; entries of a complete key need no removal."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # All that machine code needs; `refresh`, which compiling needs and does, takes another 0.2 s.
        rtsys.initialize(target_context)
        target = _codegen(target_context)
        payload = self._store.read(self._entry(sig, target))
        if payload is None:
            return None
        from numba.core.compiler import CompileResult

        rebuild: Any = CompileResult._rebuild
        try:
            kept, reduced = pickle.loads(payload)
            if kept != (sig, target):  # types of one name that differ all the same
                return None
            return rebuild(target_context, *reduced)
        # The entry is whole and ours; what can fail is Numba's private code, and a call must not.
        except Exception as error:  # noqa: BLE001
            say(f"a kernel of {self._store.folder} does not load, and is compiled anew: {_words(error)}")
            return None

    def save_overload(self, sig: Any, result: Any) -> None:
        from numba.core import serialize

        dumps: Any = serialize.dumps
        target = _codegen(result.target_context)
        try:
            if result.lifted or result.library.has_dynamic_globals:
                raise ValueError("it holds addresses of this process or lifted loops")
            payload = dumps(((sig, target), result._reduce()))
        # What was just compiled runs whether it can be kept or not.
        except Exception as error:  # noqa: BLE001
            say(f"kernel {self._key.summary} is not kept: {_words(error)}")
            return
        self._store.write(self._entry(sig, target), payload)

    def _entry(self, sig: Any, target: tuple[str, ...]) -> KernelKey:
        return self._key.of_signature(str(sig), " ".join(target))


def _codegen(target_context: Any) -> tuple[str, ...]:
    return tuple(map(str, target_context.codegen().magic_tuple()))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@lru_cache
def _incompatibility() -> str | None:
    """What is missing of the private parts that this file uses."""
    try:
        from numba.core.caching import NullCache
        from numba.core.compiler import CompileResult
        from numba.core.serialize import dumps  # noqa: F401  used by _SignatureCache
    except ImportError as error:
        return str(error)
    methods = {name for name in dir(NullCache) if not name.startswith("_")}
    if methods != _METHODS:
        return f"its caches differ in {', '.join(sorted(methods ^ _METHODS))}"
    for name in ("load_overload", "save_overload"):
        if len(signature(getattr(NullCache, name)).parameters) != 3:
            return f"{name} has other parameters"
    for name in ("_reduce", "_rebuild"):
        if not hasattr(CompileResult, name):
            return f"CompileResult has no {name}"
    return None
