//! What a loaded model keeps on the device: weights, KV cache, activations, tables and workspaces. Its
//! sizes are predicted and checked before anything is allocated.

use super::buckets::{self, DecodeBuckets};
use super::cubin_cache::CubinCache;
use super::driver::Stream;
use super::memory::{Arena, aligned, bytes_of, check_fits};
use super::once::{compute_weights, scale_weights};
use super::prepare::Addresses;
use super::programs::Programs;
use super::state::MetaLayout;
use super::upload::{Placement, UploadOptions, upload_weights};
use super::{CudaError, DevicePtr};
use crate::device::load::{LoadOptions, Loadable, rope_tables};
use crate::progress::{self, Unit};
use lathe_codegen::cuda::{CudaOptions, Sizes};
use lathe_codegen::{Plan, Program, ProgramKind};
use lathe_ir::SymEnv;
use std::collections::BTreeMap;

/// The buckets of the largest steps.
struct Largest {
    decode: Sizes,
    general: Sizes,
}

impl Largest {
    fn new(o: &LoadOptions, decode: &DecodeBuckets) -> Largest {
        let rows = o.max_rows.max(o.max_sequences);
        Largest {
            decode: Sizes::decode(decode.of(o.max_sequences)),
            general: buckets::general(o.max_tokens, o.max_sequences, rows),
        }
    }

    /// The largest values of a program's symbols.
    fn env(&self, kind: ProgramKind) -> SymEnv {
        match kind {
            ProgramKind::Decode => self.decode.env(),
            _ => self.general.env(),
        }
    }
}

/// Cosines or sines with their key in [`Addresses::rope`]; the kernels take them apart.
type Waves = ((usize, u64, bool), Vec<f32>);

/// Bytes of everything that is put on the device.
struct MemoryPlan {
    weights: usize,
    /// Tokens that the cache holds.
    tokens: usize,
    caches: usize,
    activations: usize,
    /// Metadata of a step.
    meta: usize,
    /// Most rows that a step samples.
    rows: usize,
    /// Metadata, sampled tokens, tables and workspaces.
    state: usize,
}

impl MemoryPlan {
    fn new(plan: &Plan, options: &LoadOptions, programs: &Programs, waves: &[Waves]) -> MemoryPlan {
        let workspaces = programs.workspaces();
        let largest = Largest::new(options, &programs.decode);
        let max_pages = options.max_pages();
        let meta = [largest.decode, largest.general]
            .map(|s| MetaLayout::new(s, max_pages).bytes())
            .into_iter()
            .max()
            .unwrap_or(0);
        let rows = largest.decode.r.max(largest.general.r);
        let tables: usize = plan.tables.iter().map(|t| aligned(4 * t.data.len())).sum();
        let waves: usize = waves.iter().map(|(_, v)| aligned(4 * v.len())).sum();
        let work: usize = workspaces.iter().map(|w| aligned(w.bytes)).sum();
        let tokens = options.pages * options.page_size;
        let stepped = |p: &&Program| p.kind != ProgramKind::Full;
        MemoryPlan {
            weights: plan.weights.iter().map(|w| aligned(w.recipe.bytes())).sum(),
            tokens,
            caches: plan
                .caches
                .iter()
                .map(|c| aligned(tokens * c.token_bytes()))
                .sum(),
            activations: plan
                .programs
                .iter()
                .filter(stepped)
                .map(|p| p.activation_bytes(&largest.env(p.kind)))
                .chain(
                    plan.once
                        .iter()
                        .map(|o| o.program.activation_bytes(&SymEnv::default())),
                )
                .max()
                .unwrap_or(0),
            meta,
            rows,
            state: aligned(meta) + aligned(4 * rows) + tables + waves + work,
        }
    }

    /// Names and bytes for [`check_fits`].
    fn wanted(&self) -> [(String, usize); 4] {
        [
            ("weights".to_owned(), self.weights),
            ("KV cache".to_owned(), self.caches),
            ("activations".to_owned(), self.activations),
            ("workspaces".to_owned(), self.state),
        ]
    }

    /// What to lower if it does not fit: the largest part that a user can change.
    fn hint(&self) -> &'static str {
        let most = self.caches.max(self.activations).max(self.state);
        if self.weights > 4 * most {
            "the weights need most of it: take a smaller model or a shorter element type"
        } else if self.caches == most {
            "lower the KV cache: its share of free memory, the batch size or the sequence length"
        } else {
            "lower the tokens of a step or the batch size"
        }
    }
}

