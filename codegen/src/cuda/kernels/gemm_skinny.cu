// gemm_skinny: out[T, N'] = epilogue(X[T, K] W[N, K]^T) for few tokens, T <= NT <= 128.
// Called by: bf16 GEMM steps with 5 to 128 rows (gemm/skinny.rs).
//
// Defines (LATHE_DTYPE is 1)
//   NT         tokens that the kernel can take: 8 16 24 32 48 64 96 128
//   CWG        consumer warpgroups, 1 or 2; a tile has ROWS = 64 CWG rows of W
//   KP         64-wide panels of k in a ring slot; BK = 64 KP
//   STAGES     slots of the ring
//   EPI        EPI_NONE | EPI_BIAS | EPI_RESIDUAL | EPI_BIAS_RESIDUAL | EPI_SWIGLU
//   ROW_SCALE  1: token t's accumulators are multiplied by 1 / sqrt(mean square of its row of x + LATHE_EPS) | 0
//   ROW_SUMS   1: the squares of the output's rows are added up (N a multiple of 64; not with EPI_SWIGLU) | 0
//   LATHE_EPS  f32, added to the mean square (ROW_SCALE)
// Parameters
//   TensorMap w            bf16 {K, N}, stride {2 K}, box {64, ROWS}, 128B swizzle
//   TensorMap x            bf16 {K, T}, stride {2 K}, box {64, round_up(T, 8)}, 128B swizzle
//   void* out              bf16 [T, N'], row stride ldo; N' = N / 2 with EPI_SWIGLU, else N
//   const void* bias       bf16 [N], packed like the rows of W, or null
//   const void* residual   bf16 [T, N'], row stride ldr, or null; may alias out
//   float* partial         gridDim.x * ROWS * NT floats, all bytes 0xff before the first launch; every launch leaves
//                          them so
//   u64* best              null
//   const u64* row_sums    [T] sums of squares of x (prelude.cuh), complete (ROW_SCALE), else null
//   u64* out_sums          [T] sums of squares of the output, added to (ROW_SUMS), else null
//   u64* next_sums         [T], set to zero for the kernel that adds next (ROW_SUMS), else null
//   int T, N, K            N a multiple of 8 (16 with EPI_SWIGLU), K of 8; maps zero fill
//   int ldo, ldr           row strides in elements
// Geometry: grid = min(multiprocessors, ceil(N / ROWS) * ceil(K / BK)), block 128 (CWG + 1), no cluster. All CTAs
// must
//   be resident together. Two launches that may overlap need separate workspaces.
//   FEAT = EPI_SWIGLU ? 32 : 64           output features of a warpgroup's tile
//   TC = NT <= 32 ? NT : NT % 32 == 0 ? 32 : 16   tokens staged at once
//   smem = STAGES * KP * (ROWS + NT) * 128 + CWG * TC * (FEAT + 4) * 4 + 16 * STAGES + (ROW_SCALE ? CWG * 4 * NT : 0)
// EPI_SWIGLU: rows of W lie in blocks of 16, 8 gate rows and the 8 up rows of the same features. A thread holds
// both, as d[4b + e] and d[4b + 2 + e].
//
// Why: the weights are streamed once at memory speed. The operands are swapped: 64 rows of W are wgmma's M, the
// tokens its N. The units (BK of k of one tile of ROWS rows) of the first tiles, at most two a CTA, are cut into
// gridDim.x equal ranges, so that every multiprocessor reads the same number of bytes whatever N is. The other tiles
// are taken in rounds of gridDim.x neighbours, which keeps the rows that are read at a time close together. A CTA
// that starts inside a tile leaves that part in the workspace. The CTA that holds the tile's first unit adds the
// parts in order, so that results are deterministic, and runs the epilogue. Weights pass through L2 with evict-first
// priority.
// Choosing a form: NT the least that holds T; CWG 1; KP 2 up to NT 64, else 1; STAGES as many as fit 227 KiB. A ring
// that fills the multiprocessor was 1-3 % faster than half of one beside the next kernel's.

#define EPI_NONE 0
#define EPI_BIAS 1
#define EPI_RESIDUAL 2
#define EPI_SWIGLU 3
#define EPI_BIAS_RESIDUAL 4

#define HAS_BIAS (EPI == EPI_BIAS || EPI == EPI_BIAS_RESIDUAL)
#define HAS_RESIDUAL (EPI == EPI_RESIDUAL || EPI == EPI_BIAS_RESIDUAL)
#define ROWS (64 * CWG)
#define FEAT (EPI == EPI_SWIGLU ? 32 : 64)
#define TC (NT <= 32 ? NT : NT % 32 == 0 ? 32 : 16)

