// attn_decode: attention of one new token per sequence over the paged KV cache (flash decoding in one launch).
// Called by: decode plans, T = B rows, row b = sequence b at position kv_lens[b] - 1.
//
// Defines
//   LATHE_HQ, LATHE_HKV  query and KV heads, group HQ / HKV in 1..16; LATHE_D head size, multiple of 16 (power of two
//                  if QKNORM); LATHE_PAGE tokens a cache page (a multiple of 16 is faster).
//   LATHE_SCALE    f32 literal, softmax scale (1/sqrt(D) usually).
//   LATHE_SOFTCAP  f32 literal, 0.0f = none: s = cap * tanh(s / cap).   LATHE_WINDOW tokens, 0 = none: a query at
//                  position p sees positions > p - window.
//   LATHE_FUSED    0: q is roped, K and V of the new token are in the cache already (rope_append ran).
//                  1: qkv is the raw packed projection [B, (HQ + 2 HKV) D]; the kernel adds the bias (LATHE_BIAS 1),
//                  applies the q/k head norms (LATHE_QKNORM 1, LATHE_EPS), ropes q, and the CTA that holds the last
//                  tile of (sequence, kv head) ropes k and appends k and v to the cache.
//   LATHE_SPLIT    1 (with FUSED 1): q, k and v are apart and roped already: the parameters q [B, HQ*D], bias = k
//                  [B, HKV*D] and qnorm = v [B, HKV*D]; no bias, norm or tables. The kernel still appends k and v.
//   LATHE_PREFETCH 1 (with FUSED and PDL): kv_lens, block_table and older cache rows are read before
//                  griddepcontrol.wait. Only where no kernel of the same PDL chain before this one writes them (the
//                  step state advances in the last kernel of a graph). Default 0.
//   LATHE_CLUSTER  0 (default): stream-K, a fixed grid cuts all tiles into equal ranges whatever the lengths | 1, 2, 4,
//                  8: that many CTAs, one cluster, share an item (sequence, kv head) and merge through distributed
//                  shared memory: no prefix sums, no global round trip. Measured on an H100: 1..8 is faster almost
//                  everywhere; take the largest power of two <= 8 with batch * HKV * CLUSTER <= 132 (at least 1), and
//                  2 instead of 1 for contexts above 1k at 256 < batch * HKV <= 512. 0 is for few items of very unequal
//                  or very long contexts (one sequence above about 16k tokens).
//   LATHE_RAGGED   1 (with FUSED 0): row cu_seqlens[b] is the new token of sequence b; sequences with another number of
//                  new tokens than one are left out, and their rows of out are not touched.
//   LATHE_NT       16-token groups a warp takes at a time (default 1; 2 for D <= 64 and batches, with STAGES 2).
//   LATHE_STAGES   ring depth a warp, at least 2 (default 3). LATHE_MAXB largest batch of the bucket (CLUSTER 0 only).
// Parameters (unused ones may be null)
//   const E* q (FUSED: qkv), const E* bias [(HQ+2HKV)D], const E* qnorm [D], const E* knorm [D] (permuted like the
//   heads), const float* cos, const float* sin [max_pos, D/2], E* cache, const i32* block_table [B, max_pages],
//   const i32* kv_lens [B] (new token included; 0 = padding row, its output is zeros), E* out [B, HQ*D], float* ws,
//   u32* counters [B*HKV] (zeroed once at allocation, left zero), i32 batch, i32 max_pages, const i32* cu_seqlens [B+1]
//   (RAGGED). ws and counters are used by CLUSTER 0 alone.
// Geometry, bf16: block 128; CLUSTER 0: grid = any number of CTAs, fixed per bucket (2 * multiprocessors); CLUSTER > 0:
//   grid = batch * HKV * CLUSTER (cluster dims are in the source). smem = 256*STAGES*NT*D + 32*D + up16(16*GQ*(D+2)) +
//   4*D + up16(4*(MAXB+1)) + 64 + (CLUSTER > 1 ? CLUSTER*P*4 : 0), P = GQ*(D+2) rounded up to 4;
//   ws = grid * 2 * P floats, 16-byte aligned.
//   f32 (plain): block 128, grid = batch * HKV, smem = 4*GQ*D + 16*GQ*(D+2), no ws or counters.
// Parallelisation (CLUSTER 0): the 64*NT-token tiles of all (sequence, kv head) items form one list, cut into equal
// contiguous ranges, one a CTA, whatever the lengths (stream-K). Each of 4 warps owns 16*NT tokens of a tile with a
// ring of cp.async stages that runs across item boundaries, and its own online softmax; q heads of a kv head are the
// 16 rows of mma.m16n8k16. Items cut by a range border leave partial (O, m, l) in ws; the last CTA to arrive merges
// them. With CLUSTER > 1 the partials go by st.async to the first CTA of the cluster instead.
#ifndef LATHE_SOFTCAP
#define LATHE_SOFTCAP 0.0f
#endif
#ifndef LATHE_WINDOW
#define LATHE_WINDOW 0
#endif
#ifndef LATHE_FUSED
#define LATHE_FUSED 0
#endif
#ifndef LATHE_SPLIT
#define LATHE_SPLIT 0
#endif
#ifndef LATHE_BIAS
#define LATHE_BIAS 0
#endif
#ifndef LATHE_QKNORM
#define LATHE_QKNORM 0
#endif
#ifndef LATHE_EPS
#define LATHE_EPS 1e-6f
#endif
#ifndef LATHE_PREFETCH
#define LATHE_PREFETCH 0
#endif
#ifndef LATHE_STAGES
#define LATHE_STAGES 3
#endif
#ifndef LATHE_CLUSTER
#define LATHE_CLUSTER 0
#endif
#ifndef LATHE_NT
#define LATHE_NT 1
#endif
#ifndef LATHE_MAXB
#define LATHE_MAXB 1
#endif
#ifndef LATHE_RAGGED
#define LATHE_RAGGED 0
#endif

