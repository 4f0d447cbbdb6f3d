"""Rotary position embeddings for any array library.

The rotation is plain array calls, so it runs lazily, under tracers and on devices. What is delicate is the
angle: at position 1e6 a float32 product of position and frequency is off by 0.06 radians. Angles are
therefore float64 where the library has it, and elsewhere (JAX by default, Apple's GPUs) float32 sums of
products that lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.numbers import boolean, integer, integers, is_integer, real
from anyattn.rope_scaling import check_scaling, frequencies, needs_sequence_length

if TYPE_CHECKING:
    import numpy

__all__ = ["rope", "rope_2d"]

_LAYOUTS = ("bhld", "blhd")
_DIGIT = 4096


def rope(
    x: Array,
    positions: int | Sequence[Any] | Array,
    *,
    base: float = 10000.0,
    dims: int | None = None,
    interleaved: bool = False,
    scaling: Mapping[str, Any] | None = None,
    layout: str = "bhld",
) -> Array:
    """Rotate queries or keys by their positions.

    Pair m of the features turns by ``position · base^(−2m / dims)`` radians, so that the product of a query
    and a key depends on the distance of their positions alone.

    Parameters
    ----------
    x : array
        Queries or keys, (..., H, L, D), or (..., L, H, D) with ``layout="blhd"``, or (L, D). float16,
        bfloat16, float32 or float64; the two 16-bit types are rotated in float32.
    positions : int, float, sequence or array
        Position of each row, broadcastable to (..., L). A scalar is the position of every row. Floats stand
        between whole positions. An array is of the library and device of `x`.
    base : float, default 10000
        θ of the paper, greater than 1.
    dims : int, optional
        Rotate the first `dims` features only, an even number; the others pass through bit for bit. Default D.
    interleaved : bool, default False
        Pair m is features (2m, 2m + 1), as in the paper and in GPT-J, instead of (m, m + dims / 2), as in
        GPT-NeoX and Llama weights of Hugging Face.
    scaling : mapping, optional
        Stretch to longer contexts, written as in Hugging Face configurations: ``"rope_type"`` and its
        numbers.

        - ``"linear"``: ``factor``.
        - ``"ntk"``: ``factor``.
        - ``"dynamic"``: ``factor``, ``original_max_position_embeddings`` and ``seq_len``. The last is taken
          from the largest of `positions` where the host can read them.
        - ``"yarn"``: ``factor``, ``original_max_position_embeddings``; optionally ``beta_fast``,
          ``beta_slow``, ``attention_factor``, ``mscale`` with ``mscale_all_dim``, ``truncate``.
        - ``"llama3"``: ``factor``, ``original_max_position_embeddings``, ``low_freq_factor``,
          ``high_freq_factor``.

        ``"default"`` scales nothing. ``"rope_theta"`` may be there when it equals `base`.
    layout : {"bhld", "blhd"}
        Order of the axes of `x`.

    Returns
    -------
    array
        Like `x`.

    Raises
    ------
    TypeError
        Where `x` has no float dtype of those above, or `positions` are neither integers nor floats, or of
        another library than `x`; for masked and sparse arrays.
    ValueError
        Where shapes or devices do not fit, a position is NaN or infinite and the host can tell, `dims` is
        odd or larger than D, or `scaling` is incomplete or unknown.

    Notes
    -----
    Angles are within 1e-6 radians at positions of any size up to 2**31, whether the library has float64 or
    not. torch's autocast changes nothing.

    References
    ----------
    J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864. The
    papers behind `scaling` are named in `anyattn.rope_scaling`.

    Examples
    --------
    >>> import numpy as np, anyattn as aa
    >>> q = np.ones((1, 2, 4), dtype=np.float32)
    >>> aa.rope(q, [0, 1])[0, 0]
    array([1., 1., 1., 1.], dtype=float32)
    """
    head_dim = _check_array(x, layout)
    dims = head_dim if dims is None else dims
    check_options(base=base, dims=dims, interleaved=interleaved, scaling=scaling)
    if dims > head_dim:
        raise ValueError(f"dims: wanted at most the {head_dim} features of x, got {dims}")
    xp = arrays.namespace(x)
    at = as_positions("positions", positions, x)
    _check_positions_fit("positions", at, x, layout)
    if scaling is not None and needs_sequence_length(scaling):
        scaling = {**scaling, "seq_len": sequence_length(positions)}
    with arrays.exactly(x):
        cos, sin = _cos_sin(xp, at, x, dims, float(base), scaling)
        return rotate(xp, x, cos, sin, dims, interleaved, layout)


def rope_2d(
    x: Array,
    rows: int | Sequence[Any] | Array,
    columns: int | Sequence[Any] | Array,
    *,
    base: float = 100.0,
    interleaved: bool = False,
    layout: str = "bhld",
) -> Array:
    """Rotate queries or keys of an image: one half of the features by the row of a pixel, one by its column.

    Axial rotary embeddings (B. Heo et al., "Rotary Position Embedding for Vision Transformer", 2024): each
    half is `rope` of its own, so a product of a query and a key depends on how far they are apart in each
    direction. The code of that paper turns the first half by columns, and neighbours as pairs:
    ``rope_2d(x, columns, rows, interleaved=True)``.

    Parameters
    ----------
    x : array
        As for `rope`, with a number of features that four divides.
    rows, columns : int, float, sequence or array
        Positions of each token of `x` in the image, as `positions` of `rope`. The first half of the features
        turns by `rows`.
    base : float, default 100
        θ, as the paper has it for images.
    interleaved, layout
        As for `rope`.

    Returns
    -------
    array
        Like `x`.
    """
    features = _check_array(x, layout)
    if features % 4:
        raise ValueError(f"x: wanted a number of features that 4 divides, got shape {tuple(x.shape)}")
    half = features // 2
    options: dict[str, Any] = {"base": base, "interleaved": interleaved, "layout": layout}
    turned = []
    for name, given, part in (("rows", rows, x[..., :half]), ("columns", columns, x[..., half:])):
        at = as_positions(name, given, x)
        _check_positions_fit(name, at, x, layout)
        turned.append(rope(part, at, **options))
    return arrays.namespace(x).concat(turned, axis=-1)


def rotate(
    xp: Namespace, x: Array, cos: Array, sin: Array, dims: int, interleaved: bool, layout: str
) -> Array:
    """`x` with its first `dims` features turned by angles of these cosines and sines (..., L, dims // 2)."""
    if x.ndim > 2:
        cos, sin = (xp.expand_dims(table, axis=-3 if layout == "bhld" else -2) for table in (cos, sin))
    rotated = arrays.cast(xp, x[..., :dims], cos.dtype)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        pairs = xp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        rotated = xp.reshape(pairs, (*x.shape[:-1], dims))
    else:
        first, second = rotated[..., : dims // 2], rotated[..., dims // 2 :]
        rotated = xp.concat([first * cos - second * sin, first * sin + second * cos], axis=-1)
    rotated = arrays.cast(xp, rotated, x.dtype)
    return rotated if dims == x.shape[-1] else xp.concat([rotated, x[..., dims:]], axis=-1)


def check_options(*, base: Any, dims: Any, interleaved: Any, scaling: Any) -> None:
    """Raise where an option is wrong whatever the array is; `dims` may be None."""
    if real(base, "base") <= 1.0:
        raise ValueError(f"base: wanted a number greater than 1, got {base!r}")
    if dims is not None and integer(dims, "dims", least=2) % 2:
        raise ValueError(f"dims: wanted an even number, as features turn in pairs, got {dims}")
    boolean(interleaved, "interleaved")
    check_scaling(scaling)


def as_positions(name: str, positions: Any, x: Array) -> Array:
    """`positions` as an array of the library and device of `x`, Python numbers and sequences converted."""
    if arrays.is_array(positions):
        arrays.check_beside(positions, name, x, "x")
        if arrays.kind(positions) not in ("int", "float"):
            raise TypeError(f"{name}: wanted integers or floats, got dtype {arrays.dtype_name(positions)}")
        return positions
    host = _host_numbers(name, positions)
    xp, device = arrays.namespace(x), arrays.device(x)
    if host.dtype.kind == "f":
        dtype = xp.float64 if _has_float64(xp, device) else xp.float32
    else:
        dtype = arrays.index_dtype(xp, device)
        limits = xp.iinfo(dtype)
        if host.size and not limits.min <= host.min() <= host.max() <= limits.max:
            raise ValueError(
                f"{name}: wanted integers from {limits.min} to {limits.max}, the widest of x's library here, "
                f"got {host.min()} to {host.max()}"
            )
    return xp.asarray(host, dtype=dtype, device=device)


def _host_numbers(name: str, given: Any) -> numpy.ndarray[Any, Any]:
    """Python numbers, alone or in nested sequences, as int64, or as float64 where one is no integer."""
    import numpy

    if isinstance(given, range):
        # The default of a layer at every call; its ends tell of all of them.
        integers([*given[:1], *given[-1:]], name)
        return numpy.fromiter(given, dtype=numpy.int64, count=len(given))
    numbers = list(_leaves(given))
    if all(is_integer(number) for number in numbers):
        return integers(given, name)
    for number in numbers:
        real(number, name)
    try:
        return numpy.asarray(given, dtype=numpy.float64)
    except ValueError as error:
        raise ValueError(f"{name}: wanted numbers in equally long rows, got {given!r}") from error


def _leaves(given: Any) -> Iterator[Any]:
    if isinstance(given, (list, tuple, range)):
        for part in given:
            yield from _leaves(part)
    else:
        yield given


def sequence_length(*positions: Any) -> int:
    """One more than the largest of the positions, which the host must be able to read."""
    import numpy

    longest = 1
    for given in positions:
        if arrays.is_array(given):
            if not arrays.is_concrete_cpu(given):
                raise ValueError(
                    "scaling: 'dynamic' depends on the longest position, and the host reads positions only "
                    "from CPU arrays outside jit: give scaling['seq_len']"
                )
            given = arrays.to_host(given)
        longest = max(longest, math.floor(numpy.max(given, initial=0)) + 1)
    return longest


def _check_array(x: Array, layout: str) -> int:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: wanted 'bhld' or 'blhd', got {layout!r}")
    arrays.check_plain(x, "x")
    if arrays.kind(x) != "float":
        raise TypeError(f"x: wanted a dtype of {', '.join(arrays.FLOAT_DTYPES)}, got {arrays.dtype_name(x)}")
    if x.ndim < 2:
        raise ValueError(f"x: wanted shape (..., H, L, D) or (L, D), got {tuple(x.shape)}")
    return int(x.shape[-1])


def _check_positions_fit(name: str, positions: Array, x: Array, layout: str) -> None:
    length = x.shape[-3] if layout == "blhd" and x.ndim > 2 else x.shape[-2]
    rows = (*x.shape[:-3], length)
    shape = tuple(positions.shape)
    fits = len(shape) <= len(rows) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(rows), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: wanted a shape that broadcasts to {rows}, the batch axes and L of x "
            f"{tuple(x.shape)} with layout {layout!r}, got {shape}"
        )


def _has_float64(xp: Namespace, device: Any) -> bool:
    return "float64" in xp.__array_namespace_info__().dtypes(device=device, kind="real floating")


def _cos_sin(
    xp: Namespace, positions: Array, x: Array, dims: int, base: float, scaling: Mapping[str, Any] | None
) -> tuple[Array, Array]:
    """Cosine and sine, positions.shape + (dims // 2,), in the dtype that `x` is rotated in."""
    device = arrays.device(x)
    dtype = xp.float64 if arrays.dtype_name(x) == "float64" else xp.float32
    radians, amplitude = frequencies(dims, base, scaling)
    if positions.ndim == 0:
        positions = xp.reshape(positions, (1,))
    positions = xp.expand_dims(positions, axis=-1)
    if _has_float64(xp, device):
        steps = xp.asarray(radians, dtype=xp.float64, device=device)
        angle = arrays.cast(xp, positions, xp.float64) * steps
    else:
        angle = _float32_angle(xp, positions, radians, device)
    cos, sin = xp.cos(angle), xp.sin(angle)
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return arrays.cast(xp, cos, dtype), arrays.cast(xp, sin, dtype)


def _float32_angle(xp: Namespace, positions: Array, radians: tuple[float, ...], device: Any) -> Array:
    """Angle of each position and frequency, in radians modulo 2π, to a few units in float32's last place.

    A position is written in digits of base 4096, and what each digit is worth in turns, modulo 1, is found on
    the host and split into a multiple of 1/4096 and a rest below 1/8192. A digit times the multiple is a
    multiple of 1/4096 below 2048, which fits the 24 bits of float32: nothing is rounded before whole turns
    are taken off.
    """

    def table(values: list[float]) -> Array:
        return xp.asarray(values, dtype=xp.float32, device=device)

    turns = [r / (2.0 * math.pi) for r in radians]
    if arrays.kind(positions) == "float":
        positions = arrays.cast(xp, positions, xp.float32)
        whole = xp.floor(positions)
        total = (positions - whole) * table(turns)
    else:
        # Narrow integers hold no 4096.
        whole, total = arrays.cast(xp, positions, arrays.index_dtype(xp, device)), None
    for place in range(3):
        digit = whole if place == 2 else whole % _DIGIT
        whole = whole // _DIGIT
        worth = [math.remainder(t * _DIGIT**place, 1.0) for t in turns]
        coarse = [round(w * _DIGIT) / _DIGIT for w in worth]
        rest = [w - c for w, c in zip(worth, coarse, strict=True)]
        digit = arrays.cast(xp, digit, xp.float32)
        exact = digit * table(coarse)
        part = exact - xp.round(exact) + digit * table(rest)
        total = part if total is None else total + part
    return (total - xp.round(total)) * (2.0 * math.pi)
