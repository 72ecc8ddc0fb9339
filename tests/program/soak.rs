//! A long run, outside CI: `make soak`, or `LATHE_SOAK_REQUESTS=5000 make soak` for a shorter one.

use lathe::model::WeightChoice;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::engine::{Clock, Engine, EngineConfig, Policy, Progress, Request};
use lathe_runtime::sampling::SamplingParams;

/// Resident memory of this process in KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .trim_end_matches("kB")
        .trim()
        .parse()
        .unwrap()
}

/// 100,000 short requests through a full cache on the CPU: each ends with its length, no page is
/// lost, memory stays flat.
#[test]
#[ignore = "takes minutes"]
fn a_hundred_thousand_requests() {
    let requests: u64 = std::env::var("LATHE_SOAK_REQUESTS")
        .map_or(100_000, |count| count.parse().expect("a count of requests"));
    const IN_FLIGHT: usize = 200;
    let mut model = crate::common::compiled(&crate::common::golden("llama-rope3-tied"), "");
    let options = LoadOptions {
        max_tokens: 128,
        max_rows: 64,
        max_sequences: 64,
        max_seq_len: 32,
        page_size: 2,
        pages: 100,
    };
    let mut executor = model.load(WeightChoice::Checkpoint, options).unwrap();
    let config = EngineConfig {
        policy: Policy::MaxUtilization,
        stream: true,
        ..EngineConfig::of(&executor.capacity())
    };
    let mut engine = Engine::new(&mut *executor, config, Clock::start()).unwrap();
    let output_len = |id: u64| 1 + (id * 7 % 9) as usize;
    let (mut next, mut ended, mut streamed, mut generated) = (0, 0, 0, 0);
    let mut early = 0;
    while ended < requests {
        while engine.live() < IN_FLIGHT && next < requests {
            let request = Request {
                id: next,
                prompt: (0..1 + next % 11)
                    .map(|t| ((next * 31 + t * 7) % 256) as i32)
                    .collect(),
                max_new: output_len(next),
                stop: Vec::new(),
                params: SamplingParams {
                    temperature: if next % 2 == 0 { 0.0 } else { 0.8 },
                    seed: next,
                    ..SamplingParams::default()
                },
                arrival_ns: engine.clock().now_ns(),
            };
            engine.add(request).unwrap();
            next += 1;
        }
        assert_eq!(engine.iterate().unwrap(), Progress::Busy);
        streamed += engine.take_events().count();
        for finished in engine.take_finished() {
            assert_eq!(finished.tokens.len(), output_len(finished.id));
            generated += finished.tokens.len();
            ended += 1;
            if ended == requests / 5 {
                early = resident();
            }
        }
    }
    let late = resident();
    let totals = *engine.totals();
    println!(
        "{} steps, {generated} tokens, {} pre-emptions, {early} KiB after a fifth, {late} KiB at the end",
        totals.steps, totals.preemptions
    );
    assert!(totals.preemptions > 0);
    assert_eq!(engine.iterate().unwrap(), Progress::Idle);
    assert!(engine.is_idle());
    assert_eq!(
        (streamed, totals.generated as usize),
        (generated, generated)
    );
    assert!(
        late < early + 4096,
        "memory grew from {early} to {late} KiB"
    );
}
