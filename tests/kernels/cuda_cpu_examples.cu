// Kernels with and without mistakes, for the tests of cuda_cpu.

// Mirrors a block's values through shared memory; all is well.
extern "C" __global__ void mirror(int* out, const int* in) {
    __shared__ int values[64];
    values[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The same without its barrier: a thread may read before the other wrote.
extern "C" __global__ void mirror_without_barrier(int* out, const int* in) {
    __shared__ int values[64];
    values[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The largest value that is not negative, by its bits; every thread brings one.
extern "C" __global__ void largest(float* out, unsigned* bits, const float* values) {
    atomicMax(bits, __float_as_uint(values[threadIdx.x]));
    __syncthreads();
    if (threadIdx.x == 0) out[0] = __uint_as_float(*bits);
}

// A barrier that half of the block never meets.
extern "C" __global__ void divergent_barrier(int* out) {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
    out[threadIdx.x] = 1;
}

// Writes `count` floats into dynamic shared memory, whatever its length.
extern "C" __global__ void fill_shared(float* out, int count) {
    extern __shared__ float tile[];
    for (int i = 0; i < count; ++i) tile[i] = (float)i;
    out[0] = tile[count - 1];
}

// Reads dynamic shared memory that nobody wrote.
extern "C" __global__ void read_unwritten(float* out) {
    extern __shared__ float tile[];
    out[0] = tile[0];
}

// Each thread of a three-dimensional launch adds its own place; the sum tells whether each index was met exactly once.
extern "C" __global__ void sum_of_places(unsigned long long* out) {
    const unsigned long long x = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    const unsigned long long y = blockIdx.y * (unsigned long long)blockDim.y + threadIdx.y;
    const unsigned long long z = blockIdx.z * (unsigned long long)blockDim.z + threadIdx.z;
    atomicAdd(out, x + 100 * y + 10000 * z);
}

extern "C" __global__ void scale(double* values, double factor, float offset, int count, long long stride) {
    for (int i = 0; i < count; ++i) values[i * stride] = values[i * stride] * factor + offset;
}

// Each warp's vote on odd values, and over a block of any size the range of its values, by atomics.
extern "C" __global__ void vote_and_range(unsigned* ballots, long long* range, const int* values) {
    const int value = values[threadIdx.x];
    const unsigned odd = __ballot_sync(0xffffffffu, value % 2 != 0), large = __ballot_sync(0xffffffffu, value >= 50);
    ballots[2 * threadIdx.x] = odd;
    ballots[2 * threadIdx.x + 1] = large;
    atomicMin(&range[0], (long long)value);
    atomicMax(&range[1], (long long)value);
    __threadfence();
    if (atomicAdd(&range[2], 1LL) == blockDim.x - 1) range[3] = min(__popc(odd), 1000) + max(__ffs(8), 0);
}

struct Weights {
    int count;
    double of[3];
};

// A struct by value, and a bound on registers.
extern "C" __global__ __launch_bounds__(32, 2) void weigh(double* out, const __grid_constant__ Weights weights) {
    double sum = 0;
    for (int i = 0; i < weights.count; ++i) sum += weights.of[i];
    out[0] = sum;
}
