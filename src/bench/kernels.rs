//! The report of `lathe kernels`: a table for people, JSON for programs.

use std::fmt;

use lathe_codegen::work::{KernelClass, WorkShape};
use lathe_ir::Class;
use lathe_passes::predict::Prediction;
use lathe_runtime::device::profile::{Ceilings, KernelTime, StepProfile};
use lathe_runtime::device::step::StepKind;
use serde::Serialize;

use super::table::{Align, number, table};

/// A step that is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StepPoint {
    /// Which program runs it.
    pub kind: StepKind,
    /// Sequences.
    pub sequences: usize,
    /// Token rows.
    pub tokens: usize,
    /// Cached tokens of each sequence before the step.
    pub context: usize,
}

impl StepPoint {
    /// New rows of each sequence.
    pub fn rows(&self) -> usize {
        self.tokens / self.sequences.max(1)
    }

    /// Cached tokens of each sequence after the step.
    pub fn cached(&self) -> usize {
        self.context + self.rows()
    }
}

impl fmt::Display for StepPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            StepKind::Decode => write!(
                f,
                "decode, batch {}, context {}",
                self.sequences, self.context
            ),
            StepKind::General => write!(f, "prefill of {} tokens", self.tokens),
        }
    }
}

/// A step with what was measured and what was predicted.
#[derive(Clone, Debug)]
pub struct Profiled {
    /// The step.
    pub point: StepPoint,
    /// Times.
    pub profile: StepProfile,
    /// The roofline at the measured rates.
    pub prediction: Option<Prediction>,
}

/// All that `lathe kernels` found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelsReport {
    /// The program's version.
    pub version: String,
    /// Name of the model.
    pub model: String,
    /// Element type of weights and activations.
    pub dtype: String,
    /// `random` or `checkpoint`.
    pub weights: &'static str,
    /// `compile_backend`.
    pub compile_backend: String,
    /// The device as `--device` names it.
    pub device: String,
    /// Name of the GPU.
    pub gpu: Option<String>,
    /// What the machine can do, measured in the same run.
    pub ceilings: CeilingsReport,
    /// The library beside our GEMMs.
    pub vendor: VendorReport,
    /// The steps in the order in which they were asked for.
    pub steps: Vec<StepReport>,
}

/// Measured rates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CeilingsReport {
    /// A stream that is read.
    pub read_gb_per_s: f64,
    /// A copy, both directions counted.
    pub copy_gb_per_s: f64,
    /// A large matrix product.
    pub matrix_tflop_per_s: Option<f64>,
    /// Where that comes from.
    pub matrix_source: &'static str,
    /// An empty kernel in a CUDA graph.
    pub launch_us: Option<f64>,
    /// The same with programmatic dependent launch.
    pub launch_pdl_us: Option<f64>,
}

/// The library beside our GEMMs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VendorReport {
    /// Its name.
    pub name: &'static str,
    /// Why it was not compared.
    pub missing: Option<String>,
}

/// A step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Which one; its keys stand beside the others.
    #[serde(flatten)]
    pub point: StepPoint,
    /// Kernel launches.
    pub launches: usize,
    /// Whether such steps run as one CUDA graph.
    pub graph: bool,
    /// Device time as the scheduler runs it, with the copies of state and results.
    pub step_us: f64,
    /// The launches replayed as one CUDA graph.
    pub replay_us: Option<f64>,
    /// Sum over the kernels, each by itself.
    pub kernels_us: f64,
    /// The whole step (the replay where there is one) without the kernels: gaps, or less than nothing where kernels
    /// overlap.
    pub gap_us: f64,
    /// What the roofline predicts at the measured ceilings.
    pub roofline_us: Option<f64>,
    /// Where the time goes.
    pub classes: Vec<ClassReport>,
    /// The kernels.
    pub kernels: Vec<KernelReport>,
}

/// Kernels of a kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassReport {
    /// The kind.
    pub class: KernelClass,
    /// Launches.
    pub launches: usize,
    /// Their time.
    pub us: f64,
    /// Of the whole step.
    pub percent: f64,
    /// What the roofline predicts for the kind.
    pub roofline_us: Option<f64>,
}

