// attn_prefill: out = softmax(scale * q . k^T) . v, causal, of a ragged batch of query chunks over the paged KV
// cache.
// Called by: bf16 attention of prefill, chunked prefill and mixed steps (attention/mod.rs).
//
// Defines (LATHE_DTYPE is 1)
//   D          head size, a multiple of 8 up to 256; padded to DP = 64, 128 or 256 by zero fill
//   GROUP      query heads of a kv head, 1..64 NWG
//   NWG        consumer warpgroups, 1 2 3; a tile has 64 NWG rows and TQ = 64 NWG / GROUP tokens
//   BN         keys of a block, 64 or 128 (64 for D > 128)
//   KV_STAGES  slots of the rings of K and of V
//   Q_STAGES   tiles of q in shared memory: 2 loads the next one early, 1 where memory is short (D 256)
//   PAGE_BOX   rows of a TMA box of the cache, 8 16 32 64: the largest that divides page_size
//   WINDOW     1: a query sees the last `window` positions, its own among them | 0: all
//   SOFTCAP    1: logits are softcap * tanh(logit / softcap) | 0
// Parameters
//   TensorMap q              bf16 {D, Hq, T}, strides {2 D, 2 Hq D}, box {64, GROUP, TQ}, 128B swizzle
//   TensorMap kv             bf16 {D, pages * 2 * Hkv * page_size}, stride {2 D}, box {64, PAGE_BOX}, 128B swizzle: the
//                            layer's whole cache [page][2][kv_head][token][D]
//   void* out                bf16 [T, Hq D], row stride ldo elements, heads in natural order
//   const int* cu_seqlens    [B + 1], row ranges of the sequences
//   const int* kv_lens       [B], keys of a sequence with this step's tokens
//   const int* block_table   [B, max_pages]
//   const int4* work         the list of tiles that attn_plan.cu writes with this TQ
//   const int* count         its length
//   u32* counter             [2], zero before the first launch; every launch leaves it zero
//   int Hkv                  key heads
//   int page_size            a multiple of PAGE_BOX, or one page a sequence
//   int max_pages            columns of block_table
//   int ldo                  row stride of out
//   float scale              factor of the logits
//   int window               positions (WINDOW)
//   float softcap            bound of the logits (SOFTCAP)
// Geometry: grid = min(multiprocessors, max_items * Hkv) with max_items as in attn_plan.cu, block 128 (NWG + 1).
//   smem = 2 DP (64 NWG Q_STAGES + 2 KV_STAGES BN) + 32 KV_STAGES + 256
//
// Why: a unit of work is one q tile of the step's list, which is the same for every layer, and one kv head. The grid
// is persistent: CTAs take units from a counter, longest first, over groups of heads whose keys fit in L2. One warp
// fetches units ahead, one loads Q, K and V (TMA), NWG warpgroups compute. The query heads of a kv head are packed
// into the rows of a tile: row r is token r / GROUP of the tile and head r % GROUP of the group. Query i of a chunk
// has position kv_len - q_len + i. S = Q K^T (wgmma, both from shared memory), softmax in registers, O += P V with P
// in registers. The next block's S is computed while the softmax of this one runs. Blocks of keys are walked from
// the last to the first, so that masked ones come first.
// Choosing a form: D <= 64: BN 128, Q_STAGES 2 and NWG 3, but NWG 2 with SOFTCAP (160 registers do not hold it). D
// <= 128: NWG 2, BN 128, Q_STAGES 2. Else NWG 2, BN 64, Q_STAGES 1. KV_STAGES 2. PAGE_BOX 8 and 16 spill in the
// loading warp only.

#define DP (D <= 64 ? 64 : D <= 128 ? 128 : 256)
#define BM (64 * NWG)
#define TQ (BM / GROUP)
#define CONSUMER_REGS (NWG == 3 ? 160 : 232)
#define PRODUCER_REGS (NWG == 3 ? 32 : 40)

