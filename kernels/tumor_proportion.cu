// FreeTumor's Eq. 4: of the voxels of a synthetic tumour, the part that the judge predicts as tumour. Counts are 64
// bit integers, so the result does not depend on the order of the blocks.
//
// Of the mask everything is read, of predictions and logits only what lies inside it.

constexpr int THREADS = 256;  // a power of two: the launcher's block, halved in the reduction
constexpr int AT_ONCE = 8;    // loads of the mask that a thread has under way at the same time

// ---- what a prediction is: at(i) tells whether voxel i of the sample is predicted as tumour ----

struct Predicted {
    const unsigned char* values;

    __device__ bool at(long long i) const { return values[i] == 1; }
};

// Logits as numbers that compare like them, NaN above all: floats as they are, halves as integers made of their bits.
struct Float32 {
    typedef float Stored;
    __device__ static float key(float logit) { return logit; }
};

struct Float64 {
    typedef double Stored;
    __device__ static double key(double logit) { return logit; }
};

// Sign and magnitude; the magnitude above INFINITE is NaN.
template <int INFINITE>
struct Half {
    typedef unsigned short Stored;
    __device__ static int key(unsigned short bits) {
        const int magnitude = bits & 0x7fff;
        if (magnitude > INFINITE) return 0x8000;
        return (bits & 0x8000) != 0 ? -magnitude : magnitude;
    }
};

typedef Half<0x7c00> Float16;
typedef Half<0x7f80> BFloat16;

// Whether a class with logit a beats the best so far, an earlier class with logit b: as torch.argmax decides.
__device__ bool beats(int a, int b) { return a > b; }
__device__ bool beats(float a, float b) { return a > b || (a != a && b == b); }
__device__ bool beats(double a, double b) { return a > b || (a != a && b == b); }

template <typename Float>
struct Logits {
    const typename Float::Stored* values;  // [class][voxel]
    const unsigned char* is_tumor;         // [class]
    long long num_classes, num_voxels;

    __device__ bool at(long long i) const {
        auto best = Float::key(values[i]);
        long long most_probable = 0;
        for (long long c = 1; c < num_classes; ++c) {
            const auto logit = Float::key(values[c * num_voxels + i]);
            if (beats(logit, best)) {
                best = logit;
                most_probable = c;
            }
        }
        return is_tumor[most_probable] != 0;
    }
};

// ---- counting ----

// counts: [hits, voxels of the mask] of one sample, to which this block adds its part.
template <typename Prediction, typename Mask>
__device__ void count_hits(unsigned long long* counts, const Prediction& predicted, const Mask* mask,
                           long long num_voxels, long long part, int num_parts) {
    __shared__ unsigned long long hits[THREADS], voxels[THREADS];
    unsigned long long my_hits = 0, my_voxels = 0;
    const long long step = (long long)THREADS * AT_ONCE;
    for (long long first = part * step + threadIdx.x; first < num_voxels; first += num_parts * step) {
        unsigned inside = 0;  // bit k: whether voxel first + k * THREADS is in the mask
        for (int k = 0; k < AT_ONCE; ++k) {
            const long long i = first + k * THREADS;
            if (i < num_voxels && mask[i] == (Mask)1) inside |= 1u << k;
        }
        for (int k = 0; inside >> k != 0; ++k) {
            if ((inside >> k & 1) == 0) continue;
            ++my_voxels;
            if (predicted.at(first + k * THREADS)) ++my_hits;
        }
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
        atomicAdd(&counts[0], hits[0]);
        atomicAdd(&counts[1], voxels[0]);
    }
}

// counts: [sample][2], all 0 before. Blocks are numbered sample * blocks_per_sample + part. 64 bit throughout: a batch
// can pass 2^31 voxels.
template <typename Mask>
__device__ void count_hits_of_predicted(unsigned long long* counts, const unsigned char* predicted, const Mask* mask,
                                        long long num_voxels, int blocks_per_sample) {
    const long long sample = blockIdx.x / blocks_per_sample, part = blockIdx.x % blocks_per_sample;
    const Predicted here = {predicted + sample * num_voxels};
    count_hits(counts + 2 * sample, here, mask + sample * num_voxels, num_voxels, part, blocks_per_sample);
}

