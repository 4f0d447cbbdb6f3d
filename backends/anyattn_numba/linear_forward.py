"""Linear attention of one strand after another: a chunk of tokens, then the state that it leaves.

Katharopoulos et al., "Transformers are RNNs", 2020, in chunks. A strand is a sequence of one key/value head.
Plainly, for each chunk of keys K and values V, and the queries Q of each head that reads the state S (F, Dv):

    weights = scale Q K^T, 0 where the key comes after the query
    out = scale Q S + weights V
    S = S + K^T V

With decays the weights fade from key to query, Q to the start of the chunk, and K to its end
(`anyattn_numba.linear_decay`). With beta, V becomes first what the delta rule writes, U with
(I + N) U = beta (V - K S) (Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length", 2024, section 3.2): the rows -beta K are taken for queries, their weights are -N, and rows of U are
found from the first to the last, a tile of registers at a time.

All products are one micro-kernel's (`anyattn_numba.linear_products`), but for the weights with a decay for
each channel, which are `fade_kernel`'s. K^T is the only thing that is turned round. What lies in memory as
the micro-kernel reads it is read in place; other dtypes, strides and ends of sequences are copied, padded
with 0 to whole tiles (`anyattn_numba.linear_loads`). S lies in blocks of columns, each as wide as a tile of
registers. The normalizer is one more column, that of a value that is always 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import types

from anyattn_numba import linear_arguments as a
from anyattn_numba.atomics import fetch_add
from anyattn_numba.jit import carray, compiled, task
from anyattn_numba.linear_decay import fade_kernel, seen_kernel
from anyattn_numba.linear_loads import loading, padding
from anyattn_numba.linear_products import ADD, NEW, SOLVE, product_kernel
from anyattn_numba.memory import pointer, read_real, read_word
from anyattn_numba.rows import ITEMSIZE, all_finite, writer
from anyattn_numba.target import Shape
from anyattn_numba.vectors import LINE

__all__ = ["linear_kernel"]


@lru_cache
def linear_kernel(shape: Shape, dtype: str) -> Any:
    """The task (`anyattn_numba.threads.TASK`) that computes linear attention for arrays of a dtype."""
    lanes, size, rows, most = shape.lanes, shape.itemsize, shape.rows, shape.vectors
    kind, stored = getattr(types, shape.element), ITEMSIZE[dtype]
    padded, write = padding(shape), writer(dtype, shape.element)
    load_rows, load_values, load_factors, turn = loading(shape, dtype)
    product, seen, fade = product_kernel(shape), seen_kernel(shape), fade_kernel(shape)
    finite = all_finite(shape.element)

    @compiled
    def width_at(columns: int, start: int) -> int:
        """Vectors of the block of columns from `start` on: so many that blocks hardly differ."""
        vectors = (columns - start + lanes - 1) // lanes
        blocks = (vectors + most - 1) // most
        return (vectors + blocks - 1) // blocks

    @compiled
    def set_factors(block: int, scratch: int, count: int, delta: int) -> None:
        """What the weights of rows are multiplied by, then what they read of the state is."""
        span, channels = padded(count), read_word(block + a.CHANNELS)
        normalized = read_word(block + a.COLUMNS) > read_word(block + a.V_HEAD_DIM)
        scale = kind(1) if normalized else kind(read_real(block + a.SCALE))
        factors = carray(pointer(scratch + read_word(block + a.AT_FACTORS)), (2, span), kind)
        betas = carray(pointer(scratch + read_word(block + a.AT_BETA)), count, kind)
        since = carray(pointer(scratch + read_word(block + a.AT_SINCE)), count, kind)
        for n in range(span):
            factor = kind(0)
            if n < count:
                factor = -betas[n] if delta else scale
            factors[0, n] = factor
            factors[1, n] = factor * since[n] if channels == 1 and n < count else factor

    @compiled
    def fade_rows(block: int, scratch: int, source: int, row: int, count: int, target: int) -> None:
        """Rows of queries times what their channels keep since the start of the chunk."""
        dim = read_word(block + a.HEAD_DIM)
        for n in range(count):
            own = carray(pointer(source + n * row), dim, kind)
            kept = carray(pointer(scratch + read_word(block + a.AT_SINCE) + n * dim * size), dim, kind)
            faded = carray(pointer(target + n * padded(dim) * size), dim, kind)
            for d in range(dim):
                faded[d] = own[d] * kept[d]

    @compiled
    def weigh_keys(block: int, scratch: int, queries: int, row: int, count: int, strict: int) -> None:
        """The weights of a chunk's keys for rows of queries; with a decay for each channel, keys fade."""
        dim, span = read_word(block + a.HEAD_DIM), padded(count)
        turned, scores = scratch + read_word(block + a.AT_TURNED), scratch + read_word(block + a.AT_SCORE)
        factors, ones = scratch + read_word(block + a.AT_FACTORS), scratch + read_word(block + a.AT_ONES)
        kept, pitch = scratch + read_word(block + a.AT_KEPT), span * size
        by_channel = read_word(block + a.CHANNELS) > 1
        left = scratch + read_word(block + a.AT_LEFT)
        start = 0
        while start < span:
            vectors = min(most, (span - start) // lanes)
            own, here, first = turned + start * size, scores + start * size, start // rows * rows
            if by_channel:
                for t in range(start, count):
                    factor, query = kept + t * dim * size, queries + t * row
                    fade(vectors, own, pitch, factor, query, dim, t - start, here + t * pitch)
            else:
                for t in range(first, count, rows):
                    some = min(vectors, (t + rows - start + lanes - 1) // lanes)
                    query, to = queries + t * row, here + t * pitch
                    product(some, NEW, query, row, own, pitch, dim, ones, 0, 0, 0, 0, 0, to, pitch, own)
            seen(
                vectors,
                here + start * pitch,
                pitch,
                ones if by_channel else kept + start * size,
                factors + start * size,
                first - start,
                count - start,
                strict,
                left + start * size,
            )
            start += vectors * lanes

    @compiled
    def finish_rows(block: int, out: int, out_row: int, target: int, count: int) -> None:
        """Rows as the caller's memory has them, divided by their normalizers."""
        v_dim, columns = read_word(block + a.V_HEAD_DIM), read_word(block + a.COLUMNS)
        factor = read_real(block + a.SCALE) if columns > v_dim else 1.0
        for n in range(count):
            if columns > v_dim:
                row = carray(pointer(out + n * out_row), columns, kind)
                total = row[v_dim]
                for c in range(v_dim):
                    row[c] = row[c] / total if total != 0 else kind(0)
            write(out + n * out_row, v_dim, factor, target + n * read_word(block + a.OUT_ROW), stored)

    @compiled
    def write_rows(
        block: int,
        scratch: int,
        queries: int,
        row: int,
        values: int,
        v_row: int,
        target: int,
        count: int,
        inside: int,
    ) -> None:
        """The rows of some queries of a head; `inside` says that keys of the chunk count as well."""
        dim, columns, pitch = (
            read_word(block + a.HEAD_DIM),
            read_word(block + a.COLUMNS),
            padded(count) * size,
        )
        scores, state = scratch + read_word(block + a.AT_SCORE), scratch + read_word(block + a.AT_STATE)
        factors = scratch + read_word(block + a.AT_FACTORS) + pitch
        in_place = read_word(block + a.OUT_IN_PLACE) != 0 and count == padded(count)
        out_row = read_word(block + a.OUT_ROW) if in_place else padded(columns) * size
        out = target if in_place else scratch + read_word(block + a.AT_OUT)
        coming, number = carray(pointer(scratch + read_word(block + a.AT_COMING)), a.COMING, types.int64), 0
        start = 0
        while start < columns:
            vectors = width_at(columns, start)
            width = vectors * lanes * size
            own, first = state + start * padded(dim) * size, values + start * size
            for t in range(0, count, rows):
                keys = min(t + rows, count) if inside else 0
                query, weights, to = queries + t * row, scores + t * pitch, out + start * size + t * out_row
                of_rows = factors + t * size
                product(
                    vectors, NEW, query, row, own, width, dim, of_rows, weights, pitch, first, v_row, keys,
                    to, out_row, coming[number],
                )  # fmt: skip
                number = min(number + 1, a.COMING - 1)
            start += vectors * lanes
        if not in_place:
            finish_rows(block, out, out_row, target, count)

    @compiled
    def correct(block: int, scratch: int, keys: int, row: int, count: int) -> None:
        """V = U."""
        dim, columns, pitch = (
            read_word(block + a.HEAD_DIM),
            read_word(block + a.COLUMNS),
            padded(count) * size,
        )
        scores, state = scratch + read_word(block + a.AT_SCORE), scratch + read_word(block + a.AT_STATE)
        factors = scratch + read_word(block + a.AT_FACTORS) + pitch
        values, v_row = scratch + read_word(block + a.AT_VALUES), padded(columns) * size
        delta = read_word(block + a.DELTA)
        set_factors(block, scratch, count, delta)
        weigh_keys(block, scratch, keys, row, count, delta)
        readers, reader_row = keys, row
        if read_word(block + a.CHANNELS) > 1:
            readers, reader_row = scratch + read_word(block + a.AT_QUERY), padded(dim) * size
            fade_rows(block, scratch, keys, row, count, readers)
        start = 0
        while start < columns:
            vectors = width_at(columns, start)
            width = vectors * lanes * size
            own, first = state + start * padded(dim) * size, values + start * size
            for t in range(0, count, rows):
                key, weights, to = readers + t * reader_row, scores + t * pitch, first + t * v_row
                of_rows = factors + t * size
                product(
                    vectors, SOLVE, key, reader_row, own, width, dim, of_rows, weights, pitch, first, v_row,
                    t, to, v_row, own,
                )  # fmt: skip
            start += vectors * lanes

    @compiled
    def add_keys(block: int, scratch: int, values: int, v_row: int, count: int) -> None:
        """S = S + K^T V, what was there before faded."""
        dim, columns, pitch = (
            read_word(block + a.HEAD_DIM),
            read_word(block + a.COLUMNS),
            padded(count) * size,
        )
        channels, turned = read_word(block + a.CHANNELS), scratch + read_word(block + a.AT_TURNED)
        since = scratch + read_word(block + a.AT_SINCE) + (count - 1) * max(channels, 1) * size
        last = carray(pointer(since), max(channels, 1), kind)
        at_kept = scratch + read_word(block + a.AT_STATE_KEPT)
        kept = carray(pointer(at_kept), padded(dim), kind)
        for d in range(padded(dim)):
            kept[d] = (last[d] if d < dim else kind(0)) if channels > 1 else last[0]
        if channels == 1:
            left = carray(pointer(scratch + read_word(block + a.AT_LEFT)), count, kind)
            for d in range(dim):
                keys = carray(pointer(turned + d * pitch), count, kind)
                for n in range(count):
                    keys[n] *= left[n]
        start = 0
        while start < columns:
            vectors = width_at(columns, start)
            width = vectors * lanes * size
            own = scratch + read_word(block + a.AT_STATE) + start * padded(dim) * size
            first = values + start * size
            for d in range(0, dim, rows):
                keys, to, factor = turned + d * pitch, own + d * width, at_kept + d * size
                product(vectors, ADD, 0, 0, 0, 0, 0, factor, keys, pitch, first, v_row, count, to, width, 0)
            start += vectors * lanes

    @compiled
    def move_state(block: int, scratch: int, address: int, out: int) -> None:
        """Between the rows (F, columns) at an address and the blocks of columns; 0 is a state of zeros."""
        dim, columns = read_word(block + a.HEAD_DIM), read_word(block + a.COLUMNS)
        start = 0
        while start < columns:
            width = width_at(columns, start) * lanes
            channels = min(width, columns - start)
            state = scratch + read_word(block + a.AT_STATE) + start * padded(dim) * size
            for d in range(dim if out else padded(dim)):
                own = carray(pointer(state + d * width * size), width, kind)
                other = carray(pointer(address + (d * columns + start) * size), channels, kind)
                if out:
                    for c in range(channels):
                        other[c] = own[c]
                else:
                    for c in range(width):
                        own[c] = other[c] if address != 0 and d < dim and c < channels else kind(0)
            start += width

    @compiled
    def expect(block: int, scratch: int, known: int, address: int, row: int, nbytes: int, count: int) -> int:
        """Note so many rows to be fetched, if they lie one behind the other; how many addresses there are."""
        coming = carray(pointer(scratch + read_word(block + a.AT_COMING)), a.COMING, types.int64)
        if row == nbytes:
            for start in range(0, count * row, LINE * read_word(block + a.HEAD_DIM)):
                coming[known] = address + start
                known = min(known + 1, a.COMING - 1)
        # Every product fetches one of them, known or not.
        for n in range(known, a.COMING):
            coming[n] = scratch
        return known

    @compiled
    def expect_keys(block: int, strand: int, scratch: int, at: int, count: int) -> int:
        """Note the keys, decays and values from a token on."""
        row, nbytes, known = (
            read_word(block + a.K_ROW),
            read_word(block + a.HEAD_DIM) * stored,
            types.int64(0),
        )
        known = expect(block, scratch, known, read_word(strand + a.STRAND_K) + at * row, row, nbytes, count)
        row, channels = read_word(block + a.DECAY_ROW), read_word(block + a.CHANNELS)
        if channels > 1:
            address = read_word(strand + a.STRAND_DECAY) + at * row
            known = expect(block, scratch, known, address, row, channels * size, count)
        row, nbytes = read_word(block + a.V_ROW), read_word(block + a.V_HEAD_DIM) * stored
        values = read_word(strand + a.STRAND_V) + at * row
        found: int = expect(block, scratch, known, values, row, nbytes, count)
        return found

    @compiled
    def read_chunk(
        block: int,
        strand: int,
        scratch: int,
        at: int,
        count: int,
        key: int,
        k_row: int,
        value: int,
        v_row: int,
    ) -> None:
        """The rows of the queries of all heads; `key` is 0 where these come after all keys."""
        dim, row, step = (
            read_word(block + a.HEAD_DIM),
            read_word(block + a.Q_ROW),
            read_word(block + a.Q_STEP),
        )
        source = read_word(strand + a.STRAND_Q) + at * row
        target = read_word(strand + a.STRAND_OUT) + at * read_word(block + a.OUT_ROW)
        turned, own = scratch + read_word(block + a.AT_TURNED), scratch + read_word(block + a.AT_QUERY)
        by_channel, delta = read_word(block + a.CHANNELS) > 1, read_word(block + a.DELTA)
        in_place, no = read_word(block + a.Q_IN_PLACE) != 0 and count == padded(count), types.int64(0)
        set_factors(block, scratch, count, no)
        out_row = read_word(block + a.OUT_ROW)
        known = expect_keys(block, strand, scratch, at + count, count) if key else no
        for head in range(read_word(block + a.GROUP_SIZE)):
            query, query_row = source, row
            if not in_place:
                query, query_row = own, padded(dim) * size
                load_rows(source, row, step, dim, count, query)
            if key:
                if by_channel and (head > 0 or delta):
                    turn(key, k_row, dim, count, turned)
                weigh_keys(block, scratch, query, query_row, count, no)
            known = expect(block, scratch, known, source + count * row, row, dim * stored, count)
            nbytes = read_word(block + a.V_HEAD_DIM) * stored
            expect(block, scratch, known, target + count * out_row, out_row, nbytes, count)
            known = no
            if by_channel:
                fade_rows(block, scratch, query, query_row, count, own)
                query, query_row = own, padded(dim) * size
            write_rows(block, scratch, query, query_row, value, v_row, target, count, key != 0)
            source += read_word(block + a.Q_HEAD)
            target += read_word(block + a.OUT_HEAD)

    @compiled
    def add_chunk(block: int, strand: int, scratch: int, at: int, count: int) -> bool:
        """Read and write the state for a chunk, unless it is not finite and must go token by token.

        Later tokens are multiplied by 0: where one is not finite, or what it writes, none may be there.
        """
        dim, columns, causal = (
            read_word(block + a.HEAD_DIM),
            read_word(block + a.COLUMNS),
            read_word(block + a.CAUSAL),
        )
        k_row, v_row = read_word(block + a.K_ROW), read_word(block + a.V_ROW)
        key, value = read_word(strand + a.STRAND_K) + at * k_row, read_word(strand + a.STRAND_V) + at * v_row
        load_factors(block, strand, scratch, at, count)
        if not read_word(block + a.K_IN_PLACE) or count < padded(count):
            source, key = key, scratch + read_word(block + a.AT_KEYS)
            load_rows(source, k_row, read_word(block + a.K_STEP), dim, count, key)
            k_row = padded(dim) * size
        turn(key, k_row, dim, count, scratch + read_word(block + a.AT_TURNED))
        if not read_word(block + a.V_IN_PLACE):
            load_values(block, value, v_row, scratch, count)
            value, v_row = scratch + read_word(block + a.AT_VALUES), padded(columns) * size
        if read_word(block + a.DELTA):
            correct(block, scratch, key, k_row, count)
        if causal:
            if count > 1 and not finite(value, v_row, count, columns):
                return False
            read_chunk(block, strand, scratch, at, count, key, k_row, value, v_row)
        add_keys(block, scratch, value, v_row, count)
        return True

    @compiled
    def follow(block: int, strand: int, scratch: int) -> None:
        """All of a strand: chunks of keys, which queries read in between, or after the last without order."""
        tokens, keys, queries = (
            read_word(block + a.TOKENS),
            read_word(strand + a.K_LEN),
            read_word(strand + a.Q_LEN),
        )
        # Numba compiles a function once more for a literal number.
        no, yes = types.int64(0), types.int64(1)
        ones = carray(pointer(scratch + read_word(block + a.AT_ONES)), tokens, kind)
        for n in range(tokens):
            ones[n] = 1
        move_state(block, scratch, read_word(strand + a.STATE_BEFORE), no)
        for first in range(0, keys, tokens):
            at, end = first, min(first + tokens, keys)
            count = end - at
            while at < end:
                if add_chunk(block, strand, scratch, at, count):
                    at += count
                else:
                    count = 1
        if not read_word(block + a.CAUSAL):
            for at in range(0, queries, tokens):
                read_chunk(block, strand, scratch, at, min(tokens, queries - at), no, no, no, no)
        move_state(block, scratch, read_word(strand + a.STATE_AFTER), yes)

    @task
    def linear(block: int, worker: int) -> int:
        scratch = read_word(block + a.SCRATCH) + worker * read_word(block + a.SCRATCH_SIZE)
        while True:
            number = fetch_add(block + a.COUNTER, 1)
            if number >= read_word(block + a.NUM_STRANDS):
                return 0
            follow(block, read_word(block + a.STRANDS) + number * (8 * a.STRAND_WORDS), scratch)

    return linear
