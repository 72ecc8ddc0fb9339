//! In float32 on the CPU a token depends on its sequence alone: however the scheduler batches, cuts,
//! pages, pre-empts and overlaps, every family gives the tokens of one-by-one execution, bit for bit.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use lathe::bench::dataset::{Dataset, Request};
use lathe::bench::serve::{Load, Served, serve};
use lathe::config::{Options, Resolved};
use lathe::model::{CompiledModel, WeightChoice};
use lathe_runtime::load::LoadOptions;
use lathe_runtime::scheduler::{EngineConfig, Policy};

fn families() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    folders
}

fn compiled(folder: &Path) -> CompiledModel {
    let arguments = [
        "lathe", "--device", "cpu", "--dtype", "float32", "doctor", "--model",
    ];
    let arguments = arguments.iter().map(Into::into).chain([folder.into()]);
    let cli = lathe::cli::parse(arguments).unwrap();
    let resolved = Resolved::new(Options::default(), Options::default());
    CompiledModel::compile(&cli.global, &resolved).unwrap()
}

/// Prompts of 1 to 14 tokens, outputs of 1 to 18: more than a window, and not multiples of a page.
fn dataset() -> Dataset {
    let request = |i: u32| Request {
        task_id: i64::from(i),
        input_ids: (0..1 + i * 5 % 14)
            .map(|t| (i * 31 + t * 7) % 256)
            .collect(),
        output_tokens: 1 + i * 7 % 18,
    };
    Dataset {
        path: "d".into(),
        requests: (0..20).map(request).collect(),
    }
}

/// Runs the dataset on a fresh cache; `change` adapts limits and configuration.
fn run(
    model: &mut CompiledModel,
    concurrency: i64,
    options: LoadOptions,
    change: impl Fn(&mut EngineConfig),
) -> Served {
    let mut executor = model.load(WeightChoice::Checkpoint, options).unwrap();
    let mut config = EngineConfig::of(&executor.capacity());
    config.overlap = false;
    change(&mut config);
    let load = Load {
        concurrency,
        warmup: 1,
        ..Load::default()
    };
    let stop = AtomicBool::new(false);
    let served = serve(
        &mut *executor,
        config,
        &dataset(),
        &load,
        &stop,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(served.incomplete, None);
    served
}

fn tokens(served: &Served) -> Vec<&[u32]> {
    let record = served.records.iter();
    record
        .map(|record| record.output_tokens.as_slice())
        .collect()
}

#[test]
fn tokens_do_not_depend_on_the_schedule() {
    let roomy = LoadOptions {
        max_tokens: 64,
        max_rows: 8,
        max_sequences: 8,
        max_seq_len: 32,
        page_size: 32,
        pages: 8,
    };
    // 30 pages of 3 tokens hold three sequences of full length.
    let tight = LoadOptions {
        max_tokens: 11,
        page_size: 3,
        pages: 30,
        ..roomy
    };
    let mut n_run = 0;
    for folder in families() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut model = compiled(&folder);
        // The device refuses other heads with a reason of its own.
        if model
            .plan
            .caches
            .iter()
            .any(|cache| cache.head_dim % 16 != 0)
        {
            continue;
        }
        n_run += 1;
        let alone = run(&mut model, 1, roomy, |_| {});
        let lengths: Vec<usize> = tokens(&alone).iter().map(|tokens| tokens.len()).collect();
        let wanted: Vec<usize> = (0..20).map(|i| 1 + i * 7 % 18).collect();
        assert_eq!(lengths, wanted, "{name}");
        let batched = run(&mut model, -1, roomy, |_| {});
        assert!(batched.totals.peak_sequences == 8, "{name}");
        assert_eq!(tokens(&batched), tokens(&alone), "{name}: batched");
        let overlapped = run(&mut model, -1, tight, |config| config.overlap = true);
        assert_eq!(
            tokens(&overlapped),
            tokens(&alone),
            "{name}: chunks, overlapped"
        );
        let preempted = run(&mut model, -1, tight, |config| {
            config.policy = Policy::MaxUtilization;
        });
        assert!(preempted.totals.preemptions > 0, "{name}");
        assert_eq!(tokens(&preempted), tokens(&alone), "{name}: pre-empted");
    }
    assert!(n_run >= 12, "{n_run} families");
}
