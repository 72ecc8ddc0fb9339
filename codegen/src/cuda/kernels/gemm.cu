// gemm: C[M, N'] = epilogue(A[M, K] W[N, K]^T), bf16 operands, f32 accumulation.
// Called by: bf16 GEMM steps with more than 128 rows, and with more than 32 where it was faster (gemm/tiled.rs).
//
// Defines (LATHE_DTYPE is 1)
//   BN         columns of a tile (rows of W): 64 96 128 160 192 224 256; a multiple of 32 with EPI_SWIGLU
//   CWG        consumer warpgroups, 1 2 3; a tile has BM = 64 CWG rows of A
//   TEAMS      1: all warpgroups work on a tile | 2: each has its own (CWG 2, BN up to 192, no residual)
//   STAGES     slots of the ring, each BM + BN rows of 64 k
//   CLUSTER_M  CTAs of a cluster along M, which share the tile of W
//   CLUSTER_N  CTAs of a cluster along N, which share the tile of A
//   GROUP_M    cluster rows that are walked together before the next columns
//   EPI        EPI_NONE | EPI_BIAS | EPI_RESIDUAL | EPI_BIAS_RESIDUAL | EPI_SWIGLU
//   ROW_SCALE  1: row m's accumulators are multiplied by 1 / sqrt(mean square of row m of A + LATHE_EPS) | 0
//   ROW_SUMS   1: the squares of the rows of C are added up (not with EPI_SWIGLU) | 0
//   LATHE_EPS  f32, added to the mean square (ROW_SCALE)
// Parameters
//   TensorMap a           bf16 {K, M}, stride {2 K}, box {64, a_box}, 128B swizzle
//   TensorMap w           bf16 {K, N}, stride {2 K}, box {64, w_box}, 128B swizzle
//   TensorMap c           bf16 {N', M}, stride {2 N'}, box {PW, 64}, swizzle 128B, 64B, 32B for PW 64, 32, 16, else
//                         none; N' = N / 2 with EPI_SWIGLU, else N
//   TensorMap r           the residual, bf16 {N', M}, box {PW, BM}, swizzle like c; may alias c's memory; any valid map
//                         without a residual
//   void* c_f32           null
//   const void* bias      bf16 [N], packed like the rows of W, or null
//   const u64* row_sums   [M] sums of squares of A (prelude.cuh), complete (ROW_SCALE), else null
//   u64* out_sums         [M] sums of squares of C, added to (ROW_SUMS), else null
//   u64* next_sums        [M], set to zero for the kernel that adds next (ROW_SUMS), else null
//   int M, N, K           N and K multiples of 8, any M >= 1; all maps zero fill out of bounds
//   int a_box             rows of a TMA box of A: the largest multiple of 8 that divides BM / CLUSTER_N with no box far
//                         out of bounds: round_up(M, a_box) == round_up(M, 16)
//   int w_box             rows of a TMA box of W: likewise of BN / CLUSTER_M and N
// Geometry: grid = min(tiles, clusters that fit) * cluster size, cluster (CLUSTER_M CLUSTER_N, 1, 1),
//   block 128 (CWG + 1), tiles = ceil(ceil(M / BM) / CLUSTER_M) * ceil(ceil(N / BN) / CLUSTER_N).
//   OBN = EPI_SWIGLU ? BN / 2 : BN   output columns of a tile
//   PW = the first of 64 (with one team), 32, 56, 40, 16 that divides OBN   columns of a store panel
//   smem = STAGES * (BM + BN) * 128 + CWG * 2 * 128 * PW + 16 * STAGES + 16
// EPI_SWIGLU: rows of W lie in blocks of 16, 8 gate rows and the 8 up rows of the same features. A thread holds
// both, as d[8b + e] and d[8b + 4 + e].
//
// Why: persistent and warp specialised: one producer warp feeds a ring of TMA tiles, CWG warpgroups multiply (wgmma)
// and store through shared memory while the producer already loads the next tile. Clusters share tiles by multicast.
// One team has the largest tiles and the fewest reads. With two teams one multiplies while the other stores: the
// epilogue is hidden, but tiles are narrower, as all accumulators of 128 rows lie in one warpgroup.
// Choosing a form (one team): CLUSTER_N 1, CLUSTER_M 2 if ceil(M / BM) is even, else 1; STAGES as many as fit 227
// KiB, at most 8. Over all CWG and BN (224 and 256 not with CWG 3) the least
//   waves * (4.0 + ceil(K / 64) * max(BM * BN / 50140, (128 BM + 128 BN / CLUSTER_M) / 102000))  [us]
//   waves = ceil(cluster tiles / floor(multiprocessors / CLUSTER_M))
// which is the tensor cores' or L2's time a step, and was within 6 % of the best measured form for most of 70 (M, N,
// K) on an H100 (at worst 15 %). Two teams wait for the first start alone.

