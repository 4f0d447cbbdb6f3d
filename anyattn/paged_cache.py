"""Keys and values in pages of one pool that sequences of any length share.

W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.

To `attention` the pool is one long key axis that all sequences have in common, and a sequence sees the
places of its own pages; a schedule visits those alone. Pages are read where they lie. Prefixes are shared by
counting who uses a page: a page that several sequences use is copied before one of them writes to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.expr.nodes import B, J, load
from anyattn.expr.tables import table_of
from anyattn.kv_cache import stored_rows, write
from anyattn.lookup import GrowingCache, Lookup
from anyattn.numbers import integer

__all__ = ["PagedKVCache", "PagedSequences", "in_pages"]

# What a token becomes (`stored_rows`), and where it is kept.
_POOLS = {"k": "k_pages", "v": "v_pages", "k_scales": "k_scales", "v_scales": "v_scales"}


@dataclass
class _Sequence:
    """The pages of a sequence, in its order, and its number of tokens."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache(GrowingCache):
    """Keys and values of many sequences in one pool of pages.

    It is meant for eager code: tables and lengths are kept on the host. Appending writes into the pool; on a
    library without writing (JAX) it replaces it.

    Parameters
    ----------
    k_pages : array, shape (pages, page_size, Hkv, D)
        The pool, whose tokens lie at one distance from each other in memory, across pages too, and which the
        cache writes to from now on: floats, or int8, for which the cache keeps a float32
        scale for each token and head (`KVCache` says what that costs); tokens of any float dtype go there.
    v_pages : array, shape (pages, page_size, Hkv, Dv)

    Attributes
    ----------
    k_pages, v_pages : arrays
    k_scales, v_scales : arrays (pages, page_size, Hkv, 1), or None
        What the rows of int8 pages are times.
    sequences : tuple of int
        Numbers of the sequences there are, in the order in which they were added; `attention(q, cache)` takes
        them as the batch entries of q, and ``cache[numbers]`` some of them.
    free_pages : int
        Pages that no sequence uses.

    Examples
    --------
    >>> import numpy as np, anyattn as aa
    >>> cache = aa.PagedKVCache(*np.zeros((2, 32, 4, 1, 8), dtype=np.float32))
    >>> first = cache.add()
    >>> tokens = np.ones((1, 6, 8), dtype=np.float32)
    >>> cache.append(first, tokens, tokens)
    >>> second = cache.fork(first)
    >>> cache.append(second, tokens[:, :1], tokens[:, :1])
    >>> cache
    PagedKVCache(2 sequences, 13 tokens, 3 of 32 pages of 4, 1 head, numpy float32)
    >>> aa.attention(np.ones((2, 4, 1, 8), dtype=np.float32), cache).shape
    (2, 4, 1, 8)
    """

    def __init__(self, k_pages: Array, v_pages: Array):
        arrays.check_plain(k_pages, "k_pages")
        arrays.check_beside(v_pages, "v_pages", k_pages, "k_pages")
        if k_pages.ndim != 4 or v_pages.ndim != 4 or tuple(k_pages.shape[:3]) != tuple(v_pages.shape[:3]):
            raise ValueError(
                f"k_pages, v_pages: wanted (pages, page_size, heads, dim) with all axes but the last alike, "
                f"got {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
            )
        if k_pages.shape[1] == 0:
            raise ValueError(f"k_pages: wanted pages of 1 token or more, got shape {tuple(k_pages.shape)}")
        for name, pool in (("k_pages", k_pages), ("v_pages", v_pages)):
            _check_in_a_row(pool, name)
        names = [arrays.dtype_name(x) for x in (k_pages, v_pages)]
        if names[0] != names[1] or names[0] not in (*arrays.FLOAT_DTYPES, "int8"):
            raise TypeError(f"k_pages, v_pages: wanted one dtype, a float or int8, got {' and '.join(names)}")
        self.k_pages, self.v_pages = k_pages, v_pages
        self.k_scales = self.v_scales = None
        if names[0] == "int8":
            xp, shape = arrays.namespace(k_pages), (*k_pages.shape[:3], 1)
            self.k_scales, self.v_scales = (
                xp.zeros(shape, dtype=xp.float32, device=arrays.device(k_pages)) for _ in range(2)
            )
        self._users = [0] * int(k_pages.shape[0])
        self._free = list(range(int(k_pages.shape[0])))  # a heap: low pages first keep the pool dense
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def page_size(self) -> int:
        return int(self.k_pages.shape[1])

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(self._sequences)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._known(sequence).length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in its order; its token t lies in entry t // page_size."""
        return tuple(self._known(sequence).pages)

    def add(self) -> int:
        """Begin a sequence without tokens; return its number."""
        return self._insert(_Sequence())

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the tokens of another, whose pages both use until one writes to them."""
        known = self._known(sequence)
        for page in known.pages:
            self._users[page] += 1
        return self._insert(_Sequence(list(known.pages), known.length))

    def free(self, sequence: int) -> None:
        """End a sequence; pages that nobody else uses are free again."""
        self.crop(sequence, 0)
        del self._sequences[sequence]

    def crop(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from number `length` on."""
        known = self._known(sequence)
        known.length = min(known.length, integer(length, "length", least=0))
        used = -(-known.length // self.page_size)
        for page in known.pages[used:]:
            self._release(page)
        del known.pages[used:]

    def append(self, sequence: int, k: Array, v: Array) -> None:
        """Add tokens at the end of a sequence.

        Parameters
        ----------
        sequence : int
        k : array, shape (Hkv, n, D)
        v : array, shape (Hkv, n, Dv)

        Raises
        ------
        MemoryError
            If too few pages are free; the cache is then as before.
        """
        known = self._known(sequence)
        for name, new, pool in (("k", k, self.k_pages), ("v", v, self.v_pages)):
            arrays.check_plain(new, name)
            arrays.check_beside(new, name, pool, "the cache")
            taken = arrays.FLOAT_DTYPES if self.k_scales is not None else (arrays.dtype_name(pool),)
            if arrays.dtype_name(new) not in taken:
                raise TypeError(f"{name}: wanted dtype {', '.join(taken)}, got {arrays.dtype_name(new)}")
            wanted = (int(pool.shape[2]), int(k.shape[1]) if k.ndim == 3 else "n", int(pool.shape[3]))
            if tuple(new.shape) != wanted:
                raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(new.shape)}")
        count, size = int(k.shape[1]), self.page_size
        if count == 0:
            return
        last = known.length // size
        shared = last < len(known.pages) and self._users[known.pages[last]] > 1
        needed = -(-(known.length + count) // size) - len(known.pages) + shared
        if needed > len(self._free):
            raise MemoryError(
                f"append: {count} tokens need {needed} more pages of {size}, {len(self._free)} are free"
            )
        # Before anything is written: it may refuse the tokens.
        stored = stored_rows(k, v, quantized=self.k_scales is not None)
        rows = {_POOLS[name]: x for name, x in stored.items()}
        if shared:
            self._copy_page(known, last)
        done = 0
        xp = arrays.namespace(k)
        while done < count:
            page, start = divmod(known.length, size)
            if page == len(known.pages):
                known.pages.append(self._take())
            run = min(count - done, size - start)
            place = known.pages[page], slice(start, start + run), slice(None), slice(None)
            part = slice(None), slice(done, done + run), slice(None)
            for name, x in rows.items():
                setattr(self, name, write(getattr(self, name), place, xp.moveaxis(x[part], 0, 1)))
            known.length += run
            done += run

    def __getitem__(self, sequences: int | Sequence[int]) -> PagedSequences:
        """Some sequences, in this order, for `attention`."""
        chosen = [sequences] if isinstance(sequences, int) else list(sequences)
        for number in chosen:
            self._known(number)
        return PagedSequences(self, tuple(chosen))

    @property
    def lengths(self) -> Any:
        return self[self.sequences].lengths

    def lookup(self) -> Lookup:
        return self[self.sequences].lookup()

    def extend(self, k: Array, v: Array) -> None:
        self[self.sequences].extend(k, v)

    def undoing(self, count: int) -> Callable[[], None]:
        return self[self.sequences].undoing(count)

    def _known(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise KeyError(f"sequence: the cache has {list(self._sequences)}, got {sequence!r}")
        return self._sequences[sequence]

    def _insert(self, new: _Sequence) -> int:
        number = self._next
        self._next += 1
        self._sequences[number] = new
        return number

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self._users[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            heapq.heappush(self._free, page)

    def _copy_page(self, known: _Sequence, entry: int) -> None:
        """Give a sequence a page of its own with what a shared one holds."""
        old, new = known.pages[entry], self._take()
        for name in _POOLS.values():
            pool = getattr(self, name)
            if pool is not None:
                setattr(self, name, write(pool, (new, ...), pool[old, ...]))
        known.pages[entry] = new
        self._release(old)

    def _restore(self, sequence: int, length: int, pages: tuple[int, ...]) -> None:
        """Take away what was added since a sequence had these, and the copy of a page that it shared."""
        known = self._known(sequence)
        for page in pages:
            self._users[page] += 1
        for page in known.pages:
            self._release(page)
        known.pages, known.length = list(pages), length

    def __repr__(self) -> str:
        count, heads = len(self._sequences), int(self.k_pages.shape[2])
        tokens = sum(known.length for known in self._sequences.values())
        used = len(self._users) - len(self._free)
        return (
            f"PagedKVCache({count} sequence{'s' * (count != 1)}, {tokens} tokens, {used} of "
            f"{len(self._users)} pages of {self.page_size}, {heads} head{'s' * (heads != 1)}, "
            f"{arrays.library(self.k_pages)} {arrays.dtype_name(self.k_pages)})"
        )


@dataclass(frozen=True, eq=False)
class PagedSequences(GrowingCache):
    """Some sequences of a `PagedKVCache`, which `attention` takes as batch entries."""

    cache: PagedKVCache
    sequences: tuple[int, ...]

    @property
    def lengths(self) -> Any:
        import numpy

        return numpy.asarray([self.cache.length(number) for number in self.sequences], dtype=numpy.int64)

    def extend(self, k: Array, v: Array) -> None:
        for name, x in (("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[0] != len(self.sequences):
                raise ValueError(
                    f"{name}: wanted tokens (sequences, heads, n, dim) of {len(self.sequences)} sequences, "
                    f"got shape {tuple(x.shape)}"
                )
        if len(set(self.sequences)) < len(self.sequences):
            raise ValueError(f"sequences: wanted different ones to add tokens to, got {self.sequences}")
        undo = self.undoing(int(k.shape[2]))
        try:
            for n, number in enumerate(self.sequences):
                self.cache.append(number, k[n, ...], v[n, ...])
        except BaseException:
            # A step is of all of them or of none.
            undo()
            raise

    def undoing(self, count: int) -> Callable[[], None]:
        before = [(number, self.cache.length(number), self.cache.pages(number)) for number in self.sequences]

        def undo() -> None:
            for number, length, pages in before:
                self.cache._restore(number, length, pages)

        return undo

    def lookup(self) -> Lookup:
        import numpy

        pool = self.cache.k_pages
        xp, device = arrays.namespace(pool), arrays.device(pool)
        index = arrays.index_dtype(xp, device)
        known = [self.cache._known(number) for number in self.sequences]
        # For each sequence the entry of its table that is this page, -1 if it does not use the page.
        entry = numpy.full((len(known), int(pool.shape[0])), -1, dtype=numpy.int64)
        for row, sequence in zip(entry, known, strict=True):
            row[sequence.pages] = numpy.arange(len(sequence.pages))
        cache, lengths = self.cache, numpy.asarray([sequence.length for sequence in known], numpy.int64)
        # The host keeps these numbers, so it knows which pages a sequence has, wherever the pool lies.
        found = in_pages(cache.k_pages, cache.v_pages, entry, lengths, host=True)
        found = replace(found, lengths=xp.asarray(lengths, dtype=index, device=device))
        if cache.k_scales is None:
            return found
        scales = [_in_a_row(x)[..., 0] for x in (cache.k_scales, cache.v_scales)]
        return replace(found, k_scales=scales[0], v_scales=scales[1])

    def __len__(self) -> int:
        return len(self.sequences)


def in_pages(k_pages: Array, v_pages: Array, entry: Array, lengths: Array, *, host: bool = False) -> Lookup:
    """Where the tokens of sequences lie in a pool.

    Parameters
    ----------
    k_pages, v_pages : arrays (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv)
    entry : integer array (B, pages)
        The how-manieth page of a sequence a page is, -1 for those that it does not use.
    lengths : integer array (B,)
    host : bool
        Whether these two are NumPy's own, and no arrays beside the pages.
    """
    size = int(k_pages.shape[1])
    page = load(table_of(entry, "pages", ("b", None), host=host), (B, J // size))
    length = load(table_of(lengths, "tokens of each sequence", ("b",), host=host), (B,))
    token = page * size + J % size
    return Lookup(_in_a_row(k_pages), _in_a_row(v_pages), lengths, (page >= 0) & (token < length), token)


def _check_in_a_row(pool: Any, name: str) -> None:
    """Raise where the pages cannot be read as one key axis without a copy of all of them."""
    pages, size = (int(n) for n in pool.shape[:2])
    strides = arrays.strides(pool)
    if strides is not None and pages > 1 and size > 1 and strides[0] != size * strides[1]:
        raise ValueError(
            f"{name}: wanted pages in which all tokens lie at one distance from each other in memory, as in "
            f"a contiguous (pages, page_size, heads, dim), got strides {strides} for "
            f"{tuple(pool.shape)}"
        )


def _in_a_row(pool: Array) -> Array:
    """(pages, page_size, Hkv, n) as (Hkv, pages * page_size, n)."""
    xp = arrays.namespace(pool)
    return xp.moveaxis(xp.reshape(pool, (pool.shape[0] * pool.shape[1], *pool.shape[2:])), 1, 0)
