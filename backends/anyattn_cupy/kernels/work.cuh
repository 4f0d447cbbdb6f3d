// Which queries a block of threads computes and which keys these visit.
//
// Given: struct Arguments, BATCH_AXES, BLOCK_ROWS, BLOCK_KEYS, PACKED. A schedule lists spans of keys for each block of
// queries; without one every key is visited. Spans are walked in tiles of BLOCK_KEYS, up to the length of a sequence.

constexpr int MASKED = 1, GATHERED = 2;

// A block of rows that share a key/value head: of one query head, or, if PACKED, of all heads of a group, one head's
// rows after the other's. Its tiles may be dealt out to several parts.
struct Item {
    int batch, head, kv_head, first_row, part;
    long long q, k, v, out;  // where the batch entry begins (q, out), and the head (k, v), in elements
    const float *k_scales, *v_scales;  // of the head, if SCALED
    long long position;                // of row 0
    long long first_span, last_span;
};

// Which query a row of an item is.
struct Row {
    int head, row;
};

__device__ __forceinline__ Row row_of(const Arguments& a, const Item& item, int number) {
#if PACKED
    return {item.head + number / a.q_len, number % a.q_len};
#else
    return {item.head, number};
#endif
}

__device__ __forceinline__ Item item_of(const Arguments& a, unsigned number) {
    Item item;
    item.part = number % a.parts;
    number /= a.parts;
    const unsigned n = a.order ? (unsigned)a.order[number] : number;
    const unsigned block = n % a.blocks, of_head = n / a.blocks;
    const unsigned heads = PACKED ? a.num_heads / a.group_size : a.num_heads;
    item.batch = of_head / heads;
    item.head = of_head % heads * (PACKED ? a.group_size : 1);
    item.kv_head = item.head / a.group_size;
    item.first_row = block * BLOCK_ROWS;
    item.q = item.out = 0;
    item.k = item.kv_head * a.k_head;
    item.v = item.kv_head * a.v_head;
    item.k_scales = SCALED ? a.k_scales + item.kv_head * a.k_scales_head : nullptr;
    item.v_scales = SCALED ? a.v_scales + item.kv_head * a.v_scales_head : nullptr;
    int rest = item.batch;
#pragma unroll
    for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
        const int index = rest % a.batch_sizes[axis];
        rest /= a.batch_sizes[axis];
        item.q += index * a.q_batch[axis];
        item.k += index * a.k_batch[axis];
        item.v += index * a.v_batch[axis];
        item.out += index * a.out_batch[axis];
        if (SCALED) {
            item.k_scales += index * a.k_scales_batch[axis];
            item.v_scales += index * a.v_scales_batch[axis];
        }
    }
    item.position = a.offsets ? a.offsets[item.batch] : a.offset;
    item.first_span = 0;
    item.last_span = a.k_len > 0;
    if (a.span_starts) {
        const long long group = a.groups[item.batch * a.num_heads + item.head];
        const long long line = PACKED ? group : group * a.blocks + block;
        item.first_span = a.span_starts[line];
        item.last_span = a.span_starts[line + 1];
    }
    return item;
}

// Where a row of an array begins, if there is one, and what its numbers are times.
struct Place {
    bool there;
    long long offset;
    float scale = 1;
};

__device__ __forceinline__ Place query_place(const Arguments& a, const Item& item, int r) {
    const int number = item.first_row + r;
    if (number >= a.rows) return {false, 0};
    const Row row = row_of(a, item, number);
    return {true, item.q + row.head * a.q_head + row.row * a.q_row};
}

// A result, before it is rounded, of a part or of all keys.
__device__ __forceinline__ void store_out(const Arguments& a, const Item& item, Row row, int column, Real value) {
    if (a.parts > 1) {
        const long long head = ((long long)item.part * a.batch_size + item.batch) * a.num_heads + row.head;
        ((Real*)a.part_out)[(head * a.q_len + row.row) * a.v_head_dim + column] = value;
    } else {
        ((Element*)a.out)[item.out + row.head * a.out_head + row.row * a.out_row + column] = element_of(value);
    }
}

__device__ __forceinline__ void store_lse(const Arguments& a, const Item& item, Row row, Real value) {
    Real* to = (Real*)(a.parts > 1 ? a.part_lse : a.lse);
    const long long head = ((long long)item.part * a.batch_size + item.batch) * a.num_heads + row.head;
    if (to) to[head * a.q_len + row.row] = value;
}

// The logit that joins the sum without a value; that of parts joins when they are merged.
__device__ __forceinline__ Real sink_of(const Arguments& a, int head) {
    return a.sinks ? ((const Real*)a.sinks)[head] : -INFINITE;
}

// A walk over the tiles of an item: valid until `span` has reached the last.
struct Tile {
    long long span, first, end;
    int kind;

    __device__ __forceinline__ int count() const {
        return end - first < BLOCK_KEYS ? int(end - first) : BLOCK_KEYS;
    }

    // The number of the key at a place below count().
    __device__ __forceinline__ int key(const Arguments& a, int place) const {
        return kind & GATHERED ? a.columns[first + place] : int(first) + place;
    }

    __device__ __forceinline__ bool valid(const Item& item) const { return span < item.last_span; }

    // To the first tile of this span, or of the next one that begins before the keys of the batch entry end: a schedule
    // knows no length that lies on the device.
    __device__ __forceinline__ void enter(const Arguments& a, const Item& item) {
        for (; valid(item); ++span) {
            first = a.span_starts ? a.span_ends[2 * span] : 0;
            end = a.span_starts ? a.span_ends[2 * span + 1] : a.k_len;
            kind = a.span_starts ? a.span_kinds[span] : 0;
            if (a.lengths && !(kind & GATHERED)) end = min(end, a.lengths[item.batch]);
            if (first < end) return;
        }
    }

    __device__ __forceinline__ void skip(const Arguments& a, const Item& item, int tiles) {
        for (int n = 0; n < tiles && valid(item); ++n) {
            first += BLOCK_KEYS;
            if (first < end) continue;
            ++span;
            enter(a, item);
        }
    }

    // Parts take turns, so that each has as much to do whatever the mask leaves.
    __device__ __forceinline__ void advance(const Arguments& a, const Item& item) { skip(a, item, a.parts); }

    // Of keys or values, which begin at `head` and lie `stride` apart, as their scales do.
    __device__ __forceinline__ Place key_place(
        const Arguments& a, int place, long long head, long long stride, const float* scales, long long scale_stride
    ) const {
        if (place >= count()) return {false, 0};
        const long long number = key(a, place);
        return {true, head + number * stride, SCALED ? scales[number * scale_stride] : 1.0f};
    }
};

__device__ __forceinline__ Tile first_tile(const Arguments& a, const Item& item) {
    Tile tile = {item.first_span, 0, 0, 0};
    tile.enter(a, item);
    tile.skip(a, item, item.part);
    return tile;
}
