// plain: one plain kernel per primitive operation, any element type and any strides; also strided copies.
// Called by: operations that no fused kernel covers (plain.rs, elementwise.rs).
//
// Defines
//   LATHE_KIND    0: elementwise | 1: reduction | 2: matrix product | 3: gather | 5: softmax of the last axis
//   LATHE_TA      type of a in memory: float, bf16, f16, i64, i32 or b8; default float
//   LATHE_TB      type of b, likewise
//   LATHE_TC      type of c, likewise
//   LATHE_TO      type of the output, likewise
//   LATHE_CT      type in which a value is computed: i64 for exact integers; default float
//   LATHE_RANK    dimensions of the output, 1..6 (kinds 0 and 1)
//   LATHE_INPUTS  inputs that kind 0 reads, 0..3; default 1
//   LATHE_EXPR(a, b, c, ix)   result of kind 0 from CT values and output coordinates ix[d]; default (a)
//   LATHE_CONCAT  axis along which b follows a (kind 0); default none
//   LATHE_RED     kind 1, 0: sum | 1: max | 2: mean | 4: argmax, the lowest index wins
//   LATHE_TI      type of the indices (kind 3); default i32
// Parameters
//   const void* a, const void* b, const void* c   operands, or null
//   void* out
//   Geo geo                                       extents and strides, by value
// Geometry (smem 0)
//   kind 0: grid = ceil(geo.n / 256), block 256; n = product of dims. CONCAT: rdims[0] is the extent of a along the
//           axis, ob takes output coordinates to b
//   kind 1: grid = number of outputs, block 128; rdims and sb are dims and input strides of the reduced axes
//           (unused ones: 1 and 0)
//   kind 2: grid (ceil(N/16), ceil(M/16), batch1 * batch2), block 256; dims = {batch1, batch2, M, N, K, 1},
//           sa = {batch1, batch2, m, -, k}, sb = {batch1, batch2, -, n, k}, so = {batch1, batch2, m, n}
//   kind 3: grid = ceil(n / 256), block 256; out[o, j, i] = a[o, index[j], i], dims = {outer, J, inner, rows of a},
//           b = index [J], all contiguous, indices clamped
//   kind 5: grid = rows, block 128; contiguous rows, dims = {rows, cols}
// Why: correctness, not speed: it is the path of f32 models and what fast kernels are compared with.
#ifndef LATHE_TA
#define LATHE_TA float
#endif
#ifndef LATHE_TB
#define LATHE_TB float
#endif
#ifndef LATHE_TC
#define LATHE_TC float
#endif
#ifndef LATHE_TO
#define LATHE_TO float
#endif
#ifndef LATHE_CT
#define LATHE_CT float
#endif
#ifndef LATHE_RANK
#define LATHE_RANK 1
#endif
#ifndef LATHE_INPUTS
#define LATHE_INPUTS 1
#endif
#ifndef LATHE_EXPR
#define LATHE_EXPR(a, b, c, ix) (a)
#endif
#ifndef LATHE_TI
#define LATHE_TI i32
#endif

// dims of the output; element strides of a, b, c and out for those dims (0 broadcasts); reduced dims; element offsets.
struct Geo {
  i64 n;
  i64 dims[6], sa[6], sb[6], sc[6], so[6], rdims[6];
  i64 oa, ob, oc, oo;
};

typedef LATHE_CT CT;
template <class T> struct Get { DEV CT cv(T x) { return (CT)to_f32(x); } };
template <> struct Get<i64> { DEV CT cv(i64 x) { return (CT)x; } };
template <> struct Get<i32> { DEV CT cv(i32 x) { return (CT)x; } };
template <class T> struct Put { DEV T cv(CT x) { return from_f32<T>((float)x); } };
template <> struct Put<i64> { DEV i64 cv(CT x) { return (i64)x; } };
template <> struct Put<i32> { DEV i32 cv(CT x) { return (i32)x; } };
template <> struct Put<b8> { DEV b8 cv(CT x) { b8 r; r.v = x != (CT)0; return r; } };

