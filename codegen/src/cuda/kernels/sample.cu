// sample: the next token of each row of logits: the largest, or a draw by temperature, top-k and top-p.
// Called by: sampling steps whose token no GEMM has picked (sample.rs).
//
// Defines
//   LATHE_V       vocabulary
//   LATHE_GREEDY  1: the largest logit, the parameter arrays are not read | 0: by each row's parameters
// Parameters
//   const E* logits             [rows, V]
//   const float* temperature    [rows], 0: greedy
//   const u32* top_k            [rows], 0: all, 1: greedy
//   const float* top_p          [rows]
//   const u64* seed             [rows]
//   const u64* request          [rows]
//   const i32* positions        [rows], position of the row's input token; the draw is keyed by the next one
//   i32* tokens                 [rows], -1 if no logit is above -inf
//   i32 rows
// Geometry: grid = rows, block 1024, smem 0 (static 4.3 KB).
// Why: draws are those of the host sampler (lathe-runtime, sampling), bit for bit. They are Philox4x32-10 keyed by
// the seed with counter (token / 4, position, request), and the maximum of (logit - max) / temperature - ln(E),
// logarithms spelled out in separately rounded f32 operations. Only the top-p border is decided in 2^-44 fixed point
// where the host adds f64, which can differ where a cumulative probability meets top_p to within about 1e-9.
constexpr int V = LATHE_V, T = 1024;

DEV u64 block_max_u64(u64 v, u64* red) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  v = warp_max_u64(v);
  __syncthreads();
  if (lane == 0) red[warp] = v;
  __syncthreads();
  return warp_max_u64(red[lane]);
}

#if !LATHE_GREEDY
// One Philox4x32-10 block (Salmon et al., SC 2011).
DEV uint4 philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const u64 a = (u64)c0 * 0xD2511F53u, b = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(b >> 32) ^ c1 ^ k0; c1 = (u32)b;
    c2 = (u32)(a >> 32) ^ c3 ^ k1; c3 = (u32)a;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}
DEV float atanh_series(float s) {
  const float s2 = __fmul_rn(s, s);
  float t = __fadd_rn(__fmul_rn(s2, 2.0f / 9.0f), 2.0f / 7.0f);
  t = __fadd_rn(__fmul_rn(t, s2), 2.0f / 5.0f);
  t = __fadd_rn(__fmul_rn(t, s2), 2.0f / 3.0f);
  return __fadd_rn(__fmul_rn(2.0f, s), __fmul_rn(s, __fmul_rn(s2, t)));
}
DEV float ln_exact(float x) {
  const u32 half = 0x3f3504f3u;  // sqrt(1/2)
  const u32 bits = __float_as_uint(x) - half;
  const float e = (float)((i32)bits >> 23), m = __uint_as_float((bits & 0x7fffffu) + half);
  return __fadd_rn(__fmul_rn(e, 0.693147180559945309f), atanh_series(__fdiv_rn(__fadd_rn(m, -1.0f), __fadd_rn(m, 1.0f))));
}
DEV float gumbel(u32 bits) {
  float v = (float)(((double)bits + 0.5) * (1.0 / 4294967296.0));
  v = fminf(v, 0.99999994f);
  const float ex = v < 0.25f ? atanh_series(__fdiv_rn(v, __fadd_rn(2.0f, -v))) : -ln_exact(__fadd_rn(1.0f, -v));
  return -ln_exact(ex);
}
constexpr float GUMBEL_MAX = 22.875f;

struct Shared {
  u64 red[32];
  u64 mass[256];
  u32 count[256];
  u64 prefix, target;
  u32 done;
};

// Threshold key of the candidates (key >= low, finite): with MASS false the target-th largest key, with MASS true the
// last key whose predecessors in descending order have less than `target` mass. Radix descent, 8 bits a round.
template <bool MASS, class Key, class Mass>
DEV u64 threshold(Shared& sh, u64 low, u64 target, Key key_of, Mass mass_of) {
  const int tid = threadIdx.x;
  u64 prefix = 0;
#pragma unroll 1
  for (int shift = 56; shift >= 0; shift -= 8) {
    if (tid < 256) { sh.mass[tid] = 0; sh.count[tid] = 0; }
    __syncthreads();
#pragma unroll 1
    for (int base = 0; base < V; base += T) {
      const int i = base + tid;
      const u64 key = i < V ? key_of(i) : 0;
      const int digit = (int)(key >> shift) & 255;
      bool active = key != 0 && key >= low && (shift == 56 || (key >> (shift + 8)) == (prefix >> (shift + 8)));
      const u64 mass = MASS && active ? mass_of(i) : 0;
      // The leading digits of floats take few values: lanes with the same digit add up first.
#pragma unroll 1
      for (int round = 0; MASS && shift >= 48 && round < 4; ++round) {
        const u32 any = __ballot_sync(~0u, active);
        if (!any) break;
        const int lead = __ffs(any) - 1;
        const int lead_digit = __shfl_sync(~0u, digit, lead);
        const bool same = active && digit == lead_digit;
        const u32 group = __ballot_sync(~0u, same);
        u64 sum = same ? mass : 0;
#pragma unroll
        for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
        if ((tid & 31) == lead) {
          atomicAdd(&sh.count[digit], (u32)__popc(group));
          atomicAdd(&sh.mass[digit], sum);
        }
        active = active && !same;
      }
      if (active) {
        atomicAdd(&sh.count[digit], 1u);
        if (MASS) atomicAdd(&sh.mass[digit], mass);
      }
    }
    __syncthreads();
    if (tid < 32) {
      // Lane l holds digits 255 - 8l downwards.
      u64 own = 0;
      for (int k = 0; k < 8; ++k) own += MASS ? sh.mass[255 - 8 * tid - k] : (u64)sh.count[255 - 8 * tid - k];
      u64 inc = own;
      for (int o = 1; o < 32; o <<= 1) {
        const u64 v = __shfl_up_sync(~0u, inc, o);
        if (tid >= o) inc += v;
      }
      const bool hit = inc >= target && inc - own < target;
      if (hit) {
        u64 left = target - (inc - own);
        int digit = 255 - 8 * tid;
        for (;; --digit) {
          const u64 b = MASS ? sh.mass[digit] : (u64)sh.count[digit];
          if (b >= left) break;
          left -= b;
        }
        sh.prefix = prefix | ((u64)digit << shift);
        sh.target = left;
        // The whole bucket is kept: all keys >= prefix.
        sh.done = MASS ? sh.count[digit] == 1 : left == sh.count[digit];
      }
      if (!__any_sync(~0u, hit) && tid == 0) { sh.prefix = low; sh.done = 1; }  // fewer candidates than asked for
    }
    __syncthreads();
    prefix = sh.prefix;
    target = sh.target;
    if (sh.done) break;
  }
  __syncthreads();
  // A prefix ends where one candidate is left; keys of the same prefix below `low` are none.
  return prefix > low ? prefix : low;
}
#endif

