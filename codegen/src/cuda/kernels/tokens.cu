// tokens: tokens[t] = sampled[-1 - tokens[t]] where tokens[t] < 0: input tokens that the host had not read yet.
// Called by: steps with such rows, first.
//
// Defines: none.
// Parameters
//   i32* tokens          [T]; -1 - i stands for the i-th token that the step before sampled
//   const i32* sampled   the tokens of the step before
//   i32 rows             T
// Geometry: grid ceil(rows / 256), block 256, smem 0.
// Why: the next step is launched before the host has read the tokens of the last one.
extern "C" __global__ void __launch_bounds__(256) LATHE_NAME(i32* tokens, const i32* sampled, i32 rows) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.x * 256 + threadIdx.x;
  if (t < rows && tokens[t] < 0) tokens[t] = sampled[-1 - tokens[t]];
}
