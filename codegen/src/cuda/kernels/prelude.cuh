// Common prelude of every kernel: final source = block of #defines + prelude.cuh + <kernel>.cu.
// Header-free CUDA C for NVRTC (sm_90a): own typedefs, number conversions and thin PTX wrappers.
//
// Conventions
//  * LATHE_NAME          name of the extern "C" entry point of the kernel (every kernel).
//  * LATHE_PDL   0|1     programmatic dependent launch: with 1 the kernel calls griddepcontrol.launch_dependents at
//                        its start and griddepcontrol.wait in every thread before the first access to memory that
//                        an earlier kernel writes. Only weights and constant tables may be read before it, and
//                        memory that a predecessor writes is never read through ld.global.nc.
//  * LATHE_DTYPE 0|1|2   element type E of weights, activations and cache: 0 = f32, 1 = bf16, 2 = f16.
//  * shared memory       "smem" in the headers is the dynamic size in bytes for the launch; above 48 KiB the host
//                        raises the function attribute MAX_DYNAMIC_SHARED_SIZE_BYTES first.
#pragma nv_diag_suppress 177  // helpers that a kernel does not use
#ifndef LATHE_PDL
#define LATHE_PDL 0
#endif
#ifndef LATHE_DTYPE
#define LATHE_DTYPE 1
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEV static __device__ __forceinline__
#define NEG_INF (__int_as_float(0xff800000))

// ---- element types -------------------------------------------------------------------------------------------
struct __align__(2) bf16 { u16 v; };
struct __align__(2) f16 { u16 v; };
struct __align__(1) b8 { u8 v; };

DEV float bf16_lo(u32 p) { return __uint_as_float(p << 16); }
DEV float bf16_hi(u32 p) { return __uint_as_float(p & 0xffff0000u); }
// Two f32 to packed bf16, round to nearest even; `lo` lands in the lower half.
DEV u32 pack_bf16(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
DEV u32 pack_f16(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
DEV float to_f32(float x) { return x; }
DEV float to_f32(bf16 x) { return __uint_as_float((u32)x.v << 16); }
DEV float to_f32(f16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.v));
  return r;
}
DEV float to_f32(i32 x) { return (float)x; }
DEV float to_f32(i64 x) { return (float)x; }
DEV float to_f32(b8 x) { return x.v ? 1.0f : 0.0f; }
template <class T> struct FromF32;
template <> struct FromF32<float> { DEV float cv(float x) { return x; } };
template <> struct FromF32<bf16> { DEV bf16 cv(float x) { bf16 r; r.v = (u16)pack_bf16(x, 0.0f); return r; } };
template <> struct FromF32<f16> { DEV f16 cv(float x) { f16 r; r.v = (u16)pack_f16(x, 0.0f); return r; } };
template <> struct FromF32<i32> { DEV i32 cv(float x) { return (i32)x; } };
template <> struct FromF32<i64> { DEV i64 cv(float x) { return (i64)x; } };
template <> struct FromF32<b8> { DEV b8 cv(float x) { b8 r; r.v = x != 0.0f; return r; } };
template <class T> DEV T from_f32(float x) { return FromF32<T>::cv(x); }
// Rounds through storage type T and back.
template <class T> DEV float round_to(float x) { return to_f32(from_f32<T>(x)); }

#if LATHE_DTYPE == 0
typedef float E;
#elif LATHE_DTYPE == 1
typedef bf16 E;
#else
typedef f16 E;
#endif
// Elements of E in one 16-byte vector.
constexpr int VEC = 16 / (int)sizeof(E);

