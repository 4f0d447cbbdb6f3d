// Instructions that CUDA C++ has no names for: asynchronous copies, and matrices of a warp (PTX ISA, "Warp-level
// matrix instructions"). A lane is in group lane / 4 and is thread lane % 4 of it.

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory, which are there after the wait for their group; zeros unless `there`. Before compute
// capability 8.0 they are there at once.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
#else
    *(uint4*)to = there ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void end_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most KEEP groups of this thread are under way.
template <int KEEP>
__device__ __forceinline__ void wait_for_groups() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
#endif
}

// Four matrices of 8 x 8 whose rows begin where lanes 0..7, 8..15, 16..23, 24..31 say. Register m of a lane holds
// two neighbours of row lane / 4 of matrix m: columns 2 (lane % 4) and the next; rows, if transposed.
__device__ __forceinline__ void load_matrices(unsigned (&m)[4], const Element* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void load_transposed(unsigned (&m)[4], const Element* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

#if defined(ELEMENT_BFLOAT16)
#define MMA_TYPE "bf16"
#else
#define MMA_TYPE "f16"
#endif

// c += a b of 16 x 16, 16 x 8. a: rows g, g + 8, g, g + 8, columns 2 t, 2 t, 2 t + 8, 2 t + 8 and the next; b: rows
// 2 t and 2 t + 8 and the next of column g; c: columns 2 t and the next of row g, then of row g + 8. Compute capability
// 7.5 has half of it, the first columns of a and rows of b or the last.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// 2 ** x, to 2 units in the last place.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
