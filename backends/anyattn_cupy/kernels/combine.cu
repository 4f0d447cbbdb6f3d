// Results of parts of the keys into one: lse = log (sum_p exp(lse_p) + exp(sink)), out = sum_p exp(lse_p - lse) out_p.
//
// A warp has a row, its lanes the columns. Parts are (parts, B, Hq, Lq, Dv) and (parts, B, Hq, Lq), contiguous.

extern "C" __global__ void __launch_bounds__(128)
combine(const __grid_constant__ Arguments a) {
    const long long rows = (long long)a.batch_size * a.num_heads * a.q_len;
    const long long number = blockIdx.x * 4LL + threadIdx.x / 32;
    if (number >= rows) return;
    const Real* lse = (const Real*)a.part_lse + number;
    const Real* out = (const Real*)a.part_out + number * a.v_head_dim;

    const int row = number % a.q_len, head = number / a.q_len % a.num_heads;
    const Real sink = a.sinks ? ((const Real*)a.sinks)[head] : -INFINITE;
    Real top = sink;
    bool empty = true;
    for (int part = 0; part < a.parts; ++part) {
        top = larger(lse[part * rows], top);
        empty &= lse[part * rows] == -INFINITE;
    }
    const Real base = base_of(top);
    Real all = exp(sink - base);
    for (int part = 0; part < a.parts; ++part) all += exp(lse[part * rows] - base);

    int rest = number / a.q_len / a.num_heads;
    long long place = head * a.out_head + row * a.out_row;
#pragma unroll
    for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
        place += rest % a.batch_sizes[axis] * a.out_batch[axis];
        rest /= a.batch_sizes[axis];
    }
    for (int column = threadIdx.x % 32; column < a.v_head_dim; column += 32) {
        Real sum = 0;
        for (int part = 0; part < a.parts; ++part)
            sum += exp(lse[part * rows] - base) * out[part * rows * a.v_head_dim + column];
        ((Element*)a.out)[place + column] = element_of(empty ? Real(0) : sum / all);
    }
    if (a.lse && threadIdx.x % 32 == 0) ((Real*)a.lse)[number] = empty ? sink : base + log(all);
}
