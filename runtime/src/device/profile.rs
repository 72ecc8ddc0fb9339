//! How long the kernels of a step take, and the rates of the machine to compare them with: the same types for all
//! devices. The devices measure in `cpu/profile.rs` and `cuda/profile.rs`.

use crate::device::step::{Capacity, RowSampler, StepBatch, StepKind};
use crate::sampling::SamplingParams;
use lathe_codegen::work::{KernelClass, Span, Work, WorkShape};

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileOptions {
    /// Samples; medians of them are reported.
    pub runs: usize,
    /// Time the vendor's library beside each GEMM, if the device has one.
    pub vendor: bool,
}

/// A kernel of a step at one shape.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The kernel.
    pub name: String,
    /// Where its first launch comes from in the model.
    pub path: String,
    /// Kind and sizes.
    pub work: Work,
    /// Launches of a step.
    pub count: usize,
    /// Microseconds of one launch, the mean over those of a step.
    pub micros: f64,
    /// Bytes that one launch moves in this step, with what attention reads of the cache.
    pub bytes: f64,
    /// Operations of matrix products of one launch in this step.
    pub flops: f64,
    /// Microseconds of the vendor's best algorithm for the product alone; none where there is none to compare with.
    pub vendor_micros: Option<f64>,
}

impl KernelTime {
    /// Microseconds of all its launches of a step.
    pub fn total_micros(&self) -> f64 {
        self.micros * self.count as f64
    }

    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        rate(self.bytes, self.micros)
    }

    /// Operations per second.
    pub fn flop_rate(&self) -> f64 {
        rate(self.flops, self.micros)
    }
}

fn rate(amount: f64, micros: f64) -> f64 {
    if micros > 0.0 {
        amount / micros * 1e6
    } else {
        0.0
    }
}

/// The kernels of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepProfile {
    /// Which program ran it.
    pub kind: StepKind,
    /// Kernels by name and shape, in the order of their first launch.
    pub kernels: Vec<KernelTime>,
    /// Microseconds of a whole step on the device as the scheduler runs it, with copies of its state and results.
    pub step_micros: f64,
    /// Microseconds of all its launches replayed as one CUDA graph; none on a device without graphs.
    pub replay_micros: Option<f64>,
    /// Whether steps of this kind run as a CUDA graph.
    pub graph: bool,
    /// Why there are no times of the vendor's library, where they were asked for.
    pub vendor_missing: Option<String>,
}

impl StepProfile {
    /// Launches of the step.
    pub fn launches(&self) -> usize {
        self.kernels.iter().map(|k| k.count).sum()
    }

    /// Microseconds of all kernels, each measured by itself.
    pub fn kernel_micros(&self) -> f64 {
        self.kernels.iter().map(KernelTime::total_micros).sum()
    }

    /// Launches and microseconds of the kernels of a class.
    pub fn of_class(&self, class: KernelClass) -> (usize, f64) {
        self.kernels
            .iter()
            .filter(|k| k.work.class == class)
            .fold((0, 0.0), |(n, t), k| (n + k.count, t + k.total_micros()))
    }

    /// Part of the kernels' time that each class takes, in the order of [`KernelClass::ALL`]; nothing if no time was
    /// measured.
    pub fn shares(&self) -> Option<[f64; 4]> {
        let sum = self.kernel_micros();
        (sum > 0.0).then(|| KernelClass::ALL.map(|class| self.of_class(class).1 / sum))
    }
}

/// The best rates of a machine, measured in the same process as what is compared with them.
#[derive(Clone, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes per second of a stream that is only read.
    pub read: f64,
    /// Bytes per second, read and written, of a copy.
    pub copy: f64,
    /// Operations per second of a large matrix product.
    pub matrix: Option<f64>,
    /// Where [`Ceilings::matrix`] comes from.
    pub matrix_source: &'static str,
    /// Seconds of an empty kernel in a CUDA graph.
    pub launch: Option<f64>,
    /// The same with programmatic dependent launch.
    pub launch_pdl: Option<f64>,
}

/// A batch of sequences with these rows and lengths, greedy, the last row of each sampled. Pages are taken in order;
/// where there are too few, sequences share them, which changes what is computed but not how long it takes.
pub fn sample_batch(spans: &[Span], capacity: &Capacity) -> StepBatch {
    let vocab = capacity.vocab.max(1);
    let mut batch = StepBatch {
        max_pages: capacity.max_seq_len.div_ceil(capacity.page_size),
        ..StepBatch::default()
    };
    let mut next = 0;
    for (request, span) in spans.iter().enumerate() {
        let tokens: Vec<i32> = (0..span.rows)
            .map(|i| ((i * 37 + request * 101 + 11) % vocab) as i32)
            .collect();
        let pages: Vec<i32> = (0..span.len.div_ceil(capacity.page_size))
            .map(|i| ((next + i) % capacity.pages.max(1)) as i32)
            .collect();
        next += pages.len();
        let sampler = RowSampler {
            params: SamplingParams::default(),
            request: request as u64,
            position: span.len as u32,
        };
        batch.push_sequence(&tokens, span.len - span.rows, &pages, Some(sampler));
    }
    batch
}

