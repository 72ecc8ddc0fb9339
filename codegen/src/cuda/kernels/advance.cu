// advance: step state of B decoding sequences moves on by one token, on the device, so that a CUDA graph of the whole
// step can be replayed without host work: tokens := sampled, positions + 1, kv_lens + 1, token appended to a ring.
// Called by: the last kernel of a decode graph.
//
// Defines: LATHE_RING_LEN steps in the token ring (0: no ring).
// Parameters: const i32* sampled [B], i32* tokens [B], i32* positions [B], i32* kv_lens [B] (0 = padding row, left
//   alone), i32* ring [RING_LEN, B], u32* step [1], i32 batch. Token of step s of sequence b: ring[s % RING_LEN, b].
// Geometry: grid 1, block 256, smem 0.
#ifndef LATHE_RING_LEN
#define LATHE_RING_LEN 0
#endif
extern "C" __global__ void __launch_bounds__(256)
LATHE_NAME(const i32* sampled, i32* tokens, i32* positions, i32* kv_lens, i32* ring, u32* step, i32 batch) {
  pdl_launch();
  pdl_wait();
  const u32 s = LATHE_RING_LEN ? *step : 0;
  for (int b = threadIdx.x; b < batch; b += 256) {
    const i32 token = sampled[b];
    if (kv_lens[b] > 0) {
      tokens[b] = token;
      positions[b] += 1;
      kv_lens[b] += 1;
    }
#if LATHE_RING_LEN
    ring[(i64)(s % LATHE_RING_LEN) * batch + b] = token;
#endif
  }
#if LATHE_RING_LEN
  __syncthreads();
  if (threadIdx.x == 0) *step = s + 1;
#endif
}
