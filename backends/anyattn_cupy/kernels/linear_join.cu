// The state before each part of a sequence, from what each part makes of none and what it keeps of one.
//
// `part_state` is (B, parts, H, D, Dv), what each makes on entry and what it begins with on return, which is the last
// state unless CAUSAL; of `part_z` (B, parts, H, D) the same. A thread has an entry of all parts.

extern "C" __global__ void __launch_bounds__(128)
linear_join(const __grid_constant__ Arguments a) {
    const int columns = a.v_head_dim + NORMALIZE;
    const long long number = blockIdx.x * 128LL + threadIdx.x, rows = number / columns;
    const int column = number % columns, channel = rows % a.head_dim;
    const long long head = rows / a.head_dim % a.num_kv_heads, batch = rows / a.head_dim / a.num_kv_heads;
    if (batch >= a.batch_size) return;
    const bool of_z = column == a.v_head_dim;
    const int width = of_z ? 1 : a.v_head_dim, place = of_z ? 0 : column;
    const Real* before = (const Real*)(of_z ? a.z_before : a.state_before);
    Real* part = (Real*)(of_z ? a.part_z : a.part_state);
    Real* after = (Real*)(of_z ? a.z_after : a.state_after);
    const long long at = rows * width + place;
    Real state = before ? before[at] : Real(0);
    const auto row_of = [&](int n) {
        return ((batch * a.sequences + n) * a.num_kv_heads + head) * a.head_dim + channel;
    };
    for (int n = 0; n < a.sequences; ++n) {
        const long long row = row_of(n);
        const Real own = part[row * width + place];
        part[row * width + place] = state;
        state = CHANNELS ? ((const Real*)a.kept)[row] * state + own : state + own;
    }
    if (!CAUSAL)
        for (int n = 0; n < a.sequences; ++n) part[row_of(n) * width + place] = state;
    after[at] = state;
}
