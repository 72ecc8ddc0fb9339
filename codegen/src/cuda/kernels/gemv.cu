// gemv: y[M, N'] = epilogue(prologue(x)[M, K] . W[N, K]^T) for M = 1..4 rows: the weight-streaming kernel of decode.
// Called by: plan steps Linear with at most 4 rows (QKV, O, gate|up, down, lm_head).
//
// Defines
//   LATHE_M 1..4; LATHE_N, LATHE_K: rows and columns of W; K * sizeof(E) a multiple of 16.
//   LATHE_GRID     number of CTAs, = gridDim.x (132 = one a multiprocessor; fewer if N is small). The kernel
//                  relies on it for its row ranges; every CTA takes an equal share of row groups.
//   LATHE_PRO      0 none: h = x | 1 RMSNorm: h = norm(x) * gamma | 2 add + RMSNorm: s = E(x + delta), written to
//                  `sum` once (spread over the CTAs), h = norm(s) * gamma. `sum` must not alias x or delta.
//                  PRO 1 and 2 need M * ceil(K / VEC / (32 * WARPS)) <= 16 (K <= 8192 at M = 4), else norm.cu first.
//   LATHE_EPS      f32 literal, for PRO 1, 2.
//   LATHE_NO_GAMMA 1: h = norm(x), the weight has gamma in its columns (PRO 1); 0 (default).
//   LATHE_GAMMA(w) f32 expression of the norm weight, default (w); Gemma: (1.0f + (w)).
//   LATHE_NORM_F32 0 (default): h = E(E(s * rstd) * gamma), HF Llama rounding | 1: h = E(s * rstd * gamma).
//   LATHE_EPI      0 none: y = acc | 1 bias: acc + add[n] | 2 residual: acc + add[m, n] | 3 SwiGLU over gate|up
//                  packed in blocks of 16 rows (8 gate, 8 up): y[m, 8b + j] = ACT(row 16b + j) * row(16b + 8 + j),
//                  N' = N / 2 | 4 argmax over n (lowest index wins ties), y = i32[M], no logits written.
//   LATHE_MAP(v)   f32 expression applied to acc (after bias/residual) before rounding, default (v): softcap, scale.
//   LATHE_ACT(g)   gate activation of EPI 3, default silu(g).
//   LATHE_OUT_F32  1: y is f32 (logits), 0 (default): y has type E.
//   Tuning: LATHE_WARPS (default 8), LATHE_KC columns a chunk (default 1024 bf16; multiple of 32 * VEC),
//   LATHE_SLOTS ring depth a warp (default 6), LATHE_R rows a group (default 2; EPI 3 needs 2), LATHE_RING
//   (1: shared-memory ring of bulk copies; 0: direct loads, LATHE_SLOTS chunks of registers), LATHE_MINB
//   CTAs a multiprocessor for __launch_bounds__ (default 1).
//   LATHE_NEXT bytes a warp (multiple of 16, default 0 = none; RING 1): when a warp waits for its last LATHE_NEXT_AT
//   chunks (default 1) it brings its share of next[0 .. GRID * WARPS * NEXT) into L2: the weights that the next
//   streaming kernel of the chain reads first, so that memory stays busy while kernels change over.
// Parameters (all variants; unused ones may be null)
//   const E* w [N,K], const E* x [M,K], const E* delta [M,K], const E* gamma [K], const E* add (bias [N] or
//   residual [M,N]), void* y, E* sum [M,K], u64* best [M] and u32* counter [1] (EPI 4: zeroed once at allocation,
//   left zero by every launch; one pair per stream), const void* next (weights, at least GRID * WARPS * NEXT bytes).
// Geometry: grid LATHE_GRID, block 32 * WARPS, smem = the sum of (each rounded up to 16)
//   ring = RING ? WARPS * SLOTS * R * KC * sizeof(E) : 0
//   xs   = M * K * sizeof(E)
//   part = (ROUNDS * WARPS + PAIRS * SP + (EPI is 1 or 2 ? ROUNDS * WARPS + PAIRS : 0)) * R * M * 4
//   bars = RING ? WARPS * SLOTS * 8 : 0
//   red  = WARPS * M * 8
// with GROUPS = ceil(N / R), ROUNDS = floor(GROUPS / (GRID * WARPS)), REM = GROUPS - ROUNDS * GRID * WARPS,
//   PAIRS = ceil(REM / GRID), NCH = ceil(K / KC), UMIN = floor(floor(REM / GRID) * NCH / WARPS),
//   SP = UMIN == 0 ? WARPS : min(ceil((NCH - 1) / UMIN) + 1, WARPS, NCH).
// Parallelisation: row groups go round by round, GRID * WARPS consecutive groups a round, one a warp, so that at any
// time the machine reads one compact window of W (many far-apart streams read 2-3 % slower). What is left after the
// whole rounds is shared out evenly: a CTA's remaining chunks (group, KC columns) are dealt to its warps contiguously,
// splitting K. Every warp owns a ring of bulk copies that starts before griddepcontrol.wait; activations are staged
// once in shared memory; f32 partial sums meet in shared memory and are added in a fixed order (bitwise reproducible).
// Choice of SLOTS: the most, up to 6, that keep smem <= 232448 bytes (227 KiB); at least 2. With one CTA a
// multiprocessor (smem > 113 KiB; ask for 116000 bytes if the ring is smaller) every kernel of a PDL chain spreads
// evenly. Two smaller CTAs a multiprocessor were measured slower in a model's chain: where kernels of different sizes
// follow each other, the first multiprocessors to finish get two CTAs of the next kernel and the last ones none.
// NEXT = 4096 gained 3 % of a Llama-3.2-1B step and 0.3 % of a Llama-3.1-8B step.
#ifndef LATHE_WARPS
#define LATHE_WARPS 8
#endif
#ifndef LATHE_KC
#define LATHE_KC (512 / (int)sizeof(E) * 4)
#endif
#ifndef LATHE_SLOTS
#define LATHE_SLOTS 6
#endif
#ifndef LATHE_R
#define LATHE_R 2
#endif
#ifndef LATHE_RING
#define LATHE_RING 1
#endif
#ifndef LATHE_MINB
#define LATHE_MINB 1
#endif
#ifndef LATHE_NEXT
#define LATHE_NEXT 0
#endif
#ifndef LATHE_NEXT_AT
#define LATHE_NEXT_AT 1
#endif
#ifndef LATHE_PRO
#define LATHE_PRO 0
#endif
#ifndef LATHE_EPI
#define LATHE_EPI 0
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
#ifndef LATHE_MAP
#define LATHE_MAP(v) (v)
#endif
#ifndef LATHE_ACT
#define LATHE_ACT(g) silu(g)
#endif
#ifndef LATHE_OUT_F32
#define LATHE_OUT_F32 0
#endif

