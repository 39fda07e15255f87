// Warped ellipsoids, one or several per sample: every voxel of a tumour's box looks backwards through the three warps
// and tests the ellipsoid.
//
// The released code warps a canvas three times; nearest-neighbour lookups compose, so one lookup per voxel gives the
// same mask. All arithmetic is float64, in the order of the CPU path and compiled without fused multiply-add: IEEE
// rounding then makes both paths decide every voxel alike, also on the ellipsoid's surface.
//
// A warp is constant along an axis, so its lookups are made once for each voxel of its plane, by the first launch, and
// not once for each voxel of the box: about 100 float64 operations for each of 3 n^2 entries and one addition for each
// of n^3 voxels. A tumour of radius 32 (n = 128) takes 5 million operations in place of 300 million: about 10
// microseconds in place of half a millisecond (reckoned, not measured) where one float64 unit serves 64 of float32.

constexpr int THREADS = 256;       // the launcher's block
constexpr double NOWHERE = 1e300;  // a level: outside, whatever is added

// One tumour; axes in the order x, y, z of the mask law, lengths in voxels. Tables, null for a box that is too large:
//   level_z  [y][z] and row_y [y][z]: plane (1, 2) looked through; what the voxel found adds to the level, and its y
//   level_xy [y][x]: plane (0, 1) looked through; what the voxel found adds to the level
//   last     [z][x]: plane (0, 2) looked through; x + 2^16 z of the voxel found, or -1
struct Tumor {
    int size[3];                     // of the box, even, at most 2^14
    const double* radius_zyx;
    const double (*warp)[2][3][3];   // [plane][component][node on the plane's first axis][node on its second]
    double *level_z, *level_xy;
    int *last, *row_y;
};

__device__ Tumor tumor_number(long long number, const double* radii_zyx, const double* warps, const long long* starts,
                              long long* scratch) {
    Tumor tumor;
    tumor.radius_zyx = radii_zyx + 3 * number;
    tumor.warp = reinterpret_cast<const double(*)[2][3][3]>(warps + 54 * number);
    for (int axis = 0; axis < 3; ++axis) tumor.size[axis] = 2 * (int)ceil(2.0 * tumor.radius_zyx[2 - axis]);
    tumor.level_z = tumor.level_xy = nullptr;
    tumor.last = tumor.row_y = nullptr;
    if (starts[number] >= 0) {
        const long long x = tumor.size[0], y = tumor.size[1], z = tumor.size[2];
        tumor.level_z = reinterpret_cast<double*>(scratch + starts[number]);
        tumor.level_xy = tumor.level_z + y * z;
        tumor.last = reinterpret_cast<int*>(tumor.level_xy + y * x);
        tumor.row_y = tumor.last + z * x;
    }
    return tumor;
}

// Weights of the three nodes, at positions 0, 1 and 2, in the cubic spline through them with mirrored ends (slope 0
// there; slope 3/4 (third - first) at the middle node); the box's voxels are spread evenly over 0..2.
__device__ void spline_weights(double index, double size, double weight[3]) {
    const double position = 2.0 * index / (size - 1.0);
    const bool first_half = position <= 1.0;
    const double s = first_half ? position : position - 1.0;
    const double square = s * s, cube = square * s;
    const double rise = 3.0 * square - 2.0 * cube;
    const double fall = 1.0 - rise;
    if (first_half) {
        const double slope = 0.75 * (cube - square);
        weight[0] = fall - slope;
        weight[1] = rise;
        weight[2] = slope;
    } else {
        const double slope = 0.75 * (cube - 2.0 * square + s);
        weight[0] = -slope;
        weight[1] = fall;
        weight[2] = rise + slope;
    }
}

__device__ double displacement(const double node[3][3], const double a[3], const double b[3]) {
    double column[3];
    for (int j = 0; j < 3; ++j) column[j] = a[0] * node[0][j] + a[1] * node[1][j] + a[2] * node[2][j];
    return column[0] * b[0] + column[1] * b[1] + column[2] * b[2];
}

// Replace (a, b), a voxel in one plane of the box, by the voxel that its warp takes the value from; false where that
// lies outside the box (also for a displacement that is not a number).
__device__ bool look_through(const double warp[2][3][3], int size_a, int size_b, int& a, int& b) {
    double weight_a[3], weight_b[3];
    spline_weights((double)a, (double)size_a, weight_a);
    spline_weights((double)b, (double)size_b, weight_b);
    const double source_a = (double)a + displacement(warp[0], weight_a, weight_b);
    const double source_b = (double)b + displacement(warp[1], weight_a, weight_b);
    if (!(source_a >= 0.0 && source_a <= size_a - 1.0 && source_b >= 0.0 && source_b <= size_b - 1.0)) return false;
    a = (int)(source_a + 0.5);
    b = (int)(source_b + 0.5);
    return true;
}

