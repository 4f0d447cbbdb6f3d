// Runs one launch that is described in a file, and writes memory back as it is then.
//
//     launch FILE: numbers of 64 bits: blocks along x and y, threads of a block, bytes of shared memory, base and size of global
//     memory, count of arguments and the size of each, count of allocations and (offset, size) of each; then the
//     bytes of the arguments, then those of global memory.
//
// Global memory is mapped where the arguments say that it is, so that they need no change. Shared memory begins as
// bits that are no number. Threads run from the last to the first: what another writes before a barrier is not there
// by the order of their numbers.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "threads.h"

#if defined(WITH_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(WITH_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace {

using Number = unsigned long long;
constexpr size_t STACK = 128 * 1024;
constexpr int WORDS = 6;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    unsigned number;
    bool done = false;
    // Waits until the counter has reached so much, at a line of the source.
    const unsigned* counter = nullptr;
    unsigned wanted = 0;
    int line = 0;
    unsigned barriers = 0, meetings = 0;
    struct Pending {
        host::Copy copy;
        int group;
    };
    std::deque<Pending> copies;
    int group = 0;
    void* sanitizer = nullptr;

    bool ready() const { return !done && (!counter || *counter >= wanted); }
};

struct Warp {
    unsigned arrived = 0;
    int line = 0;
    // Of this meeting and of the one before, whose words some lane may still have to read.
    unsigned words[2][32][WORDS];
};

struct Block {
    unsigned number, arrived = 0;
    int line = 0, said[2] = {};
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned char* shared;
};

ucontext_t scheduler;
unsigned columns;
void* of_scheduler;
Block* block;
Fiber* running;
const unsigned char* const* kernel_arguments;

Warp& warp() { return block->warps[running->number / 32]; }

void enter(Fiber& fiber) {
    running = &fiber;
#if defined(WITH_ADDRESS)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), STACK);
#elif defined(WITH_THREAD)
    __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&scheduler, &fiber.context);
#if defined(WITH_ADDRESS)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void leave() {
    Fiber& fiber = *running;
#if defined(WITH_ADDRESS)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.sanitizer, nullptr, 0);
#elif defined(WITH_THREAD)
    __tsan_switch_to_fiber(of_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&fiber.context, &scheduler);
#if defined(WITH_ADDRESS)
    __sanitizer_finish_switch_fiber(fiber.sanitizer, nullptr, nullptr);
#endif
}

void order([[maybe_unused]] void* by, [[maybe_unused]] bool before) {
#if defined(WITH_THREAD)
    if (before) __tsan_release(by);
    else __tsan_acquire(by);
#endif
}

void body() {
#if defined(WITH_ADDRESS)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    run_kernel(kernel_arguments);
    if (!running->copies.empty()) host::fail(0, "ends while cp.async is under way");
    running->done = true;
    order(&scheduler, true);
    leave();
}

// Waits until all that count with this one have come, `counted` of them a time.
void wait(unsigned& counter, unsigned time, unsigned counted, int& place, int line, const char* others) {
    if (counter % counted == 0) place = line;
    else if (place != line) host::fail(line, others);
    ++counter;
    running->counter = &counter;
    running->wanted = time * counted;
    running->line = line;
    if (!running->ready()) leave();
    running->counter = nullptr;
}

void run_block(Block& one) {
    block = &one;
    for (Fiber& fiber : one.fibers) {
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, body, 0);
#if defined(WITH_THREAD)
        fiber.sanitizer = __tsan_create_fiber(0);
#endif
    }
    for (bool some = true; some;) {
        some = false;
        for (size_t n = one.fibers.size(); n-- > 0;)
            if (one.fibers[n].ready()) enter(one.fibers[n]), some = true;
    }
    for (Fiber& fiber : one.fibers) {
        running = &fiber;
        if (!fiber.done) host::fail(fiber.line, "waits for threads that never come");
        if (fiber.barriers != one.fibers[0].barriers) host::fail(0, "threads passed different barriers");
    }
}

}  // namespace

