//! Timing GEMM variants on the device: the model's own steps of a shape, one layer after the other so
//! that weights come from memory as they do in a step, on random activations, in one graph.

use super::autotune::Bench;
use super::buckets::DecodeBuckets;
use super::cubin_cache::CubinCache;
use super::cublaslt::{CublasLt, GemmShape};
use super::driver::Stream;
use super::graph::Graph;
use super::noise::{fill_repeated, noise};
use super::prepare::{Modules, Resolver};
use super::programs::{Key, keys};
use super::resident::Resident;
use super::state::MetaLayout;
use super::timing::time_graph;
use super::{CudaError, DevicePtr};
use crate::device::load::LoadOptions;
use half::bf16;
use lathe_codegen::cuda::{
    Choices, CudaOptions, CudaProgram, GemmKey, Sizes, Variant, gemm_keys, lower_gemms,
};
use lathe_codegen::{Plan, ProgramKind};
use lathe_ir::relative_error;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of weights that a sample reads at least, if the model has them: several times the L2.
const WEIGHT_BYTES: usize = 256 << 20;
/// Steps that a sample runs at most.
const MOST_STEPS: usize = 16;
/// Microseconds that a sample takes at least.
const SAMPLE_MICROS: f64 = 300.0;
/// Samples of a time.
const SAMPLES: usize = 3;
/// Algorithms of the library that are timed.
const ALGORITHMS: usize = 8;
/// Bytes of an output that are compared, from its start and from its end.
const COMPARED: usize = 4 << 20;
/// Rows above which only multiples of 512 are tuned: with many waves the heuristics are near the best.
const FINE_ROWS: usize = 1024;

/// Where a GEMM occurs.
#[derive(Clone, Debug)]
pub(super) struct Place {
    program: usize,
    sizes: Sizes,
    steps: Vec<usize>,
}

/// The GEMMs whose kernel can be chosen in any step of a loaded plan, decode steps first.
///
/// # Errors
/// A GEMM's operands are not what they should be.
pub(super) fn places(
    plan: &Plan,
    options: &LoadOptions,
    kernels: CudaOptions,
    decode: &DecodeBuckets,
) -> Result<(Vec<GemmKey>, BTreeMap<GemmKey, Place>), CudaError> {
    let mut order = Vec::new();
    let mut places = BTreeMap::new();
    for kind in [ProgramKind::Decode, ProgramKind::General] {
        let Some(program) = plan.position(kind) else {
            continue;
        };
        let buckets: BTreeSet<Key> = keys(kind, options, decode);
        for (_, sizes, sampling) in buckets {
            let found = gemm_keys(plan, &plan.programs[program], sizes, sampling, kernels)?;
            for (key, steps) in found {
                let fine = key.m <= FINE_ROWS || key.m.is_multiple_of(512);
                if fine && !places.contains_key(&key) {
                    order.push(key);
                    let place = Place {
                        program,
                        sizes,
                        steps,
                    };
                    places.insert(key, place);
                }
            }
        }
    }
    Ok((order, places))
}

/// A loaded plan as a bench. It overwrites activations and workspaces, so no step may be in flight.
pub(super) struct GpuBench<'a> {
    pub(super) stream: &'a Stream,
    pub(super) plan: &'a Plan,
    pub(super) kernels: CudaOptions,
    pub(super) resident: &'a Resident,
    pub(super) modules: &'a mut Modules,
    pub(super) cache: Option<&'a CubinCache>,
    pub(super) library: Option<&'a CublasLt>,
    pub(super) places: BTreeMap<GemmKey, Place>,
    /// Random numbers with which activations are filled.
    noise: Vec<u8>,
}

