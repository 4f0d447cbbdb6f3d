// Linear attention of one sequence of one key/value head, chunk after chunk, with the state in shared memory.
//
// For keys K, values V of a chunk, queries Q of each head that reads the state S, and without decays
//
//     U = V, or of the delta rules (I + N)^-1 beta (V - K S), N = beta K K^T below the diagonal
//     out = scale (Q S + (Q K^T where keys come no later) U)
//     S = S + K^T U
//
// A block has BLOCK_COLUMNS columns of the state, from BLOCK_COLUMNS * blockIdx.y on: columns have nothing to do with
// each other, and the weights are computed for each block. If rows are WIDE, the state lies in global memory and comes
// HEAD_DIM channels at a time, as rows and keys do.
//
// Given: as for linear_chunk.cuh; DELTA; WIDE. Shared memory is dynamic.

// Tokens of a sequence, or a part of one, of one head, and where its arrays begin, in elements.
struct Strand {
    int batch, head, keys, rows;
    long long q, k, v, out, decay, beta;
    long long state;  // number of the state
};

__device__ __forceinline__ Strand strand_of(const Arguments& a, unsigned number) {
    Strand strand;
    const int sequence = number % a.sequences;
    strand.head = number / a.sequences % a.num_kv_heads;
    int rest = strand.batch = number / a.sequences / a.num_kv_heads;
    strand.state = ((long long)strand.batch * a.sequences + sequence) * a.num_kv_heads + strand.head;
    long long first = 0, end = a.k_len;
    if (a.bounds) {
        // Nobody has read these on the host.
        first = min(max(a.bounds[sequence], 0LL), (long long)a.k_len);
        end = min(max(a.bounds[sequence + 1], first), (long long)a.k_len);
    } else if (a.part_len) {
        first = min((long long)sequence * a.part_len, (long long)a.k_len);
        end = min(first + a.part_len, (long long)a.k_len);
    }
    strand.rows = a.bounds || a.part_len ? end - first : a.q_len;
    strand.keys = a.rows_alone ? 0 : end - first;
    strand.q = (long long)strand.head * a.group_size * a.q_head + first * a.q_row;
    strand.k = strand.head * a.k_head + first * a.k_row;
    strand.v = strand.head * a.v_head + first * a.v_row;
    strand.out = (long long)strand.head * a.group_size * a.out_head + first * a.out_row;
    strand.decay = strand.head * a.decay_head + first * a.decay_row;
    strand.beta = strand.head * a.beta_head + first * a.beta_row;
#pragma unroll
    for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
        const int index = rest % a.batch_sizes[axis];
        rest /= a.batch_sizes[axis];
        strand.q += index * a.q_batch[axis];
        strand.k += index * a.k_batch[axis];
        strand.v += index * a.v_batch[axis];
        strand.out += index * a.out_batch[axis];
        strand.decay += index * a.decay_batch[axis];
        strand.beta += index * a.beta_batch[axis];
    }
    return strand;
}

// Channels from `channel` on of a state and of its normalizer into shared memory; 0 if there is none.
__device__ __forceinline__ void load_state(
    const Shared& m, const Arguments& a, const Strand& strand, const Real* state, const Real* z, int channel
) {
    const long long row = strand.state * a.head_dim + channel;
    for (int n = threadIdx.x; n < HEAD_DIM * BLOCK_COLUMNS; n += THREADS) {
        const int d = n / BLOCK_COLUMNS, column = blockIdx.y * BLOCK_COLUMNS + n % BLOCK_COLUMNS;
        const bool there = state && channel + d < a.head_dim && column < a.v_head_dim;
        m.state[n] = there ? state[(row + d) * a.v_head_dim + column] : Real(0);
    }
    if (NORMALIZE)
        for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS)
            m.z[d] = z && channel + d < a.head_dim ? z[row + d] : Real(0);
}

// Each block has a normalizer of its own, of which that of the first columns is the result.
__device__ __forceinline__ Real* z_after(const Arguments& a) {
    return NORMALIZE && a.z_after ? (Real*)a.z_after + blockIdx.y * a.z_columns : nullptr;
}

