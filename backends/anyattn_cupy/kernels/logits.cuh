// From a product q . k to the logit that the softmax sees, by the functions that were printed for the call.
//
// Given: namespace program (`anyattn.expr.print_cuda`) with the macros ANYATTN_SCORE and ANYATTN_VISIBLE.

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
