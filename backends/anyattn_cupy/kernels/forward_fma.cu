// Attention without tensor cores: exact in float32 and float64, and for 16-bit arrays where nothing else runs.
//
//     out[r] = sum_j exp(s[r, j] - m[r]) v[j] / sum_j exp(s[r, j] - m[r]),   s = logit(scale q . k)
//
// with the maximum m and both sums kept while tiles of keys go by (online softmax; Milakov and Gimelshein 2018,
// Dao et al. 2022). Lanes have their rows as in products.cuh, and 4 rows x V_HEAD_DIM / 8 columns of the result.
//
// Given: as for products.cuh; V_HEAD_DIM (of 128 bytes). If rows are WIDE, a block has V_HEAD_DIM columns of the
// result, from V_HEAD_DIM * blockIdx.y on, and the scores are computed for each such block anew. Shared memory is dynamic.

constexpr int COLUMNS = V_HEAD_DIM / (8 * VECTOR);
// Four groups of rows, eight words apart.
constexpr int WEIGHT_PITCH = BLOCK_KEYS + 8;

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
    const int first_row = item.first_row + 16 * warp, first_column = WIDE ? V_HEAD_DIM * blockIdx.y : 0;

    const auto query_place_of = [&](int r) { return query_place(a, item, r); };
    if (!WIDE)
        load_rows<BLOCK_ROWS, HEAD_DIM, HEAD_DIM>(
            queries, (const Element*)a.q, a.q_step, 0, a.head_dim, query_place_of
        );

    Vector sum[ROWS][COLUMNS] = {};
    Real top[ROWS], total[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) top[r] = -INFINITE, total[r] = 0;

    for (Tile tile = first_tile(a, item); tile.valid(item); tile.advance(a, item)) {
        const int count = tile.count();
        Real score[ROWS][KEYS] = {};
        multiply_tile(score, a, item, tile, queries, keys, query_place_of, [&] {
            load_rows<BLOCK_KEYS, V_HEAD_DIM, V_HEAD_DIM>(
                values, (const Stored*)a.v, a.v_step, first_column, a.v_head_dim,
                [&](int r) { return tile.key_place(a, r, item.v, a.v_row, item.v_scales, a.v_scales_row); }
            );
        });

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
                const int place = key_group + 8 * m, number = tile.key(a, min(place, count - 1));
                const Real kept = is_kept(c, item, row, position, number) ? weight : Real(0);
                weights[(row_group + 4 * r) * WEIGHT_PITCH + place] = strict && hidden[m] ? Real(-1) : kept;
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
        const Real sink = a.parts > 1 ? -INFINITE : sink_of(a, row.head);
        const Real base = base_of(larger(sink, top[r])), scaled = exp(top[r] - base);
        const Real all = total[r] * scaled + exp(sink - base);
        // The largest weight is 1, so a row whose sum is 0 has seen nothing, whatever its sink is.
        const bool empty = total[r] == 0;
        const Real factor = empty ? Real(0) : scaled / all * Real(a.kept_scale);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const int column = first_column + (8 * n + key_group) * VECTOR + e;
                if (column < a.v_head_dim) store_out(a, item, row, column, sum[r][n].x[e] * factor);
            }
        if (key_group == 0 && first_column == 0) store_lse(a, item, row, empty ? sink : base + log(all));
    }
}