constexpr int HQ = LATHE_HQ, HKV = LATHE_HKV, D = LATHE_D, PAGE = LATHE_PAGE, GQ = HQ / HKV;
constexpr int W = 4, T = 128, NT = LATHE_NT, TOK = 16 * NT, TILE = TOK * W, S = LATHE_STAGES, CL = LATHE_CLUSTER;
constexpr int HB = D / 16;           // 16-element blocks of a head
constexpr int CH = D * (int)sizeof(E) / 16;  // 16-byte chunks of a cache row
constexpr float LOG2E = 1.4426950408889634f;
static_assert(HQ % HKV == 0 && GQ <= 16 && D % 16 == 0, "heads");
static_assert(!LATHE_RAGGED || !LATHE_FUSED, "rows of a ragged step are appended before");
static_assert(!LATHE_QKNORM || (HB & (HB - 1)) == 0, "head norm needs a power-of-two head size");

DEV i64 cache_row(int page, int kv, int h, int slot) {
  return ((((i64)page * 2 + kv) * HKV + h) * PAGE + slot) * D;
}

// Scores are kept in the log2 domain.
DEV float score(float dot) {
  float s = dot * LATHE_SCALE;
  if (LATHE_SOFTCAP > 0.0f) s = LATHE_SOFTCAP * tanhf(s / (LATHE_SOFTCAP > 0.0f ? LATHE_SOFTCAP : 1.0f));
  return s * LOG2E;
}

// Keys of sequence b, 0 if it is not for this kernel, and the row of its new token.
DEV int keys_of(const i32* kv_lens, const i32* cu_seqlens, int b) {
  return !LATHE_RAGGED || cu_seqlens[b + 1] - cu_seqlens[b] == 1 ? kv_lens[b] : 0;
}
DEV i64 row_of(const i32* cu_seqlens, int b) { return LATHE_RAGGED ? cu_seqlens[b] : b; }

// First position that the token at position len - 1 sees.
DEV int first_visible(int len) { return LATHE_WINDOW > 0 ? max(0, len - LATHE_WINDOW) : 0; }

#if LATHE_FUSED
// Heads q0..q0+GQ-1 of row b (bias, norm, rope), and with `append` the new k and v. put(head, block, values) gets
// q as head 0..GQ-1, k as GQ, v as GQ + 1. Called by all threads.
template <class Put>
DEV void prepare_heads(const E* qkv, const E* bias, const E* qnorm, const E* knorm, const float* cosv, const float* sinv,
                       int b, int h, int pos, bool append, Put put) {
  constexpr int UNITS = (GQ + 2) * HB;
  const int limit = append ? UNITS : GQ * HB;
#pragma unroll 1
  for (int base = 0; base < limit; base += T) {
    const int u = base + threadIdx.x;
    const bool on = u < limit;
    const int hh = on ? u / HB : 0, blk = on ? u % HB : 0;
    float v[16];
#if LATHE_SPLIT
    const E* from = hh < GQ ? qkv + ((i64)b * HQ + h * GQ + hh) * D : (hh == GQ ? bias : qnorm) + ((i64)b * HKV + h) * D;
    load_block16(from + blk * 16, nullptr, v);
#else
    const int head = hh < GQ ? h * GQ + hh : hh == GQ ? HQ + h : HQ + HKV + h;
    load_block16(qkv + ((i64)b * (HQ + 2 * HKV) + head) * D + blk * 16, LATHE_BIAS ? bias + head * D + blk * 16 : nullptr, v);
    float rstd = 1.0f;
#if LATHE_QKNORM
    float ss = 0.0f;
#pragma unroll
    for (int e = 0; e < 16; ++e) ss = fmaf(v[e], v[e], ss);
#pragma unroll
    for (int o = HB / 2; o; o >>= 1) ss += __shfl_xor_sync(~0u, ss, o);
    rstd = rsqrtf(ss * (1.0f / D) + LATHE_EPS);
#endif
    if (hh <= GQ) {
      const E* nw = LATHE_QKNORM ? (hh < GQ ? qnorm : knorm) + blk * 16 : nullptr;
      rope_block16(v, nw, rstd, cosv + (i64)pos * (D / 2) + blk * 8, sinv + (i64)pos * (D / 2) + blk * 8);
    }
#endif
    if (on) put(hh, blk, v);
  }
}
#endif