impl<'a> GpuBench<'a> {
    pub(super) fn new(
        stream: &'a Stream,
        plan: &'a Plan,
        kernels: CudaOptions,
        resident: &'a Resident,
        modules: &'a mut Modules,
        places: BTreeMap<GemmKey, Place>,
    ) -> Result<GpuBench<'a>, CudaError> {
        let bench = GpuBench {
            stream,
            plan,
            kernels,
            resident,
            modules,
            cache: None,
            library: None,
            places,
            noise: noise(1 << 20),
        };
        bench.fill()?;
        Ok(bench)
    }

    /// Fills all activations with the same random numbers.
    fn fill(&self) -> Result<(), CudaError> {
        let (base, bytes) = self.resident.activations();
        // SAFETY: the arena of the activations, which nothing else uses now.
        unsafe { fill_repeated(self.stream, base, bytes, &self.noise) }
    }

    /// Leaves the activations as a load does.
    pub(super) fn finish(self) -> Result<(), CudaError> {
        let (base, bytes) = self.resident.activations();
        // SAFETY: as in `fill`.
        unsafe { self.stream.fill_u32(base, 0, bytes / 4)? };
        self.stream.synchronize()
    }

    fn lowered(
        &self,
        key: &GemmKey,
        variant: Variant,
        steps: usize,
    ) -> Result<CudaProgram, CudaError> {
        let place = &self.places[key];
        let mut choices = Choices::default();
        choices.insert(*key, variant);
        let program = &self.plan.programs[place.program];
        let steps = &place.steps[..steps.min(place.steps.len())];
        let lowered = lower_gemms(
            self.plan,
            program,
            place.sizes,
            self.kernels,
            &choices,
            steps,
        )?;
        Ok(lowered)
    }

    /// Runs `submit` with the launches of a variant, unless it needs more memory than was planned or
    /// its kernel does not compile.
    fn with_launches<T>(
        &mut self,
        key: &GemmKey,
        variant: Variant,
        steps: usize,
        submit: impl FnOnce(&Self, &[super::prepare::Ready]) -> Result<T, CudaError>,
    ) -> Result<Option<T>, CudaError> {
        let lowered = self.lowered(key, variant, steps)?;
        if !self.resident.has_workspaces(&lowered.workspaces) {
            return Ok(None);
        }
        let device = self.stream.device().clone();
        let modules = match self.modules.get(&device, self.cache, &lowered.kernels) {
            Ok(modules) => modules,
            Err(error @ CudaError::Compile(_)) => {
                tracing::warn!("autotune: {error}");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let place = &self.places[key];
        let meta = MetaLayout::new(place.sizes, self.kernels.max_pages);
        let resolver = Resolver {
            program: &self.plan.programs[place.program],
            lowered: &lowered,
            addresses: &self.resident.addresses,
            slots: &self.resident.slots[place.program],
            meta: &meta,
            library: self.library,
        };
        let launches = match resolver.launches(&modules, self.kernels.pdl) {
            Ok(launches) => launches,
            Err(error @ CudaError::CublasLt { .. }) => {
                tracing::debug!("autotune: {error}");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        submit(self, &launches).map(Some)
    }

    /// Steps whose weights together are read from memory.
    fn rotation(&self, key: &GemmKey) -> usize {
        let bytes = 2 * key.n * key.k;
        WEIGHT_BYTES.div_ceil(bytes).clamp(1, MOST_STEPS)
    }

    /// The output of a variant's first step, on activations that are the same each time.
    fn output(&mut self, key: &GemmKey, variant: Variant) -> Result<Option<Vec<u8>>, CudaError> {
        self.fill()?;
        let (at, bytes) = self.output_place(key);
        self.with_launches(key, variant, 1, |bench, launches| {
            let half = COMPARED.min(bytes / 2);
            let whole = bytes <= 2 * COMPARED;
            let mut out = vec![0; if whole { bytes } else { 2 * half }];
            // SAFETY: resolved from the lowered program; the output has `bytes` bytes; the wait ends
            // the copies.
            unsafe {
                launches.iter().try_for_each(|l| l.submit(bench.stream))?;
                if whole {
                    bench.stream.copy_to_host(&mut out, at)?;
                } else {
                    let (head, tail) = out.split_at_mut(half);
                    bench.stream.copy_to_host(head, at)?;
                    let end = at + (bytes - half) as DevicePtr;
                    bench.stream.copy_to_host(tail, end)?;
                }
            }
            bench.stream.synchronize()?;
            Ok(out)
        })
    }

    /// Address and bytes of the output of a GEMM's first step.
    fn output_place(&self, key: &GemmKey) -> (DevicePtr, usize) {
        let place = &self.places[key];
        let program = &self.plan.programs[place.program];
        let result = program.steps[place.steps[0]]
            .results
            .last()
            .copied()
            .flatten();
        let features = match key.epilogue {
            lathe_ir::Epilogue::SwiGlu => key.n / 2,
            _ => key.n,
        };
        let at = result.map_or(0, |v| self.resident.slots[place.program][program.slot(v)]);
        (at, 2 * key.m * features)
    }
}

impl Bench for GpuBench<'_> {
    fn prepare(&mut self, wanted: &[(GemmKey, Variant)]) -> Result<(), CudaError> {
        let mut known = BTreeSet::new();
        let mut kernels = Vec::new();
        for (key, variant) in wanted {
            let lowered = self.lowered(key, *variant, 1)?;
            let new = lowered
                .kernels
                .into_iter()
                .filter(|k| known.insert(k.code().to_owned()));
            kernels.extend(new);
        }
        tracing::info!("autotune: compiling {} kernels", kernels.len());
        let device = self.stream.device().clone();
        match self.modules.get(&device, self.cache, &kernels) {
            // It is met again, and left out, when it is to be timed.
            Err(CudaError::Compile(_)) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    fn library(&mut self, key: &GemmKey) -> Vec<Variant> {
        let Some(library) = self.library.filter(|_| key.is_library_gemm()) else {
            return Vec::new();
        };
        let GemmKey { m, n, k, .. } = *key;
        let count = library
            .gemm(GemmShape { m, n, k })
            .map_or(0, |gemm| gemm.algorithms());
        (0..count.min(ALGORITHMS))
            .map(|algorithm| Variant::CublasLt { algorithm })
            .collect()
    }

    fn time(&mut self, key: &GemmKey, variant: Variant) -> Result<Option<f64>, CudaError> {
        let steps = self.rotation(key).min(self.places[key].steps.len());
        let time = self.with_launches(key, variant, steps, |bench, launches| {
            let graph = Graph::capture(bench.stream, |stream| {
                launches
                    .iter()
                    // SAFETY: resolved from the lowered program; the executor keeps the memory.
                    .try_for_each(|l| unsafe { l.submit(stream) })
            })?;
            let once = time_graph(bench.stream, &graph, 1, 1)?;
            let replays = (SAMPLE_MICROS / once.max(1.0)).ceil().clamp(1.0, 16.0) as usize;
            time_graph(bench.stream, &graph, SAMPLES, replays)
        })?;
        Ok(time.map(|t| t / steps as f64))
    }

    fn error(
        &mut self,
        key: &GemmKey,
        variant: Variant,
        reference: Variant,
    ) -> Result<f64, CudaError> {
        let (Some(expected), Some(found)) =
            (self.output(key, reference)?, self.output(key, variant)?)
        else {
            return Ok(f64::INFINITY);
        };
        Ok(error_of_bytes(&found, &expected))
    }
}

/// ‖x − reference‖ / ‖reference‖ of two bf16 vectors.
fn error_of_bytes(x: &[u8], reference: &[u8]) -> f64 {
    let values = |bytes: &[u8]| -> Vec<bf16> {
        let halves = bytes.as_chunks::<2>().0.iter();
        halves.map(|b| bf16::from_le_bytes(*b)).collect()
    };
    relative_error(&values(x), &values(reference))
}

#[cfg(test)]
mod tests {
    use super::super::test_plans::{kernel_options, plan};
    use super::*;
    use lathe_ir::DType;

    #[test]
    fn every_gemm_of_a_load_is_found_once() {
        let plan = plan("configs/llama-3.2-1b", DType::BF16);
        let options = LoadOptions {
            max_tokens: 2048,
            max_rows: 64,
            max_sequences: 64,
            max_seq_len: 1024,
            page_size: 64,
            pages: 16,
        };
        let decode = DecodeBuckets::new(options.max_sequences, None);
        let (order, places) = places(&plan, &options, kernel_options(), &decode).unwrap();
        assert_eq!(order.len(), places.len());
        let rows: BTreeSet<usize> = order.iter().map(|k| k.m).collect();
        for m in [1, 4, 8, 64, 384, 1024, 1536, 2048] {
            assert!(rows.contains(&m), "{m}");
        }
        assert!(!rows.contains(&1152));
        // Decode first.
        assert_eq!(order[0].m, 1);
        let layers = plan.caches.len();
        let per_layer = places.values().filter(|p| p.steps.len() == layers);
        assert!(per_layer.count() > 4 * 20);
        assert!(places.values().all(|p| !p.steps.is_empty()));
    }

    #[test]
    fn errors_are_of_bf16_values() {
        let bytes = |values: &[f32]| -> Vec<u8> {
            let halves = values.iter().map(|&v| bf16::from_f32(v));
            halves.flat_map(|h| h.to_le_bytes()).collect()
        };
        let reference = bytes(&[3.0, 4.0]);
        assert_eq!(error_of_bytes(&reference, &reference), 0.0);
        assert_eq!(error_of_bytes(&bytes(&[3.0, 4.5]), &reference), 0.1);
        assert!(error_of_bytes(&bytes(&[3.0, f32::NAN]), &reference).is_nan());
    }
}
