// norm: RMSNorm of M rows, optionally of a residual sum: s = E(x + delta) (written to `sum`), y = norm(s) * gamma.
// Called by: norms that stay apart, and GEMMs that do not take theirs (gamma not in the weight and M > 4, or cuBLASLt).
//
// Defines: LATHE_K row length (multiple of VEC); LATHE_ADD 0|1; LATHE_EPS; LATHE_GAMMA(w) (default (w));
//   LATHE_NORM_F32, LATHE_NO_GAMMA as in gemv.cu; LATHE_THREADS block size (default 256).
// Parameters: const E* x [M,K], const E* delta [M,K], const E* gamma [K], E* y [M,K], E* sum [M,K], i32 rows.
//   `sum` may alias x or delta here (a row is read and written by one CTA, each element by one thread).
// Geometry: grid = rows, block = THREADS, smem 0. HF rounding: y = E(E(s * rstd) * gamma).
#ifndef LATHE_ADD
#define LATHE_ADD 0
#endif
#ifndef LATHE_EPS
#define LATHE_EPS 1e-5f
#endif
#ifndef LATHE_NO_GAMMA
#define LATHE_NO_GAMMA 0
#endif
#ifndef LATHE_GAMMA
#define LATHE_GAMMA(w) (w)
#endif
#ifndef LATHE_NORM_F32
#define LATHE_NORM_F32 0
#endif
#ifndef LATHE_THREADS
#define LATHE_THREADS 256
#endif
constexpr int K = LATHE_K, T = LATHE_THREADS, KV = K / VEC, NV = (KV + T - 1) / T;
static_assert(K % VEC == 0 && T % 32 == 0, "row length");

extern "C" __global__ void __launch_bounds__(T)
LATHE_NAME(const E* x, const E* delta, const E* gamma, E* y, E* sum, i32 rows) {
  __shared__ float red[T / 32];
  const int tid = threadIdx.x;
  const i64 base = (i64)blockIdx.x * K;
  pdl_launch();
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
  ss = warp_sum(ss);
  if ((tid & 31) == 0) red[tid >> 5] = ss;
  __syncthreads();
  float t = 0.0f;
#pragma unroll
  for (int i = 0; i < T / 32; ++i) t += red[i];
  const float rstd = rsqrtf(t * (1.0f / K) + LATHE_EPS);
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
#elif LATHE_NORM_F32
        f[e] = f[e] * rstd * LATHE_GAMMA(g[e]);
#else
        f[e] = round_to<E>(f[e] * rstd) * LATHE_GAMMA(g[e]);
#endif
      }
      st16(y + base + v * VEC, pack16(f, E()));
    }
  }
}
