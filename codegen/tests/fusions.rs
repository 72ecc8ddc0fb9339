//! What kernels take over from their neighbours is a function of the program: decided before a kernel is generated,
//! with a reason for each yes and no, and obeyed by the launches.

use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, FusionKind, Fusions, GemmFusion, GemmKey, Sampling, Sizes,
    StepFusion, Variant, Verdict, fusions, lower_tuned,
};
use lathe_codegen::{Plan, Program, Programs, lower};
use lathe_ir::{DType, Epilogue, Graph, text};

const H100: CudaOptions = CudaOptions {
    pdl: true,
    sms: 132,
    page_size: 64,
    max_pages: 64,
    plain: false,
    per_op: false,
};

fn graph(text: &str) -> Graph {
    text::parse(text).unwrap_or_else(|e| panic!("{e}"))
}

/// A program of one sequence per row.
fn decode(text: &str) -> Plan {
    let graph = graph(text);
    let programs = Programs {
        decode: Some(&graph),
        general: None,
        full: None,
    };
    lower("sample", DType::BF16, &programs).unwrap()
}

/// A program of ragged rows.
fn general(text: &str) -> Plan {
    let graph = graph(text);
    let programs = Programs {
        decode: None,
        general: Some(&graph),
        full: None,
    };
    lower("sample", DType::BF16, &programs).unwrap()
}

fn program(plan: &Plan) -> &Program {
    &plan.programs[0]
}

fn decided(plan: &Plan, sizes: Sizes, sampling: Sampling, options: CudaOptions) -> Fusions {
    let none = Choices::default();
    fusions(plan, program(plan), sizes, sampling, options, &none).unwrap()
}

fn launched(plan: &Plan, sizes: Sizes, sampling: Sampling, choices: &Choices) -> CudaProgram {
    lower_tuned(plan, program(plan), sizes, sampling, H100, choices).unwrap()
}

/// The GEMMs in order.
fn gemms<'a>(fusions: &'a Fusions) -> Vec<&'a GemmFusion> {
    let gemm = |s: &'a StepFusion| match &s.kind {
        FusionKind::Gemm(g) => Some(&**g),
        _ => None,
    };
    fusions.steps.iter().filter_map(gemm).collect()
}

fn reason<T>(verdict: Option<&Verdict<T>>) -> String {
    verdict.map_or("-".to_owned(), Verdict::to_string)
}

/// Compares with `snapshots/cuda/NAME.snap`.
fn snapshot(name: &str, fusions: &Fusions) {
    let settings = || {
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("../../snapshots/cuda");
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings
    };
    settings().bind(|| insta::assert_snapshot!(name, fusions));
}

/// Two products with norms and a residual between them, and greedy sampling.
const MODEL: &str = r#"graph "model" {
  %0 = input {name="step.tokens"} : i32[T]
  %1 = weight {name="embed"} : bf16[512,256]
  %2 = embedding table=%1, ids=%0 : bf16[T,256]
  %3 = weight {name="up"} : bf16[256,256]
  %4 = gemm x=%2, w=%3 {prologue=rms, eps=1e-5} : bf16[T,256]
  %5 = weight {name="down"} : bf16[256,256]
  %6 = gemm x=%4, w=%5, residual=%2 {epilogue=residual} : bf16[T,256]
  %7 = weight {name="head"} : bf16[512,256]
  %8 = gemm x=%6, w=%7 {prologue=rms, eps=1e-5} : bf16[T,512]
  %9 = sample %8 : i32[T]
  return next=%9, logits=%8
}"#;

#[test]
fn decisions_are_told_with_their_reasons() {
    let plan = decode(MODEL);
    let few = decided(&plan, Sizes::decode(1), Sampling::GreedyOnly, H100);
    snapshot("fusions_decode_1", &few);
    let many = decided(&plan, Sizes::decode(8), Sampling::GreedyOnly, H100);
    snapshot("fusions_decode_8", &many);
    // A function: nothing is remembered from one program to the next.
    let again = decided(&plan, Sizes::decode(1), Sampling::GreedyOnly, H100);
    assert_eq!(again, few);
}