// ((index - center) / radius)^2 with the released rounding: the coordinate counts steps of 1 / radius from the radius
// rounded up (from -1 for a whole radius), which is not always the rounded quotient.
__device__ double squared_coordinate(int index, int size, double radius) {
    const double reach = ceil(radius);
    const double coordinate = ((double)index - size / 2.0 + reach) * (1.0 / radius) - reach / radius;
    return coordinate * coordinate;
}

__device__ double level_of_z(const Tumor& tumor, int z) {
    return squared_coordinate(z, tumor.size[2], tumor.radius_zyx[0]);
}

__device__ double level_of_xy(const Tumor& tumor, int x, int y) {
    return squared_coordinate(x, tumor.size[0], tumor.radius_zyx[2]) +
           squared_coordinate(y, tumor.size[1], tumor.radius_zyx[1]);
}

__device__ bool is_inside(const Tumor& tumor, int x, int y, int z) {
    const int* const size = tumor.size;
    if (tumor.last != nullptr) {
        const int found = tumor.last[z * size[0] + x];
        if (found < 0) return false;
        const int row = y * size[2] + (found >> 16);
        const double level_z = tumor.level_z[row];
        return level_z < 1.0 && tumor.level_xy[tumor.row_y[row] * size[0] + (found & 0xffff)] + level_z < 1.0;
    }
    if (!look_through(tumor.warp[2], size[0], size[2], x, z)) return false;  // plane (0, 2) was warped last
    if (!look_through(tumor.warp[1], size[1], size[2], y, z)) return false;
    if (!look_through(tumor.warp[0], size[0], size[1], x, y)) return false;
    return level_of_xy(tumor, x, y) + level_of_z(tumor, z) < 1.0;
}

__device__ void make_entry(const Tumor& tumor, int entry) {
    const int* const size = tumor.size;
    const int num_last = size[2] * size[0], num_rows = size[1] * size[2];
    if (entry < num_last) {
        int x = entry % size[0], z = entry / size[0];
        const bool found = look_through(tumor.warp[2], size[0], size[2], x, z);
        tumor.last[entry] = found ? x + (z << 16) : -1;
    } else if (entry < num_last + num_rows) {
        const int row = entry - num_last;
        int y = row / size[2], z = row % size[2];
        const bool found = look_through(tumor.warp[1], size[1], size[2], y, z);
        tumor.row_y[row] = found ? y : 0;
        tumor.level_z[row] = found ? level_of_z(tumor, z) : NOWHERE;
    } else {
        const int column = entry - num_last - num_rows;
        int x = column % size[0], y = column / size[0];
        const bool found = look_through(tumor.warp[0], size[0], size[1], x, y);
        tumor.level_xy[column] = found ? level_of_xy(tumor, x, y) : NOWHERE;
    }
}

// Bytes to 0, eight at a time but for the ends.
__device__ void clear(unsigned char* bytes, long long count, long long thread, long long num_threads) {
    const long long to_aligned = (long long)((8 - (unsigned long long)bytes % 8) % 8);
    const long long head = to_aligned < count ? to_aligned : count;
    const long long num_words = (count - head) / 8, tail = head + 8 * num_words;
    unsigned long long* const words = reinterpret_cast<unsigned long long*>(bytes + head);
    for (long long i = thread; i < num_words; i += num_threads) words[i] = 0;
    for (long long i = thread; i < head; i += num_threads) bytes[i] = 0;
    for (long long i = tail + thread; i < count; i += num_threads) bytes[i] = 0;
}

// mask: [num_samples][nz][ny][nx], set to 0. box: [sample][first, behind the last][z y x], set to what any voxel
// changes. scratch: a counter for each sample, set to 0, and behind them the tables, where ``starts`` says (-1: none).
// The first ``clearing`` blocks clear, the others make tables, ``blocks_per_tumor`` for each tumour.
extern "C" __global__ void clear_and_tabulate(unsigned char* mask, long long* box, long long* scratch,
                                              const long long* starts, const double* radii_zyx, const double* warps,
                                              long long num_samples, long long nz, long long ny, long long nx,
                                              long long num_tumors, int clearing, int blocks_per_tumor) {
    if (blockIdx.x < clearing) {
        const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x;
        const long long num_threads = clearing * (long long)THREADS;
        clear(mask, num_samples * nz * ny * nx, thread, num_threads);
        for (long long i = thread; i < 6 * num_samples; i += num_threads) {
            const long long shape[3] = {nz, ny, nx};
            box[i] = i % 6 < 3 ? shape[i % 3] : 0;
        }
        for (long long i = thread; i < num_samples; i += num_threads) scratch[i] = 0;
        return;
    }
    const long long num_blocks = num_tumors * blocks_per_tumor;
    for (long long block = blockIdx.x - clearing; block < num_blocks; block += gridDim.x - clearing) {
        const long long number = block / blocks_per_tumor;
        if (starts[number] < 0) continue;
        const Tumor tumor = tumor_number(number, radii_zyx, warps, starts, scratch);
        const int* const size = tumor.size;
        const int entry = (int)(block % blocks_per_tumor) * THREADS + threadIdx.x;
        if (entry < size[2] * size[0] + size[1] * size[2] + size[1] * size[0]) make_entry(tumor, entry);
    }
}

