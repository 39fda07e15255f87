// Warped ellipsoids, one per sample: every voxel of a tumour's box looks backwards through the three warps and tests
// the ellipsoid.
//
// The released code warps a canvas three times; nearest-neighbour lookups compose, so one lookup per voxel gives the
// same mask. All arithmetic is float64, in the order of the CPU path and compiled without fused multiply-add: IEEE
// rounding then makes both paths decide every voxel alike, also on the ellipsoid's surface.

// Axes in the order x, y, z of the mask law; lengths in voxels.
struct Tumor {
    double start[3];         // of the box in the volume; may be negative
    double size[3];          // of the box
    double radius[3];
    double warp[3][2][3][3]; // [plane][component][node on the plane's first axis][node on its second]: displacements
};

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
__device__ bool look_through(const double warp[2][3][3], double size_a, double size_b, double& a, double& b) {
    double weight_a[3], weight_b[3];
    spline_weights(a, size_a, weight_a);
    spline_weights(b, size_b, weight_b);
    const double source_a = a + displacement(warp[0], weight_a, weight_b);
    const double source_b = b + displacement(warp[1], weight_a, weight_b);
    if (!(source_a >= 0.0 && source_a <= size_a - 1.0 && source_b >= 0.0 && source_b <= size_b - 1.0)) return false;
    a = floor(source_a + 0.5);
    b = floor(source_b + 0.5);
    return true;
}

// ((index - center) / radius)^2 with the released rounding: the coordinate counts steps of 1 / radius from the radius
// rounded up (from -1 for a whole radius), which is not always the rounded quotient.
__device__ double squared_coordinate(double index, double size, double radius) {
    const double reach = ceil(radius);
    const double coordinate = (index - size / 2.0 + reach) * (1.0 / radius) - reach / radius;
    return coordinate * coordinate;
}

__device__ bool is_inside(const Tumor& tumor, double x, double y, double z) {
    const double* const size = tumor.size;
    if (!look_through(tumor.warp[2], size[0], size[2], x, z)) return false;  // plane (0, 2) was warped last
    if (!look_through(tumor.warp[1], size[1], size[2], y, z)) return false;
    if (!look_through(tumor.warp[0], size[0], size[1], x, y)) return false;
    const double* const radius = tumor.radius;
    const double level_xy = squared_coordinate(x, size[0], radius[0]) + squared_coordinate(y, size[1], radius[1]);
    return level_xy + squared_coordinate(z, size[2], radius[2]) < 1.0;
}

// mask: [num_tumors][nz][ny][nx], all 0 before; organ: the same shape, or null. Blocks along x share the voxels of a
// box, blocks along y the tumours.
extern "C" __global__ void tumor_mask(unsigned char* mask, const Tumor* tumors, const unsigned char* organ,
                                      long long num_tumors, long long nz, long long ny, long long nx) {
    const long long shape[3] = {nx, ny, nz};
    for (long long sample = blockIdx.y; sample < num_tumors; sample += gridDim.y) {
        const Tumor& tumor = tumors[sample];
        long long start[3];      // of the box
        int first[3], count[3];  // of its part inside the volume, seen from the box; the launcher limits the box
        for (int axis = 0; axis < 3; ++axis) {
            start[axis] = (long long)tumor.start[axis];
            const long long size = (long long)tumor.size[axis], left = shape[axis] - start[axis];
            const long long low = start[axis] < 0 ? -start[axis] : 0, high = size < left ? size : left;
            first[axis] = low < high ? (int)low : 0;
            count[axis] = low < high ? (int)(high - low) : 0;
        }
        const long long num_voxels = (long long)count[0] * count[1] * count[2];  // 64 bit: it can pass 2^31
        const long long step = (long long)gridDim.x * blockDim.x;
        for (long long item = blockIdx.x * (long long)blockDim.x + threadIdx.x; item < num_voxels; item += step) {
            const int row = (int)(item / count[0]);  // one slow division of 64 bit, the rest are of 32
            const int x = first[0] + (int)(item - (long long)row * count[0]);
            const int y = first[1] + row % count[1];
            const int z = first[2] + row / count[1];
            const long long voxel = ((sample * nz + start[2] + z) * ny + start[1] + y) * nx + start[0] + x;
            if (organ != nullptr && organ[voxel] == 0) continue;
            if (is_inside(tumor, (double)x, (double)y, (double)z)) mask[voxel] = 1;
        }
    }
}