constexpr int M = LATHE_M, N = LATHE_N, K = LATHE_K, G = LATHE_GRID;
constexpr int W = LATHE_WARPS, KC = LATHE_KC, S = LATHE_SLOTS, R = LATHE_R, T = 32 * W;
constexpr int NCH = (K + KC - 1) / KC;          // chunks of a row
constexpr int IT = KC / (32 * VEC);             // 16-byte vectors a lane holds of a chunk row
constexpr int GROUPS = (N + R - 1) / R;
constexpr int ROUNDS = GROUPS / (G * W);
constexpr int REM = GROUPS - ROUNDS * G * W;
constexpr int PAIRS = (REM + G - 1) / G;        // remaining row groups of the largest CTA share
constexpr int UMIN = (REM / G) * NCH / W;
constexpr int imin(int a, int b) { return a < b ? a : b; }
// Warps over which one of the remaining groups can be spread.
constexpr int SP = UMIN == 0 ? W : imin(imin((NCH - 1 + UMIN - 1) / UMIN + 1, W), NCH);
constexpr int FULL = ROUNDS * W;                // whole groups of a CTA
constexpr bool ADDEND = LATHE_EPI == 1 || LATHE_EPI == 2;
constexpr int PART2 = FULL * R * M, PART_ADD = PART2 + PAIRS * R * M * SP;
constexpr int PART = PART_ADD + (ADDEND ? (FULL + PAIRS) * R * M : 0);
constexpr int up16(int b) { return (b + 15) / 16 * 16; }
constexpr int SLOT_BYTES = R * KC * (int)sizeof(E);
constexpr int OFF_XS = LATHE_RING ? W * S * SLOT_BYTES : 0;
constexpr int OFF_PART = OFF_XS + up16(M * K * (int)sizeof(E));
constexpr int OFF_BARS = OFF_PART + up16(PART * 4);
constexpr int OFF_RED = OFF_BARS + (LATHE_RING ? up16(W * S * 8) : 0);
constexpr int GEMV_SMEM = OFF_RED + up16(W * M * 8);
static_assert(K % VEC == 0 && KC % (32 * VEC) == 0, "K must be whole 16-byte vectors");
static_assert(LATHE_EPI != 3 || (R == 2 && N % 16 == 0), "SwiGLU needs row pairs in blocks of 16");
constexpr int KV = K / VEC;                     // 16-byte vectors of an activation row
constexpr int NV = (KV + T - 1) / T;            // of which a thread holds this many
constexpr bool TAIL = K % KC != 0;
static_assert(LATHE_PRO == 0 || M * NV <= 16, "norm prologue keeps its rows in registers: use norm.cu for longer ones");

