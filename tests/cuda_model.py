"""What the main loop of a kernel costs on a device, in clocks of a multiprocessor, and the share of its peak.

Per tile of keys, a block of R rows (W warps of 16), N keys, D channels of keys and Dv of values asks for

    products      R N (D + Dv) multiply-adds
    exponentials  R N
    shared        wavefronts of 128 bytes: what is stored once and read by every warp
    instructions  those of the products and loads, and what softmax and addresses take beside
    cache         N (D + Dv) elements, from the second level: blocks of a head read the same

and a multiprocessor does so much of each in a clock. With two blocks or more on a multiprocessor the units
work at once, and the tile takes as long as the busiest; with one they wait for each other, and it takes the
sum. Latencies, launches, the first and last tile and masks are left out, so shares are upper bounds.
`test_cuda_model` holds the counts to those of the interpreter and of the machine code, and the choice of
tiles to the model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from anyattn_cupy.variants import Variant

__all__ = ["A100", "H100", "Chip", "Prediction", "Tile", "predict"]


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor does in a clock.

    Attributes
    ----------
    tensor : float
        Multiply-adds of 16-bit floats on tensor cores, by `mma.sync`.
    peak : float
        The same at the peak of the data sheet.
    float32 : float
        Multiply-adds of float32.
    cache : float
        Bytes from the second-level cache.
    shared_memory : int
        Bytes of shared memory that its blocks have together.
    """

    name: str
    tensor: float
    peak: float
    float32: float
    cache: float
    shared_memory: int


# NVIDIA A100 and H100 architecture white papers: 312 TFLOP/s on 108 multiprocessors at 1.41 GHz, 989 on 132
# at 1.83 GHz, and 5120 bytes of cache a clock of A100 (H100's are taken to be as many). That `mma.sync`
# reaches 63 % of what `wgmma` does on Hopper is an assumption, that nothing here has measured.
A100 = Chip("A100", 1024, 1024, 64, 5120 / 108, 167936)
H100 = Chip("H100", 0.63 * 2048, 2048, 128, 5120 / 132, 233472)

_WAVEFRONT = 128
_EXPONENTIALS = 16
_INSTRUCTIONS = 4
# Counted on the interpreter: instructions of a warp for a logit of each lane, for an asynchronous copy or a
# vector that is loaded and stored, and for a tile; of those for a logit, float32 ones.
_PER_LOGIT = {"forward_mma": 15.5, "forward_fma": 20}
_PER_VECTOR = {"forward_mma": 56, "forward_fma": 36}
_PER_TILE = {"forward_mma": 170, "forward_fma": 370}
_FLOAT32_PER_LOGIT = 8


@dataclass(frozen=True)
class Tile:
    """What a block does for one tile of keys, in float16 on tensor cores or in float32."""

    variant: Variant

    @property
    def products(self) -> int:
        """Multiply-adds."""
        v = self.variant
        return v.rows * v.keys * (v.head_dim + v.v_head_dim)

    @property
    def matrix_loads(self) -> int:
        """Instructions of a warp that read shared memory for products, 4 wavefronts each."""
        v = self.variant
        if v.kernel == "forward_mma":
            # 16 x 16 of keys or values at once, and the queries again.
            return v.keys // 16 * (v.head_dim + v.v_head_dim) // 16 + v.head_dim // 16
        scores = v.head_dim // 4 * (4 + v.keys // 8)
        return scores + v.keys // 4 * (4 + 4 * v.v_head_dim // 32)

    @property
    def multiplies(self) -> int:
        """Instructions of a warp that multiply."""
        return self.products // self.variant.warps // (2048 if self.variant.kernel == "forward_mma" else 32)

    @property
    def wavefronts_read(self) -> int:
        return 4 * self.matrix_loads * self.variant.warps

    @property
    def sectors(self) -> int:
        """Sectors of 32 bytes of keys and values."""
        v = self.variant
        return v.keys * (v.head_dim + v.v_head_dim) * self._size // 32

    @property
    def wavefronts(self) -> int:
        """Read, and stored: keys and values, and in float32 the weights."""
        v = self.variant
        kept = v.keys * (v.head_dim + v.v_head_dim) * self._size // _WAVEFRONT
        weights = 0 if v.kernel == "forward_mma" else v.rows * v.keys * 4 // _WAVEFRONT
        return self.wavefronts_read + kept + weights

    @property
    def instructions(self) -> float:
        """Of a warp."""
        v = self.variant
        vectors = v.keys * (v.head_dim + v.v_head_dim) * self._size / 16 / v.threads
        logits, kernel = v.keys / 2, v.kernel
        counted = _PER_LOGIT[kernel] * logits + _PER_VECTOR[kernel] * vectors + _PER_TILE[kernel]
        return self.multiplies + self.matrix_loads + v.v_head_dim / 2 + counted

    @property
    def _size(self) -> int:
        return 2 if self.variant.kernel == "forward_mma" else 4


@dataclass(frozen=True)
class Prediction:
    """Clocks of a multiprocessor for a tile, by unit, and the share of the peak that they allow at most."""

    clocks: dict[str, float]
    blocks: int
    share: float

    @property
    def busiest(self) -> str:
        return max(self.clocks, key=lambda unit: self.clocks[unit])


def predict(chip: Chip, variant: Variant) -> Prediction:
    """What a chip makes of a variant in float16, bfloat16 or float32."""
    tile, warps = Tile(variant), variant.warps
    entries = variant.rows * variant.keys
    tensor = variant.kernel == "forward_mma"
    if tensor:
        arithmetic, peak = tile.products / chip.tensor, chip.peak
    else:
        arithmetic = (tile.products + _FLOAT32_PER_LOGIT * entries) / chip.float32
        peak = chip.float32
    clocks = {
        "products": arithmetic,
        "exponentials": entries / _EXPONENTIALS,
        "shared": float(tile.wavefronts),
        "instructions": tile.instructions * warps / _INSTRUCTIONS,
        "cache": 32 * tile.sectors / chip.cache,
    }
    # A kibibyte of each block is the system's.
    blocks = chip.shared_memory // (variant.shared_memory + 1024)
    took = max(clocks.values()) if blocks > 1 else sum(clocks.values())
    return Prediction(clocks, blocks, tile.products / peak / took)


def table() -> str:
    """The rows of docs/cuda.md."""
    from anyattn_cupy.variants import Device, choose

    lines = []
    for dtype in ("float16", "float32"):
        for dim in (64, 128, 256):
            for chip, capability in ((A100, 80), (H100, 90)):
                variant = choose(Device(capability, chip.shared_memory - 1024), dtype, dim, dim, True)
                assert variant is not None
                found = predict(chip, variant)
                clocks = " | ".join(f"{x:.0f}" for x in found.clocks.values())
                cells = (
                    chip.name, f"{dtype}, {dim}", f"{variant.rows}×{variant.keys}", found.blocks, clocks,
                    f"{found.share:.0%}",
                )  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
