"""The model of performance: its counts are those of interpreter and machine code, its tiles those chosen."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from cuda_compile import compiled, need_nvrtc
from cuda_model import A100, H100, Tile, predict
from cuda_standin import SHARED_MEMORY, Standin
from missing import missing

from anyattn.describe import Options, describe
from anyattn.expr.program import lower
from anyattn_cupy import launch, variants
from anyattn_cupy.source import OPTIONS, kernel_source
from anyattn_cupy.variants import Device, choose

# dtype, compute capability and channels: every tile that common calls take.
KERNELS = (
    ("float16", 80, 64), ("float16", 80, 128), ("float16", 86, 128), ("float32", 80, 64),
    ("float32", 75, 128),
)  # fmt: skip


def chosen(dtype, capability, dim):
    return choose(Device(capability, SHARED_MEMORY[capability]), dtype, dim, dim, True)


def machine(dtype, capability, dim, tiles):
    """One block of rows against so many tiles of keys, run and counted."""
    standin = Standin(capability, count=True)
    variant = chosen(dtype, capability, dim)
    rng = np.random.default_rng(1)
    lengths = variant.rows, tiles * variant.keys, tiles * variant.keys
    host = [rng.standard_normal((1, n, dim)).astype(dtype) for n in lengths]
    call = describe("attention", *host, Options())
    for name, x in zip("qkv", host, strict=True):
        object.__setattr__(call, name, standin.asarray(x))
    launch.attend(call, standin)
    return standin.launches[0].machine


def taken(machine, space, how):
    return sum(t.taken for (_, *what), t in machine.traffic.items() if what == [space, how])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k)))
def test_counts_of_the_interpreter(kernel):
    need_nvrtc()
    variant = chosen(*kernel)
    one, two = (machine(*kernel, n) for n in (1, 2))
    tile = Tile(variant)
    multiply = ("mma" if variant.kernel == "forward_mma" else "fma", "f32")
    made = (two.mix[multiply] - one.mix[multiply]) / variant.warps
    # A few multiply-adds are of the exponentials.
    assert tile.multiplies <= made <= 1.05 * tile.multiplies
    assert taken(two, "shared", "load") - taken(one, "shared", "load") == tile.wavefronts_read
    stored = taken(two, "shared", "store") - taken(one, "shared", "store")
    assert stored == tile.wavefronts - tile.wavefronts_read
    assert taken(two, "global", "load") - taken(one, "global", "load") == tile.sectors
    instructions = (two.mix.total() - one.mix.total()) / variant.warps
    assert abs(instructions / tile.instructions - 1) < 0.1


def instructions(dtype, capability, dim):
    """How often each instruction stands in the machine code of a kernel without mask and score."""
    tool = shutil.which("nvdisasm") or _from_wheel()
    if tool is None:
        missing("nvdisasm is not installed")
    x = np.zeros((2, 8, 8), "f4")
    call = describe("attention", x, x, x, Options())
    source = kernel_source(chosen(dtype, capability, dim), lower(call.visible, call.score), "int")
    return _disassembled(tool, compiled(source, f"sm_{capability}", OPTIONS).machine_code)


def _from_wheel():
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name in ("nvdisasm", "nvdisasm.exe")), None)


def _disassembled(tool, code):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        # CuPy's binding leaves out the last byte.
        path.write_bytes(code + b"\0")
        done = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", done.stdout, re.M))


@pytest.mark.parametrize(
    "kernel", [("float16", 80, 64), ("float16", 90, 128), ("float16", 120, 128), ("float32", 80, 64)],
    ids=lambda k: "-".join(map(str, k)),
)  # fmt: skip
def test_mix_of_the_machine_code(kernel):
    need_nvrtc()
    found = instructions(*kernel)
    variant = chosen(*kernel)
    tile = Tile(variant)
    assert found["LDL"] == found["STL"] == 0, "registers are spilled"
    if variant.kernel == "forward_mma":
        # Both products are unrolled: each instruction of a tile stands there once.
        assert found["HMMA"] == tile.multiplies
        assert found["LDSM"] == tile.matrix_loads
        assert found["LDGSTS"] > 0
    else:
        # At least 2 steps of 4 channels of the scores, and the values of 4 keys.
        assert found["FFMA"] >= 2 * 4 * 4 * variant.keys // 8 + 4 * 4 * 4 * variant.v_head_dim // 32
        assert found["HMMA"] == 0
    # A weight takes one exponential, in each of two halves.
    assert found["MUFU"] >= variant.keys // 4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("chip", "capability"), [(A100, 80), (H100, 90), (A100, 86)])
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_the_tiles_that_are_chosen(dtype, chip, capability, dim):
    room = SHARED_MEMORY[capability]
    chip = replace(chip, shared_memory=room + 1024)
    found = chosen(dtype, capability, dim)
    sizes = variants._MMA_TILES if found.kernel == "forward_mma" else variants._FMA_TILES
    # Tiles of 16 keys are for devices before 8.0.
    others = [replace(found, warps=warps, keys=keys) for warps, keys in sizes if (warps, keys) != (4, 16)]
    best = max(predict(chip, one).share for one in others if one.shared_memory <= room)
    assert predict(chip, found).share >= 0.98 * best


def test_what_limits():
    found = predict(A100, chosen("float16", 80, 64))
    assert found.busiest == "instructions"
    assert found.blocks >= 2
    assert 0.3 < found.share < 1
    assert predict(A100, replace(chosen("float16", 80, 64), keys=256)).blocks == 1
