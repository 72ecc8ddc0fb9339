//! The self-test of a GPU: each step's launches on the operands that the CPU had, with everything else
//! poisoned, compared in all of memory.

mod memory;
mod running;
mod sessions;

use self::memory::{Image, Work};
use self::running::{Running, families};
use self::sessions::check_sessions;
use crate::device::cuda::cubin_cache::CubinCache;
use crate::device::cuda::driver::{Device, Stream};
use crate::device::cuda::memory::{Arena, aligned, bytes_of};
use crate::device::cuda::prepare::{Addresses, Modules, Resolver};
use crate::device::cuda::programs::{Key, key, sampling};
use crate::device::cuda::state::MetaLayout;
use crate::device::cuda::{CudaDevice, CudaError, CudaLoad, DevicePtr, buckets};
use crate::selftest::cases::{Rng, fill_cache};
use crate::selftest::cpu::{batch_env, load};
use crate::selftest::twin::Twin;
use crate::selftest::{Case, Outcome, Report, SelftestError, Subject, Tester};
use lathe_codegen::ProgramKind;
use lathe_codegen::cuda::{CudaOptions, CudaProgram, FAMILIES, KernelSource, Sizes, lower_tuned};
use std::collections::BTreeMap;

/// Compares a GPU with the CPU.
pub struct CudaTester {
    modules: Modules,
    cache: Option<CubinCache>,
    stream: Stream,
    filter: Option<String>,
    how: CudaLoad,
}

/// Constants of a subject on the device.
struct Constants {
    addresses: Addresses,
    /// The weights, to see at the end that nothing wrote them.
    weights: Vec<Vec<u8>>,
    _arena: Arena,
}

/// The bucket of a case and how its tokens are chosen.
fn bucket(case: &Case) -> Key {
    let b = &case.batch;
    let sizes = match case.kind {
        ProgramKind::Decode => Sizes::decode(buckets::decode(b.sequences())),
        _ => buckets::general(b.tokens_len(), b.sequences(), b.rows.len()),
    };
    key(case.kind, sizes, sampling(b, case.logits))
}

impl CudaTester {
    /// Opens a device. Only steps are compared whose families contain `filter`.
    ///
    /// # Errors
    /// The device or NVRTC is not usable.
    pub fn open(device: &CudaDevice, filter: Option<String>) -> Result<CudaTester, CudaError> {
        let how = CudaLoad {
            ordinal: device.ordinal(),
            cache: device.cache().cloned(),
            ..CudaLoad::default()
        };
        let device = Device::open(how.ordinal)?;
        Ok(CudaTester {
            modules: Modules::default(),
            cache: CubinCache::if_usable(how.cache.clone())?,
            stream: device.stream()?,
            filter,
            how,
        })
    }

    fn options(&self, subject: &Subject) -> CudaOptions {
        let o = &subject.options;
        CudaOptions {
            pdl: true,
            sms: self.stream.device().properties().sm_count,
            page_size: o.page_size,
            max_pages: o.max_pages(),
            plain: false,
            per_op: subject.per_op,
        }
    }

    /// Lowers a case; `None` if the filter leaves none of its steps.
    fn lower(&self, subject: &Subject, case: &Case) -> Result<Option<CudaProgram>, CudaError> {
        let program = subject.plan.program(case.kind);
        let program = program.ok_or(CudaError::NoStepProgram)?;
        let (_, sizes, sampling) = bucket(case);
        let options = self.options(subject);
        let choices = case.choices(&subject.plan, sizes, sampling, options)?;
        let plan = &subject.plan;
        let lowered = lower_tuned(plan, program, sizes, sampling, options, &choices)?;
        let wanted = |at: usize| {
            let f = self.filter.as_deref().unwrap_or("");
            families(program, &lowered, at).contains(f)
        };
        let any = lowered.launches.iter().any(|l| wanted(l.step));
        Ok(any.then_some(lowered))
    }

    /// Puts weights and tables on the device, the CPU's bytes as they are, and makes room for caches.
    fn upload(&self, subject: &Subject, twin: &dyn Twin) -> Result<Constants, CudaError> {
        let plan = &subject.plan;
        let weights: Vec<Vec<u8>> = (0..plan.weights.len())
            .map(|i| twin.weight(i).to_vec())
            .collect();
        let tables: Vec<Vec<f32>> = plan
            .tables
            .iter()
            .map(|t| t.data.iter().map(|v| v.get() as f32).collect())
            .collect();
        let tokens = subject.options.pages * subject.options.page_size;
        let cache_bytes = |c: &lathe_codegen::plan::CacheSpec| tokens * c.token_bytes();
        let total = weights.iter().map(|w| aligned(w.len())).sum::<usize>()
            + tables.iter().map(|t| aligned(4 * t.len())).sum::<usize>()
            + twin
                .rope()
                .values()
                .map(|(c, s)| aligned(4 * c.len()) + aligned(4 * s.len()))
                .sum::<usize>()
            + plan
                .caches
                .iter()
                .map(|c| aligned(cache_bytes(c)))
                .sum::<usize>();
        let hint = "the self-test needs a few hundred MB";
        let mut arena = Arena::new(self.stream.device(), "the self-test", total, hint)?;
        let put = |arena: &mut Arena, bytes: &[u8]| {
            let at = arena.alloc(bytes.len())?;
            // SAFETY: just allocated with this size; the wait keeps the source alive long enough.
            unsafe { self.stream.copy_to_device(at, bytes)? };
            self.stream.synchronize()?;
            Ok::<_, CudaError>(at)
        };
        let mut addresses = Addresses::default();
        for w in &weights {
            addresses.weights.push(put(&mut arena, w)?);
        }
        for t in &tables {
            addresses.tables.push(put(&mut arena, bytes_of(t))?);
        }
        for (&(table, bits), (cos, sin)) in twin.rope() {
            for (is_sine, wave) in [(false, cos), (true, sin)] {
                let at = put(&mut arena, bytes_of(wave))?;
                addresses.rope.insert((table, bits, is_sine), at);
            }
        }
        for c in &plan.caches {
            addresses.caches.push(arena.alloc(cache_bytes(c))?);
            let rows = tokens * 2 * c.kv_heads as usize;
            addresses.cache_rows.push(rows as u64);
        }
        Ok(Constants {
            addresses,
            weights,
            _arena: arena,
        })
    }

