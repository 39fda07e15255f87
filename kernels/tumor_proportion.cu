// FreeTumor's Eq. 4: of the voxels of a synthetic tumour, the part that the judge predicts as tumour. Counts are 64
// bit integers, so the result does not depend on the order of the blocks.

constexpr int THREADS = 256;  // a power of two: the launcher's block, halved in the reduction

// counts: [sample][2], all 0 before: hits, then voxels of the mask. Blocks are numbered sample * blocks_per_sample +
// part.
template <typename Mask>
__device__ void count_hits(unsigned long long* counts, const unsigned char* predicted, const Mask* mask,
                           long long num_voxels, int blocks_per_sample) {
    __shared__ unsigned long long hits[THREADS], voxels[THREADS];
    const long long sample = blockIdx.x / blocks_per_sample;
    const long long part = blockIdx.x % blocks_per_sample;
    const long long start = sample * num_voxels;  // 64 bit: a batch can pass 2^31 voxels
    const unsigned char* const predicted_here = predicted + start;
    const Mask* const mask_here = mask + start;

    unsigned long long my_hits = 0, my_voxels = 0;
    for (long long i = part * THREADS + threadIdx.x; i < num_voxels; i += (long long)blocks_per_sample * THREADS) {
        if (mask_here[i] != (Mask)1) continue;
        ++my_voxels;
        if (predicted_here[i] == 1) ++my_hits;
    }
    hits[threadIdx.x] = my_hits;
    voxels[threadIdx.x] = my_voxels;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            hits[threadIdx.x] += hits[threadIdx.x + half];
            voxels[threadIdx.x] += voxels[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        atomicAdd(&counts[2 * sample], hits[0]);
        atomicAdd(&counts[2 * sample + 1], voxels[0]);
    }
}

extern "C" __global__ void count_hits_float32(unsigned long long* counts, const unsigned char* predicted,
                                              const float* mask, long long num_voxels, int blocks_per_sample) {
    count_hits(counts, predicted, mask, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_uint8(unsigned long long* counts, const unsigned char* predicted,
                                            const unsigned char* mask, long long num_voxels, int blocks_per_sample) {
    count_hits(counts, predicted, mask, num_voxels, blocks_per_sample);
}

// One thread per sample. The quotient of two counts is taken in float64 and rounded once more, as on the CPU.
extern "C" __global__ void divide_counts(float* proportion, const unsigned long long* counts, long long num_samples) {
    const long long sample = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (sample >= num_samples) return;
    const unsigned long long hits = counts[2 * sample], voxels = counts[2 * sample + 1];
    proportion[sample] = voxels == 0 ? 0.0f : (float)((double)hits / (double)voxels);
}
