//! Times the CPU kernels: medians with bandwidth and arithmetic rates for the shapes of small language models.
//!
//! `cargo run --release -p lathe-runtime --example cpu_bench [-- [--single] [FILTER]]` prints the lines that contain
//! FILTER; `--single` uses one thread, whose processor time is then the whole cost.
//! Weights rotate through copies larger than the last-level cache where a shape is smaller than it, as the
//! layers of a model do.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use lathe_runtime::device::cpu::kernels::attention::{AttentionArgs, AttentionSpec, attention};
use lathe_runtime::device::cpu::kernels::linear::{
    Epilogue, LinearArgs, LinearSpec, Prologue, linear, lm_head_argmax,
};
use lathe_runtime::device::cpu::kernels::rope::{RopeAppend, rope_append};
use lathe_runtime::device::cpu::kernels::{CacheShape, Elem, Isa, StepMeta, norm, pool};
use lathe_runtime::device::cpu::pages::PageBuffer;

/// Bytes of weights a benchmark walks through, more than the last-level caches of common machines.
const WORKING_SET: usize = 192 << 20;

struct Bench {
    filter: String,
}

impl Bench {
    /// Times `run(i)` for rising i and prints the median with its rates.
    fn line(&self, name: &str, bytes: f64, flop: f64, mut run: impl FnMut(usize)) {
        if !name.contains(&self.filter) {
            return;
        }
        let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for i in 0.. {
            let on_cpu = thread_seconds();
            let call = Instant::now();
            run(i);
            seconds.push(call.elapsed().as_secs_f64());
            cpu.push(thread_seconds() - on_cpu);
            if i >= 8 && start.elapsed().as_secs_f64() > 0.6 {
                break;
            }
        }
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        let best = seconds[0];
        cpu.sort_by(f64::total_cmp);
        let own = cpu[cpu.len() / 2];
        println!(
            "{name:<58} {:>10.1} us  best {:>10.1} us  cpu {:>10.1} us {:>8.1} GB/s {:>8.1} GFLOP/s  (median of {})",
            median * 1e6,
            best * 1e6,
            own * 1e6,
            bytes / median / 1e9,
            flop / median / 1e9,
            seconds.len()
        );
    }
}

/// Seconds this thread has run, where the system tells; on a busy machine the time that other programs did not take.
fn thread_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split(' ')
        .next()
        .and_then(|ns| ns.parse::<f64>().ok())
        .unwrap_or(f64::NAN)
        / 1e9
}

/// Values in -0.5..0.5 from a linear congruential sequence.
fn values<E: Elem>(len: usize) -> PageBuffer<E> {
    let mut buffer = PageBuffer::zeroed(len).expect("the memory is there");
    let mut state = 12345u32;
    for value in buffer.iter_mut() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *value = E::from_f32((state >> 8) as f32 / (1 << 24) as f32 - 0.5);
    }
    buffer
}

fn bench_linear<E: Elem>(bench: &Bench, label: &str, m: usize, n: usize, k: usize, fused: bool) {
    let copies = if m <= 16 && !label.ends_with("hot") {
        (WORKING_SET / (n * k * size_of::<E>())).clamp(1, 400)
    } else {
        1
    };
    let name = format!(
        "linear {} {:?} {label} M={m} N={n} K={k}",
        E::NAME,
        Isa::current()
    );
    if !name.contains(&bench.filter) {
        return;
    }
    let w = values::<E>(n * k * copies);
    let x = values::<E>(m * k);
    let gamma = values::<E>(k);
    let mut y = vec![E::default(); m * n];
    let spec = LinearSpec {
        prologue: if fused {
            Prologue::RmsNorm { eps: 1e-5 }
        } else {
            Prologue::None
        },
        weight_offset: 0.0,
        epilogue: if fused && n.is_multiple_of(16) {
            Epilogue::SwiGlu
        } else {
            Epilogue::None
        },
    };
    let y_len = if spec.epilogue == Epilogue::SwiGlu {
        m * n / 2
    } else {
        m * n
    };
    bench.line(
        &name,
        (n * k * size_of::<E>()) as f64,
        2.0 * (m * n * k) as f64,
        |i| {
            let args = LinearArgs {
                m,
                n,
                k,
                x: &x,
                delta: None,
                sum: None,
                gamma: fused.then_some(&gamma[..]),
                w: &w[i % copies * n * k..][..n * k],
                bias: None,
                residual: None,
                y: &mut y[..y_len],
            };
            linear(&spec, args).expect("shapes fit");
            black_box(&y);
        },
    );
}

/// Output pointer shared by the tasks of one product.
struct Out(*mut f32);
// SAFETY: the tasks write disjoint columns.
unsafe impl Sync for Out {}