constexpr float LOG2E = 1.4426950408889634f;
constexpr int Q_BYTES = BM * DP * 2;
constexpr int KV_BYTES = BN * DP * 2;
constexpr int K_OFFSET = Q_STAGES * Q_BYTES;
constexpr int V_OFFSET = K_OFFSET + KV_STAGES * KV_BYTES;
constexpr int BAR_OFFSET = V_OFFSET + KV_STAGES * KV_BYTES;
constexpr int BARS = 4 * KV_STAGES + 2 * Q_STAGES + 4;
constexpr int UNIT_SLOTS = 1;  // more would claim units long before they run, and unbalance the end

// A unit as the roles pass it on, the layout of a work list entry; head < 0 ends the work.
struct __align__(16) Unit {
    int seq, tok, q_begin, q_len;  // tok: the tile's first token inside the chunk
    int kv_len, head, pad0, pad1;
};

// Range of key blocks that a tile whose tokens have positions [first, last] needs.
struct Blocks {
    int lo, hi;
};

DEV Blocks key_blocks(int first, int last, int kv_len, int window) {
    int end = last + 1;
    int begin = WINDOW ? max(0, first - window + 1) : 0;
    return {begin / BN, (end + BN - 1) / BN};
}

// State of one thread's two rows (g and g + 8 of its warp's 16): running maximum of the raw logits and
// the thread's share of the sum.
struct Softmax {
    float m[2], l[2];
};

