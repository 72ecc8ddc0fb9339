// attn_plain: out = softmax(scale * q . k^T) . v, causal, of ragged rows over the paged KV cache.
// Called by: attention steps of element types and heads that no other kernel takes, the unfused spelling, and as the
// reference of the fast kernels (attention/mod.rs).
//
// Defines
//   LATHE_HQ       query heads
//   LATHE_HKV      key heads
//   LATHE_D        head size, up to 256
//   LATHE_PAGE     tokens of a cache page
//   LATHE_SCALE    f32, factor of the scores
//   LATHE_SOFTCAP  f32, s = cap * tanh(s / cap); 0.0f: none
//   LATHE_WINDOW   positions that a query sees, its own among them; 0: all
//   LATHE_APPEND   1: the kernel puts the step's keys and values into the cache; default 0: they are there
// Parameters
//   const E* q               [T, HQ*D], roped
//   E* cache                 [page][2][HKV][PAGE][D]
//   const i32* positions     [T]
//   const i32* row_seq       [T], sequence of a row; < 0: a padding row, whose output is zeros
//   const i32* block_table   [B, max_pages]
//   E* out                   [T, HQ*D]
//   i32 max_pages            columns of block_table
//   const E* k               [T, HKV*D], APPEND only
//   const E* v               [T, HKV*D], APPEND only
//   const i32* cu_seqlens    [B + 1], APPEND only
// Geometry: grid (rows, HQ), block 128, smem 0.
// Why: a warp takes every fourth key with its own online softmax, and the four are merged at the end. With APPEND
// keys and values of the step are read from k and v, so that no block needs what another one writes; the rows of a
// sequence are at consecutive positions.
#ifndef LATHE_APPEND
#define LATHE_APPEND 0
#endif
constexpr int HQ = LATHE_HQ, HKV = LATHE_HKV, D = LATHE_D, PAGE = LATHE_PAGE, EL = (D + 31) / 32;
static_assert(HQ % HKV == 0 && D <= 256, "heads");

extern "C" __global__ void __launch_bounds__(128)
LATHE_NAME(const E* q, E* cache, const i32* positions, const i32* row_seq, const i32* block_table, E* out,
           i32 max_pages
#if LATHE_APPEND
           , const E* k, const E* v, const i32* cu_seqlens
#endif
) {
  __shared__ float mo[4][D], ml[2][4];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int row = blockIdx.x, head = blockIdx.y, h = head / (HQ / HKV);
  pdl_launch();
  pdl_wait();
  const int seq = row_seq[row], pos = positions[row];
  const i64 at = ((i64)row * HQ + head) * D;
  if (seq < 0) {
    for (int i = tid; i < D; i += 128) out[at + i] = from_f32<E>(0.0f);
    return;
  }
#if LATHE_APPEND
  const int fresh = pos - (row - cu_seqlens[seq]);  // position of the sequence's first row in this step
  if (head % (HQ / HKV) == 0) {
    const i64 page = block_table[(i64)seq * max_pages + pos / PAGE];
    E* to = cache + ((page * 2 * HKV + h) * PAGE + pos % PAGE) * D;
    const i64 from = ((i64)row * HKV + h) * D;
    for (int i = tid; i < D; i += 128) {
      to[i] = k[from + i];
      to[(i64)HKV * PAGE * D + i] = v[from + i];
    }
  }
#endif
  float qf[EL], o[EL], m = NEG_INF, l = 0.0f;
#pragma unroll
  for (int j = 0; j < EL; ++j) {
    const int e = lane + 32 * j;
    qf[j] = e < D ? to_f32(q[at + e]) : 0.0f;
    o[j] = 0.0f;
  }
  const int first = LATHE_WINDOW > 0 ? max(0, pos - LATHE_WINDOW + 1) : 0;
  for (int p = first + warp; p <= pos; p += 4) {
    const i64 page = block_table[(i64)seq * max_pages + p / PAGE];
    const E* kr = cache + ((page * 2 * HKV + h) * PAGE + p % PAGE) * D;
    const E* vr = kr + (i64)HKV * PAGE * D;
#if LATHE_APPEND
    if (p >= fresh) {
      const i64 from = ((i64)(row - (pos - p)) * HKV + h) * D;
      kr = k + from;
      vr = v + from;
    }
#endif
    float d = 0.0f;
#pragma unroll
    for (int j = 0; j < EL; ++j) {
      const int e = lane + 32 * j;
      if (e < D) d = fmaf(qf[j], to_f32(kr[e]), d);
    }
    float s = warp_sum(d) * LATHE_SCALE;
    if (LATHE_SOFTCAP > 0.0f) s = LATHE_SOFTCAP * tanhf(s / (LATHE_SOFTCAP > 0.0f ? LATHE_SOFTCAP : 1.0f));
    const float n = fmaxf(m, s), a = expf(m - n), w = expf(s - n);
    m = n;
    l = l * a + w;
#pragma unroll
    for (int j = 0; j < EL; ++j) {
      const int e = lane + 32 * j;
      if (e < D) o[j] = o[j] * a + w * to_f32(vr[e]);
    }
  }
#pragma unroll
  for (int j = 0; j < EL; ++j)
    if (lane + 32 * j < D) mo[warp][lane + 32 * j] = o[j];
  if (lane == 0) { ml[0][warp] = m; ml[1][warp] = l; }
  __syncthreads();
  for (int i = tid; i < D; i += 128) {
    float mm = NEG_INF, ll = 0.0f, a = 0.0f;
    for (int w = 0; w < 4; ++w) mm = fmaxf(mm, ml[0][w]);
    for (int w = 0; w < 4; ++w) {
      const float f = expf(ml[0][w] - mm);
      a = fmaf(mo[w][i], f, a);
      ll = fmaf(ml[1][w], f, ll);
    }
    out[at + i] = from_f32<E>(a / ll);
  }
}