constexpr int W_BYTES = KP * ROWS * 128;
constexpr int X_BYTES = KP * NT * 128;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int STAGING_STRIDE = FEAT + 4;  // floats; 4 mod 32: the fragment's stores do not conflict
constexpr int STAGING_BYTES = TC * STAGING_STRIDE * 4;
// Parts of a tile read together, and 16-byte words of a part: 8 loads in flight a thread.
constexpr int BATCH = NT <= 64 ? NT / 8 : NT % 64 == 0 ? 8 : 4;
constexpr int GROUP = NT <= 64 ? 64 / NT : 1;
constexpr int BAR_OFFSET = STAGES * STAGE_BYTES + CWG * STAGING_BYTES;
constexpr int SCALE_OFFSET = BAR_OFFSET + 16 * STAGES;  // a factor a token, for each warpgroup

// First shared unit of CTA `i`.
DEV int unit_start(int i, int units) {
    return units * i / int(gridDim.x);
}

// Position in a CTA's sequence of units: `shared` units of split tiles, then whole tiles.
struct Walk {
    int tile, step, done, shared, whole, steps;

    __device__ __forceinline__ void next() {
        ++done;
        if (++step == steps || done == shared) {
            tile = done == shared ? whole : tile + (done < shared ? 1 : int(gridDim.x));
            step = 0;
        }
    }
};

DEV void load_w(u32 slot, const TensorMap *w, u32 bar, int step, int row, u64 policy) {
#pragma unroll
    for (int p = 0; p < KP; ++p) {
        tma_load_2d_hint(slot + p * ROWS * 128, w, bar, (step * KP + p) * 64, row, policy);
    }
}

DEV void load_x(u32 slot, const TensorMap *x, u32 bar, int step) {
#pragma unroll
    for (int p = 0; p < KP; ++p)
        tma_load_2d(slot + W_BYTES + p * NT * 128, x, bar, (step * KP + p) * 64, 0);
}

// The parts of a tile need no flags: a word that holds EMPTY, a NaN that no arithmetic produces, has
// not been written yet.
#define EMPTY 0xffffffffu

DEV bool is_empty(float x) { return __float_as_uint(x) == EMPTY; }

DEV float4 ld_relaxed(const float4 *p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// A part's word: never EMPTY.
DEV float not_empty(float x) { return is_empty(x) ? __uint_as_float(0x7fffffffu) : x; }

DEV void st_relaxed(float4 *p, float x, float y, float z, float w) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y),
                 "f"(z), "f"(w)
                 : "memory");
}

extern "C" __global__ void __launch_bounds__(128 * (CWG + 1), 1)
    LATHE_NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, char *out,
                const char *bias, const char *residual, float *partial, u64 *best,
                const u64 *row_sums, u64 *out_sums, u64 *next_sums, int T, int N, int K, int ldo, int ldr) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const u32 base = smem_addr(smem);
    const u32 full = base + BAR_OFFSET;  // full[s], then empty[s]
    const u32 empty = full + 8 * STAGES;
    const u32 wg = warpgroup_index();

    pdl_launch();
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, CWG);
        }
        mbar_init_fence();
    }
    __syncthreads();

    // Rows of x beyond round_up(T, 8) are not fetched: they only reach outputs that are not stored.
    const u32 stage_bytes = W_BYTES + KP * ((T + 7) / 8) * 1024;
    const int steps = (K + 64 * KP - 1) / (64 * KP);
    const int tiles = (N + ROWS - 1) / ROWS;
    const int grid = gridDim.x;
    // Tiles that are split: all of less than one round, or the remainder and one round.
    const int rounds = tiles / grid;
    const int split = rounds == 0 ? tiles : tiles % grid == 0 ? 0 : tiles % grid + grid;
    const int units = split * steps;
    const int begin = unit_start(blockIdx.x, units);
    const int shared = unit_start(blockIdx.x + 1, units) - begin;
    const int count = shared + (tiles - split) / grid * steps;
    Walk walk{shared > 0 ? begin / steps : split + int(blockIdx.x), shared > 0 ? begin % steps : 0, 0,
              shared, split + int(blockIdx.x), steps};

    if (wg == CWG) {
        if (warp_index() == 4 * CWG && elect_one()) {
            tma_prefetch_map(&w);
            tma_prefetch_map(&x);
            u64 policy = policy_evict_first();
            const int early = min(count, STAGES);
            Walk ahead = walk;
            for (int s = 0; s < early; ++s, ahead.next()) {
                mbar_expect(full + 8 * s, stage_bytes);
                load_w(base + s * STAGE_BYTES, &w, full + 8 * s, ahead.step, ahead.tile * ROWS, policy);
            }
            pdl_wait();
            RingPos r{0, 0};
            for (; walk.done < count; walk.next()) {
                u32 slot = base + r.slot * STAGE_BYTES;
                u32 bar = full + 8 * r.slot;
                if (walk.done >= early) {
                    mbar_wait(empty + 8 * r.slot, r.phase ^ 1);
                    mbar_expect(bar, stage_bytes);
                    load_w(slot, &w, bar, walk.step, walk.tile * ROWS, policy);
                }
                load_x(slot, &x, bar, walk.step);
                ring_next<STAGES>(r);
            }
        }
        return;
    }

    pdl_wait();
    const u32 tid = threadIdx.x % 128;
    const u32 lane = tid % 32;
    const u32 warp = __shfl_sync(0xffffffffu, tid / 32, 0);
    const u32 g = lane / 4, t = lane % 4;
    float *staging = reinterpret_cast<float *>(smem + STAGES * STAGE_BYTES + wg * STAGING_BYTES);
    const int n_out = EPI == EPI_SWIGLU ? N / 2 : N;
    // Fragments of part `c` of this warpgroup: 16 bytes a thread, all threads side by side.
    float4 *parts = reinterpret_cast<float4 *>(partial) + wg * (NT / 8 * 128) + tid;
    constexpr int PART = CWG * (NT / 8) * 128;
