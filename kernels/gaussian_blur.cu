// Separable Gaussian over a batch of volumes, each sample and axis with its own width: x first, then y, then z.
//
// Every sum takes its taps in ascending order, product by product, without fused multiply-add (compiled with
// --fmad=false): the same bits in both kernels here and on the CPU. float16 and bfloat16 are only how voxels are
// stored; sums and everything between the axes are float32.

constexpr int MAX_RADIUS = 8;  // of the kernel that does all axes in one pass
constexpr int WARPS = 8;
constexpr int TILE_X = 32;  // voxels: a warp side by side, 128 bytes of float32
constexpr int SEGMENT = 4;  // neighbours along x that one thread sums: it loads (4 + 2 r) / 4 values for each

// ---- storage ----

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

union Word {
    float value;
    unsigned bits;
};

__device__ float widened(float voxel) { return voxel; }
__device__ double widened(double voxel) { return voxel; }
// In integers, but for subnormals, which are normal in float32: CuPy has NVRTC flush the subnormals of float32.
__device__ float widened(Float16 voxel) {
    const unsigned sign = (voxel.bits & 0x8000u) << 16, magnitude = voxel.bits & 0x7FFFu;
    Word word;
    if (magnitude < 0x0400u) {
        word.value = (float)magnitude * 5.9604644775390625e-8f;  // 2^-24
    } else if (magnitude < 0x7C00u) {
        word.bits = (magnitude << 13) + 0x38000000u;  // 112, from float16's exponent to float32's
    } else {
        word.bits = magnitude << 13 | 0x7F800000u;  // infinity, NaN
    }
    word.bits |= sign;
    return word.value;
}
__device__ float widened(BFloat16 voxel) {
    Word word;
    word.bits = (unsigned)voxel.bits << 16;
    return word.value;
}

// Rounded to nearest, ties to even.
__device__ void narrow(float& voxel, float value) { voxel = value; }
__device__ void narrow(double& voxel, double value) { voxel = value; }
__device__ void narrow(Float16& voxel, float value) {
    Word word;
    word.value = value;
    const unsigned sign = word.bits >> 16 & 0x8000u;
    unsigned bits = word.bits & 0x7FFFFFFFu;
    if (bits > 0x7F800000u) {
        bits = 0x7E00u;  // NaN
    } else if (bits >= 0x477FF000u) {
        bits = 0x7C00u;  // 65520 and more
    } else if (bits < 0x38800000u) {  // below 2^-14: one unit of float32 at 1/2 is one of float16 here
        word.bits = bits;
        word.value += 0.5f;
        bits = word.bits - 0x3F000000u;
    } else {
        bits = (bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1u)) >> 13;
    }
    voxel.bits = (unsigned short)(sign | bits);
}
__device__ void narrow(BFloat16& voxel, float value) {
    Word word;
    word.value = value;
    const bool is_nan = (word.bits & 0x7FFFFFFFu) > 0x7F800000u;
    voxel.bits = (unsigned short)(is_nan ? 0x7FC0u : (word.bits + 0x7FFFu + (word.bits >> 16 & 1u)) >> 16);
}

// ---- regions ----

// Index of position i on a line of n voxels that is mirrored at the outer faces of its end voxels (d c b a | a b c d
// | d c b a), which is SciPy's 'reflect'; any distance, since a radius may exceed the line.
__device__ int reflected(int i, int n) {
    const int period = 2 * n;
    int inside = i % period;
    if (inside < 0) inside += period;
    return inside < n ? inside : period - 1 - inside;
}

// Voxels first <= i < last on each axis, z y x.
struct Region {
    int first[3], last[3];
};

// A row of a table of boxes [batch][first, last][z y x], clamped to the volume.
__device__ Region region_of(const long long* boxes, int sample, const int (&shape)[3]) {
    Region region;
    for (int axis = 0; axis < 3; ++axis) {
        const long long first = boxes[sample * 6LL + axis], last = boxes[sample * 6LL + 3 + axis];
        region.first[axis] = (int)(first < 0 ? 0 : first < shape[axis] ? first : shape[axis]);
        region.last[axis] = (int)(last < 0 ? 0 : last < shape[axis] ? last : shape[axis]);
    }
    return region;
}

