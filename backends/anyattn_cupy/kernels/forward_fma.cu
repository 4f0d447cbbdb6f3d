// Attention without tensor cores: exact in float32 and float64, and for 16-bit arrays where nothing else runs.
//
//     out[r] = sum_j exp(s[r, j] - m[r]) v[j] / sum_j exp(s[r, j] - m[r]),   s = logit(scale q . k)
//
// with the maximum m and both sums kept while tiles of keys go by (online softmax; Milakov and Gimelshein 2018,
// Dao et al. 2022). A warp has 16 rows to itself; its lanes are 4 groups of rows x 8 groups of keys, so that a
// lane holds 4 rows x BLOCK_KEYS / 8 keys of the scores, and 4 rows x V_HEAD_DIM / 8 columns of the result.
//
// Given: WARPS, BLOCK_KEYS, HEAD_DIM (a multiple of 8) and V_HEAD_DIM (of 128 bytes), VECTOR_LOADS: whether rows
// of q, k and v begin at multiples of 16 bytes and have whole vectors. Shared memory is dynamic.

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 4;                   // of a lane: row_group + 4 r
constexpr int KEYS = BLOCK_KEYS / 8;      // of a lane: key_group + 8 m
constexpr int VECTOR = 16 / sizeof(Real);
constexpr int COLUMNS = V_HEAD_DIM / (8 * VECTOR);
// An odd number of vectors a row: eight rows lie in different banks.
constexpr int KEY_PITCH = HEAD_DIM + VECTOR;
// Four groups of rows, eight words apart.
constexpr int WEIGHT_PITCH = BLOCK_KEYS + 8;

struct alignas(16) Vector {
    Real x[VECTOR];
};

struct alignas(VECTOR_LOADS ? VECTOR * sizeof(Element) : sizeof(Element)) Elements {
    Element x[VECTOR];
};

// Rows of an array into shared memory, zeros where there are none: `place_of(r)` is where row r begins.
template <int COUNT, int DIM, int PITCH, class PlaceOf>
__device__ __forceinline__ void load_rows(
    Real* to, const Element* from, long long step, int dim, const PlaceOf& place_of
) {
    for (int n = threadIdx.x; n < COUNT * (DIM / VECTOR); n += THREADS) {
        const int r = n / (DIM / VECTOR), column = n % (DIM / VECTOR) * VECTOR;
        const Place place = place_of(r);
        Vector values = {};
        if (place.there && column < dim) {
            const Element* source = from + place.offset;
            if (VECTOR_LOADS) {
                const Elements elements = *(const Elements*)(source + column);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) values.x[e] = real_of(elements.x[e]);
            } else {
#pragma unroll
                for (int e = 0; e < VECTOR; ++e)
                    if (column + e < dim) values.x[e] = real_of(source[(column + e) * step]);
            }
        }
        *(Vector*)(to + r * PITCH + column) = values;
    }
}

// The weights of 16 rows times the values of a tile, added to `sum`. With STRICT, weights below 0 mark hidden
// pairs, whose values may be anything.
template <bool STRICT>
__device__ __forceinline__ void add_values(
    Vector (&sum)[ROWS][COLUMNS], const Real* weights, const Real* values, int row_group, int key_group
) {
    for (int j = 0; j < BLOCK_KEYS; j += VECTOR) {
        Vector weight[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            weight[r] = *(const Vector*)(weights + (row_group + 4 * r) * WEIGHT_PITCH + j);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                const Vector value = *(const Vector*)(values + (j + e) * V_HEAD_DIM + (8 * n + key_group) * VECTOR);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int c = 0; c < VECTOR; ++c)
                        if (!STRICT || !(weight[r].x[e] < 0)) sum[r][n].x[c] += weight[r].x[e] * value.x[c];
            }
        }
    }
}