/// A kernel at a shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelReport {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub class: KernelClass,
    /// Sizes, for people.
    pub shape: String,
    /// M, N and K of a GEMM.
    pub gemm: Option<[usize; 3]>,
    /// Where its first launch comes from in the model.
    pub path: String,
    /// Launches of a step.
    pub launches: usize,
    /// One launch.
    pub us: f64,
    /// All launches of a step, of the whole step.
    pub percent: f64,
    /// Bytes of one launch.
    pub bytes: f64,
    /// Operations of one launch.
    pub flops: f64,
    /// Rate of the bytes.
    pub gb_per_s: f64,
    /// That, of the read stream.
    pub read_percent: f64,
    /// Rate of the operations.
    pub tflop_per_s: f64,
    /// That, of the matrix ceiling.
    pub matrix_percent: Option<f64>,
    /// The vendor's best algorithm for the product alone.
    pub vendor_us: Option<f64>,
    /// The vendor's time over ours.
    pub vendor_percent: Option<f64>,
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        100.0 * part / whole
    } else {
        0.0
    }
}

fn class_of(class: Class) -> KernelClass {
    match class {
        Class::Gemm | Class::Matmul => KernelClass::Gemm,
        Class::Attention => KernelClass::Attention,
        Class::Norm | Class::Elementwise => KernelClass::Pointwise,
        Class::Movement | Class::Sample => KernelClass::Other,
    }
}

impl KernelsReport {
    /// Puts the report together.
    #[allow(clippy::too_many_arguments)] // What a report has is what it is made of.
    pub fn new(
        model: &str,
        dtype: &str,
        device: &str,
        gpu: Option<String>,
        checkpoint: bool,
        compile_backend: &str,
        ceilings: &Ceilings,
        steps: &[Profiled],
    ) -> KernelsReport {
        KernelsReport {
            version: env!("CARGO_PKG_VERSION").into(),
            model: model.into(),
            dtype: dtype.into(),
            weights: if checkpoint { "checkpoint" } else { "random" },
            compile_backend: compile_backend.into(),
            device: device.into(),
            gpu,
            ceilings: CeilingsReport {
                read_gb_per_s: ceilings.read * 1e-9,
                copy_gb_per_s: ceilings.copy * 1e-9,
                matrix_tflop_per_s: ceilings.matrix.map(|m| m * 1e-12),
                matrix_source: ceilings.matrix_source,
                launch_us: ceilings.launch.map(|s| s * 1e6),
                launch_pdl_us: ceilings.launch_pdl.map(|s| s * 1e6),
            },
            vendor: VendorReport {
                name: "cuBLASLt",
                missing: steps.iter().find_map(|s| s.profile.vendor_missing.clone()),
            },
            steps: steps.iter().map(|s| step(s, ceilings)).collect(),
        }
    }
}

fn step(s: &Profiled, ceilings: &Ceilings) -> StepReport {
    let p = &s.profile;
    let whole = p.replay_micros.unwrap_or(p.step_micros);
    let predicted = |class| {
        let prediction = s.prediction.as_ref()?;
        let of = prediction
            .by_class
            .iter()
            .filter(|c| class_of(*c.0) == class);
        Some(of.map(|c| c.1.picoseconds).sum::<u64>() as f64 * 1e-6)
    };
    StepReport {
        point: s.point,
        launches: p.launches(),
        graph: p.graph,
        step_us: p.step_micros,
        replay_us: p.replay_micros,
        kernels_us: p.kernel_micros(),
        gap_us: whole - p.kernel_micros(),
        roofline_us: s
            .prediction
            .as_ref()
            .map(|p| p.total.picoseconds as f64 * 1e-6),
        classes: KernelClass::ALL
            .into_iter()
            .map(|class| {
                let (launches, us) = p.of_class(class);
                ClassReport {
                    class,
                    launches,
                    us,
                    percent: percent(us, whole),
                    roofline_us: predicted(class),
                }
            })
            .collect(),
        kernels: p
            .kernels
            .iter()
            .map(|k| kernel(k, whole, ceilings))
            .collect(),
    }
}