// Leaves of the target what the windows reach from the source: beyond it the blur is 0. An empty source leaves nothing.
__device__ void keep_reached(Region& target, const Region& source, const int (&radius)[3]) {
    bool empty = false;
    for (int axis = 0; axis < 3; ++axis) empty = empty || source.first[axis] >= source.last[axis];
    for (int axis = 0; axis < 3; ++axis) {
        const int first = source.first[axis] - radius[axis], last = source.last[axis] + radius[axis];
        if (first > target.first[axis]) target.first[axis] = first;
        if (last < target.last[axis]) target.last[axis] = last;
        if (empty) target.last[axis] = target.first[axis];
    }
}

// ---- all axes in one pass, windows up to MAX_RADIUS ----
//
// A block owns a tile of TILE_X by WARPS * ROWS voxels of the x-y plane and marches along z. Each plane comes once, with
// the halo that the windows need, into shared memory, is blurred along x into a second array, along y into registers,
// and along z in registers: a plane's value adds its product to all sums under way, each of which has seen the planes
// before it. So DRAM gives one read (halos mostly from the L2 cache) and takes one write.
//
// Without fused multiply-add the kernel is bound by instructions as much as by memory: each thread sums SEGMENT
// neighbours along x and ROWS along y from registers, and a product along z serves the two sums that it is symmetric in.
// Odd pitches: a warp reads 4 rows x 8 segments along x and 32 neighbours along y without a bank conflict. Both arrays
// are double, so that one barrier a plane is enough, and the next plane is on its way while this one is summed. 32 KiB
// of shared memory (float64: 41) and at most 128 registers a thread let two blocks run on an SM; that hides barriers.

// One sample's windows and regions. Passed by value, so that a launch copies no table: it can be captured in a graph.
template <typename Real>
struct Sample {
    int radius[3];                   // z y x
    Region target, source;           // voxels to write; voxels that do not count as 0
    Real weight[3][MAX_RADIUS + 1];  // by distance from the middle: a window is symmetric
};

template <typename Real>
constexpr int SAMPLES = sizeof(Real) == 4 ? 16 : 8;  // of one launch: parameters are limited to 4 KiB

template <typename Real>
struct Samples {
    Sample<Real> of[SAMPLES<Real>];
};

template <typename Real>
constexpr int ROWS = sizeof(Real) == 4 ? 4 : 2;  // neighbours along y that one thread owns

// `call` with R as the radius: unrolled, so that windows stay in registers.
#define WITH_RADIUS(radius, call) \
    switch (radius) {             \
        CASE(0, call)             \
        CASE(1, call)             \
        CASE(2, call)             \
        CASE(3, call)             \
        CASE(4, call)             \
        CASE(5, call)             \
        CASE(6, call)             \
        CASE(7, call)             \
        CASE(8, call)             \
    }
#define CASE(number, call)          \
    case number: {                  \
        constexpr int R = number;   \
        call;                       \
        break;                      \
    }

// Sums of COUNT neighbouring windows over values `pitch` apart.
template <int R, int COUNT, typename Real>
__device__ void sum_windows(Real (&sums)[COUNT], const Real* values, int pitch, const Real (&weight)[MAX_RADIUS + 1]) {
    Real seen[COUNT + 2 * R];
#pragma unroll
    for (int i = 0; i < COUNT + 2 * R; ++i) seen[i] = values[i * pitch];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        sums[k] = weight[R] * seen[k];  // not 0 + ...: a window of one must return -0 as -0
#pragma unroll
        for (int tap = 1; tap <= 2 * R; ++tap) sums[k] += weight[tap < R ? R - tap : tap - R] * seen[k + tap];
    }
}

// Takes the next plane's values into the sums under way, of which sums[k][t] has t taps; gives the ones they complete.
template <int R, int COUNT, typename Real>
__device__ void take_plane(Real (&sums)[COUNT][2 * MAX_RADIUS + 1], Real (&values)[COUNT],
                           const Real (&weight)[MAX_RADIUS + 1]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        Real product[R + 1];
#pragma unroll
        for (int distance = 0; distance <= R; ++distance) product[distance] = weight[distance] * values[k];
        values[k] = R == 0 ? product[0] : sums[k][2 * R] + product[R];
#pragma unroll
        for (int taps = 2 * R - 1; taps >= 1; --taps) {
            sums[k][taps + 1] = sums[k][taps] + product[taps < R ? R - taps : taps - R];
        }
        sums[k][1] = product[R];
    }
}

