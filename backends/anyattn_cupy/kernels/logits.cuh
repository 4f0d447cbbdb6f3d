// From a product q . k to the logit that the softmax sees, and from a weight to what meets the value, by the functions
// that were printed for the call.
//
// Given: namespace program (`anyattn.expr.print_cuda`) with the macros ANYATTN_SCORE, ANYATTN_VISIBLE, ANYATTN_KEEP.

__device__ __forceinline__ Real logit_of(
    Real score, const program::Captured& c, const Item& item, Row row, long long position, int key
) {
#if ANYATTN_SCORE
    return program::score(score, c, item.batch, row.head, row.row, (program::Index)position, key);
#else
    return score;
#endif
}

__device__ __forceinline__ bool is_seen(
    const program::Captured& c, const Item& item, Row row, long long position, int key
) {
#if ANYATTN_VISIBLE
    return program::visible(c, item.batch, row.head, row.row, (program::Index)position, key);
#else
    return true;
#endif
}

// Whether dropout leaves a weight, after the sum of its row. What is left is times `kept_scale`, in the end: a weight of
// 16 bits might not hold the product.
__device__ __forceinline__ bool is_kept(
    const program::Captured& c, const Item& item, Row row, long long position, int key
) {
#if ANYATTN_KEEP
    return program::keep(c, item.batch, row.head, row.row, (program::Index)position, key) != 0;
#else
    return true;
#endif
}
