"""Attention over packed sequences: sequences of different lengths end to end, without padding.

No backend knows of packing. A packed batch is one long call whose mask hides keys of other sequences, and in
whose mask and score functions b, i and j are looked up from the row and the key; the schedule then visits
the tiles along the diagonal alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anyattn import arrays, masks, scores
from anyattn.arrays import Array
from anyattn.attention import attention
from anyattn.dropout import Dropout
from anyattn.dynamo import leave_out, packed, read_instead
from anyattn.expr.nodes import ROW, Expr, J, load
from anyattn.expr.relocate import Relocation
from anyattn.expr.tables import table_of
from anyattn.lookup import Lookup
from anyattn.masks import Mask
from anyattn.numbers import host_integers, integer
from anyattn.scores import Score

__all__ = ["pack", "packed_options", "unpack", "varlen_attention"]

_SIZES = ": they are sizes of the result"


def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Sequence[int] | Array,
    cu_seqlens_k: Sequence[int] | Array,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | Callable[..., Any] | None = None,
    score_mod: Score | Callable[..., Any] | None = None,
    softcap: float | None = None,
    sinks: Sequence[float] | Array | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Array | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention within each of several sequences that lie end to end.

    Sequence n has the queries from ``cu_seqlens_q[n]`` up to ``cu_seqlens_q[n + 1]`` and the keys likewise.
    Its rows are 0, 1, ..., its query row r stands at position i = r + (keys - queries of the sequence), its
    keys are j = 0, 1, ..., and b is n, in all options.

    Parameters
    ----------
    q : array, shape (Tq, Hq, D)
    k : array, shape (Tk, Hkv, D)
    v : array, shape (Tk, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : sequence or integer array, shape (N + 1,)
        Where sequences begin, and where the last one ends: 0, ..., Tq and 0, ..., Tk, never falling. Values
        are checked where the host can read them.
    max_seqlen_q, max_seqlen_k : int, optional
        Lengths that no sequence exceeds, as flash-attn wants them; no kernel here needs them.
    causal, window, softcap, sinks, scale, dropout, dropout_seed, backend
        As for `attention`.
    mask : Mask or function, optional
        An expression; one that reads an array for each batch entry reads it for each sequence. Arrays along
        rows and keys (`dense`, `block_sparse`) are refused, as is `random_blocks`.
    score_mod : Score or function, optional
        Likewise; a bias is written ``s + table[...]``. `relative_keys` is refused.
    return_lse : bool, default False

    Returns
    -------
    out : array, shape (Tq, Hq, Dv)
    lse : array, shape (Hq, Tq)
        Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        As `attention`; the message names the argument.
    """
    options = packed_options(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlens=(max_seqlen_q, max_seqlen_k),
        causal=causal,
        window=window,
        mask=mask,
        score_mod=score_mod,
        dropout=dropout,
    )
    return attention(
        q,
        k,
        v,
        **options,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
    )


