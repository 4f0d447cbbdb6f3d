// Products of queries and keys by multiply-adds, a tile at a time.
//
// A warp has 16 rows to itself; its lanes are 4 groups of rows x 8 groups of keys, so that a lane has 4 rows x
// BLOCK_KEYS / 8 keys of the scores.
//
// Given: WARPS, BLOCK_KEYS, HEAD_DIM (a multiple of 8), VECTOR_LOADS: whether rows of the arrays begin at multiples of
// 16 bytes and have whole vectors; WIDE: whether rows have more channels than HEAD_DIM, which then are so many at a time.

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 4;                   // of a lane: row_group + 4 r
constexpr int KEYS = BLOCK_KEYS / 8;      // of a lane: key_group + 8 m
constexpr int VECTOR = 16 / sizeof(Real);
// An odd number of vectors a row: eight rows lie in different banks.
constexpr int KEY_PITCH = HEAD_DIM + VECTOR;

struct alignas(16) Vector {
    Real x[VECTOR];
};

template <class Source>
struct alignas(VECTOR_LOADS ? VECTOR * sizeof(Source) : sizeof(Source)) Loaded {
    Source x[VECTOR];
};

// DIM channels, `first` and on, of rows of an array into shared memory, zeros where there are none: `place_of(r)` is
// where row r begins.
template <int COUNT, int DIM, int PITCH, class Source, class PlaceOf>
__device__ __forceinline__ void load_rows(
    Real* to, const Source* from, long long step, int first, int dim, const PlaceOf& place_of
) {
    for (int n = threadIdx.x; n < COUNT * (DIM / VECTOR); n += THREADS) {
        const int r = n / (DIM / VECTOR), column = n % (DIM / VECTOR) * VECTOR, channel = first + column;
        const Place place = place_of(r);
        Vector values = {};
        if (place.there && channel < dim) {
            const Source* source = from + place.offset;
            if (VECTOR_LOADS) {
                const Loaded<Source> loaded = *(const Loaded<Source>*)(source + channel);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) values.x[e] = value_of(loaded.x[e], place.scale);
            } else {
#pragma unroll
                for (int e = 0; e < VECTOR; ++e)
                    if (channel + e < dim) values.x[e] = value_of(source[(channel + e) * step], place.scale);
            }
        }
        *(Vector*)(to + r * PITCH + column) = values;
    }
}

// The products of the rows of a block, which are in `queries` unless they are WIDE, and the keys of a tile, which come
// into `keys`. `load_more()` puts what else is to be there for all threads when this is done into shared memory.
template <class QueryPlace, class LoadMore>
__device__ __forceinline__ void multiply_tile(
    Real (&score)[ROWS][KEYS], const Arguments& a, const Item& item, const Tile& tile, Real* queries, Real* keys,
    const QueryPlace& query_place_of, const LoadMore& load_more
) {
    const int warp = threadIdx.x / 32, row_group = threadIdx.x % 32 / 8, key_group = threadIdx.x % 8;
    for (int first = 0; first < (WIDE ? a.head_dim : 1); first += HEAD_DIM) {
        __syncthreads();
        if (WIDE)
            load_rows<BLOCK_ROWS, HEAD_DIM, HEAD_DIM>(
                queries, (const Element*)a.q, a.q_step, first, a.head_dim, query_place_of
            );
        load_rows<BLOCK_KEYS, HEAD_DIM, KEY_PITCH>(
            keys, (const Stored*)a.k, a.k_step, first, a.head_dim,
            [&](int r) { return tile.key_place(a, r, item.k, a.k_row, item.k_scales, a.k_scales_row); }
        );
        if (first == 0) load_more();
        __syncthreads();
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
    }
}
