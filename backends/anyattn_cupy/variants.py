"""Which kernel serves a call, in which tiles: the constants that a kernel is compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["TENSOR_CORES", "Device", "Variant", "choose", "choose_inspect", "chunks_of", "parts_of"]

_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Device:
    """What decides about kernels of a device.

    Attributes
    ----------
    capability : int
        80 for compute capability 8.0.
    shared_memory : int
        Bytes that a block can have when it asks for them.
    multiprocessors : int
    """

    capability: int
    shared_memory: int
    multiprocessors: int = 1


@dataclass(frozen=True)
class Variant:
    """A kernel and the constants that it is compiled for.

    Attributes
    ----------
    kernel : str
        Name of its file.
    dtype : str
        Of q, k, v and the result.
    head_dim, v_head_dim : int
        Padded as the kernel wants it.
    warps, keys : int
        Warps of a block, and keys of a tile. A warp has 16 rows.
    vector_loads : bool
        Whether rows begin at multiples of 16 bytes and hold whole vectors.
    batch_axes : int
    stages : int
        Tiles of keys and values that shared memory holds.
    packed : bool
        Whether the rows of all heads of a group are put one after the other.
    wide : bool
        Whether arrays have more channels than `head_dim` or more columns than `v_head_dim`, which are then
        how many a tile holds at a time.
    scaled : bool
        Whether keys and values are int8, each row of them times a scale.
    """

    kernel: str
    dtype: str
    head_dim: int
    v_head_dim: int
    warps: int
    keys: int
    vector_loads: bool
    batch_axes: int = 1
    stages: int = 1
    packed: bool = False
    wide: bool = False
    scaled: bool = False

    @property
    def accumulate(self) -> str:
        """The dtype of scores and sums."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def rows(self) -> int:
        """Rows of a block of queries."""
        return 16 * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory, as the kernel's file lays it out."""
        if self.kernel == "forward_mma":
            pitch, v_pitch = _rounded(self.head_dim, 64), _rounded(self.v_head_dim, 64)
            return 2 * (self.rows * pitch + self.stages * self.keys * (pitch + v_pitch))
        size = _SIZE[self.accumulate]
        vector = 16 // size
        queries = self.rows * self.head_dim
        keys = self.keys * (self.head_dim + vector)
        if self.kernel == "inspect":
            return size * (queries + keys + self.warps * self.keys)
        weights = self.rows * (self.keys + 8)
        return size * (queries + keys + self.keys * self.v_head_dim + weights)

    def constants(self) -> dict[str, int]:
        """The macros that the kernel reads."""
        return {
            f"ELEMENT_{self.dtype.upper()}": 1,
            "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim,
            "WARPS": self.warps,
            "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys,
            "VECTOR_LOADS": int(self.vector_loads),
            "BATCH_AXES": self.batch_axes,
            "STAGES": self.stages,
            "PACKED": int(self.packed),
            "WIDE": int(self.wide),
            "SCALED": int(self.scaled),
        }


def choose(
    device: Device,
    dtype: str,
    head_dim: int,
    v_head_dim: int,
    vector_loads: bool,
    batch_axes: int = 1,
    scaled: bool = False,
) -> Variant:
    """The kernel for a call of "attention"."""
    kind = Variant("", dtype, head_dim, v_head_dim, 0, 0, vector_loads, batch_axes, scaled=scaled)
    # A thread has no registers for more columns of the result.
    if max(head_dim, v_head_dim) <= _MOST_CHANNELS:
        if device.capability >= TENSOR_CORES.get(dtype, math.inf):
            found = _mma(device, kind)
            if found is not None:
                return found
        found = _fma(
            device,
            replace(
                kind,
                kernel="forward_fma",
                head_dim=_rounded(head_dim, 8),
                v_head_dim=_rounded(v_head_dim, _vectors_of_lanes(dtype)),
            ),
        )
        if found is not None:
            return found
    at_once = min(_rounded(v_head_dim, _vectors_of_lanes(dtype)), _WIDE_COLUMNS[dtype == "float64"])
    wide = replace(kind, kernel="forward_fma", head_dim=_WIDE_CHANNELS, v_head_dim=at_once, wide=True)
    return _surely(_fma(device, wide))


