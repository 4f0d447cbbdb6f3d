"""The text of a kernel: constants, the struct of arguments, the printed program, the kernel's files."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

from anyattn.expr.print_cuda import cuda_source
from anyattn.expr.program import Program
from anyattn_cupy.arguments import argument_source
from anyattn_cupy.variants import Variant

__all__ = ["OPTIONS", "combine_source", "joined", "kernel_source"]

# No --use_fast_math: the printed program needs NaN. CuPy adds -ftz=true, which nobody can turn off.
OPTIONS = ("-std=c++17",)
_SHARED_FILES = ("elements.cuh", "work.cuh", "logits.cuh")
_OWN_FILES = {
    "forward_fma": ("products.cuh",),
    "forward_mma": ("tensor_cores.cuh",),
    "inspect": ("products.cuh",),
}


def kernel_source(variant: Variant, program: Program, index: str) -> str:
    """CUDA C++ of a kernel for NVRTC, complete; integers of the program are of the type `index`."""
    names = (*_SHARED_FILES, *_OWN_FILES[variant.kernel], f"{variant.kernel}.cu")
    printed = cuda_source(program, variant.accumulate, index=index)
    return joined(variant.constants(), argument_source(variant.batch_axes), printed, names)


def combine_source(variant: Variant) -> str:
    """CUDA C++ of the kernel that merges the parts of results."""
    arguments = argument_source(variant.batch_axes)
    return joined(variant.constants(), arguments, "", ("elements.cuh", "combine.cu"))


def joined(constants: dict[str, int], arguments: str, program: str, names: tuple[str, ...]) -> str:
    """Constants, the struct of arguments, a printed program and files of `kernels` as one text."""
    macros = [f"#define {name} {value}" for name, value in constants.items()]
    # Messages of the compiler, and line numbers, are those of the files.
    parts = [f'#line 1 "{name}"\n{_file(name)}' for name in names]
    return "\n".join(["\n".join(macros) + "\n", arguments, program, *parts])


@lru_cache
def _file(name: str) -> str:
    return (files("anyattn_cupy") / "kernels" / name).read_text()
