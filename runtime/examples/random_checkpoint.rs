//! Writes a checkpoint with the random weights of `skip_loading_weights` in bfloat16, for timing loads
//! and for comparing them with weights that were made on the device:
//! `random_checkpoint CONFIG_DIR OUT [SEED]`.
use lathe_ir::DType;
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_runtime::device::load::expected_tensors;
use lathe_runtime::weights::{RandomWeights, TensorData, WeightSource};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

/// Most bytes of a file, as transformers shards.
const SHARD_BYTES: usize = 5_000_000_000;
/// Elements that one task makes and writes.
const CHUNK: usize = 1 << 20;

struct Shard {
    header: Map<String, Value>,
    tensors: Vec<(String, usize)>,
    bytes: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, from, out, rest @ ..] = args.as_slice() else {
        return Err("usage: random_checkpoint CONFIG_DIR OUT [SEED]".into());
    };
    let (from, out) = (Path::new(from), Path::new(out));
    let seed: u64 = rest.first().map_or(Ok(0), |s| s.parse())?;
    let start = Instant::now();
    let config = HfConfig::from_file(&from.join("config.json"))?;
    let options = ImportOptions {
        dtype: DType::BF16,
        max_seq_len: None,
    };
    let model = import(&config, &options)?;
    let expected = expected_tensors(&model.arch.weights);
    let weights = RandomWeights::new(&expected, seed);

    let mut shards: Vec<Shard> = Vec::new();
    for (name, shape) in &expected {
        let bytes = 2 * shape.iter().product::<usize>();
        if shards.last().is_none_or(|s| s.bytes + bytes > SHARD_BYTES) {
            shards.push(Shard {
                header: Map::new(),
                tensors: Vec::new(),
                bytes: 0,
            });
        }
        let shard = shards.last_mut().ok_or("no shard")?;
        let offsets = [shard.bytes, shard.bytes + bytes];
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets});
        shard.header.insert(name.clone(), entry);
        shard.tensors.push((name.clone(), bytes / 2));
        shard.bytes += bytes;
    }

    std::fs::create_dir_all(out)?;
    let mut map = Map::new();
    let total: usize = shards.iter().map(|s| s.bytes).sum();
    let count = shards.len();
    for (i, shard) in shards.iter().enumerate() {
        let file_name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let mut header = serde_json::to_string(&shard.header)?;
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let file = File::create(out.join(&file_name))?;
        file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)?;
        file.write_all_at(header.as_bytes(), 8)?;
        let mut at = 8 + header.len();
        for (name, elements) in &shard.tensors {
            map.insert(name.clone(), file_name.clone().into());
            let Some(TensorData::Random(values)) = weights.data(name) else {
                return Err(format!("{name} has no random values").into());
            };
            (0..*elements)
                .into_par_iter()
                .step_by(CHUNK)
                .try_for_each(|first| {
                    let indices = first..(first + CHUNK).min(*elements);
                    let bytes: Vec<u8> = indices
                        .flat_map(|e| values.value(e as u64).to_le_bytes())
                        .collect();
                    file.write_all_at(&bytes, (at + 2 * first) as u64)
                })?;
            at += 2 * elements;
        }
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        let path = out.join("model.safetensors.index.json");
        std::fs::write(path, serde_json::to_string_pretty(&index)?)?;
    }
    std::fs::copy(from.join("config.json"), out.join("config.json"))?;
    println!(
        "{:.2} GB in {count} files after {:.1} s: {}",
        total as f64 * 1e-9,
        start.elapsed().as_secs_f64(),
        out.display()
    );
    Ok(())
}
