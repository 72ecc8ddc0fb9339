// rope_append: packed qkv [T, (HQ + 2 HKV) D] -> roped q [T, HQ*D], and k, v into the paged cache.
// Called by: attention steps of packed projections whose attention kernel does not append (attention/mod.rs).
//
// Defines
//   LATHE_HQ      query heads
//   LATHE_HKV     key heads
//   LATHE_D       head size, with QKNORM or ROPE a multiple of 16
//   LATHE_PAGE    tokens of a cache page
//   LATHE_QKNORM  1: RMS norm of each q and k head over D; default 0
//   LATHE_EPS     f32, added to the mean square of a head (QKNORM)
//   LATHE_ROPE    1: q and k are rotated | 0: rows are only split and appended
// Parameters
//   const E* qkv             [T, (HQ + 2 HKV) D]
//   const E* bias            null
//   const E* qnorm           [D], weights of the q heads' norm in the order of an interleaved head (QKNORM), else null
//   const E* knorm           [D], likewise of the k heads
//   const float* cos         [max_pos, D/2] (ROPE), else null
//   const float* sin         [max_pos, D/2] (ROPE), else null
//   const i32* positions     [T]
//   const i32* row_seq       [T], sequence of a row; < 0: a padding row, only q is written
//   const i32* block_table   [B, max_pages]
//   E* q                     [T, HQ*D]
//   E* cache                 [page][2][HKV][PAGE][D]
//   i32 rows                 T
//   i32 max_pages            columns of block_table
// Geometry: grid (rows, ceil((HQ + 2 HKV) * BL / 256)) with BL = ceil(D/16) rounded up to a power of two, block 256,
// smem 0.
// Why: a thread owns one 16-element block of a head, that is 8 pairs that rotate together, as interleaved heads have
// them side by side.
#ifndef LATHE_QKNORM
#define LATHE_QKNORM 0
#endif
constexpr int HQ = LATHE_HQ, HKV = LATHE_HKV, D = LATHE_D, PAGE = LATHE_PAGE, HB = (D + 15) / 16;
constexpr int BL = HB <= 1 ? 1 : HB <= 2 ? 2 : HB <= 4 ? 4 : HB <= 8 ? 8 : HB <= 16 ? 16 : 32;
static_assert((D % 16 == 0 || !(LATHE_QKNORM || LATHE_ROPE)) && HB <= 32, "head size");

// A block of a head; the last one may be short, and none of them then lies on a 16-byte boundary.
DEV void load_part(const E* src, int left, float (&v)[16]) {
  if constexpr (D % 16 == 0) load_block16(src, nullptr, v);
  else
    for (int e = 0; e < 16 && e < left; ++e) v[e] = to_f32(src[e]);
}
DEV void store_part(E* dst, int left, const float (&v)[16]) {
  if constexpr (D % 16 == 0) store_block16(dst, v);
  else
    for (int e = 0; e < 16 && e < left; ++e) dst[e] = from_f32<E>(v[e]);
}

extern "C" __global__ void __launch_bounds__(256)
LATHE_NAME(const E* qkv, const E* bias, const E* qnorm, const E* knorm, const float* cosv, const float* sinv,
           const i32* positions, const i32* row_seq, const i32* block_table, E* q, E* cache, i32 rows, i32 max_pages) {
  pdl_launch();
  pdl_wait();
  const int row = blockIdx.x, unit = blockIdx.y * 256 + threadIdx.x;
  const int head = unit / BL, blk = unit % BL;
  const bool on = head < HQ + 2 * HKV && blk < HB;
  float v[16];
#pragma unroll
  for (int e = 0; e < 16; ++e) v[e] = 0.0f;
  const int left = D - blk * 16;
  if (on) load_part(qkv + ((i64)row * (HQ + 2 * HKV) + head) * D + blk * 16, left, v);
  float rstd = 1.0f;
#if LATHE_QKNORM
  float ss = 0.0f;
#pragma unroll
  for (int e = 0; e < 16; ++e) ss = fmaf(v[e], v[e], ss);
#pragma unroll
  for (int o = BL / 2; o; o >>= 1) ss += __shfl_xor_sync(~0u, ss, o);
  rstd = rsqrtf(ss * (1.0f / D) + LATHE_EPS);
#endif
  if (!on) return;
  const int pos = positions[row], seq = row_seq[row];
  if (head < HQ + HKV) {
    const E* nw = LATHE_QKNORM ? (head < HQ ? qnorm : knorm) + blk * 16 : nullptr;
    const i64 at = (i64)pos * (D / 2) + blk * 8;
    rope_block16(v, nw, rstd, LATHE_ROPE ? cosv + at : nullptr, LATHE_ROPE ? sinv + at : nullptr);
  }
  if (head < HQ) {
    store_part(q + ((i64)row * HQ + head) * D + blk * 16, left, v);
  } else if (seq >= 0) {
    const int kv = head >= HQ + HKV, h = head - HQ - kv * HKV;
    const i64 page = block_table[(i64)seq * max_pages + pos / PAGE];
    store_part(cache + (((page * 2 + kv) * HKV + h) * PAGE + pos % PAGE) * D + blk * 16, left, v);
  }
}