// The way back.
__device__ __forceinline__ void store_state(const Shared& m, const Arguments& a, const Strand& strand, int channel) {
    const long long row = strand.state * a.head_dim + channel;
    for (int n = threadIdx.x; n < HEAD_DIM * BLOCK_COLUMNS; n += THREADS) {
        const int d = n / BLOCK_COLUMNS, column = blockIdx.y * BLOCK_COLUMNS + n % BLOCK_COLUMNS;
        if (channel + d < a.head_dim && column < a.v_head_dim)
            ((Real*)a.state_after)[(row + d) * a.v_head_dim + column] = m.state[n];
    }
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
        if (channel + d >= a.head_dim) continue;
        if (NORMALIZE) z_after(a)[row + d] = m.z[d];
        if (CHANNELS && a.kept && blockIdx.y == 0) ((Real*)a.kept)[row + d] = m.whole[d];
    }
}

// Keys of a chunk and their decays, from a channel on.
__device__ __forceinline__ void load_keys(
    const Shared& m, const Arguments& a, const Strand& strand, int first, int count, int channel
) {
    const int dim = a.head_dim - channel;
    load_rows<HEAD_DIM, PITCH>(
        m.keys, (const Feature*)a.k + strand.k + first * a.k_row + channel * a.k_step, a.k_row, a.k_step, count, dim,
        Real(0), feature_of
    );
    const Real* decay = (const Real*)a.decay + strand.decay + first * a.decay_row;
    const auto kept_of = [](Real logarithm) { return exp(logarithm); };
    if (CHANNELS == 2)
        load_rows<HEAD_DIM, HEAD_DIM>(
            m.factors, decay + channel * a.decay_step, a.decay_row, a.decay_step, count, dim, Real(1), kept_of
        );
    if (CHANNELS == 1)
        for (int t = threadIdx.x; t < BLOCK_ROWS; t += THREADS)
            m.factors[t] = t < count ? kept_of(decay[t * a.decay_row]) : Real(1);
}

// `step(channel)` for all channels that shared memory holds at a time, with keys, decays and the state there.
template <class Step>
__device__ __forceinline__ void for_channels(
    const Shared& m, const Arguments& a, const Strand& strand, int first, int count, bool keys, const Step& step
) {
    if (!WIDE) return step(0);
    for (int channel = 0; channel < a.head_dim; channel += HEAD_DIM) {
        __syncthreads();
        if (keys) load_keys(m, a, strand, first, count, channel);
        load_state(m, a, strand, (const Real*)a.state_after, z_after(a), channel);
        __syncthreads();
        step(channel);
    }
}

// Values become what the delta rules write.
__device__ __forceinline__ void correct(
    const Shared& m, const Arguments& a, const Strand& strand, int first, int count
) {
    Vector recalled[ROWS] = {};
    for_channels(m, a, strand, first, count, true, [&](int channel) {
        for (int n = threadIdx.x % 32; n < WARP_ROWS * HEAD_DIM; n += 32) {
            const int at = (warp_row() + n / HEAD_DIM) * PITCH + n % HEAD_DIM;
            m.rows[at] = m.keys[at];
        }
        __syncwarp();
        weigh<true>(m, m.betas[warp_row() + threadIdx.x % 32 / PARTS], channel > 0);
        __syncwarp();
        add_reading(recalled, m);
        __syncwarp();
    });
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Vector* at = (Vector*)(m.values + (own_row() + r) * BLOCK_COLUMNS + own_column());
        Vector value = *at;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) value.x[c] = m.betas[own_row() + r] * (value.x[c] - recalled[r].x[c]);
        *at = value;
    }
    __syncthreads();
    solve(m);
    __syncthreads();
}

struct alignas(VECTOR * sizeof(Element)) Elements {
    Element x[VECTOR];
};

