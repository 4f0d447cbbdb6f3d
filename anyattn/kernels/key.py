"""The key of a kernel: everything that its machine code depends on, in a form that people can read.

A kernel that is loaded under the wrong key computes something else, so the key holds the parts themselves and
not hashes of them, the cache compares its whole text, and two keys are equal exactly when their texts are.
The digest only names files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

from anyattn.numbers import integer

__all__ = ["GENERATOR", "KernelKey", "code_digest", "common_versions"]

# Raised whenever a printer or a kernel template gives other code for the same structure.
GENERATOR = 1

_NAME = re.compile(r"[a-z][a-z0-9_]*")
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KernelKey:
    """What a compiled kernel depends on; equal keys may share machine code.

    Attributes
    ----------
    backend, kernel : str
        Which backend made it and what it computes ("forward"); lower-case identifiers.
    structure : str
        `Program.text`, the expressions without captured values.
    dtype, accumulate : str
        dtype of q, k and v, and the one of scores and sums.
    head_dim, v_head_dim : int
    target : str
        The processor: triple, name and features of a CPU, the architecture of a GPU.
    tiles : mapping of str to int
        Tile sizes by name.
    features : iterable of str
        Feature flags that change the code; their order does not matter.
    settings : mapping of str to str
        Options of the compiler.
    versions : mapping of str to str
        Versions of everything that has a part in the code; see `common_versions`.
    code : str
        `code_digest` of the generated source and of the modules that it calls.
    signature : str
        Types of the kernel's arguments, where one source is compiled for several.
    """

    backend: str
    kernel: str
    structure: str
    dtype: str
    accumulate: str
    head_dim: int
    v_head_dim: int
    target: str
    tiles: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    features: Iterable[str] = ()
    settings: Mapping[str, str] | Pairs = ()
    versions: Mapping[str, str] | Pairs = ()
    code: str = ""
    signature: str = ""

    def __post_init__(self) -> None:
        for name in ("backend", "kernel"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"{name}: wanted a lower-case identifier, it becomes part of a file name; "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("head_dim", "v_head_dim"):
            object.__setattr__(self, name, integer(getattr(self, name), name, least=0))
        tiles = {name: integer(size, f"tiles: {name}", least=1) for name, size in dict(self.tiles).items()}
        object.__setattr__(self, "tiles", tuple(sorted(tiles.items())))
        object.__setattr__(self, "features", tuple(sorted(set(self.features))))
        for name in ("settings", "versions"):
            object.__setattr__(self, name, tuple(sorted(dict(getattr(self, name)).items())))

    @cached_property
    def text(self) -> str:
        """The whole key as JSON, fields in a fixed order."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        parts["structure"] = self.structure.split("\n")
        for name in ("tiles", "settings", "versions"):
            parts[name] = dict(parts[name])
        return json.dumps(parts, indent=1, ensure_ascii=False)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of the SHA-256 of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        """The name of the kernel's files, without suffix."""
        return f"anyattn-{self.backend}-{self.kernel}-{self.digest}"

    @property
    def summary(self) -> str:
        """One line for a listing; several kernels may share it."""
        parts = [self.backend, self.kernel, self.dtype, f"D={self.head_dim}", f"Dv={self.v_head_dim}"]
        parts += [f"{name}={size}" for name, size in dict(self.tiles).items()]
        return " ".join([*parts, *self.features])

    def of_signature(self, signature: str, target: str) -> KernelKey:
        """The key of this kernel for some types of arguments on a processor."""
        return replace(self, signature=signature, target=target)

    @classmethod
    def parse(cls, text: str) -> KernelKey:
        """The key that has this `text`.

        Raises
        ------
        ValueError
            If no key has it.
        """
        try:
            parts = json.loads(text)
            key = cls(**{**parts, "structure": "\n".join(parts["structure"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the text of a kernel's key: {error}") from error
        if key.text != text:
            raise ValueError("not the text of a kernel's key: it would be written differently")
        return key

    def __str__(self) -> str:
        return self.text


def common_versions() -> dict[str, str]:
    """Versions that every kernel's key holds; a backend adds those of its compiler."""
    import anyattn

    python = f"{sys.implementation.name} {platform.python_version()}{getattr(sys, 'abiflags', '')}"
    return {"anyattn": anyattn.__version__, "generator": str(GENERATOR), "python": python}


def code_digest(source: str, modules: Iterable[ModuleType] = ()) -> str:
    """A hash of generated source and of the modules that it calls.

    Versions alone miss a helper that changed in a source tree, and compilers inline helpers.
    """
    found = hashlib.sha256(source.encode())
    for module in sorted(modules, key=lambda m: m.__name__):
        if module.__file__ is None:
            raise ValueError(f"modules: {module.__name__} has no source file")
        found.update(f"\n{module.__name__}\n".encode())
        found.update(Path(module.__file__).read_bytes())
    return found.hexdigest()
