// Wrappers of the Hopper instructions that the tensor-core kernels use: mbarrier, bulk tensor
// copies (TMA), wgmma, clusters, programmatic dependent launch. sm_90a, no headers.
//
// Every wrapper is `asm volatile` with a "memory" clobber: the order of these instructions in the
// source is the order in which they must run. Shared addresses are 32-bit (`smem_u32`).
// Follows prelude.cuh, which has the types, mbar_*, elect_one and the launch-order wrappers.

// A CUtensorMap, passed by value as a `const __grid_constant__` parameter.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Index of the calling thread's warpgroup as a warp-uniform value: keeps descriptors and branches
// in uniform registers.
DEV u32 warpgroup_index() {
    return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
}

DEV u32 warp_index() {
    return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// x * sigmoid(x). exp2 overflows to inf for very negative x, and x / inf is the right limit.
DEV float silu_f32(float x) {
    return __fdividef(x, 1.0f + exp2_approx(-1.4426950408889634f * x));
}

// silu(g) u for two elements of a row, with one reciprocal: an SM makes 16 exponentials or reciprocals a clock, which
// is what a large tile's epilogue waits for. Gates below -43 count as -43, where silu is -1e-17, so that the product
// of the two denominators stays finite. NaN stays NaN, and makes the other NaN too.
DEV float2 swiglu_pair(float2 g, float2 u) {
    asm("max.NaN.f32 %0, %0, 0fc22c0000;" : "+f"(g.x));
    asm("max.NaN.f32 %0, %0, 0fc22c0000;" : "+f"(g.y));
    const float x = 1.0f + exp2_approx(-1.4426950408889634f * g.x);
    const float y = 1.0f + exp2_approx(-1.4426950408889634f * g.y);
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x * y));
    return make_float2(g.x * u.x * (r * y), g.y * u.y * (r * x));
}

// ---------------------------------------------------------------------------------- mbarrier --

// Arrives on the barrier at the same offset in CTA `rank` of the cluster.
DEV void mbar_arrive_cluster(u32 bar, u32 rank) {
    asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [r];}" ::"r"(bar), "r"(rank)
                 : "memory");
}

// Position in a ring of `n` slots: `slot`, and the parity of its current phase.
struct RingPos {
    u32 slot;
    u32 phase;
};

template <int STAGES_> DEV void ring_next(RingPos &r) {
    if (++r.slot == STAGES_) {
        r.slot = 0;
        r.phase ^= 1;
    }
}

// `n` slots further.
template <int STAGES_> DEV void ring_skip(RingPos &r, u32 n) {
    const u32 slot = r.slot + n;
    r.phase ^= slot / STAGES_ & 1;
    r.slot = slot % STAGES_;
}

// --------------------------------------------------------------------------------------- TMA --

DEV void tma_prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at (x, y), x innermost, to shared memory; completes on `bar`.
DEV void tma_load_2d(u32 dst, const TensorMap *map, u32 bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(x), "r"(y)
                 : "memory");
}

DEV void tma_load_2d_hint(u32 dst, const TensorMap *map, u32 bar, int x, int y, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(x), "r"(y), "l"(policy)
                 : "memory");
}

DEV void tma_load_3d(u32 dst, const TensorMap *map, u32 bar, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// The same to every CTA of the cluster in `mask`, at the same offset, each completing on its own
// barrier at the offset of `bar`.
DEV void tma_load_2d_multicast(u32 dst, const TensorMap *map, u32 bar, int x, int y, u16 mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(x), "r"(y), "h"(mask)
                 : "memory");
}

// Stores a shared box to global memory; elements outside the tensor are dropped.
DEV void tma_store_2d(const TensorMap *map, u32 src, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(src), "r"(x), "r"(y)
                 : "memory");
}

DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's bulk stores still read shared memory.
template <int N> DEV void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of TMA and wgmma.
DEV void fence_async_smem() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --------------------------------------------------------------------------- barriers, cluster --

// Named barrier `id` (1..15) of `threads` threads.
DEV void named_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEV void named_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEV u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// All threads of all CTAs of the cluster. Orders nothing but barrier initialisation.
DEV void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" :::
                     "memory");
}

template <int N> DEV void regs_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N) : "memory");
}

template <int N> DEV void regs_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N) : "memory");
}

// ------------------------------------------------------------------------- ldmatrix, stmatrix --

DEV void stmatrix_x4(u32 addr, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
                 "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

DEV void stmatrix_x2(u32 addr, u32 r0, u32 r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(addr), "r"(r0), "r"(r1)
                 : "memory");
}

DEV void ld_shared_v4(u32 addr, u32 (&v)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(addr)
                 : "memory");
}

DEV void st_global_v4(void *p, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

DEV u32 ld_shared_u32(u32 addr) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}

DEV u32 ld_global_u32(const void *p) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// ------------------------------------------------------------------------------------- wgmma --

