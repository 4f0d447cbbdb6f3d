"""What the processor that Numba compiles for can do, and the tile shapes that follow.

The features are those that Numba hands to LLVM, never those of the machine: NUMBA_CPU_NAME and
NUMBA_CPU_FEATURES choose another processor, and an instruction that LLVM was not told of ends the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import binding

__all__ = ["Shape", "Target", "host", "shape_of", "target_of"]

llvm: Any = binding

_PROBE = """
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
define <16 x float> @probe(<16 x float> %x, <16 x float> %y, <16 x float> %z) {
  %sum = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %x, <16 x float> %y, <16 x float> %z)
  ret <16 x float> %sum
}
"""


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
    """The target of LLVM's triple, processor name and feature string.

    LLVM is asked which registers it uses, in some milliseconds: what a name stands for is in its tables
    alone, and a feature that is taken away (a virtual machine without AVX-512) overrules the name.
    """
    probe = llvm.parse_assembly(_PROBE)
    probe.triple = triple
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    code = machine.emit_assembly(probe)
    if "%zmm" in code:
        return Target(vector_bytes=64, registers=32)
    if "%ymm" in code:
        return Target(vector_bytes=32, registers=16)
    return Target(vector_bytes=16, registers=32 if triple.startswith(("aarch64", "arm64")) else 16)


@lru_cache
def host() -> Target:
    """The target of this process."""
    from numba.core.registry import cpu_target

    triple, name, features = map(str, cpu_target.target_context.codegen().magic_tuple())
    return target_of(triple, name, features)


def shape_of(target: Target, element: str) -> Shape:
    """The register tile for numbers of a type.

    Accumulators, the query vectors and one broadcast key must fit into the registers: 8 x 3 + 3 + 1 of 32,
    4 x 3 + 3 + 1 of 16. SSE2, which multiplies and adds in two steps, wants one more and spills one; 3 x 3,
    which does not, is as fast (29 GFLOP/s) and leaves a rest of most head dimensions.
    """
    itemsize = 4 if element == "float32" else 8
    return Shape(element, target.vector_bytes // itemsize, 3, 8 if target.registers == 32 else 4)
