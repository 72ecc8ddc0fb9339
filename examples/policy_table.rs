//! Output tokens a second that the scheduler's trial predicts for the standard offline workloads of Llama-3.1-8B
//! in bfloat16 on an H100, with the heuristic's sizes and with those that the trial prefers:
//! `cargo run --release --example policy_table`.
#![allow(clippy::print_stdout)] // Printing is what an example is for.

use lathe::bench::dataset::{Dataset, Request};
use lathe::bench::schedule::{Free, StepCost, choose, predicted_seconds};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_runtime::device::load::LoadOptions;
use lathe_runtime::engine::EngineConfig;

/// Pages of 64 tokens that the cache has.
const PAGES: usize = 7744;

fn main() {
    // 131,072 bytes of cache a token, about 290 kernels a step.
    let elements = 7_500_000_000;
    let cost = StepCost::new(&DeviceModel::H100, 2 * elements, elements, 131_072, 290);
    let free = Free {
        batch: true,
        tokens: true,
    };
    println!("workload, requests: batch and tokens of a step, tokens/s; what the trial prefers");
    for (n, isl, osl, batch, tokens) in [
        (512, 1000, 1000, 256, 2048),
        (384, 128, 2048, 256, 2048),
        (512, 2048, 128, 256, 4096),
        (2048, 128, 128, 2048, 4096),
    ] {
        let capacity = LoadOptions {
            max_tokens: tokens,
            max_rows: batch,
            max_sequences: batch,
            max_seq_len: isl + osl,
            page_size: 64,
            pages: PAGES,
        }
        .capacity(100);
        let config = EngineConfig::of(&capacity);
        let request = Request {
            task_id: 0,
            input_ids: vec![0; isl],
            output_tokens: osl as u32,
        };
        let data = Dataset {
            path: "none".into(),
            requests: vec![request; n],
        };
        let rate = |seconds: f64| (n * osl) as f64 / seconds;
        let before = predicted_seconds(&data, config, capacity, -1, cost).map(rate);
        print!(
            "{isl}/{osl}, {n}: {batch}, {tokens}, {:.0}; ",
            before.unwrap_or(f64::NAN)
        );
        match choose(&data, config, capacity, -1, cost, free) {
            Some(c) => println!(
                "{}, {}, {:.0}",
                c.max_batch_size,
                c.max_num_tokens,
                rate(c.seconds)
            ),
            None => println!("the same"),
        }
    }
}
