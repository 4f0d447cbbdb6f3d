"""Keys and values of past tokens, in arrays of any library: one buffer that grows, or a ring.

A ring keeps the last tokens and the first ones; positions remain those of the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.expr.functions import where
from anyattn.expr.nodes import B, Expr, J, load
from anyattn.expr.tables import table_of
from anyattn.lookup import GrowingCache, Lookup
from anyattn.numbers import host_integers, integer
from anyattn.quantise import check_constant, quantise

if TYPE_CHECKING:
    import numpy

__all__ = ["KVCache", "stored_rows", "write"]

_KEPT = ", as a cache keeps them there"


def write(buffer: Array, place: tuple[Any, ...], values: Array) -> Array:
    """`buffer` with `values` at `place`: changed where its library can, a new array otherwise."""
    library = arrays.library(buffer)
    if library == "jax":
        return buffer.at[place].set(values)
    if library == "dask":
        raise TypeError("a cache wants an array library that can write to arrays, got dask")
    buffer[place] = values
    return buffer


def stored_rows(k: Array, v: Array, *, quantized: bool) -> dict[str, Array]:
    """Tokens (..., n, D) and (..., n, Dv) as a cache keeps them, with the scales (..., n, 1) of int8 rows."""
    if not quantized:
        return {"k": k, "v": v}
    for name, x in (("k", k), ("v", v)):
        check_constant(x, name)
    (k, k_scales), (v, v_scales) = quantise(k), quantise(v)
    return {"k": k, "v": v, "k_scales": k_scales, "v_scales": v_scales}


class KVCache(GrowingCache):
    """Keys and values of past tokens of a batch of sequences.

    Appending writes into the arrays that the cache owns; on a library without writing (JAX) it replaces them.
    It is meant for eager code: lengths are kept on the host.

    Parameters
    ----------
    k : array, shape (..., Hkv, L, D)
        Keys of the tokens so far, which are copied; L may be 0.
    v : array, shape (..., Hkv, L, Dv)
    window : int, optional
        Keep a ring of the last `window` tokens (and the first `sink_tokens`) and forget the others, which no
        query then sees: of several queries at once, the first find fewer tokens before their own, unless the
        ring is wider by their number than what the mask shows. Default: keep all.
    sink_tokens : int, default 0
        Tokens at the beginning that a ring keeps (G. Xiao et al., "Efficient Streaming Language Models with
        Attention Sinks", 2023).
    capacity : int, optional
        Tokens to make room for at once; a cache without `window` grows by doubling.
    quantize : "int8", optional
        Keep int8 numbers and a float32 scale for each token and head: a quarter of the memory of float32, and
        of the time to read it, for an error of at most the 254th part of each row's largest number. Queries
        keep their dtype; what is appended has no gradients.

    Attributes
    ----------
    k, v : arrays (..., Hkv, capacity, D) and (..., Hkv, capacity, Dv)
        The buffers.
    k_scales, v_scales : arrays (..., Hkv, capacity, 1), or None
        What the rows of int8 buffers are times.
    lengths : numpy.ndarray, shape (...), read-only
        Tokens of each sequence that were appended, those forgotten included.
    longest : int
        The largest of them.

    Examples
    --------
    >>> import numpy as np, anyattn as aa
    >>> k = v = np.ones((2, 1, 5, 8), dtype=np.float32)
    >>> cache = aa.KVCache(k, v)
    >>> cache.append(k[:, :, :1], v[:, :, :1])
    >>> q = np.ones((2, 4, 1, 8), dtype=np.float32)
    >>> aa.attention(q, cache).shape, cache
    ((2, 4, 1, 8), KVCache(2 sequences of 6 tokens, 1 head, capacity 10, numpy float32))
    """

    def __init__(
        self,
        k: Array,
        v: Array,
        *,
        window: int | None = None,
        sink_tokens: int = 0,
        capacity: int | None = None,
        quantize: str | None = None,
    ):
        import numpy

        _check_tokens(k, v)
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize: wanted None or 'int8', got {quantize!r}")
        self.quantize = quantize
        self._dtype = arrays.dtype_name(k)
        self.window = None if window is None else integer(window, "window", least=1)
        self.sink_tokens = integer(sink_tokens, "sink_tokens", least=0)
        if self.window is None and self.sink_tokens:
            raise ValueError("sink_tokens: wanted 0 without a window: all tokens are kept")
        if self.window is not None:
            if capacity is not None:
                raise ValueError("capacity: wanted None with a window, which says it")
            capacity = self.window + self.sink_tokens
        elif capacity is not None:
            capacity = integer(capacity, "capacity", least=0)
        tokens = int(k.shape[-2])
        room = max(tokens, capacity or 0) if self.window is None else capacity
        xp, device = arrays.namespace(k), arrays.device(k)

        def buffer(x: Array, width: int, dtype: Any) -> Array:
            return xp.zeros((*x.shape[:-2], room, width), dtype=dtype, device=device)

        self.k, self.v = (buffer(x, x.shape[-1], xp.int8 if quantize else x.dtype) for x in (k, v))
        self.k_scales, self.v_scales = (buffer(x, 1, xp.float32) if quantize else None for x in (k, v))
        self._keep(numpy.zeros(tuple(k.shape[:-3]), dtype=numpy.int64))
        self.append(k, v)

    @property
    def lengths(self) -> numpy.ndarray[Any, Any]:
        shown = self._lengths.view()
        # Writing to them would leave `longest`, and what calls have read of them, as it was.
        shown.flags.writeable = False
        return shown

    def _keep(self, lengths: numpy.ndarray[Any, Any]) -> None:
        import numpy

        # Writable themselves: torch.compile (2.13) compiles anew at each call that reads one which is not.
        self._lengths = numpy.asarray(lengths)
        # A number, as a compiled function reads no array of NumPy's.
        self.longest = int(self._lengths.max(initial=0))

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return int(self.k.shape[-2])

    def extend(self, k: Array, v: Array) -> None:
        self.append(k, v)

    def undoing(self, count: int) -> Callable[[], None]:
        import numpy

        lengths, overwritten = self._lengths, []
        if self.window is not None and self.longest + count > self.capacity:
            for entry, start, size in self._uniform(numpy.full(lengths.shape, count)):
                for place, _, _ in self._places(start, size):
                    index = (*entry, slice(None), place, slice(None))
                    for name, x in self._buffers().items():
                        rows = arrays.namespace(x).asarray(x[index], copy=True)
                        overwritten.append((name, index, rows))

        def undo() -> None:
            for name, index, rows in overwritten:
                setattr(self, name, write(getattr(self, name), index, rows))
            self._keep(lengths)

        return undo

    def append(self, k: Array, v: Array, lengths: int | Sequence[int] | Array | None = None) -> None:
        """Add tokens at the end of the sequences.

        Parameters
        ----------
        k : array, shape (..., Hkv, n, D)
        v : array, shape (..., Hkv, n, Dv)
        lengths : int, sequence or integer array, optional
            How many of the n are tokens, for each sequence; the others are padding. Default all.
        """
        import numpy

        _check_tokens(k, v)
        for name, new, old in (("k", k, self.k), ("v", v, self.v)):
            arrays.check_beside(new, name, old, "the cache")
            if arrays.dtype_name(new) != self._dtype:
                raise TypeError(f"{name}: wanted dtype {self._dtype}, got {arrays.dtype_name(new)}")
            if (*new.shape[:-2], new.shape[-1]) != (*old.shape[:-2], old.shape[-1]):
                wanted = (*old.shape[:-2], "n", old.shape[-1])
                raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(new.shape)}")
        count = int(k.shape[-2])
        added = numpy.broadcast_to(
            host_integers(count if lengths is None else lengths, "lengths", _KEPT), self._lengths.shape
        )
        if added.size and (added.min() < 0 or added.max() > count):
            raise ValueError(
                f"lengths: wanted numbers between 0 and the {count} new tokens, "
                f"got {added.min()} to {added.max()}"
            )
        longest = int((self._lengths + added).max(initial=0))
        if self.window is None and longest > self.capacity:
            self._grow(max(longest, 2 * self.capacity))
        rows = stored_rows(k, v, quantized=self.quantize is not None)
        for entry, start, size in self._uniform(added):
            for place, first, last in self._places(start, size):
                index = (*entry, slice(None), place, slice(None))
                taken = (*entry, slice(None), slice(first, last), slice(None))
                for name, x in rows.items():
                    setattr(self, name, write(getattr(self, name), index, x[taken]))
        self._keep(self._lengths + added)

    def _grow(self, capacity: int) -> None:
        xp = arrays.namespace(self.k)
        for name, old in self._buffers().items():
            shape = (*old.shape[:-2], capacity - old.shape[-2], old.shape[-1])
            more = xp.zeros(shape, dtype=old.dtype, device=arrays.device(old))
            setattr(self, name, xp.concat([old, more], axis=-2))

    def _buffers(self) -> dict[str, Array]:
        """The arrays that tokens are kept in, on the last axis but one."""
        found = {name: getattr(self, name) for name in ("k", "v", "k_scales", "v_scales")}
        return {name: x for name, x in found.items() if x is not None}

    def _uniform(self, added: numpy.ndarray[Any, Any]) -> Iterator[tuple[tuple[Any, ...], int, int]]:
        """Entries of the batch that are written alike, with their length and what is added."""
        import numpy

        if not added.size:
            return
        if (self._lengths == self._lengths.flat[0]).all() and (added == added.flat[0]).all():
            yield (slice(None),) * added.ndim, int(self._lengths.flat[0]), int(added.flat[0])
            return
        for entry in numpy.ndindex(added.shape):
            yield entry, int(self._lengths[entry]), int(added[entry])

    def _places(self, start: int, size: int) -> Iterator[tuple[slice, int, int]]:
        """Where tokens start, ..., start + size - 1 go: places in a row, and which of the new tokens."""
        if self.window is None:
            yield slice(start, start + size), 0, size
            return
        end, sinks, window = start + size, self.sink_tokens, self.window
        if start < sinks:
            yield slice(start, min(end, sinks)), 0, min(end, sinks) - start
        # What the ring would overwrite at once is left out.
        token = max(start, sinks, end - window)
        while token < end:
            place = sinks + (token - sinks) % window
            run = min(end - token, sinks + window - place)
            yield slice(place, place + run), token - start, token - start + run
            token += run

    def lookup(self) -> Lookup:
        return self.lookup_beside(self._lengths.shape)

    def lookup_beside(self, batch_shape: tuple[int, ...]) -> Lookup:
        if self.window is None:
            return self._first_places(self._lengths, self.longest)
        lengths = self._beside(self._lengths)
        length: Any = self._length_of(batch_shape) if self._lengths.ndim else lengths
        last = length - 1
        in_ring = last - (last - J) % self.window
        is_first = self.sink_tokens > J
        return Lookup(
            **self._buffers_for_attention(),
            lengths=lengths,
            visible=where(is_first, length > J, in_ring >= self.sink_tokens),
            token=where(is_first, J, in_ring),
            most_queries=self.window if self.longest > self.capacity else None,
        )

    def _length_of(self, batch_shape: tuple[int, ...]) -> Expr:
        """Tokens of the sequence of each batch entry of a call with queries of these batch axes."""
        import numpy

        from anyattn.expr.bind import batch_indices

        own = self._lengths.shape
        try:
            whole = numpy.broadcast_shapes(own, batch_shape)
        except ValueError:
            whole = own  # the description of the call says so
        same = whole == own
        kept = self._lengths.flatten() if same else self._lengths.copy()
        # The host's, so that a schedule knows them wherever the buffer lies.
        table = table_of(kept, "tokens of each sequence", host=True)
        return load(table, (B,) if same else batch_indices(own, whole))

    def lookup_in_first_places(self, *, in_order: bool) -> Lookup | None:
        import numpy

        # Until a ring is full, its tokens lie where masks count them.
        if self.window is None or not self._has_views or (in_order and self.longest > self.capacity):
            return None
        held = numpy.minimum(self._lengths, self.capacity)
        return self._first_places(held, min(self.longest, self.capacity))

    def _first_places(self, lengths: numpy.ndarray[Any, Any], longest: int) -> Lookup:
        """The first places of the buffers as the tokens of sequences, so many of each."""
        found = Lookup(**self._buffers_for_attention(), lengths=0, longest=longest)
        if self._has_views and len(set(lengths.ravel().tolist())) <= 1:
            # Keys without room for more need no mask.
            return replace(found.without_room(), lengths=found.longest)
        return replace(found, lengths=self._beside(lengths))

    @property
    def _has_views(self) -> bool:
        """Whether some of the keys cost no more to call with than all.

        JAX compiles each number of keys anew; on a device a plan is of one number, and a schedule knows the
        lengths in a ring's mask, which are the host's.
        """
        return arrays.library(self.k) in ("numpy", "torch") and arrays.is_concrete_cpu(self.k)

    def _buffers_for_attention(self) -> dict[str, Array | None]:
        k_scales, v_scales = (None if x is None else x[..., 0] for x in (self.k_scales, self.v_scales))
        return {"k": self.k, "v": self.v, "k_scales": k_scales, "v_scales": v_scales}

    def _beside(self, lengths: numpy.ndarray[Any, Any]) -> Any:
        """Lengths as an array beside the buffers, or a number where there is one sequence without an axis."""
        if not lengths.ndim:
            return lengths.item()
        xp, device = arrays.namespace(self.k), arrays.device(self.k)
        # torch would share the memory, which nobody may write to.
        return xp.asarray(lengths, dtype=arrays.index_dtype(xp, device), device=device, copy=True)

    def reorder(self, indices: Sequence[int] | Array) -> None:
        """Sequence n becomes what sequence ``indices[n]`` was, as beam search wants it.

        Parameters
        ----------
        indices : sequence or integer array, shape (B,)
            Of a cache with one batch axis; repeated and left out as the search decides.
        """
        if self._lengths.ndim != 1:
            raise ValueError(f"reorder: wanted a cache with one batch axis, got {self._lengths.ndim}")
        chosen = host_integers(indices, "indices", _KEPT)
        count = len(self._lengths)
        if chosen.ndim != 1 or (chosen.size and (chosen.min() < 0 or chosen.max() >= count)):
            raise ValueError(f"indices: wanted numbers of the {count} sequences, from 0, got {indices!r}")
        xp, device = arrays.namespace(self.k), arrays.device(self.k)
        placed = xp.asarray(chosen, dtype=arrays.index_dtype(xp, device), device=device)
        for name, x in self._buffers().items():
            setattr(self, name, arrays.take(xp, x, placed, axis=-x.ndim))
        self._keep(self._lengths[chosen])

    def crop(self, lengths: int | Sequence[int] | Array) -> None:
        """Forget tokens from the end.

        Parameters
        ----------
        lengths : int, sequence or integer array
            Tokens that each sequence keeps at most; shorter ones stay as they are.

        Raises
        ------
        ValueError
            For a ring that has overwritten tokens which would be among the last ones again.
        """
        import numpy

        kept = numpy.minimum(self._lengths, host_integers(lengths, "lengths", _KEPT))
        if kept.size and kept.min() < 0:
            raise ValueError(f"lengths: wanted 0 or more, got {lengths!r}")
        if (
            self.window is not None
            and ((kept < self._lengths) & (self._lengths > self.window + self.sink_tokens)).any()
        ):
            raise ValueError("crop: the ring has overwritten tokens that would be the last ones again")
        self._keep(kept)

    def __repr__(self) -> str:
        lengths = sorted({int(n) for n in self._lengths.flat})
        tokens = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(*lengths or [0])
        heads = int(self.k.shape[-3])
        ring = "" if self.window is None else f", the last {self.window} kept"
        ring += f" and the first {self.sink_tokens}" if self.sink_tokens else ""
        count = math.prod(self._lengths.shape)
        return (
            f"KVCache({count} sequence{'s' * (count != 1)} of {tokens} tokens{ring}, "
            f"{heads} head{'s' * (heads != 1)}, capacity {self.capacity}, "
            f"{arrays.library(self.k)} {arrays.dtype_name(self.k)})"
        )


def _check_tokens(k: Any, v: Any) -> None:
    """Keys and values of the same tokens."""
    arrays.check_plain(k, "k")
    arrays.check_beside(v, "v", k, "k")
    if k.ndim < 3 or v.ndim != k.ndim or tuple(v.shape[:-1]) != tuple(k.shape[:-1]):
        raise ValueError(
            f"v: wanted (..., heads, tokens, dim) with all axes but the last like k, "
            f"got k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
