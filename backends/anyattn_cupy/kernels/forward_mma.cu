// Attention on tensor cores, for float16 from compute capability 7.5 on and bfloat16 from 8.0 on.
//
// As in forward_fma.cu, rows keep a maximum and sums while tiles of keys go by. A warp has 16 rows to itself; in
// its scores and its result a lane holds two neighbouring columns of rows g and g + 8 in every block of 8 columns
// (g = lane / 4). What is the result of one product in registers is in the right places for the left side of the
// next, so weights go from scores to P V without shared memory (Dao 2023). Keys and values come STAGES - 1 tiles
// ahead by cp.async, which 7.5 has not, nor what is SCALED: int8 times its scale is rounded to an element on the way.
//
// Shared memory holds rows in vectors of 16 bytes, vector n of row r at n ^ (r % 8): the eight rows of a matrix that
// ldmatrix reads lie in different banks. Rows are a whole number of 128 bytes apart.
//
// Given: as for forward_fma.cu, HEAD_DIM and V_HEAD_DIM multiples of 16, BLOCK_KEYS of 16; STAGES.

constexpr int THREADS = 32 * WARPS;
constexpr int VECTOR = 8;  // elements of 16 bytes
constexpr int PITCH = (HEAD_DIM + 63) / 64 * 64;
constexpr int V_PITCH = (V_HEAD_DIM + 63) / 64 * 64;
constexpr int KEY_BLOCKS = BLOCK_KEYS / 8;
constexpr int COLUMN_BLOCKS = V_HEAD_DIM / 8;
constexpr float LOG2_E = 1.4426950408889634f;

template <class Source>
struct alignas(VECTOR * sizeof(Source)) Vector {
    Source x[VECTOR];
};

__device__ __forceinline__ Element converted(Element value, float) { return value; }
__device__ __forceinline__ Element converted(signed char number, float scale) {
    return element_of(value_of(number, scale));
}

template <int PITCH>
__device__ __forceinline__ Element* at(Element* rows, int row, int vector) {
    return rows + row * PITCH + (vector ^ (row & 7)) * VECTOR;
}

// Rows of an array begin to come into shared memory, zeros where there are none: `place_of(r)` is where row r begins.
template <int COUNT, int DIM, int PITCH, class Source, class PlaceOf>
__device__ __forceinline__ void begin_rows(
    Element* to, const Source* from, long long step, int dim, const PlaceOf& place_of
) {
    for (int n = threadIdx.x; n < COUNT * (DIM / VECTOR); n += THREADS) {
        const int r = n / (DIM / VECTOR), vector = n % (DIM / VECTOR), column = vector * VECTOR;
        const Place place = place_of(r);
        const bool there = place.there && column < dim;
        const Source* source = from + (there ? place.offset + column * step : 0);
        Element* target = at<PITCH>(to, r, vector);
        if constexpr (VECTOR_LOADS && sizeof(Source) == sizeof(Element)) {
            copy_async(target, source, there);
        } else if constexpr (VECTOR_LOADS) {
            Vector<Element> elements = {};
            if (there) {
                const Vector<Source> loaded = *(const Vector<Source>*)source;
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) elements.x[e] = converted(loaded.x[e], place.scale);
            }
            *(Vector<Element>*)target = elements;
        } else {
#pragma unroll
            for (int e = 0; e < VECTOR; ++e)
                target[e] = there && column + e < dim ? converted(source[e * step], place.scale) : Element(0);
        }
    }
}

// The weights of 16 rows times the values of a tile, added to `sum`, where values may be anything: pairs with a weight
// below 0 are hidden and left out. `room` is shared memory for the weights that no other warp uses.
__device__ __forceinline__ void add_seen_values(
    float (&sum)[COLUMN_BLOCKS][4], const float (&weight)[KEY_BLOCKS][4], Element* values, Element* room, int lane
) {
    const int group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < KEY_BLOCKS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            room[(group + e / 2 * 8) * BLOCK_KEYS + 8 * n + pair + e % 2] = element_of(weight[n][e]);
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < BLOCK_KEYS; ++j) {
        const float first = real_of(room[group * BLOCK_KEYS + j]), second = real_of(room[(group + 8) * BLOCK_KEYS + j]);
#pragma unroll
        for (int m = 0; m < COLUMN_BLOCKS; ++m)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float value = real_of(at<V_PITCH>(values, j, m)[pair + e]);
                if (!(first < 0)) sum[m][e] += first * value;
                if (!(second < 0)) sum[m][2 + e] += second * value;
            }
    }
}

