// attn_plan: the work list of attn_prefill.cu for one step: every (sequence, tile of TQ new tokens), longest first.
// Called by: the first attention of a step that needs a list of these tiles (attention/mod.rs).
//
// Defines: none.
// Parameters
//   const int* cu_seqlens   [B + 1], row ranges of the sequences
//   const int* kv_lens      [B], keys of a sequence with this step's tokens
//   int4* work              out: two int4 an entry: (sequence, first token of the tile inside the chunk, first row of
//                           the chunk, its length), (keys of the sequence, 0, 0, 0)
//   int* count              out: [2] entries written, at most max_items; keys of their sequences
//   int B                   sequences
//   int TQ                  tokens of a tile
//   int min_q_len           sequences with fewer new tokens are left out; 1 takes all
//   int causal              0: every query sees the whole sequence
//   int window              > 0: a query sees the last `window` positions
// Geometry: grid 1, block 1024, smem = 4 (B + 1 + max_items) + 128, max_items = floor((T + B (TQ - 1)) / TQ) for T new
//   tokens.
// Why: the last CTAs to start are then short. The same list serves all layers. A mixed step can give its decode rows to
// the decode kernel.

constexpr int BUCKETS = 1024;

extern "C" __global__ void __launch_bounds__(1024)
    LATHE_NAME(const int *cu_seqlens, const int *kv_lens, int4 *work, int *count, int B, int TQ,
               int min_q_len, int causal, int window) {
    extern __shared__ int prefix[];  // [B + 1] tiles of the sequences before
    int *sums = prefix + B + 1;      // [32] of the warps
    int *cost = sums + 32;           // [max_items] keys that a tile reads
    __shared__ int bucket[BUCKETS], max_cost;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    pdl_launch();
    pdl_wait();
    bucket[tid] = 0;
    if (tid == 0) {
        prefix[0] = 0;
        max_cost = 0;
    }
    int carry = 0;
    for (int first = 0; first < B; first += 1024) {
        const int b = first + tid;
        int n = 0;
        if (b < B) {
            int len = cu_seqlens[b + 1] - cu_seqlens[b];
            if (len >= min_q_len) n = (len + TQ - 1) / TQ;
        }
        for (int o = 1; o < 32; o *= 2) {
            int v = __shfl_up_sync(~0u, n, o);
            if (lane >= o) n += v;
        }
        if (lane == 31) sums[warp] = n;
        __syncthreads();
        int before = carry;
        for (int i = 0; i < 32; ++i) {
            if (i < warp) before += sums[i];
            carry += sums[i];
        }
        if (b < B) prefix[b + 1] = before + n;
        __syncthreads();
    }
    const int items = prefix[B];
    if (tid == 0) {
        count[0] = items;
        count[1] = 0;
    }
    __syncthreads();

    // The sequence of item i: the last one whose tiles start at or before i.
    auto sequence_of = [&](int i) {
        int lo = 0, hi = B;
        while (hi - lo > 1) {
            int mid = (lo + hi) / 2;
            if (prefix[mid] <= i) lo = mid;
            else hi = mid;
        }
        return lo;
    };
    int my_max = 0;
    for (int i = tid; i < items; i += 1024) {
        const int b = sequence_of(i);
        const int len = cu_seqlens[b + 1] - cu_seqlens[b];
        const int tok = (i - prefix[b]) * TQ;
        const int first = kv_lens[b] - len + tok;
        const int end = causal ? first + min(TQ, len - tok) : kv_lens[b];
        if (tok == 0) atomicAdd(count + 1, kv_lens[b]);
        cost[i] = end - (window > 0 ? max(0, first - window + 1) : 0);
        my_max = max(my_max, cost[i]);
    }
    __syncthreads();
    // Counting sort into BUCKETS classes of cost, the dearest first; the order inside a class is free.
    atomicMax(&max_cost, my_max);
    __syncthreads();
    const int top = max(max_cost, 1);
    auto bucket_of = [&](int c) { return BUCKETS - 1 - int((long long)c * (BUCKETS - 1) / top); };
    for (int i = tid; i < items; i += 1024) atomicAdd(&bucket[bucket_of(cost[i])], 1);
    __syncthreads();
    int n = bucket[tid], before = n;
    for (int o = 1; o < 32; o *= 2) {
        int v = __shfl_up_sync(~0u, before, o);
        if (lane >= o) before += v;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    for (int i = 0; i < warp; ++i) before += sums[i];
    bucket[tid] = before - n;
    __syncthreads();
    for (int i = tid; i < items; i += 1024) {
        const int rank = atomicAdd(&bucket[bucket_of(cost[i])], 1);
        const int b = sequence_of(i);
        const int begin = cu_seqlens[b];
        work[2 * rank] = make_int4(b, (i - prefix[b]) * TQ, begin, cu_seqlens[b + 1] - begin);
        work[2 * rank + 1] = make_int4(kv_lens[b], 0, 0, 0);
    }
}
