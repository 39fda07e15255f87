// One axis of a separable Gaussian over a batch of volumes, each sample with its own width.
//
// A block takes neighbouring lines along the axis into shared memory, continued over both ends, then writes their
// weighted sums. It has read all it needs before it writes and blocks share no line, so output may be input. One
// barrier; no early return.

// Index of position i on a line of n voxels that is mirrored at the outer faces of its end voxels (d c b a | a b c d
// | d c b a), which is SciPy's 'reflect'; any distance, since a radius may exceed the line.
__device__ int reflected(int i, int n) {
    const int period = 2 * n;
    int inside = i % period;
    if (inside < 0) inside += period;
    return inside < n ? inside : period - 1 - inside;
}

// First voxel of a line, seen from its sample: lines are numbered in memory order.
__device__ long long line_start(int line, int stride, int length) {
    return (long long)(line / stride) * stride * length + line % stride;
}

// weights: [sample][width], the first 2 * radius + 1 of each row in use; radii: [sample]; length: voxels of a line;
// stride: between neighbours on it (1 on the x axis); lines: per sample, which 32 bits hold since the launcher limits
// each axis. Blocks are numbered sample * ceil(lines / lines_per_block) + group. Dynamic shared memory:
// [length + 2 * largest radius][lines_per_block | 1] floats.
extern "C" __global__ void blur_axis(float* output, const float* input, const float* weights, const int* radii,
                                     int width, int length, int stride, int lines, int lines_per_block) {
    extern __shared__ float tile[];
    const int pitch = lines_per_block | 1;  // odd: neither direction through the tile meets a bank conflict
    const int groups = (lines + lines_per_block - 1) / lines_per_block;
    const int sample = blockIdx.x / groups;
    const int first_line = blockIdx.x % groups * lines_per_block;
    const int lines_here = lines - first_line < lines_per_block ? lines - first_line : lines_per_block;
    const int radius = radii[sample];
    const float* const weight = weights + (long long)sample * width;
    const long long sample_start = (long long)sample * lines * length;  // 64 bit: a batch can pass 2^31 voxels
    const int padded = length + 2 * radius;

    // neighbouring threads take neighbouring addresses: along the line on the x axis, across the lines on the others
    for (int item = threadIdx.x; item < padded * lines_here; item += blockDim.x) {
        const int position = stride == 1 ? item % padded : item / lines_here;
        const int line = stride == 1 ? item / padded : item % lines_here;
        const long long start = sample_start + line_start(first_line + line, stride, length);
        tile[position * pitch + line] = input[start + (long long)reflected(position - radius, length) * stride];
    }
    __syncthreads();
    for (int item = threadIdx.x; item < length * lines_here; item += blockDim.x) {
        const int position = stride == 1 ? item % length : item / lines_here;
        const int line = stride == 1 ? item / length : item % lines_here;
        const long long start = sample_start + line_start(first_line + line, stride, length);
        float sum = weight[0] * tile[position * pitch + line];  // not 0 + ...: a window of one must return -0 as -0
        for (int tap = 1; tap <= 2 * radius; ++tap) sum += weight[tap] * tile[(position + tap) * pitch + line];
        output[start + (long long)position * stride] = sum;
    }
}