// logits: [sample][class][voxel]; is_tumor: [sample][class], not 0 for the classes that count.
template <typename Float, typename Mask>
__device__ void count_hits_of_logits(unsigned long long* counts, const typename Float::Stored* logits, const Mask* mask,
                                     const unsigned char* is_tumor, long long num_classes, long long num_voxels,
                                     int blocks_per_sample) {
    const long long sample = blockIdx.x / blocks_per_sample, part = blockIdx.x % blocks_per_sample;
    const Logits<Float> here = {logits + sample * num_classes * num_voxels, is_tumor + sample * num_classes,
                                num_classes, num_voxels};
    count_hits(counts + 2 * sample, here, mask + sample * num_voxels, num_voxels, part, blocks_per_sample);
}

extern "C" __global__ void count_hits_float32(unsigned long long* counts, const unsigned char* predicted,
                                              const float* mask, long long num_voxels, int blocks_per_sample) {
    count_hits_of_predicted(counts, predicted, mask, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_uint8(unsigned long long* counts, const unsigned char* predicted,
                                            const unsigned char* mask, long long num_voxels, int blocks_per_sample) {
    count_hits_of_predicted(counts, predicted, mask, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_float32_float32(unsigned long long* counts, const float* logits,
                                                      const float* mask, const unsigned char* is_tumor,
                                                      long long num_classes, long long num_voxels,
                                                      int blocks_per_sample) {
    count_hits_of_logits<Float32>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_float32_uint8(unsigned long long* counts, const float* logits,
                                                    const unsigned char* mask, const unsigned char* is_tumor,
                                                    long long num_classes, long long num_voxels,
                                                    int blocks_per_sample) {
    count_hits_of_logits<Float32>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_float64_float32(unsigned long long* counts, const double* logits,
                                                      const float* mask, const unsigned char* is_tumor,
                                                      long long num_classes, long long num_voxels,
                                                      int blocks_per_sample) {
    count_hits_of_logits<Float64>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_float64_uint8(unsigned long long* counts, const double* logits,
                                                    const unsigned char* mask, const unsigned char* is_tumor,
                                                    long long num_classes, long long num_voxels,
                                                    int blocks_per_sample) {
    count_hits_of_logits<Float64>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_float16_float32(unsigned long long* counts, const unsigned short* logits,
                                                      const float* mask, const unsigned char* is_tumor,
                                                      long long num_classes, long long num_voxels,
                                                      int blocks_per_sample) {
    count_hits_of_logits<Float16>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_float16_uint8(unsigned long long* counts, const unsigned short* logits,
                                                    const unsigned char* mask, const unsigned char* is_tumor,
                                                    long long num_classes, long long num_voxels,
                                                    int blocks_per_sample) {
    count_hits_of_logits<Float16>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_bfloat16_float32(unsigned long long* counts, const unsigned short* logits,
                                                       const float* mask, const unsigned char* is_tumor,
                                                       long long num_classes, long long num_voxels,
                                                       int blocks_per_sample) {
    count_hits_of_logits<BFloat16>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

extern "C" __global__ void count_hits_bfloat16_uint8(unsigned long long* counts, const unsigned short* logits,
                                                     const unsigned char* mask, const unsigned char* is_tumor,
                                                     long long num_classes, long long num_voxels,
                                                     int blocks_per_sample) {
    count_hits_of_logits<BFloat16>(counts, logits, mask, is_tumor, num_classes, num_voxels, blocks_per_sample);
}

// One thread per sample. The quotient of two counts is taken in float64 and rounded once more, as on the CPU.
extern "C" __global__ void divide_counts(float* proportion, const unsigned long long* counts, long long num_samples) {
    const long long sample = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (sample >= num_samples) return;
    const unsigned long long hits = counts[2 * sample], voxels = counts[2 * sample + 1];
    proportion[sample] = voxels == 0 ? 0.0f : (float)((double)hits / (double)voxels);
}