extern "C" __global__ void __launch_bounds__(256)
LATHE_NAME(const void* pa, const void* pb, const void* pc, void* po, const __grid_constant__ Geo geo) {
  pdl_launch();
  pdl_wait();
  const LATHE_TA* a = reinterpret_cast<const LATHE_TA*>(pa) + geo.oa;
  LATHE_TO* out = reinterpret_cast<LATHE_TO*>(po) + geo.oo;
  const int tid = threadIdx.x;

#if LATHE_KIND == 0 || LATHE_KIND == 1
#if LATHE_KIND == 0
  i64 rest = (i64)blockIdx.x * 256 + tid;
  if (rest >= geo.n) return;
#else
  i64 rest = blockIdx.x;
#endif
  i64 ix[LATHE_RANK], ia = 0, io = 0;
#pragma unroll
  for (int d = LATHE_RANK - 1; d >= 0; --d) {
    ix[d] = d ? rest % geo.dims[d] : rest;
    rest = d ? rest / geo.dims[d] : 0;
    ia += ix[d] * geo.sa[d];
    io += ix[d] * geo.so[d];
  }
#endif

#if LATHE_KIND == 0
  i64 ib = 0, ic = 0;
#pragma unroll
  for (int d = 0; d < LATHE_RANK; ++d) {
    ib += ix[d] * geo.sb[d];
    ic += ix[d] * geo.sc[d];
  }
#ifdef LATHE_CONCAT
  out[io] = Put<LATHE_TO>::cv(ix[LATHE_CONCAT] < geo.rdims[0]
                                  ? Get<LATHE_TA>::cv(a[ia])
                                  : Get<LATHE_TB>::cv((reinterpret_cast<const LATHE_TB*>(pb) + geo.ob)[ib]));
#else
  const CT va = LATHE_INPUTS > 0 ? Get<LATHE_TA>::cv(a[ia]) : (CT)0;
  const CT vb = LATHE_INPUTS > 1 ? Get<LATHE_TB>::cv((reinterpret_cast<const LATHE_TB*>(pb) + geo.ob)[ib]) : (CT)0;
  const CT vc = LATHE_INPUTS > 2 ? Get<LATHE_TC>::cv((reinterpret_cast<const LATHE_TC*>(pc) + geo.oc)[ic]) : (CT)0;
  out[io] = Put<LATHE_TO>::cv((CT)(LATHE_EXPR(va, vb, vc, ix)));
#endif

#elif LATHE_KIND == 1
  __shared__ CT red[128];
  __shared__ i64 at[128];
  i64 count = 1;
#pragma unroll
  for (int d = 0; d < 6; ++d) count *= geo.rdims[d];
  CT v = 0;
  i64 where = -1;  // -1: nothing seen yet
  for (i64 j = tid; j < count; j += 128) {
    i64 r = j, off = ia;
#pragma unroll
    for (int d = 5; d >= 0; --d) {
      off += (r % geo.rdims[d]) * geo.sb[d];
      r /= geo.rdims[d];
    }
    const CT va = Get<LATHE_TA>::cv(a[off]);
    const CT x = va;
    if (LATHE_RED == 0 || LATHE_RED == 2) { v += x; where = j; }
    else if (where < 0 || x > v) { v = x; where = j; }
  }
  red[tid] = v;
  at[tid] = where;
  __syncthreads();
  for (int s = 64; s; s >>= 1) {
    if (tid < s && at[tid + s] >= 0) {
      const CT x = red[tid + s];
      if (LATHE_RED == 0 || LATHE_RED == 2) { red[tid] += x; at[tid] = at[tid + s]; }
      else if (at[tid] < 0 || x > red[tid] || (x == red[tid] && at[tid + s] < at[tid])) {
        red[tid] = x;
        at[tid] = at[tid + s];
      }
    }
    __syncthreads();
  }
  if (tid == 0) {
    CT r = red[0];
    if (LATHE_RED == 2) r = r / (CT)count;
    if (LATHE_RED == 4) r = (CT)at[0];
    out[io] = Put<LATHE_TO>::cv(r);
  }

#elif LATHE_KIND == 2
  __shared__ float ta[16][17], tb[16][17];
  const LATHE_TB* b = reinterpret_cast<const LATHE_TB*>(pb) + geo.ob;
  const int x = tid & 15, y = tid >> 4;
  const i64 z1 = blockIdx.z / geo.dims[1], z2 = blockIdx.z % geo.dims[1];
  const i64 m = (i64)blockIdx.y * 16 + y, n0 = (i64)blockIdx.x * 16, n = n0 + x;
  const i64 M = geo.dims[2], N = geo.dims[3], K = geo.dims[4];
  const i64 abase = z1 * geo.sa[0] + z2 * geo.sa[1], bbase = z1 * geo.sb[0] + z2 * geo.sb[1];
  float acc = 0.0f;
  for (i64 k0 = 0; k0 < K; k0 += 16) {
    ta[y][x] = (m < M && k0 + x < K) ? to_f32(a[abase + m * geo.sa[2] + (k0 + x) * geo.sa[4]]) : 0.0f;
    // tb[k][n]: x walks the axis with the smaller stride.
    const bool along_k = geo.sb[4] < geo.sb[3];
    const int bk = along_k ? x : y, bn = along_k ? y : x;
    tb[bk][bn] = (n0 + bn < N && k0 + bk < K) ? to_f32(b[bbase + (n0 + bn) * geo.sb[3] + (k0 + bk) * geo.sb[4]]) : 0.0f;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 16; ++k) acc = fmaf(ta[y][k], tb[k][x], acc);
    __syncthreads();
  }
  if (m < M && n < N) out[z1 * geo.so[0] + z2 * geo.so[1] + m * geo.so[2] + n * geo.so[3]] = from_f32<LATHE_TO>(acc);

#elif LATHE_KIND == 3
  const i64 e = (i64)blockIdx.x * 256 + tid;
  if (e >= geo.n) return;
  const i64 J = geo.dims[1], inner = geo.dims[2], rows = geo.dims[3];
  const i64 i = e % inner, j = e / inner % J, o = e / (inner * J);
  i64 id = (i64)(reinterpret_cast<const LATHE_TI*>(pb) + geo.ob)[j];
  id = id < 0 ? 0 : id >= rows ? rows - 1 : id;
  out[e] = Put<LATHE_TO>::cv(Get<LATHE_TA>::cv(a[(o * rows + id) * inner + i]));

#elif LATHE_KIND == 5
  __shared__ float red[4];
  const i64 cols = geo.dims[1], base = (i64)blockIdx.x * cols;
  float m = NEG_INF;
  for (i64 i = tid; i < cols; i += 128) m = fmaxf(m, to_f32(a[base + i]));
  m = warp_max(m);
  if ((tid & 31) == 0) red[tid >> 5] = m;
  __syncthreads();
  m = fmaxf(fmaxf(red[0], red[1]), fmaxf(red[2], red[3]));
  __syncthreads();
  float s = 0.0f;
  for (i64 i = tid; i < cols; i += 128) s += expf(to_f32(a[base + i]) - m);
  s = warp_sum(s);
  if ((tid & 31) == 0) red[tid >> 5] = s;
  __syncthreads();
  s = red[0] + red[1] + red[2] + red[3];
  for (i64 i = tid; i < cols; i += 128) out[base + i] = from_f32<LATHE_TO>(expf(to_f32(a[base + i]) - m) / s);
#endif
}
