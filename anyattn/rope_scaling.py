"""The rotation frequencies of rotary position embeddings, and the ways to stretch them to longer contexts.

Everything is a function of a handful of numbers, so it is Python floats (float64) on the host and the same
for every array library. A scaling is written as in the configuration files of Hugging Face models, and an
entry that a scaling does not know is an error: a misspelt `original_max_position_embeddings` would otherwise
change the model quietly.

- default: J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.2.
- linear: S. Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
  2023, eq. 4.
- ntk, dynamic: "NTK-aware" and "dynamic NTK" interpolation, as B. Peng et al. write them down in the YaRN
  paper (2023), sections 3.1 and 3.3; dynamic with the `factor` that Hugging Face adds to it.
- yarn: B. Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, sections
  3.2 and 3.4.
- llama3: the model code released with Llama 3.1; "The Llama 3 Herd of Models", 2024, section 3.4.2 tells of
  the long-context training that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from anyattn.numbers import boolean, real


class Frequencies(NamedTuple):
    """How fast each pair of features turns.

    Attributes
    ----------
    radians : tuple of float
        Angle per position of pair m, one for each of the dims // 2 pairs.
    amplitude : float
        Factor on cosine and sine: 1, except for YaRN, which tempers the softmax with it.
    """

    radians: tuple[float, ...]
    amplitude: float


class _Settings:
    """The numbers of a scaling mapping, each checked when it is read; what nobody read is an error."""

    def __init__(self, rope_type: str, entries: Mapping[str, Any]):
        self.rope_type = rope_type
        self.unread = {key: value for key, value in entries.items() if value is not None}

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        value = self.unread.pop(key, default)
        if value is None:
            raise ValueError(f"scaling: {self.rope_type!r} needs {key!r}, which is missing")
        number = real(value, f"scaling[{key!r}]")
        if number <= least:
            raise ValueError(f"scaling[{key!r}]: wanted a number greater than {least:g}, got {value!r}")
        return number

    def flag(self, key: str, default: bool) -> bool:
        return boolean(self.unread.pop(key, default), f"scaling[{key!r}]")

    def finish(self) -> None:
        if self.unread:
            raise ValueError(
                f"scaling: {self.rope_type!r} knows no {', '.join(map(repr, sorted(self.unread)))}"
            )


def _plain(base: float, dims: int) -> list[float]:
    return [base ** (-2.0 * m / dims) for m in range(dims // 2)]


def _default(base: float, dims: int, given: _Settings) -> Frequencies:
    return Frequencies(tuple(_plain(base, dims)), 1.0)


def _linear(base: float, dims: int, given: _Settings) -> Frequencies:
    factor = given.number("factor")
    return Frequencies(tuple(f / factor for f in _plain(base, dims)), 1.0)


def _stretched_base(base: float, dims: int, stretch: float) -> Frequencies:
    # With one pair there is no slower pair to stretch, and the exponent dims / (dims - 2) has no value.
    exponent = dims / (dims - 2) if dims > 2 else 0.0
    return Frequencies(tuple(_plain(base * stretch**exponent, dims)), 1.0)


def _ntk(base: float, dims: int, given: _Settings) -> Frequencies:
    return _stretched_base(base, dims, given.number("factor"))


def _dynamic(base: float, dims: int, given: _Settings) -> Frequencies:
    factor = given.number("factor")
    original = given.number("original_max_position_embeddings")
    longest = max(given.number("seq_len"), original)
    return _stretched_base(base, dims, factor * longest / original - (factor - 1.0))


def _yarn(base: float, dims: int, given: _Settings) -> Frequencies:
    factor = given.number("factor")
    original = given.number("original_max_position_embeddings")
    fast, slow = given.number("beta_fast", 32.0), given.number("beta_slow", 1.0)
    whole_pairs = given.flag("truncate", True)

    def temper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    amplitude = temper(1.0)
    if "mscale" in given.unread or "mscale_all_dim" in given.unread:
        amplitude = temper(given.number("mscale")) / temper(given.number("mscale_all_dim"))
    amplitude = given.number("attention_factor", amplitude)

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that makes so many rotations over the original context."""
        return dims * math.log(original / (rotations * 2.0 * math.pi)) / (2.0 * math.log(base))

    first, last = pair_turning(fast), pair_turning(slow)
    if whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound of dims - 1 (not dims / 2 - 1) is that of the authors' code, which trained models
    # follow.
    first, last = max(first, 0.0), min(last, dims - 1.0)
    width = last - first or 0.001
    frequencies = []
    for m, plain in enumerate(_plain(base, dims)):
        interpolated = min(max((m - first) / width, 0.0), 1.0)
        frequencies.append(plain / factor * interpolated + plain * (1.0 - interpolated))
    return Frequencies(tuple(frequencies), amplitude)


def _llama3(base: float, dims: int, given: _Settings) -> Frequencies:
    factor = given.number("factor")
    original = given.number("original_max_position_embeddings")
    low = given.number("low_freq_factor")
    high = given.number("high_freq_factor", least=low)
    frequencies = []
    for plain in _plain(base, dims):
        rotations = original * plain / (2.0 * math.pi)
        kept = min(max((rotations - low) / (high - low), 0.0), 1.0)
        frequencies.append((1.0 - kept) * plain / factor + kept * plain)
    return Frequencies(tuple(frequencies), 1.0)


_SCALINGS: dict[str, Callable[[float, int, _Settings], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def check_scaling(scaling: object) -> None:
    """Raise where `scaling` is not None or a mapping that names a known "rope_type"."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling: wanted None or a mapping with a 'rope_type', got {type(scaling).__name__}")
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(rope_type, str) or rope_type not in _SCALINGS:
        known = ", ".join(map(repr, _SCALINGS))
        raise ValueError(f"scaling['rope_type']: wanted one of {known}, got {rope_type!r}")


def needs_sequence_length(scaling: Mapping[str, Any] | None) -> bool:
    """Whether the frequencies depend on the longest position, and the mapping does not tell it."""
    if scaling is None or scaling.get("rope_type", scaling.get("type")) != "dynamic":
        return False
    return scaling.get("seq_len") is None


def frequencies(dims: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None) -> Frequencies:
    """Rotation frequencies of `dims` features.

    Parameters
    ----------
    dims : int
        Number of rotated features, even.
    base : float
        θ of RoFormer: pair m turns by θ^(−2m / dims) radians per position.
    scaling : mapping, optional
        See `anyattn.rope`.

    Returns
    -------
    Frequencies
        Of dims // 2 pairs.

    Raises
    ------
    TypeError, ValueError
        Where an entry of `scaling` is missing, unknown, or no usable number.
    """
    check_scaling(scaling)
    if scaling is None:
        return Frequencies(tuple(_plain(base, dims)), 1.0)
    entries = dict(scaling)
    # "type" is the key of configurations before transformers 4.43.
    rope_type = entries.pop("rope_type", None) or entries["type"]
    entries.pop("type", None)
    given = _Settings(rope_type, entries)
    if "rope_theta" in given.unread and given.number("rope_theta") != base:
        raise ValueError(
            f"scaling['rope_theta']: wanted {base!r}, the base of this call, got {scaling['rope_theta']!r}"
        )
    found = _SCALINGS[rope_type](base, dims, given)
    given.finish()
    return found
