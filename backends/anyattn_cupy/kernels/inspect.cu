// The weights themselves, and sums over them, in two passes over the keys of each block of rows:
//
//     all[r] = sum_j exp(s[r, j] - top[r]) with the sink,   p[r, j] = exp(s[r, j] - top[r]) / all[r], 0 where hidden
//     out[r, j] = p[r, j],   key_mass[j] = sum_r p[r, j],   entropy[r] = -sum_j p[r, j] log p[r, j],   peak[r] = max_j p
//
// Lanes have their rows as in products.cuh. What nobody asks for is a null pointer. A block of threads has every
// `chunks`-th block of rows of one head and adds them to a key_mass of its own, one after the other, so that sums are
// the same every time. A row with NaN or +inf at a seen key is NaN at all keys it sees, and 0 at hidden ones.
//
// Given: as for products.cuh. Shared memory is dynamic. With `row_numbers`, which anything may stand in, the rows are
// these, every key is visited and the mask is asked of each.

// NaN if either is.
__device__ __forceinline__ Real peak_of(Real x, Real y) { return x > y || x != x ? x : y; }

// One block at least, as for the other kernels.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
inspect(const __grid_constant__ Arguments a, const __grid_constant__ program::Captured c) {
    extern __shared__ __align__(16) unsigned char shared[];
    Real* queries = (Real*)shared;
    Real* keys = queries + BLOCK_ROWS * HEAD_DIM;
    Real* columns = keys + BLOCK_KEYS * KEY_PITCH;  // (WARPS, BLOCK_KEYS)

    const int warp = threadIdx.x / 32, row_group = threadIdx.x % 32 / 8, key_group = threadIdx.x % 8;
    const unsigned of_head = blockIdx.x / a.chunks;
    for (int block = blockIdx.x % a.chunks; block < a.blocks; block += a.chunks) {
        const Item item = item_of(a, of_head * a.blocks + block);
        const auto row_at = [&](int number) {
            const long long row = a.row_numbers ? a.row_numbers[min(number, a.rows - 1)] : number;
            return Row{item.head, (int)max(0LL, min(row, a.q_len - 1LL))};
        };
        const auto query_place_of = [&](int r) {
            const int number = item.first_row + r;
            if (number >= a.rows) return Place{false, 0};
            return Place{true, item.q + item.head * a.q_head + row_at(number).row * a.q_row};
        };
        // Nobody reads the queries of a block of rows before: there is one, or the sums of columns had a barrier.
        if (!WIDE)
            load_rows<BLOCK_ROWS, HEAD_DIM, HEAD_DIM>(
                queries, (const Element*)a.q, a.q_step, 0, a.head_dim, query_place_of
            );

        Row row[ROWS];
        bool there[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int number = item.first_row + 16 * warp + row_group + 4 * r;
            there[r] = number < a.rows;
            row[r] = row_at(number);
        }
        // -inf where hidden; rows beyond the last see nothing.
        const auto find_logits = [&](Real(&score)[ROWS][KEYS], unsigned& hidden, const Tile& tile) {
            multiply_tile(score, a, item, tile, queries, keys, query_place_of, [] {});
            const int count = tile.count();
            const bool masked = a.row_numbers || tile.kind & MASKED;
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int m = 0; m < KEYS; ++m) {
                    const int place = key_group + 8 * m, number = tile.key(a, min(place, count - 1));
                    const long long position = row[r].row + item.position;
                    const Real logit = logit_of(score[r][m] * Real(a.scale), c, item, row[r], position, number);
                    const bool seen = there[r] && place < count
                        && (!masked || is_seen(c, item, row[r], position, number));
                    score[r][m] = seen ? logit : -INFINITE;
                    hidden |= (unsigned)!seen << (r * KEYS + m);
                }
        };

        Real top[ROWS], total[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) top[r] = -INFINITE, total[r] = 0;
        for (Tile tile = first_tile(a, item); tile.valid(item); tile.advance(a, item)) {
            Real score[ROWS][KEYS] = {};
            unsigned hidden = 0;
            find_logits(score, hidden, tile);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                Real now = top[r];
#pragma unroll
                for (int m = 0; m < KEYS; ++m) now = larger(score[r][m], now);
                const Real base = base_of(now);
                total[r] *= exp(top[r] - base);
#pragma unroll
                for (int m = 0; m < KEYS; ++m) total[r] += exp(score[r][m] - base);
                top[r] = now;
            }
        }

        Real factor[ROWS], log_all[ROWS], entropy[ROWS] = {}, peak[ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            // One of infinity is NaN beside what a row sees; as the base it would leave nothing of that.
            const Real given = sink_of(a, item.head), sink = given == INFINITE ? given - given : given;
            Real now = larger(sink, top[r]);
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2) now = larger(__shfl_xor_sync(~0u, now, lane), now);
            const Real base = base_of(now);
            Real all = total[r] * exp(top[r] - base);
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2) all += __shfl_xor_sync(~0u, all, lane);
            // A row that has seen nothing has no weights, whatever its sink is.
            const bool empty = all == 0;
            all += exp(sink - base);
            top[r] = base;
            factor[r] = empty ? Real(0) : 1 / all;
            log_all[r] = empty ? Real(0) : log(all);
        }

        for (Tile tile = first_tile(a, item); tile.valid(item); tile.advance(a, item)) {
            Real score[ROWS][KEYS] = {};
            unsigned hidden = 0;
            find_logits(score, hidden, tile);
            const int count = tile.count();
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int m = 0; m < KEYS; ++m) {
                    const Real above = score[r][m] - top[r];
                    const Real p = hidden >> (r * KEYS + m) & 1 ? Real(0) : exp(above) * factor[r];
                    entropy[r] -= p == 0 ? Real(0) : p * (above - log_all[r]);
                    peak[r] = peak_of(p, peak[r]);
                    score[r][m] = p;
                    const int place = key_group + 8 * m, number = item.first_row + 16 * warp + row_group + 4 * r;
                    if (a.out && there[r] && place < count) {
                        const long long to = item.out + item.head * a.out_head + number * a.out_row;
                        ((Element*)a.out)[to + tile.key(a, place)] = element_of(p);
                    }
                }
            if (!a.key_mass) continue;
#pragma unroll
            for (int m = 0; m < KEYS; ++m) {
                Real sum = 0;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sum += score[r][m];
                sum += __shfl_xor_sync(~0u, sum, 8);
                sum += __shfl_xor_sync(~0u, sum, 16);
                if (row_group == 0) columns[warp * BLOCK_KEYS + key_group + 8 * m] = sum;
            }
            __syncthreads();
            const long long head = (blockIdx.x % a.chunks * (long long)a.batch_size + item.batch) * a.num_heads + item.head;
            for (int place = threadIdx.x; place < count; place += THREADS) {
                Real sum = 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += columns[w * BLOCK_KEYS + place];
                ((Real*)a.key_mass)[head * a.k_len + tile.key(a, place)] += sum;
            }
        }

#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2) {
                entropy[r] += __shfl_xor_sync(~0u, entropy[r], lane);
                peak[r] = peak_of(__shfl_xor_sync(~0u, peak[r], lane), peak[r]);
            }
            const long long head = (long long)item.batch * a.num_heads + item.head;
            const long long place = head * a.q_len + row[r].row;
            if (key_group == 0 && there[r]) {
                if (a.entropy) ((Real*)a.entropy)[place] = entropy[r];
                if (a.peak) ((Real*)a.peak)[place] = peak[r];
            }
        }
    }
}