#if LATHE_DTYPE == 1
constexpr int up16(int b) { return (b + 15) / 16 * 16; }
constexpr int TILE_BYTES = TOK * D * 2;        // K or V tile of a warp
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
constexpr int OFF_Q = W * S * STAGE_BYTES;
constexpr int OFF_MERGE = OFF_Q + 16 * D * 2;
constexpr int OFF_NEW = OFF_MERGE + up16(W * GQ * (D + 2) * 4);
constexpr int OFF_PRE = OFF_NEW + up16(2 * D * 2);
constexpr int OFF_MISC = OFF_PRE + up16((LATHE_MAXB + 1) * 4);
constexpr int WS_ITEM = (GQ * (D + 2) + 3) / 4 * 4;  // floats of one partial: O [GQ, D], m [GQ], l [GQ]
constexpr int OFF_RECV = OFF_MISC + 64;
constexpr u32 SEND_BYTES = GQ * (D + 2) * 4;
constexpr int SW = CH % 8 == 0 ? 8 : CH % 4 == 0 ? 4 : 2;

// Byte offset of chunk c of row r in a [16][D] tile: 16-byte chunks are XORed so that ldmatrix meets no conflict.
DEV int tile_off(int r, int c) { return r * (D * 2) + (((c & ~(SW - 1)) | ((c ^ (r / (8 / SW))) & (SW - 1))) << 4); }

struct Cursor { int b, h, t, tiles, len, t0; };

#if LATHE_CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(LATHE_CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(T, 2)
LATHE_NAME(const E* q, const E* bias, const E* qnorm, const E* knorm, const float* cosv, const float* sinv, E* cache,
           const i32* block_table, const i32* kv_lens, E* out, float* ws, u32* counters, i32 batch, i32 max_pages,
           const i32* cu_seqlens) {
  extern __shared__ __align__(1024) char smem[];
  const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid >> 5, 0), lane = tid & 31;
  const u32 grid = gridDim.x, cta = blockIdx.x;
  (void)grid;
  u32* pre = reinterpret_cast<u32*>(smem + OFF_PRE);
  u32* misc = reinterpret_cast<u32*>(smem + OFF_MISC);
  float* mo = reinterpret_cast<float*>(smem + OFF_MERGE);     // [W][GQ][D]
  float* ml = mo + W * GQ * D;                                // [W][GQ] m, then [W][GQ] l
  const u32 ring = smem_addr(smem) + warp * S * STAGE_BYTES, sq = smem_addr(smem + OFF_Q);
  pdl_launch();
#if !LATHE_PREFETCH
  pdl_wait();
#endif

  auto tiles_of = [](int len) { return len > 0 ? (len + TILE - 1) / TILE - first_visible(len) / TILE : 0; };
  // Rows of sQ above the group stay zero; the others are written by other threads, without a barrier between.
  for (int i = GQ * CH + tid; i < 16 * CH; i += T) st16(smem + OFF_Q + i * 16, make_uint4(0, 0, 0, 0));
#if LATHE_CLUSTER
  const u32 rank = cta % CL, bar = smem_addr(misc);
  Cursor lc;
  lc.b = cta / CL / HKV;
  lc.h = cta / CL % HKV;
  lc.len = keys_of(kv_lens, cu_seqlens, lc.b);
  lc.tiles = tiles_of(lc.len);
  lc.t0 = first_visible(lc.len) / TILE;
  const u32 u0 = rank * lc.tiles / CL, u1 = (rank + 1) * lc.tiles / CL;
  lc.t = u0;
  const u32 active = min(lc.tiles, CL);  // CTAs of the cluster with tiles
  if (CL > 1) {
    if (rank == 0 && tid == 0) {
      mbar_init(bar, 1);
      mbar_init_fence();
    }
    // The initialisation is an instruction of the whole warp, so that tools see a race with what one lane does next.
    __syncwarp();
    if (rank == 0 && tid == 0) mbar_expect(bar, active * SEND_BYTES);
    cluster_arrive();
  }