// The rows of a chunk of all queries that read this state.
__device__ __forceinline__ void answer(
    const Shared& m, const Arguments& a, const Strand& strand, int first, int count
) {
    // Where channels come at a time, all warps wait for them.
    if (!WIDE && warp_row() >= count) return;
    for (int head = 0; head < a.group_size; ++head) {
        const Feature* queries = (const Feature*)a.q + strand.q + head * a.q_head + first * a.q_row;
        Vector sum[ROWS] = {};
        for_channels(m, a, strand, first, count, CAUSAL, [&](int channel) {
            __syncwarp();
            load_rows<HEAD_DIM, PITCH>(
                m.rows, queries + channel * a.q_step, a.q_row, a.q_step, count, a.head_dim - channel, Real(0),
                feature_of
            );
            __syncwarp();
            if (CAUSAL || NORMALIZE) weigh<false>(m, 1, channel > 0);
            __syncwarp();
            add_reading(sum, m);
        });
        if (CAUSAL) add_values(sum, m);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = own_row() + r, column = blockIdx.y * BLOCK_COLUMNS + own_column();
            if (row >= count || column >= a.v_head_dim) continue;
            const Real total = NORMALIZE ? m.totals[row] : Real(1);
            Elements elements;
#pragma unroll
            for (int c = 0; c < VECTOR; ++c)
                elements.x[c] = element_of(total == 0 ? Real(0) : sum[r].x[c] / total * Real(a.scale));
            Element* to = (Element*)a.out + strand.out + head * a.out_head + (first + row) * a.out_row + column;
            if (a.vectors) {
                *(Elements*)to = elements;
            } else {
#pragma unroll
                for (int c = 0; c < VECTOR; ++c)
                    if (column + c < a.v_head_dim) to[c] = elements.x[c];
            }
        }
    }
}

// One block at least: without the number ptxas gives up registers, and spills, for more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_forward(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Shared m = shared_arrays(shared);
    const Strand strand = strand_of(a, blockIdx.x);

    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) m.whole[d] = 1;
    for (int channel = 0; channel < (WIDE ? a.head_dim : 1); channel += HEAD_DIM) {
        load_state(m, a, strand, (const Real*)a.state_before, (const Real*)a.z_before, channel);
        if (!WIDE) break;
        __syncthreads();
        store_state(m, a, strand, channel);
        __syncthreads();
    }

    for (int first = 0; first < strand.keys; first += BLOCK_ROWS) {
        const int count = min(BLOCK_ROWS, strand.keys - first);
        __syncthreads();
        if (!WIDE) load_keys(m, a, strand, first, count, 0);
        load_rows<BLOCK_COLUMNS, BLOCK_COLUMNS>(
            m.values, (const Element*)a.v + strand.v + first * a.v_row + blockIdx.y * BLOCK_COLUMNS * a.v_step, a.v_row,
            a.v_step, count, a.v_head_dim - (int)blockIdx.y * BLOCK_COLUMNS, Real(0),
            [](Element x) { return real_of(x); }
        );
        if (DELTA)
            for (int t = threadIdx.x; t < BLOCK_ROWS; t += THREADS)
                m.betas[t] = t < count ? ((const Real*)a.beta)[strand.beta + (first + t) * a.beta_row] : Real(0);
        __syncthreads();
        if (DELTA) correct(m, a, strand, first, count);
        if (CAUSAL) answer(m, a, strand, first, count);
        for_channels(m, a, strand, first, count, true, [&](int channel) {
            __syncthreads();
            if (CHANNELS || NORMALIZE) {
                fade_keys(m, count);
                __syncthreads();
            }
            advance_state(m, count);
            if (WIDE) {
                __syncthreads();
                store_state(m, a, strand, channel);
            }
        });
    }

    __syncthreads();
    if (!CAUSAL)
        for (int first = 0; first < strand.rows; first += BLOCK_ROWS)
            answer(m, a, strand, first, min(BLOCK_ROWS, strand.rows - first));
    if (!WIDE && a.state_after) store_state(m, a, strand, 0);
}