impl Out {
    fn at(&self, i: usize) -> *mut f32 {
        self.0.wrapping_add(i)
    }
}

/// f32 product by the `gemm` crate alone, for comparison: not batch-invariant.
fn bench_gemm_crate(bench: &Bench, m: usize, n: usize, k: usize) {
    let (x, w, mut y) = (
        values::<f32>(m * k),
        values::<f32>(n * k),
        vec![0.0f32; m * n],
    );
    let name = format!("gemm crate f32 M={m} N={n} K={k}");
    bench.line(&name, (n * k * 4) as f64, 2.0 * (m * n * k) as f64, |_| {
        // The columns in one part a thread, on this crate's pool.
        let part = n.div_ceil(pool::threads());
        let out = Out(y.as_mut_ptr());
        pool::parallel_for(pool::threads(), |t| {
            let (first, cols) = (t * part, part.min(n.saturating_sub(t * part)));
            let (n_stride, k_stride) = (n as isize, k as isize);
            let threads = gemm::Parallelism::None;
            // SAFETY: the strides describe row-major [m, k], [n, k] and [m, n] buffers of those lengths, and each
            // task writes its own columns.
            unsafe {
                let (y, w) = (out.at(first), w.as_ptr().add(first * k));
                gemm::gemm(
                    m,
                    cols,
                    k,
                    y,
                    1,
                    n_stride,
                    false,
                    x.as_ptr(),
                    1,
                    k_stride,
                    w,
                    k_stride,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    threads,
                );
            }
        });
        black_box(&y);
    });
}

