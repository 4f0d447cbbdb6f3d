"""Masks: which keys a query row may see, as small expressions that combine with `&`, `|` and `~`.

In every entry i is the position of the query (row + `q_offset`) and j the key; `positions=False` uses the row
number instead of the position. Arrays (`dense`, `block_sparse`) are indexed by row. Nothing here looks at an
array of keys or queries: an entry is a description that the call binds and a backend evaluates or compiles.

>>> import anyattn as aa
>>> aa.masks.causal() & aa.masks.sliding_window(512) | aa.masks.global_tokens(64)
causal() & sliding_window(512) | global_tokens(64)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.expr.functions import where
from anyattn.expr.nodes import ROW, Aligned, B, Const, Deferred, Expr, I, J, Size, load
from anyattn.expr.tables import table_of
from anyattn.numbers import boolean, integer, is_integer

if TYPE_CHECKING:
    from anyattn.expr.bind import Geometry
    from anyattn.expr.trace import Read
    from anyattn.picture import Picture

__all__ = [
    "Mask",
    "block_sparse",
    "causal",
    "dense",
    "dilated",
    "documents",
    "fixed",
    "from_function",
    "global_tokens",
    "padding",
    "prefix",
    "random_blocks",
    "sliding_window",
    "strided",
    "top_blocks",
]

# A membership test is spelled out up to this many tokens, looked up in a table beyond.
_FEW_TOKENS = 8
# Blocks of queries in the table of random blocks: 2**24 blocks of 64 are a billion positions.
_MOST_BLOCKS = 2**24
_PRECEDENCE = {"|": 1, "&": 2, "~": 3, "": 4}


class Mask:
    """A mask expression: True where query row i of head h in batch entry b sees key j.

    Masks are made by the functions of `anyattn.masks` and combined with `&`, `|` and `~`, also with boolean
    arrays and with functions (b, h, i, j) -> bool.
    """

    __slots__ = ("_operator", "_words", "expr", "reads")
    __array_ufunc__ = None

    def __init__(self, expr: Expr, words: str, operator: str = "", reads: tuple[Read, ...] = ()):
        self.expr = expr
        # Arrays, with their names, whose values were read while a function was traced.
        self.reads = reads
        self._words = words
        self._operator = operator

    def __repr__(self) -> str:
        return self._words

    def _within(self, operator: str) -> str:
        inner = _PRECEDENCE[self._operator] >= _PRECEDENCE[operator]
        return self._words if inner else f"({self._words})"

    def _join(self, other: Any, operator: str, left: bool = True) -> Mask:
        other = as_mask(other, "mask")
        first, second = (self, other) if left else (other, self)
        expr = first.expr & second.expr if operator == "&" else first.expr | second.expr
        words = f"{first._within(operator)} {operator} {second._within(operator)}"
        return Mask(expr, words, operator, first.reads + second.reads)

    def __and__(self, other: Any) -> Mask:
        return self._join(other, "&")

    def __rand__(self, other: Any) -> Mask:
        return self._join(other, "&", left=False)

    def __or__(self, other: Any) -> Mask:
        return self._join(other, "|")

    def __ror__(self, other: Any) -> Mask:
        return self._join(other, "|", left=False)

    def __invert__(self) -> Mask:
        return Mask(~self.expr, f"~{self._within('~')}", "~", self.reads)

    def picture(
        self,
        q_len: int | None = None,
        k_len: int | None = None,
        *,
        q_offset: int | None = None,
        b: int = 0,
        h: int = 0,
        tile: tuple[int, int] = (128, 128),
    ) -> Picture:
        """What the mask lets through, for people: a drawing, numbers, and warnings.

        Parameters
        ----------
        q_len, k_len : int, optional
            Rows and keys; one stands for both. Default: the lengths of the mask's arrays, or some that show
            its pattern.
        q_offset : int, optional
            Position of row 0, by default ``k_len - q_len``.
        b, h : int, default 0
            Batch entry and query head that are shown.
        tile : (int, int), default (128, 128)
            Rows and keys of the tiles of which `tiles_kept` says the share that a kernel visits.

        Returns
        -------
        Picture
            Draws itself in a notebook; `save` writes an SVG file. `density`, `tiles_kept` and `warnings`
            (rows that see no key; a mask called causal whose rows see later keys) are attributes, and
            printing it says them.

        Raises
        ------
        TypeError, ValueError
            If an argument is wrong, or if the mask hangs on arrays that the host cannot read (on a device,
            lazy or under a tracer).
        """
        from anyattn.picture import picture

        return picture(self, q_len, k_len, q_offset=q_offset, b=b, h=h, tile=tile)

    def _repr_html_(self) -> str:
        from html import escape

        try:
            return self.picture().svg()
        except (TypeError, ValueError):  # arrays that cannot be read, or that do not fit one another
            return f"<code>{escape(repr(self))}</code>"

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with & | ~ instead of and, or, not")


def as_mask(value: Any, argument: str) -> Mask:
    """A `Mask` from a mask, a boolean array or a function."""
    if isinstance(value, Mask):
        return value
    if arrays.is_array(value):
        return dense(value, _label=argument)
    if callable(value):
        return from_function(value)
    raise TypeError(
        f"{argument}: wanted a mask of anyattn.masks, a function (b, h, i, j) -> bool or a boolean array, "
        f"got {type(value).__name__}"
    )


def causal(*, positions: bool = True) -> Mask:
    """Key j is seen when j <= i."""
    return Mask(_query(positions) >= J, _words("causal", positions=positions))


def sliding_window(left: int | None, right: int | None = 0, *, positions: bool = True) -> Mask:
    """Key j is seen when -left <= j - i <= right (Beltagy et al., "Longformer", 2020).

    Parameters
    ----------
    left, right : int or None
        Keys before and after the query's position; None is unbounded.
    positions : bool, default True
        Measure from the query's position; False: from its row.
    """
    left, right = window_bounds((left, right), "sliding_window")
    i = _query(positions)
    sides = ([i - J <= left] if left is not None else []) + ([J - i <= right] if right is not None else [])
    expr = reduce(operator.and_, sides) if sides else Const(True, "bool")
    shown = (left,) if right == 0 else (left, right)
    return Mask(expr, _words("sliding_window", *shown, positions=positions))


def dilated(window: int, dilation: int, *, positions: bool = True) -> Mask:
    """Key j is seen when abs(i - j) <= window * dilation and (i - j) % dilation == 0 (Longformer, 3.1)."""
    window = integer(window, "dilated: window", least=0)
    dilation = integer(dilation, "dilated: dilation", least=1)
    i = _query(positions)
    expr = (abs(i - J) <= window * dilation) & ((i - J) % dilation == 0)
    return Mask(expr, _words("dilated", window, dilation, positions=positions))


def strided(stride: int, *, positions: bool = True) -> Mask:
    """Key j is seen when (i - j) % stride == 0 (Child et al., "Sparse Transformers", 2019)."""
    stride = integer(stride, "strided: stride", least=1)
    return Mask((_query(positions) - J) % stride == 0, _words("strided", stride, positions=positions))


def fixed(stride: int, width: int = 1) -> Mask:
    """Key j is seen when j % stride >= stride - width (the "fixed" pattern of Sparse Transformers, 2019)."""
    stride = integer(stride, "fixed: stride", least=1)
    width = integer(width, "fixed: width", least=0)
    if width > stride:
        raise ValueError(f"fixed: width: wanted at most the stride, {stride}, got {width}")
    return Mask(J % stride >= stride - width, _words("fixed", stride, *([width] if width != 1 else [])))


def global_tokens(tokens: int | Sequence[int] | Array, *, positions: bool = True) -> Mask:
    """Key j is seen when i or j is one of some tokens (BigBird, Longformer).

    Parameters
    ----------
    tokens : int or sequence or array of int, shape (n,)
        Positions; an integer n means 0, ..., n - 1. Where the host cannot read an array, every entry costs a
        comparison.
    positions : bool, default True
        Compare i; False: compare the row.
    """
    i = _query(positions)
    label = "global_tokens: tokens"
    if is_integer(tokens):
        n = integer(tokens, label, least=0)
        return Mask(((i >= 0) & (i < n)) | (n > J), _words("global_tokens", n, positions=positions))
    table = table_of(tokens, label)
    if table.kind != "int" or table.ndim > 1:
        raise TypeError(
            f"{label}: wanted an integer or integers of shape (n,), got {table.kind}, {table.ndim} axes"
        )
    if table.ndim == 0:
        number = load(table, ())
        seen = ((i >= 0) & (i < number)) | (number > J)
        return Mask(seen, _words("global_tokens", "<n>", positions=positions))
    if table.host:
        _host_tokens(table.value, label)

    def settle(geometry: Geometry) -> Expr:
        if not table.host:
            arrays.check_beside(table.value, label, geometry.like, "q")
        if not table.host and not arrays.is_concrete_cpu(table.value):
            entries = (load(table, (Const(n, "int"),)) for n in range(table.value.shape[0]))
            return reduce(operator.or_, ((t == i) | (t == J) for t in entries), Const(False, "bool"))
        last = max(geometry.k_len - 1, _query_range(geometry, positions)[1])
        # Tokens beyond the last key and query of the call are nowhere in it.
        chosen = [t for t in _host_tokens(table.value, label) if t <= last]
        return _is_one_of(chosen, i) | _is_one_of(chosen, J)

    count = int(table.value.shape[0])
    shown = table.value.tolist() if table.host and count <= _FEW_TOKENS else f"<{count} tokens>"
    # An array may change.
    listed = tuple(table.value.tolist()) if isinstance(tokens, (list, tuple, range)) else None
    expr = Deferred(settle, "bool", (i, J), label, parameters=listed, local=True)
    return Mask(expr, _words("global_tokens", shown, positions=positions))


def prefix(n: int | Sequence[int] | Array) -> Mask:
    """Key j is seen when j < n; n may be one integer a batch entry (prefix LM, Raffel et al. 2020)."""
    return _below(n, "prefix")


def padding(lengths: int | Sequence[int] | Array) -> Mask:
    """Key j is seen when j < lengths[b].

    Hidden keys contribute nothing, whatever is in them. `kv_lengths` of `attention` says the same and lets a
    backend leave the padding out.
    """
    return _below(lengths, "padding")


def documents(ids: Sequence[int] | Sequence[Sequence[int]] | Array, *, positions: bool = True) -> Mask:
    """Key j is seen when it lies in the same document as i: ids[i] == ids[j]; nothing outside the ids.

    Parameters
    ----------
    ids : integer array or sequence, shape (L,) or (B, L)
        Document of each position, one row a batch entry where there are two axes.
    """
    table = table_of(ids, "documents: ids", fixed="")
    if table.kind != "int" or table.ndim not in (1, 2):
        raise TypeError(
            f"documents: ids: wanted integers of shape (L,) or (B, L), got {table.kind} of {table.ndim} axes"
        )
    if table.ndim == 2:
        table = table_of(ids, "documents: ids", ("b", None), fixed="")
    lead = (B,) if table.ndim == 2 else ()
    i, length = _query(positions), Size(table, table.ndim - 1)
    inside = (i >= 0) & (i < length) & (length > J)
    same = load(table, (*lead, i)) == load(table, (*lead, J))
    return Mask(inside & same, _words("documents", f"<ids {tuple(table.value.shape)}>", positions=positions))


def block_sparse(blocks: Array, block_size: int) -> Mask:
    """Key j is seen by a row where blocks[..., h, row // block_size, j // block_size] is True.

    Parameters
    ----------
    blocks : boolean array
        Broadcastable to (..., Hq, ceil(Lq / block_size), ceil(Lk / block_size)).
    block_size : int
        Rows and keys of a block.
    """
    block_size = integer(block_size, "block_sparse: block_size", least=1)
    _boolean_array(blocks, "block_sparse: blocks")
    expr = Aligned(blocks, "bool", block_size, "block_sparse: blocks", any_rank=True)
    return Mask(expr, _words("block_sparse", f"<blocks {tuple(blocks.shape)}>", block_size))


def top_blocks(q: Array, k: Array, block_size: int, count: int, *, causal: bool = False) -> Mask:
    """Each block of queries sees the `count` blocks of keys that its mean query likes best.

    Parameters
    ----------
    q : array, shape (..., Hq, Lq, D)
    k : array, shape (..., Hkv, Lk, D)
        The queries and keys of the call, in "bhld" order, or others that stand for them.
    block_size : int
        Rows and keys of a block; the last ones may be shorter.
    count : int
        Blocks of keys that each block of queries of each head sees, those of highest mean(q) . mean(k); of
        equal ones the lower. A mask beside it hides some of them.
    causal : bool, default False
        Choose among the blocks that begin no later than the block's last query, where the last query stands
        at the last key: for calls with ``causal=True``, which hide the others and parts of the one on the
        diagonal.
    """
    from anyattn.top_blocks import top_blocks as choose

    mask = block_sparse(choose(q, k, block_size, count, causal=causal), block_size)
    shown = f"<q {tuple(q.shape)}>", block_size, count, *(["causal=True"] if causal else [])
    return Mask(mask.expr, _words("top_blocks", *shown))


def random_blocks(count: int, block_size: int, seed: int, *, positions: bool = True) -> Mask:
    """Each block of queries sees `count` blocks of keys drawn at random (BigBird, Zaheer et al. 2020).

    For the query block i // block_size these are the key blocks of least Philox4x32-10 order among the
    ceil(Lk / block_size) blocks of the call: key = `seed`, counter = (query block, key block, 0, 0), order =
    the first two words as one 64-bit number, ties to the lower block. The same on every backend.

    Where the position of row 0 is not known to the host, a query outside [-Lq, Lk + Lq) sees nothing.
    """
    count = integer(count, "random_blocks: count", least=0)
    block_size = integer(block_size, "random_blocks: block_size", least=1)
    seed = integer(seed, "random_blocks: seed", least=0)
    if seed >= 2**64:
        raise ValueError(f"random_blocks: seed: wanted 64 bits, got {seed}")
    i = _query(positions)

    def settle(geometry: Geometry) -> Expr:
        if count == 0 or geometry.k_len == 0 or geometry.q_len == 0:
            return Const(False, "bool")
        first, last = _query_range(geometry, positions)
        first, last = first // block_size, last // block_size
        if last - first > _MOST_BLOCKS:
            raise ValueError(
                f"random_blocks: the queries of the call span {last - first + 1} blocks; wanted fewer"
            )
        chosen = _least_key_blocks(seed, first, last, -(-geometry.k_len // block_size), count)
        table = table_of(chosen, "random_blocks", host=True)
        slots = range(chosen.shape[1])
        block = i // block_size - first
        found = reduce(
            operator.or_,
            (load(table, (block, Const(n, "int"))) == J // block_size for n in slots),
            Const(False, "bool"),
        )
        return found & (block >= 0) & (block <= last - first)

    label = f"random_blocks({count}, {block_size}, {seed})"
    expr = Deferred(settle, "bool", (i, J), label, parameters=(count, block_size, seed))
    return Mask(expr, _words("random_blocks", count, block_size, seed, positions=positions))


def dense(array: Array, *, _label: str = "dense: array") -> Mask:
    """A boolean array, True = seen, (Lq, Lk) or broadcastable to (..., Hq, Lq, Lk) at its full rank."""
    _boolean_array(array, _label)
    return Mask(Aligned(array, "bool", 1, _label, any_rank=False), f"dense(<{tuple(array.shape)}>)")


def from_function(function: Callable[..., Any]) -> Mask:
    """A mask from a Python function (b, h, i, j) -> bool, which is called once, with symbols."""
    from anyattn.expr.trace import trace_mask, words

    reads: list[Read] = []
    expr = trace_mask(function, reads)
    return Mask(expr, f"from_function({words(function, expr)})", reads=tuple(reads))


def window_bounds(window: Any, argument: str) -> tuple[int | None, int | None]:
    """(left, right) of a window, checked."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{argument}: wanted a pair (left, right) of integers or None, got {window!r}")
    bounds = []
    for side, bound in zip(("left", "right"), window, strict=True):
        if bound is not None:
            bound = integer(bound, f"{argument}: {side}")
            if bound < 0:
                raise ValueError(
                    f"{argument}: {side} is {bound}; wanted 0 or more, or None for an unbounded side"
                )
        bounds.append(bound)
    return bounds[0], bounds[1]