// boxes, sources: tables on the device that stand in for the regions of `samples`, or null. tiles: of the largest
// target along x and y; depth: planes that a block writes. Blocks are numbered
// ((sample * chunks + chunk) * tiles_y + tile_y) * tiles_x + tile_x. output is not input: blocks read their
// neighbours' voxels.
template <typename Real, typename Stored>
__device__ void blur(Stored* __restrict__ output, const Stored* __restrict__ input, const Samples<Real>& samples,
                     const long long* boxes, const long long* sources, int first_sample, int nz, int ny, int nx,
                     int tiles_x, int tiles_y, int chunks, int depth) {
    constexpr int TILE_Y = WARPS * ROWS<Real>;
    constexpr int LOADED_ROWS = TILE_Y + 2 * MAX_RADIUS;
    __shared__ Real loaded[2][LOADED_ROWS][TILE_X + 2 * MAX_RADIUS + 1];
    __shared__ Real along_x[2][LOADED_ROWS][TILE_X + 1];
    __shared__ int source_row[LOADED_ROWS];  // start of a loaded row in its plane; -1 where it counts as 0

    const int shape[3] = {nz, ny, nx};
    int block = blockIdx.x;
    const int tile_x = block % tiles_x;
    block /= tiles_x;
    const int tile_y = block % tiles_y;
    block /= tiles_y;
    const int chunk = block % chunks;
    const Sample<Real>& sample = samples.of[block / chunks];
    const int index = first_sample + block / chunks;
    Region target = boxes == nullptr ? sample.target : region_of(boxes, index, shape);
    const Region source = sources == nullptr ? sample.source : region_of(sources, index, shape);
    keep_reached(target, source, sample.radius);

    const int z0 = target.first[0] + chunk * depth;
    const int y0 = target.first[1] + tile_y * TILE_Y;
    const int x0 = target.first[2] + tile_x * TILE_X;
    const int planes = target.last[0] - z0 < depth ? target.last[0] - z0 : depth;
    const int height = target.last[1] - y0 < TILE_Y ? target.last[1] - y0 : TILE_Y;
    const int width = target.last[2] - x0 < TILE_X ? target.last[2] - x0 : TILE_X;
    if (planes <= 0 || height <= 0 || width <= 0) return;  // the whole block, before any barrier

    const int rz = sample.radius[0], ry = sample.radius[1], rx = sample.radius[2];
    const int rows = height + 2 * ry, columns = width + 2 * rx;
    const int lane = threadIdx.x % TILE_X, warp = threadIdx.x / TILE_X;
    const long long sample_start = (long long)index * nz * ny * nx;  // 64 bit: a batch can pass 2^31 voxels

    if (threadIdx.x < rows) {
        const int y = reflected(y0 - ry + (int)threadIdx.x, ny);
        source_row[threadIdx.x] = source.first[1] <= y && y < source.last[1] ? y * nx : -1;
    }
    int source_column[2];  // of the two columns that this thread loads; -1 where they count as 0
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int x = reflected(x0 - rx + lane + i * TILE_X, nx);
        source_column[i] = source.first[2] <= x && x < source.last[2] ? x : -1;
    }
    __syncthreads();

    constexpr int LOADS = LOADED_ROWS / WARPS;
    Real arriving[LOADS][2];
    auto fetch = [&](int plane) {
        const int z = reflected(z0 - rz + plane, nz);
        const bool counts = source.first[0] <= z && z < source.last[0];
        const Stored* const from = input + sample_start + (long long)z * ny * nx;
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int row = warp + k * WARPS;
            const int start = counts && row < rows ? source_row[row] : -1;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool wanted = start >= 0 && source_column[i] >= 0 && lane + i * TILE_X < columns;
                arriving[k][i] = wanted ? widened(from[start + source_column[i]]) : (Real)0;
            }
        }
    };
    auto put = [&](int buffer) {
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int row = warp + k * WARPS;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (row < rows && lane + i * TILE_X < columns) loaded[buffer][row][lane + i * TILE_X] = arriving[k][i];
            }
        }
    };

    fetch(0);
    put(0);
    __syncthreads();
    Real under_way[ROWS<Real>][2 * MAX_RADIUS + 1] = {};
    for (int plane = 0; plane < planes + 2 * rz; ++plane) {
        const int buffer = plane & 1;
        const bool more = plane + 1 < planes + 2 * rz;
        if (more) fetch(plane + 1);
        for (int item = threadIdx.x; item < rows * (TILE_X / SEGMENT); item += WARPS * TILE_X) {
            const int row = item / (TILE_X / SEGMENT), column = item % (TILE_X / SEGMENT) * SEGMENT;
            if (column >= width) continue;
            Real sums[SEGMENT];
            WITH_RADIUS(rx, (sum_windows<R>(sums, &loaded[buffer][row][column], 1, sample.weight[2])))
#pragma unroll
            for (int i = 0; i < SEGMENT; ++i) along_x[buffer][row][column + i] = sums[i];
        }
        if (more) put(1 - buffer);
        __syncthreads();
        if (warp * ROWS<Real> >= height) continue;  // no voxel of this warp's; it still meets the barrier above

        Real values[ROWS<Real>];
        WITH_RADIUS(ry, (sum_windows<R>(values, &along_x[buffer][warp * ROWS<Real>][lane], TILE_X + 1,
                                        sample.weight[1])))
        WITH_RADIUS(rz, (take_plane<R>(under_way, values, sample.weight[0])))
        if (plane < 2 * rz || lane >= width) continue;
        Stored* const to = output + sample_start + (long long)(z0 + plane - 2 * rz) * ny * nx + x0 + lane;
#pragma unroll
        for (int k = 0; k < ROWS<Real>; ++k) {
            const int row = warp * ROWS<Real> + k;
            if (row < height) narrow(to[(long long)(y0 + row) * nx], values[k]);
        }
    }
}