struct Model {
    name: &'static str,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

fn bench_attention<E: Elem>(bench: &Bench, model: &Model, rows: usize, context: usize) {
    let Model {
        q_heads,
        kv_heads,
        head_dim,
        ..
    } = *model;
    let name = format!(
        "attention {} {:?} {} rows={rows} context={context}",
        E::NAME,
        Isa::current(),
        model.name
    );
    let rope_name = name.replacen("attention", "rope_append", 1);
    if !name.contains(&bench.filter) && !rope_name.contains(&bench.filter) {
        return;
    }
    let page_size = 64;
    let pages = context.div_ceil(page_size);
    let shape = CacheShape {
        pages,
        kv_heads,
        page_size,
        head_dim,
    };
    let layers = if rows == 1 {
        (WORKING_SET / 2 / (pages * shape.page_len() * size_of::<E>())).clamp(1, 64)
    } else {
        1
    };
    let mut caches: Vec<PageBuffer<E>> = (0..layers)
        .map(|_| values::<E>(pages * shape.page_len()))
        .collect();
    let positions: Vec<i32> = (context - rows..context).map(|p| p as i32).collect();
    let (row_seq, table) = (vec![0; rows], (0..pages as i32).collect::<Vec<_>>());
    let (cu_seqlens, kv_lens) = ([0, rows as i32], [context as i32]);
    let meta = StepMeta {
        positions: &positions,
        row_seq: &row_seq,
        cu_seqlens: &cu_seqlens,
        kv_lens: &kv_lens,
        block_table: &table,
        max_pages: pages,
        page_size,
    };
    let qkv = values::<E>(rows * (q_heads + 2 * kv_heads) * head_dim);
    let tables = values::<f32>(context * head_dim / 2);
    let mut q = values::<E>(rows * q_heads * head_dim);
    let mut out = vec![E::default(); rows * q_heads * head_dim];
    bench.line(
        &rope_name,
        2.0 * (qkv.len() * size_of::<E>()) as f64,
        0.0,
        |i| {
            rope_append(RopeAppend {
                q_heads,
                kv_heads,
                head_dim,
                qkv: &qkv,
                bias: None,
                q_norm: None,
                k_norm: None,
                eps: 0.0,
                weight_offset: 0.0,
                tables: Some((&tables, &tables)),
                meta,
                q: &mut q,
                cache: &mut caches[i % layers],
            })
            .expect("shapes fit");
        },
    );
    let groups = q_heads / kv_heads;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let spec = AttentionSpec {
        scale,
        causal: true,
        window: None,
        softcap: None,
        groups,
    };
    let pairs: usize = positions.iter().map(|&p| p as usize + 1).sum();
    let bytes = (2 * context * kv_heads * head_dim * size_of::<E>()) as f64;
    bench.line(
        &name,
        bytes,
        4.0 * (pairs * q_heads * head_dim) as f64,
        |i| {
            let args = AttentionArgs {
                kv_heads,
                head_dim,
                q: &q,
                cache: &caches[i % layers],
                meta,
                out: &mut out,
            };
            attention(&spec, args).expect("shapes fit");
        },
    );
}

/// All kernels of one decode step at batch 1, with weights of their own for every layer.
fn bench_decode(bench: &Bench, model: &Model, sizes: [usize; 4], context: usize) {
    let Model {
        q_heads,
        kv_heads,
        head_dim: d,
        ..
    } = *model;
    let [layers, hidden, intermediate, vocabulary] = sizes;
    let name = format!("decode step bf16 {} context={context}", model.name);
    if !name.contains(&bench.filter) {
        return;
    }
    let heads = q_heads + 2 * kv_heads;
    let shapes = [
        (heads * d, hidden),
        (hidden, q_heads * d),
        (2 * intermediate, hidden),
        (hidden, intermediate),
    ];
    let weights: Vec<[PageBuffer<bf16>; 4]> = (0..layers)
        .map(|_| shapes.map(|(n, k)| values(n * k)))
        .collect();
    let head = values::<bf16>(vocabulary * hidden);
    let page_size = 64;
    let pages = context.div_ceil(page_size);
    let shape = CacheShape {
        pages,
        kv_heads,
        page_size,
        head_dim: d,
    };
    let mut caches: Vec<PageBuffer<bf16>> = (0..layers)
        .map(|_| values(pages * shape.page_len()))
        .collect();
    let (positions, table) = ([context as i32 - 1], (0..pages as i32).collect::<Vec<_>>());
    let kv_lens = [context as i32];
    let meta = StepMeta {
        positions: &positions,
        row_seq: &[0],
        cu_seqlens: &[0, 1],
        kv_lens: &kv_lens,
        block_table: &table,
        max_pages: pages,
        page_size,
    };
    let tables = values::<f32>(context * d / 2);
    let gamma = values::<bf16>(hidden);
    let (mut x, mut next) = (values::<bf16>(hidden), values::<bf16>(hidden));
    let mut qkv = values::<bf16>(heads * d);
    let (mut q, mut attended) = (values::<bf16>(q_heads * d), values::<bf16>(q_heads * d));
    let mut inner = values::<bf16>(intermediate);
    let norm = Prologue::RmsNorm { eps: 1e-5 };
    let spec = AttentionSpec {
        scale: 1.0 / (d as f32).sqrt(),
        causal: true,
        window: None,
        softcap: None,
        groups: q_heads / kv_heads,
    };
    let project = |prologue,
                   epilogue,
                   x: &[bf16],
                   w: &[bf16],
                   residual: Option<&[bf16]>,
                   n,
                   y: &mut [bf16]| {
        let args = LinearArgs {
            m: 1,
            n,
            k: x.len(),
            x,
            delta: None,
            sum: None,
            gamma: Some(&gamma[..x.len().min(hidden)]),
            w,
            bias: None,
            residual,
            y,
        };
        linear(
            &LinearSpec {
                prologue,
                weight_offset: 0.0,
                epilogue,
            },
            args,
        )
        .expect("shapes fit");
    };
    let weight_bytes: usize =
        2 * (shapes.iter().map(|(n, k)| n * k).sum::<usize>() * layers + head.len());
    let cache_bytes = layers * 4 * context * kv_heads * d;
    let bytes = (weight_bytes + cache_bytes) as f64;
    bench.line(&name, bytes, 0.0, |_| {
        for (w, cache) in weights.iter().zip(&mut caches) {
            project(norm, Epilogue::None, &x, &w[0], None, heads * d, &mut qkv);
            rope_append(RopeAppend {
                q_heads,
                kv_heads,
                head_dim: d,
                qkv: &qkv,
                bias: None,
                q_norm: None,
                k_norm: None,
                eps: 0.0,
                weight_offset: 0.0,
                tables: Some((&tables, &tables)),
                meta,
                q: &mut q,
                cache,
            })
            .expect("shapes fit");
            let args = AttentionArgs {
                kv_heads,
                head_dim: d,
                q: &q,
                cache,
                meta,
                out: &mut attended,
            };
            attention(&spec, args).expect("shapes fit");
            project(
                Prologue::None,
                Epilogue::Residual,
                &attended,
                &w[1],
                Some(&x),
                hidden,
                &mut next,
            );
            project(
                norm,
                Epilogue::SwiGlu,
                &next,
                &w[2],
                None,
                2 * intermediate,
                &mut inner,
            );
            project(
                Prologue::None,
                Epilogue::Residual,
                &inner,
                &w[3],
                Some(&next),
                hidden,
                &mut x,
            );
        }
        let mut id = [0];
        lm_head_argmax(1, vocabulary, hidden, &x, &head, &mut id).expect("shapes fit");
        black_box(id);
        x.copy_from_slice(&gamma);
    });
}

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "--single") {
        pool::set_threads(1);
        args.remove(0);
    }
    let bench = Bench {
        filter: args.pop().unwrap_or_default(),
    };
    println!("{:?}, {} threads", Isa::detected(), pool::threads());

    // A large read, for the machine's bandwidth.
    let big = values::<f32>(WORKING_SET / 4);
    bench.line("read memory", (big.len() * 4) as f64, 0.0, |_| {
        let sums: Vec<std::sync::atomic::AtomicU32> = (0..64).map(|_| 0.into()).collect();
        pool::parallel_for(64, |i| {
            let part = &big[i * (big.len() / 64)..][..big.len() / 64];
            let mut lanes = [0.0f32; 64];
            for chunk in part.chunks_exact(64) {
                for (l, v) in lanes.iter_mut().zip(chunk) {
                    *l += v;
                }
            }
            sums[i].store(
                lanes.iter().sum::<f32>().to_bits(),
                std::sync::atomic::Ordering::Relaxed,
            );
        });
        black_box(&sums);
    });
    drop(big);

    bench.line("empty loop, this pool (100 calls)", 0.0, 0.0, |_| {
        (0..100).for_each(|_| pool::parallel_for(2, |i| _ = black_box(i)));
    });
    bench.line("empty loop, rayon (100 calls)", 0.0, 0.0, |_| {
        (0..100).for_each(|_| _ = rayon::join(|| black_box(0), || black_box(1)));
    });

    let small = [
        ("qkv", 960, 576),
        ("o", 576, 576),
        ("gate_up", 3072, 576),
        ("down", 576, 1536),
        ("head", 49152, 576),
    ];
    let billion = [
        ("qkv", 3072, 2048),
        ("o", 2048, 2048),
        ("gate_up", 16384, 2048),
        ("down", 2048, 8192),
    ];
    for (label, n, k) in small {
        bench_linear::<bf16>(&bench, label, 1, n, k, false);
        bench_linear::<bf16>(&bench, label, 8, n, k, false);
    }
    bench_linear::<bf16>(&bench, "o hot", 1, 576, 576, false);
    bench_linear::<bf16>(&bench, "o hot", 8, 576, 576, false);
    bench_linear::<bf16>(&bench, "gate_up fused", 1, 3072, 576, true);
    for (label, n, k) in billion {
        for m in [1, 8] {
            bench_linear::<bf16>(&bench, label, m, n, k, false);
        }
    }
    for (label, n, k) in billion.into_iter().chain(small) {
        for m in [128, 512] {
            bench_linear::<bf16>(&bench, label, m, n, k, false);
        }
    }
    for (label, n, k) in [small[2], billion[1], billion[3]] {
        for m in [1, 8, 128] {
            bench_linear::<f32>(&bench, label, m, n, k, false);
        }
        bench_gemm_crate(&bench, 128, n, k);
    }
    for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable] {
        isa.with(|| {
            for m in [1, 128] {
                bench_linear::<bf16>(&bench, "o", m, 2048, 2048, false);
                bench_linear::<f32>(&bench, "o", m, 2048, 2048, false);
            }
        });
    }

    let models = [
        Model {
            name: "smollm2-135m",
            q_heads: 9,
            kv_heads: 3,
            head_dim: 64,
        },
        Model {
            name: "llama-3.2-1b",
            q_heads: 32,
            kv_heads: 8,
            head_dim: 64,
        },
        Model {
            name: "qwen3-0.6b",
            q_heads: 16,
            kv_heads: 8,
            head_dim: 128,
        },
    ];
    for model in &models {
        for (rows, context) in [(1, 128), (1, 2048), (1, 16384), (128, 128), (2048, 2048)] {
            bench_attention::<bf16>(&bench, model, rows, context);
        }
    }
    bench_attention::<f32>(&bench, &models[1], 1, 2048);
    bench_attention::<f32>(&bench, &models[1], 2048, 2048);
    Isa::Avx2.with(|| bench_attention::<bf16>(&bench, &models[1], 2048, 2048));

    bench_decode(&bench, &models[0], [30, 576, 1536, 49152], 128);
    bench_decode(&bench, &models[0], [30, 576, 1536, 49152], 2048);
    bench_decode(&bench, &models[1], [16, 2048, 8192, 128_256], 128);
    for (m, k) in [(1, 576), (1, 4096), (128, 2048)] {
        let (x, gamma, mut h) = (
            values::<bf16>(m * k),
            values::<bf16>(k),
            vec![bf16::ZERO; m * k],
        );
        bench.line(
            &format!("rms_norm bf16 M={m} K={k}"),
            4.0 * (m * k) as f64,
            0.0,
            |_| {
                norm::rms_norm(&x, Some(&gamma), 1e-5, 0.0, k, &mut h).expect("shapes fit");
            },
        );
    }
}
