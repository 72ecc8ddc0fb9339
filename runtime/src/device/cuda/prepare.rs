//! A lowered program with everything resolved: functions, addresses, tensor maps, and its graph.

use super::cublaslt::{CublasLt, Gemm, GemmOperands, GemmShape};
use super::driver::{Device, Function, Module, Stream};
use super::graph::Graph;
use super::launch::{Args, LaunchConfig, launch};
use super::state::MetaLayout;
use super::tensor_map::{MapDType, Swizzle, TensorMapSpec};
use super::{CudaError, DevicePtr};
use crate::progress::{self, Unit};
use lathe_codegen::Program;
use lathe_codegen::cuda::{Arg, CudaProgram, Launch, LibraryGemm, MapArg, MapSwizzle, Ref};
use std::collections::BTreeMap;

/// Addresses of all memory that kernels refer to, fixed while the model is loaded.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    pub(crate) weights: Vec<DevicePtr>,
    pub(crate) tables: Vec<DevicePtr>,
    /// By table, bits of the scaling, and whether it is the sine.
    pub(crate) rope: BTreeMap<(usize, u64, bool), DevicePtr>,
    pub(crate) caches: Vec<DevicePtr>,
    /// Rows of each cache as a matrix of heads.
    pub(crate) cache_rows: Vec<u64>,
    /// By name.
    pub(crate) workspaces: BTreeMap<String, DevicePtr>,
    pub(crate) meta: DevicePtr,
    pub(crate) sampled: DevicePtr,
}

/// One launch, ready.
#[derive(Debug)]
pub(crate) struct Ready {
    call: Call,
}

/// What is put into a stream.
#[derive(Debug)]
enum Call {
    Kernel {
        function: Function,
        config: LaunchConfig,
        args: Args,
    },
    Library {
        gemm: Box<Gemm>,
        operands: GemmOperands,
        residual: Option<DevicePtr>,
    },
}

impl Ready {
    /// Whether cuBLASLt runs instead of the kernel.
    pub(super) fn is_library(&self) -> bool {
        matches!(self.call, Call::Library { .. })
    }

    /// Puts the launch into a stream.
    ///
    /// # Safety
    /// The arguments were resolved from the program that the kernel was generated from, and the
    /// memory behind them is alive until the stream has run it.
    pub(crate) unsafe fn submit(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe {
            match &self.call {
                Call::Kernel {
                    function,
                    config,
                    args,
                } => launch(stream, function, config, args),
                Call::Library {
                    gemm,
                    operands,
                    residual,
                } => gemm.run_added(stream, operands, *residual),
            }
        }
    }
}

/// A program of one bucket on the device.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) lowered: CudaProgram,
    /// In the order of the lowered program's launches.
    pub(super) launches: Vec<Ready>,
    pub(super) meta: MetaLayout,
    /// Address and element bytes of the logits.
    pub(super) logits: Option<(DevicePtr, usize)>,
    pub(super) graph: Option<Graph>,
}

/// What turns references into addresses for one program.
pub(crate) struct Resolver<'a> {
    pub(crate) program: &'a Program,
    pub(crate) lowered: &'a CudaProgram,
    pub(crate) addresses: &'a Addresses,
    pub(crate) slots: &'a [DevicePtr],
    pub(crate) meta: &'a MetaLayout,
    /// For launches that may use it; without it their kernels run.
    pub(crate) library: Option<&'a CublasLt>,
}

