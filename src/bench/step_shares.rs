//! Which kinds of kernels the device's time of a run went to. The run itself is not disturbed: afterwards the mean step
//! of each kind of step is profiled, and the measured device time is divided by the kernels' shares in it.

use std::time::{Duration, Instant};

use lathe_codegen::work::KernelClass;
use lathe_runtime::device::executor::Executor;
use lathe_runtime::device::profile::{ProfileOptions, sample_batch};
use lathe_runtime::device::step::StepError;
use lathe_runtime::engine::StepGroup;

/// Samples of each kernel.
const RUNS: usize = 3;
/// Steps that a profile takes about as long as, to guess whether there is time for it.
const COST: u32 = 10;
/// Part of the device's time whose steps are profiled; the rest is divided alike.
const COVERED: f64 = 0.95;

/// A run's device time by kind of kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassTimes {
    /// Nanoseconds, in the order of [`KernelClass::ALL`]; their sum is the measured device time.
    pub ns: [f64; 4],
    /// Steps that were profiled.
    pub profiled: u64,
}

impl ClassTimes {
    /// Nanoseconds of the kernels of a kind.
    pub fn of(&self, class: KernelClass) -> f64 {
        let classes = KernelClass::ALL.into_iter().zip(self.ns);
        classes.filter(|c| c.0 == class).map(|c| c.1).sum()
    }
}

/// Divides the device time of a run, whose steps are given with the longest first. `None` if the device does not tell
/// kernels apart or `budget` is too short for a single profile.
///
/// # Errors
/// The device fails.
pub fn class_times(
    executor: &mut dyn Executor,
    groups: &[StepGroup],
    budget: Duration,
) -> Result<Option<ClassTimes>, StepError> {
    let capacity = executor.capacity();
    let start = Instant::now();
    let total: u64 = groups.iter().map(|g| g.device_ns).sum();
    let (mut ns, mut covered, mut profiled) = ([0.0; 4], 0.0, 0);
    for group in groups {
        if covered >= COVERED * total as f64 {
            break;
        }
        let mean = Duration::from_nanos(group.device_ns / group.steps.max(1));
        let spans = group.mean_step(&capacity);
        if spans.is_empty() || start.elapsed() + COST * mean > budget {
            continue;
        }
        let options = ProfileOptions {
            runs: RUNS,
            vendor: false,
        };
        let Some(profile) = executor.profile(&sample_batch(&spans, &capacity), options)? else {
            return Ok(None);
        };
        let Some(shares) = profile.shares() else {
            continue;
        };
        for (sum, share) in ns.iter_mut().zip(shares) {
            *sum += share * group.device_ns as f64;
        }
        covered += group.device_ns as f64;
        profiled += 1;
    }
    if covered <= 0.0 {
        return Ok(None);
    }
    let scale = total as f64 / covered;
    Ok(Some(ClassTimes {
        ns: ns.map(|t| t * scale),
        profiled,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_codegen::work::Work;
    use lathe_runtime::device::executor::Execution;
    use lathe_runtime::device::profile::{KernelTime, StepProfile};
    use lathe_runtime::device::step::{Capacity, StepBatch, StepKind, StepOutput};

    /// Decode steps are half attention, others a quarter; the rest is GEMM.
    struct Device {
        profiles: usize,
        tells: bool,
    }

    impl Executor for Device {
        fn capacity(&self) -> Capacity {
            Capacity {
                max_tokens: 64,
                max_sequences: 8,
                max_seq_len: 64,
                page_size: 8,
                pages: 64,
                vocab: 10,
            }
        }

        fn warm_up(&mut self) -> Result<(), StepError> {
            unreachable!("only profiles are asked for")
        }

        fn execution(&self) -> Option<Execution> {
            unreachable!("only profiles are asked for")
        }

        fn step(&mut self, _: &StepBatch, _: bool) -> Result<StepOutput, StepError> {
            unreachable!("only profiles are asked for")
        }

        fn submit(&mut self, _: &StepBatch) -> Result<(), StepError> {
            unreachable!("only profiles are asked for")
        }

        fn collect(&mut self) -> Result<StepOutput, StepError> {
            unreachable!("only profiles are asked for")
        }

        fn profile(
            &mut self,
            batch: &StepBatch,
            _: ProfileOptions,
        ) -> Result<Option<StepProfile>, StepError> {
            self.profiles += 1;
            let attention = match batch.kind() {
                StepKind::Decode => 2.0,
                StepKind::General => 1.0,
            };
            let kernel = |class, micros| KernelTime {
                name: String::new(),
                path: String::new(),
                work: Work::rows(class, 1, 1, 1),
                count: 1,
                micros,
                bytes: 1.0,
                flops: 0.0,
                vendor_micros: None,
            };
            Ok(self.tells.then(|| StepProfile {
                kind: batch.kind(),
                kernels: vec![
                    kernel(KernelClass::Attention, attention),
                    kernel(KernelClass::Gemm, 4.0 - attention),
                ],
                step_micros: 4.0,
                replay_micros: None,
                graph: false,
                vendor_missing: None,
            }))
        }
    }

    fn group(decodes: u64, prefill_tokens: u64, device_ns: u64) -> StepGroup {
        StepGroup {
            steps: 2,
            sequences: decodes + u64::from(prefill_tokens > 0) * 2,
            decodes,
            tokens: decodes + prefill_tokens,
            prefill_tokens,
            context: 8 * decodes + prefill_tokens,
            device_ns,
        }
    }

    #[test]
    fn the_measured_time_is_divided() {
        let mut device = Device {
            profiles: 0,
            tells: true,
        };
        // 600 of decode steps and 380 of prefill; the last 20 are beyond what is profiled.
        let groups = [group(8, 0, 600), group(0, 16, 380), group(2, 4, 20)];
        let minute = Duration::from_secs(60);
        let times = class_times(&mut device, &groups, minute).unwrap().unwrap();
        assert_eq!((times.profiled, device.profiles), (2, 2));
        let attention = (300.0 + 95.0) * 1000.0 / 980.0;
        assert!((times.of(KernelClass::Attention) - attention).abs() < 1e-9);
        assert!((times.ns.iter().sum::<f64>() - 1000.0).abs() < 1e-9);
        // Half a second a step leaves no time for a profile within a second.
        let slow = [group(8, 0, 1_000_000_000)];
        let second = Duration::from_secs(1);
        assert_eq!(class_times(&mut device, &slow, second).unwrap(), None);
        device.tells = false;
        assert_eq!(class_times(&mut device, &groups, minute).unwrap(), None);
    }
}
