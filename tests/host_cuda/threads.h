// The threads of a launch on the host, and the words of CUDA C++ that kernels use of them.
//
// A thread of CUDA is a fiber; those of a block take turns in one thread of the host, blocks follow each other. What
// is declared here is defined in launch.cpp, which no sanitizer instruments, so that only what kernels do themselves
// counts as an access. What reads and writes memory of a kernel stands in headers, for the opposite reason.
#pragma once

#include <math.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

namespace host {

struct Index {
    unsigned x, y, z;
};

Index thread_index();
Index block_index();
// Dynamic shared memory of the block that runs.
unsigned char* shared_memory();

// Says what is wrong, of which thread and block, and ends the process.
[[noreturn]] void fail(int line, const char* what);

// All threads of the block wait for each other; how many of them said so.
int barrier(int line, bool said);

// All threads of the warp wait for each other. Each brings `count` words and may then ask for those of others, until
// the warp meets again. `ordered` tells whether memory is ordered by it.
void meet(int line, const unsigned* words, int count, bool ordered);
unsigned brought(int lane, int word);

// Asynchronous copies of 16 bytes that have begun and not arrived.
struct Copy {
    void* to;
    const void* from;
    bool there;
};
void begin_copy(const Copy& copy);
void end_group();
// Takes the next copy of all but the newest `keep` groups of this thread, if there is one.
bool next_copy(int keep, Copy& copy);

template <class T>
T shuffle_xor(unsigned members, T value, int by, int line) {
    static_assert(sizeof(T) % 4 == 0);
    if (members != ~0u) fail(line, "a shuffle among part of a warp is not known here");
    unsigned words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    meet(line, words, sizeof(T) / 4, false);
    const int lane = thread_index().x % 32;
    for (unsigned n = 0; n < sizeof(T) / 4; ++n) words[n] = brought(lane ^ by, n);
    memcpy(&value, words, sizeof(T));
    return value;
}

inline bool any(unsigned members, bool said, int line) {
    if (members != ~0u) fail(line, "a vote of part of a warp is not known here");
    const unsigned word = said;
    meet(line, &word, 1, false);
    bool found = false;
    for (int lane = 0; lane < 32; ++lane) found |= brought(lane, 0);
    return found;
}

// Calls a kernel with arguments by value, each given by its bytes.
template <class... Arguments>
void call(void (*kernel)(Arguments...), const unsigned char* const* bytes) {
    int n = 0;
    auto argument = [&]<class T>(T* none) {
        T value;
        memcpy(&value, bytes[n++], sizeof(T));
        return value;
    };
    // Braces are evaluated from left to right.
    struct Call {
        Call(void (*kernel)(Arguments...), Arguments... arguments) { kernel(arguments...); }
    };
    Call{kernel, argument((Arguments*)nullptr)...};
}

template <class... Arguments>
bool sizes_are(void (*)(Arguments...), const unsigned long long* sizes, int count) {
    int n = 0;
    return count == sizeof...(Arguments) && ((sizeof(Arguments) == sizes[n++]) && ...);
}

}  // namespace host

// Of the source that is compiled: its kernel.
void run_kernel(const unsigned char* const* arguments);
bool takes(const unsigned long long* sizes, int count);

#define threadIdx host::thread_index()
#define blockIdx host::block_index()
#define __syncthreads() host::barrier(__LINE__, false)
#define __syncthreads_or(said) (host::barrier(__LINE__, said) != 0)
#define __syncwarp() host::meet(__LINE__, nullptr, 0, true)
#define __shfl_xor_sync(members, value, by) host::shuffle_xor(members, value, by, __LINE__)
#define __any_sync(members, said) host::any(members, said, __LINE__)

inline int min(int x, int y) { return x < y ? x : y; }
inline long long min(long long x, long long y) { return x < y ? x : y; }
inline long long max(long long x, long long y) { return x > y ? x : y; }

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __cvta_generic_to_shared(const void* p) { return (const unsigned char*)p - host::shared_memory(); }
inline const void* __cvta_generic_to_global(const void* p) { return p; }

template <class To, class From>
To with_bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

inline float __int_as_float(int bits) { return with_bits_of<float>(bits); }
inline float __uint_as_float(unsigned bits) { return with_bits_of<float>(bits); }
inline unsigned __float_as_uint(float value) { return with_bits_of<unsigned>(value); }