def _query(positions: bool) -> Expr:
    return I if boolean(positions, "positions") else ROW


def _words(name: str, *shown: Any, positions: bool = True) -> str:
    return f"{name}({', '.join([*map(str, shown), *([] if positions else ['positions=False'])])})"


def _below(n: Any, name: str) -> Mask:
    label = f"{name}: {'n' if name == 'prefix' else 'lengths'}"
    if is_integer(n):
        n = integer(n, label, least=0)
        return Mask(Const(n, "int") > J, _words(name, n))
    table = table_of(n, label, least=0)
    if table.kind != "int" or table.ndim > 1:
        raise TypeError(
            f"{label}: wanted an integer or integers of shape (B,), got {table.kind} of {table.ndim} axes"
        )
    if table.ndim == 1:
        table = table_of(n, label, ("b",), least=0)
    return Mask(load(table, (B,) * table.ndim) > J, _words(name, f"<{tuple(table.value.shape)}>"))


def _boolean_array(array: Any, label: str) -> None:
    if not arrays.is_array(array):
        raise TypeError(f"{label}: wanted a boolean array, got {type(array).__name__}")
    if arrays.kind(array) != "bool":
        hint = " (numbers that are added to the scores go to `bias`)" if label == "mask" else ""
        raise TypeError(f"{label}: wanted dtype bool, True = seen, got {arrays.dtype_name(array)}{hint}")
    if array.ndim < 2:
        raise ValueError(f"{label}: wanted 2 axes or more, got shape {tuple(array.shape)}")