/// New rows and cached tokens of the sequences of a batch.
pub(crate) fn spans(batch: &StepBatch) -> Vec<Span> {
    batch
        .cu_seqlens
        .windows(2)
        .zip(&batch.kv_lens)
        .map(|(range, &len)| Span {
            rows: (range[1] - range[0]).max(0) as usize,
            len: len.max(0) as usize,
        })
        .collect()
}

/// Launches that are measured together: the same kernel at the same shape.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) work: Work,
    /// Indices of the launches.
    pub(crate) members: Vec<usize>,
}

impl Group {
    /// The group with its measured time.
    pub(crate) fn timed(&self, spans: &[Span], micros: f64) -> KernelTime {
        let (bytes, flops) = self.work.on(spans);
        KernelTime {
            name: self.name.clone(),
            path: self.path.clone(),
            work: self.work,
            count: self.members.len(),
            micros,
            bytes,
            flops,
            vendor_micros: None,
        }
    }
}

/// Groups launches, given as name, module path and work, by name and shape.
pub(crate) fn grouped(launches: impl Iterator<Item = (String, String, Work)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (index, (name, path, work)) in launches.enumerate() {
        let same = |g: &&mut Group| g.name == name && key(&g.work) == key(&work);
        match groups.iter_mut().find(same) {
            Some(g) => g.members.push(index),
            None => groups.push(Group {
                name,
                path,
                work,
                members: vec![index],
            }),
        }
    }
    groups
}

/// Equal shapes may still differ in bytes: with and without a residual.
fn key(work: &Work) -> (KernelClass, WorkShape, u64) {
    (work.class, work.shape, work.bytes.to_bits())
}

/// The middle value; of an even number the mean of the two in the middle, of none 0.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 {
        return 0.0;
    }
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gemm(n: usize) -> Work {
        Work {
            class: KernelClass::Gemm,
            shape: WorkShape::Gemm { m: 1, n, k: 8 },
            bytes: 100.0 * n as f64,
            flops: 16.0 * n as f64,
        }
    }

    /// One kernel at two shapes is two rows, each with its own bytes and operations.
    #[test]
    fn launches_are_grouped_by_kernel_and_shape() {
        let launch = |n| ("g".to_owned(), format!("layer.{n}"), gemm(n));
        let groups = grouped([launch(16), launch(32), launch(16)].into_iter());
        let members: Vec<&[usize]> = groups.iter().map(|g| &g.members[..]).collect();
        assert_eq!(members, [&[0, 2][..], &[1]]);
        let time = groups[1].timed(&[], 2.0);
        assert_eq!((time.bytes, time.flops, time.count), (3200.0, 512.0, 1));
        assert_eq!((time.bandwidth(), time.flop_rate()), (1.6e9, 2.56e8));
    }

    #[test]
    fn shares_of_classes() {
        let mut groups = grouped([("g".to_owned(), String::new(), gemm(16))].into_iter());
        let mut norm = grouped(
            [(
                "n".to_owned(),
                String::new(),
                Work::rows(KernelClass::Pointwise, 1, 8, 32),
            )]
            .into_iter(),
        );
        let mut profile = StepProfile {
            kind: StepKind::Decode,
            kernels: Vec::new(),
            step_micros: 0.0,
            replay_micros: None,
            graph: false,
            vendor_missing: None,
        };
        assert_eq!(profile.shares(), None);
        profile.kernels = vec![
            groups.remove(0).timed(&[], 3.0),
            norm.remove(0).timed(&[], 1.0),
        ];
        assert_eq!(profile.shares(), Some([0.0, 0.75, 0.25, 0.0]));
        assert_eq!((profile.launches(), profile.kernel_micros()), (2, 4.0));
    }

    #[test]
    fn sampled_batches_have_the_spans_that_were_asked_for() {
        let capacity = Capacity {
            max_tokens: 16,
            max_sequences: 4,
            max_seq_len: 12,
            page_size: 4,
            pages: 4,
            vocab: 7,
        };
        let wanted = [Span { rows: 1, len: 9 }, Span { rows: 3, len: 5 }];
        let batch = sample_batch(&wanted, &capacity);
        assert_eq!(spans(&batch), wanted);
        assert_eq!(batch.positions, [8, 2, 3, 4]);
        assert_eq!(batch.block_table, [0, 1, 2, 3, 0, 0]);
        assert!(batch.tokens.iter().all(|t| (0..7).contains(t)));
        assert_eq!(batch.rows, [0, 3]);
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
