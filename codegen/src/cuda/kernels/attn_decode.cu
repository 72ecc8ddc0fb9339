// attn_decode: out = softmax(scale * q . k^T) . v of one new token a sequence over the paged KV cache.
// Called by: attention of decode steps, and of the decode rows of mixed steps (attention/mod.rs).
//
// Defines
//   LATHE_HQ        query heads; the group HQ / HKV is 1..16
//   LATHE_HKV       key heads
//   LATHE_D         head size, a multiple of 16
//   LATHE_PAGE      tokens of a cache page; multiples of 16 are faster
//   LATHE_SCALE     f32, factor of the scores
//   LATHE_SOFTCAP   f32, s = cap * tanh(s / cap); 0.0f: none
//   LATHE_WINDOW    positions that a query sees, its own among them; 0: all
//   LATHE_FUSED     1: the kernel rotates q and k and appends k and v | 0: q is roped, k and v are in the cache
//   LATHE_SPLIT     1: q, k and v are apart and roped; the kernel appends k and v; default 0: a packed row
//   LATHE_QKNORM    1: RMS norm of each q and k head (FUSED); default 0
//   LATHE_EPS       f32, added to the mean square of a head (QKNORM)
//   LATHE_RAGGED    1: sequence b has row cu_seqlens[b], and only sequences with one new row are computed | 0: row b
//   LATHE_CLUSTER   CTAs of one cluster that share a (sequence, kv head): 1, 2, 4 or 8 (bf16)
//   LATHE_NT        16-token groups that a warp takes at a time (bf16)
//   LATHE_STAGES    tiles in a warp's ring, at least 2 (bf16)
//   LATHE_PREFETCH  1: lengths, pages and older cache rows are read before griddepcontrol.wait (bf16, FUSED) | 0
// Parameters (those without use are null)
//   const E* q               [B, HQ*D]; FUSED without SPLIT: qkv [B, (HQ + 2 HKV) D]
//   const E* bias            SPLIT: k [B, HKV*D]
//   const E* qnorm           [D], weights of the q heads' norm in the order of an interleaved head; SPLIT: v [B, HKV*D]
//   const E* knorm           [D], likewise of the k heads
//   const float* cos         [max_pos, D/2]
//   const float* sin         [max_pos, D/2]
//   E* cache                 [page][2][HKV][PAGE][D]
//   const i32* block_table   [B, max_pages]
//   const i32* kv_lens       [B], the new token included; 0: a padding row, whose output is zeros
//   E* out                   [B, HQ*D]
//   float* ws                null
//   u32* counters            null
//   i32 batch                B
//   i32 max_pages            columns of block_table
//   const i32* cu_seqlens    [B + 1] (RAGGED)
// Geometry, bf16: grid = batch * HKV * CLUSTER, block 128, cluster dimensions in the source, GQ = HQ / HKV,
//   smem = 256 * STAGES * NT * D + 32 * D + up16(16 * GQ * (D + 2)) + 4 * D + 16 + 64
//          + (CLUSTER > 1 ? CLUSTER * P * 4 : 0), P = GQ * (D + 2) rounded up to 4
// Geometry, other types: grid = batch * HKV, block 128, smem = 4 * GQ * D + 16 * GQ * (D + 2)
//
// Why: a cluster shares the tokens of an item and merges through distributed shared memory: no prefix sums, no
// global round trip. Measured on an H100, the largest power of two <= 8 with batch * HKV * CLUSTER <=
// multiprocessors is best almost everywhere. Each of 4 warps owns 16 * NT tokens of a tile, with its own ring of
// cp.async and its own online softmax. The q heads of a kv head are the 16 rows of mma.m16n8k16. The CTA with the
// last tile of an item appends. PREFETCH is right only where no kernel of the same PDL chain before this one writes
// lengths, pages or older rows: the step state is written by copies before the step.
#ifndef LATHE_SPLIT
#define LATHE_SPLIT 0
#endif
#ifndef LATHE_QKNORM
#define LATHE_QKNORM 0
#endif