#[test]
fn the_head_picks_a_token_where_nobody_wants_logits() {
    let plan = decode(MODEL);
    let argmax = |rows: usize, sampling, options| {
        let fusions = decided(&plan, Sizes::decode(rows), sampling, options);
        let verdict = reason(gemms(&fusions).last().unwrap().argmax.as_ref());
        let taken = matches!(
            fusions.steps.last().unwrap().kind,
            FusionKind::Taken { by: 3 }
        );
        assert_eq!(taken, verdict.starts_with("yes"), "{verdict}");
        verdict
    };
    let plain = CudaOptions {
        plain: true,
        ..H100
    };
    assert_eq!(
        argmax(4, Sampling::GreedyOnly, H100),
        "yes: step 4 picks the largest and nobody else reads the logits"
    );
    for (rows, sampling, options, no) in [
        (4, Sampling::Greedy, H100, "the logits are wanted"),
        (
            4,
            Sampling::Params,
            H100,
            "rows are sampled by their parameters",
        ),
        (
            8,
            Sampling::GreedyOnly,
            H100,
            "8 rows, and the GEMV takes 4",
        ),
        (1, Sampling::GreedyOnly, plain, "plain kernels fuse nothing"),
    ] {
        assert_eq!(argmax(rows, sampling, options), format!("no: {no}"));
    }
    // And the launches obey: none for the sampling step.
    for (sampling, own) in [(Sampling::GreedyOnly, false), (Sampling::Greedy, true)] {
        let cuda = launched(&plan, Sizes::decode(1), sampling, &Choices::default());
        assert_eq!(cuda.launches.iter().any(|l| l.step == 4), own);
        assert_eq!(cuda.kernels.iter().any(|k| k.family == "sample"), own);
    }
}

/// Norms by kernel: whole in the GEMV, as factors on the tensor cores, apart from the library and where gamma is not in
/// the weight.
#[test]
fn norms_are_taken_as_each_kernel_can() {
    let plan = decode(MODEL);
    let norm = |fusions: &Fusions, i: usize| reason(gemms(fusions)[i].norm.as_ref());
    let few = decided(&plan, Sizes::decode(4), Sampling::GreedyOnly, H100);
    assert_eq!(
        norm(&few, 0),
        "yes: the kernel normalises the rows in its registers"
    );
    assert_eq!(norm(&few, 1), "-");
    let key = GemmKey {
        m: 4,
        n: 256,
        k: 256,
        norm: true,
        epilogue: Epilogue::None,
        bias: false,
    };
    let mut choices = Choices::default();
    choices.insert(key, Variant::CublasLt { algorithm: 2 });
    let sizes = Sizes::decode(4);
    let sampling = Sampling::GreedyOnly;
    let chosen = fusions(&plan, program(&plan), sizes, sampling, H100, &choices).unwrap();
    assert_eq!(norm(&chosen, 0), "no: cuBLASLt takes no norm");
    assert_eq!(gemms(&chosen)[0].library, Some(2));
    let cuda = launched(&plan, sizes, sampling, &choices);
    let of_step: Vec<&str> = cuda
        .launches
        .iter()
        .filter(|l| l.step == 1)
        .map(|l| cuda.kernels[l.kernel].family)
        .collect();
    assert_eq!(of_step, ["norm", "gemv"]);

    let gamma = MODEL
        .replace("%3 =", "%10 = weight {name=\"g\"} : bf16[256]\n  %3 =")
        .replace("x=%2, w=%3 {", "x=%2, w=%3, gamma=%10 {");
    let plan = decode(&gamma);
    let many = decided(&plan, Sizes::decode(8), Sampling::GreedyOnly, H100);
    assert_eq!(norm(&many, 0), "no: gamma is not in the weight");
    let tiny = decode(&MODEL.replace("eps=1e-5", "eps=1e-9"));
    let many = decided(&tiny, Sizes::decode(8), Sampling::GreedyOnly, H100);
    assert_eq!(
        norm(&many, 0),
        "no: fixed-point sums are too coarse for so small an eps"
    );
}

#[test]
fn sums_of_squares_are_left_for_a_later_norm() {
    let plan = decode(MODEL);
    let sums = |plan: &Plan, rows: usize, i: usize| {
        let fusions = decided(plan, Sizes::decode(rows), Sampling::GreedyOnly, H100);
        reason(gemms(&fusions)[i].sums.as_ref())
    };
    // Nobody takes the norm of the first product, and nothing follows the head.
    assert_eq!((&*sums(&plan, 8, 0), &*sums(&plan, 8, 2)), ("-", "-"));
    assert_eq!(
        sums(&plan, 8, 1),
        "yes: step 3 takes the norm of the result as factors"
    );
    assert_eq!(
        sums(&plan, 4, 1),
        "no: the kernel gemv leaves no sums of squares"
    );
    // Without a norm before it no buffer is clear.
    let first = decode(&MODEL.replace("%2, w=%3 {prologue=rms, eps=1e-5}", "%2, w=%3"));
    assert_eq!(
        sums(&first, 8, 1),
        "no: no buffer is known to be clear: nothing before has sums of as many rows"
    );
    // The embedding's sums are read after the product that could have cleared them.
    let late = MODEL
        .replace(
            "  return next=%9",
            "  %11 = weight {name=\"late\"} : bf16[64,256]\n  \
             %12 = gemm x=%2, w=%11 {prologue=rms, eps=1e-5} : bf16[T,64]\n  return late=%12, next=%9",
        );
    assert_eq!(
        sums(&decode(&late), 8, 1),
        "no: step 5 has yet to read the sums of step 1"
    );
}