#else
  {  // pre[b] = tiles of the sequences before b, over all kv heads.
    const int per = (batch + T - 1) / T, lo = tid * per;
    u32 own = 0;
    for (int i = lo; i < lo + per && i < batch; ++i) own += tiles_of(keys_of(kv_lens, cu_seqlens, i)) * HKV;
    u32 inc = own;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      u32 v = __shfl_up_sync(~0u, inc, o);
      if (lane >= o) inc += v;
    }
    if (lane == 31) misc[warp] = inc;
    __syncthreads();
    u32 at = inc - own;
    for (int i = 0; i < warp; ++i) at += misc[i];
    for (int i = lo; i < lo + per && i < batch; ++i) {
      pre[i] = at;
      at += tiles_of(keys_of(kv_lens, cu_seqlens, i)) * HKV;
    }
    if (tid == T - 1) pre[batch] = at;
    __syncthreads();
  }
  const u32 total = pre[batch];
  const u32 u0 = (u32)((u64)cta * total / grid), u1 = (u32)((u64)(cta + 1) * total / grid);

  auto seek = [&](u32 u) {
    int lo = 0, hi = batch - 1;  // last b with pre[b] <= u
    while (lo < hi) {
      int mid = (lo + hi + 1) >> 1;
      if (pre[mid] <= u) lo = mid; else hi = mid - 1;
    }
    Cursor c;
    c.b = lo;
    c.len = keys_of(kv_lens, cu_seqlens, lo);
    c.tiles = tiles_of(c.len);
    c.t0 = first_visible(c.len) / TILE;
    const u32 r = u - pre[lo];
    c.h = c.tiles ? r / c.tiles : 0;
    c.t = c.tiles ? r % c.tiles : 0;
    return c;
  };
  Cursor lc;
  lc.b = lc.h = lc.t = lc.len = lc.t0 = 0; lc.tiles = 1;
  if (u0 < u1) lc = seek(u0);