namespace host {

Index thread_index() { return {running->number, 0, 0}; }
Index block_index() { return {block->number % columns, block->number / columns, 0}; }
unsigned char* shared_memory() { return block->shared; }

void fail(int line, const char* what) {
    std::fprintf(stderr, "line %d: %s: thread %u of block %u\n", line, what, running->number, block->number);
    std::_Exit(3);
}

int barrier(int line, bool said) {
    const unsigned turn = running->barriers++;
    // The sum that the barrier before the last gave is no longer read.
    if (block->arrived % block->fibers.size() == 0) block->said[turn % 2] = 0;
    block->said[turn % 2] += said;
    order(block, true);
    wait(block->arrived, turn + 1, block->fibers.size(), block->line, line, "another barrier than others wait at");
    order(block, false);
    return block->said[turn % 2];
}

void meet(int line, const unsigned* words, int count, bool ordered) {
    const unsigned turn = running->meetings++;
    unsigned* mine = warp().words[turn % 2][running->number % 32];
    for (int n = 0; n < count; ++n) mine[n] = words[n];
    if (ordered) order(&warp(), true);
    wait(warp().arrived, turn + 1, 32, warp().line, line, "lanes of the warp are elsewhere");
    if (ordered) order(&warp(), false);
}

unsigned brought(int lane, int word) { return warp().words[(running->meetings - 1) % 2][lane][word]; }

void begin_copy(const Copy& copy) { running->copies.push_back({copy, running->group}); }
void end_group() { ++running->group; }

bool next_copy(int keep, Copy& copy) {
    auto& copies = running->copies;
    if (copies.empty() || copies.front().group >= running->group - keep) return false;
    copy = copies.front().copy;
    copies.pop_front();
    return true;
}

}  // namespace host

int main(int, char** names) {
    std::FILE* file = std::fopen(names[1], "r+b");
    const auto read = [&](void* to, size_t size) {
        if (std::fread(to, 1, size, file) != size) std::perror(names[1]), std::exit(2);
    };
    const auto number = [&] {
        Number found;
        read(&found, sizeof found);
        return found;
    };
    columns = number();
    const Number blocks = columns * number(), threads = number(), shared = number(), base = number(), size = number();
    std::vector<Number> sizes(number());
    for (Number& one : sizes) one = number();
    if (!takes(sizes.data(), sizes.size())) std::fprintf(stderr, "arguments of other sizes\n"), std::exit(3);
    std::vector<Number> allocations(2 * number());
    for (Number& one : allocations) one = number();
    std::vector<std::unique_ptr<unsigned char[]>> arguments;
    std::vector<const unsigned char*> places;
    for (const Number one : sizes) {
        arguments.emplace_back(new unsigned char[one]);
        read(arguments.back().get(), one);
        places.push_back(arguments.back().get());
    }
    kernel_arguments = places.data();
    const long begin = std::ftell(file);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    void* memory = mmap((void*)base, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory != (void*)base) std::perror("global memory"), std::exit(2);
    read(memory, size);
#if defined(WITH_ADDRESS)
    __asan_poison_memory_region(memory, size);
    for (size_t n = 0; n < allocations.size(); n += 2)
        __asan_unpoison_memory_region((char*)memory + allocations[n], allocations[n + 1]);
#elif defined(WITH_THREAD)
    of_scheduler = __tsan_get_current_fiber();
#endif
    // All are kept until the end: memory and fibers that are used again would hide races between blocks.
    std::deque<Block> all(blocks);
    for (Number n = 0; n < blocks; ++n) {
        all[n].number = n;
        all[n].fibers = std::vector<Fiber>(threads);
        for (Number m = 0; m < threads; ++m) all[n].fibers[m].number = m;
        all[n].warps = std::vector<Warp>(threads / 32);
        all[n].shared = new (std::align_val_t(128)) unsigned char[shared];
        memset(all[n].shared, 0xff, shared);
        run_block(all[n]);
    }
#if defined(WITH_ADDRESS)
    __asan_unpoison_memory_region(memory, size);
#endif
    order(&scheduler, false);
    std::fseek(file, begin, SEEK_SET);
    if (std::fwrite(memory, 1, size, file) != size || std::fclose(file)) std::perror(names[1]), std::exit(2);
    return 0;
}
