//! What depends on weights alone: computed on the device while a model is loaded.

use super::compile::load_kernel;
use super::cubin_cache::CubinCache;
use super::driver::Stream;
use super::launch::{Args, LaunchConfig, launch};
use super::nvrtc::Source;
use super::prepare::{Addresses, Modules, Resolver};
use super::state::MetaLayout;
use super::{CudaError, DevicePtr};
use lathe_codegen::cuda::scale_columns::{KERNEL, SOURCE, THREADS};
use lathe_codegen::cuda::{CudaOptions, Sampling, Sizes, lower_program};
use lathe_codegen::{Once, Plan};

/// Runs the program of the weights that are computed, and puts its results where they stay.
///
/// # Safety
/// `slots` are the program's, with its bytes and used by nothing else; the stream has loaded the
/// weights that it reads.
///
/// # Errors
/// A kernel does not compile or run.
pub(super) unsafe fn compute_weights(
    stream: &Stream,
    plan: &Plan,
    once: &Once,
    options: CudaOptions,
    addresses: &Addresses,
    slots: &[DevicePtr],
    cache: Option<&CubinCache>,
) -> Result<(), CudaError> {
    // Kernels that start early read weights before their predecessors have ended.
    let options = CudaOptions {
        pdl: false,
        ..options
    };
    let sizes = Sizes { t: 1, b: 1, r: 1 };
    let lowered = lower_program(plan, &once.program, sizes, Sampling::Params, options)?;
    let mut modules = Modules::default();
    let loaded = modules.get(&stream.device().clone(), cache, &lowered.kernels)?;
    let meta = MetaLayout::new(sizes, options.max_pages);
    let resolver = Resolver {
        program: &once.program,
        lowered: &lowered,
        addresses,
        slots,
        meta: &meta,
        library: None,
    };
    for launch in resolver.launches(&loaded, false)? {
        // SAFETY: resolved from the lowered program, over memory by the contract of this function.
        unsafe { launch.submit(stream)? };
    }
    for &(v, weight) in &once.results {
        let bytes = plan.weights[weight].recipe.bytes();
        let from = slots[once.program.slot(v)];
        // SAFETY: the slot holds the value's bytes, which are those of the weight.
        unsafe { stream.copy_on_device(addresses.weights[weight], from, bytes)? };
    }
    // The modules are unloaded when this returns.
    stream.synchronize()
}

/// Multiplies the columns of the weights that have factors, in their places.
///
/// # Safety
/// The stream has loaded and computed all weights of the plan at these addresses, and nothing else uses them.
///
/// # Errors
/// The kernel does not compile or run.
pub(super) unsafe fn scale_weights(
    stream: &Stream,
    plan: &Plan,
    weights: &[DevicePtr],
    cache: Option<&CubinCache>,
) -> Result<(), CudaError> {
    let scaled = || (0..plan.weights.len()).filter_map(|i| Some((i, plan.weights[i].scaled_by?)));
    if scaled().next().is_none() {
        return Ok(());
    }
    let device = stream.device();
    let function = load_kernel(device, &Source::new(KERNEL, SOURCE), cache)?;
    let blocks = 8 * device.properties().sm_count;
    for (weight, by) in scaled() {
        let recipe = &plan.weights[weight].recipe;
        let (rows, cols) = (recipe.rows as u32, recipe.cols as u32);
        let args = Args::new()
            .ptr(weights[weight])
            .ptr(weights[by])
            .u32(recipe.dtype.code())
            .u32(rows)
            .u32(cols);
        let config = LaunchConfig::linear(blocks.min(rows), THREADS);
        // SAFETY: parameters as in scale_columns.cu; both weights have these extents by the contract.
        unsafe { launch(stream, &function, &config, &args)? };
    }
    // The module is unloaded when this returns.
    stream.synchronize()
}
