// embed: y[t, :] = table[tokens[t], :], one row a token.
// Called by: the first step of every plan (plain.rs).
//
// Defines
//   LATHE_H  row length, a multiple of VEC
//   LATHE_V  rows of the table
// Parameters
//   const E* table       [V, H]
//   const i32* tokens    [T]
//   E* y                 [T, H]
//   i32 rows             T
// Geometry: grid = rows, block 128, smem 0.
// Why: ids outside of the table are clamped, so that padding rows cannot fault.
constexpr int H = LATHE_H;
static_assert(H % VEC == 0, "row length");

extern "C" __global__ void __launch_bounds__(128) LATHE_NAME(const E* table, const i32* tokens, E* y, i32 rows) {
  pdl_launch();
  pdl_wait();
  const i64 id = min(max(tokens[blockIdx.x], 0), LATHE_V - 1);
  for (int v = threadIdx.x; v < H / VEC; v += 128) {
    const uint4 p = ld16(table + id * H + v * VEC);
    st16(y + (i64)blockIdx.x * H + v * VEC, p);
  }
}
