// rope: y[r, i] = x[r, i] c - x[r, i + D/2] s and y[r, i + D/2] = x[r, i + D/2] c + x[r, i] s, with (c, s) of the
// position of token r / HEADS: heads in natural order.
// Called by: rotations that no projection has absorbed (attention/mod.rs).
//
// Defines
//   LATHE_D      head size, even
//   LATHE_HEADS  rows of a token
// Parameters
//   const E* x               [T * HEADS, D]
//   const float* cos         [max_pos, D/2]
//   const float* sin         [max_pos, D/2]
//   const i32* positions     [T]
//   E* y                     [T * HEADS, D]
//   i32 rows                 T * HEADS
// Geometry: grid ceil(rows * D/2 / 256), block 256, smem 0.
// Why: a thread has one pair.
extern "C" __global__ void __launch_bounds__(256)
LATHE_NAME(const E* x, const float* cosv, const float* sinv, const i32* positions, E* y, i32 rows) {
  constexpr int H = LATHE_D / 2;
  pdl_launch();
  pdl_wait();
  const i64 at = (i64)blockIdx.x * 256 + threadIdx.x;
  const int i = at % H;
  const i64 row = at / H;
  if (row >= rows) return;
  const i64 p = (i64)positions[row / LATHE_HEADS] * H + i;
  const float c = cosv[p], s = sinv[p];
  const float a = to_f32(x[row * LATHE_D + i]), b = to_f32(x[row * LATHE_D + i + H]);
  y[row * LATHE_D + i] = from_f32<E>(a * c - b * s);
  y[row * LATHE_D + i + H] = from_f32<E>(b * c + a * s);
}
