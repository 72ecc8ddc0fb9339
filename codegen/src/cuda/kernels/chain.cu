// chain: pointwise operations, and reductions of rows, of one chain of the plan.
// Called by: chain steps; the body is generated from the chain's statements (chain.rs).
//
// Defines
//   LATHE_W        elements of a row
//   LATHE_V        elements that a thread takes at a time, 1 or 8; divides W
//   LATHE_THREADS  block size, a multiple of 32
//   LATHE_PARAMS   the parameters: operands p0, p1, ... and results q0, q1, ... as typed pointers, i32 rows
//   LATHE_BODY     the statements
// Parameters: LATHE_PARAMS.
// Geometry (smem 0)
//   pointwise:       grid = ceil(rows * W / (V * THREADS)); a thread has V neighbours of one row
//   with reductions: grid = rows; a block has one row, read in passes
// Why: values between the operations stay in registers.
constexpr int W = LATHE_W, V = LATHE_V, T = LATHE_THREADS;
static_assert(W % V == 0 && T % 32 == 0, "row length");

template <class X> DEV void load_v(const X* p, float (&f)[1]) { f[0] = to_f32(*p); }
template <class X> DEV void load_v(const X* p, float (&f)[8]) {
  u32 w[4];
  const uint4 v = ld16(p);
  w[0] = v.x; w[1] = v.y; w[2] = v.z; w[3] = v.w;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    X x;
    x.v = (u16)(w[i / 2] >> (16 * (i & 1)));
    f[i] = to_f32(x);
  }
}
DEV void load_v(const float* p, float (&f)[8]) {
  const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
  f[0] = a.x; f[1] = a.y; f[2] = a.z; f[3] = a.w;
  f[4] = b.x; f[5] = b.y; f[6] = b.z; f[7] = b.w;
}
template <class X> DEV void store_v(X* p, const float (&f)[1]) { *p = from_f32<X>(f[0]); }
DEV void store_v(bf16* p, const float (&f)[8]) {
  st16(p, make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]), pack_bf16(f[6], f[7])));
}
DEV void store_v(f16* p, const float (&f)[8]) {
  st16(p, make_uint4(pack_f16(f[0], f[1]), pack_f16(f[2], f[3]), pack_f16(f[4], f[5]), pack_f16(f[6], f[7])));
}
DEV void store_v(float* p, const float (&f)[8]) {
  *reinterpret_cast<float4*>(p) = make_float4(f[0], f[1], f[2], f[3]);
  *reinterpret_cast<float4*>(p + 4) = make_float4(f[4], f[5], f[6], f[7]);
}

// Over all threads of the block, to all of them, in one order.
template <bool MAX> DEV float block_reduce(float v, float* red) {
  v = MAX ? warp_max(v) : warp_sum(v);
  if (T == 32) return v;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = v;
  __syncthreads();
  float r = red[0];
#pragma unroll
  for (int i = 1; i < T / 32; ++i) r = MAX ? fmaxf(r, red[i]) : r + red[i];
  return r;
}

extern "C" __global__ void __launch_bounds__(T) LATHE_NAME(LATHE_PARAMS) {
  __shared__ float red[T / 32];
  const int tid = threadIdx.x;
  pdl_launch();
  pdl_wait();
  LATHE_BODY
}
