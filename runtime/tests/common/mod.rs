//! The fixtures and their plans, for tests of what plans are and are lowered to.
#![allow(dead_code)] // Each test program uses a part of it.

use lathe_codegen::cuda::CudaOptions;
use lathe_codegen::{Plan, Programs, lower};
use lathe_ir::DType;
use lathe_ir::import::{HfConfig, ImportOptions, Model, import};
use lathe_passes::egraph::cost::DeviceModel;
use lathe_passes::pipeline::{PassConfig, compile};
use std::path::{Path, PathBuf};

/// The stages that `torch-simple` and `torch-cudagraph` switch off.
pub(crate) const UNFUSED: &[&str] = &["fuse"];

/// The top of the repository.
pub(crate) fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The models in a folder of the fixtures, `golden/NAME` or `configs/NAME`, sorted.
pub(crate) fn models(folder: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(top().join("tests/fixtures").join(folder))
        .unwrap()
        .map(|entry| format!("{folder}/{}", entry.unwrap().file_name().display()))
        .collect();
    names.sort();
    names
}

/// A model of the fixtures.
fn import_model(name: &str, dtype: DType) -> Model {
    let folder = top().join("tests/fixtures").join(name);
    let config = HfConfig::from_file(&folder.join("config.json")).unwrap();
    let options = ImportOptions {
        dtype,
        max_seq_len: None,
    };
    import(&config, &options).unwrap()
}

/// The `model_type` of a model of the fixtures.
pub(crate) fn family(name: &str) -> String {
    import_model(name, DType::BF16).arch.family
}

/// The plan of a model of the fixtures for an H100, without some passes.
pub(crate) fn plan(name: &str, dtype: DType, off: &[&str]) -> Plan {
    let model = import_model(name, dtype);
    let passes = PassConfig::new(DeviceModel::H100).disable(off).unwrap();
    let compiled = compile(&model.graph, &passes).unwrap();
    let programs = Programs {
        decode: compiled.steps.decode.as_ref(),
        general: compiled.steps.general.as_ref(),
        full: None,
    };
    lower(name, dtype, &programs).unwrap()
}

/// An H100 with pages of 64 tokens and sequences of up to 4,096.
pub(crate) fn h100() -> CudaOptions {
    CudaOptions {
        pdl: true,
        sms: 132,
        page_size: 64,
        max_pages: 64,
        plain: false,
        per_op: false,
    }
}
