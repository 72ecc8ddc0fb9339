// embed: y[t, :] = table[tokens[t], :], one row a token.
// Called by: the first step of every plan.
//
// Defines: LATHE_H row length (multiple of VEC), LATHE_V rows of the table (ids outside are clamped, so that padding
//   rows cannot fault), LATHE_MAP(v) f32 expression on each element (default: copied as is; Gemma: v * scale).
// Parameters: const E* table [V,H], const i32* tokens [T], E* y [T,H], i32 rows.
// Geometry: grid = rows, block 128, smem 0.
constexpr int H = LATHE_H;
static_assert(H % VEC == 0, "row length");

extern "C" __global__ void __launch_bounds__(128) LATHE_NAME(const E* table, const i32* tokens, E* y, i32 rows) {
  pdl_launch();
  pdl_wait();
  const i64 id = min(max(tokens[blockIdx.x], 0), LATHE_V - 1);
  for (int v = threadIdx.x; v < H / VEC; v += 128) {
    uint4 p = ld16(table + id * H + v * VEC);
#ifdef LATHE_MAP
    float f[VEC];
    unpack16(p, f, E());
#pragma unroll
    for (int e = 0; e < VEC; ++e) f[e] = LATHE_MAP(f[e]);
    p = pack16(f, E());
#endif
    st16(y + (i64)blockIdx.x * H + v * VEC, p);
  }
}
