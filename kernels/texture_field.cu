// The noise texture of FreeTumor's released code, between its two Gaussian blurs: uniform noise, coins, scaling.
//
// Compiled with --fmad=false: each operation rounds alone, in the order in which the CPU path does the same. Reductions
// are maxima and sums of integers, which no order of threads changes.

struct alignas(16) Four {
    float value[4];
};

struct Block {
    unsigned word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011, section 3.3).
__device__ Block philox(Block counter, unsigned key_low, unsigned key_high) {
    unsigned* const c = counter.word;
    for (int round = 0; round < 10; ++round) {
        const unsigned long long even = 0xD2511F53ull * c[0];
        const unsigned long long odd = 0xCD9E8D57ull * c[2];
        c[0] = (unsigned)(odd >> 32) ^ c[1] ^ key_low;
        c[1] = (unsigned)odd;
        c[2] = (unsigned)(even >> 32) ^ c[3] ^ key_high;
        c[3] = (unsigned)even;
        key_low += 0x9E3779B9u;  // golden ratio
        key_high += 0xBB67AE85u;  // sqrt(3) - 1
    }
    return counter;
}

// The random words of voxels 4 block to 4 block + 3. number: of the field; stream: what its numbers are for.
__device__ Block words_of(unsigned long long block, unsigned number, unsigned stream, unsigned long long seed) {
    const Block counter = {{(unsigned)block, (unsigned)(block >> 32), number, stream}};
    return philox(counter, (unsigned)seed, (unsigned)(seed >> 32));
}

// Uniform in [0, 1), exact: a multiple of 2^-24.
__device__ float uniform(unsigned word) { return (float)(word >> 8) * 5.9604644775390625e-8f; }

// The generator alone, for its known answers.
extern "C" __global__ void random_words(unsigned* out, unsigned long long first_block, unsigned number, unsigned stream,
                                        unsigned long long seed, long long num_blocks) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long b = blockIdx.x * (long long)blockDim.x + threadIdx.x; b < num_blocks; b += step) {
        const Block words = words_of(first_block + b, number, stream, seed);
        for (int k = 0; k < 4; ++k) out[4 * b + k] = words.word[k];
    }
}

extern "C" __global__ void noise(float* out, unsigned number, unsigned stream, unsigned long long seed,
                                 long long num_voxels) {
    const long long step = (long long)gridDim.x * blockDim.x;  // 64 bit: a field may pass 2^31 voxels
    const long long num_blocks = (num_voxels + 3) / 4;
    for (long long b = blockIdx.x * (long long)blockDim.x + threadIdx.x; b < num_blocks; b += step) {
        const Block words = words_of(b, number, stream, seed);
        Four values;
        for (int k = 0; k < 4; ++k) values.value[k] = uniform(words.word[k]);
        if (4 * b + 3 < num_voxels) {
            *(Four*)(out + 4 * b) = values;  // 16 bytes at once
        } else {
            for (int k = 0; 4 * b + k < num_voxels; ++k) out[4 * b + k] = values.value[k];
        }
    }
}

// Smallest and largest of values that are not negative, whose bits order as they do. range: {the smallest's bits,
// inverted, so that 0 means nothing yet for both; the largest's bits}. Blocks of 256 threads.
extern "C" __global__ void value_range(unsigned* range, const float* values, long long num_voxels) {
    __shared__ unsigned lows[256], highs[256];
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned low = 0, high = 0;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const unsigned bits = __float_as_uint(values[i]);
        if (~bits > low) low = ~bits;
        if (bits > high) high = bits;
    }
    lows[threadIdx.x] = low;
    highs[threadIdx.x] = high;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            if (lows[threadIdx.x + half] > lows[threadIdx.x]) lows[threadIdx.x] = lows[threadIdx.x + half];
            if (highs[threadIdx.x + half] > highs[threadIdx.x]) highs[threadIdx.x] = highs[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        atomicMax(range, lows[0]);
        atomicMax(range + 1, highs[0]);
    }
}

// 1 where the voxel's uniform number is below its probability, which grows from base to base + scale over the range.
extern "C" __global__ void coins(float* values, const unsigned* range, float scale, float base, unsigned number,
                                 unsigned stream, unsigned long long seed, long long num_voxels) {
    const long long step = (long long)gridDim.x * blockDim.x;
    const long long num_blocks = (num_voxels + 3) / 4;
    const float low = __uint_as_float(~range[0]), high = __uint_as_float(range[1]);
    const float slope = high > low ? scale / (high - low) : 0.0f;
    for (long long b = blockIdx.x * (long long)blockDim.x + threadIdx.x; b < num_blocks; b += step) {
        const Block words = words_of(b, number, stream, seed);
        Four spots;
        if (4 * b + 3 < num_voxels) {
            spots = *(const Four*)(values + 4 * b);
            for (int k = 0; k < 4; ++k)
                spots.value[k] = uniform(words.word[k]) < (spots.value[k] - low) * slope + base ? 1.0f : 0.0f;
            *(Four*)(values + 4 * b) = spots;
        } else {
            for (int k = 0; 4 * b + k < num_voxels; ++k)
                values[4 * b + k] = uniform(words.word[k]) < (values[4 * b + k] - low) * slope + base ? 1.0f : 0.0f;
        }
    }
}

// Sum and count of the values above 0.12. A float32 from 2^-4 to 2 is a whole multiple of 2^-27, so the sum of these
// multiples is exact, and 64 bits hold it for 2^36 voxels. sums: {sum, count}, 0 before. Blocks of 256 threads.
extern "C" __global__ void bright_sum(unsigned long long* sums, const float* values, long long num_voxels) {
    __shared__ unsigned long long totals[256], counts[256];
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned long long total = 0, count = 0;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const float value = values[i];
        if (value > 0.12f) {
            total += (unsigned)(value * 134217728.0f);
            ++count;
        }
    }
    totals[threadIdx.x] = total;
    counts[threadIdx.x] = count;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            totals[threadIdx.x] += totals[threadIdx.x + half];
            counts[threadIdx.x] += counts[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        atomicAdd(sums, totals[0]);
        atomicAdd(sums + 1, counts[0]);
    }
}

// Times u0 over the mean of the values above 0.12 (1 where there is none), at most 1; no value is negative.
extern "C" __global__ void scale_to_mean(float* values, const unsigned long long* sums, double u0,
                                         long long num_voxels) {
    const long long step = (long long)gridDim.x * blockDim.x;
    const float beta = sums[1] > 0 ? (float)(u0 * (double)sums[1] * 134217728.0 / (double)sums[0]) : 1.0f;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const float scaled = values[i] * beta;
        values[i] = scaled > 1.0f ? 1.0f : scaled;
    }
}
