// The PTX that kernels have inline, on the host: asm statements are rewritten (cuda_host.py) to calls of
// `host::instruction` with the text, the operands that are written and those that are read.
//
// Written from the PTX ISA and apart from the interpreter in tests/ptx, so that each holds the other.
#pragma once

#include <initializer_list>

#include "threads.h"

namespace host {

struct Written {
    void* at;
    int size;
};

struct Read {
    unsigned long long bits;
};

template <class T>
Written written(T& x) {
    return {&x, sizeof(T)};
}

template <class T>
Read read(const T& x) {
    Read found = {};
    memcpy(&found.bits, &x, sizeof(T));
    return found;
}

inline void give(const Written& to, unsigned long long bits) { memcpy(to.at, &bits, to.size); }

inline bool begins(const char* text, const char* with) { return strncmp(text, with, strlen(with)) == 0; }

inline float of_half(unsigned bits) { return (float)with_bits_of<_Float16>((unsigned short)bits); }
inline unsigned to_half(float value) { return with_bits_of<unsigned short>((_Float16)value); }
inline float of_bfloat(unsigned bits) { return __uint_as_float(bits << 16); }

inline unsigned to_bfloat(float value) {
    const unsigned bits = __float_as_uint(value), half = 0x7fff + (bits >> 16 & 1);
    return value != value ? 0x7fff : (bits + half) >> 16;
}

inline unsigned char* shared_place(unsigned address, int line) {
    if (address % 16) fail(line, "an address of shared memory is no multiple of 16");
    return shared_memory() + address;
}

inline void copy_16_bytes(void* to, const void* from) {
    for (int n = 0; n < 2; ++n) ((unsigned long long*)to)[n] = ((const unsigned long long*)from)[n];
}

inline void arrive(int keep) {
    static const unsigned long long zeros[2] = {};
    for (Copy copy; next_copy(keep, copy);) copy_16_bytes(copy.to, copy.there ? copy.from : zeros);
}

// Lane 8 m + r gives the address of row r of matrix m, and takes two neighbours of its row lane / 4 of each.
inline void load_matrices(
    int line, bool transposed, std::initializer_list<Written> out, unsigned address
) {
    const int lane = thread_index().x % 32, count = out.size();
    unsigned row[4] = {};
    if (lane < 8 * count) copy_16_bytes(row, shared_place(address, line));
    meet(line, row, 4, false);
    const auto element = [](int matrix, int row, int column) {
        return brought(8 * matrix + row, column / 2) >> 16 * (column % 2) & 0xffff;
    };
    const int first = lane / 4, second = lane % 4 * 2;
    int m = 0;
    for (const Written& to : out) {
        const unsigned low = transposed ? element(m, second, first) : element(m, first, second);
        const unsigned high = transposed ? element(m, second + 1, first) : element(m, first, second + 1);
        give(to, low | high << 16);
        ++m;
    }
}

// D = A B + C of 16 x K, K x 8, whose elements have 16 bits: the tables "Matrix Fragments for mma.m16n8k16 with
// floating point type" and "... m16n8k8" of the PTX ISA, read backwards, from an element to its lane and register.
inline void multiply_matrices(
    int line, int depth, float (*value)(unsigned), const Written* out, const Read* in
) {
    const int lane = thread_index().x % 32, of_a = depth / 4, of_b = depth / 8;
    unsigned words[6];
    for (int n = 0; n < of_a + of_b; ++n) words[n] = in[n].bits;
    meet(line, words, of_a + of_b, false);
    const auto element = [&](int lane, int word, int column) {
        return value(brought(lane, word) >> 16 * (column % 2) & 0xffff);
    };
    for (int n = 0; n < 4; ++n) {
        const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        float sum;
        memcpy(&sum, out[n].at, sizeof sum);
        for (int k = 0; k < depth; ++k) {
            const int thread = k % 8 / 2;
            sum += element(row % 8 * 4 + thread, k / 8 * 2 + row / 8, k)
                   * element(column * 4 + thread, of_a + k / 8, k);
        }
        give(out[n], __float_as_uint(sum));
    }
}

inline void instruction(
    int line, const char* text, std::initializer_list<Written> out, std::initializer_list<Read> in
) {
    const Read* given = in.begin();
    if (begins(text, "cvt.f32.f16 ")) {
        give(*out.begin(), __float_as_uint(of_half(given[0].bits)));
    } else if (begins(text, "cvt.rn.f16.f32 ")) {
        give(*out.begin(), to_half(__uint_as_float(given[0].bits)));
    } else if (begins(text, "cvt.rn.bf16x2.f32 ")) {
        const unsigned high = to_bfloat(__uint_as_float(given[0].bits));
        give(*out.begin(), high << 16 | to_bfloat(__uint_as_float(given[1].bits)));
    } else if (begins(text, "ex2.approx.ftz.f32 ")) {
        const float found = exp2f(__uint_as_float(given[0].bits));
        give(*out.begin(), __float_as_uint(found < 0x1p-126f ? 0 : found));
    } else if (begins(text, "cp.async.cg.shared.global ")) {
        if (given[1].bits % 16) fail(line, "cp.async from where no multiple of 16 is");
        begin_copy({shared_place(given[0].bits, line), (const void*)given[1].bits, given[2].bits != 0});
    } else if (begins(text, "cp.async.commit_group;")) {
        end_group();
    } else if (begins(text, "cp.async.wait_group ")) {
        arrive(given[0].bits);
    } else if (begins(text, "ldmatrix.sync.aligned.m8n8.")) {
        load_matrices(line, strstr(text, ".trans."), out, given[0].bits);
    } else if (begins(text, "mma.sync.aligned.m16n8k")) {
        const int depth = begins(text, "mma.sync.aligned.m16n8k16.") ? 16 : 8;
        multiply_matrices(line, depth, strstr(text, ".bf16.") ? of_bfloat : of_half, out.begin(), given);
    } else {
        fail(line, text);
    }
}

}  // namespace host
