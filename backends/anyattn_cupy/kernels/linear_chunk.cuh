// What is done with a chunk of tokens of linear attention in shared memory.
//
// A warp has WARP_ROWS rows to itself, by two layouts of its lanes: in `weigh` PARTS lanes share a row, each with every
// PARTS-th vector of its channels; elsewhere a lane has ROWS neighbouring rows x a vector of columns. Decays are
// multiplied and never divided by, so that strong ones neither overflow nor cost digits, and 0 forgets.
//
// Given: HEAD_DIM (a multiple of 32), BLOCK_COLUMNS of the state, BLOCK_ROWS of a chunk, WARPS; CHANNELS: decays of a
// token, 0, 1 or 2 for one for each channel; NORMALIZE; CAUSAL; FEATURE_MAP: 0, 1 for elu + 1, 2 for relu;
// WIDE_FEATURES: whether q and k are of the type that is computed with.

constexpr int THREADS = 32 * WARPS;
constexpr int VECTOR = 16 / sizeof(Real);
constexpr int WARP_ROWS = BLOCK_ROWS / WARPS;
constexpr int PARTS = 32 / WARP_ROWS;
constexpr int OWN = HEAD_DIM / (PARTS * VECTOR);
constexpr int COLUMN_LANES = BLOCK_COLUMNS / VECTOR;
constexpr int ROWS = WARP_ROWS * COLUMN_LANES / 32;
// Rows that a quarter of a warp reads at once lie in different banks.
constexpr int PITCH = HEAD_DIM + PARTS * VECTOR;
constexpr int WEIGHT_PITCH = BLOCK_ROWS + VECTOR;

struct alignas(16) Vector {
    Real x[VECTOR];
};

#if WIDE_FEATURES
typedef Real Feature;
#else
typedef Element Feature;
#endif
#if defined(ELEMENT_FLOAT16) || defined(ELEMENT_BFLOAT16)
__device__ __forceinline__ Real real_of(Real value) { return value; }
#endif

__device__ __forceinline__ Real feature_of(Feature element) {
    const Real x = real_of(element);
    if (FEATURE_MAP == 1) return x > 0 ? x + 1 : exp(x);
    if (FEATURE_MAP == 2) return x < 0 ? Real(0) : x;
    return x;
}

// The arrays of a chunk, and the state (channels, columns) that goes from one to the next.
struct Shared {
    Real *rows, *keys;     // (BLOCK_ROWS, PITCH)
    Real* factors;         // what each token keeps, (BLOCK_ROWS,) or (BLOCK_ROWS, HEAD_DIM)
    Real* state;           // (HEAD_DIM, BLOCK_COLUMNS)
    Real* values;          // (BLOCK_ROWS, BLOCK_COLUMNS)
    Real* weights;         // (BLOCK_ROWS, WEIGHT_PITCH)
    Real *betas, *totals;  // (BLOCK_ROWS,)
    Real* kept;            // what the chunk keeps of the state, (HEAD_DIM,)
    Real* whole;           // what all chunks keep
    Real* z;               // the normalizer
};

__device__ __forceinline__ Shared shared_arrays(unsigned char* memory) {
    Real* at = (Real*)memory;
    const auto next = [&](int count) {
        Real* found = at;
        at += count;
        return found;
    };
    Shared m;
    m.rows = next(BLOCK_ROWS * PITCH);
    m.keys = next(BLOCK_ROWS * PITCH);
    m.factors = next(CHANNELS == 2 ? BLOCK_ROWS * HEAD_DIM : BLOCK_ROWS);
    m.state = next(HEAD_DIM * BLOCK_COLUMNS);
    m.values = next(BLOCK_ROWS * BLOCK_COLUMNS);
    m.weights = next(BLOCK_ROWS * WEIGHT_PITCH);
    m.betas = next(BLOCK_ROWS);
    m.totals = next(BLOCK_ROWS);
    m.kept = next(HEAD_DIM);
    m.whole = next(HEAD_DIM);
    m.z = next(HEAD_DIM);
    return m;
}

__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * WARP_ROWS; }
// The first row and column of a lane.
__device__ __forceinline__ int own_row() { return warp_row() + threadIdx.x % 32 / COLUMN_LANES * ROWS; }
__device__ __forceinline__ int own_column() { return threadIdx.x % COLUMN_LANES * VECTOR; }