def _host_tokens(values: Any, label: str) -> list[int]:
    """The different tokens of an array that the host can read, in order."""
    tokens = sorted(set(arrays.to_host(values).tolist()))
    if tokens and tokens[0] < 0:
        raise ValueError(f"{label}: wanted 0 or more, got {tokens[0]}")
    return tokens


def _is_one_of(tokens: list[int], index: Expr) -> Expr:
    """Whether an index is one of some tokens."""
    if len(tokens) <= _FEW_TOKENS:
        return reduce(operator.or_, (index == t for t in tokens), Const(False, "bool"))
    import numpy

    flags = numpy.zeros(tokens[-1] + 2, dtype=bool)  # the last entry, False, is what larger indices read
    flags[tokens] = True
    return where(index >= 0, load(table_of(flags, "global_tokens: tokens", host=True), (index,)), False)


def _query_range(geometry: Geometry, positions: bool) -> tuple[int, int]:
    """First and last position (or row) of a query in the call."""
    if not positions:
        return 0, geometry.q_len - 1
    offset = geometry.offset_host
    if offset is None:
        return -geometry.q_len, geometry.k_len + geometry.q_len - 1
    if isinstance(offset, int):
        return offset, offset + geometry.q_len - 1
    if offset.size == 0:
        return 0, geometry.q_len - 1
    return int(offset.min()), int(offset.max()) + geometry.q_len - 1


def _least_key_blocks(seed: int, first: int, last: int, key_blocks: int, count: int) -> Any:
    """(query blocks, min(count, key blocks)) numbers of the chosen key blocks."""
    import numpy

    from anyattn.philox import philox4x32

    count = min(count, key_blocks)
    chosen = numpy.empty((last - first + 1, count), dtype=numpy.int64)
    keys = numpy.arange(key_blocks)
    for block in range(first, last + 1):
        word0, word1, _, _ = philox4x32(seed, (block, keys, 0, 0))
        order = word0.astype(numpy.uint64) | word1.astype(numpy.uint64) << numpy.uint64(32)
        chosen[block - first] = numpy.argsort(order, kind="stable")[:count]
    return chosen
