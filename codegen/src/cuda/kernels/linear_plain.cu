// linear_plain: y[M, N'] = epilogue(x[M, K] . W[N, K]^T + bias), any element type and any sizes.
// Called by: GEMM steps that no other family takes: f32 or f16 with more than 4 rows, ragged rows (gemm/plain.rs).
//
// Defines
//   LATHE_EPI   0: none | 2: residual | 3: SwiGLU over gate and up rows in blocks of 16 (N' = N / 2)
//   LATHE_BIAS  1: bias[n] is added | 0
// Parameters
//   const E* x          [M, K]
//   const E* w          [N, K]
//   const E* bias       [N], or null
//   const E* residual   [M, N], or null
//   E* y                [M, N']
//   i32 M, i32 N, i32 K
// Geometry: grid (ceil(N / 64), ceil(M / 64)), block 256, smem 0.
// Why: a thread owns 4 rows and 4 columns, the columns as two pairs (n, n + 8), so that gate and up of a feature meet
// in one thread.

extern "C" __global__ void __launch_bounds__(256)
LATHE_NAME(const E* x, const E* w, const E* bias, const E* residual, E* y, i32 M, i32 N, i32 K) {
  __shared__ float sx[16][65], sw[16][65];
  const int tid = threadIdx.x, tx = tid & 15, ty = tid >> 4;
  const int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  const int c0 = (tx >> 3) * 32 + (tx & 7);  // columns c0, c0 + 8, c0 + 16, c0 + 24
  pdl_launch();
  pdl_wait();
  float acc[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
  for (int k0 = 0; k0 < K; k0 += 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = ty + 16 * i, k = k0 + tx;
      sx[tx][r] = (m0 + r < M && k < K) ? to_f32(x[(i64)(m0 + r) * K + k]) : 0.0f;
      sw[tx][r] = (n0 + r < N && k < K) ? to_f32(w[(i64)(n0 + r) * K + k]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = sx[k][ty + 16 * i];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = sw[k][c0 + 8 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = m0 + ty + 16 * i;
    if (m >= M) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = n0 + c0 + 8 * j;
      if (LATHE_BIAS && n < N) acc[i][j] += to_f32(bias[n]);
    }
#if LATHE_EPI == 3
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const int n = n0 + c0 + 8 * j;
      if (n < N) y[(i64)m * (N / 2) + n / 16 * 8 + n % 8] = from_f32<E>(silu(acc[i][j]) * acc[i][j + 1]);
    }
#else
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = n0 + c0 + 8 * j;
      if (n >= N) continue;
      float v = acc[i][j];
      if (LATHE_EPI == 2) v += to_f32(residual[(i64)m * N + n]);
      y[(i64)m * N + n] = from_f32<E>(v);
    }
#endif
  }
}