fn kernel(k: &KernelTime, whole: f64, ceilings: &Ceilings) -> KernelReport {
    KernelReport {
        name: k.name.clone(),
        class: k.work.class,
        shape: k.work.shape.to_string(),
        gemm: match k.work.shape {
            WorkShape::Gemm { m, n, k } => Some([m, n, k]),
            _ => None,
        },
        path: k.path.clone(),
        launches: k.count,
        us: k.micros,
        percent: percent(k.total_micros(), whole),
        bytes: k.bytes,
        flops: k.flops,
        gb_per_s: k.bandwidth() * 1e-9,
        read_percent: percent(k.bandwidth(), ceilings.read),
        tflop_per_s: k.flop_rate() * 1e-12,
        matrix_percent: ceilings.matrix.map(|m| percent(k.flop_rate(), m)),
        vendor_us: k.vendor_micros,
        vendor_percent: k.vendor_micros.map(|v| percent(v, k.micros)),
    }
}

impl fmt::Display for KernelsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpu = self
            .gpu
            .as_ref()
            .map_or(String::new(), |g| format!(" ({g})"));
        writeln!(
            f,
            "{}, {}, {} weights, {}, on {}{gpu}",
            self.model, self.dtype, self.weights, self.compile_backend, self.device
        )?;
        let c = &self.ceilings;
        write!(
            f,
            "ceilings: read {} GB/s, copy {} GB/s",
            number(c.read_gb_per_s),
            number(c.copy_gb_per_s)
        )?;
        if let Some(matrix) = c.matrix_tflop_per_s {
            write!(
                f,
                ", matrix {} TFLOP/s ({})",
                number(matrix),
                c.matrix_source
            )?;
        }
        if let (Some(plain), Some(pdl)) = (c.launch_us, c.launch_pdl_us) {
            write!(
                f,
                ", empty kernel in a graph {plain:.2} us, with programmatic launch {pdl:.2} us"
            )?;
        }
        writeln!(f)?;
        if let (Some(_), Some(reason)) = (&self.gpu, &self.vendor.missing) {
            writeln!(f, "{}: not compared: {reason}", self.vendor.name)?;
        }
        self.steps
            .iter()
            .try_for_each(|s| s.write_text(f, self.vendor.name))
    }
}

impl StepReport {
    fn write_text(&self, f: &mut fmt::Formatter<'_>, vendor: &str) -> fmt::Result {
        writeln!(f, "\n{}\n", self.point)?;
        self.write_kernels(f, vendor)?;
        writeln!(f)?;
        self.write_classes(f)
    }

    fn write_kernels(&self, f: &mut fmt::Formatter<'_>, vendor: &str) -> fmt::Result {
        let compared = self.kernels.iter().any(|k| k.vendor_us.is_some());
        let mut head: Vec<String> = ["kernel", "shape", "n", "us", "% step", "GB/s", "% read"]
            .map(str::to_owned)
            .to_vec();
        head.extend(["TFLOP/s", "% matrix"].map(str::to_owned));
        if compared {
            head.push(format!("{vendor} us"));
            head.push("% of it".into());
        }
        let mut rows = vec![head];
        for k in &self.kernels {
            let matrix = k.flops > 0.0;
            let some = |v: Option<f64>| v.map_or("-".to_owned(), number);
            let mut row = vec![
                k.name.clone(),
                k.shape.clone(),
                k.launches.to_string(),
                number(k.us),
                format!("{:.1}", k.percent),
                number(k.gb_per_s),
                format!("{:.1}", k.read_percent),
                some(matrix.then_some(k.tflop_per_s)),
                k.matrix_percent
                    .filter(|_| matrix)
                    .map_or("-".into(), |p| format!("{p:.1}")),
            ];
            if compared {
                let percent = k.vendor_percent.map(|p| format!("{p:.1}"));
                row.extend([some(k.vendor_us), percent.unwrap_or("-".into())]);
            }
            rows.push(row);
        }
        f.write_str(&table(&rows, |column| match column {
            0 | 1 => Align::Left,
            _ => Align::Right,
        }))
    }

