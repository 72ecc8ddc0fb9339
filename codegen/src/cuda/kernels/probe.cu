// probe: the ceilings that measurements are compared with.
// Called by: `doctor` and benchmarks of kernels.
//
// Defines
//   LATHE_KIND  0: nothing, for the cost of a launch with and without PDL | 1: reads a stream | 2: copies a stream
// Parameters
//   const uint4* src
//   u64 count         16-byte vectors
//   u32* sink         [1], written only if a checksum has a certain value
//   uint4* dst        KIND 2 only
// Geometry: KIND 0: grid 132, block 128. KIND 1 and 2: grid 4 * multiprocessors, block 512, smem 0.
// Why: 8 loads are in flight a thread. The checksum keeps the loads from being dropped.
extern "C" __global__ void __launch_bounds__(512) LATHE_NAME(const uint4* src, u64 count, u32* sink,
                                                                 uint4* dst) {
  pdl_launch();
  pdl_wait();
#if LATHE_KIND == 1
  u32 x = 0;
  const u64 step = (u64)gridDim.x * blockDim.x;
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = ld_stream(src + i + k * step);
#pragma unroll
    for (int k = 0; k < 8; ++k) x ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += step) {
    const uint4 v = ld_stream(src + i);
    x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (x == 0x9e3779b9u) *sink = x;
#elif LATHE_KIND == 2
  const u64 step = (u64)gridDim.x * blockDim.x;
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = ld_stream(src + i + k * step);
#pragma unroll
    for (int k = 0; k < 4; ++k) __stcs(dst + i + k * step, v[k]);
  }
  for (; i < count; i += step) __stcs(dst + i, ld_stream(src + i));
#endif
}