extern "C" __global__ __launch_bounds__(256, 2) void blur_float32(
    float* output, const float* input, const __grid_constant__ Samples<float> samples, const long long* boxes,
    const long long* sources, int first_sample, int nz, int ny, int nx, int tiles_x, int tiles_y, int chunks, int depth) {
    blur(output, input, samples, boxes, sources, first_sample, nz, ny, nx, tiles_x, tiles_y, chunks, depth);
}

extern "C" __global__ __launch_bounds__(256, 2) void blur_float64(
    double* output, const double* input, const __grid_constant__ Samples<double> samples, const long long* boxes,
    const long long* sources, int first_sample, int nz, int ny, int nx, int tiles_x, int tiles_y, int chunks, int depth) {
    blur(output, input, samples, boxes, sources, first_sample, nz, ny, nx, tiles_x, tiles_y, chunks, depth);
}

extern "C" __global__ __launch_bounds__(256, 2) void blur_float16(
    Float16* output, const Float16* input, const __grid_constant__ Samples<float> samples, const long long* boxes,
    const long long* sources, int first_sample, int nz, int ny, int nx, int tiles_x, int tiles_y, int chunks, int depth) {
    blur(output, input, samples, boxes, sources, first_sample, nz, ny, nx, tiles_x, tiles_y, chunks, depth);
}

extern "C" __global__ __launch_bounds__(256, 2) void blur_bfloat16(
    BFloat16* output, const BFloat16* input, const __grid_constant__ Samples<float> samples, const long long* boxes,
    const long long* sources, int first_sample, int nz, int ny, int nx, int tiles_x, int tiles_y, int chunks, int depth) {
    blur(output, input, samples, boxes, sources, first_sample, nz, ny, nx, tiles_x, tiles_y, chunks, depth);
}

// ---- one axis, windows of any radius ----
//
// A block takes neighbouring lines along the axis into shared memory, continued over both ends, then writes their
// weighted sums. It has read all it needs before it writes and blocks share no line, so output may be input. One
// barrier; a block leaves early only as a whole.

// First voxel of a line, seen from its sample: lines are numbered in memory order.
__device__ long long line_start(int line, int stride, int length) {
    return (long long)(line / stride) * stride * length + line % stride;
}