// mask: all 0 before; organ: the same shape, or null. Blocks along x share the voxels of a box, blocks along y the
// tumours. The block that is the last of its sample closes the sample's box.
extern "C" __global__ void paint(unsigned char* mask, long long* box, long long* scratch, const unsigned char* organ,
                                 const long long* starts, const long long* centers_zyx, const double* radii_zyx,
                                 const double* warps, long long num_samples, long long nz, long long ny, long long nx,
                                 long long tumors_per_sample) {
    __shared__ int low[3], high[3];  // z y x of what this block painted, seen from the box; high: behind the last
    const long long shape[3] = {nx, ny, nz}, far = 1LL << 40;
    const long long num_tumors = num_samples * tumors_per_sample;
    for (long long number = blockIdx.y; number < num_tumors; number += gridDim.y) {
        const Tumor tumor = tumor_number(number, radii_zyx, warps, starts, scratch);
        const long long sample = number / tumors_per_sample;
        long long start[3];      // of the box in the volume; may be negative
        int first[3], count[3];  // of its part inside the volume, seen from the box
        for (int axis = 0; axis < 3; ++axis) {
            const long long center = centers_zyx[3 * number + 2 - axis];
            start[axis] = (center < -far ? -far : center > far ? far : center) - tumor.size[axis] / 2;
            const long long size = tumor.size[axis], left = shape[axis] - start[axis];
            const long long from = start[axis] < 0 ? -start[axis] : 0, to = size < left ? size : left;
            first[axis] = from < to ? (int)from : 0;
            count[axis] = from < to ? (int)(to - from) : 0;
        }
        if (threadIdx.x < 3) {
            low[threadIdx.x] = 1 << 30;
            high[threadIdx.x] = 0;
        }
        __syncthreads();
        const long long num_voxels = (long long)count[0] * count[1] * count[2];  // 64 bit: it can pass 2^31
        const long long step = (long long)gridDim.x * THREADS;
        int from[3] = {1 << 30, 1 << 30, 1 << 30}, to[3] = {0, 0, 0};  // of this thread's voxels
        for (long long item = blockIdx.x * (long long)THREADS + threadIdx.x; item < num_voxels; item += step) {
            const int row = (int)(item / count[0]);  // one slow division of 64 bit, the rest are of 32
            const int x = first[0] + (int)(item - (long long)row * count[0]);
            const int y = first[1] + row % count[1];
            const int z = first[2] + row / count[1];
            if (!is_inside(tumor, x, y, z)) continue;
            const long long voxel = ((sample * nz + start[2] + z) * ny + start[1] + y) * nx + start[0] + x;
            if (organ != nullptr && organ[voxel] == 0) continue;
            mask[voxel] = 1;
            const int place[3] = {z, y, x};
            for (int axis = 0; axis < 3; ++axis) {
                from[axis] = min(from[axis], place[axis]);
                to[axis] = max(to[axis], place[axis] + 1);
            }
        }
        if (to[0] > 0) {
            for (int axis = 0; axis < 3; ++axis) {
                atomicMin(&low[axis], from[axis]);
                atomicMax(&high[axis], to[axis]);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            long long* const sample_box = box + 6 * sample;
            if (high[0] > 0) {
                for (int axis = 0; axis < 3; ++axis) {
                    atomicMin(&sample_box[axis], start[2 - axis] + low[axis]);
                    atomicMax(&sample_box[3 + axis], start[2 - axis] + high[axis]);
                }
            }
            __threadfence();
            unsigned long long* const counter = reinterpret_cast<unsigned long long*>(scratch + sample);
            const unsigned long long num_parts = gridDim.x * (unsigned long long)tumors_per_sample;
            if (atomicAdd(counter, 1ULL) == num_parts - 1) {
                __threadfence();
                if (atomicMax(&sample_box[3], 0LL) == 0) {  // read where the others wrote: nothing was painted
                    for (int axis = 0; axis < 3; ++axis) sample_box[axis] = 0;
                }
            }
        }
        __syncthreads();  // before the next tumour starts a box of its own
    }
}