#endif
  auto next_item = [&](Cursor& c) {
#if !LATHE_CLUSTER
    c.t = 0;
    if (++c.h == HKV) {
      c.h = 0;
      do {
        ++c.b;
        c.len = c.b < batch ? keys_of(kv_lens, cu_seqlens, c.b) : 1;
      } while (c.len <= 0);
      c.tiles = tiles_of(c.len);
      c.t0 = first_visible(c.len) / TILE;
    }
#endif
  };
  // Pages of this warp's 16-token groups at the cursor (PAGE % 16 == 0), or anything if they lie beyond the sequence.
  int page[NT];
  auto lookup = [&](const Cursor& c) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int p = (c.t0 + c.t) * TILE + warp * TOK + n * 16;
      page[n] = (PAGE % 16 == 0 && p < c.len) ? block_table[(i64)c.b * max_pages + p / PAGE] : 0;
    }
  };
  auto load = [&](const Cursor& c, int s) {
    const int limit = c.len - LATHE_FUSED;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int p0 = (c.t0 + c.t) * TILE + warp * TOK + n * 16;
      const int at = (warp * S + s) * STAGE_BYTES + n * 16 * D * 2;
      if (p0 >= limit) {
        // Nothing to read: zeros keep 0 * V finite.
        for (int i = lane; i < 16 * CH; i += 32) {
          st16(smem + at + i * 16, make_uint4(0, 0, 0, 0));
          st16(smem + at + TILE_BYTES + i * 16, make_uint4(0, 0, 0, 0));
        }
        continue;
      }
      const u32 dst = smem_addr(smem) + at;
      const E* kbase = cache + cache_row(page[n], 0, c.h, p0 % PAGE);
#pragma unroll
      for (int i = 0; i < CH / 2; ++i) {
        const int idx = lane + 32 * i, row = idx / CH, ch = idx % CH;
        const bool ok = p0 + row < limit;
        const E* src = kbase + row * D + ch * 8;
        if (PAGE % 16 != 0) {
          const int p = ok ? p0 + row : 0;
          src = cache + cache_row(block_table[(i64)c.b * max_pages + p / PAGE], 0, c.h, p % PAGE) + ch * 8;
        }
        if (!ok) src = cache;
        const u32 off = dst + tile_off(row, ch), bytes = ok ? 16 : 0;
        cp_async16(off, src, bytes);
        cp_async16(off + TILE_BYTES, ok ? src + (i64)HKV * PAGE * D : cache, bytes);
      }
    }
  };

  u32 lu = u0;
  if (u0 < u1) lookup(lc);
  Cursor cc;
  cc = lc;
  auto load_step = [&](int s) {
    if (lu < u1) {
      load(lc, s);
      if (++lu < u1) {
        if (++lc.t == lc.tiles) next_item(lc);
        lookup(lc);
      }
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int s = 0; s < S - 1; ++s) load_step(s);
#if LATHE_PREFETCH
  pdl_wait();
#endif
  // Padding rows.
#if LATHE_CLUSTER
  if (lc.len <= 0) {
    for (int e = tid; !LATHE_RAGGED && rank == 0 && e < GQ * CH; e += T) st16(out + (i64)(cta / CL) * GQ * D + e * 8, make_uint4(0, 0, 0, 0));
    if (CL > 1) cluster_wait();
    return;
  }
#else
  for (u32 i = cta; !LATHE_RAGGED && i < (u32)batch * HKV; i += grid)
    if (kv_lens[i / HKV] <= 0)
      for (int e = tid; e < GQ * CH; e += T) st16(out + (i64)i * GQ * D + e * 8, make_uint4(0, 0, 0, 0));
  if (u0 >= u1) return;
#endif

  int stage = 0, fill = S - 1;
  u32 u = u0;
#pragma unroll 1
  while (u < u1) {
    // ---- one item, or the part of it in this CTA's range ----
    const u32 item_begin = u - cc.t, item_end = item_begin + cc.tiles;
    const u32 stop = min(item_end, u1);
    const int len = cc.len;
#if LATHE_FUSED
    const bool append = item_end <= u1;
    prepare_heads(q, bias, qnorm, knorm, cosv, sinv, cc.b, cc.h, len - 1, append, [&](int hh, int blk, const float (&v)[16]) {
      float lo[8], hi[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) { lo[e] = v[e]; hi[e] = v[e + 8]; }
      const uint4 a = pack16(lo, E()), b = pack16(hi, E());
      if (hh < GQ) {
        st16(smem + OFF_Q + tile_off(hh, 2 * blk), a);
        st16(smem + OFF_Q + tile_off(hh, 2 * blk + 1), b);
      } else {
        char* nw = smem + OFF_NEW + (hh - GQ) * D * 2 + blk * 32;
        st16(nw, a);
        st16(nw + 16, b);
        const int pos = len - 1;
        E* dst = cache + cache_row(block_table[(i64)cc.b * max_pages + pos / PAGE], hh - GQ, cc.h, pos % PAGE) + blk * 16;
        st16(dst, a);
        st16(dst + 8, b);
      }
    });
#else
    for (int i = tid; i < GQ * CH; i += T)
      st16(smem + OFF_Q + tile_off(i / CH, i % CH), ld16(q + (row_of(cu_seqlens, cc.b) * HQ + cc.h * GQ) * D + i * 8));
#endif
    __syncthreads();
    u32 qf[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ldmatrix4(qf[k], sq + tile_off(lane & 15, 2 * k + (lane >> 4)));
    float o[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    float m0 = NEG_INF, m1 = NEG_INF, l0 = 0.0f, l1 = 0.0f;
    const int visible = first_visible(len);

#pragma unroll 1
    for (; u < stop; ++u, ++cc.t) {
      cp_async_wait<S - 2>();
      __syncwarp();
      load_step(fill);
      const int p0 = (cc.t0 + cc.t) * TILE + warp * TOK;
      const u32 kt = ring + stage * STAGE_BYTES, vt = kt + TILE_BYTES;
#if LATHE_FUSED
      if (p0 < len && len <= p0 + TOK) {  // the new token is not in the cache yet
        const int r = len - 1 - p0;
        for (int i = lane; i < 2 * CH; i += 32) {
          const int kv = i / CH, ch = i % CH;
          st16(smem + (warp * S + stage) * STAGE_BYTES + kv * TILE_BYTES + tile_off(r, ch), ld16(smem + OFF_NEW + kv * D * 2 + ch * 16));
        }
        __syncwarp();
      }
#endif
      if (++stage == S) stage = 0;
      if (++fill == S) fill = 0;
      if (p0 >= len || p0 + TOK <= visible) continue;

      float s[2 * NT][4];
#pragma unroll
      for (int i = 0; i < 2 * NT; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          u32 b[4];
          ldmatrix4(b, kt + tile_off(n * 16 + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
          mma16816(s[2 * n], qf[k], b[0], b[1]);
          mma16816(s[2 * n + 1], qf[k], b[2], b[3]);
        }
      const bool edge = p0 + TOK > len || p0 < visible;
      float t0 = NEG_INF, t1 = NEG_INF;
#pragma unroll
      for (int i = 0; i < 2 * NT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[i][e] = score(s[i][e]);
          if (edge) {
            const int p = p0 + 8 * i + 2 * (lane & 3) + (e & 1);
            if (p >= len || p < visible) s[i][e] = NEG_INF;
          }
        }
        t0 = fmaxf(t0, fmaxf(s[i][0], s[i][1]));
        t1 = fmaxf(t1, fmaxf(s[i][2], s[i][3]));
      }
#pragma unroll
      for (int w = 1; w <= 2; w <<= 1) {
        t0 = fmaxf(t0, __shfl_xor_sync(~0u, t0, w));
        t1 = fmaxf(t1, __shfl_xor_sync(~0u, t1, w));
      }
      if (__any_sync(~0u, t0 > m0 || t1 > m1)) {
        // At least one token of the tile is visible, so the new maxima are finite.
        const float n0 = fmaxf(m0, t0), n1 = fmaxf(m1, t1);
        const float a0 = exp2_approx(m0 - n0), a1 = exp2_approx(m1 - n1);
        m0 = n0; m1 = n1;
        l0 *= a0; l1 *= a1;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) { o[i][0] *= a0; o[i][1] *= a0; o[i][2] *= a1; o[i][3] *= a1; }
      }
#pragma unroll
      for (int i = 0; i < 2 * NT; ++i) {
        s[i][0] = exp2_approx(s[i][0] - m0); s[i][1] = exp2_approx(s[i][1] - m0);
        s[i][2] = exp2_approx(s[i][2] - m1); s[i][3] = exp2_approx(s[i][3] - m1);
        l0 += s[i][0] + s[i][1];
        l1 += s[i][2] + s[i][3];
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        u32 p[4];
        p[0] = pack_bf16(s[2 * n][0], s[2 * n][1]); p[1] = pack_bf16(s[2 * n][2], s[2 * n][3]);
        p[2] = pack_bf16(s[2 * n + 1][0], s[2 * n + 1][1]); p[3] = pack_bf16(s[2 * n + 1][2], s[2 * n + 1][3]);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
          u32 b[4];
          ldmatrix4_trans(b, vt + tile_off(n * 16 + (lane & 15), 2 * j + (lane >> 4)));
          mma16816(o[2 * j], p, b[0], b[1]);
          mma16816(o[2 * j + 1], p, b[2], b[3]);
        }
      }
    }

    // ---- merge the 4 warps ----
#pragma unroll
    for (int w = 1; w <= 2; w <<= 1) {
      l0 += __shfl_xor_sync(~0u, l0, w);
      l1 += __shfl_xor_sync(~0u, l1, w);
    }
    const int g = lane >> 2, t2 = 2 * (lane & 3);
    if (g < GQ) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) *reinterpret_cast<float2*>(mo + (warp * GQ + g) * D + i * 8 + t2) = make_float2(o[i][0], o[i][1]);
      if (t2 == 0) { ml[warp * GQ + g] = m0; ml[(W + warp) * GQ + g] = l0; }
    }
    if (g + 8 < GQ) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) *reinterpret_cast<float2*>(mo + (warp * GQ + g + 8) * D + i * 8 + t2) = make_float2(o[i][2], o[i][3]);
      if (t2 == 0) { ml[warp * GQ + g + 8] = m1; ml[(W + warp) * GQ + g + 8] = l1; }
    }
    __syncthreads();
    const bool whole = item_begin >= u0 && item_end <= u1;