def choose_inspect(
    device: Device, dtype: str, head_dim: int, vector_loads: bool, batch_axes: int = 1
) -> Variant:
    """The kernel for a call of "weights" or "stats"."""
    found = None
    if head_dim <= _MOST_CHANNELS:
        found = _fma(
            device, Variant("inspect", dtype, _rounded(head_dim, 8), 0, 0, 0, vector_loads, batch_axes)
        )
    if found is None:
        wide = Variant("inspect", dtype, _WIDE_CHANNELS, 0, 0, 0, vector_loads, batch_axes, wide=True)
        found = _surely(_fma(device, wide))
    return found


# Tiles that a part has at least: beginning one and merging it costs about as much as two.
_LEAST_TILES = 4
_MOST_PARTS = 64


def parts_of(device: Device, items: int, tiles: int) -> int:
    """Into how many parts the keys are split, so that all multiprocessors have two blocks."""
    if items == 0 or items >= device.multiprocessors:
        return 1
    return max(1, min(-(-2 * device.multiprocessors // items), tiles // _LEAST_TILES, _MOST_PARTS))


# Bytes of sums that are added up at the end.
_MOST_SUMS = 1 << 27


def chunks_of(device: Device, heads: int, blocks: int, nbytes: int) -> int:
    """Into how many parts the blocks of rows of a head are dealt out, each with sums over rows of its own.

    `nbytes` are those of the sums of a part of all heads.
    """
    wanted = -(-2 * device.multiprocessors // max(heads, 1))
    return max(1, min(wanted, blocks, _MOST_PARTS, _MOST_SUMS // max(nbytes, 1)))


_MOST_CHANNELS = 256
# Channels, and columns of the result (of float64), that a tile holds where there are more.
_WIDE_CHANNELS = 64
_WIDE_COLUMNS = (128, 64)
# The least compute capability whose tensor cores the kernel uses.
TENSOR_CORES = {"float16": 75, "bfloat16": 80}
_MMA_TILES = ((4, 64), (4, 32), (4, 16))


def _mma(device: Device, kind: Variant) -> Variant | None:
    """The tile of a kind on tensor cores."""
    padded = replace(
        kind,
        kernel="forward_mma",
        head_dim=_rounded(kind.head_dim, 16),
        v_head_dim=_rounded(kind.v_head_dim, 16),
        stages=2,
    )
    # The smallest is for devices of 64 KiB.
    tiles = [
        replace(padded, warps=warps, keys=keys)
        for warps, keys in (_MMA_TILES if device.capability < 80 else _MMA_TILES[:-1])
    ]
    for room in (device.shared_memory // 2, device.shared_memory):
        for one in tiles:
            if one.shared_memory <= room:
                return _deeper(device, one)
    return None


# What each block of a multiprocessor takes of shared memory for itself, and the multiprocessor once more.
_RESERVED = 1024


def _deeper(device: Device, tile: Variant) -> Variant:
    """With one more tile on its way, if shared memory then holds as many blocks as registers allow."""
    blocks = 3 if max(tile.head_dim, tile.v_head_dim) <= 64 else 2
    found = replace(tile, stages=3)
    # What is converted on its way does not come by copies.
    copies = device.capability >= 80 and not tile.scaled
    room = (device.shared_memory + _RESERVED) // blocks - _RESERVED
    return found if copies and found.shared_memory <= room else tile


# Tiles from the fastest to the smallest: more rows read keys less often, more keys mean fewer barriers.
_FMA_TILES = ((4, 32), (2, 32), (2, 16), (1, 16), (1, 8))


def _fma(device: Device, kind: Variant) -> Variant | None:
    """The fastest tile of a kind that fits into the shared memory of a device."""
    for warps, keys in _FMA_TILES:
        found = replace(kind, warps=warps, keys=keys)
        # Two blocks of a multiprocessor hide each other's barriers.
        room = device.shared_memory // 2 if (warps, keys) != _FMA_TILES[-1] else device.shared_memory
        if found.shared_memory <= room:
            return found
    return None


def _surely(found: Variant | None) -> Variant:
    if found is None:
        raise RuntimeError("the device has less shared memory than any of compute capability 7.5")
    return found


def _vectors_of_lanes(dtype: str) -> int:
    """Columns that the 8 lanes of a row have in vectors of 16 bytes."""
    return 128 // _SIZE["float64" if dtype == "float64" else "float32"]


def _rounded(n: int, multiple: int) -> int:
    return -(-max(n, 1) // multiple) * multiple
