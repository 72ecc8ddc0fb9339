// tokens: input tokens that the host had not read yet: tokens[t] = -1 - i becomes the i-th token sampled by the step
// before.
// Called by: steps with such rows, first.
//
// Defines: none. Parameters: i32* tokens [T], const i32* sampled, i32 rows.
// Geometry: grid ceil(rows / 256), block 256, smem 0.
extern "C" __global__ void __launch_bounds__(256) LATHE_NAME(i32* tokens, const i32* sampled, i32 rows) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.x * 256 + threadIdx.x;
  if (t < rows && tokens[t] < 0) tokens[t] = sampled[-1 - tokens[t]];
}