#if ROW_SCALE
    float *scale = reinterpret_cast<float *>(smem + SCALE_OFFSET) + wg * NT;
    if (int(tid) < T) scale[tid] = row_factor(ld_square_sum(row_sums + tid), K, LATHE_EPS);
    named_sync(1 + wg, 128);
#endif
#if ROW_SUMS
    if (blockIdx.x == 0 && wg == 0 && int(tid) < T) next_sums[tid] = 0;
#endif

    RingPos r{0, 0};
    RingPos freed{0, 0};
    while (walk.done < count) {
        const int tile = walk.tile;
        const bool owner = walk.step == 0;
        const bool is_split = walk.done < shared;
        const int n = is_split ? min(steps - walk.step, shared - walk.done) : steps;
        if (HAS_RESIDUAL && owner && tid < T && tile * ROWS + 64 * wg < N)
            asm volatile("prefetch.global.L1 [%0];" ::"l"(
                             residual + 2 * (size_t(tid) * ldr + tile * ROWS + 64 * wg))
                         : "memory");

        float d[NT / 2];
        for (int k = 0; k < n; ++k, walk.next()) {
            u32 slot = base + r.slot * STAGE_BYTES;
            mbar_wait(full + 8 * r.slot, r.phase);
            u64 dw = wgmma_desc(slot + wg * 8192);
            u64 dx = wgmma_desc(slot + W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4 * KP; ++i)
                wgmma_ss(d, dw + (i / 4) * (ROWS * 8) + 2 * (i % 4),
                         dx + (i / 4) * (NT * 8) + 2 * (i % 4), k > 0 || i > 0);
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();
                if (tid == 0) mbar_arrive(empty + 8 * freed.slot);
                ring_next<STAGES>(freed);
            }
            ring_next<STAGES>(r);
        }
        wgmma_wait<0>();
        wgmma_pin(d);
        if (tid == 0) mbar_arrive(empty + 8 * freed.slot);
        ring_next<STAGES>(freed);

        if (!owner) {
            float4 *p = parts + size_t(blockIdx.x) * PART;
#pragma unroll
            for (int b = 0; b < NT / 8; ++b)
                st_relaxed(p + b * 128, not_empty(d[4 * b]), not_empty(d[4 * b + 1]),
                           not_empty(d[4 * b + 2]), not_empty(d[4 * b + 3]));
            continue;
        }
        // CTAs that hold the rest of the tile: those whose first unit is below its end.
        const int parts_end = is_split ? ((tile + 1) * steps * grid + units - 1) / units : 0;
        for (int c = blockIdx.x + 1; c < parts_end; c += GROUP) {
            // Every thread takes the words that its counterparts wrote, as soon as they are there, and
            // leaves them empty for the next launch.
            float4 *p = parts + size_t(c) * PART;
#pragma unroll
            for (int b = 0; b < NT / 8; b += BATCH) {
                float4 v[GROUP][BATCH];
                bool empty;
                do {
                    empty = false;
#pragma unroll
                    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
                        for (int i = 0; i < BATCH && c + g < parts_end; ++i) {
                            const float4 w = v[g][i] = ld_relaxed(p + g * PART + (b + i) * 128);
                            empty |= is_empty(w.x) | is_empty(w.y) | is_empty(w.z) | is_empty(w.w);
                        }
                    }
                } while (empty);
                const float e = __uint_as_float(EMPTY);
#pragma unroll
                for (int g = 0; g < GROUP; ++g) {
#pragma unroll
                    for (int i = 0; i < BATCH && c + g < parts_end; ++i) {
                        st_relaxed(p + g * PART + (b + i) * 128, e, e, e, e);
                        d[4 * (b + i)] += v[g][i].x;
                        d[4 * (b + i) + 1] += v[g][i].y;
                        d[4 * (b + i) + 2] += v[g][i].z;
                        d[4 * (b + i) + 3] += v[g][i].w;
                    }
                }
            }
        }

        const int row = tile * ROWS + 64 * wg;  // first row of W of this warpgroup