    fn write_classes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.replay_us.unwrap_or(self.step_us);
        let some = |v: Option<f64>| v.map_or("-".to_owned(), number);
        let mut rows = vec![
            ["where the time goes", "n", "us", "% step", "roofline us"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for c in &self.classes {
            rows.push(vec![
                c.class.name().into(),
                c.launches.to_string(),
                number(c.us),
                format!("{:.1}", c.percent),
                some(c.roofline_us),
            ]);
        }
        let mut line = |name: &str, us: f64, roofline: Option<f64>| {
            rows.push(vec![
                name.into(),
                String::new(),
                number(us),
                format!("{:.1}", percent(us, whole)),
                roofline.map_or(String::new(), number),
            ]);
        };
        line("gaps, less overlap", self.gap_us, None);
        let replayed = if self.replay_us.is_some() {
            "whole step, replayed as a graph"
        } else {
            "whole step"
        };
        line(replayed, whole, self.roofline_us);
        if self.replay_us.is_some() {
            let how = if self.graph {
                "as the engine runs it (graph, copies)"
            } else {
                "as the engine runs it (launches, copies)"
            };
            line(how, self.step_us, None);
        }
        f.write_str(&table(&rows, |column| match column {
            0 => Align::Left,
            _ => Align::Right,
        }))?;
        if let Some(roofline) = self.roofline_us {
            writeln!(
                f,
                "{:.1} % of the roofline at the measured ceilings",
                percent(roofline, whole)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_codegen::work::Work;

    fn example() -> KernelsReport {
        let gemm = KernelTime {
            name: "gemv_m1".into(),
            path: "model.layers.0.mlp.gate_up".into(),
            work: Work {
                class: KernelClass::Gemm,
                shape: WorkShape::Gemm {
                    m: 1,
                    n: 28672,
                    k: 4096,
                },
                bytes: 240e6,
                flops: 240e6,
            },
            count: 2,
            micros: 80.0,
            bytes: 240e6,
            flops: 240e6,
            vendor_micros: Some(88.0),
        };
        let sample = KernelTime {
            name: "sample_greedy".into(),
            path: "next".into(),
            work: Work::rows(KernelClass::Other, 1, 1000, 2004),
            count: 1,
            micros: 5.0,
            bytes: 2004.0,
            flops: 0.0,
            vendor_micros: None,
        };
        let profiled = Profiled {
            point: StepPoint {
                kind: StepKind::Decode,
                sequences: 1,
                tokens: 1,
                context: 300,
            },
            profile: StepProfile {
                kind: StepKind::Decode,
                kernels: vec![gemm, sample],
                step_micros: 172.0,
                replay_micros: Some(170.0),
                graph: true,
                vendor_missing: None,
            },
            prediction: None,
        };
        let ceilings = Ceilings {
            read: 3.1e12,
            copy: 2.8e12,
            matrix: Some(8e14),
            matrix_source: "cuBLASLt",
            launch: Some(1.1e-6),
            launch_pdl: Some(0.72e-6),
        };
        KernelsReport::new(
            "m",
            "bf16",
            "cuda:0",
            Some("NVIDIA H100".into()),
            false,
            "torch-opt",
            &ceilings,
            &[profiled],
        )
    }

    #[test]
    fn rates_and_shares_by_hand() {
        let report = example();
        let step = &report.steps[0];
        let k = &step.kernels[0];
        // 240 MB in 80 us are 3 TB/s; 240 MFLOP in 80 us are 3 TFLOP/s.
        assert!((k.gb_per_s - 3000.0).abs() < 1e-6);
        assert!((k.read_percent - 3000.0 / 31.0).abs() < 1e-9);
        assert!((k.tflop_per_s - 3.0).abs() < 1e-9);
        assert!((k.matrix_percent.unwrap() - 0.375).abs() < 1e-9);
        assert!((k.vendor_percent.unwrap() - 110.0).abs() < 1e-9);
        assert!((k.percent - 160.0 / 1.7).abs() < 1e-9);
        assert_eq!(
            (step.kernels_us, step.gap_us, step.launches),
            (165.0, 5.0, 3)
        );
        let gemms = step.classes.iter().find(|c| c.class == KernelClass::Gemm);
        assert_eq!(gemms.map(|c| (c.launches, c.us)), Some((2, 160.0)));
    }

    #[test]
    fn the_whole_text() {
        insta::with_settings!({snapshot_path => "../../snapshots/bench", prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!("kernels", example().to_string());
        });
    }
}