impl Resolver<'_> {
    pub(super) fn address(&self, r: &Ref) -> DevicePtr {
        let a = self.addresses;
        match r {
            Ref::Value(v) => self.slots[self.program.slot(*v)],
            Ref::Weight(i) => a.weights[*i],
            Ref::Table(i) => a.tables[*i],
            Ref::Rope {
                table,
                scaling,
                sine,
            } => a.rope[&(*table, scaling.get().to_bits(), *sine)],
            Ref::Cache(i) => a.caches[*i],
            Ref::Meta(m) => a.meta + self.meta.offset(*m) as DevicePtr,
            Ref::Work(i) => a.workspaces[&self.lowered.workspaces[*i].name],
            Ref::Sampled => a.sampled,
            Ref::Null => 0,
        }
    }

    fn map(&self, m: &MapArg) -> TensorMapSpec {
        let rows = match m.base {
            Ref::Cache(i) => self.addresses.cache_rows[i],
            _ => 0,
        };
        TensorMapSpec {
            name: format!("{:?}", m.base),
            dtype: MapDType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            base: self.address(&m.base),
            dims: m
                .dims
                .iter()
                .map(|&d| if d == 0 { rows } else { d })
                .collect(),
            strides: m.strides.clone(),
            block: m.block.clone(),
            swizzle: match m.swizzle {
                MapSwizzle::None => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
                MapSwizzle::B32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
                MapSwizzle::B64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
                MapSwizzle::B128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            },
        }
    }

    pub(super) fn args(&self, launch: &Launch) -> Result<Args, CudaError> {
        launch.args.iter().try_fold(Args::new(), |args, arg| {
            Ok(match arg {
                Arg::Ptr(r) => args.ptr(self.address(r)),
                Arg::I32(v) => args.i32(*v),
                Arg::F32(v) => args.f32(*v),
                Arg::Words(w) => args.words(w),
                Arg::Map(m) => args.tensor_map(self.map(m).encode()?),
            })
        })
    }

    fn library_call(&self, g: &LibraryGemm, library: &CublasLt) -> Result<Call, CudaError> {
        let LibraryGemm { m, n, k, .. } = *g;
        let mut gemm = library.gemm(GemmShape { m, n, k })?;
        gemm.choose(g.algorithm)?;
        Ok(Call::Library {
            gemm: Box::new(gemm),
            operands: GemmOperands {
                x: self.address(&g.x),
                w: self.address(&g.w),
                y: self.address(&g.y),
            },
            residual: g.residual.as_ref().map(|r| self.address(r)),
        })
    }

    /// Resolves all launches. `modules` are those of the lowered kernels.
    pub(crate) fn launches(&self, modules: &[Module], pdl: bool) -> Result<Vec<Ready>, CudaError> {
        let kernels = &self.lowered.kernels;
        let mut shared = vec![0; kernels.len()];
        for l in &self.lowered.launches {
            shared[l.kernel] = l.shared.max(shared[l.kernel]);
        }
        let functions = kernels
            .iter()
            .zip(modules)
            .zip(shared)
            .map(|((k, m), s)| m.function(&k.name, s))
            .collect::<Result<Vec<_>, _>>()?;
        let ready = |l: &Launch| {
            let call = match (&l.library, self.library) {
                (Some(gemm), Some(library)) => self.library_call(gemm, library)?,
                _ => Call::Kernel {
                    function: functions[l.kernel].clone(),
                    config: config(l, pdl),
                    args: self.args(l)?,
                },
            };
            Ok(Ready { call })
        };
        self.lowered.launches.iter().map(ready).collect()
    }
}

fn config(l: &Launch, pdl: bool) -> LaunchConfig {
    LaunchConfig {
        grid: l.grid,
        block: [l.block, 1, 1],
        shared: l.shared,
        cluster: [l.cluster, 1, 1],
        pdl: pdl && l.pdl,
    }
}

/// Loaded modules by their code: programs of different buckets share most kernels.
#[derive(Debug, Default)]
pub(crate) struct Modules(BTreeMap<String, Module>);

impl Modules {
    /// Modules of these kernels; those that are new are compiled on all cores, through the cache.
    pub(crate) fn get(
        &mut self,
        device: &Device,
        cache: Option<&super::cubin_cache::CubinCache>,
        kernels: &[lathe_codegen::cuda::KernelSource],
    ) -> Result<Vec<Module>, CudaError> {
        let mut wanted: Vec<super::nvrtc::Source> = Vec::new();
        for k in kernels {
            let code = k.code();
            if !self.0.contains_key(code) && wanted.iter().all(|w| w.text != code) {
                wanted.push(super::nvrtc::Source::new(k.name.clone(), code));
            }
        }
        let threads = std::thread::available_parallelism().map_or(4, |n| n.get());
        let failed = super::compile::failed_dir(cache);
        let total = wanted.len() as u64;
        let tell = |n: usize| progress::advance("compile kernels", Unit::Items, n as u64, total);
        let compiled = super::compile::compile_all(&wanted, cache, &failed, threads, &tell);
        for (source, outcome) in wanted.into_iter().zip(compiled) {
            let module = device.load_module(&source.name, &outcome?.cubin)?;
            self.0.insert(source.text, module);
        }
        Ok(kernels.iter().map(|k| self.0[k.code()].clone()).collect())
    }
}
