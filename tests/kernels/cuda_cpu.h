// Just enough CUDA C++ to run this project's kernels on the CPU: for tests of their logic on machines without a GPU.
//
// Blocks run one after another, and so do the threads of a block, in an order that the test chooses. A thread runs
// until it ends or meets a barrier; at a barrier its stack is put aside and the next thread starts. When all wait,
// they are resumed in the same order. Between two barriers the threads therefore run strictly in turn: a kernel that
// lacks a barrier gives results that depend on the order, which a test finds by running two orders.
//
// Not here: warps (no shuffle, no __syncwarp; a ballot waits for the whole block), several blocks at once, speed. A static __shared__ array keeps the
// values of the block before; dynamic shared memory is filled with NaN for each block and watched at its end.

#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};

static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_cpu {

constexpr std::size_t STACK_BYTES = 64 << 10;
constexpr std::size_t GUARD_BYTES = 16 << 10;
constexpr unsigned char POISON = 0xFF;  // as float or double: NaN

// A stack that runs threads one after another; while one of them waits at a barrier, the stack is its own.
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int thread;
    bool at_barrier;
};

// The block that is running.
static std::vector<int> order;  // its threads, in the order in which they start
static std::size_t num_started, num_ended;
static std::function<void()> run_thread;  // the kernel with its arguments
static std::vector<unsigned char> dynamic_memory;

static std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block
static Fiber* running;
static ucontext_t scheduler;

static void become(Fiber* fiber, int thread) {
    const unsigned t = (unsigned)thread;
    fiber->thread = thread;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

static void leave(Fiber* fiber) { swapcontext(&fiber->context, &scheduler); }

static void resume(Fiber* fiber) {
    running = fiber;
    fiber->at_barrier = false;
    swapcontext(&scheduler, &fiber->context);
}

static void fiber_main() {
    Fiber* const self = running;
    for (;;) {
        while (num_started < order.size()) {
            become(self, order[num_started++]);
            run_thread();
            ++num_ended;
        }
        leave(self);  // until the next block
    }
}

static Fiber* fiber_number(std::size_t index) {
    if (index == fibers.size()) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = std::make_unique<char[]>(STACK_BYTES);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber->context, fiber_main, 0);
        fibers.push_back(std::move(fiber));
    }
    return fibers[index].get();
}

static void wait_at_barrier() {
    Fiber* const self = running;
    const int thread = self->thread;
    self->at_barrier = true;
    leave(self);
    become(self, thread);
}

// Null, or what is wrong with the kernel.
static const char* run_block() {
    num_started = num_ended = 0;
    std::vector<Fiber*> waiting;
    for (std::size_t used = 0; num_started < order.size(); ++used) {  // another stack where one was left at a barrier
        Fiber* const fiber = fiber_number(used);
        resume(fiber);
        if (fiber->at_barrier) waiting.push_back(fiber);
    }
    while (!waiting.empty()) {
        if (num_ended > 0) {
            fibers.clear();  // their threads can never end
            return "some threads of a block ended while others wait at a barrier";
        }
        std::vector<Fiber*> still_waiting;
        for (Fiber* fiber : waiting) {
            resume(fiber);
            if (fiber->at_barrier) still_waiting.push_back(fiber);
        }
        waiting = still_waiting;
    }
    return nullptr;
}

// What `extern __shared__ T name[];` means; the loader rewrites that line, which C++ cannot express.
template <typename T>
static T* dynamic_shared() {
    return reinterpret_cast<T*>(dynamic_memory.data());
}

static bool guard_is_intact(std::size_t shared_bytes) {
    for (std::size_t i = shared_bytes; i < dynamic_memory.size(); ++i) {
        if (dynamic_memory[i] != POISON) return false;
    }
    return true;
}

template <typename... Parameters, std::size_t... Index>
static void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[Index])...);
}

template <typename... Parameters>
static const char* launch(void (*kernel)(Parameters...), uint3 grid, uint3 block, const int* thread_order,
                          std::size_t shared_bytes, void** arguments) {
    gridDim = grid;
    blockDim = block;
    order.assign(thread_order, thread_order + block.x * block.y * block.z);
    run_thread = [=] { call(kernel, arguments, std::index_sequence_for<Parameters...>{}); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                dynamic_memory.assign(shared_bytes + GUARD_BYTES, POISON);
                if (const char* error = run_block()) return error;
                if (!guard_is_intact(shared_bytes)) return "a block wrote behind its dynamic shared memory";
            }
        }
    }
    return nullptr;
}

// A parameter's type as NumPy writes it, kind and bytes ("i4", "f8", "V96" for a struct); "P8" for any pointer.
template <typename T>
static std::string type_code() {
    const char* const number = std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "i" : "u";
    return (std::is_pointer_v<T> ? "P" : std::is_class_v<T> ? "V" : number) + std::to_string(sizeof(T));
}

template <typename... Parameters>
static std::string signature(void (*)(Parameters...)) {
    std::string codes;
    ((codes += type_code<Parameters>() + " "), ...);
    return codes;
}

}  // namespace cuda_cpu

template <typename T>
static inline T atomicMin(T* address, T value) {
    const T before = *address;
    if (value < before) *address = value;
    return before;
}

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

static inline void __threadfence() {}

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Bit i: whether lane i of the warp brings a number that is not 0. Waits for the whole block, so all its threads must
// call it, and all lanes must be named.
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    static bool votes[1024 + 32];
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    if (mask != 0xffffffffu) __builtin_trap();
    votes[thread] = predicate != 0;
    cuda_cpu::wait_at_barrier();
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned other = thread / 32 * 32 + lane;
        if (other < cuda_cpu::order.size() && votes[other]) ballot |= 1u << lane;
    }
    cuda_cpu::wait_at_barrier();  // before the next vote
    return ballot;
}

static inline void __syncthreads() { cuda_cpu::wait_at_barrier(); }

// Threads never run at the same time here, so a plain addition is atomic, and so is a comparison.
template <typename T>
static inline T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

template <typename T>
static inline T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Makes a kernel callable from outside; the loader writes one for each kernel of a file.
#define CUDA_CPU_EXPORT(kernel)                                                                                    \
    extern "C" const char* launch_##kernel(const unsigned* grid, const unsigned* block, const int* thread_order,   \
                                           std::size_t shared_bytes, void** arguments) {                           \
        return cuda_cpu::launch(kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, thread_order, \
                                shared_bytes, arguments);                                                          \
    }                                                                                                              \
    extern "C" const char* signature_##kernel() {                                                                  \
        static const std::string codes = cuda_cpu::signature(kernel);                                              \
        return codes.c_str();                                                                                      \
    }
