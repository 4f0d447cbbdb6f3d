"""What heads do, in numbers: where they look, how sharply, and what that is usually called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.numbers import host_integers, integer, real

if TYPE_CHECKING:
    import numpy

    NDArray = numpy.ndarray[Any, Any]

__all__ = ["HeadSummary", "Summary", "host_weights", "rollout", "summarise"]

# A head is called by what takes at least half of its weight; these are tried in order.
_HALF = 0.5
_NEAR = 4
_MOSTLY = 0.8
_EVEN = 0.9
# Weights that are computed with at a time, in float64.
_AT_ONCE = 1 << 20
# What bfloat16 may round a weight of 1 to, and some sums beside it.
_MOST = 1.01


@dataclass(frozen=True)
class HeadSummary:
    """What one head does, averaged over its query rows; rows that see no key are left out.

    Attributes
    ----------
    distance : float
        Mean of abs(i - j) over the weights, in tokens.
    entropy : float
        -sum p ln p, in nats: 0 for one key, ln n for n keys alike.
    first, same, previous, next : float
        Weight on key 0 and on the keys at i, i - 1 and i + 1, of rows that have such a key (`first`: other
        than their own).
    near : float
        Weight on keys with abs(i - j) <= 4.
    evenness : float
        Entropy over that of equal weights on the keys that have weight, 0 to 1.
    """

    distance: float
    entropy: float
    first: float
    same: float
    previous: float
    next: float
    near: float
    evenness: float

    @property
    def kind(self) -> str:
        """What such a head is usually called, after what takes most of its weight; "undefined" of NaN.

        "first token" (an attention sink: G. Xiao et al. 2023), "previous token", "next token" and "same
        token" take half of it or more (K. Clark et al., "What Does BERT Look At?", 2019); a "local" head has
        80 % within four tokens, a "broad" one spreads nearly evenly; the others are "mixed".
        """
        if math.isnan(self.entropy):
            return "undefined"
        shares = {
            "first token": self.first,
            "previous token": self.previous,
            "next token": self.next,
            "same token": self.same,
        }
        most = max(shares, key=shares.__getitem__)
        if shares[most] >= _HALF:
            return most
        if self.evenness >= _EVEN:
            return "broad"
        return "local" if self.near >= _MOSTLY else "mixed"


class Summary(Sequence[HeadSummary]):
    """Summaries of heads in order; prints as a table.

    Attributes
    ----------
    shape : tuple of int
        Axes of the heads: (heads,) or (layers, heads), as the weights had them.
    """

    def __init__(self, shape: tuple[int, ...], heads: Sequence[HeadSummary]):
        self.shape = shape
        self._heads = tuple(heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            if len(index) != len(self.shape):
                raise IndexError(f"wanted {len(self.shape)} indices of heads {self.shape}, got {index}")
            return self._heads[sum(n * math.prod(self.shape[a + 1 :]) for a, n in enumerate(index))]
        return self._heads[index]

    def kinds(self) -> dict[str, int]:
        """How many heads there are of each kind, most first."""
        counted: dict[str, int] = {}
        for head in self._heads:
            counted[head.kind] = counted.get(head.kind, 0) + 1
        return dict(sorted(counted.items(), key=lambda entry: -entry[1]))

    def __repr__(self) -> str:
        width = max([4, *(len(_name(index)) for index in _indices(self.shape))])
        kind = max([4, *(len(head.kind) for head in self._heads)])
        lines = [f"{'head':<{width}}  {'kind':<{kind}}  distance  entropy  first   same  previous   next"]
        for index, head in zip(_indices(self.shape), self._heads, strict=True):
            shares = (f"{100 * x:.1f}%" for x in (head.first, head.same, head.previous, head.next))
            first, same, previous, following = shares
            lines.append(
                f"{_name(index):>{width}}  {head.kind:<{kind}}  {head.distance:8.2f}  {head.entropy:7.2f}  "
                f"{first:>5}  {same:>5}  {previous:>8}  {following:>5}"
            )
        return "\n".join(lines)


def summarise(
    weights: Array, q_offset: int | None = None, *, rows: int | Sequence[int] | Array | None = None
) -> Summary:
    """What each head does.

    Parameters
    ----------
    weights : float array, shape (..., Lq, Lk)
        Softmax weights, as `attention_weights` gives them, of arrays that the host can read; axes before the
        last two are heads, layers, batch entries. A few rows at a time are computed with.
    q_offset : int, optional
        Position of query row 0 among the keys. By default 0 of as many rows as keys; wanted of others, as
        their number does not tell the last rows of a text from chosen ones or from those of another text.
    rows : int, sequence or integer array, optional
        What `attention_weights` was given as ``rows``, beside `q_offset`.

    Returns
    -------
    Summary
        A `HeadSummary` for each matrix.
    """
    import numpy

    w = host_weights(weights, "weights")
    i = _positions(w.shape[-2], w.shape[-1], q_offset, rows)
    shape = w.shape[:-2]
    step = max(1, _AT_ONCE // max(1, math.prod(shape) * w.shape[-1]))
    sums = numpy.zeros((len(fields(HeadSummary)), *shape))
    counts = numpy.zeros_like(sums)
    for start in range(0, len(i) if w.shape[-1] else 0, step):
        some = slice(start, start + step)
        part = _of_rows(numpy.asarray(w[..., some, :], dtype=numpy.float64), i[some])
        for n, field in enumerate(fields(HeadSummary)):
            values, counted = part[field.name]
            sums[n] += (values * counted).sum(axis=-1)
            counts[n] += counted.sum(axis=-1)
    found = sums / numpy.maximum(counts, 1)
    return Summary(shape, [HeadSummary(*found[:, *index].tolist()) for index in numpy.ndindex(shape)])


def _positions(count: int, keys: int, q_offset: int | None, rows: Any) -> NDArray:
    """Where rows of weights stand among the keys, (count,)."""
    import numpy

    if q_offset is None:
        if rows is not None:
            raise ValueError("q_offset: wanted the position of row 0 beside rows, got None")
        if count != keys:
            raise ValueError(
                f"q_offset: wanted the position of row 0 (beside rows, where these were chosen), as {count} "
                f"rows of {keys} keys do not tell it, got None"
            )
        q_offset = 0
    chosen = numpy.arange(count) if rows is None else host_integers(rows, "rows", "").reshape(-1)
    if len(chosen) != count or (chosen < 0).any():
        raise ValueError(f"rows: wanted the numbers, from 0, of the {count} rows of weights, got {chosen}")
    return chosen + integer(q_offset, "q_offset")


def _of_rows(w: NDArray, i: NDArray) -> dict[str, tuple[NDArray, NDArray]]:
    """By field of `HeadSummary` its values for rows at `i`, (..., R), and which of them count."""
    import numpy

    keys = w.shape[-1]
    j = numpy.arange(keys)
    total = w.sum(axis=-1, keepdims=True)
    seen = total[..., 0] > 0
    p = w / numpy.where(total > 0, total, 1.0)

    def share(shift: int) -> tuple[NDArray, NDArray]:
        there = (i + shift >= 0) & (i + shift < keys)
        at = numpy.where(there, i + shift, 0).reshape(*[1] * (w.ndim - 2), len(i), 1)
        return numpy.take_along_axis(p, at, axis=-1)[..., 0] * there, seen & there

    far = abs(i[:, None] - j)
    surprise = -(p * numpy.log(numpy.where(p > 0, p, 1.0))).sum(axis=-1)
    flat = numpy.log(numpy.maximum((p > 0).sum(axis=-1), 1))
    return {
        "distance": ((p * far).sum(axis=-1), seen),
        "entropy": (surprise, seen),
        "first": (p[..., 0], seen & (i != 0)),
        "same": share(0),
        "previous": share(-1),
        "next": share(1),
        "near": ((p * (far <= _NEAR)).sum(axis=-1), seen),
        "evenness": (surprise / numpy.where(flat > 0, flat, 1.0), seen & (flat > 0)),
    }


def rollout(weights: Array | Iterable[Array], residual: float = 0.5) -> NDArray:
    """How much of each input token reaches each output token, through all layers.

    S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", 2020: heads are averaged, a layer
    passes on ``residual`` of what it gets beside ``1 - residual`` of what it attends to, and layers multiply.

    Parameters
    ----------
    weights : arrays of shape (..., H, L, L), from the first layer to the last
        Or one array with layers on its first axis. The host must be able to read them.
    residual : float, default 0.5
        In [0, 1].

    Returns
    -------
    numpy.ndarray, shape (layers, ..., L, L)
        Rollout up to each layer, float64; rows sum to 1 where the weights' do.
    """
    import numpy

    residual = real(residual, "residual")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual: wanted a share in [0, 1], got {residual}")
    if not arrays.is_array(weights) and not isinstance(weights, Iterable):
        raise TypeError(f"weights: wanted layers of weights, got {type(weights).__name__}")
    layers = [host_weights(layer, "weights") for layer in _layers(weights)]
    if not layers:
        raise ValueError("weights: wanted one layer or more, got none")
    found: list[NDArray] = []
    for number, layer in enumerate(layers):
        of = layers[0].shape
        wanted = (*of[:-3], *layer.shape[-3:-2], of[-1], of[-1])
        if layer.ndim < 3 or layer.shape[-3] == 0 or layer.shape != wanted:
            raise ValueError(
                f"weights: wanted layers (..., heads, L, L) of one L, one head or more and the same axes "
                f"before them, got {layer.shape} in layer {number} and {of} in layer 0"
            )
        mixed = layer.mean(axis=-3, dtype=numpy.float64) * (1 - residual)
        mixed += residual * numpy.eye(layer.shape[-1])
        found.append(mixed @ found[-1] if found else mixed)
    return numpy.stack(found)


def host_weights(weights: Any, name: str) -> NDArray:
    """Weights as a NumPy array of their dtype, where the host can read them."""
    import numpy

    if not arrays.is_array(weights):
        raise TypeError(f"{name}: wanted an array, got {type(weights).__name__}")
    if not arrays.is_concrete_cpu(weights):
        raise TypeError(
            f"{name}: wanted an array that the host can read, got one on {arrays.device(weights)}"
        )
    if arrays.kind(weights) != "float" or weights.ndim < 2:
        raise ValueError(
            f"{name}: wanted floats of shape (..., rows, keys), got {arrays.dtype_name(weights)} "
            f"{tuple(weights.shape)}"
        )
    if arrays.dtype_name(weights) == "bfloat16" and arrays.library(weights) != "numpy":
        # torch hands NumPy none of these.
        xp = arrays.namespace(weights)
        weights = arrays.cast(xp, weights, xp.float32)
    found: NDArray = numpy.asarray(arrays.to_host(weights))
    for value in (numpy.fmin.reduce(found, None, initial=0), numpy.fmax.reduce(found, None, initial=0)):
        if not 0 <= value <= _MOST:
            raise ValueError(f"{name}: wanted softmax weights, which are from 0 to 1, got {value}")
    return found


def _layers(weights: Any) -> Iterator[Any]:
    if arrays.is_array(weights):
        for number in range(weights.shape[0]):
            yield weights[number, ...]
    else:
        yield from weights


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    import numpy

    return numpy.ndindex(shape)


def _name(index: tuple[int, ...]) -> str:
    return ".".join(map(str, index)) or "-"