def packed_options(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlens: tuple[Any, Any] = (None, None),
    causal: bool,
    window: Any,
    mask: Any,
    score_mod: Any,
    dropout: Any = 0.0,
    pages: Lookup | None = None,
) -> dict[str, Any]:
    """The mask, score_mod, dropout and layout with which `attention` is that of packed sequences.

    With `pages`, keys lie where these say, in any order.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.check_plain(x, name)
        if x.ndim != 3:
            raise ValueError(f"{name}: wanted packed sequences (T, heads, dim), got shape {tuple(x.shape)}")
    total = int(k.shape[0]) if pages is None else None
    with arrays.exactly(q):
        queries = _sequences(cu_seqlens_q, "cu_seqlens_q", q, int(q.shape[0]), max_seqlens[0])
        keys = _sequences(cu_seqlens_k, "cu_seqlens_k", k, total, max_seqlens[1])
        if queries.count != keys.count:
            raise ValueError(
                f"cu_seqlens_k: wanted {queries.count + 1} entries like cu_seqlens_q, got {keys.count + 1}"
            )
        if not (queries.host and keys.host):
            queries, keys = queries.beside(q), keys.beside(q)
        visible, within = _relocation(queries, keys, pages)
    seen = [masks.causal()] if causal else []
    seen += [masks.sliding_window(*masks.window_bounds(window, "window"))] if window is not None else []
    seen += [masks.as_mask(mask, "mask")] if mask is not None else []
    for part in seen:
        visible = visible & within(part.expr, "mask")
    score = None if score_mod is None else scores.as_score(score_mod)
    shown = f"{queries.count} packed sequences" + ("" if mask is None else f", {mask!r}")
    return {
        "mask": Mask(visible, shown),
        "score_mod": None if score is None else Score(within(score.expr, "score_mod"), repr(score)),
        "dropout": dropout if dropout == 0 else Dropout(dropout, within),
        "layout": "blhd",
    }


def pack(x: Array, lengths: Sequence[int] | Array) -> tuple[Array, Array]:
    """Padded sequences without their padding.

    Parameters
    ----------
    x : array, shape (B, L, ...)
        Sequences that begin at 0 of the second axis.
    lengths : sequence or integer array, shape (B,)
        Their lengths, which the host can read.

    Returns
    -------
    packed : array, shape (sum of lengths, ...)
    cu_seqlens : integer array, shape (B + 1,)
        Beside `x`.
    """
    import numpy

    arrays.check_plain(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x: wanted axes (batch, length, ...), got shape {tuple(x.shape)}")
    host = host_integers(lengths, "lengths", _SIZES)
    if host.shape != (x.shape[0],):
        raise ValueError(f"lengths: wanted shape ({x.shape[0]},), got {host.shape}")
    if host.size and (host.min() < 0 or host.max() > x.shape[1]):
        raise ValueError(
            f"lengths: wanted lengths between 0 and {x.shape[1]}, got {host.min()} to {host.max()}"
        )
    cu_seqlens = numpy.concatenate([[0], numpy.cumsum(host)])
    places = _places(cu_seqlens, x.shape[1])
    xp = arrays.namespace(x)
    with arrays.exactly(x):
        flat = xp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))
        return arrays.take(xp, flat, _beside(places, x), axis=-flat.ndim), _beside(cu_seqlens, x)


def unpack(packed: Array, cu_seqlens: Sequence[int] | Array, length: int | None = None) -> Array:
    """The inverse of `pack`, with zeros for the padding.

    Parameters
    ----------
    packed : array, shape (T, ...)
    cu_seqlens : sequence or integer array, shape (B + 1,)
        Which the host can read.
    length : int, optional
        Length L of the result, by default that of the longest sequence.

    Returns
    -------
    array, shape (B, L, ...)
    """
    import numpy

    arrays.check_plain(packed, "packed")
    host = host_integers(cu_seqlens, "cu_seqlens", _SIZES)
    _check_values(host, "cu_seqlens", int(packed.shape[0]))
    longest = int(numpy.diff(host).max(initial=0))
    length = longest if length is None else integer(length, "length", least=longest)
    count = len(host) - 1
    # Every place of the padding reads a row of zeros behind the last sequence.
    source = numpy.full(count * length, packed.shape[0], dtype=numpy.int64)
    source[_places(host, length)] = numpy.arange(packed.shape[0])
    xp = arrays.namespace(packed)
    with arrays.exactly(packed):
        zero = arrays.full(xp, (1, *packed.shape[1:]), 0, packed.dtype, arrays.device(packed))
        padded = arrays.take(
            xp, xp.concat([packed, zero], axis=0), _beside(source, packed), axis=-packed.ndim
        )
        return xp.reshape(padded, (count, length, *packed.shape[1:]))


def _places(cu_seqlens: Any, length: int) -> Any:
    """Where each row of packed sequences lies in (B * length,) padded ones."""
    import numpy

    sizes = numpy.diff(cu_seqlens)
    shift = numpy.arange(len(sizes)) * length - cu_seqlens[:-1]
    return numpy.arange(cu_seqlens[-1]) + numpy.repeat(shift, sizes)


def _beside(numbers: Any, like: Array) -> Array:
    """Host integers as an array beside another."""
    xp, where = arrays.namespace(like), arrays.device(like)
    return xp.asarray(numbers, dtype=arrays.index_dtype(xp, where), device=where)


def _check_values(host: Any, name: str, total: int | None) -> None:
    """Raise unless `host` are starts of sequences that make up `total` rows, or any number of them."""
    if host.ndim != 1 or len(host) == 0:
        raise ValueError(f"{name}: wanted shape (sequences + 1,), got {host.shape}")
    total = host[-1] if total is None else total
    if host[0] != 0 or host[-1] != total or (host[1:] < host[:-1]).any():
        shown = host.tolist() if len(host) <= 8 else f"{host[0]}, ..., {host[-1]}"
        raise ValueError(f"{name}: wanted numbers from 0 to {total} that never fall, got {shown}")


@dataclass(frozen=True, eq=False)
class _Sequences:
    """Sequences on one axis: for each row of it the number and the start of its sequence, and all lengths.

    `host` says that these are NumPy's own, whatever library the rows are of.
    """

    count: int
    number: Array
    start: Array
    lengths: Array
    host: bool

    def beside(self, x: Array) -> _Sequences:
        """The same beside an array."""
        if not self.host:
            return self
        number, start, lengths = (_beside(part, x) for part in (self.number, self.start, self.lengths))
        return _Sequences(self.count, number, start, lengths, host=False)


def _sequences(cu_seqlens: Any, name: str, x: Array, total: int | None, longest: Any) -> _Sequences:
    """The sequences that `cu_seqlens` cuts the first axis of `x` into, if all its `total` rows are theirs."""
    import numpy

    if longest is not None:
        longest = integer(longest, name.replace("cu_seqlens", "max_seqlen"), least=0)
    xp = arrays.namespace(x)
    if arrays.is_array(cu_seqlens):
        if arrays.kind(cu_seqlens) != "int":
            raise TypeError(f"{name}: wanted integers, got dtype {arrays.dtype_name(cu_seqlens)}")
        arrays.check_beside(cu_seqlens, name, x, "q")
    if not arrays.is_array(cu_seqlens) or arrays.is_concrete_cpu(cu_seqlens):
        host = host_integers(cu_seqlens, name, _SIZES)
        _check_values(host, name, total)
        lengths = numpy.diff(host)
        if longest is not None and len(lengths) and lengths.max() > longest:
            raise ValueError(
                f"{name.replace('cu_seqlens', 'max_seqlen')}: wanted at least {lengths.max()}, the longest "
                f"sequence, got {longest}"
            )
        number = numpy.repeat(numpy.arange(len(lengths)), lengths)
        return _Sequences(len(lengths), number, host[:-1][number], lengths, host=True)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: wanted shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    ends = arrays.cast(xp, cu_seqlens[1:], arrays.index_dtype(xp, arrays.device(x)))
    starts = arrays.cast(xp, cu_seqlens[:-1], ends.dtype)
    row = xp.arange(total or 0, dtype=ends.dtype, device=arrays.device(x))
    number = xp.searchsorted(ends, row, side="right")
    number = arrays.clip(xp, arrays.cast(xp, number, ends.dtype), 0, max(int(ends.shape[0]) - 1, 0))
    start = arrays.take(xp, starts, number, axis=-1)
    return _Sequences(int(ends.shape[0]), number, start, ends - starts, host=False)


def _relocation(queries: _Sequences, keys: _Sequences, pages: Lookup | None) -> tuple[Expr, Relocation]:
    """Whether a row and a key are of one sequence, and b, row, i and j within it."""
    xp = arrays.namespace(queries.number)
    ahead = arrays.take(xp, keys.lengths - queries.lengths, queries.number, axis=-1)
    host = queries.host

    def read(x: Array, label: str, index: Expr) -> Expr:
        return load(table_of(x, label, host=host), (index,))

    b = read(queries.number, "sequence of each query", ROW)
    inside: dict[str, Expr] = {
        "b": b,
        "row": ROW - read(queries.start, "start of each query's sequence", ROW),
        "i": ROW + read(ahead - queries.start, "position of each query", ROW),
    }
    if pages is None:
        together = b == read(keys.number, "sequence of each key", J)
        token = J - read(keys.start, "start of each key's sequence", J)
    else:
        assert pages.visible is not None
        assert pages.token is not None
        of_row = Relocation(inside, queries.count)
        together, token = (of_row(part, "block_table") for part in (pages.visible, pages.token))
    return together, Relocation({**inside, "j": token}, queries.count)


# Before `torch.compile` reads a function that calls them.
read_instead(varlen_attention, packed)
leave_out(pack, "lengths are sizes of the result; pack outside of the compiled function")
leave_out(unpack, "lengths are sizes of the result; unpack outside of the compiled function")
