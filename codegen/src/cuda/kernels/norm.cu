// norm: y = norm(s) * gamma of M rows with s = x, or s = E(x + delta); norm(s) = s / sqrt(mean(s^2) + eps).
// Called by: norms that stay apart, and GEMMs whose kernel does not take theirs (norm.rs).
//
// Defines
//   LATHE_K         row length
//   LATHE_VECTORS   1: rows are whole vectors of VEC elements | 0
//   LATHE_ADD       1: s = x + delta, stored in `sum` | 0
//   LATHE_NO_GAMMA  1: gamma is 1 and not read | 0
//   LATHE_EPS       f32, added to the mean square
//   LATHE_THREADS   block size, a multiple of 32
// Parameters
//   const E* x      [M, K]
//   const E* delta  [M, K], or null without ADD
//   const E* gamma  [K], or null with NO_GAMMA
//   E* y            [M, K]
//   E* sum          [M, K], or null without ADD; may alias x or delta
//   i32 rows        M
// Geometry: grid = rows, block = THREADS, smem 0.
// Why: y = E(E(s * rstd) * gamma), the rounding of Hugging Face's Llama. A CTA has a row and a thread keeps its part
// in registers, so that each element is read and written once. Rows that are no whole vectors are read element by
// element, and again for the result.
constexpr int K = LATHE_K, T = LATHE_THREADS, KV = K / VEC, NV = (KV + T - 1) / T;
static_assert((K % VEC == 0 || !LATHE_VECTORS) && T % 32 == 0, "row length");

extern "C" __global__ void __launch_bounds__(T)
LATHE_NAME(const E* x, const E* delta, const E* gamma, E* y, E* sum, i32 rows) {
  __shared__ float red[T / 32];
  const int tid = threadIdx.x;
  const i64 base = (i64)blockIdx.x * K;
  pdl_launch();
#if !LATHE_VECTORS
  pdl_wait();
  float ss = 0.0f;
  for (int i = tid; i < K; i += T) {
    float f = to_f32(x[base + i]);
#if LATHE_ADD
    f = round_to<E>(f + to_f32(delta[base + i]));
    sum[base + i] = from_f32<E>(f);
#endif
    ss = fmaf(f, f, ss);
  }
#else
  uint4 gm[NV], a[NV];
#pragma unroll
  for (int i = 0; i < NV && !LATHE_NO_GAMMA; ++i)
    if (tid + i * T < KV) gm[i] = ld16(gamma + (tid + i * T) * VEC);
  pdl_wait();
  float ss = 0.0f;
#pragma unroll
  for (int i = 0; i < NV; ++i) {
    const int v = tid + i * T;
    if (v < KV) {
      a[i] = ld16(x + base + v * VEC);
      float f[VEC];
      unpack16(a[i], f, E());
#if LATHE_ADD
      float d[VEC];
      unpack16(ld16(delta + base + v * VEC), d, E());
#pragma unroll
      for (int e = 0; e < VEC; ++e) f[e] += d[e];
      a[i] = pack16(f, E());
      unpack16(a[i], f, E());
      st16(sum + base + v * VEC, a[i]);
#endif
#pragma unroll
      for (int e = 0; e < VEC; ++e) ss = fmaf(f[e], f[e], ss);
    }
  }
#endif
  ss = warp_sum(ss);
  if ((tid & 31) == 0) red[tid >> 5] = ss;
  __syncthreads();
  float t = 0.0f;
#pragma unroll
  for (int i = 0; i < T / 32; ++i) t += red[i];
  const float rstd = rsqrtf(t * (1.0f / K) + LATHE_EPS);
#if !LATHE_VECTORS
  for (int i = tid; i < K; i += T) {
    const float f = to_f32((LATHE_ADD ? sum : x)[base + i]) * rstd;
    y[base + i] = from_f32<E>(LATHE_NO_GAMMA ? f : round_to<E>(f) * to_f32(gamma[i]));
  }
#else
#pragma unroll
  for (int i = 0; i < NV; ++i) {
    const int v = tid + i * T;
    if (v < KV) {
      float f[VEC];
      unpack16(a[i], f, E());
#if !LATHE_NO_GAMMA
      float g[VEC];
      unpack16(gm[i], g, E());
#endif
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
#if LATHE_NO_GAMMA
        f[e] = f[e] * rstd;
#else
        f[e] = round_to<E>(f[e] * rstd) * g[e];
#endif
      }
      st16(y + base + v * VEC, pack16(f, E()));
    }
  }
#endif
}
