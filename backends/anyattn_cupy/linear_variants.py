"""Which kernel serves a call of `linear_attention`, in which tiles: the constants that it is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anyattn.linear.call import LinearCall
from anyattn_cupy.variants import Device

__all__ = ["FEATURE_MAPS", "LinearVariant", "choose", "parts_of"]

FEATURE_MAPS = {"identity": 0, "elu+1": 1, "relu": 2}
"""Feature maps that the kernel applies: those of one entry at a time."""

_WARPS = 4
# Channels of a state that shared memory holds, and at a time where there are more.
_MOST_CHANNELS = {"float32": 256, "float64": 128}
_WIDE_CHANNELS = 64
_LANES = 32
# Tokens of a chunk and columns of the state, from the fastest to the smallest.
_TILES = ((32, 64), (32, 32), (16, 32))


@dataclass(frozen=True)
class LinearVariant:
    """The constants of `linear_forward.cu`.

    Attributes
    ----------
    dtype : str
        Of v and the result, and of q and k unless `wide_features`.
    head_dim : int
        Channels that shared memory holds, a multiple of 32.
    rows, columns : int
        Tokens of a chunk, columns of the state that a block has.
    channels : int
        Decays of a token: 0, 1, or 2 for one for each channel.
    feature_map : int
    wide_features : bool
        Whether q and k are in the accumulation dtype.
    wide : bool
        Whether states have more channels than `head_dim`.
    """

    dtype: str
    head_dim: int
    rows: int
    columns: int
    channels: int
    delta: bool
    normalize: bool
    causal: bool
    feature_map: int
    wide_features: bool
    batch_axes: int = 1
    wide: bool = False

    @property
    def accumulate(self) -> str:
        """The dtype of states and sums."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def threads(self) -> int:
        return 32 * _WARPS

    @property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory, as `linear_chunk.cuh` lays it out."""
        size = 8 if self.accumulate == "float64" else 4
        parts = self.threads // self.rows
        pitch = self.head_dim + parts * 16 // size
        factors = self.rows * (self.head_dim if self.channels == 2 else 1)
        state = self.head_dim * (self.columns + 3)
        own = 2 * pitch + self.columns + self.rows + 16 // size + 2
        return size * (self.rows * own + factors + state)

    def constants(self) -> dict[str, int]:
        """The macros that the kernel reads."""
        return {
            f"ELEMENT_{self.dtype.upper()}": 1,
            "HEAD_DIM": self.head_dim,
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "WARPS": _WARPS,
            "CHANNELS": self.channels,
            "DELTA": int(self.delta),
            "NORMALIZE": int(self.normalize),
            "CAUSAL": int(self.causal),
            "FEATURE_MAP": self.feature_map,
            "WIDE_FEATURES": int(self.wide_features),
            "BATCH_AXES": self.batch_axes,
            "WIDE": int(self.wide),
        }


def choose(
    device: Device, call: LinearCall, strands: int, wide_features: bool, batch_axes: int = 1
) -> LinearVariant:
    """The kernel for a call of so many strands: heads of sequences."""
    channels = 0 if call.decay is None else 1 if call.decay.shape[-1] == 1 else 2
    head_dim = -(-call.head_dim // _LANES) * _LANES
    kind = LinearVariant(
        call.dtype, head_dim, 0, 0, channels, call.beta is not None, call.normalize, call.causal,
        FEATURE_MAPS.get(call.feature_map, 0), wide_features, batch_axes,
    )  # fmt: skip
    tiles = [replace(kind, rows=rows, columns=columns) for rows, columns in _TILES]
    # Few columns for each block where there are not enough blocks, and a short chunk for a step of decoding.
    if call.v_head_dim <= 32 or strands * -(-call.v_head_dim // 64) < device.multiprocessors:
        tiles = [x for x in tiles if x.columns == 32]
    if max(call.k_len, 0 if call.causal else call.q_len) <= 16:
        tiles = tiles[-1:]
    if kind.head_dim <= _MOST_CHANNELS[kind.accumulate]:
        # Two blocks of a multiprocessor hide each other's barriers.
        for room in (device.shared_memory // 2, device.shared_memory):
            for one in tiles:
                if one.shared_memory <= room:
                    return one
    return replace(tiles[-1], head_dim=_WIDE_CHANNELS, wide=True)


# A part is at least so many chunks: its state is written and read once more, and its keys are read twice.
_LEAST_CHUNKS = 8
_MOST_PARTS = 256


def parts_of(device: Device, variant: LinearVariant, blocks: int, length: int) -> int:
    """Into how many parts sequences are cut so that every multiprocessor has two blocks.

    What a part of the delta rules makes of a state is a whole matrix, so these are not cut.
    """
    if variant.delta or variant.wide or not blocks:
        return 1
    chunks = -(-length // variant.rows)
    # What is computed twice is worth it where blocks are few.
    wanted = 2 * device.multiprocessors // blocks
    return max(1, min(wanted, chunks // _LEAST_CHUNKS, _MOST_PARTS)) if wanted > 2 else 1