// Masks S of block `j`, updates the running maximum and sum, leaves P in s; scale[] is the factor for O.
template <bool MASK>
DEV void softmax_step(float (&s)[BN / 2], Softmax &st, float (&scale)[2], int j, const int (&pos)[2],
                         int t, int window, float scale_log2, float cap_in, float softcap) {
#if SOFTCAP
    // tanh(x) = 1 - 2 / (1 + e^2x)
#pragma unroll
    for (int i = 0; i < BN / 2; ++i)
        s[i] = softcap - 2.0f * softcap * __fdividef(1.0f, 1.0f + exp2_approx(s[i] * cap_in));
#endif
    if (MASK) {
        const int col = j * BN + 2 * t;
#pragma unroll
        for (int i = 0; i < BN / 2; ++i) {
            const int c = col + (i / 4) * 8 + i % 2;
            const int p = pos[(i / 2) % 2];
            bool out = c > p;
            if (WINDOW) out = out || c <= p - window;
            if (out) s[i] = NEG_INF;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float mx = s[2 * h];
#pragma unroll
        for (int i = 0; i < BN / 8; ++i) mx = fmaxf(mx, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
        mx = fmaxf(mx, __shfl_xor_sync(0xffffffffu, mx, 1));
        mx = fmaxf(mx, __shfl_xor_sync(0xffffffffu, mx, 2));
        float m = fmaxf(st.m[h], mx);
        // A row may have no key in this block: exp2(-inf - 0) = 0, never inf - inf.
        float safe = MASK && m == NEG_INF ? 0.0f : m;
        float sub = safe * scale_log2;
        scale[h] = exp2_approx(st.m[h] * scale_log2 - sub);
        st.m[h] = m;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < BN / 8; ++i) {
            float a = exp2_approx(s[4 * i + 2 * h] * scale_log2 - sub);
            float b = exp2_approx(s[4 * i + 2 * h + 1] * scale_log2 - sub);
            s[4 * i + 2 * h] = a;
            s[4 * i + 2 * h + 1] = b;
            sum += a + b;
        }
        st.l[h] = st.l[h] * scale[h] + sum;
    }
}

DEV void pack_p(u32 (&p)[BN / 4], const float (&s)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

DEV void issue_qk(float (&s)[BN / 2], u64 q, u64 k) {
#pragma unroll
    for (int i = 0; i < DP / 16; ++i)
        wgmma_ss(s, q + (i / 4) * (BM * 8) + 2 * (i % 4), k + (i / 4) * (BN * 8) + 2 * (i % 4), i > 0);
}

DEV void issue_pv(float (&o)[DP / 2], const u32 (&p)[BN / 4], u64 v, int acc) {
#pragma unroll
    for (int i = 0; i < BN / 16; ++i)
        wgmma_rs_t(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], v + 128 * i, i > 0 || acc);
}

// Everything of a consumer warpgroup that the block loop changes.
struct Loop {
    RingPos k, v;   // next K block and the V block of P
    u32 k_full, k_empty, v_full, v_empty, k_base, v_base;
    u64 q;
    u32 tid;
    int pos[2], t, window;
    float scale_log2, cap_in, softcap;
};

// One step: S of block j beside O += P V of block j + 1, then the softmax of block j.
template <bool MASK>
DEV void step(Loop &c, int j, float (&o)[DP / 2], u32 (&p)[BN / 4], Softmax &st, int acc) {
    float s[BN / 2];
    float scale[2];
    mbar_wait(c.k_full + 8 * c.k.slot, c.k.phase);
    wgmma_fence();
    issue_qk(s, c.q, wgmma_desc(c.k_base + c.k.slot * KV_BYTES));
    wgmma_commit();
    issue_pv(o, p, wgmma_desc(c.v_base + c.v.slot * KV_BYTES, BN * 128), acc);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_pin(s);
    if (c.tid == 0) mbar_arrive(c.k_empty + 8 * c.k.slot);
    ring_next<KV_STAGES>(c.k);
    softmax_step<MASK>(s, st, scale, j, c.pos, c.t, c.window, c.scale_log2, c.cap_in, c.softcap);
    // This wait belongs to the next step; between the softmax and wait 0 it keeps ptxas from
    // moving the exponentials behind the end of P V.
    const u32 used = c.v.slot;
    ring_next<KV_STAGES>(c.v);
    mbar_wait(c.v_full + 8 * c.v.slot, c.v.phase);
    wgmma_wait<0>();
    wgmma_pin(o);
    if (c.tid == 0) mbar_arrive(c.v_empty + 8 * used);
#pragma unroll
    for (int i = 0; i < DP / 2; ++i) o[i] *= scale[(i / 2) % 2];
    pack_p(p, s);
}

// Positions of the tile's first and last token.
DEV int first_pos(const Unit &u) { return u.kv_len - u.q_len + u.tok; }
DEV int last_pos(const Unit &u) { return min(first_pos(u) + TQ, u.kv_len) - 1; }

extern "C" __global__ void __launch_bounds__(128 * (NWG + 1), 1)
    LATHE_NAME(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap kv, char *out,
               const int *cu_seqlens, const int *kv_lens, const int *block_table, const int4 *work,
               const int *count, u32 *counter, int Hkv, int page_size, int max_pages, int ldo,
               float scale, int window, float softcap) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const u32 base = smem_addr(smem);
    const u32 k_full = base + BAR_OFFSET, k_empty = k_full + 8 * KV_STAGES;
    const u32 v_full = k_empty + 8 * KV_STAGES, v_empty = v_full + 8 * KV_STAGES;
    const u32 q_full = v_empty + 8 * KV_STAGES, q_empty = q_full + 8 * Q_STAGES;
    const u32 unit_full = q_empty + 8 * Q_STAGES, unit_empty = unit_full + 8 * UNIT_SLOTS;
    Unit *units = reinterpret_cast<Unit *>(smem + BAR_OFFSET + (8 * BARS + 15) / 16 * 16);
    const u32 wg = warpgroup_index();

    pdl_launch();
    if (threadIdx.x == 0) {
        for (int s = 0; s < KV_STAGES; ++s) {
            mbar_init(k_full + 8 * s, 1);
            mbar_init(v_full + 8 * s, 1);
            mbar_init(k_empty + 8 * s, NWG);
            mbar_init(v_empty + 8 * s, NWG);
        }
        for (int s = 0; s < Q_STAGES; ++s) {
            mbar_init(q_full + 8 * s, 1);
            mbar_init(q_empty + 8 * s, 4 * NWG);
        }
        for (int s = 0; s < UNIT_SLOTS; ++s) {
            mbar_init(unit_full + 8 * s, 1);
            mbar_init(unit_empty + 8 * s, 4 * NWG + 1);
        }
        mbar_init_fence();
    }
    __syncthreads();
    pdl_wait();

    if (wg == NWG) {
        if (NWG > 1) regs_dec<PRODUCER_REGS>();
        if (warp_index() == 4 * NWG + 1 && elect_one()) {
            const int items = count[0];
            // Heads walked together: as many as leave their keys and values in half of L2.
            int group = Hkv;
            while (group % 2 == 0 && (long long)count[1] * group * (4 * D) > (24ll << 20)) group /= 2;
            const int run = items * group;
            RingPos slot{0, 0};
            for (int i = blockIdx.x;; i = gridDim.x + atomicAdd(counter, 1)) {
                Unit u{};
                u.head = -1;
                if (i < items * Hkv) {
                    const int g = i / run, in = i - g * run, item = in / group;
                    u = reinterpret_cast<const Unit *>(work)[item];
                    u.head = g * group + in - item * group;
                }
                units[slot.slot] = u;
                mbar_arrive(unit_full + 8 * slot.slot);
                ring_next<UNIT_SLOTS>(slot);
                if (u.head < 0) break;
                mbar_wait(unit_empty + 8 * slot.slot, slot.phase ^ 1);
            }
            // Every CTA has taken its last unit once all have come here.
            __threadfence();
            if (atomicAdd(counter + 1, 1) == gridDim.x - 1) {
                counter[0] = 0;
                counter[1] = 0;
            }
        }
        if (warp_index() == 4 * NWG && elect_one()) {
            tma_prefetch_map(&q);
            tma_prefetch_map(&kv);
            RingPos slot{0, 0}, qp{0, 0}, k{0, 0}, v{0, 0};
            for (;;) {
                mbar_wait(unit_full + 8 * slot.slot, slot.phase);
                const Unit u = units[slot.slot];
                mbar_arrive(unit_empty + 8 * slot.slot);
                ring_next<UNIT_SLOTS>(slot);
                if (u.head < 0) break;
                const int *pages = block_table + size_t(u.seq) * max_pages;
                const Blocks range = key_blocks(first_pos(u), last_pos(u), u.kv_len, window);
                // Beyond the sequence's end its last box again: masked, but readable.
                const int last_box = (u.kv_len - 1) / PAGE_BOX * PAGE_BOX;
                int row[BN / PAGE_BOX], before[BN / PAGE_BOX];
                auto find_rows = [&](int block) {
#pragma unroll
                    for (int i = 0; i < BN / PAGE_BOX; ++i) {
                        const int pos = min(block * BN + i * PAGE_BOX, last_box);
                        const int page = pos / page_size;
                        row[i] = (pages[page] * 2 * Hkv + u.head) * page_size + pos - page * page_size;
                    }
                };
                auto load = [&](u32 dst, u32 bar, const int (&rows)[BN / PAGE_BOX], int offset) {
                    mbar_expect(bar, KV_BYTES);
#pragma unroll
                    for (int i = 0; i < BN / PAGE_BOX; ++i)
#pragma unroll
                        for (int p = 0; p < DP / 64; ++p)
                            tma_load_2d(dst + p * BN * 128 + i * PAGE_BOX * 128, &kv, bar, 64 * p,
                                        rows[i] + offset);
                };
                find_rows(range.hi - 1);
                mbar_wait(q_empty + 8 * qp.slot, qp.phase ^ 1);
                mbar_expect(q_full + 8 * qp.slot, TQ * GROUP * DP * 2);
                for (int p = 0; p < DP / 64; ++p)
                    tma_load_3d(base + qp.slot * Q_BYTES + p * BM * 128, &q, q_full + 8 * qp.slot, 64 * p,
                                u.head * GROUP, u.q_begin + u.tok);
                ring_next<Q_STAGES>(qp);
                // The order of use: K of a block one step before its V.
                for (int j = range.hi - 1; j >= range.lo - 1; --j) {
                    if (j >= range.lo) {
                        mbar_wait(k_empty + 8 * k.slot, k.phase ^ 1);
                        load(base + K_OFFSET + k.slot * KV_BYTES, k_full + 8 * k.slot, row, 0);
                        ring_next<KV_STAGES>(k);
                    }
                    if (j + 1 < range.hi) {
                        mbar_wait(v_empty + 8 * v.slot, v.phase ^ 1);
                        load(base + V_OFFSET + v.slot * KV_BYTES, v_full + 8 * v.slot, before,
                             Hkv * page_size);
                        ring_next<KV_STAGES>(v);
                    }
#pragma unroll
                    for (int i = 0; i < BN / PAGE_BOX; ++i) before[i] = row[i];
                    if (j > range.lo) find_rows(j - 1);
                }
            }
        }
        return;
    }
    if (NWG > 1) regs_inc<CONSUMER_REGS>();
    const u32 tid = threadIdx.x % 128;
    const u32 lane = tid % 32;
    const u32 warp = __shfl_sync(0xffffffffu, tid / 32, 0);
    const u32 row = 64 * wg + 16 * warp + lane / 4;
    const u32 st_row = 16 * warp + lane % 16;

    Loop c;
    c.k = c.v = RingPos{0, 0};
    c.k_full = k_full;
    c.k_empty = k_empty;
    c.v_full = v_full;
    c.v_empty = v_empty;
    c.k_base = base + K_OFFSET;
    c.v_base = base + V_OFFSET;
    c.tid = tid;
    c.t = lane % 4;
    c.window = window;
    c.scale_log2 = SOFTCAP ? LOG2E : scale * LOG2E;
    c.cap_in = SOFTCAP ? 2.0f * LOG2E * scale / softcap : 0.0f;
    c.softcap = softcap;
    RingPos slot{0, 0}, qp{0, 0};
    for (;;) {
        mbar_wait(unit_full + 8 * slot.slot, slot.phase);
        const Unit u = units[slot.slot];
        __syncwarp();
        if (lane == 0) mbar_arrive(unit_empty + 8 * slot.slot);
        ring_next<UNIT_SLOTS>(slot);
        if (u.head < 0) break;
        const int first = first_pos(u), last = last_pos(u), kv_len = u.kv_len;
        const Blocks range = key_blocks(first, last, kv_len, window);
        const u32 q_base = base + qp.slot * Q_BYTES + wg * 8192;  // this warpgroup's rows, panels BM rows
        c.q = wgmma_desc(q_base);
        // Rows beyond the chunk repeat its last position: they cost nothing and are not stored.
        c.pos[0] = min(int(first + row / GROUP), kv_len - 1);
        c.pos[1] = min(int(first + (row + 8) / GROUP), kv_len - 1);

        float o[DP / 2];
        u32 p[BN / 4];
        Softmax st{{NEG_INF, NEG_INF}, {0.0f, 0.0f}};
        int j = range.hi - 1;
        mbar_wait(q_full + 8 * qp.slot, qp.phase);
        {
            float s[BN / 2];
            float unused[2];
            mbar_wait(k_full + 8 * c.k.slot, c.k.phase);
            wgmma_fence();
            issue_qk(s, c.q, wgmma_desc(c.k_base + c.k.slot * KV_BYTES));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(s);
            if (tid == 0) mbar_arrive(k_empty + 8 * c.k.slot);
            ring_next<KV_STAGES>(c.k);
            softmax_step<true>(s, st, unused, j, c.pos, c.t, window, c.scale_log2, c.cap_in, softcap);
            pack_p(p, s);
        }
        mbar_wait(v_full + 8 * c.v.slot, c.v.phase);
        if (range.hi * BN > kv_len) {
            // The cache behind the sequence's end may hold anything, and 0 * NaN is NaN.
            const int from = kv_len - (range.hi - 1) * BN;
            const u32 v_tile = c.v_base + c.v.slot * KV_BYTES + from * 128;
            for (int i = threadIdx.x; i < (BN - from) * 8; i += BM * 2)
#pragma unroll
                for (int panel = 0; panel < DP / 64; ++panel)
                    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                                     v_tile + panel * BN * 128 + i * 16),
                                 "r"(0)
                                 : "memory");
            fence_async_smem();
            named_sync(1, BM * 2);
        }
        // Blocks below `full_below` need no causal mask for any row of this warpgroup; blocks from
        // `full_from` on none at the window's start.
        const int pos_min = min(int(first + 64 * wg / GROUP), kv_len - 1);
        const int full_below = max((pos_min + 1) / BN, range.lo);
        const int full_from =
            WINDOW ? min((max(last - window + 1, 0) + BN - 1) / BN, full_below) : range.lo;
        int acc = 0;
        for (--j; j >= full_below; --j, acc = 1) step<true>(c, j, o, p, st, acc);
        for (; j >= full_from; --j, acc = 1) step<false>(c, j, o, p, st, acc);