// Row r of row group p.
DEV int group_row(int p, int r) {
#if LATHE_EPI == 3
  return (p >> 3) * 16 + (p & 7) + r * 8;
#else
  int row = p * R + r;
  return (N % R) ? min(row, N - 1) : row;
#endif
}

// acc[r][m] += w[r] . h[m] over one 16-byte vector.
DEV void fma_vec(float (&acc)[R][M][2], const uint4 (&w)[R], const char* xs, int vec) {
  float wf[R][VEC];
#pragma unroll
  for (int r = 0; r < R; ++r) unpack16(w[r], wf[r], E());
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float xf[VEC];
    unpack16(ld16(xs + (m * KV + vec) * 16), xf, E());
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int e = 0; e < VEC; ++e) acc[r][m][e & 1] = fmaf(wf[r][e], xf[e], acc[r][m][e & 1]);
  }
}

// h = prologue(x) for all M rows into shared memory. Ends without a barrier.
DEV void prologue(const E* x, const E* delta, const E* gamma, E* sum, char* xs, float* red, const uint4 (&gm)[NV]) {
  const int tid = threadIdx.x;
#if LATHE_PRO == 0
#pragma unroll 8
  for (int v = tid; v < M * KV; v += T) cp_async16(smem_addr(xs + v * 16), reinterpret_cast<const char*>(x) + (i64)v * 16, 16);
  cp_async_commit();
#else
  const int warp = tid >> 5, lane = tid & 31;
  float ss[M];
  uint4 a[M][NV];
#if LATHE_PRO == 2
  uint4 b[M][NV];
#endif
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < NV; ++i) {
      int v = tid + i * T;
      if (KV % T == 0 || v < KV) {
        a[m][i] = ld16(x + (i64)m * K + v * VEC);
#if LATHE_PRO == 2
        b[m][i] = ld16(delta + (i64)m * K + v * VEC);
#endif
      } else {
        a[m][i] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    ss[m] = 0.0f;
#pragma unroll
    for (int i = 0; i < NV; ++i) {
      int v = tid + i * T;
      if (KV % T == 0 || v < KV) {
        float f[VEC];
        unpack16(a[m][i], f, E());
#if LATHE_PRO == 2
        float d[VEC];
        unpack16(b[m][i], d, E());
#pragma unroll
        for (int e = 0; e < VEC; ++e) f[e] += d[e];
        a[m][i] = pack16(f, E());
        unpack16(a[m][i], f, E());
        if (v % G == (int)blockIdx.x) st16(sum + (i64)m * K + v * VEC, a[m][i]);
#endif
#pragma unroll
        for (int e = 0; e < VEC; ++e) ss[m] = fmaf(f[e], f[e], ss[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    ss[m] = warp_sum(ss[m]);
    if (lane == 0) red[m * W + warp] = ss[m];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float t = 0.0f;
#pragma unroll
    for (int i = 0; i < W; ++i) t += red[m * W + i];
    const float rstd = rsqrtf(t * (1.0f / K) + LATHE_EPS);
#pragma unroll
    for (int i = 0; i < NV; ++i) {
      int v = tid + i * T;
      if (KV % T == 0 || v < KV) {
        float f[VEC];
        unpack16(a[m][i], f, E());
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
        st16(xs + (m * KV + v) * 16, pack16(f, E()));
      }
    }
  }
#endif
}

extern "C" __global__ void __launch_bounds__(T, LATHE_MINB)
LATHE_NAME(const E* w, const E* x, const E* delta, const E* gamma, const E* add, void* y, E* sum, u64* best, u32* counter,
           const void* next) {
  extern __shared__ __align__(1024) char smem[];
  char* xs = smem + OFF_XS;
  float* part = reinterpret_cast<float*>(smem + OFF_PART);
  float* red = reinterpret_cast<float*>(smem + OFF_RED);
  const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid >> 5, 0), lane = tid & 31;
  const int q0 = (int)((u64)blockIdx.x * REM / G), q1 = (int)((u64)(blockIdx.x + 1) * REM / G);
  const u32 units = (u32)(q1 - q0) * NCH;
  const u32 u0 = (u32)warp * units / W, u1 = (u32)(warp + 1) * units / W;
  const int count = ROUNDS * NCH + (int)(u1 - u0);
  const int rest = ROUNDS * G * W + q0;         // first of the CTA's remaining groups
  // Row group of local index j: whole groups first, then the remaining ones.
  auto group_of = [&](int j) { return j < FULL ? ((j / W) * G + (int)blockIdx.x) * W + j % W : rest + j - FULL; };
  pdl_launch();

  // Cursor of the loads: round lt, group lp, chunk lc.
  int lt = 0, lp = blockIdx.x * W + warp, lc = 0;
  if (ROUNDS == 0) { lp = rest + (int)(u0 / NCH); lc = (int)(u0 % NCH); }
  auto step = [&] {
    if (++lc == NCH) {
      lc = 0;
      ++lt;
      if (lt < ROUNDS) lp += G * W;
      else if (lt == ROUNDS) { lp = rest + (int)(u0 / NCH); lc = (int)(u0 % NCH); }
      else ++lp;
    }
  };
#if LATHE_RING
  const u32 ring = smem_addr(smem) + warp * S * SLOT_BYTES;
  const u32 bars = smem_addr(smem + OFF_BARS) + warp * S * 8;
  const u64 policy = policy_evict_first();
  if (lane == 0)
#pragma unroll
    for (int s = 0; s < S; ++s) mbar_init(bars + s * 8, 1);
  mbar_init_fence();
  __syncwarp();
  auto issue = [&](int s) {
    const u32 bytes = (TAIL && lc == NCH - 1) ? (K - (NCH - 1) * KC) * sizeof(E) : KC * sizeof(E);
    if (elect_one()) {
      mbar_expect(bars + s * 8, bytes * R);
#pragma unroll
      for (int r = 0; r < R; ++r)
        bulk_load(ring + s * SLOT_BYTES + r * KC * sizeof(E), w + (i64)group_row(lp, r) * K + lc * KC, bytes, bars + s * 8, policy);
    }
    step();
  };
#pragma unroll 1
  for (int s = 0; s < S && s < count; ++s) issue(s);
#else
  uint4 buf[S][R][IT];
  auto load = [&](uint4 (&b)[R][IT]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < IT; ++i) {
        const int k = lc * KC + (lane + 32 * i) * VEC;
        if (!TAIL || k < K) b[r][i] = ld_stream(w + (i64)group_row(lp, r) * K + k);
        else b[r][i] = make_uint4(0, 0, 0, 0);
      }
    step();
  };
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (s < count) load(buf[s]);
#endif

  uint4 gm[NV];
#if LATHE_PRO != 0 && !LATHE_NO_GAMMA
#pragma unroll
  for (int i = 0; i < NV; ++i) {
    int v = tid + i * T;
    gm[i] = (KV % T == 0 || v < KV) ? ld16(gamma + v * VEC) : make_uint4(0, 0, 0, 0);
  }
#endif
  const int rows = (FULL + q1 - q0) * R;
  for (int i = PART2 + tid; i < PART_ADD; i += T) part[i] = 0.0f;

  pdl_wait();
  prologue(x, delta, gamma, sum, xs, red, gm);
#if LATHE_EPI == 1 || LATHE_EPI == 2
#pragma unroll 1
  for (int j = tid; j < rows; j += T) {
    const int n = group_of(j / R) * R + j % R;
    if (N % R == 0 || n < N)
#pragma unroll
      for (int m = 0; m < M; ++m) part[PART_ADD + j * M + m] = to_f32(add[LATHE_EPI == 1 ? (i64)n : (i64)m * N + n]);
  }
#endif
#if LATHE_PRO == 0
  cp_async_wait<0>();
#endif
  __syncthreads();

  // Main loop over this warp's chunks.
  // Cursor: local group cj (its sums go to part), chunk cc; `whole`: this warp began the group.
  int ct = 0, cj = warp, cc = 0;
  bool whole = true;
  if (ROUNDS == 0) { cj = (int)(u0 / NCH); cc = (int)(u0 % NCH); whole = cc == 0; }
  float acc[R][M][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int m = 0; m < M; ++m) acc[r][m][0] = acc[r][m][1] = 0.0f;

  auto flush = [&](bool end_of_range) {
    if (++cc == NCH || end_of_range) {
      // Sums of whole groups stand alone; a remaining group has a column for each warp that shares it.
      const bool full = ct < ROUNDS;
      const int first = whole ? warp : (int)(((u32)(cj - FULL) * NCH + 1) * W - 1) / (int)units;
      const int stride = full ? 1 : SP;
      float* dst = part + (full ? cj * R * M : PART2 + (cj - FULL) * R * M * SP + (warp - first));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (R % 2 == 0) {
#pragma unroll
          for (int r = 0; r + 1 < R; r += 2) {
            // Lanes below 16 reduce row r, the others row r + 1.
            const float a0 = acc[r][m][0] + acc[r][m][1], a1 = acc[r + 1][m][0] + acc[r + 1][m][1];
            float keep = (lane & 16) ? a1 : a0;
            keep += __shfl_xor_sync(~0u, (lane & 16) ? a0 : a1, 16);
#pragma unroll
            for (int o = 8; o; o >>= 1) keep += __shfl_xor_sync(~0u, keep, o);
            if ((lane & 15) == 0) dst[((r + (lane >> 4)) * M + m) * stride] = keep;
          }
        } else {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float v = warp_sum(acc[r][m][0] + acc[r][m][1]);
            if (lane == 0) dst[(r * M + m) * stride] = v;
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) acc[r][m][0] = acc[r][m][1] = 0.0f;
      }
      cc = 0;
      whole = true;
      ++ct;
      if (ct < ROUNDS) cj += W;
      else if (ct == ROUNDS) { cj = FULL + (int)(u0 / NCH); cc = (int)(u0 % NCH); whole = cc == 0; }
      else ++cj;
    }
  };

#if LATHE_RING
  int s = 0;
  u32 phase = 0;
#pragma unroll 1
  for (int u = 0; u < count; ++u) {
    mbar_wait(bars + s * 8, phase);
    if (LATHE_NEXT > 0 && u + LATHE_NEXT_AT == count && elect_one())
      bulk_prefetch(reinterpret_cast<const char*>(next) + (i64)(blockIdx.x * W + warp) * LATHE_NEXT, LATHE_NEXT);
    const char* slot = smem + (warp * S + s) * SLOT_BYTES;
#pragma unroll
    for (int i = 0; i < IT; ++i) {
      const int vec = lane + 32 * i;
      if (!TAIL || cc * KC + vec * VEC < K) {
        uint4 wv[R];
#pragma unroll
        for (int r = 0; r < R; ++r) wv[r] = ld16(slot + r * KC * sizeof(E) + vec * 16);
        fma_vec(acc, wv, xs, cc * (KC / VEC) + vec);
      }
    }
    __syncwarp();
    if (u + S < count) issue(s);
    if (++s == S) { s = 0; phase ^= 1; }
    flush(u + 1 == count);
  }
#else
#pragma unroll 1
  for (int u = 0; u < count; u += S) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (u + s < count) {
#pragma unroll
        for (int i = 0; i < IT; ++i) {
          const int vec = lane + 32 * i;
          uint4 wv[R];
#pragma unroll
          for (int r = 0; r < R; ++r) wv[r] = buf[s][r][i];
          if (!TAIL || cc * KC + vec * VEC < K) fma_vec(acc, wv, xs, cc * (KC / VEC) + vec);
        }
        if (u + s + S < count) load(buf[s]);
        flush(u + s + 1 == count);
      }
    }
  }