#if LATHE_CLUSTER
    if (CL > 1 && !whole) cluster_wait();  // the receiver's barrier is initialised
    const u32 recv = CL > 1 ? map_rank(smem_addr(smem + OFF_RECV) + rank * WS_ITEM * 4, 0) : 0, rbar = CL > 1 ? map_rank(bar, 0) : 0;
#else
    float* part = ws + (i64)(cta * 2 + (item_begin >= u0 ? 1 : 0)) * WS_ITEM;
#endif
    E* dst = out + (row_of(cu_seqlens, cc.b) * HQ + cc.h * GQ) * D;
    for (int i = tid; i < GQ * D / 4; i += T) {
      const int r = i / (D / 4);
      float m = ml[r];
#pragma unroll
      for (int w = 1; w < W; ++w) m = fmaxf(m, ml[w * GQ + r]);
      float4 a = make_float4(0, 0, 0, 0);
      float l = 0.0f;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        // A warp without visible tokens has m = -inf, l = 0, O = 0; a range without any keeps m = -inf.
        const float f = m == NEG_INF ? 0.0f : exp2_approx(ml[w * GQ + r] - m);
        const float4 v = *reinterpret_cast<const float4*>(mo + w * GQ * D + i * 4);
        a.x = fmaf(v.x, f, a.x); a.y = fmaf(v.y, f, a.y); a.z = fmaf(v.z, f, a.z); a.w = fmaf(v.w, f, a.w);
        l = fmaf(ml[(W + w) * GQ + r], f, l);
      }
      if (whole) {
        const float inv = 1.0f / l;
        *reinterpret_cast<uint2*>(dst + i * 4) = make_uint2(pack_bf16(a.x * inv, a.y * inv), pack_bf16(a.z * inv, a.w * inv));
      } else {
#if LATHE_CLUSTER
        st_async4(recv + i * 16, a, rbar);
        if (i % (D / 4) == 0) {
          st_async(recv + (GQ * D + r) * 4, m, rbar);
          st_async(recv + (GQ * D + GQ + r) * 4, l, rbar);
        }
#else
        *reinterpret_cast<float4*>(part + i * 4) = a;
        if (i % (D / 4) == 0) { part[GQ * D + r] = m; part[GQ * D + GQ + r] = l; }
#endif
      }
    }