/// A model's memory on a device, and what lies where.
#[derive(Debug)]
pub(super) struct Resident {
    pub(super) addresses: Addresses,
    /// Addresses of the slots of each program.
    pub(super) slots: Vec<Vec<DevicePtr>>,
    /// Bytes of the largest step's metadata.
    pub(super) meta_bytes: usize,
    /// Most rows that a step samples.
    pub(super) rows: usize,
    /// Bytes of each workspace.
    workspaces: BTreeMap<String, usize>,
    activations: (DevicePtr, usize),
    _arenas: [Arena; 4],
}

impl Resident {
    /// First byte and bytes of all activations.
    pub(super) fn activations(&self) -> (DevicePtr, usize) {
        self.activations
    }

    /// Whether these workspaces are there and large enough.
    pub(super) fn has_workspaces(&self, wanted: &[lathe_codegen::cuda::Workspace]) -> bool {
        wanted
            .iter()
            .all(|w| self.workspaces.get(&w.name).is_some_and(|&n| n >= w.bytes))
    }

    /// Allocates and fills everything.
    ///
    /// # Errors
    /// It does not fit, or the weights cannot be read.
    pub(super) fn load(
        stream: &Stream,
        model: Loadable<'_>,
        options: &LoadOptions,
        programs: &Programs,
        kernels: CudaOptions,
        cache: Option<&CubinCache>,
    ) -> Result<Resident, CudaError> {
        let plan = model.plan;
        let device = stream.device();
        let workspaces = programs.workspaces();
        let waves: Vec<Waves> = rope_tables(plan, options.max_seq_len)
            .into_iter()
            .flat_map(|((t, bits), (cos, sin))| [((t, bits, false), cos), ((t, bits, true), sin)])
            .collect();
        let memory = MemoryPlan::new(plan, options, programs, &waves);
        let hint = memory.hint();
        check_fits(device, &memory.wanted(), hint)?;

        let mut weights = Arena::new(device, "weights", memory.weights, hint)?;
        let mut caches = Arena::new(device, "KV cache", memory.caches, hint)?;
        let activations = Arena::new(device, "activations", memory.activations, hint)?;
        let mut state = Arena::new(device, "workspaces", memory.state, hint)?;
        let mut addresses = Addresses::default();
        for w in &plan.weights {
            addresses.weights.push(weights.alloc(w.recipe.bytes())?);
        }
        for c in &plan.caches {
            let at = caches.alloc(memory.tokens * c.token_bytes())?;
            addresses.caches.push(at);
            let rows = memory.tokens * 2 * c.kv_heads as usize;
            addresses.cache_rows.push(rows as u64);
        }
        addresses.meta = state.alloc(memory.meta)?;
        addresses.sampled = state.alloc(4 * memory.rows)?;
        // Every cache starts as zeros, so that what was never written is a number.
        // SAFETY: each range is a part of an arena that nothing uses yet.
        unsafe {
            stream.fill_u32(caches.base(), 0, caches.capacity() / 4)?;
            stream.fill_u32(activations.base(), 0, activations.capacity() / 4)?;
            stream.fill_u32(state.base(), 0, state.capacity() / 4)?;
        }
        let mut work_bytes = BTreeMap::new();
        for w in workspaces {
            work_bytes.insert(w.name.clone(), w.bytes);
            let at = state.alloc(w.bytes)?;
            if let Some(word) = w.fill {
                // SAFETY: as above.
                unsafe { stream.fill_u32(at, word, w.bytes / 4)? };
            }
            addresses.workspaces.insert(w.name, at);
        }
        let mut upload = |data: &[f32]| -> Result<DevicePtr, CudaError> {
            let at = state.alloc(4 * data.len())?;
            // SAFETY: the range was just allocated; the data lives until the wait.
            unsafe { stream.copy_to_device(at, bytes_of(data))? };
            stream.synchronize()?;
            Ok(at)
        };
        for t in &plan.tables {
            let data: Vec<f32> = t.data.iter().map(|v| v.get() as f32).collect();
            addresses.tables.push(upload(&data)?);
        }
        for (key, data) in &waves {
            addresses.rope.insert(*key, upload(data)?);
        }
        let placements: Vec<Placement<'_>> = plan
            .weights
            .iter()
            .zip(&addresses.weights)
            .filter(|(w, _)| !w.is_computed())
            .map(|(w, &dst)| Placement {
                recipe: &w.recipe,
                dst,
            })
            .collect();
        let total = plan.weight_bytes() as u64;
        let tell = |n: usize| progress::advance("load weights", Unit::Bytes, n as u64, total);
        // SAFETY: each weight was given its own memory of its recipe's size, and no kernel runs yet.
        let stats = unsafe {
            let how = UploadOptions::default();
            upload_weights(stream, &placements, model.weights, cache, how, &tell)?
        };
        tracing::info!("{stats}");
        if let Some(once) = &plan.once {
            let slots = slot_addresses(&once.program, &SymEnv::default(), activations.base());
            // SAFETY: the arena has room for the program's slots and nothing else uses it yet; the
            // weights that it reads are in the stream before it.
            unsafe { compute_weights(stream, plan, once, kernels, &addresses, &slots, cache)? };
        }
        // SAFETY: all weights are in the stream before it, and no step has run yet.
        unsafe { scale_weights(stream, plan, &addresses.weights, cache)? };
        let largest = Largest::new(options, &programs.decode);
        let slots = plan
            .programs
            .iter()
            .map(|p| slot_addresses(p, &largest.env(p.kind), activations.base()))
            .collect();
        Ok(Resident {
            addresses,
            slots,
            meta_bytes: memory.meta,
            rows: memory.rows,
            workspaces: work_bytes,
            activations: (activations.base(), activations.capacity()),
            _arenas: [weights, caches, activations, state],
        })
    }
}