extern "C" __global__ void __launch_bounds__(T)
LATHE_NAME(const E* logits, const float* temperature, const u32* top_k, const float* top_p, const u64* seed,
           const u64* request, const i32* positions, i32* tokens, i32 rows) {
  const int tid = threadIdx.x, r = blockIdx.x;
  pdl_launch();
  pdl_wait();
  const E* row = logits + (i64)r * V;
#if LATHE_GREEDY
  __shared__ u64 red[32];
#else
  __shared__ Shared sh;
  u64* red = sh.red;
#endif
  u64 best = 0;
#pragma unroll 4
  for (int i = tid; i < V; i += T) {
    const u64 k = argmax_key(to_f32(row[i]), i);
    best = k > best ? k : best;
  }
  best = block_max_u64(best, red);
#if LATHE_GREEDY
  if (tid == 0) tokens[r] = (i32)argmax_index(best);
#else
  const float temp = temperature[r];
  const u32 k = top_k[r];
  const float p = top_p[r];
  const int top = (int)argmax_index(best);
  const float max = top >= 0 ? to_f32(row[top]) : 0.0f;
  if (top < 0 || temp == 0.0f || k == 1 || max == -NEG_INF) {
    if (tid == 0) tokens[r] = top;
    return;
  }
  auto scaled = [&](int i) { return __fdiv_rn(__fadd_rn(to_f32(row[i]), -max), temp); };
  // Candidates by descending logit, then ascending index; 0 for what is not above -inf.
  auto key_of = [&](int i) {
    return scaled(i) > NEG_INF ? ((u64)ordered(to_f32(row[i])) << 32) | (u64)(u32)(~(u32)i) : 0ull;
  };
  auto mass_of = [&](int i) { return (u64)(exp((double)scaled(i)) * 17592186044416.0); };
  u64 low = 1;
  if (k != 0 && k < (u32)V) low = threshold<false>(sh, 1, k, key_of, mass_of);
  if (p < 1.0f) {
    u64 sum = 0;
    for (int i = tid; i < V; i += T) {
      const u64 key = key_of(i);
      if (key != 0 && key >= low) sum += mass_of(i);
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    __syncthreads();
    if ((tid & 31) == 0) sh.red[tid >> 5] = sum;
    __syncthreads();
    u64 total = sh.red[tid & 31];
#pragma unroll
    for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
    __syncthreads();
    const u64 want = (u64)((double)p * (double)total);
    low = threshold<true>(sh, low, want > 0 ? want : 1, key_of, mass_of);
  }
  const u64 s = seed[r], q = request[r];
  const u32 pos = (u32)(positions[r] + 1);
  u64 win = 0;
  float bound = NEG_INF;
#pragma unroll 1
  for (int b = tid; b < (V + 3) / 4; b += T) {
    float v[4];
    bool any = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = 4 * b + e;
      v[e] = NEG_INF;
      if (i < V) {
        const u64 key = key_of(i);
        if (key != 0 && key >= low) v[e] = scaled(i);
      }
      any |= v[e] + GUMBEL_MAX > bound;
    }
    if (any) {
      const uint4 z = philox((u32)b, pos, (u32)q, (u32)(q >> 32), (u32)s, (u32)(s >> 32));
      const u32 bits[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (v[e] > NEG_INF) {
          const float x = __fadd_rn(v[e], gumbel(bits[e]));
          bound = fmaxf(bound, x);
          const u64 key = argmax_key(x, 4 * b + e);
          win = key > win ? key : win;
        }
      }
    }
  }
  win = block_max_u64(win, red);
  if (tid == 0) tokens[r] = (i32)argmax_index(win);
#endif
}