#if !LATHE_CLUSTER
    if (!whole) {
      __threadfence();
      __syncthreads();
      const u32 c0 = (u32)(((u64)(item_begin + 1) * grid - 1) / total), c1 = (u32)(((u64)item_end * grid - 1) / total);
      if (tid == 0) {
        u32* counter = counters + cc.b * HKV + cc.h;
        // Ranges are never empty here: total > grid, or every range holds at most one tile.
        u32 n = 0;
        if (total >= grid) n = c1 - c0 + 1;
        else n = item_end - item_begin;
        const bool last = atomicAdd(counter, 1u) == n - 1;
        if (last) *counter = 0;
        misc[0] = last;
      }
      __syncthreads();
      if (misc[0]) {
        __threadfence();
        for (int i = tid; i < GQ * D / 4; i += T) {
          const int r = i / (D / 4);
          float m = NEG_INF, l = 0.0f;
          float4 a = make_float4(0, 0, 0, 0);
          constexpr int B = 8;
          const u32 n = total >= grid ? c1 - c0 + 1 : item_end - item_begin;
          for (u32 c = 0; c < n; c += B) {
            float4 v[B];
            float vm[B], vl[B];
#pragma unroll
            for (int k = 0; k < B; ++k) {
              const bool on = c + k < n;
              // Tile-granular ranges when there are fewer tiles than CTAs: skip the empty CTAs between.
              const u32 ci = total >= grid ? c0 + c + k : (u32)(((u64)(item_begin + c + k + 1) * grid - 1) / total);
              const u32 begin = (u32)((u64)ci * total / grid);
              const float* p = ws + (i64)(ci * 2 + (item_begin >= begin ? 1 : 0)) * WS_ITEM;
              vm[k] = on ? ld_cg(p + GQ * D + r) : NEG_INF;
              vl[k] = on ? ld_cg(p + GQ * D + GQ + r) : 0.0f;
              v[k] = on ? ld_cg4(p + i * 4) : make_float4(0, 0, 0, 0);
            }
            float mm = m;
#pragma unroll
            for (int k = 0; k < B; ++k) mm = fmaxf(mm, vm[k]);
            if (mm == NEG_INF) continue;
            const float f0 = exp2_approx(m - mm);
            a.x *= f0; a.y *= f0; a.z *= f0; a.w *= f0; l *= f0;
#pragma unroll
            for (int k = 0; k < B; ++k) {
              const float f = exp2_approx(vm[k] - mm);
              a.x = fmaf(v[k].x, f, a.x); a.y = fmaf(v[k].y, f, a.y); a.z = fmaf(v[k].z, f, a.z); a.w = fmaf(v[k].w, f, a.w);
              l = fmaf(vl[k], f, l);
            }
            m = mm;
          }
          const float inv = 1.0f / l;
          *reinterpret_cast<uint2*>(dst + i * 4) = make_uint2(pack_bf16(a.x * inv, a.y * inv), pack_bf16(a.z * inv, a.w * inv));
        }
      }
    }
    __syncthreads();
    if (u < u1) next_item(cc);
#endif
  }
#if LATHE_CLUSTER > 1
  // An item of one tile is whole in its CTA; otherwise the first CTA of the cluster merges. Every CTA waits once.
  const bool shared = active > 1;
  if (u0 >= u1 || !shared) cluster_wait();
  if (rank == 0 && shared) {
    mbar_wait_cluster(bar, 0);
    const float* recv = reinterpret_cast<const float*>(smem + OFF_RECV);
    for (int i = tid; i < GQ * D / 4; i += T) {
      const int r = i / (D / 4);
      float m = NEG_INF;
      for (u32 k = 0; k < CL; ++k)
        if (k * lc.tiles / CL < (k + 1) * lc.tiles / CL) m = fmaxf(m, recv[k * WS_ITEM + GQ * D + r]);
      float4 a = make_float4(0, 0, 0, 0);
      float l = 0.0f;
      for (u32 k = 0; k < CL; ++k)
        if (k * lc.tiles / CL < (k + 1) * lc.tiles / CL) {
          const float f = exp2_approx(recv[k * WS_ITEM + GQ * D + r] - m);
          const float4 v = *reinterpret_cast<const float4*>(recv + k * WS_ITEM + i * 4);
          a.x = fmaf(v.x, f, a.x); a.y = fmaf(v.y, f, a.y); a.z = fmaf(v.z, f, a.z); a.w = fmaf(v.w, f, a.w);
          l = fmaf(recv[k * WS_ITEM + GQ * D + GQ + r], f, l);
        }
      const float inv = 1.0f / l;
      *reinterpret_cast<uint2*>(out + (row_of(cu_seqlens, lc.b) * HQ + lc.h * GQ) * D + i * 4) = make_uint2(pack_bf16(a.x * inv, a.y * inv), pack_bf16(a.z * inv, a.w * inv));
    }
  }
