// A patch from a read of the store in one pass: crop, transpose of y and x, flips, window to [0, 1], scale and shift of
// the intensity. Every operation is rounded on its own (--fmad=false), in the order of the loader's DALI graph.
//
// A block makes tiles of 32 x 32 voxels of the result. Where a sample is transposed, a row of the tile is a column of
// the read: the tile goes through shared memory, so that the threads of a warp read and write neighbours.

constexpr int TILE = 32;  // the launcher's block is TILE x ROWS threads
constexpr int ROWS = 8;
constexpr int VOXELS = TILE / ROWS;  // of a thread in a tile

// An odd number of 4 byte words a row: the 32 threads that read a column meet 32 banks.
constexpr int HU_PITCH = TILE + 2;
constexpr int LABEL_PITCH = TILE + 4;

// ---- the result's dtype; values are in [0, 1], -0 or NaN ----

__device__ unsigned bits_of(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

struct AsFloat32 {
    typedef float Stored;
    __device__ static float rounded(float value) { return value; }
};

struct AsBFloat16 {
    typedef unsigned short Stored;
    __device__ static unsigned short rounded(float value) {
        if (value != value) return 0x7fc0;
        const unsigned bits = bits_of(value);
        return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
    }
};

struct AsFloat16 {
    typedef unsigned short Stored;
    __device__ static unsigned short rounded(float value) {
        if (value != value) return 0x7e00;
        const unsigned bits = bits_of(value);
        // below 2^-14 steps are 2^-24, as in float32 between 1/2 and 1: there the sum rounds as float16 would
        if (value < 6.103515625e-05f) {
            return (unsigned short)((bits >> 16 & 0x8000) + (bits_of(value + 0.5f) - 0x3f000000));
        }
        return (unsigned short)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
    }
};

__device__ float clipped(float value) { return value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value; }

// The nearest place at which a crop lies inside: what the host gave is inside, what lay on the device is not known.
__device__ long long inside(long long origin, long long room) {
    return origin < 0 ? 0 : origin > room ? room : origin;
}

// to_*: [batch][nz][ny][nx]. from_*: [batch][read_z][read_y][read_x]. A sample each: origin [3], transpose, flip [3],
// scale, shift; a null pointer is 0, no, no, 1 or 0. Blocks: tiles of a plane, z, sample. 64 bit: a batch can pass 2^31
// voxels.
template <typename Dtype>
__device__ void prepare(typename Dtype::Stored* to_image, unsigned char* to_label, const short* from_image,
                        const unsigned char* from_label, const long long* origin, const unsigned char* transpose,
                        const unsigned char* flip, const float* scale, const float* shift, float low_hu,
                        float per_hu, long long batch, long long nz, long long ny, long long nx, long long read_z,
                        long long read_y, long long read_x) {
    __shared__ short hu_tile[TILE * HU_PITCH];
    __shared__ unsigned char label_tile[TILE * LABEL_PITCH];
    const unsigned tiles_x = (unsigned)((nx + TILE - 1) / TILE);
    const long long tile_y = (long long)(blockIdx.x / tiles_x) * TILE;
    const long long tile_x = (long long)(blockIdx.x % tiles_x) * TILE;
    const int column = threadIdx.x, first_row = threadIdx.y;

    for (long long b = blockIdx.z; b < batch; b += gridDim.z) {
        const bool turned = transpose != nullptr && transpose[b] != 0;
        const bool flip_z = flip != nullptr && flip[3 * b] != 0;
        const bool flip_y = flip != nullptr && flip[3 * b + 1] != 0;
        const bool flip_x = flip != nullptr && flip[3 * b + 2] != 0;
        const float factor = scale == nullptr ? 1.0f : scale[b], offset = shift == nullptr ? 0.0f : shift[b];
        long long corner_z = 0, corner_y = 0, corner_x = 0;
        if (origin != nullptr) {
            corner_z = inside(origin[3 * b], read_z - nz);
            corner_y = inside(origin[3 * b + 1], read_y - (turned ? nx : ny));
            corner_x = inside(origin[3 * b + 2], read_x - (turned ? ny : nx));
        }
        // in the read, a step along y and along x of the result, and where these begin
        long long step_y = turned ? 1 : read_x, step_x = turned ? read_x : 1;
        long long start = corner_y * read_x + corner_x;
        if (flip_y) {
            start += (ny - 1) * step_y;
            step_y = -step_y;
        }
        if (flip_x) {
            start += (nx - 1) * step_x;
            step_x = -step_x;
        }

        for (long long z = blockIdx.y; z < nz; z += gridDim.y) {
            const long long plane = (b * read_z + corner_z + (flip_z ? nz - 1 - z : z)) * read_y * read_x;
            short hu[VOXELS] = {};
            unsigned char label[VOXELS] = {};
            for (int k = 0; k < VOXELS; ++k) {  // the threads of a warp along x of the read, forth or back
                const int row = first_row + k * ROWS;
                const long long y = tile_y + (turned ? column : row), x = tile_x + (turned ? row : column);
                if (y >= ny || x >= nx) continue;
                const long long from = plane + start + y * step_y + x * step_x;
                hu[k] = from_image[from];
                label[k] = from_label[from];
            }
            if (turned) {
                __syncthreads();  // the tile before this one is used up
                for (int k = 0; k < VOXELS; ++k) {
                    hu_tile[(first_row + k * ROWS) * HU_PITCH + column] = hu[k];
                    label_tile[(first_row + k * ROWS) * LABEL_PITCH + column] = label[k];
                }
                __syncthreads();
                for (int k = 0; k < VOXELS; ++k) {
                    hu[k] = hu_tile[column * HU_PITCH + first_row + k * ROWS];
                    label[k] = label_tile[column * LABEL_PITCH + first_row + k * ROWS];
                }
            }
            for (int k = 0; k < VOXELS; ++k) {
                const long long y = tile_y + first_row + k * ROWS, x = tile_x + column;
                if (y >= ny || x >= nx) continue;
                const long long to = ((b * nz + z) * ny + y) * nx + x;
                const float unit = clipped(((float)hu[k] - low_hu) * per_hu);
                to_image[to] = Dtype::rounded(clipped(unit * factor + offset));
                to_label[to] = label[k];
            }
        }
    }
}

extern "C" __global__ void prepare_patch_float32(float* to_image, unsigned char* to_label,
                                                 const short* from_image, const unsigned char* from_label,
                                                 const long long* origin, const unsigned char* transpose,
                                                 const unsigned char* flip, const float* scale, const float* shift,
                                                 float low_hu, float per_hu, long long batch, long long nz,
                                                 long long ny, long long nx, long long read_z, long long read_y,
                                                 long long read_x) {
    prepare<AsFloat32>(to_image, to_label, from_image, from_label, origin, transpose, flip, scale, shift, low_hu,
                       per_hu, batch, nz, ny, nx, read_z, read_y, read_x);
}

extern "C" __global__ void prepare_patch_float16(unsigned short* to_image, unsigned char* to_label,
                                                 const short* from_image, const unsigned char* from_label,
                                                 const long long* origin, const unsigned char* transpose,
                                                 const unsigned char* flip, const float* scale, const float* shift,
                                                 float low_hu, float per_hu, long long batch, long long nz,
                                                 long long ny, long long nx, long long read_z, long long read_y,
                                                 long long read_x) {
    prepare<AsFloat16>(to_image, to_label, from_image, from_label, origin, transpose, flip, scale, shift, low_hu,
                       per_hu, batch, nz, ny, nx, read_z, read_y, read_x);
}

extern "C" __global__ void prepare_patch_bfloat16(unsigned short* to_image, unsigned char* to_label,
                                                  const short* from_image, const unsigned char* from_label,
                                                  const long long* origin, const unsigned char* transpose,
                                                  const unsigned char* flip, const float* scale, const float* shift,
                                                  float low_hu, float per_hu, long long batch, long long nz,
                                                  long long ny, long long nx, long long read_z, long long read_y,
                                                  long long read_x) {
    prepare<AsBFloat16>(to_image, to_label, from_image, from_label, origin, transpose, flip, scale, shift, low_hu,
                        per_hu, batch, nz, ny, nx, read_z, read_y, read_x);
}