// The rows of this warp: `count` tokens and `dim` columns of an array, as `value_of` gives them, and `none` beyond.
template <int DIM, int PITCH, class Value, class ValueOf>
__device__ __forceinline__ void load_rows(
    Real* to, const Value* from, long long row, long long step, int count, int dim, Real none, const ValueOf& value_of
) {
#pragma unroll 4
    for (int n = 0; n < WARP_ROWS; ++n) {
        const int r = warp_row() + n;
#pragma unroll
        for (int d = threadIdx.x % 32; d < DIM; d += 32)
            to[r * PITCH + d] = r < count && d < dim ? value_of(from[r * row + d * step]) : none;
    }
}

__device__ __forceinline__ Real factor_of(const Shared& m, int token, int channel) {
    return CHANNELS == 2 ? m.factors[token * HEAD_DIM + channel] : m.factors[token];
}

// Weights of rows for the keys that come no later (BELOW: earlier), faded from key to row, times `by`; 0 of others.
// Rows fade to before the chunk, and `totals` become what they read of the normalizer. With `more`, weights and totals
// are added to those of other channels.
template <bool BELOW>
__device__ __forceinline__ void weigh(const Shared& m, Real by, bool more) {
    const int lane = threadIdx.x % 32, part = lane % PARTS, row = warp_row() + lane / PARTS;
    Real* own = m.rows + row * PITCH + part * VECTOR;
    Real* weights = m.weights + row * WEIGHT_PITCH;
    Vector x[OWN];
#pragma unroll
    for (int n = 0; n < OWN; ++n) x[n] = *(const Vector*)(own + n * PARTS * VECTOR);
    Real fade = 1, total = 0;
    if (CAUSAL)
        // Later keys are seen by no row of the warp.
        for (int s = warp_row() + WARP_ROWS - 1; s >= 0; --s) {
            const int place = part * VECTOR;
            Real sum = 0;
#pragma unroll
            for (int n = 0; n < OWN; ++n) {
                const Vector key = *(const Vector*)(m.keys + s * PITCH + n * PARTS * VECTOR + place);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) sum += x[n].x[e] * key.x[e];
            }
#pragma unroll
            for (int other = 1; other < PARTS; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
            const Real weight = (BELOW ? s < row : s <= row) ? sum * fade * by : Real(0);
            total += weight;
            if (part == 0) weights[s] = more ? weights[s] + weight : weight;
            if (CHANNELS == 1) fade *= s <= row ? m.factors[s] : Real(1);
            if (CHANNELS == 2) {
#pragma unroll
                for (int n = 0; n < OWN; ++n) {
                    const Vector factor = *(const Vector*)(m.factors + s * HEAD_DIM + n * PARTS * VECTOR + place);
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) x[n].x[e] *= s <= row ? factor.x[e] : Real(1);
                }
            }
        }
    Real reading = 0;
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
            x[n].x[e] *= fade;
            if (NORMALIZE) reading += x[n].x[e] * m.z[(n * PARTS + part) * VECTOR + e];
        }
        *(Vector*)(own + n * PARTS * VECTOR) = x[n];
    }
    if (NORMALIZE) {
#pragma unroll
        for (int other = 1; other < PARTS; other *= 2) reading += __shfl_xor_sync(~0u, reading, other);
        if (part == 0) m.totals[row] = (more ? m.totals[row] : Real(0)) + total + reading;
    }
}

// What rows read of the state, added to `sum`.
__device__ __forceinline__ void add_reading(Vector (&sum)[ROWS], const Shared& m) {
    const Real *rows = m.rows + own_row() * PITCH, *state = m.state + own_column();
#pragma unroll 2
    for (int d = 0; d < HEAD_DIM; d += VECTOR) {
        Vector x[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) x[r] = *(const Vector*)(rows + r * PITCH + d);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
            const Vector y = *(const Vector*)(state + (d + e) * BLOCK_COLUMNS);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int c = 0; c < VECTOR; ++c) sum[r].x[c] += x[r].x[e] * y.x[c];
        }
    }
}