#[test]
fn gemvs_bring_the_next_weights_into_l2() {
    let plan = decode(MODEL);
    let fusions = decided(&plan, Sizes::decode(1), Sampling::GreedyOnly, H100);
    let prefetch: Vec<String> = gemms(&fusions)
        .iter()
        .map(|g| reason(g.prefetch.as_ref()))
        .collect();
    // A grid of 128 blocks brings 4 MiB.
    assert_eq!(
        prefetch,
        [
            "no: the weight of step 2 has fewer bytes than it takes",
            "no: the weight of step 3 has fewer bytes than it takes",
            "no: no GEMM follows",
        ]
    );
    let large = decode(
        &MODEL
            .replace("bf16[512,", "bf16[16384,")
            .replace("T,512]", "T,16384]"),
    );
    let fusions = decided(&large, Sizes::decode(1), Sampling::GreedyOnly, H100);
    let verdict = gemms(&fusions)[1].prefetch.as_ref().unwrap();
    assert_eq!(verdict.to_string(), "yes: step 3 reads this weight next");
    let cuda = launched(
        &large,
        Sizes::decode(1),
        Sampling::GreedyOnly,
        &Choices::default(),
    );
    let next = cuda.launches.iter().find(|l| l.step == 2).unwrap();
    let weight = lathe_codegen::cuda::Ref::Weight(*verdict.how().unwrap());
    assert_eq!(
        next.args.last(),
        Some(&lathe_codegen::cuda::Arg::Ptr(weight))
    );
    // Kernels of more rows have no such thing.
    let many = decided(&large, Sizes::decode(8), Sampling::GreedyOnly, H100);
    assert!(gemms(&many).iter().all(|g| g.prefetch.is_none()));
}

/// A kernel reads its weights before it waits for its predecessor, unless a step computes them.
#[test]
fn kernels_wait_for_weights_that_a_step_computes() {
    let text = r#"graph "computed" {
  %0 = input {name="step.tokens"} : i32[T]
  %1 = weight {name="embed"} : bf16[512,256]
  %2 = embedding table=%1, ids=%0 : bf16[T,256]
  %3 = permute %2 {perm=[1,0]} : bf16[256,T]
  %4 = matmul %3, %2 : bf16[256,256]
  %5 = linear x=%2, w=%4 : bf16[T,256]
  return y=%5
}"#;
    let plan = decode(text);
    let fusions = decided(&plan, Sizes::decode(1), Sampling::GreedyOnly, H100);
    let waits: Vec<&str> = fusions
        .steps
        .iter()
        .filter(|s| !s.early.is_made())
        .map(|s| s.early.reason())
        .collect();
    assert_eq!(waits, ["step 2 computes a weight that it reads"]);
    let cuda = launched(
        &plan,
        Sizes::decode(1),
        Sampling::GreedyOnly,
        &Choices::default(),
    );
    for l in &cuda.launches {
        assert_eq!(l.pdl, l.step != 3, "{l:?}");
    }
}

/// Attention of a packed projection in a general program.
const ATTENTION: &str = r#"graph "attention" {
  %0 = input {name="step.tokens"} : i32[T]
  %1 = input {name="step.positions"} : i32[T]
  %2 = weight {name="embed"} : bf16[512,384]
  %3 = embedding table=%2, ids=%0 : bf16[T,384]
  %4 = cache {layer=0, kv_heads=1, head_dim=64} : cache
  %5 = table {name="inv_freq", data=[FREQUENCIES]} : f32[32]
  %6 = attn_qkv qkv=%3, cache=%4, positions=%1, inv_freq=%5 {heads=4, kv_heads=1, head_dim=64, rope=1.0, scale=0.125, causal=true, groups=4, stage=closed} : (bf16[T,4,64], cache)
  %7 = get %6 {index=0} : bf16[T,4,64]
  %8 = reshape %7 : bf16[T,256]
  %9 = weight {name="again"} : bf16[384,256]
  %10 = linear x=%8, w=%9 : bf16[T,384]
  %11 = cache {layer=1, kv_heads=1, head_dim=64} : cache
  %12 = attn_qkv qkv=%10, cache=%11, positions=%1, inv_freq=%5 {heads=4, kv_heads=1, head_dim=64, rope=1.0, scale=0.125, causal=true, groups=4, stage=closed} : (bf16[T,4,64], cache)
  %13 = get %12 {index=0} : bf16[T,4,64]
  return y=%13
}"#;