constexpr int HQ = LATHE_HQ, HKV = LATHE_HKV, D = LATHE_D, PAGE = LATHE_PAGE, GQ = HQ / HKV;
constexpr int W = 4, T = 128;
constexpr int HB = D / 16;           // 16-element blocks of a head
constexpr int CH = D * (int)sizeof(E) / 16;  // 16-byte chunks of a cache row
constexpr float LOG2E = 1.4426950408889634f;
static_assert(HQ % HKV == 0 && GQ <= 16 && D % 16 == 0, "heads");
static_assert(!LATHE_RAGGED || !LATHE_FUSED, "rows of a ragged step are appended before");

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
  // With a norm the lanes of a head are a power of two, so that they can be added up by shuffles: some have no block.
  constexpr int BL = !LATHE_QKNORM || HB <= 1 ? HB : HB <= 2 ? 2 : HB <= 4 ? 4 : HB <= 8 ? 8 : 16;
  constexpr int UNITS = (GQ + 2) * BL;
  const int limit = append ? UNITS : GQ * BL;
#pragma unroll 1
  for (int base = 0; base < limit; base += T) {
    const int u = base + threadIdx.x;
    const bool on = u < limit && (BL == HB || u % BL < HB);
    const int hh = on ? u / BL : 0, blk = on ? u % BL : 0;
    float v[16];
#if LATHE_SPLIT
    const E* from = hh < GQ ? qkv + ((i64)b * HQ + h * GQ + hh) * D : (hh == GQ ? bias : qnorm) + ((i64)b * HKV + h) * D;
    load_block16(from + blk * 16, nullptr, v);
#else
    const int head = hh < GQ ? h * GQ + hh : hh == GQ ? HQ + h : HQ + HKV + h;
    load_block16(qkv + ((i64)b * (HQ + 2 * HKV) + head) * D + blk * 16, nullptr, v);
    float rstd = 1.0f;
#if LATHE_QKNORM
    float ss = 0.0f;
#pragma unroll
    for (int e = 0; e < 16; ++e) ss = fmaf(v[e], v[e], ss);
    if (BL != HB && !on) ss = 0.0f;
#pragma unroll
    for (int o = BL / 2; o; o >>= 1) ss += __shfl_xor_sync(~0u, ss, o);
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
constexpr int NT = LATHE_NT, TOK = 16 * NT, TILE = TOK * W, S = LATHE_STAGES, CL = LATHE_CLUSTER;
constexpr int up16(int b) { return (b + 15) / 16 * 16; }
constexpr int TILE_BYTES = TOK * D * 2;        // K or V tile of a warp
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
constexpr int OFF_Q = W * S * STAGE_BYTES;
constexpr int OFF_MERGE = OFF_Q + 16 * D * 2;
constexpr int OFF_NEW = OFF_MERGE + up16(W * GQ * (D + 2) * 4);
constexpr int OFF_MISC = OFF_NEW + up16(2 * D * 2) + 16;
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
  const u32 cta = blockIdx.x;
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
        ++lc.t;
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
  if (lc.len <= 0) {
    for (int e = tid; !LATHE_RAGGED && rank == 0 && e < GQ * CH; e += T) st16(out + (i64)(cta / CL) * GQ * D + e * 8, make_uint4(0, 0, 0, 0));
    if (CL > 1) cluster_wait();
    return;
  }

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
    if (CL > 1 && !whole) cluster_wait();  // the receiver's barrier is initialised
    const u32 recv = CL > 1 ? map_rank(smem_addr(smem + OFF_RECV) + rank * WS_ITEM * 4, 0) : 0, rbar = CL > 1 ? map_rank(bar, 0) : 0;
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
        st_async4(recv + i * 16, a, rbar);
        if (i % (D / 4) == 0) {
          st_async(recv + (GQ * D + r) * 4, m, rbar);
          st_async(recv + (GQ * D + GQ + r) * 4, l, rbar);
        }
      }
    }
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
