// gemv: y[M, N'] = epilogue(norm(x)[M, K] . W[N, K]^T) for M = 1..4 rows: the weight-streaming kernel of decode.
// Called by: GEMM steps with at most 4 rows (gemm/gemv.rs).
//
// Defines
//   LATHE_M         rows, 1..4
//   LATHE_N         rows of W
//   LATHE_K         columns of W; K * sizeof(E) is a multiple of 16
//   LATHE_GRID      CTAs = gridDim.x; every CTA takes an equal share of row groups
//   LATHE_WARPS     warps of a CTA
//   LATHE_KC        columns of a chunk, a multiple of 32 * VEC
//   LATHE_SLOTS     chunks in a warp's ring, 2..6
//   LATHE_R         rows of a group; 2 with EPI 3
//   LATHE_PRO       0: h = x | 1: h = norm(x) * gamma | 2: s = E(x + delta), stored once in `sum`, h = norm(s) * gamma
//   LATHE_NO_GAMMA  1: h = norm(x), gamma is in the weight (PRO 1) | 0
//   LATHE_EPS       f32, added to the mean square (PRO 1 and 2)
//   LATHE_EPI       0: y = acc | 1: acc + bias[n] | 2: acc + residual[m, n] | 3: SwiGLU | 4: argmax over n
//   LATHE_MAP(v)    f32 expression of each output before it is rounded; default (v)
//   LATHE_NEXT      bytes of `next` that a warp brings into L2 with its last chunk, a multiple of 16; default 0
// Parameters (those without use are null)
//   const E* w         [N, K]
//   const E* x         [M, K]
//   const E* delta     [M, K], PRO 2
//   const E* gamma     [K], PRO 1 and 2
//   const E* add       bias [N] of EPI 1, residual [M, N] of EPI 2
//   void* y            E [M, N'], N' = N / 2 with EPI 3, else N; EPI 4: i32 [M], the lowest index of the largest output
//   E* sum             [M, K], PRO 2; aliases neither x nor delta
//   u64* best          [M], EPI 4: zero before the first launch, and every launch leaves it so
//   u32* counter       [1], EPI 4: likewise
//   const void* next   weights of at least GRID * WARPS * NEXT bytes
// Geometry: grid GRID, block 32 * WARPS, smem = ring + xs + part + bars + red, each rounded up to 16 bytes, with
//   ring = WARPS * SLOTS * R * KC * sizeof(E)
//   xs   = M * K * sizeof(E)
//   part = (ROUNDS * WARPS + PAIRS * SP + (EPI is 1 or 2 ? ROUNDS * WARPS + PAIRS : 0)) * R * M * 4
//   bars = WARPS * SLOTS * 8
//   red  = WARPS * M * 8
//   GROUPS = ceil(N / R), ROUNDS = floor(GROUPS / (GRID * WARPS)), REM = GROUPS - ROUNDS * GRID * WARPS
//   PAIRS = ceil(REM / GRID), NCH = ceil(K / KC), UMIN = floor(floor(REM / GRID) * NCH / WARPS)
//   SP = UMIN == 0 ? WARPS : min(ceil((NCH - 1) / UMIN) + 1, WARPS, NCH)
// PRO 1 and 2 keep the rows in registers: M * ceil(K / VEC / (32 * WARPS)) <= 16. A longer row needs norm.cu first.
// EPI 3: rows of W lie in blocks of 16, 8 gate and 8 up: y[m, 8b + j] = silu(row 16b + j) * row(16b + 8 + j).
//
// Why: row groups go round by round, GRID * WARPS consecutive groups a round, one a warp. At any time the machine
// reads one compact window of W; many far-apart streams read 2-3 % slower. What is left after the whole rounds is
// shared out evenly: a CTA's remaining chunks are dealt to its warps contiguously, splitting K. A warp's ring of
// bulk copies starts before griddepcontrol.wait. Activations are staged once in shared memory. f32 partial sums meet
// in shared memory and are added in a fixed order, so that results are bitwise reproducible. SLOTS is the most, up
// to 6, that keep smem <= 232448 bytes. One CTA a multiprocessor (at least 116000 bytes of smem) spreads every
// kernel of a PDL chain evenly. Two smaller CTAs were measured slower in a model's chain: the first multiprocessors
// to finish get two CTAs of the next kernel and the last ones none. NEXT = 4096 gained 3 % of a Llama-3.2-1B step
// and 0.3 % of a Llama-3.1-8B step: memory stays busy while kernels change.
#ifndef LATHE_NEXT
#define LATHE_NEXT 0
#endif
#ifndef LATHE_MAP
#define LATHE_MAP(v) (v)
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
constexpr int OFF_XS = W * S * SLOT_BYTES;
constexpr int OFF_PART = OFF_XS + up16(M * K * (int)sizeof(E));
constexpr int OFF_BARS = OFF_PART + up16(PART * 4);
constexpr int OFF_RED = OFF_BARS + up16(W * S * 8);
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
#else
          f[e] = round_to<E>(f[e] * rstd) * g[e];
#endif
        }
        st16(xs + (m * KV + v) * 16, pack16(f, E()));
      }
    }
  }
#endif
}

extern "C" __global__ void __launch_bounds__(T, 1)
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

  int s = 0;
  u32 phase = 0;
#pragma unroll 1
  for (int u = 0; u < count; ++u) {
    mbar_wait(bars + s * 8, phase);
    if (LATHE_NEXT > 0 && u + 1 == count && elect_one())
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
      reinterpret_cast<E*>(y)[(i64)m * (N / 2) + group_of(j)] = from_f32<E>(LATHE_MAP(silu(g) * u));
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
        reinterpret_cast<E*>(y)[(i64)m * N + n] = from_f32<E>(v);
      }
    }
#endif
}