// Shared-memory matrix descriptor, 128-byte swizzle, 8-row groups 1024 bytes apart. The address is
// that of a 1024-byte aligned tile plus a step inside it:
//   K-major   tile [rows][64 bf16]; k16 step +32 bytes
//   MN-major  panels of [k][64 bf16] `panel_bytes` apart; k16 step +2048 bytes
// The upper word is constant, the lower is the address (18 bits: a CTA's cluster rank is above) in
// 16-byte units, so an offset of b bytes may be added as b / 16.
DEV u64 wgmma_desc(u32 addr, u32 panel_bytes = 16) {
    u32 lo = ((addr & 0x3ffffu) >> 4) | ((panel_bytes >> 4) << 16);
    return (u64(0x40000040u) << 32) | lo;
}

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Pins accumulators between a wait and their first use: the wait itself names no registers, so the
// compiler could move arithmetic on them above it (and ptxas would then serialise the wgmmas).
template <int N> DEV void wgmma_pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define WG_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WG_F8(i) WG_F4(i), WG_F4(i + 4)
#define WG_F16(i) WG_F8(i), WG_F8(i + 8)
#define WG_F32(i) WG_F16(i), WG_F16(i + 16)
#define WG_F64(i) WG_F32(i), WG_F32(i + 32)
#define WG_S0 "%0,%1,%2,%3"
#define WG_S4 ",%4,%5,%6,%7"
#define WG_S8 ",%8,%9,%10,%11"
#define WG_S12 ",%12,%13,%14,%15"
#define WG_S16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define WG_S24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define WG_S32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define WG_S48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WG_S64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WG_S80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WG_S96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define WG_S112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WG_D16 WG_S0 WG_S4 WG_S8 WG_S12
#define WG_D32 WG_D16 WG_S16 WG_S24
#define WG_D64 WG_D32 WG_S32 WG_S48

// d (+)= A * B for one k16 step, A [64][16] and B [N][16] from shared memory, both K-major; `acc`
// 0 overwrites d. A thread (lane l of warp w of the warpgroup) holds d[4b+e] = (row 16w + l/4, column
// 8b + 2(l%4) + e) and d[4b+2+e] = the same 8 rows further down. The overload is chosen by the
// length N / 2 of d.
#define WGMMA_SS(N, STR, OPS, A, B, P)                                                          \
    DEV void wgmma_ss(float(&d)[N / 2], u64 a, u64 b, int acc) {                             \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" STR "}, " A   \
                     ", " B ", p, 1, 1, 0, 0;}"                                                 \
                     : OPS                                                                      \
                     : "l"(a), "l"(b), "r"(acc)                                                 \
                     : "memory");                                                               \
    }
WGMMA_SS(8, WG_S0, WG_F4(0), "%4", "%5", "%6")
WGMMA_SS(16, WG_S0 WG_S4, WG_F8(0), "%8", "%9", "%10")
#define WG_OPS24 WG_F8(0), WG_F4(8)
WGMMA_SS(24, WG_S0 WG_S4 WG_S8, WG_OPS24, "%12", "%13", "%14")
WGMMA_SS(32, WG_D16, WG_F16(0), "%16", "%17", "%18")
#define WG_OPS48 WG_F16(0), WG_F8(16)
WGMMA_SS(48, WG_D16 WG_S16, WG_OPS48, "%24", "%25", "%26")
WGMMA_SS(64, WG_D32, WG_F32(0), "%32", "%33", "%34")
#define WG_OPS96 WG_F32(0), WG_F16(32)
WGMMA_SS(96, WG_D32 WG_S32, WG_OPS96, "%48", "%49", "%50")
WGMMA_SS(128, WG_D64, WG_F64(0), "%64", "%65", "%66")
#define WG_OPS160 WG_F64(0), WG_F16(64)
WGMMA_SS(160, WG_D64 WG_S64, WG_OPS160, "%80", "%81", "%82")
#define WG_OPS192 WG_F64(0), WG_F32(64)
WGMMA_SS(192, WG_D64 WG_S64 WG_S80, WG_OPS192, "%96", "%97", "%98")
#define WG_OPS224 WG_F64(0), WG_F32(64), WG_F16(96)
WGMMA_SS(224, WG_D64 WG_S64 WG_S80 WG_S96, WG_OPS224, "%112", "%113", "%114")
#define WG_OPS256 WG_F64(0), WG_F64(64)
WGMMA_SS(256, WG_D64 WG_S64 WG_S80 WG_S96 WG_S112, WG_OPS256, "%128", "%129", "%130")

// The same with A in registers (four bf16 pairs a thread) and B MN-major ([k][N] in shared memory).
#define WGMMA_RS_T(N, STR, OPS, A0, A1, A2, A3, B, P)                                            \
    DEV void wgmma_rs_t(float(&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int acc) {  \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" STR "}, {" A0 \
                     "," A1 "," A2 "," A3 "}, " B ", p, 1, 1, 1;}"                              \
                     : OPS                                                                      \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(acc)                     \
                     : "memory");                                                               \
    }
WGMMA_RS_T(64, WG_D32, WG_F32(0), "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_RS_T(128, WG_D64, WG_F64(0), "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_RS_T(256, WG_D64 WG_S64 WG_S80 WG_S96 WG_S112, WG_OPS256, "%128", "%129", "%130", "%131", "%132",
           "%133")
