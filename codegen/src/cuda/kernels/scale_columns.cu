// scale_columns: w[r, c] *= by[c] in place, in f32, rounded to the element type.
// Called by: loading, for norms' gammas that move into the weights after them (lathe-runtime, once).
//
// Defines: none.
// Parameters: see the entry. w [rows, cols] row-major, by [cols], dtype 0 = f32, 1 = bf16, 2 = f16.
// Geometry: any 1-D grid, block 256, smem 0; a block takes rows in turn.
// Why: in place, so that no weight lies in memory twice.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ float bf16_to_float(u32 b) { return __uint_as_float(b << 16); }

// Both products of two packed bf16 values, rounded to nearest even.
__device__ __forceinline__ u32 product2(u32 a, u32 b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
        : "=r"(r)
        : "f"(bf16_to_float(a >> 16) * bf16_to_float(b >> 16)),
          "f"(bf16_to_float(a & 0xffffu) * bf16_to_float(b & 0xffffu)));
    return r;
}

extern "C" __global__ void __launch_bounds__(256) scale_columns(char* w, const char* by, u32 dtype, u32 rows, u32 cols)
{
    for (u32 r = blockIdx.x; r < rows; r += gridDim.x) {
        const u64 row = (u64)r * cols;
        if (dtype == 0) {
            for (u32 c = threadIdx.x; c < cols; c += 256) ((float*)w)[row + c] *= ((const float*)by)[c];
        } else if (dtype == 1 && cols % 8 == 0) {
            for (u32 c = threadIdx.x; c < cols / 8; c += 256) {
                uint4* at = (uint4*)w + row / 8 + c;
                uint4 v = *at, g = ((const uint4*)by)[c];
                *at = make_uint4(product2(v.x, g.x), product2(v.y, g.y), product2(v.z, g.z), product2(v.w, g.w));
            }
        } else {
            for (u32 c = threadIdx.x; c < cols; c += 256) {
                u16* at = (u16*)w + row + c;
                const u16 g = ((const u16*)by)[c];
                *at = dtype == 1 ? (u16)product2(*at, g) : float_to_half(half_to_float(*at) * half_to_float(g));
            }
        }
    }
}
