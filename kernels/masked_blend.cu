// FreeTumor's Eq. 1, (1 - M) x + M (x - tanh(g) texture) = x - M tanh(g) texture, its twin with plus, and the gradients.
//
// Where the mask is 0 nothing else is read: x passes as it is, whatever g and texture hold there (0 * NaN would not
// be 0), and nothing is loaded that is not needed.

__device__ float tanh_of(float g) { return tanhf(g); }
__device__ double tanh_of(double g) { return tanh(g); }

// The mask of voxel i, 0 outside the organ and outside the sample's box; both may be null, and are looked at only where
// the mask is not 0. box: [sample][first, behind the last][z y x], in any relation to the volume.
template <typename Mask>
__device__ Mask weight(Mask mask, long long i, const unsigned char* organ, const long long* box, long long nz, long long ny,
                       long long nx) {
    if (mask == 0 || (organ != nullptr && organ[i] == 0)) return 0;
    if (box == nullptr) return mask;
    const long long* const first = box + 6 * (i / (nx * ny * nz));
    const long long place[3] = {i / (nx * ny) % nz, i / nx % ny, i % nx};
    for (int axis = 0; axis < 3; ++axis) {
        if (place[axis] < first[axis] || place[axis] >= first[3 + axis]) return 0;
    }
    return mask;
}

// out may be any of the inputs: a thread reads its voxel before it writes it. sign: -1 as in Eq. 1, or 1.
template <typename Real, typename Mask>
__device__ void blend(Real* out, const Real* x, const Real* g, const Real* texture, const Mask* mask,
                      const unsigned char* organ, const long long* box, int sign, long long batch, long long nz,
                      long long ny, long long nx) {
    const long long num_voxels = batch * nz * ny * nx;  // 64 bit: a batch can pass 2^31 voxels
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const Real m = (Real)weight(mask[i], i, organ, box, nz, ny, nx);
        out[i] = m == 0 ? x[i] : x[i] + (Real)sign * (m * (tanh_of(g[i]) * texture[i]));
    }
}

// Gradients of g and texture for the gradient of the result; a null pointer leaves that one out. That of x is the
// gradient itself.
template <typename Real, typename Mask>
__device__ void blend_backward(Real* grad_g, Real* grad_texture, const Real* grad_out, const Real* g,
                               const Real* texture, const Mask* mask, const unsigned char* organ, const long long* box,
                               int sign, long long batch, long long nz, long long ny, long long nx) {
    const long long num_voxels = batch * nz * ny * nx;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const Real m = (Real)weight(mask[i], i, organ, box, nz, ny, nx);
        Real to_g = 0, to_texture = 0;
        if (m != 0) {
            const Real contrast = tanh_of(g[i]);
            const Real common = (Real)sign * m * grad_out[i];
            to_g = common * texture[i] * (1 - contrast * contrast);
            to_texture = common * contrast;
        }
        if (grad_g != nullptr) grad_g[i] = to_g;
        if (grad_texture != nullptr) grad_texture[i] = to_texture;
    }
}

extern "C" __global__ void blend_float32_float32(float* out, const float* x, const float* g, const float* texture,
                                                 const float* mask, const unsigned char* organ, const long long* box,
                                                 int sign, long long batch, long long nz, long long ny,
                                                 long long nx) {
    blend(out, x, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_float32_uint8(float* out, const float* x, const float* g, const float* texture,
                                               const unsigned char* mask, const unsigned char* organ,
                                               const long long* box, int sign, long long batch, long long nz,
                                               long long ny, long long nx) {
    blend(out, x, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_float64_float32(double* out, const double* x, const double* g, const double* texture,
                                                 const float* mask, const unsigned char* organ, const long long* box,
                                                 int sign, long long batch, long long nz, long long ny,
                                                 long long nx) {
    blend(out, x, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_float64_uint8(double* out, const double* x, const double* g, const double* texture,
                                               const unsigned char* mask, const unsigned char* organ,
                                               const long long* box, int sign, long long batch, long long nz,
                                               long long ny, long long nx) {
    blend(out, x, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_backward_float32_float32(float* grad_g, float* grad_texture, const float* grad_out,
                                                          const float* g, const float* texture, const float* mask,
                                                          const unsigned char* organ, const long long* box, int sign,
                                                          long long batch, long long nz, long long ny, long long nx) {
    blend_backward(grad_g, grad_texture, grad_out, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_backward_float32_uint8(float* grad_g, float* grad_texture, const float* grad_out,
                                                        const float* g, const float* texture,
                                                        const unsigned char* mask, const unsigned char* organ,
                                                        const long long* box, int sign, long long batch, long long nz,
                                                        long long ny, long long nx) {
    blend_backward(grad_g, grad_texture, grad_out, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_backward_float64_float32(double* grad_g, double* grad_texture,
                                                          const double* grad_out, const double* g,
                                                          const double* texture, const float* mask,
                                                          const unsigned char* organ, const long long* box, int sign,
                                                          long long batch, long long nz, long long ny, long long nx) {
    blend_backward(grad_g, grad_texture, grad_out, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}

extern "C" __global__ void blend_backward_float64_uint8(double* grad_g, double* grad_texture, const double* grad_out,
                                                        const double* g, const double* texture,
                                                        const unsigned char* mask, const unsigned char* organ,
                                                        const long long* box, int sign, long long batch, long long nz,
                                                        long long ny, long long nx) {
    blend_backward(grad_g, grad_texture, grad_out, g, texture, mask, organ, box, sign, batch, nz, ny, nx);
}