// Unpacks one 16-byte vector of E into VEC floats, and packs it again (rounding to E).
DEV void unpack16(uint4 v, float (&f)[4], float) {
  f[0] = __uint_as_float(v.x); f[1] = __uint_as_float(v.y); f[2] = __uint_as_float(v.z); f[3] = __uint_as_float(v.w);
}
DEV void unpack16(uint4 v, float (&f)[8], bf16) {
  f[0] = bf16_lo(v.x); f[1] = bf16_hi(v.x); f[2] = bf16_lo(v.y); f[3] = bf16_hi(v.y);
  f[4] = bf16_lo(v.z); f[5] = bf16_hi(v.z); f[6] = bf16_lo(v.w); f[7] = bf16_hi(v.w);
}
DEV float f16_lo(u32 p) { f16 h; h.v = (u16)p; return to_f32(h); }
DEV float f16_hi(u32 p) { f16 h; h.v = (u16)(p >> 16); return to_f32(h); }
DEV void unpack16(uint4 v, float (&f)[8], f16) {
  f[0] = f16_lo(v.x); f[1] = f16_hi(v.x); f[2] = f16_lo(v.y); f[3] = f16_hi(v.y);
  f[4] = f16_lo(v.z); f[5] = f16_hi(v.z); f[6] = f16_lo(v.w); f[7] = f16_hi(v.w);
}
DEV uint4 pack16(const float (&f)[4], float) {
  return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
}
DEV uint4 pack16(const float (&f)[8], bf16) {
  return make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]), pack_bf16(f[6], f[7]));
}
DEV uint4 pack16(const float (&f)[8], f16) {
  return make_uint4(pack_f16(f[0], f[1]), pack_f16(f[2], f[3]), pack_f16(f[4], f[5]), pack_f16(f[6], f[7]));
}

// ---- launch order --------------------------------------------------------------------------------------------
DEV void pdl_wait() {
#if LATHE_PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void pdl_launch() {
#if LATHE_PDL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- global memory -------------------------------------------------------------------------------------------
// 16-byte load of streamed weights (read once): not .nc, so that it stays above griddepcontrol.wait.
DEV uint4 ld_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
// 16-byte load through L2 only: data that other CTAs of this grid wrote.
DEV float4 ld_cg4(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEV float ld_cg(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
DEV uint4 ld16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
DEV void st16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

// ---- row norms -----------------------------------------------------------------------------------------------
// A GEMM whose weight has gamma in its columns takes an RMSNorm as one factor a row, applied to its accumulators.
// The kernel that writes the rows adds up their squares, tile by tile, in fixed point: integers give the same sum
// in any order. 2^-20 is far below eps times the row length, and sums end at 1.7e13.
#define SQUARE_ONE 1048576.0f
DEV u64 square_sum(float ss) { return __float2ull_rn(ss * SQUARE_ONE); }
DEV void add_square_sum(u64* sum, float ss) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(sum), "l"(square_sum(ss)) : "memory");
}
// A sum that an earlier kernel left; through L2, where the additions were made.
DEV u64 ld_square_sum(const u64* sum) {
  u64 v;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(sum) : "memory");
  return v;
}
// 1 / sqrt(mean square + eps) of a row of `k` elements.
DEV float row_factor(u64 sum, int k, float eps) {
  return rsqrtf(__ull2float_rn(sum) * (1.0f / SQUARE_ONE) / float(k) + eps);
}

