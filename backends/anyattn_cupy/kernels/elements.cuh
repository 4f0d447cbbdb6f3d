// What arrays hold (Element) and what is computed with (Real), and the way from one to the other.
//
// Given: ELEMENT_FLOAT16, ELEMENT_BFLOAT16, ELEMENT_FLOAT32 or ELEMENT_FLOAT64. 16-bit floats are kept as
// their bits: cuda_fp16.h is found only where the toolkit's headers are installed. SCALED: whether keys and values
// are int8, each row of them times a float32 scale.

#if defined(ELEMENT_FLOAT64)
typedef double Element;
typedef double Real;
#elif defined(ELEMENT_FLOAT32)
typedef float Element;
typedef float Real;
#else
typedef unsigned short Element;
typedef float Real;
#endif

// NVRTC has no INFINITY.
#define INFINITE Real(__int_as_float(0x7f800000))

#if defined(ELEMENT_FLOAT16)
__device__ __forceinline__ Real real_of(Element bits) {
    Real value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ Element element_of(Real value) {
    Element bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ bool is_finite_element(Element bits) { return (bits & 0x7c00) != 0x7c00; }

// Two neighbours, the first in the low half.
__device__ __forceinline__ unsigned pair_of(Real first, Real second) {
    return element_of(first) | (unsigned)element_of(second) << 16;
}
#elif defined(ELEMENT_BFLOAT16)
__device__ __forceinline__ Real real_of(Element bits) { return __uint_as_float((unsigned)bits << 16); }

// To the nearest, ties to even; a NaN keeps a bit of its mantissa.
__device__ __forceinline__ Element element_of(Real value) {
    const unsigned bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

__device__ __forceinline__ bool is_finite_element(Element bits) { return (bits & 0x7f80) != 0x7f80; }

__device__ __forceinline__ unsigned pair_of(Real first, Real second) {
#if __CUDA_ARCH__ >= 800
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return element_of(first) | (unsigned)element_of(second) << 16;
#endif
}
#else
__device__ __forceinline__ Real real_of(Element value) { return value; }
__device__ __forceinline__ Element element_of(Real value) { return value; }
#endif

// What keys and values are kept as.
#if SCALED
typedef signed char Stored;
#else
typedef Element Stored;
#endif

__device__ __forceinline__ Real value_of(Element value, float) { return real_of(value); }
__device__ __forceinline__ Real value_of(signed char number, float scale) { return Real(number) * Real(scale); }

__device__ __forceinline__ bool is_finite(Real value) { return value - value == 0; }

__device__ __forceinline__ Real larger(Real x, Real y) { return x > y ? x : y; }

// What a maximum stands for in differences: rows that have seen nothing have none.
__device__ __forceinline__ Real base_of(Real top) { return top == -INFINITE ? Real(0) : top; }
