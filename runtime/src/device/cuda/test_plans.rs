//! Plans of the fixtures, for tests.

#[path = "../../../tests/common/mod.rs"]
mod common;

use lathe_codegen::Plan;
use lathe_codegen::cuda::CudaOptions;
use lathe_ir::DType;

/// The plan of a folder of `tests/fixtures` for an H100.
pub(super) fn plan(name: &str, dtype: DType) -> Plan {
    common::plan(name, dtype, &[])
}

/// An H100 with pages of 64 tokens and sequences of up to 1,024.
pub(super) fn kernel_options() -> CudaOptions {
    CudaOptions {
        max_pages: 16,
        ..common::h100()
    }
}