#define EPI_NONE 0
#define EPI_BIAS 1
#define EPI_RESIDUAL 2
#define EPI_SWIGLU 3
#define EPI_BIAS_RESIDUAL 4

#define HAS_BIAS (EPI == EPI_BIAS || EPI == EPI_BIAS_RESIDUAL)
#define HAS_RESIDUAL (EPI == EPI_RESIDUAL || EPI == EPI_BIAS_RESIDUAL)
#define BM (64 * CWG)
#define OBN (EPI == EPI_SWIGLU ? BN / 2 : BN)
#define PW (OBN % 64 == 0 && TEAMS == 1 ? 64 : OBN % 32 == 0 ? 32 : OBN % 56 == 0 ? 56 : OBN % 40 == 0 ? 40 : 16)
#define CLUSTER (CLUSTER_M * CLUSTER_N)
// Registers a thread after setmaxnreg; the pool is 504 (512 with four warpgroups) per 128 lanes.
#define CONSUMER_REGS (CWG == 3 ? 160 : 232)
#define PRODUCER_REGS (CWG == 3 ? 32 : 40)

constexpr int A_BYTES = BM * 128;
constexpr int W_BYTES = BN * 128;
constexpr int STAGE_BYTES = A_BYTES + W_BYTES;
constexpr int PANEL_BYTES = 64 * PW * 2;
constexpr int PANELS = OBN / PW;
// The residual tile travels through the ring behind the tile's last k step, as panels of BM rows.
constexpr int RES_BYTES = BM * PW * 2;
constexpr int RES_PER_SLOT = STAGE_BYTES / RES_BYTES;
static_assert(TEAMS == 1 || (TEAMS == 2 && CWG == 2 && !HAS_RESIDUAL), "two teams of one warpgroup each");
constexpr int BAR_OFFSET = STAGES * STAGE_BYTES + CWG * 2 * PANEL_BYTES;

// Where TMA has byte `off` of a panel. Panels of 128, 64 or 32 bytes a row are swizzled. Rows of others are an
// odd number of 16-byte chunks apart, which is as free of bank conflicts.
DEV u32 in_panel(u32 off) {
    return (PW & (PW - 1)) == 0 ? off ^ (((off >> 7) & (PW / 8 - 1)) << 4) : off;
}

struct Tile {
    int m, n;
};

// Tile of this CTA in cluster tile `idx`: groups of GROUP_M cluster rows, walked row first.
DEV Tile tile_at(int idx, int rows, int cols, u32 rank) {
    int width = GROUP_M * cols;
    int group = idx / width;
    int first = group * GROUP_M;
    int height = min(rows - first, GROUP_M);
    int in = idx - group * width;
    int cn = in / height;
    int cm = first + in - cn * height;
    return {int(cm * CLUSTER_M + rank % CLUSTER_M) * BM, int(cn * CLUSTER_N + rank / CLUSTER_M) * BN};
}

// Rows of a tile that are fetched: whole boxes, none that lies beyond `limit`. A box that is out of bounds
// costs TMA more time than one that is not, and rows that are not fetched only reach outputs that are
// not stored.
DEV int fetched_rows(int limit, int start, int tile, int box) {
    const int n = min(limit - start, tile);
    return n <= 0 ? 0 : (n + box - 1) / box * box;
}

DEV void load_w(u32 slot, u32 bar, const TensorMap *w, int k, int n, int rows, int box, u32 rank) {
    const u32 dst = slot + A_BYTES;
    const u32 part = rank % CLUSTER_M;
    const u32 mask = ((1u << CLUSTER_M) - 1) << (rank - part);
    const int end = min(rows, int(part + 1) * (BN / CLUSTER_M));
    for (int r = part * (BN / CLUSTER_M); r < end; r += box) {
        if (CLUSTER_M == 1)
            tma_load_2d(dst + r * 128, w, bar, k, n + r);
        else
            tma_load_2d_multicast(dst + r * 128, w, bar, k, n + r, u16(mask));
    }
}

