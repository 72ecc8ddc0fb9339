//! Times of the steps of a plan on the CPU, and the machine's own rates.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use lathe_codegen::work::Work;
use lathe_ir::Product;
use lathe_ir::{DType, SymEnv, kernel_name};

use super::executor::CpuExecutor;
use super::kernels::Elem;
use super::kernels::linear::{Epilogue, LinearArgs, LinearSpec, Prologue, linear};
use super::kernels::pool::{SharedMut, parallel_for, threads};
use crate::device::profile::{Ceilings, ProfileOptions, StepProfile, grouped, median, spans};
use crate::device::step::{StepBatch, StepError, StepKind};
use lathe_codegen::{Program, ProgramKind};

impl<E: Elem> CpuExecutor<E> {
    /// Runs the batch `runs` times as it is and `runs` times with a clock around each step of its program.
    pub(super) fn profile_batch(
        &mut self,
        batch: &StepBatch,
        options: ProfileOptions,
    ) -> Result<StepProfile, StepError> {
        let runs = options.runs.max(1);
        // The first run may still touch new pages.
        self.execute(batch, false, None)?;
        let mut whole = Vec::with_capacity(runs);
        let mut samples: Vec<Vec<f64>> = Vec::new();
        for _ in 0..runs {
            whole.push(self.execute(batch, false, None)?.time.device * 1e6);
            let mut seconds = Vec::new();
            self.execute(batch, false, Some(&mut seconds))?;
            samples.resize_with(seconds.len(), Vec::new);
            for (all, s) in samples.iter_mut().zip(seconds) {
                all.push(s * 1e6);
            }
        }
        let times: Vec<f64> = samples.into_iter().map(median).collect();
        let kind = self.kind(batch);
        let program = self
            .plan
            .program(kind)
            .ok_or_else(|| StepError::Device(format!("the plan has no {} program", kind.name())))?;
        let spans = spans(batch);
        let kernels = groups(program, &Self::env(batch))
            .iter()
            .map(|g| {
                let sum: f64 = g.members.iter().map(|&i| times[i]).sum();
                g.timed(&spans, sum / g.members.len() as f64)
            })
            .collect();
        Ok(StepProfile {
            kind: match kind {
                ProgramKind::Decode => StepKind::Decode,
                _ => StepKind::General,
            },
            kernels,
            step_micros: median(whole),
            replay_micros: None,
            graph: false,
            vendor_missing: options
                .vendor
                .then(|| "there is no vendor library on the CPU".to_owned()),
        })
    }
}

fn groups(program: &Program, env: &SymEnv) -> Vec<crate::device::profile::Group> {
    grouped(program.steps.iter().map(|step| {
        let name = kernel_name(&step.op);
        (name, step.prov.path.to_string(), Work::of_step(step, env))
    }))
}

/// Bytes of the buffer that is streamed: more than the last-level cache of common machines.
const STREAM: usize = 256 << 20;
/// Windows of the buffer that are timed one by one: on a busy machine some of them are not disturbed.
const WINDOWS: usize = 16;
/// Times that each window is streamed.
const PASSES: usize = 3;
/// Samples of the matrix rate.
const SAMPLES: usize = 32;

/// Rates of this machine with all threads of the kernels' pool; the matrix rate is that of our own product in an
/// element type.
pub(super) fn ceilings(dtype: DType) -> Ceilings {
    let (read, copy) = streams();
    let matrix = match dtype {
        DType::BF16 => matrix_rate::<bf16>(),
        _ => matrix_rate::<f32>(),
    };
    Ceilings {
        read,
        copy,
        matrix,
        matrix_source: "own kernel",
        launch: None,
        launch_pdl: None,
    }
}

/// The best rate of some runs: a ceiling is what the machine can do.
fn best(amount: f64, runs: usize, mut run: impl FnMut(usize)) -> f64 {
    let seconds = (0..runs).map(|i| {
        let start = Instant::now();
        run(i);
        start.elapsed().as_secs_f64()
    });
    amount / seconds.fold(f64::INFINITY, f64::min).max(1e-9)
}

/// Bytes per second of reading, and of copying (both directions counted).
fn streams() -> (f64, f64) {
    let words = STREAM / size_of::<u64>();
    let window = words / WINDOWS;
    // Written, so that every page exists.
    let mut buffer: Vec<u64> = (0..words as u64).collect();
    let part = |len: usize, i: usize| {
        let each = len.div_ceil(threads());
        (i * each).min(len)..((i + 1) * each).min(len)
    };
    let read = best((window * 8) as f64, PASSES * WINDOWS, |i| {
        let window = &buffer[i % WINDOWS * window..][..window];
        parallel_for(threads(), |i| {
            let mut sums = [0u64; 32];
            for chunk in window[part(window.len(), i)].as_chunks::<32>().0 {
                for (sum, &word) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(word);
                }
            }
            black_box(sums);
        });
    });
    let (src, dst) = buffer.split_at_mut(words / 2);
    let window = src.len() / WINDOWS;
    let copy = best((2 * window * 8) as f64, PASSES * WINDOWS, |i| {
        let at = i % WINDOWS * window;
        let src = &src[at..][..window];
        let dst = SharedMut::new(&mut dst[at..][..window]);
        parallel_for(threads(), |i| {
            let range = part(window, i);
            // SAFETY: the range lies in the window, each part is written by one task only, and nobody reads it.
            let to = unsafe { std::slice::from_raw_parts_mut(dst.at(range.start), range.len()) };
            to.copy_from_slice(&src[range]);
            black_box(&to);
        });
    });
    (read, copy)
}

/// Operations per second of a product whose operands fit into the cache.
fn matrix_rate<E: Elem>() -> Option<f64> {
    let (m, n, k) = (64, 512, 512);
    let value = |i: usize| E::from_f32((i % 251) as f32 / 251.0 - 0.5);
    let x: Vec<E> = (0..m * k).map(value).collect();
    let w: Vec<E> = (0..n * k).map(value).collect();
    let mut y = vec![E::default(); m * n];
    let spec = LinearSpec {
        prologue: Prologue::None,
        epilogue: Epilogue::None,
    };
    let mut fine = true;
    let rate = best(Product { m, n, k }.flops(), SAMPLES, |_| {
        let args = LinearArgs::new([m, n, k], &x, &w, &mut y);
        fine &= linear(&spec, args).is_ok();
        black_box(&y);
    });
    fine.then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_plausible() {
        let c = ceilings(DType::F32);
        // Between a very busy and an impossible machine.
        assert!((1e8..1e13).contains(&c.read), "{c:?}");
        assert!((1e8..1e13).contains(&c.copy), "{c:?}");
        assert!(c.matrix.is_some_and(|m| (1e7..1e14).contains(&m)), "{c:?}");
    }
}