#endif
  __syncthreads();

  // Epilogue: partial sums in a fixed order, one thread an output.
  auto total = [&](int j, int m) {  // local row j
    float t = 0.0f;
    if (j < FULL * R) {
      t = part[j * M + m];
    } else {
#pragma unroll
      for (int q = 0; q < SP; ++q) t += part[PART2 + ((j - FULL * R) * M + m) * SP + q];
    }
    if (ADDEND) t += part[PART_ADD + j * M + m];
    return t;
  };
#if LATHE_EPI == 3
#pragma unroll
  for (int m = 0; m < M; ++m)
    for (int j = tid; j < rows / 2; j += T) {
      const float g = total(2 * j, m), u = total(2 * j + 1, m);
      reinterpret_cast<E*>(y)[(i64)m * (N / 2) + group_of(j)] = from_f32<E>(LATHE_MAP(LATHE_ACT(g) * u));
    }
#elif LATHE_EPI == 4
  u64* redk = reinterpret_cast<u64*>(red);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    u64 key = 0;
    for (int j = tid; j < rows; j += T) {
      const int n = group_of(j / R) * R + j % R;
      if (N % R == 0 || n < N) {
        const float v = total(j, m);
        const u64 k = argmax_key(LATHE_MAP(v), n);
        key = k > key ? k : key;
      }
    }
    key = warp_max_u64(key);
    if (lane == 0) redk[m * W + warp] = key;
  }
  __syncthreads();
  if (tid < M) {
    u64 key = redk[tid * W];
    for (int i = 1; i < W; ++i) key = redk[tid * W + i] > key ? redk[tid * W + i] : key;
    atomicMax(best + tid, key);
    __threadfence();
  }
  __syncthreads();
  if (tid == 0) {
    const bool last = atomicAdd(counter, 1u) == G - 1;
    if (last) {
      __threadfence();
      for (int m = 0; m < M; ++m) reinterpret_cast<i32*>(y)[m] = (i32)argmax_index(atomicExch(best + m, 0ull));
      *counter = 0;
    }
  }
#else
#pragma unroll
  for (int m = 0; m < M; ++m)
    for (int j = tid; j < rows; j += T) {
      const int n = group_of(j / R) * R + j % R;
      if (N % R == 0 || n < N) {
        const float t = total(j, m);
        const float v = LATHE_MAP(t);
#if LATHE_OUT_F32
        reinterpret_cast<float*>(y)[(i64)m * N + n] = v;
#else
        reinterpret_cast<E*>(y)[(i64)m * N + n] = from_f32<E>(v);
#endif
      }
    }
#endif
}
