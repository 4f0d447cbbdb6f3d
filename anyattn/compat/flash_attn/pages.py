"""Block tables of FlashAttention: which pages of a pool a sequence has, in its order."""

from __future__ import annotations

from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.kv_cache import write
from anyattn.lookup import Lookup
from anyattn.paged_cache import in_pages

__all__ = ["check_pages", "check_table", "of_table"]


def check_table(table: Array, name: str, rank: int, sequences: int, q: Array) -> None:
    """Raise unless `table` has integers for each sequence, beside q."""
    arrays.check_beside(table, name, q, "q")
    if arrays.kind(table) != "int" or table.ndim != rank or table.shape[0] != sequences:
        raise ValueError(
            f"{name}: wanted integers of {rank} axes for {sequences} sequences, "
            f"got {arrays.dtype_name(table)} {tuple(table.shape)}"
        )


def check_pages(table: Array, lengths: Array, k_pages: Array, name: str) -> None:
    """Raise where the host can read that a sequence has too few pages, one twice, or one not of the pool."""
    if not (arrays.is_concrete_cpu(table) and arrays.is_concrete_cpu(lengths)):
        return
    import numpy

    pages, size = (int(n) for n in k_pages.shape[:2])
    host, tokens = arrays.to_host(table), arrays.to_host(lengths)
    if tokens.size and tokens.max() > host.shape[1] * size:
        raise ValueError(
            f"{name}: wanted pages of {size} for {tokens.max()} tokens, got {host.shape[1]} to a sequence"
        )
    number = numpy.arange(host.shape[1])
    used = number < -(-tokens[:, None] // max(size, 1))
    found = host[used]
    strange = found[(found < 0) | (found >= pages)]
    if strange.size:
        raise ValueError(f"{name}: wanted numbers from 0 to {pages - 1}, got {strange[0]}")
    # What is not used counts as different.
    alike = numpy.sort(numpy.where(used, host, -1 - number), axis=1)
    row, twice = numpy.nonzero(alike[:, 1:] == alike[:, :-1])
    if row.size:
        raise ValueError(
            f"{name}: wanted each page once in a sequence, got page {alike[row[0], twice[0]]} more than once "
            f"in that of entry {row[0]}"
        )


def of_table(k_pages: Array, v_pages: Array, table: Array, lengths: Array, index: Any) -> Lookup:
    """Where the tokens of sequences lie.

    Parameters
    ----------
    k_pages, v_pages : arrays (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv)
    table : integer array (B, most pages of a sequence)
        A page stands once in a sequence, as a place of the pool is one token of it. What stands behind the
        last page of a sequence does not matter.
    lengths : integer array (B,)
    index : dtype
        Of `table` and `lengths`.
    """
    xp, device = arrays.namespace(k_pages), arrays.device(k_pages)
    pages, size = int(k_pages.shape[0]), int(k_pages.shape[1])
    batch, most = (int(n) for n in table.shape)
    numbers = xp.arange(most, dtype=index, device=device)
    # Entries of no page go to a column that is cut off.
    used = numbers < xp.expand_dims(-(-lengths // size), axis=-1)
    column = xp.where(used, table, pages)
    row = xp.expand_dims(xp.arange(batch, dtype=index, device=device), axis=-1)
    entry = xp.full((batch, pages + 1), -1, dtype=index, device=device)
    entry = write(entry, (row, column), xp.broadcast_to(numbers, (batch, most)))
    return in_pages(k_pages, v_pages, entry[:, :pages], lengths)
