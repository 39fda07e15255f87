// FreeTumor's Eq. 1, (1 - M) x + M (x - tanh(g) texture) = x - M tanh(g) texture, and its gradients.
//
// Where the mask is 0 nothing else is read: x passes as it is, whatever g and texture hold there (0 * NaN would not
// be 0).

__device__ float as_float(float mask) { return mask; }
__device__ float as_float(unsigned char mask) { return (float)mask; }

// out may be any of the inputs: a thread reads its voxel before it writes it.
template <typename Mask>
__device__ void blend(float* out, const float* x, const float* g, const float* texture, const Mask* mask,
                      long long num_voxels) {
    const long long step = (long long)gridDim.x * blockDim.x;  // 64 bit: a batch can pass 2^31 voxels
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const float m = as_float(mask[i]);
        out[i] = m == 0.0f ? x[i] : x[i] - m * (tanhf(g[i]) * texture[i]);
    }
}

// Gradients of g and texture for the gradient of the result; a null pointer leaves that one out. That of x is the
// gradient itself.
template <typename Mask>
__device__ void blend_backward(float* grad_g, float* grad_texture, const float* grad_out, const float* g,
                               const float* texture, const Mask* mask, long long num_voxels) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < num_voxels; i += step) {
        const float m = as_float(mask[i]);
        float to_g = 0.0f, to_texture = 0.0f;
        if (m != 0.0f) {
            const float contrast = tanhf(g[i]);
            const float common = -m * grad_out[i];
            to_g = common * texture[i] * (1.0f - contrast * contrast);
            to_texture = common * contrast;
        }
        if (grad_g != nullptr) grad_g[i] = to_g;
        if (grad_texture != nullptr) grad_texture[i] = to_texture;
    }
}

extern "C" __global__ void blend_float32(float* out, const float* x, const float* g, const float* texture,
                                         const float* mask, long long num_voxels) {
    blend(out, x, g, texture, mask, num_voxels);
}

extern "C" __global__ void blend_uint8(float* out, const float* x, const float* g, const float* texture,
                                       const unsigned char* mask, long long num_voxels) {
    blend(out, x, g, texture, mask, num_voxels);
}

extern "C" __global__ void blend_backward_float32(float* grad_g, float* grad_texture, const float* grad_out,
                                                  const float* g, const float* texture, const float* mask,
                                                  long long num_voxels) {
    blend_backward(grad_g, grad_texture, grad_out, g, texture, mask, num_voxels);
}

extern "C" __global__ void blend_backward_uint8(float* grad_g, float* grad_texture, const float* grad_out,
                                                const float* g, const float* texture, const unsigned char* mask,
                                                long long num_voxels) {
    blend_backward(grad_g, grad_texture, grad_out, g, texture, mask, num_voxels);
}