#if WINDOW
        for (; j >= range.lo; --j, acc = 1) step<true>(c, j, o, p, st, acc);
#endif
        wgmma_fence();
        issue_pv(o, p, wgmma_desc(c.v_base + c.v.slot * KV_BYTES, BN * 128), acc);
        wgmma_commit();

        float inv[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float l = st.l[h];
            l += __shfl_xor_sync(0xffffffffu, l, 1);
            l += __shfl_xor_sync(0xffffffffu, l, 2);
            inv[h] = l > 0.0f ? 1.0f / l : 0.0f;
        }
        wgmma_wait<0>();
        wgmma_pin(o);
        if (tid == 0) mbar_arrive(v_empty + 8 * c.v.slot);
        ring_next<KV_STAGES>(c.v);
        // O through this warpgroup's rows of Q, which it has finished reading, then whole rows.
        named_sync(4 + wg, 128);
#pragma unroll
        for (int b = 0; b < DP / 8; b += 2) {
            u32 chunk = (b % 8 + lane / 16) ^ (st_row % 8);
            stmatrix_x4(q_base + (b / 8) * (BM * 128) + st_row * 128 + chunk * 16,
                        pack_bf16(o[4 * b] * inv[0], o[4 * b + 1] * inv[0]),
                        pack_bf16(o[4 * b + 2] * inv[1], o[4 * b + 3] * inv[1]),
                        pack_bf16(o[4 * b + 4] * inv[0], o[4 * b + 5] * inv[0]),
                        pack_bf16(o[4 * b + 6] * inv[1], o[4 * b + 7] * inv[1]));
        }
        __syncwarp();
#pragma unroll 4
        for (int i = lane; i < 16 * (DP / 8); i += 32) {
            const u32 chunk = i % (DP / 8), r = 16 * warp + i / (DP / 8);
            const u32 tile_row = 64 * wg + r;
            const int tok = u.tok + tile_row / GROUP;
            if (tile_row >= TQ * GROUP || tok >= u.q_len || 8 * chunk >= D) continue;
            u32 v[4];
            ld_shared_v4(q_base + chunk / 8 * (BM * 128) + r * 128 + ((chunk % 8) ^ (r % 8)) * 16, v);
            st_global_v4(out + 2 * (size_t(u.q_begin + tok) * ldo +
                                    (u.head * GROUP + tile_row % GROUP) * D + 8 * chunk),
                         v[0], v[1], v[2], v[3]);
        }
        // The slot goes back to TMA: its last ordinary accesses come before.
        fence_async_smem();
        __syncwarp();
        if (lane == 0) mbar_arrive(q_empty + 8 * qp.slot);
        ring_next<Q_STAGES>(qp);
    }
}
