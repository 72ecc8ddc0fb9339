// row_sums: sums[m] = the sum of squares of row m of x, as a fixed-point number (square_sum in prelude.cuh).
// Called by: GEMMs that take a norm as factors, of rows whose kernel leaves no sums (row_sums.rs).
//
// Defines
//   LATHE_K        row length, a multiple of VEC
//   LATHE_THREADS  block size, a multiple of 32
// Parameters
//   const E* x    [M, K]
//   u64* sums     [M]
//   u64* next     [M], set to 0 for the kernel that adds next, or null
//   i32 rows      M
// Geometry: grid = rows, block = THREADS, smem 0.
// Why: fixed-point sums do not depend on the order of additions. Storing here means that nothing is carried over from
// the step before.
constexpr int K = LATHE_K, T = LATHE_THREADS;
static_assert(K % VEC == 0 && T % 32 == 0, "row length");

extern "C" __global__ void __launch_bounds__(T) LATHE_NAME(const E* x, u64* sums, u64* next, i32 rows) {
  __shared__ float red[T / 32];
  const int tid = threadIdx.x;
  pdl_launch();
  pdl_wait();
  float ss = 0.0f;
  for (int v = tid; v < K / VEC; v += T) {
    float f[VEC];
    unpack16(ld16(x + (i64)blockIdx.x * K + v * VEC), f, E());
#pragma unroll
    for (int e = 0; e < VEC; ++e) ss = fmaf(f[e], f[e], ss);
  }
  ss = warp_sum(ss);
  if ((tid & 31) == 0) red[tid >> 5] = ss;
  __syncthreads();
  if (tid == 0) {
    float t = 0.0f;
#pragma unroll
    for (int i = 0; i < T / 32; ++i) t += red[i];
    sums[blockIdx.x] = square_sum(t);
    if (next) next[blockIdx.x] = 0;
  }
}