#if ROW_SCALE
#pragma unroll
        for (int b = 0; b < NT / 8; ++b) {
            const float2 f = reinterpret_cast<const float2 *>(scale)[4 * b + t];
            d[4 * b] *= f.x;
            d[4 * b + 1] *= f.y;
            d[4 * b + 2] *= f.x;
            d[4 * b + 3] *= f.y;
        }
#endif
        if (HAS_BIAS) {
            float b0 = 0, b1 = 0;
            const u16 *bp = reinterpret_cast<const u16 *>(bias) + row + 16 * warp + g;
            if (row + 16 * warp + g < N) b0 = __uint_as_float(u32(bp[0]) << 16);
            if (row + 16 * warp + g + 8 < N) b1 = __uint_as_float(u32(bp[8]) << 16);
#pragma unroll
            for (int b = 0; b < NT / 8; ++b) {
                d[4 * b] += b0;
                d[4 * b + 1] += b0;
                d[4 * b + 2] += b1;
                d[4 * b + 3] += b1;
            }
        }
#pragma unroll
        for (int c = 0; c < NT / TC; ++c) {
            named_sync(1 + wg, 128);  // the staging of the chunk before is read
#pragma unroll
            for (int i = 0; i < TC / 8; ++i) {
                const int b = c * (TC / 8) + i;
                float *s = staging + (8 * i + 2 * t) * STAGING_STRIDE;
                if (EPI == EPI_SWIGLU) {
                    s += 8 * warp + g;
                    s[0] = silu_f32(d[4 * b]) * d[4 * b + 2];
                    s[STAGING_STRIDE] = silu_f32(d[4 * b + 1]) * d[4 * b + 3];
                } else {
                    s += 16 * warp + g;
                    s[0] = d[4 * b];
                    s[8] = d[4 * b + 2];
                    s[STAGING_STRIDE] = d[4 * b + 1];
                    s[STAGING_STRIDE + 8] = d[4 * b + 3];
                }
            }
            named_sync(1 + wg, 128);
            for (int i = tid; i < TC * (FEAT / 8); i += 128) {
                const int in = i / (FEAT / 8), token = c * TC + in;
                const int f = i % (FEAT / 8) * 8, n = tile * (FEAT * CWG) + FEAT * wg + f;
                if (token >= T || n >= n_out) continue;
                const float4 *s = reinterpret_cast<const float4 *>(staging + in * STAGING_STRIDE + f);
                float4 v0 = s[0], v1 = s[1];
                if (HAS_RESIDUAL) {
                    u32 q[4];
                    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3])
                                 : "l"(residual + 2 * (size_t(token) * ldr + n))
                                 : "memory");
                    v0.x += bf16_lo(q[0]);
                    v0.y += bf16_hi(q[0]);
                    v0.z += bf16_lo(q[1]);
                    v0.w += bf16_hi(q[1]);
                    v1.x += bf16_lo(q[2]);
                    v1.y += bf16_hi(q[2]);
                    v1.z += bf16_lo(q[3]);
                    v1.w += bf16_hi(q[3]);
                }
#if ROW_SUMS
                // Eight neighbours have this token's features in the tile, all of them or none.
                float ss = v0.x * v0.x + v0.y * v0.y + v0.z * v0.z + v0.w * v0.w + v1.x * v1.x +
                           v1.y * v1.y + v1.z * v1.z + v1.w * v1.w;
                const u32 mask = 0xffu << (lane & ~7u);
#pragma unroll
                for (int m = 1; m < 8; m *= 2) ss += __shfl_xor_sync(mask, ss, m);
                if (lane % 8 == 0) add_square_sum(out_sums + token, ss);
#endif
                st_global_v4(out + 2 * (size_t(token) * ldo + n), pack_bf16(v0.x, v0.y),
                             pack_bf16(v0.z, v0.w), pack_bf16(v1.x, v1.y), pack_bf16(v1.z, v1.w));
            }
        }
    }
}