#[test]
fn attention_says_who_appends_and_who_takes_single_rows() {
    let text = ATTENTION.replace("FREQUENCIES", &["1.0"; 32].join(","));
    let plan = general(&text);
    let sizes = |b: usize| Sizes { t: 512, b, r: b };
    let told = |b: usize| decided(&plan, sizes(b), Sampling::Greedy, H100);
    snapshot("fusions_mixed_16", &told(16));
    assert!(
        told(8)
            .to_string()
            .contains("decode rows  no: 8 sequences are too few")
    );
    let families = |b: usize| -> Vec<&str> {
        let cuda = launched(&plan, sizes(b), Sampling::Greedy, &Choices::default());
        let names = cuda.launches.iter().map(|l| cuda.kernels[l.kernel].family);
        names.filter(|f| f.starts_with("attn")).collect()
    };
    // One list of tiles serves both layers.
    let lists = |b: usize| families(b).iter().filter(|f| **f == "attn_plan").count();
    assert_eq!((lists(8), lists(16)), (1, 1));
    assert_eq!(families(8), ["attn_plan", "attn_prefill", "attn_prefill"]);
    assert_eq!(families(16)[..2], ["attn_decode", "attn_plan"]);

    let plan = decode(&text);
    let few = decided(&plan, Sizes::decode(2), Sampling::Greedy, H100).to_string();
    assert!(few.contains("append       yes: the decode kernel rotates and appends its own row"));
    assert!(!few.contains("tiles"), "{few}");
}

/// Whatever the multiprocessors, every GEMM has a kernel that fits them, and none is a refusal in one line.
#[test]
fn gpus_of_any_size_have_kernels() {
    let plan = decode(MODEL);
    for sms in 1..=160 {
        let options = CudaOptions { sms, ..H100 };
        for rows in [1, 4, 5, 100, 129, 2048] {
            let (sizes, sampling) = (Sizes::decode(rows), Sampling::GreedyOnly);
            let none = Choices::default();
            let cuda = lower_tuned(&plan, program(&plan), sizes, sampling, options, &none);
            for l in cuda.unwrap().launches.iter().filter(|l| l.cluster > 1) {
                assert!(
                    l.grid[0] <= sms && l.grid[0] % l.cluster == 0,
                    "{sms}: {l:?}"
                );
            }
        }
        let key = GemmKey {
            m: 200,
            n: 4096,
            k: 4096,
            norm: false,
            epilogue: Epilogue::None,
            bias: false,
        };
        for variant in Variant::candidates(&key, sms as usize) {
            assert_eq!(variant.check(&key, sms as usize), Ok(()));
        }
    }
    let none = CudaOptions { sms: 0, ..H100 };
    let (sizes, sampling) = (Sizes::decode(1), Sampling::GreedyOnly);
    let choices = Choices::default();
    let refused = lower_tuned(&plan, program(&plan), sizes, sampling, none, &choices);
    let message = refused.unwrap_err().to_string();
    assert!(
        message.ends_with("kernels are generated for at least one multiprocessor"),
        "{message}"
    );
    // A choice that was timed on a larger GPU.
    let key = GemmKey {
        m: 129,
        n: 256,
        k: 256,
        norm: false,
        epilogue: Epilogue::Residual,
        bias: false,
    };
    let mut choices = Choices::default();
    choices.insert(key, "tiled_128x128_c2x1".parse().unwrap());
    let one = CudaOptions { sms: 1, ..H100 };
    let refused = lower_tuned(
        &plan,
        program(&plan),
        Sizes::decode(129),
        sampling,
        one,
        &choices,
    );
    let message = refused.unwrap_err().to_string();
    assert!(
        message.ends_with(
            "the variant tiled_128x128_c2x1 does not compute m129_n256_k256_residual on 1 multiprocessors"
        ),
        "{message}"
    );
}