    fn case(
        &mut self,
        subject: &Subject,
        case: &Case,
        lowered: &CudaProgram,
        twin: &mut dyn Twin,
        constants: &mut Constants,
        report: &mut Report,
    ) -> Result<(), SelftestError> {
        let program = subject.plan.program(case.kind);
        let program = program.ok_or(CudaError::NoStepProgram)?;
        let device = self.stream.device().clone();
        let sizes = lowered.sizes;
        let bucket = sizes.env();
        let meta = MetaLayout::new(sizes, self.options(subject).max_pages);
        let image = Image::new(&device, program, &bucket, &meta, &case.batch)?;
        let work = Work::new(&self.stream, &lowered.workspaces)?;
        let addresses = &mut constants.addresses;
        addresses.meta = image.meta();
        addresses.sampled = image.sampled();
        addresses.workspaces = work.addresses();
        let slots: Vec<DevicePtr> = (0..program.slots.len()).map(|i| image.slot(i)).collect();
        let kernels = &lowered.kernels;
        let modules = self.modules.get(&device, self.cache.as_ref(), kernels)?;
        let resolver = Resolver {
            program,
            lowered,
            addresses,
            slots: &slots,
            meta: &meta,
            library: None,
        };
        let launches = match resolver.launches(&modules, true) {
            Ok(launches) => launches,
            Err(error) => {
                let place = || format!("{}, {}", subject.name, case.label);
                let fault = Outcome::exact(Some(error.to_string()));
                report.record("refused by the driver", subject.plan.dtype, place, fault);
                return Ok(());
            }
        };
        let mut running = Running {
            stream: &self.stream,
            subject,
            case,
            program,
            lowered,
            launches: &launches,
            caches: &addresses.caches,
            image,
            work,
            filter: self.filter.as_deref(),
            sizes: [batch_env(case), bucket],
        };
        twin.trace(case.kind, &case.batch, &mut |at, snapshot| {
            running.step(at, snapshot, report)
        })
    }
}

impl Tester for CudaTester {
    fn has_slow_reference(&self) -> bool {
        false
    }

    fn families(&self) -> &'static [&'static str] {
        &FAMILIES
    }

    fn prepare(&mut self, subjects: &[Subject]) -> Result<usize, SelftestError> {
        let mut kernels: BTreeMap<String, KernelSource> = BTreeMap::new();
        for subject in subjects {
            for case in &subject.cases {
                for k in self.lower(subject, case)?.iter().flat_map(|l| &l.kernels) {
                    kernels
                        .entry(k.code().to_owned())
                        .or_insert_with(|| k.clone());
                }
            }
        }
        let kernels: Vec<KernelSource> = kernels.into_values().collect();
        let device = self.stream.device().clone();
        self.modules.get(&device, self.cache.as_ref(), &kernels)?;
        Ok(kernels.len())
    }

    fn check(
        &mut self,
        subject: &Subject,
        seed: u64,
        report: &mut Report,
    ) -> Result<(), SelftestError> {
        let mut twin = load(subject)?;
        let mut constants = self.upload(subject, &*twin)?;
        for (number, case) in subject.cases.iter().enumerate() {
            let Some(lowered) = self.lower(subject, case)? else {
                continue;
            };
            let mut rng = Rng::new(seed ^ number as u64);
            for (i, spec) in subject.plan.caches.iter().enumerate() {
                let cache = fill_cache(spec, case, &subject.options, &mut rng);
                twin.set_cache(i, &cache);
            }
            self.case(subject, case, &lowered, &mut *twin, &mut constants, report)?;
        }
        let mut changed = Vec::new();
        for (i, want) in constants.weights.iter().enumerate() {
            let mut found = vec![0; want.len()];
            // SAFETY: the weight was uploaded from as many bytes; the wait ends the copy.
            unsafe {
                self.stream
                    .copy_to_host(&mut found, constants.addresses.weights[i])?
            };
            self.stream.synchronize()?;
            if found != *want {
                changed.push(i.to_string());
            }
        }
        let fault =
            (!changed.is_empty()).then(|| format!("weights {} changed", changed.join(", ")));
        let name = || subject.name.clone();
        report.record(
            "weights unchanged",
            subject.plan.dtype,
            name,
            Outcome::exact(fault),
        );
        Ok(())
    }

    fn check_sessions(
        &mut self,
        subject: &Subject,
        steps: usize,
        seed: u64,
        report: &mut Report,
    ) -> Result<bool, SelftestError> {
        if self.filter.is_some() {
            return Ok(false);
        }
        check_sessions(subject, &self.how, steps, seed, report)?;
        Ok(true)
    }
}