// ---- shared memory, asynchronous copies ----------------------------------------------------------------------
DEV u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// 16 bytes global -> shared through L2; `bytes` = 16 copies, 0 fills zeros without reading.
DEV void cp_async16(u32 dst, const void* src, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEV void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEV void mbar_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEV void mbar_wait(u32 bar, u32 parity) {
  asm volatile("{.reg .pred P; W%=: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1; @!P bra W%=;}"
               ::"r"(bar), "r"(parity) : "memory");
}
// The same for barriers that other CTAs of the cluster complete.
DEV void mbar_wait_cluster(u32 bar, u32 parity) {
  asm volatile("{.reg .pred P; W%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], %1; @!P bra W%=;}"
               ::"r"(bar), "r"(parity) : "memory");
}
DEV u64 policy_evict_first() {
  u64 p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
// 1-D bulk copy global -> shared; both ends 16-byte aligned, bytes a multiple of 16.
DEV void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(dst), "l"(src), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
// Brings bytes (a multiple of 16) at a 16-byte aligned address into L2.
DEV void bulk_prefetch(const void* src, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}
// Thread-block clusters: rank-local shared address of another CTA, remote stores that complete on its mbarrier.
DEV u32 map_rank(u32 addr, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
DEV void st_async4(u32 addr, float4 v, u32 bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
               ::"r"(addr), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar) : "memory");
}
DEV void st_async(u32 addr, float v, u32 bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
               ::"r"(addr), "r"(__float_as_uint(v)), "r"(bar) : "memory");
}
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// True in one lane of a converged warp.
DEV bool elect_one() {
  u32 r;
  asm volatile("{.reg .pred P; elect.sync _|P, 0xffffffff; selp.u32 %0, 1, 0, P;}" : "=r"(r));
  return r != 0;
}

// ---- tensor cores --------------------------------------------------------------------------------------------
DEV void ldmatrix4(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
DEV void ldmatrix4_trans(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
// d[16x8] += a[16x16] . b[16x8], bf16 inputs, f32 accumulators.
DEV void mma16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- small maths ---------------------------------------------------------------------------------------------
DEV float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEV float silu(float x) { return x / (1.0f + __expf(-x)); }
DEV float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x))); }
DEV float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
DEV float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
DEV float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
// Sorts like the float does, as an unsigned integer (-0 below +0; not for NaN).
DEV u32 ordered(float x) {
  u32 b = __float_as_uint(x);
  return (b & 0x80000000u) ? ~b : (b | 0x80000000u);
}
// Key of an argmax over (value, index): larger value first, then lower index; -0 equals +0. NaN and -inf give 0,
// whose index is -1: no candidate.
DEV u64 argmax_key(float x, u32 index) {
  return x > NEG_INF ? ((u64)ordered(x == 0.0f ? 0.0f : x) << 32) | (u64)(u32)(~index) : 0ull;
}
DEV u32 argmax_index(u64 key) { return ~(u32)key; }
DEV u64 warp_max_u64(u64 v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    u64 w = __shfl_xor_sync(~0u, v, o);
    v = w > v ? w : v;
  }
  return v;
}

// ---- rotary embedding ----------------------------------------------------------------------------------------
// One block of 16 elements of a head in the interleave-by-8 order: v[0..8) = elements i = 8b..8b+7 of the first
// half, v[8..16) their partners i + D/2. Adds the bias, applies the head norm (rstd, weight) and rotates the pairs
// by (cos, sin)[8b..8b+8) of the position. Null bias / weight / cos skip that part.
DEV void load_block16(const E* src, const E* bias, float (&v)[16]) {
#pragma unroll
  for (int q = 0; q < 16 / VEC; ++q) {
    float f[VEC];
    unpack16(ld16(src + q * VEC), f, E());
#pragma unroll
    for (int e = 0; e < VEC; ++e) v[q * VEC + e] = f[e];
    if (bias) {
      unpack16(ld16(bias + q * VEC), f, E());
#pragma unroll
      for (int e = 0; e < VEC; ++e) v[q * VEC + e] += f[e];
    }
  }
}
DEV void rope_block16(float (&v)[16], const E* weight, float rstd, const float* cosv, const float* sinv) {
  if (weight) {
#pragma unroll
    for (int e = 0; e < 16; ++e) v[e] *= rstd * to_f32(weight[e]);
  }
  if (cosv) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float c = cosv[j], s = sinv[j], a = v[j], b = v[j + 8];
      v[j] = a * c - b * s;
      v[j + 8] = b * c + a * s;
    }
  }
}
DEV void store_block16(E* dst, const float (&v)[16]) {
#pragma unroll
  for (int q = 0; q < 16 / VEC; ++q) {
    float f[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) f[e] = v[q * VEC + e];
    st16(dst + q * VEC, pack16(f, E()));
  }
}