/// Where each slot of a program lies, one after the other.
fn slot_addresses(program: &Program, env: &SymEnv, base: DevicePtr) -> Vec<DevicePtr> {
    let mut at = base;
    let mut place = |bytes: usize| {
        let here = at;
        at += aligned(bytes) as DevicePtr;
        here
    };
    program.slots.iter().map(|s| place(s.bytes(env))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::memory::check_against;
    use super::super::test_plans::{kernel_options, plan};
    use super::*;
    use lathe_codegen::cuda::Choices;
    use lathe_ir::DType;

    fn memory_plan(options: &LoadOptions) -> (Plan, MemoryPlan) {
        let plan = plan("configs/llama-3.1-8b", DType::BF16);
        let decode = DecodeBuckets::new(options.max_sequences, None);
        let none = Choices::default();
        let programs = Programs::lower(&plan, options, kernel_options(), decode, &none).unwrap();
        let memory = MemoryPlan::new(&plan, options, &programs, &[]);
        (plan, memory)
    }

    fn options(pages: usize) -> LoadOptions {
        LoadOptions {
            max_tokens: 512,
            max_rows: 64,
            max_sequences: 64,
            max_seq_len: 1024,
            page_size: 64,
            pages,
        }
    }

    /// A GPU that is too small: the error says what was wanted for what, what there is, and what to
    /// lower, before anything is allocated.
    #[test]
    fn a_device_that_is_too_small_is_refused_with_numbers() {
        let (plan, memory) = memory_plan(&options(8192));
        assert_eq!(memory.weights, plan.weight_bytes());
        assert_eq!(memory.caches, 8192 * 64 * plan.token_bytes());
        let wanted = memory.wanted();
        let total: usize = wanted.iter().map(|w| w.1).sum();
        assert!(check_against(&wanted, total, 80 << 30, memory.hint()).is_ok());
        let error = check_against(&wanted, 40 << 30, 80 << 30, memory.hint()).unwrap_err();
        let text = error.to_string();
        for part in [
            "weights 14.96 GiB",
            "KV cache 64.00 GiB",
            "activations 0.",
            "workspaces 0.",
            "40.00 GiB free of 80.00 GiB",
            "missing; lower the KV cache",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn the_hint_names_the_part_that_can_change() {
        let (_, few) = memory_plan(&options(8));
        assert!(few.hint().starts_with("the weights"), "{}", few.hint());
        let steps = MemoryPlan {
            activations: few.weights,
            ..few
        };
        assert!(steps.hint().starts_with("lower the tokens"));
    }
}
