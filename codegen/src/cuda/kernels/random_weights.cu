// random_weights: dst = random values of one segment of a packed weight, a function of the tensor's key and of the
// element's index in the checkpoint tensor.
// Called by: loading without a checkpoint (lathe-runtime, upload).
//
// Defines: none.
// Parameters: see the entry. dst [.., cols] row-major, dtype 0 = f32, 1 = bf16, 2 = f16. Element (r, c) of the segment
// has the index first + r * row_stride + c * col_stride and goes to row dst_row + perm(r). perm 0 = identity, 1 = the
// halves of heads of perm_arg rows alternate by 8, 2 = part perm_arg of two that alternate by 8.
// Geometry: any 1-D grid, block 256, smem 0; every thread fills chunks of 8 columns; rows * ceil(cols / 8) < 2^32.
// Why: the formula is that of lathe-runtime's weights/random.rs and must be repeated exactly.
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 permuted(u32 r, u32 perm, u32 arg) {
    if (perm == 1) {
        u32 head = r / arg, i = r % arg, half = arg / 2, upper = i >= half;
        i -= upper ? half : 0;
        return head * arg + 16 * (i / 8) + 8 * upper + i % 8;
    }
    return perm == 2 ? 16 * (r / 8) + 8 * arg + r % 8 : r;
}

// The upper 16 bits of the value rounded to bf16.
__device__ __forceinline__ u32 value_bits(u64 index, u32 k0, u32 k1, float mean, float amplitude) {
    u32 x = ((u32)index * 0x9E3779B1u) ^ ((u32)(index >> 32) * 0x85EBCA77u) ^ k0;
    x = ((x ^ (x >> 16)) * 0x7FEB352Du) ^ k1;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    float u = __fadd_rn(__fmul_rn((float)(x >> 8), 1.1920928955078125e-07f), -1.0f);
    u32 b = __float_as_uint(__fadd_rn(mean, __fmul_rn(amplitude, u)));
    return (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ u32 half_bits(u32 bf16) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(__uint_as_float(bf16 << 16)));
    return h;
}

extern "C" __global__ void __launch_bounds__(256) random_weights(
    char* dst, u32 dtype, u32 cols, u32 rows, u32 dst_row, u32 perm, u32 perm_arg,
    u64 first, u64 row_stride, u64 col_stride, u32 k0, u32 k1, float mean, float amplitude)
{
    u32 chunks = (cols + 7) / 8, total = rows * chunks, step = gridDim.x * blockDim.x;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        u32 r = i / chunks, c = 8 * (i % chunks);
        u32 v[8];
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
            v[j] = value_bits(first + r * row_stride + (c + j) * col_stride, k0, k1, mean, amplitude);
        u64 at = (u64)(dst_row + permuted(r, perm, perm_arg)) * cols + c;
        if (dtype == 0) {
            u32* out = (u32*)dst + at;
            if (cols % 8 == 0) {
                ((uint4*)out)[0] = make_uint4(v[0] << 16, v[1] << 16, v[2] << 16, v[3] << 16);
                ((uint4*)out)[1] = make_uint4(v[4] << 16, v[5] << 16, v[6] << 16, v[7] << 16);
            } else {
                for (u32 j = 0; j < 8 && c + j < cols; ++j) out[j] = v[j] << 16;
            }
        } else {
            if (dtype == 2)
#pragma unroll
                for (u32 j = 0; j < 8; ++j) v[j] = half_bits(v[j]);
            unsigned short* out = (unsigned short*)dst + at;
            if (cols % 8 == 0) {
                *(uint4*)out = make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
            } else {
                for (u32 j = 0; j < 8 && c + j < cols; ++j) out[j] = (unsigned short)v[j];
            }
        }
        // Guards the index against wrapping when the last step would pass 2^32.
        if (total - i <= step) break;
    }
}