// axis: 0 to 2 for z to x. weights: [sample][width], the first 2 * radius + 1 of each row in use; radii: [3][batch];
// boxes, sources: tables on the device, or null for the whole volume; cut: 1 where voxels outside `sources` count as 0,
// which is so in the first launch. Written is the box, grown along the axes that are still to come by their windows.
// stride: between neighbours on a line; lines: per sample, which 32 bits hold since the launcher limits each axis.
// Blocks are numbered sample * ceil(lines / lines_per_block) + group. Dynamic shared memory:
// [length + 2 * largest radius][lines_per_block | 1] values.
template <typename Real, typename To, typename From>
__device__ void blur_axis(To* output, const From* input, const Real* weights, const int* radii,
                          const long long* boxes, const long long* sources, int cut, int axis, int batch, int width,
                          int nz, int ny, int nx, int stride, int lines, int lines_per_block) {
    extern __shared__ double shared_memory[];
    Real* const tile = (Real*)shared_memory;
    const int pitch = lines_per_block | 1;  // odd: neither direction through the tile meets a bank conflict
    const int groups = (lines + lines_per_block - 1) / lines_per_block;
    const int sample = blockIdx.x / groups;
    const int first_line = blockIdx.x % groups * lines_per_block;
    const int lines_here = lines - first_line < lines_per_block ? lines - first_line : lines_per_block;

    const int shape[3] = {nz, ny, nx};
    const int length = shape[axis];
    const int radius_zyx[3] = {radii[sample], radii[batch + sample], radii[2 * batch + sample]};
    const int radius = radius_zyx[axis];
    const Region volume = {{0, 0, 0}, {nz, ny, nx}};
    Region target = boxes == nullptr ? volume : region_of(boxes, sample, shape);
    const Region source = sources == nullptr ? volume : region_of(sources, sample, shape);
    keep_reached(target, source, radius_zyx);
    for (int other = 0; other < 3; ++other) {
        if (target.first[other] >= target.last[other]) return;
    }
    for (int later = 0; later < axis; ++later) {
        const int first = target.first[later] - radius_zyx[later], last = target.last[later] + radius_zyx[later];
        target.first[later] = first < 0 ? 0 : first;
        target.last[later] = last < shape[later] ? last : shape[later];
    }

    // a line's place on the two axes across it, the slower one first
    const int slow = axis == 0 ? 1 : 0, fast = axis == 2 ? 1 : 2;
    const int per_row = shape[fast];
    const int first_row = first_line / per_row, last_row = (first_line + lines_here - 1) / per_row;
    if (last_row < target.first[slow] || first_row >= target.last[slow]) return;
    const int begin = target.first[axis], num_written = target.last[axis] - target.first[axis];
    const int padded = num_written + 2 * radius;
    const Real* const weight = weights + (long long)sample * width;
    const long long sample_start = (long long)sample * lines * length;  // 64 bit: a batch can pass 2^31 voxels
    auto within = [&](const Region& region, int line) {
        const int row = line / per_row, place = line % per_row;
        return region.first[slow] <= row && row < region.last[slow] && region.first[fast] <= place &&
               place < region.last[fast];
    };

    // neighbouring threads take neighbouring addresses: along the line on the x axis, across the lines on the others
#pragma unroll 1
    for (int item = threadIdx.x; item < padded * lines_here; item += blockDim.x) {
        const int position = stride == 1 ? item % padded : item / lines_here;
        const int line = stride == 1 ? item / padded : item % lines_here;
        if (!within(target, first_line + line)) continue;
        const int from = reflected(begin + position - radius, length);
        const bool counts = !cut || (within(source, first_line + line) && source.first[axis] <= from &&
                                     from < source.last[axis]);
        const long long start = sample_start + line_start(first_line + line, stride, length);
        tile[position * pitch + line] = counts ? (Real)widened(input[start + (long long)from * stride]) : (Real)0;
    }
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < num_written * lines_here; item += blockDim.x) {
        const int position = stride == 1 ? item % num_written : item / lines_here;
        const int line = stride == 1 ? item / num_written : item % lines_here;
        if (!within(target, first_line + line)) continue;
        Real sum = weight[0] * tile[position * pitch + line];  // not 0 + ...: a window of one must return -0 as -0
        for (int tap = 1; tap <= 2 * radius; ++tap) sum += weight[tap] * tile[(position + tap) * pitch + line];
        const long long start = sample_start + line_start(first_line + line, stride, length);
        narrow(output[start + (long long)(begin + position) * stride], sum);
    }
}

extern "C" __global__ void blur_axis_float32_float32(
    float* output, const float* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_float64_float64(
    double* output, const double* input, const double* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_float16_float32(
    float* output, const Float16* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_float32_float16(
    Float16* output, const float* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_float16_float16(
    Float16* output, const Float16* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_bfloat16_float32(
    float* output, const BFloat16* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_float32_bfloat16(
    BFloat16* output, const float* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}

extern "C" __global__ void blur_axis_bfloat16_bfloat16(
    BFloat16* output, const BFloat16* input, const float* weights, const int* radii, const long long* boxes,
    const long long* sources, int cut, int axis, int batch, int width, int nz, int ny, int nx, int stride, int lines,
    int lines_per_block) {
    blur_axis(output, input, weights, radii, boxes, sources, cut, axis, batch, width, nz, ny, nx, stride, lines,
              lines_per_block);
}