// Weights times values, added to `sum`. Later values are left out and not multiplied by 0: they may be NaN.
__device__ __forceinline__ void add_values(Vector (&sum)[ROWS], const Shared& m) {
    const Real *weights = m.weights + own_row() * WEIGHT_PITCH, *values = m.values + own_column();
#pragma unroll 2
    for (int s = 0; s < warp_row() + WARP_ROWS; s += VECTOR) {
        Vector x[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) x[r] = *(const Vector*)(weights + r * WEIGHT_PITCH + s);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
            const Vector y = *(const Vector*)(values + (s + e) * BLOCK_COLUMNS);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (s + e <= own_row() + r)
#pragma unroll
                    for (int c = 0; c < VECTOR; ++c) sum[r].x[c] += x[r].x[e] * y.x[c];
        }
    }
}

// u with (I + N) u = values, N the weights, which are below the diagonal: values become u. A thread has a column; what
// is found is taken from all later rows at once, so that no row waits for a sum (Yang et al., 2024, section 3.2).
__device__ __forceinline__ void solve(const Shared& m) {
    const int column = threadIdx.x;
    if (column >= BLOCK_COLUMNS) return;
    Real u[BLOCK_ROWS];
#pragma unroll
    for (int t = 0; t < BLOCK_ROWS; ++t) u[t] = m.values[t * BLOCK_COLUMNS + column];
#pragma unroll
    for (int s = 0; s < BLOCK_ROWS; s += VECTOR)
#pragma unroll
        for (int t = s + 1; t < BLOCK_ROWS; ++t) {
            const Vector weight = *(const Vector*)(m.weights + t * WEIGHT_PITCH + s);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e)
                if (s + e < t) u[t] -= weight.x[e] * u[s + e];
        }
#pragma unroll
    for (int t = 1; t < BLOCK_ROWS; ++t) m.values[t * BLOCK_COLUMNS + column] = u[t];
}

// Keys fade to the end of the chunk; `kept` and the normalizer. A thread has channels.
__device__ __forceinline__ void fade_keys(const Shared& m, int count) {
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
        Real left = 1, sum = 0;
        for (int t = count - 1; t >= 0; --t) {
            const Real key = m.keys[t * PITCH + d] * left;
            sum += key;
            if (CHANNELS) {
                m.keys[t * PITCH + d] = key;
                left *= factor_of(m, t, d);
            }
        }
        if (CHANNELS) m.kept[d] = left, m.whole[d] *= left;
        if (NORMALIZE) m.z[d] = m.z[d] * left + sum;
    }
}

// state = kept state + keys^T values; a thread has DEPTH channels x a vector of columns at a time, the same always.
__device__ __forceinline__ void advance_state(const Shared& m, int count) {
    constexpr int GROUPS = THREADS / COLUMN_LANES;
    // Eight read values half as often, where all threads have as many.
    constexpr int DEPTH = HEAD_DIM % (8 * GROUPS) ? 4 : 8;
    const int column = own_column();
    for (int d = DEPTH * (threadIdx.x / COLUMN_LANES); d < HEAD_DIM; d += DEPTH * GROUPS) {
        Vector sum[DEPTH];
#pragma unroll
        for (int n = 0; n < DEPTH; ++n) {
            sum[n] = *(const Vector*)(m.state + (d + n) * BLOCK_COLUMNS + column);
#pragma unroll
            for (int c = 0; c < VECTOR; ++c)
                if (CHANNELS) sum[n].x[c] *= m.kept[d + n];
        }
#pragma unroll 4
        for (int t = 0; t < count; ++t) {
            const Vector value = *(const Vector*)(m.values + t * BLOCK_COLUMNS + column);
#pragma unroll
            for (int n = 0; n < DEPTH; n += VECTOR) {
                const Vector key = *(const Vector*)(m.keys + t * PITCH + d + n);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e)
#pragma unroll
                    for (int c = 0; c < VECTOR; ++c) sum[n + e].x[c] += key.x[e] * value.x[c];
            }
        }
#pragma unroll
        for (int n = 0; n < DEPTH; ++n) *(Vector*)(m.state + (d + n) * BLOCK_COLUMNS + column) = sum[n];
    }
}
