"""What a chunk of linear attention costs a multiprocessor, by the units of `cuda_model`.

A block has C tokens of D channels and B columns of the state; its W warps have C / W rows each, and look at
no key beyond the last of these: P = C^2 (W + 1) / 2 W pairs of row and key. A chunk asks for

    products      2 C D B of the state, P (D + B) of the weights; the delta rules C D B + P D + C^2 B / 2 more
    multiplies    P D, where each channel has its decay, for each of these two products with weights
    shared        wavefronts: what is stored once and read in vectors for 4 rows x 4 columns at a time
    instructions  products, multiplies and reads, and what addresses and loops take beside

`test_cuda_linear_model` holds the counts to those of the interpreter.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from cuda_linear_kernels import RULES, chosen
from cuda_model import A100, H100, Chip

from anyattn_cupy.linear_variants import LinearVariant

__all__ = ["Chunk", "predict", "table"]

_WAVEFRONT = 128
_VECTOR = 4
_WARPS = 4
_INSTRUCTIONS = 4
# Counted on the interpreter: instructions of a warp for an entry of each lane that is loaded, for a key that
# rows are multiplied with (and more where decays come in between), for a chunk, and there for decays and what
# the delta rules solve.
_PER_ENTRY, _PER_KEY, _PER_CHUNK = 17, 12, 230
_PER_FADED_KEY, _PER_FADED_CHUNK, _PER_SOLVED_CHUNK = 10, 200, 500
_HERTZ = {"A100": (108, 1.41e9), "H100": (132, 1.83e9)}


@dataclass(frozen=True)
class Chunk:
    """What a block does for one chunk, in float32, in 16 bits the same."""

    variant: LinearVariant

    @property
    def _keys(self) -> int:
        """Keys that the warps look at, together."""
        return self.variant.rows * (_WARPS + 1) // 2

    @property
    def _pairs(self) -> int:
        return self.variant.rows * self._keys // _WARPS

    @property
    def _weighings(self) -> int:
        return 1 + self.variant.delta

    @property
    def products(self) -> int:
        """Multiply-adds."""
        v = self.variant
        found = (1 + self._weighings) * v.rows * v.head_dim * v.columns + self._pairs * v.columns
        found += self._weighings * self._pairs * v.head_dim
        return found + v.delta * v.rows * (v.rows - 1) // 2 * v.columns

    @property
    def multiplies(self) -> int:
        """Multiplications of rows with decays."""
        return self._weighings * self._pairs * self.variant.head_dim if self.variant.channels == 2 else 0

    @property
    def vector_loads(self) -> int:
        """Instructions of warps that read vectors of shared memory for products, 4 wavefronts each."""
        v = self.variant
        lanes = v.columns // _VECTOR
        rows, groups = v.rows // _WARPS * lanes // 32, v.threads // lanes
        depth = 4 if v.head_dim % (8 * groups) else 8
        each = 1 + (v.channels == 2)
        weigh = each * self._pairs * v.head_dim // (32 * _VECTOR) + v.rows * v.head_dim // (32 * _VECTOR)
        reading = _WARPS * v.head_dim // _VECTOR * (rows + _VECTOR)
        values = self._keys // _VECTOR * (rows + _VECTOR)
        steps = v.head_dim // (depth * groups) * (v.rows * (1 + depth // _VECTOR) + depth)
        solved = v.columns // 32 * v.rows * v.rows // (2 * _VECTOR) if v.delta else 0
        return self._weighings * (weigh + reading) + values + _WARPS * steps + solved

    @property
    def wavefronts(self) -> int:
        """Read and stored: rows, keys and values, rows and keys that fade, weights, the state."""
        v = self.variant
        entries = v.rows * (v.head_dim * (1 + 2 * self._weighings) + v.columns) + v.head_dim * v.columns
        # Decays come, and keys fade by them; keys are copied, and values become what is written, twice.
        entries += v.rows * v.head_dim * (0, 2, 4)[v.channels]
        entries += v.delta * v.rows * (v.head_dim + 4 * v.columns)
        return 4 * self.vector_loads + entries // 32 + self._weighings * self._keys

    @property
    def instructions(self) -> float:
        """Of a warp."""
        v = self.variant
        entries = v.rows * (v.head_dim * (2 + (v.channels == 2)) + v.columns) / v.threads
        keys = self._weighings * self._keys / _WARPS
        counted = _PER_ENTRY * entries + (_PER_KEY + _PER_FADED_KEY * (v.channels > 0)) * keys + _PER_CHUNK
        counted += _PER_FADED_CHUNK * (v.channels > 0) + _PER_SOLVED_CHUNK * v.delta
        return (self.products + 2 * self.multiplies) / v.threads + self.vector_loads / _WARPS + counted


def predict(chip: Chip, variant: LinearVariant) -> dict[str, float]:
    """Clocks of a multiprocessor for a chunk, by unit; it takes as long as the busiest."""
    chunk = Chunk(variant)
    return {
        "products": (chunk.products + chunk.multiplies) / chip.float32,
        "shared": float(chunk.wavefronts),
        "instructions": chunk.instructions * _WARPS / _INSTRUCTIONS,
    }


def table() -> str:
    """The rows of docs/linear-attention.md: heads of 64, as many as fill a device."""
    lines = []
    for rule in RULES:
        for chip, capability in ((A100, 80), (H100, 90)):
            variant = chosen("float32", 64, 64, rule=rule, capability=capability)
            clocks = predict(chip, variant)
            count, hertz = _HERTZ[chip.name]
            rate = count * hertz * variant.rows / max(clocks.values())
            cells = rule, chip.name, *(f"{x:.0f}" for x in clocks.values()), f"{rate / 1e9:.2f}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
