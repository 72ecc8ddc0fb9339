//! Host time of the scheduler: `cargo run --release -p lathe-runtime --example scheduler_overhead`.
//!
//! A device that does nothing runs many sequences at once; what is left is the time of the host.
#![allow(clippy::print_stdout)] // Printing is what an example is for.

use lathe_runtime::device::step::Capacity;
use lathe_runtime::engine::{Clock, Engine, EngineConfig, NullDevice, Policy, Progress, Request};
use lathe_runtime::sampling::SamplingParams;

fn main() {
    println!("sequences  cache    policy               plan us  whole iteration us");
    for (sequences, isl, osl) in [(2400, 128, 128), (512, 1000, 1000), (64, 128, 128)] {
        for policy in [Policy::GuaranteedNoEvict, Policy::MaxUtilization] {
            for limited in [false, true] {
                measure(sequences, isl, osl, policy, limited);
            }
        }
    }
}

/// With `limited`, the cache holds about as many sequences and as many again wait for it, so that each
/// step asks whether one of them can be admitted.
fn measure(sequences: usize, isl: usize, osl: usize, policy: Policy, limited: bool) {
    let full = (isl + osl).div_ceil(64);
    let (max_sequences, n) = match limited {
        false => (sequences, sequences),
        true => (2 * sequences, 3 * sequences),
    };
    let capacity = Capacity {
        max_tokens: 8192,
        max_sequences,
        max_seq_len: isl + osl,
        page_size: 64,
        pages: sequences * full,
        vocab: 128_256,
    };
    let mut device = NullDevice::new(capacity, |_| {});
    let config = EngineConfig {
        policy,
        stream: true,
        log_steps: true,
        ..EngineConfig::of(&capacity)
    };
    let clock = Clock::start();
    let mut engine = Engine::new(&mut device, config, clock).expect("limits of the device");
    for id in 0..n as u64 {
        let request = Request {
            id,
            prompt: vec![1; isl],
            max_new: osl,
            stop: vec![2],
            params: SamplingParams::default(),
            arrival_ns: clock.now_ns(),
        };
        engine.add(request).expect("it fits");
    }
    while engine.iterate().expect("no device fails") == Progress::Busy {
        engine.take_events();
    }
    let steps: Vec<_> = engine
        .take_steps()
        .filter(|step| match limited {
            false => step.decodes == sequences,
            true => step.waiting > 0 && step.decodes == step.sequences,
        })
        .collect();
    let median = |mut values: Vec<u64>| {
        values.sort_unstable();
        values
            .get(values.len() / 2)
            .map_or(0.0, |&ns| ns as f64 / 1e3)
    };
    println!(
        "{sequences:>9}  {}  {policy:<19} {:>8.1}  {:>18.1}",
        if limited { "limited" } else { "roomy  " },
        median(steps.iter().map(|step| step.plan_ns).collect()),
        median(steps.iter().map(|step| step.period_ns).collect()),
    );
}
