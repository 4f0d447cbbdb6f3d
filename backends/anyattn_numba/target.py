"""What the processor that Numba compiles for can do, and the tile shapes that follow.

The features are those that Numba hands to LLVM, never those of the machine: NUMBA_CPU_NAME and
NUMBA_CPU_FEATURES choose another processor, and an instruction that LLVM was not told of ends the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Shape", "Target", "host", "shape_of"]

# Numba passes no feature string for a processor that is named to it; these have AVX2 and FMA.
_AVX2_NAMES = ("haswell", "broadwell", "skylake", "x86-64-v3", "alderlake", "znver1", "znver2", "znver3")
_AVX512_NAMES = ("skylake-avx512", "x86-64-v4", "icelake-server", "sapphirerapids", "znver4", "znver5")


@dataclass(frozen=True)
class Target:
    """A processor, as far as kernels are written differently for it.

    Attributes
    ----------
    vector_bytes : int
        Bytes of a vector register.
    registers : int
        Number of vector registers.
    """

    vector_bytes: int
    registers: int


@dataclass(frozen=True)
class Shape:
    """The register tile of a micro-kernel: `rows` x `vectors` accumulators of `lanes` numbers.

    Attributes
    ----------
    element : {"float32", "float64"}
        What is accumulated.
    lanes : int
        Queries of a vector: a lane is one query row.
    vectors : int
        Vectors of queries, at most; a block of queries has up to `lanes * vectors`.
    rows : int
        Keys (or value channels) at a time.
    """

    element: str
    lanes: int
    vectors: int
    rows: int

    @property
    def itemsize(self) -> int:
        return 4 if self.element == "float32" else 8

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return self.lanes * self.vectors


def target_of(triple: str, name: str, features: str) -> Target:
    """The target of LLVM's triple, processor name and feature string."""
    have = set(features.split(","))
    if "+avx512f" in have or name in _AVX512_NAMES:
        return Target(vector_bytes=64, registers=32)
    if {"+avx2", "+fma"} <= have or name in _AVX2_NAMES:
        return Target(vector_bytes=32, registers=16)
    if triple.startswith(("aarch64", "arm64")):
        return Target(vector_bytes=16, registers=32)
    return Target(vector_bytes=16, registers=16)


@lru_cache
def host() -> Target:
    """The target of this process."""
    from numba.core.registry import cpu_target

    triple, name, features = map(str, cpu_target.target_context.codegen().magic_tuple())
    return target_of(triple, name, features)


def shape_of(target: Target, element: str) -> Shape:
    """The register tile for numbers of a type.

    Accumulators, the query vectors and one broadcast key must fit into the registers: 8 x 3 + 3 + 1 of 32,
    4 x 3 + 3 + 1 of 16.
    """
    itemsize = 4 if element == "float32" else 8
    return Shape(element, target.vector_bytes // itemsize, 3, 8 if target.registers == 32 else 4)
