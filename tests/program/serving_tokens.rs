//! In float32 on the CPU a token depends on its sequence alone: however the scheduler batches, cuts,
//! pages, pre-empts and overlaps, every family gives the tokens of one-by-one execution, bit for bit.

use crate::common::{compiled, golden, goldens};
use std::sync::atomic::AtomicBool;

use lathe::bench::dataset::{Dataset, Request};
use lathe::bench::serve::{Load, Served, serve};
use lathe::model::{CompiledModel, WeightChoice};
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::engine::{
    Clock, Engine, EngineConfig, FinishReason, Finished, Policy, Progress, RequestError,
};
use lathe_runtime::sampling::SamplingParams;

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
    for folder in goldens() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut model = compiled(&folder, "");
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
    assert_eq!(n_run, 14, "golden families");
}

/// Requests of one batch with their own temperature, top-k, top-p, seed, stop tokens and length; one is
/// cancelled and two are refused: each gets what it gets alone.
#[test]
fn requests_keep_their_own_ways() {
    use lathe_runtime::engine::Request;

    let mut model = compiled(&golden("qwen3"), "");
    let options = LoadOptions {
        max_tokens: 24,
        max_rows: 8,
        max_sequences: 8,
        max_seq_len: 40,
        page_size: 4,
        pages: 80,
    };
    let vocab = model.info.vocab as i32;
    let mut executor = model.load(WeightChoice::Checkpoint, options).unwrap();
    let greedy = SamplingParams::default();
    let warm = |temperature, top_k, top_p, seed| SamplingParams {
        temperature,
        top_k,
        top_p,
        seed,
    };
    let ways = [
        greedy,
        warm(1.0, 0, 1.0, 1),
        warm(1.0, 0, 1.0, 2),
        warm(0.7, 5, 1.0, 3),
        warm(1.3, 0, 0.8, 4),
        warm(0.9, 20, 0.95, 5),
        warm(1.0, 1, 1.0, 6),
        greedy,
    ];
    // The same prompt for all: only the ways differ.
    let request = |id: u64| Request {
        id,
        prompt: vec![5, 17, 99, 3, 42],
        max_new: if id == 7 { 1 } else { 20 },
        stop: Vec::new(),
        params: ways[id as usize],
        arrival_ns: 0,
    };
    let config = EngineConfig::of(&executor.capacity());
    let mut run = |requests: &[Request], cancel: Option<u64>, overlap: bool| -> Vec<Finished> {
        let config = EngineConfig { overlap, ..config };
        let mut engine = Engine::new(&mut *executor, config, Clock::start()).unwrap();
        for request in requests {
            engine.add(request.clone()).unwrap();
        }
        let mut iterations = 0;
        while engine.iterate().unwrap() == Progress::Busy {
            iterations += 1;
            if iterations == 9 {
                assert!(cancel.is_none_or(|id| engine.cancel(id)));
            }
            // Bad requests that arrive in the middle change nothing.
            let long = Request {
                max_new: 1000,
                ..request(0)
            };
            let unknown = Request {
                id: 77,
                prompt: vec![vocab],
                ..request(0)
            };
            if iterations == 4 && requests.len() > 1 {
                let long = Request { id: 78, ..long };
                assert!(matches!(
                    engine.add(long),
                    Err(RequestError::TooLong { .. })
                ));
                let refused = engine.add(unknown);
                assert!(matches!(
                    refused,
                    Err(RequestError::OutsideVocabulary { .. })
                ));
            }
        }
        let mut finished: Vec<Finished> = engine.take_finished().collect();
        finished.sort_by_key(|f| f.id);
        finished
    };
    let alone: Vec<Vec<i32>> = (0..8)
        .map(|id| run(&[request(id)], None, false).remove(0).tokens)
        .collect();
    assert!(alone[..7].iter().all(|tokens| tokens.len() == 20));
    assert_eq!(alone[6], alone[0], "top-k of 1 is greedy");
    assert_ne!(alone[1], alone[2], "seeds");
    assert_ne!(alone[1], alone[0], "temperature");

    let mut requests: Vec<Request> = (0..8).map(request).collect();
    // One ends at a token that it would have generated anyway; ids that never come end nothing.
    let token = alone[3][11];
    requests[3].stop = vec![alone[0][0].wrapping_add(1) % vocab, token];
    let first = alone[3].iter().position(|t| requests[3].stop.contains(t));
    let stopped_len = first.unwrap() + 1;
    for overlap in [false, true] {
        let together = run(&requests, Some(5), overlap);
        assert_eq!(together.len(), 8);
        for (finished, alone) in together.iter().zip(&alone) {
            let (reason, len) = match finished.id {
                3 => (FinishReason::Stop, stopped_len),
                5 => (FinishReason::Cancelled, finished.tokens.len()),
                _ => (FinishReason::Length, alone.len()),
            };
            assert_eq!(finished.reason, reason, "request {}", finished.id);
            assert_eq!(finished.tokens, alone[..len], "request {}", finished.id);
        }
        let cancelled = together[5].tokens.len();
        assert!((1..20).contains(&cancelled), "{cancelled}");
    }
}