DEV void load_a(u32 slot, u32 bar, const TensorMap *a, int k, int m, int rows, int box, u32 rank) {
    const u32 part = rank / CLUSTER_M;
    u32 mask = 0;
#pragma unroll
    for (int j = 0; j < CLUSTER_N; ++j) mask |= 1u << (rank % CLUSTER_M + j * CLUSTER_M);
    const int end = min(rows, int(part + 1) * (BM / CLUSTER_N));
    for (int r = part * (BM / CLUSTER_N); r < end; r += box) {
        if (CLUSTER_N == 1)
            tma_load_2d(slot + r * 128, a, bar, k, m + r);
        else
            tma_load_2d_multicast(slot + r * 128, a, bar, k, m + r, u16(mask));
    }
}

extern "C" __global__ void __launch_bounds__(128 * (CWG + 1), 1)
    LATHE_NAME(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap w,
         const __grid_constant__ TensorMap c, const __grid_constant__ TensorMap r, float *c_f32,
         const char *bias, const u64 *row_sums, u64 *out_sums, u64 *next_sums, int M, int N, int K,
         int a_box, int w_box) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const u32 base = smem_addr(smem);
    const u32 full = base + BAR_OFFSET;  // full[s], then empty[s]
    const u32 empty = full + 8 * STAGES;
    const u32 wg = warpgroup_index();
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

    pdl_launch();
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, CWG / TEAMS * (CLUSTER_M + CLUSTER_N - 1));
        }
        mbar_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();

    const int rows = ((M + BM - 1) / BM + CLUSTER_M - 1) / CLUSTER_M;
    const int cols = ((N + BN - 1) / BN + CLUSTER_N - 1) / CLUSTER_N;
    const int tiles = rows * cols;
    const int steps = (K + 63) / 64;
    const int first_tile = blockIdx.x / CLUSTER;
    const int tile_stride = gridDim.x / CLUSTER;

    if (wg == CWG) {
        if (CWG > 1) regs_dec<PRODUCER_REGS>();
        if (warp_index() == 4 * CWG && elect_one()) {
            tma_prefetch_map(&a);
            tma_prefetch_map(&w);
            tma_prefetch_map(&c);
            // Weights do not depend on the previous grid: fill the ring's W halves before waiting.
            const int early = min(steps, STAGES);
            if (first_tile < tiles) {
                Tile t = tile_at(first_tile, rows, cols, rank);
                const int w_rows = fetched_rows(N, t.n, BN, w_box);
                const int bytes = (fetched_rows(M, t.m, BM, a_box) + w_rows) * 128;
                for (int s = 0; s < early; ++s) {
                    mbar_expect(full + 8 * s, bytes);
                    load_w(base + s * STAGE_BYTES, full + 8 * s, &w, 64 * s, t.n, w_rows, w_box, rank);
                }
            }
            pdl_wait();
            RingPos pos{0, 0};
            for (int idx = first_tile; idx < tiles; idx += tile_stride) {
                Tile t = tile_at(idx, rows, cols, rank);
                const int a_rows = fetched_rows(M, t.m, BM, a_box);
                const int w_rows = fetched_rows(N, t.n, BN, w_box);
                for (int k = 0; k < steps; ++k) {
                    u32 slot = base + pos.slot * STAGE_BYTES;
                    u32 bar = full + 8 * pos.slot;
                    if (idx != first_tile || k >= early) {
                        mbar_wait(empty + 8 * pos.slot, pos.phase ^ 1);
                        mbar_expect(bar, (a_rows + w_rows) * 128);
                        load_w(slot, bar, &w, 64 * k, t.n, w_rows, w_box, rank);
                    }
                    load_a(slot, bar, &a, 64 * k, t.m, a_rows, a_box, rank);
                    ring_next<STAGES>(pos);
                }
                for (int p = 0; HAS_RESIDUAL && p < PANELS; p += RES_PER_SLOT) {
                    const int n = min(RES_PER_SLOT, PANELS - p);
                    mbar_wait(empty + 8 * pos.slot, pos.phase ^ 1);
                    mbar_expect(full + 8 * pos.slot, n * RES_BYTES);
                    for (int i = 0; i < n; ++i)
                        tma_load_2d(base + pos.slot * STAGE_BYTES + i * RES_BYTES, &r,
                                    full + 8 * pos.slot,
                                    (EPI == EPI_SWIGLU ? t.n / 2 : t.n) + (p + i) * PW, t.m);
                    ring_next<STAGES>(pos);
                }
            }
        }
        __syncwarp();
    } else {
        if (CWG > 1) regs_inc<CONSUMER_REGS>();
        pdl_wait();
        const u32 tid = threadIdx.x % 128;
        const u32 lane = tid % 32;
        const u32 warp = __shfl_sync(0xffffffffu, tid / 32, 0);
        const u32 staging = base + STAGES * STAGE_BYTES + wg * 2 * PANEL_BYTES;
        // stmatrix row address of this lane inside a panel, before the swizzle of its chunk.
        const u32 st_row = 16 * warp + lane % 16;
        const u32 st_off = st_row * (PW * 2) + (lane / 16) * 16;
        // The CTA whose slot this thread frees: its own and those it shares tiles with.
        const u32 peer = tid < CLUSTER_M ? rank - rank % CLUSTER_M + tid
                                         : rank % CLUSTER_M +
                                               CLUSTER_M * (tid - CLUSTER_M +
                                                            (tid - CLUSTER_M >= rank / CLUSTER_M));
        auto release = [&](u32 slot) {
            if (CLUSTER == 1) {
                if (tid == 0) mbar_arrive(empty + 8 * slot);
            } else if (tid < CLUSTER_M + CLUSTER_N - 1) {
                mbar_arrive_cluster(empty + 8 * slot, peer);
            }
        };
        const u32 team = TEAMS == 1 ? 0 : wg;
        RingPos pos{0, 0};
        if (team > 0) ring_skip<STAGES>(pos, steps);
        u32 store = 0;  // panels stored so far, modulo 2
#if ROW_SUMS
        for (int i = blockIdx.x * (128 * CWG) + threadIdx.x; i < M; i += gridDim.x * (128 * CWG))
            next_sums[i] = 0;
#endif
        for (int idx = first_tile + team * tile_stride; idx < tiles; idx += TEAMS * tile_stride) {
            Tile t = tile_at(idx, rows, cols, rank);
            // First of the blocks of 64 rows of the tile that are this warpgroup's, TEAMS of them.
            const int block = TEAMS == 1 ? wg : 0;
            const int first_row = t.m + 64 * block + 16 * warp + lane / 4;
            const int out_n = EPI == EPI_SWIGLU ? t.n / 2 : t.n;
            const int col = out_n + 2 * (lane % 4);
#if ROW_SCALE
            // On their way while the tile is multiplied.
            u64 squares[TEAMS][2];
#pragma unroll
            for (int j = 0; j < TEAMS; ++j) {
                const int row = first_row + 64 * j;
                squares[j][0] = row < M ? ld_square_sum(row_sums + row) : 0;
                squares[j][1] = row + 8 < M ? ld_square_sum(row_sums + row + 8) : 0;
            }
#endif

            float sums[TEAMS][BN / 2];
            u32 last = 0;
            // The other team has seen all phases of its tile begin: a parity tells only the next phase from this one.
            if (TEAMS == 2 && idx != first_tile) named_sync(4 + team, 256);
            for (int k = 0; k < steps; ++k) {
                u32 slot = base + pos.slot * STAGE_BYTES;
                mbar_wait(full + 8 * pos.slot, pos.phase);
                u64 da = wgmma_desc(slot + block * 8192);
                u64 dw = wgmma_desc(slot + A_BYTES);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < TEAMS; ++j)
                        wgmma_ss(sums[j], da + j * (8192 / 16) + 2 * i, dw + 2 * i, k > 0 || i > 0);
                wgmma_commit();
                if (k > 0) {
                    // The previous step's reads are over: free its slot while this one runs.
                    wgmma_wait<1>();
                    release(last);
                }
                last = pos.slot;
                ring_next<STAGES>(pos);
            }
            if (TEAMS == 2 && idx + tile_stride < tiles) named_arrive(4 + (team ^ 1), 256);
            wgmma_wait<0>();
#pragma unroll
            for (int j = 0; j < TEAMS; ++j) wgmma_pin(sums[j]);
            release(last);
            if (TEAMS == 2) ring_skip<STAGES>(pos, steps);

#pragma unroll
            for (int j = 0; j < TEAMS; ++j) {
                float(&d)[BN / 2] = sums[j];
                const int tile_row = 64 * (block + j);
                const int row = first_row + 64 * j;
#if ROW_SCALE
                const float f0 = row_factor(squares[j][0], K, LATHE_EPS);
                const float f1 = row_factor(squares[j][1], K, LATHE_EPS);
#else
                constexpr float f0 = 1.0f, f1 = 1.0f;
#endif
                float sum0 = 0.0f, sum1 = 0.0f;  // squares of rows `row` and `row` + 8

#pragma unroll
                for (int p = 0; p < PANELS; ++p) {
                    float o[PW / 2];
                    if (HAS_RESIDUAL && p % RES_PER_SLOT == 0) mbar_wait(full + 8 * pos.slot, pos.phase);
#pragma unroll
                    for (int b = 0; b < PW / 8; ++b) {
#pragma unroll
                        for (int e = 0; e < 4; e += 2) {
                            const float f = e < 2 ? f0 : f1;  // a constant 1 without ROW_SCALE
                            float2 v;
                            if (EPI == EPI_SWIGLU) {
                                const int s = 8 * (p * (PW / 8) + b) + e;
                                v = swiglu_pair(make_float2(d[s] * f, d[s + 1] * f),
                                                make_float2(d[s + 4] * f, d[s + 5] * f));
                            } else {
                                const int s = 4 * (p * (PW / 8) + b) + e;
                                v = make_float2(d[s] * f, d[s + 1] * f);
                            }
                            o[4 * b + e] = v.x;
                            o[4 * b + e + 1] = v.y;
                        }
                        const int cc = col + p * PW + 8 * b;
                        if (HAS_BIAS && cc < N) {
                            u32 v = ld_global_u32(bias + 2 * size_t(cc));
                            o[4 * b] += bf16_lo(v);
                            o[4 * b + 1] += bf16_hi(v);
                            o[4 * b + 2] += bf16_lo(v);
                            o[4 * b + 3] += bf16_hi(v);
                        }
                        if (HAS_RESIDUAL) {
                            u32 off = (tile_row + 16 * warp + lane / 4) * (PW * 2) + b * 16 + lane % 4 * 4;
                            const u32 panel = base + pos.slot * STAGE_BYTES + p % RES_PER_SLOT * RES_BYTES;
                            // Rows g and g + 8 are a multiple of the swizzle's period apart.
                            off = in_panel(off);
                            u32 v0 = ld_shared_u32(panel + off), v1 = ld_shared_u32(panel + off + 16 * PW);
                            o[4 * b] += bf16_lo(v0);
                            o[4 * b + 1] += bf16_hi(v0);
                            o[4 * b + 2] += bf16_lo(v1);
                            o[4 * b + 3] += bf16_hi(v1);
                        }
                    }
                    if (ROW_SUMS) {
#pragma unroll
                        for (int b = 0; b < PW / 8; ++b) {
                            if (col + p * PW + 8 * b >= N) continue;  // of weights that were not fetched
                            sum0 += o[4 * b] * o[4 * b] + o[4 * b + 1] * o[4 * b + 1];
                            sum1 += o[4 * b + 2] * o[4 * b + 2] + o[4 * b + 3] * o[4 * b + 3];
                        }
                    }
                    // Two panel buffers: the one about to be written was read two stores ago.
                    u32 buf = staging + store * PANEL_BYTES;
                    if (tid == 0) bulk_wait_read<1>();
                    named_sync(1 + wg, 128);
                    if (HAS_RESIDUAL && (p % RES_PER_SLOT == RES_PER_SLOT - 1 || p == PANELS - 1)) {
                        release(pos.slot);
                        ring_next<STAGES>(pos);
                    }
#pragma unroll
                    for (int b = 0; b < PW / 8; b += 2) {
                        const u32 at = buf + in_panel(st_off + b * 16);
                        const u32 v0 = pack_bf16(o[4 * b], o[4 * b + 1]);
                        const u32 v1 = pack_bf16(o[4 * b + 2], o[4 * b + 3]);
                        if (b + 1 == PW / 8)
                            stmatrix_x2(at, v0, v1);
                        else
                            stmatrix_x4(at, v0, v1, pack_bf16(o[4 * b + 4], o[4 * b + 5]),
                                        pack_bf16(o[4 * b + 6], o[4 * b + 7]));
                    }
                    fence_async_smem();
                    named_sync(1 + wg, 128);
                    if (tid == 0) {
                        tma_store_2d(&c, buf, out_n + p * PW, t.m + tile_row);
                        bulk_commit();
                    }
                    store ^= 1;
                }
#if ROW_SUMS
#pragma unroll
                for (int m = 1; m < 4; m *= 2) {
                    sum0 += __shfl_xor_sync(0xffffffffu, sum0, m);
                    sum1 += __shfl_xor_sync(0xffffffffu, sum1, m);
                }
                if (lane % 4 == 0 && row < M) add_square_sum(out_sums + row, sum0);
                if (lane % 4 == 0 && row + 8 < M) add_square_sum(out_sums + row + 8, sum1);
#endif
            }
        }
        if (tid == 0) bulk_wait_read<0>();
        __syncwarp();
    }
    // A peer may still free slots of this CTA: none leaves before all are done.
    if (CLUSTER > 1) cluster_sync();
}
