// Which queries a block of threads computes and which keys these visit.
//
// Given: struct Arguments, BATCH_AXES, BLOCK_ROWS, BLOCK_KEYS. A schedule lists spans of keys for each block of
// queries; without one every key is visited. Spans are walked in tiles of BLOCK_KEYS.

constexpr int MASKED = 1, GATHERED = 2;

// One block of queries of one head.
struct Item {
    int batch, head, kv_head, first_row;
    long long q, k, v, out;  // where the head begins, in elements
    long long position;      // of row 0
    long long first_span, last_span;
};

__device__ __forceinline__ Item item_of(const Arguments& a, unsigned number) {
    Item item;
    const unsigned n = a.order ? (unsigned)a.order[number] : number;
    const unsigned block = n % a.blocks, of_head = n / a.blocks;
    item.head = of_head % a.num_heads;
    item.batch = of_head / a.num_heads;
    item.kv_head = item.head / a.group_size;
    item.first_row = block * BLOCK_ROWS;
    item.q = item.head * a.q_head;
    item.k = item.kv_head * a.k_head;
    item.v = item.kv_head * a.v_head;
    item.out = item.head * a.out_head;
    int rest = item.batch;
#pragma unroll
    for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
        const int index = rest % a.batch_sizes[axis];
        rest /= a.batch_sizes[axis];
        item.q += index * a.q_batch[axis];
        item.k += index * a.k_batch[axis];
        item.v += index * a.v_batch[axis];
        item.out += index * a.out_batch[axis];
    }
    item.position = a.offsets ? a.offsets[item.batch] : a.offset;
    item.first_span = 0;
    item.last_span = a.k_len > 0;
    if (a.span_starts) {
        const long long line = (long long)a.groups[item.batch * a.num_heads + item.head] * a.blocks + block;
        item.first_span = a.span_starts[line];
        item.last_span = a.span_starts[line + 1];
    }
    return item;
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

    __device__ __forceinline__ void enter(const Arguments& a) {
        first = a.span_starts ? a.span_ends[2 * span] : 0;
        end = a.span_starts ? a.span_ends[2 * span + 1] : a.k_len;
        kind = a.span_starts ? a.span_kinds[span] : 0;
    }

    __device__ __forceinline__ void advance(const Arguments& a, const Item& item) {
        first += BLOCK_KEYS;
        if (first >= end && ++span < item.last_span) enter(a);
    }

    __device__ __forceinline__ bool valid(const Item& item) const { return span < item.last_span; }
};

__device__ __forceinline__ Tile first_tile(const Arguments& a, const Item& item) {
    Tile tile = {item.first_span, 0, 0, 0};
    if (tile.valid(item)) tile.enter(a);
    return tile;
}