#endif
  cp_async_wait<0>();
}

#else  // plain path: one CTA a (sequence, kv head), one warp a token, any E

extern "C" __global__ void __launch_bounds__(T)
LATHE_NAME(const E* q, const E* bias, const E* qnorm, const E* knorm, const float* cosv, const float* sinv, E* cache,
           const i32* block_table, const i32* kv_lens, E* out, float* ws, u32* counters, i32 batch, i32 max_pages,
           const i32* cu_seqlens) {
  extern __shared__ __align__(1024) char smem[];
  constexpr int EL = (D + 31) / 32;
  float* sq = reinterpret_cast<float*>(smem);   // [GQ][D]
  float* mo = sq + GQ * D;                      // [W][GQ][D]
  float* ml = mo + W * GQ * D;                  // [W][GQ] m, then l
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int b = blockIdx.x / HKV, h = blockIdx.x % HKV;
  pdl_launch();
  pdl_wait();
  const int len = kv_lens[b];
  E* dst = out + ((i64)b * HQ + h * GQ) * D;
  if (len <= 0) {
    for (int i = tid; i < GQ * D; i += T) dst[i] = from_f32<E>(0.0f);
    return;
  }
#if LATHE_FUSED
  prepare_heads(q, bias, qnorm, knorm, cosv, sinv, b, h, len - 1, true, [&](int hh, int blk, const float (&v)[16]) {
    if (hh < GQ) {
#pragma unroll
      for (int e = 0; e < 16; ++e) sq[hh * D + blk * 16 + e] = round_to<E>(v[e]);
    } else {
      const int pos = len - 1;
      store_block16(cache + cache_row(block_table[(i64)b * max_pages + pos / PAGE], hh - GQ, h, pos % PAGE) + blk * 16, v);
    }
  });
#else
  for (int i = tid; i < GQ * D; i += T) sq[i] = to_f32(q[((i64)b * HQ + h * GQ) * D + i]);
#endif
  __syncthreads();
  float m[GQ], l[GQ], o[GQ][EL];
#pragma unroll
  for (int r = 0; r < GQ; ++r) {
    m[r] = NEG_INF;
    l[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < EL; ++j) o[r][j] = 0.0f;
  }
#pragma unroll 1
  for (int p = first_visible(len) + warp; p < len; p += W) {
    const int page = block_table[(i64)b * max_pages + p / PAGE];
    const E* kr = cache + cache_row(page, 0, h, p % PAGE);
    const E* vr = cache + cache_row(page, 1, h, p % PAGE);
    float kf[EL], vf[EL];
#pragma unroll
    for (int j = 0; j < EL; ++j) {
      const int e = lane + 32 * j;
      kf[j] = e < D ? to_f32(kr[e]) : 0.0f;
      vf[j] = e < D ? to_f32(vr[e]) : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < GQ; ++r) {
      float d = 0.0f;
#pragma unroll
      for (int j = 0; j < EL; ++j) {
        const int e = lane + 32 * j;
        if (e < D) d = fmaf(sq[r * D + e], kf[j], d);
      }
      const float s = score(warp_sum(d)), n = fmaxf(m[r], s), a = exp2f(m[r] - n), w = exp2f(s - n);
      m[r] = n;
      l[r] = l[r] * a + w;
#pragma unroll
      for (int j = 0; j < EL; ++j) o[r][j] = o[r][j] * a + w * vf[j];
    }
  }
#pragma unroll
  for (int r = 0; r < GQ; ++r) {
#pragma unroll
    for (int j = 0; j < EL; ++j)
      if (lane + 32 * j < D) mo[(warp * GQ + r) * D + lane + 32 * j] = o[r][j];
    if (lane == 0) { ml[warp * GQ + r] = m[r]; ml[(W + warp) * GQ + r] = l[r]; }
  }
  __syncthreads();
  for (int i = tid; i < GQ * D; i += T) {
    const int r = i / D;
    float mm = NEG_INF, ll = 0.0f, a = 0.0f;
    for (int w = 0; w < W; ++w) mm = fmaxf(mm, ml[w * GQ + r]);
    for (int w = 0; w < W; ++w) {
      const float f = exp2f(ml[w * GQ + r] - mm);
      a = fmaf(mo[w * GQ * D + i], f, a);
      ll = fmaf(ml[(W + w) * GQ + r], f, ll);
    }
    dst[i] = from_f32<E>(a / ll);
  }
}
#endif
