//! Bytes and operations of launches against numbers by hand, and the probes of the ceilings through NVRTC.

mod common;

use common::{h100, plan};
use lathe_codegen::ProgramKind;
use lathe_codegen::cuda::{CudaProgram, Probe, Sampling, Sizes, lower_program, probe_kernel};
use lathe_codegen::work::{KernelClass, Span, Work, WorkShape};
use lathe_ir::DType;
use lathe_runtime::device::cuda::compile::compile_all;
use lathe_runtime::device::cuda::library::{self, Library};
use lathe_runtime::device::cuda::nvrtc::Source;

fn lowered(kind: ProgramKind, sizes: Sizes) -> CudaProgram {
    let plan = plan("configs/llama-3.1-8b", DType::BF16, &[]);
    let program = plan.program(kind).unwrap();
    lower_program(&plan, program, sizes, Sampling::GreedyOnly, h100()).unwrap()
}

fn gemm(p: &CudaProgram, n: usize, k: usize) -> Vec<Work> {
    let of = |w: &Work| matches!(w.shape, WorkShape::Gemm { n: a, k: b, .. } if (a, b) == (n, k));
    p.launches
        .iter()
        .map(|l| l.work)
        .filter(|w| of(w))
        .collect()
}

/// Llama-3.1-8B, one token: 4096 features, 32 and 8 heads of 128, an MLP of 14336, 128256 tokens, in bf16.
#[test]
fn decode_of_the_8b_by_hand() {
    let p = lowered(ProgramKind::Decode, Sizes { t: 1, b: 1, r: 1 });
    // Gate and up, which have the norm's gain in them; the result is half as wide.
    let up = gemm(&p, 28672, 4096);
    assert_eq!(up.len(), 32);
    let (weights, x, y) = (28672 * 4096, 4096, 14336);
    for w in &up {
        assert_eq!(w.bytes, 2.0 * (weights + x + y) as f64);
        assert_eq!(w.flops, 2.0 * weights as f64);
        assert_eq!(w.class, KernelClass::Gemm);
    }
    let down = gemm(&p, 4096, 14336);
    assert_eq!(down.len(), 32);
    // The residual is read, the sum written.
    let bytes = 2.0 * (4096 * 14336 + 14336 + 2 * 4096) as f64;
    assert!(down.iter().all(|w| w.bytes == bytes), "{:?}", down[0]);
    // Logits of a fused argmax stay in registers.
    let head = gemm(&p, 128_256, 4096);
    let read = 2.0 * (128_256 * 4096 + 4096) as f64;
    let gain = 2.0 * 4096.0;
    assert!(
        (read..=read + 3.0 * gain).contains(&head[0].bytes),
        "{head:?}"
    );
    let attention: Vec<&Work> = p
        .launches
        .iter()
        .map(|l| &l.work)
        .filter(|w| w.class == KernelClass::Attention)
        .collect();
    assert_eq!(attention.len(), 32);
    let (bytes, flops) = attention[0].on(&[Span { rows: 1, len: 300 }]);
    // 48 heads in, 32 out; 4 KiB of keys and values a token; two products of 32 heads with every key.
    assert_eq!(bytes, (2 * (48 + 32) * 128 + 300 * 4096) as f64);
    assert_eq!(flops, (4 * 32 * 128 * 300) as f64);
}

#[test]
fn prefill_of_the_8b_by_hand() {
    let t = 2048;
    let p = lowered(ProgramKind::General, Sizes { t, b: 1, r: 1 });
    let up = gemm(&p, 28672, 4096);
    assert_eq!(up.len(), 32);
    assert!(
        up.iter()
            .all(|w| w.flops == 2.0 * (t * 28672 * 4096) as f64)
    );
    let spans = [Span { rows: t, len: t }];
    let attends = |w: &&Work| matches!(w.shape, WorkShape::Attention(_));
    let works: Vec<&Work> = p.launches.iter().map(|l| &l.work).collect();
    let attention: Vec<&&Work> = works.iter().filter(|w| attends(w)).collect();
    assert_eq!(attention.len(), 32);
    let (bytes, flops) = attention[0].on(&spans);
    assert_eq!(bytes, (2 * 2 * t * 32 * 128 + t * 4096) as f64);
    // Half of the square, with the diagonal.
    assert_eq!(flops, (4 * 32 * 128) as f64 * (t * (t + 1) / 2) as f64);
    // Rotation and append read the packed rows once and write them once.
    let moved = 2 * 2 * t * 48 * 128;
    let appends = works
        .iter()
        .filter(|w| w.class == KernelClass::Attention && w.bytes == moved as f64);
    assert_eq!(appends.count(), 32);
    // Norms are factors of the GEMMs; only the embedding leaves no sums of squares, 8 bytes a row.
    let norms: Vec<f64> = works
        .iter()
        .filter(|w| w.class == KernelClass::Pointwise)
        .map(|w| w.bytes)
        .collect();
    assert_eq!(norms, [(t * (4096 * 2 + 8)) as f64]);
}

#[test]
#[ignore = "NVRTC missing (make nvrtc)"]
fn probes_compile() {
    if let Err(error) = library::ensure(Library::Nvrtc) {
        panic!("{error}");
    }
    let sources = [Probe::Empty, Probe::EmptyPdl, Probe::Read, Probe::Copy]
        .map(probe_kernel)
        .map(|k| Source::new(k.name, k.text));
    let dir = tempfile::tempdir().unwrap();
    for outcome in compile_all(&sources, None, dir.path(), 2, &|_| {}) {
        let compiled = outcome.unwrap_or_else(|e| panic!("{e}"));
        assert!(compiled.resources.iter().all(|r| r.spill_stores == 0));
    }
}
