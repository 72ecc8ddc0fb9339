//! Plans of the fixtures, for tests.

use lathe_codegen::cuda::CudaOptions;
use lathe_codegen::{Plan, Programs, lower};
use lathe_ir::DType;
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use std::path::Path;

/// The plan of a folder of `tests/fixtures` for an H100.
pub(super) fn plan(name: &str, dtype: DType) -> Plan {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let config = HfConfig::from_file(&fixtures.join(name).join("config.json")).unwrap();
    let options = ImportOptions {
        dtype,
        max_seq_len: None,
    };
    let model = import(&config, &options).unwrap();
    let compiled = compile(&model.graph, &PassConfig::new(DeviceModel::H100)).unwrap();
    let programs = Programs {
        decode: compiled.decode.as_ref(),
        general: compiled.general.as_ref(),
        full: None,
    };
    lower(name, dtype, &programs).unwrap()
}

/// An H100 with pages of 64 tokens and sequences of up to 1,024.
pub(super) fn kernel_options() -> CudaOptions {
    CudaOptions {
        pdl: true,
        sms: 132,
        page_size: 64,
        max_pages: 16,
        plain: false,
        per_op: false,
    }
}