// One block at least: without the number ptxas gives up registers, and spills, for more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward(const __grid_constant__ Arguments a, const __grid_constant__ program::Captured c) {
    extern __shared__ __align__(128) unsigned char shared[];
    Element* queries = (Element*)shared;
    Element* all_keys = queries + BLOCK_ROWS * PITCH;
    Element* all_values = all_keys + STAGES * BLOCK_KEYS * PITCH;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    const Item item = item_of(a, blockIdx.x);

    Tile coming = first_tile(a, item);
    const auto begin_tile = [&](int stage) {
        if (coming.valid(item)) {
            begin_rows<BLOCK_KEYS, HEAD_DIM, PITCH>(
                all_keys + stage * BLOCK_KEYS * PITCH, (const Stored*)a.k, a.k_step, a.head_dim,
                [&](int r) { return coming.key_place(a, r, item.k, a.k_row, item.k_scales, a.k_scales_row); }
            );
            begin_rows<BLOCK_KEYS, V_HEAD_DIM, V_PITCH>(
                all_values + stage * BLOCK_KEYS * V_PITCH, (const Stored*)a.v, a.v_step, a.v_head_dim,
                [&](int r) { return coming.key_place(a, r, item.v, a.v_row, item.v_scales, a.v_scales_row); }
            );
            coming.advance(a, item);
        }
        // Empty groups too, so that their number tells which tile is there.
        end_group();
    };

    begin_rows<BLOCK_ROWS, HEAD_DIM, PITCH>(
        queries, (const Element*)a.q, a.q_step, a.head_dim, [&](int r) { return query_place(a, item, r); }
    );
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) begin_tile(stage);

    float sum[COLUMN_BLOCKS][4] = {};
    float top[2] = {-INFINITE, -INFINITE}, total[2] = {0, 0};
    int stage = 0;
    for (Tile tile = first_tile(a, item); tile.valid(item); tile.advance(a, item)) {
        Element* keys = all_keys + stage * BLOCK_KEYS * PITCH;
        Element* values = all_values + stage * BLOCK_KEYS * V_PITCH;
        wait_for_groups<STAGES - 2>();
        // The tile is there for all, and nobody reads the one whose place the next one takes.
        __syncthreads();
        begin_tile(stage ? stage - 1 : STAGES - 1);
        stage = stage + 1 < STAGES ? stage + 1 : 0;

        float weight[KEY_BLOCKS][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            unsigned query[4];
            load_matrices(query, at<PITCH>(queries, 16 * warp + lane % 16, 2 * d + lane / 16));
#pragma unroll
            for (int n = 0; n < KEY_BLOCKS; n += 2) {
                unsigned key[4];
                load_matrices(key, at<PITCH>(keys, 8 * n + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
                multiply(weight[n], query, key[0], key[1]);
                multiply(weight[n + 1], query, key[2], key[3]);
            }
        }

        const int count = tile.count();
        const bool masked = tile.kind & MASKED;
        bool strict = false;
        if (masked) {
            bool odd = false;
            constexpr int VECTORS = V_HEAD_DIM / VECTOR;
            for (int n = threadIdx.x; n < BLOCK_KEYS * VECTORS; n += THREADS) {
                const Vector<Element> value = *(const Vector<Element>*)at<V_PITCH>(values, n / VECTORS, n % VECTORS);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) odd |= !is_finite_element(value.x[e]);
            }
            // From here on nobody reads the keys.
            strict = __syncthreads_or(odd);
        }

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row row = row_of(a, item, min(item.first_row + 16 * warp + group + 8 * half, a.rows - 1));
            const long long position = row.row + item.position;
            // A bit for each key of a lane.
            static_assert(KEY_BLOCKS <= 16);
            unsigned hidden = 0, kept = ~0u;
            float now = top[half];
#pragma unroll
            for (int n = 0; n < KEY_BLOCKS; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = weight[n][2 * half + e];
                    score *= float(a.scale);
                    const int place = 8 * n + pair + e;
                    if (ANYATTN_SCORE || masked || place >= count) {
                        const int number = tile.key(a, min(place, count - 1));
                        score = logit_of(score, c, item, row, position, number);
                        if (place >= count || (masked && !is_seen(c, item, row, position, number))) {
                            score = -INFINITE;
                            hidden |= 1u << (2 * n + e);
                        }
                    }
                    now = larger(score, now);
                }
            now = larger(__shfl_xor_sync(~0u, now, 1), now);
            now = larger(__shfl_xor_sync(~0u, now, 2), now);
            const float base = base_of(now), scaled = power_of_2((top[half] - base) * LOG2_E);
            if (ANYATTN_KEEP) {
                kept = 0;
                // Of more keys at once, the compiler spills what Philox computes.
#pragma unroll 4
                for (int n = 0; n < 2 * KEY_BLOCKS; ++n) {
                    const int number = tile.key(a, min(8 * (n / 2) + pair + n % 2, count - 1));
                    kept |= (unsigned)is_kept(c, item, row, position, number) << n;
                }
            }
            float part = 0;
#pragma unroll
            for (int n = 0; n < KEY_BLOCKS; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = weight[n][2 * half + e];
                    score = power_of_2((score - base) * LOG2_E);
                    part += score;
                    if (!(kept >> (2 * n + e) & 1)) score = 0;
                    if (strict && hidden >> (2 * n + e) & 1) score = -1;
                }
            total[half] = total[half] * scaled + part;
            top[half] = now;
#pragma unroll
            for (int m = 0; m < COLUMN_BLOCKS; ++m)
#pragma unroll
                for (int e = 0; e < 2; ++e) sum[m][2 * half + e] *= scaled;
        }

        if (strict) {
            static_assert(BLOCK_ROWS <= PITCH, "weights of the strict path take the place of keys");
            add_seen_values(sum, weight, values, keys + 16 * warp * BLOCK_KEYS, lane);
            continue;
        }
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; n += 2) {
            const unsigned weights[4] = {
                pair_of(weight[n][0], weight[n][1]), pair_of(weight[n][2], weight[n][3]),
                pair_of(weight[n + 1][0], weight[n + 1][1]), pair_of(weight[n + 1][2], weight[n + 1][3]),
            };
#pragma unroll
            for (int m = 0; m < COLUMN_BLOCKS; m += 2) {
                unsigned value[4];
                load_transposed(value, at<V_PITCH>(values, 8 * n + lane % 16, m + lane / 16));
                multiply(sum[m], weights, value[0], value[1]);
                multiply(sum[m + 1], weights, value[2], value[3]);
            }
        }
    }
    wait_for_groups<0>();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float all = total[half];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        const int number = item.first_row + 16 * warp + group + 8 * half;
        if (number >= a.rows) continue;
        const Row row = row_of(a, item, number);
        const float sink = a.parts > 1 ? -INFINITE : sink_of(a, row.head);
        const float base = base_of(larger(sink, top[half])), scaled = exp(top[half] - base);
        // The largest weight is 1, so a row whose sum is 0 has seen nothing, whatever its sink is.
        const bool empty = all == 0;
        all = all * scaled + exp(sink - base);
        const float factor = empty ? 0.0f : scaled / all * float(a.kept_scale);
#pragma unroll
        for (int m = 0; m < COLUMN_BLOCKS; ++m)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * m + pair + e < a.v_head_dim)
                    store_out(a, item, row, 8 * m + pair + e, sum[m][2 * half + e] * factor);
        if (pair == 0) store_lse(a, item, row, empty ? sink : base + log(all));
    }
}
