"""How a layer turns its queries and keys: options of `rope`, and where rows stand if nobody says it.

Positions for `rope` and positions for masks are the same thing, and are found by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.rope import as_positions, check_options

__all__ = ["ROPE_DEFAULTS", "default_positions", "rope_options"]

ROPE_DEFAULTS: dict[str, Any] = {"base": 10000.0, "dims": None, "interleaved": False, "scaling": None}


def rope_options(given: object, head_dim: int) -> dict[str, Any] | None:
    """Options of `rope` for heads of so many features, None without one."""
    if given is None or given is False:
        return None
    if given is not True and not isinstance(given, Mapping):
        raise TypeError(f"rope: wanted True, None or a mapping of options, got {type(given).__name__}")
    options = dict(ROPE_DEFAULTS)
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in options]
        if unknown:
            raise ValueError(f"rope: wanted any of {tuple(options)}, got {unknown[0]!r}")
        options.update(given)
    check_options(**options)
    rotated = head_dim if options["dims"] is None else options["dims"]
    if rotated > head_dim or rotated % 2:
        raise ValueError(f"rope: wanted an even number of the {head_dim} features of a head, got {rotated}")
    return options


def default_positions(x: Array, kv: Array | None, options: Mapping[str, Any]) -> Any:
    """Positions of the rows of `x`: row + q_offset, with the defaults that `attention` has for it."""
    with arrays.exactly(x):
        return _default_positions(x, kv, options)


def _default_positions(x: Array, kv: Array | None, options: Mapping[str, Any]) -> Any:
    length = x.shape[-2]
    offset, kv_lengths = options.get("q_offset"), options.get("kv_lengths")
    if offset is None:
        if kv is None:
            offset = 0
        elif kv_lengths is None:
            offset = kv.shape[-2] - length
        elif length == 1:
            # `attention` clamps lengths that the host cannot read.
            lengths = _indices("kv_lengths", kv_lengths, x)
            offset = arrays.clip(arrays.namespace(x), lengths, 0, kv.shape[-2]) - 1
        else:
            raise ValueError(
                "q_offset: wanted, as rope turns rows by their positions and there are kv_lengths: "
                "0 (right-padded sequences) or kv_lengths - Lq (a cache), got None"
            )
    if isinstance(offset, int):
        return range(offset, offset + length)
    offset = _indices("q_offset", offset, x)
    xp = arrays.namespace(x)
    rows = xp.arange(length, dtype=offset.dtype, device=arrays.device(x))
    return xp.expand_dims(offset, axis=-1) + rows


def _indices(name: str, given: Any, x: Array) -> Array:
    """`given` beside `x`, in a dtype that sums with row numbers fit."""
    placed = as_positions(name, given, x)
    xp = arrays.namespace(x)
    return arrays.cast(xp, placed, arrays.index_dtype(xp, arrays.device(x)))
