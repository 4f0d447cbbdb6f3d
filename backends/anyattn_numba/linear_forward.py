"""Linear attention of one strand after another: a chunk of tokens, then the state that it leaves.

Katharopoulos et al., "Transformers are RNNs", 2020, in chunks. A strand is a sequence of one key/value head.
Plainly, for each chunk of keys K and values V, and the queries Q of each head that reads the state S (F, Dv):

    weights = K Q^T, 0 where the key comes after the query
    out = scale (S^T Q^T + V^T weights)
    S = S + K^T V

With decays the weights fade from key to query, queries and S to the start of the chunk, and K to its end
(`anyattn_numba.linear_decay`). With beta, V becomes first what the delta rule writes, U with
(I + N) U = beta (V - K S) (Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length", 2024, section 3.2): the rows -beta K are taken for queries, their weights are -N, and rows of U are
found from the first to the last.

All of it is done by the micro-kernels of attention. A lane is a query in the first two lines, and a channel
of V in the third: S and V lie in blocks of as many columns as a block has lanes. The normalizer is one more
column, that of a value that is always 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import types

from anyattn_numba.atomics import fetch_add
from anyattn_numba.jit import carray, compiled, task
from anyattn_numba.linear_decay import fade_head_kernel, fade_kernel, fade_keys_kernel
from anyattn_numba.memory import pointer, read_real, read_word, transpose_kernel
from anyattn_numba.microkernels import score_kernel, weigh_kernel
from anyattn_numba.rows import ITEMSIZE, all_finite, reader, writer
from anyattn_numba.target import Shape
from anyattn_numba.vector_math import exp_float32, exp_float64

__all__ = ["BLOCK_WORDS", "STRAND_WORDS", "linear_kernel"]

# The words of the argument block, then those of a strand.
BLOCK_WORDS = 40
(
    COUNTER,
    NUM_STRANDS,
    STRANDS,
    SCRATCH,
    SCRATCH_SIZE,
    GROUP_SIZE,
    HEAD_DIM,
    V_HEAD_DIM,
    # V_HEAD_DIM, and one more with the normalizer.
    COLUMNS,
    CAUSAL,
    SCALE,
    # Decays of a token: none, one, or one for each channel of a key.
    CHANNELS,
    DELTA,
    Q_HEAD,
    Q_ROW,
    Q_STEP,
    K_ROW,
    K_STEP,
    V_ROW,
    V_STEP,
    OUT_HEAD,
    OUT_ROW,
    DECAY_ROW,
    DECAY_STEP,
    BETA_ROW,
    # Where the parts of a thread's memory begin, in bytes.
    AT_KEYS,
    AT_VALUES,
    AT_STATE,
    AT_QUERY,
    AT_STAGE,
    AT_SCORE,
    AT_SUM,
    AT_ONES,
    AT_FACTORS,
    AT_BETA,
) = range(0, 8 * 35, 8)
STRAND_WORDS = 10
(
    STRAND_Q,
    STRAND_K,
    STRAND_V,
    STRAND_OUT,
    STRAND_DECAY,
    STRAND_BETA,
    STATE_BEFORE,
    STATE_AFTER,
    Q_LEN,
    K_LEN,
) = range(0, 8 * STRAND_WORDS, 8)


@lru_cache
def linear_kernel(shape: Shape, dtype: str) -> Any:
    """The task (`anyattn_numba.threads.TASK`) that computes linear attention for arrays of a dtype."""
    lanes, size, rows, most = shape.lanes, shape.itemsize, shape.rows, shape.queries
    kind = getattr(types, shape.element)
    read, write = reader(dtype, shape.element), writer(dtype, shape.element)
    read_wide = reader(shape.element, shape.element)
    stored = ITEMSIZE[dtype]
    score, score_one = score_kernel(shape, rows), score_kernel(shape, 1)
    weigh, weigh_one = weigh_kernel(shape, rows), weigh_kernel(shape, 1)
    # Of a whole chunk, for the lanes from some vector on: queries before a key see nothing of it.
    most_vectors, by_diagonal = shape.vectors, lanes % rows == 0
    score_from, weigh_from = (
        score_kernel(shape, rows, shape.vectors),
        weigh_kernel(shape, rows, shape.vectors),
    )
    transpose = transpose_kernel(shape.element, lanes)
    finite = all_finite(shape.element)
    fade, fade_head = fade_kernel(shape), fade_head_kernel(shape)
    fade_keys = fade_keys_kernel(shape.element)
    exp = exp_float32 if shape.element == "float32" else exp_float64

    @compiled
    def padded(count: int) -> int:
        return (count + lanes - 1) // lanes * lanes

    @compiled
    def sum_up(
        vectors: int, values: int, stride: int, weights: int, count: int, ones: int, out: int, channels: int
    ) -> None:
        """out[c, :] += sum over n < count of values[n, c] weights[n, :]."""
        width = vectors * lanes * size
        c = 0
        while c + rows <= channels:
            weigh(vectors, values + c * size, stride, weights, count, ones, out + c * width)
            c += rows
        while c < channels:
            weigh_one(vectors, values + c * size, stride, weights, count, ones, out + c * width)
            c += 1

    @compiled
    def sum_seen(values: int, stride: int, weights: int, ones: int, out: int, channels: int) -> None:
        """What `sum_up` does for a whole chunk, whose queries see the keys up to their own."""
        width = most * size
        for c in range(0, channels, rows):
            for skip in range(most_vectors):
                first, at = skip * lanes, skip * lanes * size
                weigh_from(
                    most_vectors - skip,
                    values + first * stride + c * size,
                    stride,
                    weights + first * width + at,
                    lanes,
                    ones,
                    out + c * width + at,
                )

    @compiled
    def load_keys(block: int, strand: int, scratch: int, first: int, count: int) -> None:
        """The keys and values of a chunk; the columns of values in blocks, padded with 0."""
        dim, v_dim, columns = (
            read_word(block + HEAD_DIM),
            read_word(block + V_HEAD_DIM),
            read_word(block + COLUMNS),
        )
        keys, values = scratch + read_word(block + AT_KEYS), scratch + read_word(block + AT_VALUES)
        stage = scratch + read_word(block + AT_STAGE)
        k_row, v_row = read_word(block + K_ROW), read_word(block + V_ROW)
        betas = carray(pointer(scratch + read_word(block + AT_BETA)), most, kind)
        if read_word(block + DELTA):
            at = read_word(strand + STRAND_BETA) + first * read_word(block + BETA_ROW)
            read_wide(at, read_word(block + BETA_ROW), count, 1.0, scratch + read_word(block + AT_BETA))
        else:
            for n in range(count):
                betas[n] = 1
        for n in range(count):
            at = read_word(strand + STRAND_K) + (first + n) * k_row
            read(at, read_word(block + K_STEP), dim, 1.0, keys + n * dim * size)
            at = read_word(strand + STRAND_V) + (first + n) * v_row
            read(at, read_word(block + V_STEP), v_dim, betas[n], stage)
            row = carray(pointer(stage), v_dim, kind)
            for start in range(0, columns, most):
                width = min(most, padded(columns - start))
                target = carray(pointer(values + (start * most + n * width) * size), width, kind)
                for c in range(width):
                    here = start + c
                    target[c] = row[here] if here < v_dim else kind(1 if here < columns else 0)

    @compiled
    def load_factors(block: int, strand: int, scratch: int, first: int, count: int) -> None:
        """What each token of a chunk keeps."""
        channels, factors = read_word(block + CHANNELS), scratch + read_word(block + AT_FACTORS)
        row = read_word(block + DECAY_ROW)
        at = read_word(strand + STRAND_DECAY) + first * row
        if channels == 1:
            read_wide(at, row, count, 1.0, factors)
        else:
            for n in range(count):
                here = factors + n * channels * size
                read_wide(at + n * row, read_word(block + DECAY_STEP), channels, 1.0, here)
        kept = carray(pointer(factors), count * channels, kind)
        for n in range(count * channels):
            kept[n] = exp(kept[n])

    @compiled
    def add_keys(block: int, scratch: int, count: int) -> None:
        """S = S + K^T V, what was there before faded."""
        dim, columns = read_word(block + HEAD_DIM), read_word(block + COLUMNS)
        keys, ones = scratch + read_word(block + AT_KEYS), scratch + read_word(block + AT_ONES)
        channels, left = read_word(block + CHANNELS), scratch + read_word(block + AT_STAGE)
        if channels:
            fade_keys(keys, scratch + read_word(block + AT_FACTORS), channels, left, dim, count)
        for start in range(0, columns, most):
            width = min(most, padded(columns - start))
            values = scratch + read_word(block + AT_VALUES) + start * most * size
            state = scratch + read_word(block + AT_STATE) + start * dim * size
            if channels:
                kept, old = carray(pointer(left), dim, kind), carray(pointer(state), (dim, width), kind)
                for d in range(dim):
                    for c in range(width):
                        old[d, c] *= kept[d]
            sum_up(width // lanes, keys, dim * size, values, count, ones, state, dim)

    @compiled
    def load_queries(block: int, scratch: int, source: int, stride: int, step: int, count: int) -> None:
        """Queries side by side: (F, lanes)."""
        dim, width = read_word(block + HEAD_DIM), padded(count)
        wide = padded(dim)
        stage, query = scratch + read_word(block + AT_STAGE), scratch + read_word(block + AT_QUERY)
        for lane in range(width):
            target = stage + lane * wide * size
            if lane < count:
                read(source + lane * stride, step, dim, 1.0, target)
            else:
                empty = carray(pointer(target), wide, kind)
                for n in range(wide):
                    empty[n] = 0
        for d in range(0, wide, lanes):
            for lane in range(0, width, lanes):
                transpose(
                    stage + (lane * wide + d) * size,
                    wide * size,
                    query + (d * width + lane) * size,
                    width * size,
                )

    @compiled
    def weigh_chunk(block: int, scratch: int, count: int) -> None:
        """The weights of a chunk's keys for its queries, 0 for those that come later; queries fade."""
        dim, width = read_word(block + HEAD_DIM), padded(count)
        keys, query = scratch + read_word(block + AT_KEYS), scratch + read_word(block + AT_QUERY)
        scores, vectors = scratch + read_word(block + AT_SCORE), width // lanes
        factors, channels = scratch + read_word(block + AT_FACTORS), read_word(block + CHANNELS)
        # Nobody asks for the largest.
        largest = scratch + read_word(block + AT_STAGE)
        if channels > 1:
            for back in range(count):
                n = count - 1 - back
                # The lanes before have nothing to do with it.
                skip = n // lanes
                own = factors + (n + 1 if back else n) * dim * size
                fade(
                    vectors - skip,
                    query + skip * lanes * size,
                    width * size,
                    own,
                    keys + n * dim * size,
                    dim,
                    n - skip * lanes,
                    scores + (n * width + skip * lanes) * size,
                )
            fade(vectors, query, width * size, factors, keys, dim, -1, largest)
        elif count == most and by_diagonal:
            for n in range(0, count, rows):
                skip = n // lanes
                at = skip * lanes * size
                score_from(
                    vectors - skip,
                    keys + n * dim * size,
                    dim * size,
                    query + at,
                    dim,
                    scores + n * width * size + at,
                    largest,
                    keys,
                    dim * size,
                )
        else:
            n = 0
            while n < count:
                here, to = keys + n * dim * size, scores + n * width * size
                if n + rows <= count:
                    score(vectors, here, dim * size, query, dim, to, largest, here, dim * size)
                    n += rows
                else:
                    score_one(vectors, here, dim * size, query, dim, to, largest, here, dim * size)
                    n += 1
        if channels == 1:
            fade_head(vectors, scores, factors, count, query, dim)
        else:
            weights = carray(pointer(scores), (count, width), kind)
            for j in range(count):
                for lane in range(j):
                    weights[j, lane] = 0

    @compiled
    def write_rows(block: int, target: int, scratch: int, count: int, inside: int) -> None:
        """The rows of some queries of a head; `inside` says that keys of the chunk count as well."""
        dim, v_dim, columns = (
            read_word(block + HEAD_DIM),
            read_word(block + V_HEAD_DIM),
            read_word(block + COLUMNS),
        )
        width, wide = padded(count), padded(columns)
        vectors = width // lanes
        query, ones = scratch + read_word(block + AT_QUERY), scratch + read_word(block + AT_ONES)
        sums, scores = scratch + read_word(block + AT_SUM), scratch + read_word(block + AT_SCORE)
        empty = carray(pointer(sums), wide * width, kind)
        for n in range(wide * width):
            empty[n] = 0
        for start in range(0, columns, most):
            own = min(most, padded(columns - start))
            channels = min(most, columns - start)
            out = sums + start * width * size
            state = scratch + read_word(block + AT_STATE) + start * dim * size
            sum_up(vectors, state, own * size, query, dim, ones, out, channels)
            if inside:
                values = scratch + read_word(block + AT_VALUES) + start * most * size
                if count == most and by_diagonal and channels % rows == 0:
                    sum_seen(values, own * size, scores, ones, out, channels)
                else:
                    sum_up(vectors, values, own * size, scores, count, ones, out, channels)
        stage = scratch + read_word(block + AT_STAGE)
        for c in range(0, wide, lanes):
            for lane in range(0, width, lanes):
                transpose(
                    sums + (c * width + lane) * size,
                    width * size,
                    stage + (lane * wide + c) * size,
                    wide * size,
                )
        for lane in range(count):
            factor = read_real(block + SCALE)
            row = carray(pointer(stage + lane * wide * size), wide, kind)
            if columns > v_dim:
                total = row[v_dim]
                for c in range(v_dim):
                    row[c] = row[c] / total if total != 0 else kind(0)
            write(
                stage + lane * wide * size, v_dim, factor, target + lane * read_word(block + OUT_ROW), stored
            )

    @compiled
    def correct(block: int, strand: int, scratch: int, first: int, count: int) -> None:
        """V = U."""
        dim, columns, width = read_word(block + HEAD_DIM), read_word(block + COLUMNS), padded(count)
        query, ones = scratch + read_word(block + AT_QUERY), scratch + read_word(block + AT_ONES)
        scores = scratch + read_word(block + AT_SCORE)
        row = read_word(block + K_ROW)
        source = read_word(strand + STRAND_K) + first * row
        load_queries(block, scratch, source, row, read_word(block + K_STEP), count)
        betas = carray(pointer(scratch + read_word(block + AT_BETA)), most, kind)
        queries = carray(pointer(query), (dim, width), kind)
        for d in range(dim):
            for lane in range(count):
                queries[d, lane] *= -betas[lane]
        weigh_chunk(block, scratch, count)
        for start in range(0, columns, most):
            own = min(most, padded(columns - start))
            vectors = own // lanes
            state = scratch + read_word(block + AT_STATE) + start * dim * size
            values = scratch + read_word(block + AT_VALUES) + start * most * size
            sum_up(vectors, query, width * size, state, dim, ones, values, count)
            for block_start in range(0, count, rows):
                end = min(block_start + rows, count)
                here, weights = values + block_start * own * size, scores + block_start * size
                sum_up(vectors, weights, width * size, values, block_start, ones, here, end - block_start)
                for t in range(block_start + 1, end):
                    weights = scores + (block_start * width + t) * size
                    out = values + t * own * size
                    weigh_one(vectors, weights, width * size, here, t - block_start, ones, out)

    @compiled
    def move_state(block: int, scratch: int, address: int, out: int) -> None:
        """Between the rows (F, columns) at an address and the blocks of columns; 0 is a state of zeros."""
        dim, columns = read_word(block + HEAD_DIM), read_word(block + COLUMNS)
        for start in range(0, columns, most):
            width = min(most, padded(columns - start))
            channels = min(most, columns - start)
            state = scratch + read_word(block + AT_STATE) + start * dim * size
            for d in range(dim):
                own = carray(pointer(state + d * width * size), width, kind)
                if address == 0:
                    for c in range(width):
                        own[c] = 0
                else:
                    other = carray(pointer(address + (d * columns + start) * size), channels, kind)
                    if out:
                        for c in range(channels):
                            other[c] = own[c]
                    else:
                        for c in range(width):
                            own[c] = other[c] if c < channels else kind(0)

    @compiled
    def load_chunk(block: int, strand: int, scratch: int, first: int, most_tokens: int) -> int:
        """Keys, factors and what is written of as many tokens as the chunk has, a number that is returned.

        Later tokens are multiplied by 0: where one is not finite, or what it writes, it goes alone.
        """
        count = most_tokens
        if read_word(block + CHANNELS):
            load_factors(block, strand, scratch, first, count)
        columns, values = read_word(block + COLUMNS), scratch + read_word(block + AT_VALUES)
        sound = False
        while not sound:
            load_keys(block, strand, scratch, first, count)
            if read_word(block + DELTA):
                correct(block, strand, scratch, first, count)
            sound = True
            if count > 1 and read_word(block + CAUSAL):
                for start in range(0, columns, most):
                    width = min(most, padded(columns - start))
                    sound = sound and finite(values + start * most * size, width * size, count, width)
            if not sound:
                count = 1
        return count

    @compiled
    def follow(block: int, strand: int, scratch: int) -> None:
        """All of a strand: chunks of keys, which queries read in between, or after the last without order."""
        keys, causal = read_word(strand + K_LEN), read_word(block + CAUSAL)
        group, end = read_word(block + GROUP_SIZE), keys + (0 if causal else read_word(strand + Q_LEN))
        ones = carray(pointer(scratch + read_word(block + AT_ONES)), most, kind)
        for n in range(most):
            ones[n] = 1
        move_state(block, scratch, read_word(strand + STATE_BEFORE), 0)
        at = 0
        while at < end:
            inside = at < keys
            count = min(most, (keys if inside else end) - at)
            if inside:
                count = load_chunk(block, strand, scratch, at, count)
            if causal or not inside:
                first, row = at if inside else at - keys, read_word(block + Q_ROW)
                source = read_word(strand + STRAND_Q) + first * row
                target = read_word(strand + STRAND_OUT) + first * read_word(block + OUT_ROW)
                for _ in range(group):
                    load_queries(block, scratch, source, row, read_word(block + Q_STEP), count)
                    if inside:
                        weigh_chunk(block, scratch, count)
                    write_rows(block, target, scratch, count, inside)
                    source += read_word(block + Q_HEAD)
                    target += read_word(block + OUT_HEAD)
            if inside:
                add_keys(block, scratch, count)
            at += count
        move_state(block, scratch, read_word(strand + STATE_AFTER), 1)

    @task
    def linear(block: int, worker: int) -> int:
        scratch = read_word(block + SCRATCH) + worker * read_word(block + SCRATCH_SIZE)
        while True:
            number = fetch_add(block + COUNTER, 1)
            if number >= read_word(block + NUM_STRANDS):
                return 0
            follow(block, read_word(block + STRANDS) + number * (8 * STRAND_WORDS), scratch)

    return linear
