"""The Numba engine on other processors: which vectors they have, and that its code compiles for them.

`nox -s conformance_targets` runs code for older x86-64 processors. Code for AArch64 is compiled to an object
and looked at here, and not executed.
"""

from __future__ import annotations

import re

import pytest

numba = pytest.importorskip("numba", reason="numba is not installed")

from llvmlite import binding as llvm  # noqa: E402

from anyattn_numba import threads  # noqa: E402
from anyattn_numba.decode import decode_kernel  # noqa: E402
from anyattn_numba.forward import forward_kernel  # noqa: E402
from anyattn_numba.target import Target, shape_of, target_of  # noqa: E402

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX512, AVX, SSE2, NEON = Target(64, 32), Target(32, 16), Target(16, 16), Target(16, 32)


@pytest.fixture(scope="module", autouse=True)
def all_targets():
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@pytest.mark.parametrize(
    ("triple", "name", "features", "wanted"),
    [
        (X86, "generic", "", SSE2),
        (X86, "sandybridge", "", AVX),
        (X86, "haswell", "", AVX),
        (X86, "x86-64-v4", "", AVX512),
        (X86, "znver5", "", AVX512),
        (X86, "sapphirerapids", "-avx512f", AVX),
        (X86, "generic", "+avx2,+fma", AVX),
        (X86, "generic", "+avx512f", AVX512),
        (ARM, "generic", "", NEON),
        (ARM, "neoverse-v1", "", NEON),
        ("arm64-apple-darwin", "apple-m1", "", NEON),
    ],
)
def test_registers_are_those_that_llvm_uses(triple, name, features, wanted):
    assert target_of(triple, name, features) == wanted


@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize("target", [AVX512, AVX, SSE2, NEON], ids=["AVX512", "AVX", "SSE2", "NEON"])
def test_a_tile_fits_into_the_registers(target, element):
    shape = shape_of(target, element)
    assert shape.lanes * shape.itemsize == target.vector_bytes
    assert shape.rows * shape.vectors + shape.vectors + 1 <= target.registers


def assembly(kernel, dtype):
    """A kernel for AArch64 in assembly, and as an object."""
    dispatcher = kernel(shape_of(NEON, "float32"), dtype)
    threads.address(dispatcher)
    (text,) = dispatcher.inspect_llvm().values()
    # Numba's own counting of references has become instructions of this processor already.
    text = re.sub(
        r"^define [^\n]*(@NRT_\w+\([^\n]*?\))[^\n]*\{\n.*?^\}\n",
        r"declare void \1\n",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    machine = llvm.Target.from_triple(ARM).create_target_machine(cpu="generic", features="", opt=3)
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = ARM, str(machine.target_data)
    module.verify()
    return machine.emit_assembly(module), machine.emit_object(module)


def function_of(code, name):
    """The lines of a function whose name begins so, and of its longest loop."""
    (body,) = re.findall(rf"^\.L{name}\w*:\n(.*?)^\.Lfunc_end", code, flags=re.MULTILINE | re.DOTALL)
    blocks = re.split(r"^\.L\w+:.*\n", body, flags=re.MULTILINE)
    return body, max(blocks, key=lambda block: len(re.findall("fmla", block)))


@pytest.mark.parametrize(
    ("kernel", "dtype", "inner", "products"),
    [
        (forward_kernel, "float32", ["anyattn_score_8", "anyattn_weigh_8"], 24),
        (decode_kernel, "bfloat16", ["anyattn_narrow_weigh_bfloat16"], 16),
    ],
    ids=["forward", "decode"],
)
def test_aarch64_code_multiplies_by_one_lane_and_spills_nothing(kernel, dtype, inner, products):
    code, compiled = assembly(kernel, dtype)
    assert compiled[:4] == b"\x7fELF"
    assert compiled[18:20] == (183).to_bytes(2, "little"), "EM_AARCH64"
    called = set(re.findall(r"\bbl\s+(\w+)", code))
    assert not called & {"fma", "fmaf"}
    for name in inner:
        _, loop = function_of(code, name)
        fused = re.findall(r"fmla\s+v\d+\.4s, v\d+\.4s, (v\d+\.\S+)", loop)
        assert len(fused) >= products
        assert len(fused) % products == 0
        assert sum(".s[" in operand for operand in fused) >= products // 2
        assert not re.search(r"\[sp\b", loop)
