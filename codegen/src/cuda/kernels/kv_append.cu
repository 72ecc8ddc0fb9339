// kv_append: keys and values of the step's rows into the paged cache, any element type and head size.
// Called by: attention steps with separate q, k and v whose attention kernel does not append (attention/mod.rs).
//
// Defines
//   LATHE_HKV   key heads
//   LATHE_D     head size
//   LATHE_PAGE  tokens of a cache page
// Parameters
//   const E* k               [T, HKV*D]
//   const E* v               [T, HKV*D]
//   const i32* positions     [T]
//   const i32* row_seq       [T], sequence of a row; < 0: a padding row, skipped
//   const i32* block_table   [B, max_pages]
//   E* cache                 [page][2][HKV][PAGE][D]
//   i32 max_pages            columns of block_table
// Geometry: grid = rows, block 256, smem 0.
// Why: tiles of the prefill kernel read rows of their sequence that other tiles would append.
extern "C" __global__ void __launch_bounds__(256)
LATHE_NAME(const E* k, const E* v, const i32* positions, const i32* row_seq, const i32* block_table, E* cache,
           i32 max_pages) {
  constexpr int N = LATHE_HKV * LATHE_D;
  pdl_launch();
  pdl_wait();
  const int row = blockIdx.x, seq = row_seq[row], pos = positions[row];
  if (seq < 0) return;
  const i64 page = block_table[(i64)seq * max_pages + pos / LATHE_PAGE];
  for (int i = threadIdx.x; i < 2 * N; i += 256) {
    const int kv = i / N, e = i % N;
    const i64 to = ((page * 2 + kv) * LATHE_HKV + e / LATHE_D) * LATHE_PAGE + pos % LATHE_PAGE;
    cache[to * LATHE_D + e % LATHE_D] = (kv ? v : k)[(i64)row * N + e];
  }
}
