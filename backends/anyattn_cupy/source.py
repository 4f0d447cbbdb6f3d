"""The text of a kernel: constants, the struct of arguments, the printed program, the kernel's files."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

from anyattn.expr.print_cuda import cuda_source
from anyattn.expr.program import Program
from anyattn_cupy.arguments import argument_source
from anyattn_cupy.variants import Variant

__all__ = ["OPTIONS", "kernel_source"]

# No --use_fast_math: the printed program needs NaN and subnormal numbers.
OPTIONS = ("-std=c++17",)
_SHARED_FILES = ("elements.cuh", "work.cuh", "logits.cuh")
_OWN_FILES = {"forward_mma": ("tensor_cores.cuh",)}


def kernel_source(variant: Variant, program: Program, index: str) -> str:
    """CUDA C++ of a kernel for NVRTC, complete; integers of the program are of the type `index`."""
    constants = [f"#define {name} {value}" for name, value in variant.constants().items()]
    named = {
        name: _file(name)
        for name in (*_SHARED_FILES, *_OWN_FILES.get(variant.kernel, ()), f"{variant.kernel}.cu")
    }
    parts = [
        "\n".join(constants) + "\n",
        argument_source(variant.batch_axes),
        cuda_source(program, variant.accumulate, index=index),
        # Messages of the compiler, and line numbers, are those of the files.
        *(f'#line 1 "{name}"\n{text}' for name, text in named.items()),
    ]
    return "\n".join(parts)


@lru_cache
def _file(name: str) -> str:
    return (files("anyattn_cupy") / "kernels" / name).read_text()