// One block at least: without the number ptxas gives up registers, and spills, for more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward(const __grid_constant__ Arguments a, const __grid_constant__ program::Captured c) {
    extern __shared__ __align__(16) unsigned char shared[];
    Real* queries = (Real*)shared;
    Real* keys = queries + BLOCK_ROWS * HEAD_DIM;
    Real* values = keys + BLOCK_KEYS * KEY_PITCH;
    Real* all_weights = values + BLOCK_KEYS * V_HEAD_DIM;

    const int warp = threadIdx.x / 32, row_group = threadIdx.x % 32 / 8, key_group = threadIdx.x % 8;
    const Item item = item_of(a, blockIdx.x);
    Real* weights = all_weights + warp * 16 * WEIGHT_PITCH;
    const int first_row = item.first_row + 16 * warp;

    load_rows<BLOCK_ROWS, HEAD_DIM, HEAD_DIM>(
        queries, (const Element*)a.q, a.q_step, a.head_dim, [&](int r) { return query_place(a, item, r); }
    );

    Vector sum[ROWS][COLUMNS] = {};
    Real top[ROWS], total[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) top[r] = -INFINITE, total[r] = 0;

    for (Tile tile = first_tile(a, item); tile.valid(item); tile.advance(a, item)) {
        const int count = tile.count();
        __syncthreads();
        load_rows<BLOCK_KEYS, HEAD_DIM, KEY_PITCH>(
            keys, (const Element*)a.k, a.k_step, a.head_dim,
            [&](int r) { return tile.key_place(a, r, item.k, a.k_row); }
        );
        load_rows<BLOCK_KEYS, V_HEAD_DIM, V_HEAD_DIM>(
            values, (const Element*)a.v, a.v_step, a.v_head_dim,
            [&](int r) { return tile.key_place(a, r, item.v, a.v_row); }
        );
        __syncthreads();

        Real score[ROWS][KEYS] = {};
#pragma unroll 2
        for (int d = 0; d < HEAD_DIM; d += VECTOR) {
            Vector query[ROWS], key[KEYS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                query[r] = *(const Vector*)(queries + (16 * warp + row_group + 4 * r) * HEAD_DIM + d);
#pragma unroll
            for (int m = 0; m < KEYS; ++m)
                key[m] = *(const Vector*)(keys + (key_group + 8 * m) * KEY_PITCH + d);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int m = 0; m < KEYS; ++m)
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) score[r][m] += query[r].x[e] * key[m].x[e];
        }

        // Only where some pair is hidden may a value be there that must not be multiplied by 0.
        const bool masked = tile.kind & MASKED;
        bool strict = false;
        if (masked) {
            bool odd = false;
            for (int n = threadIdx.x; n < BLOCK_KEYS * V_HEAD_DIM; n += THREADS) odd |= !is_finite(values[n]);
            strict = __syncthreads_or(odd);
        }

#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            // Rows beyond the last compute what the last one does, and are not stored.
            const Row row = row_of(a, item, min(first_row + row_group + 4 * r, a.rows - 1));
            const long long position = row.row + item.position;
            bool hidden[KEYS];
            Real now = top[r];
#pragma unroll
            for (int m = 0; m < KEYS; ++m) {
                const int place = key_group + 8 * m;
                const int number = tile.key(a, min(place, count - 1));
                const Real logit = logit_of(score[r][m] * Real(a.scale), c, item, row, position, number);
                hidden[m] = place >= count || (masked && !is_seen(c, item, row, position, number));
                score[r][m] = hidden[m] ? -INFINITE : logit;
                now = larger(score[r][m], now);
            }
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2) now = larger(__shfl_xor_sync(~0u, now, lane), now);
            const Real base = base_of(now), scaled = exp(top[r] - base);
            Real part = 0;
#pragma unroll
            for (int m = 0; m < KEYS; ++m) {
                const Real weight = exp(score[r][m] - base);
                part += weight;
                weights[(row_group + 4 * r) * WEIGHT_PITCH + key_group + 8 * m] =
                    strict && hidden[m] ? Real(-1) : weight;
            }
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2) part += __shfl_xor_sync(~0u, part, lane);
            total[r] = total[r] * scaled + part;
            top[r] = now;
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) sum[r][n].x[e] *= scaled;
        }
        __syncwarp();
        if (strict) add_values<true>(sum, weights, values, row_group, key_group);
        else add_values<false>(sum, weights, values, row_group, key_group);
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int number = first_row + row_group + 4 * r;
        if (number >= a.rows) continue;
        const Row row = row_of(a, item, number);
        const Real sink = sink_of(a, item, row);
        const Real base = base_of(larger(sink, top[r])), scaled = exp(top[r] - base);
        const Real all = total[r] * scaled + exp(sink - base);
        const Real factor = all == 0 ? Real(0) : scaled / all;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const int column = (8 * n + key_group) * VECTOR + e;
                if (column < a.v_head_dim) store_out(a, item, row, column, sum[r][n].x[e] * factor);
            }
        if (key_group == 0) store_lse(a, item, row, base + log(all));
    }
}
