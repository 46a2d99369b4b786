// CUDA C++ on a CPU, to test kernels where there is no GPU: blocks one after the other, their threads as coroutines
// that change places at barriers and shuffles. Not fast, and blind to races between barriers; every value is real.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct Dimensions {
    unsigned x = 1, y = 1;
};
static Dimensions threadIdx, blockIdx, blockDim, gridDim;
// All the shared memory of a block; 227 KB are the most that a processor has.
static uint4 memory[227 * 1024 / sizeof(uint4)];

namespace emulator {

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    int barriers = 0, shuffles = 0;  // that it has reached
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static size_t current;
static const std::function<void()>* kernel;
static uint32_t lanes[1024];

inline void run_kernel() {
    (*kernel)();
    threads[current].done = true;
    swapcontext(&threads[current].context, &scheduler);
}

// Lets the others run until all of [first, last) have reached as many of `count` as this one.
inline void wait_for(size_t first, size_t last, int Thread::*count) {
    const int mine = ++(threads[current].*count);
    for (;;) {
        bool all = true;
        for (size_t i = first; i < last; ++i) {
            // A thread that has left keeps nobody waiting at a barrier; in a shuffle it would be an error.
            all = all && (threads[i].done || threads[i].*count >= mine);
        }
        if (all) return;
        swapcontext(&threads[current].context, &scheduler);
    }
}

inline uint32_t shuffle(uint32_t value, int other) {
    const size_t warp = current / 32 * 32;
    lanes[current] = value;
    wait_for(warp, warp + 32, &Thread::shuffles);
    const size_t partner = current ^ static_cast<size_t>(other);
    if (threads[partner].done) abort();
    const uint32_t found = lanes[partner];
    wait_for(warp, warp + 32, &Thread::shuffles);
    return found;
}

// False if a block used more shared memory than it asked for, or the grid is none.
inline bool launch(Dimensions grid, unsigned count, size_t shared, const std::function<void()>& body) {
    if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || shared > sizeof memory) return false;
    kernel = &body;
    gridDim = grid;
    blockDim.x = count;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            // What another block left there must not be of use.
            memset(memory, 0xAB, sizeof memory);
            threads.clear();
            threads.resize(count);
            for (Thread& thread : threads) {
                constexpr size_t kStack = 1 << 17;
                thread.stack.reset(new char[kStack]);
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.get();
                thread.context.uc_stack.ss_size = kStack;
                thread.context.uc_link = nullptr;
                makecontext(&thread.context, run_kernel, 0);
            }
            for (size_t left = count; left > 0;) {
                for (current = 0; current < count; ++current) {
                    if (threads[current].done) continue;
                    threadIdx.x = static_cast<unsigned>(current);
                    swapcontext(&scheduler, &threads[current].context);
                    left -= threads[current].done;
                }
            }
            const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(memory);
            for (size_t i = shared; i < sizeof memory; ++i)
                if (bytes[i] != 0xAB) return false;
        }
    }
    return true;
}

// Calls a kernel with arguments that a driver would be given: one address each.
template <class... Types, size_t... I>
void call(void (*function)(Types...), void** arguments, std::index_sequence<I...>) {
    function(*static_cast<Types*>(arguments[I])...);
}

struct Kernel {
    const char* name;
    std::function<void(void**)> call;
};

template <class... Types>
Kernel kernel_of(const char* name, void (*function)(Types...)) {
    return {name, [function](void** arguments) { call(function, arguments, std::index_sequence_for<Types...>{}); }};
}

// 0, or 1 if there is no such kernel, or 2 as launch() says.
inline int run(const std::vector<Kernel>& kernels, const char* name, Dimensions grid, unsigned count, size_t shared,
               void** arguments) {
    for (const Kernel& one : kernels)
        if (strcmp(one.name, name) == 0) return launch(grid, count, shared, [&] { one.call(arguments); }) ? 0 : 2;
    return 1;
}

}  // namespace emulator

#define KERNEL(name) emulator::kernel_of(#name, name)
// What Python calls: a kernel of these by its name, as cuLaunchKernel would run it.
#define EMULATE(...)                                                                                              \
    extern "C" int octavo_emulate(const char* name, unsigned grid_x, unsigned grid_y, unsigned count,             \
                                  unsigned shared, void** arguments) {                                            \
        Dimensions grid;                                                                                          \
        grid.x = grid_x;                                                                                          \
        grid.y = grid_y;                                                                                          \
        return emulator::run({__VA_ARGS__}, name, grid, count, shared, arguments);                                \
    }

inline void __syncthreads() { emulator::wait_for(0, emulator::threads.size(), &emulator::Thread::barriers); }
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __shfl_xor_sync(uint32_t, float value, int other) {
    return __uint_as_float(emulator::shuffle(__float_as_uint(value), other));
}
inline int __float2int_rn(float value) { return static_cast<int>(lrintf(value)); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    return c;
}
template <class T>
inline T __ldcs(const T* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) abort();  // as a GPU would
    return *from;
}
