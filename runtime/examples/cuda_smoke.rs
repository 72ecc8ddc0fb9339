//! Exercises the CUDA substrate on a real device and prints what it measured: weights made and uploaded bit for
//! bit as on the CPU, programmatic launches in graphs, clusters, tensor maps, cuBLASLt. Ends with an error at the
//! first wrong result. `cargo run --release -p lathe-runtime --example cuda_smoke -- [FOLDER [GIB]]`: files for the
//! upload go into FOLDER (default: the temporary folder), GIB gigabytes of them (default 2).

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use lathe_codegen::pack::{PackDType, PackRecipe, RowPerm, Segment};
use lathe_runtime::device::cuda::cubin_cache::{CubinCache, DEFAULT_LIMIT};
use lathe_runtime::device::cuda::cublaslt::{CublasLt, GemmOperands, GemmShape, WORKSPACE_BYTES};
use lathe_runtime::device::cuda::driver::{Device, Function, Stream};
use lathe_runtime::device::cuda::graph::Graph;
use lathe_runtime::device::cuda::launch::{Args, LaunchConfig, launch};
use lathe_runtime::device::cuda::memory::{Arena, Pinned, bytes_of, bytes_of_mut, check_fits};
use lathe_runtime::device::cuda::nvrtc::{self, Source};
use lathe_runtime::device::cuda::tensor_map::TensorMapSpec;
use lathe_runtime::device::cuda::timing::time_graph;
use lathe_runtime::device::cuda::upload::{Placement, UploadOptions, upload_weights};
use lathe_runtime::device::cuda::{CudaError, DevicePtr, library};
use lathe_runtime::weights::pack::Packer;
use lathe_runtime::weights::{Checkpoint, RandomWeights, WeightSource};

type Outcome = Result<(), Box<dyn Error>>;
type Step = fn(&Smoke) -> Outcome;

const KERNELS: &str = r#"
typedef unsigned int u32;
struct __align__(64) Map { unsigned long long o[16]; };

extern "C" __global__ void empty(u32* x) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (x && blockIdx.x == 0 && threadIdx.x == 0) x[0] += 1;
}

// Each block writes its rank in the cluster.
extern "C" __global__ void ranks(u32* out) {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) out[blockIdx.x] = rank;
}

// One 64 x 64 bf16 box by the tensor memory accelerator, unswizzled into out[64][64]; 128 threads.
extern "C" __global__ void box(const __grid_constant__ Map map, unsigned short* out, u32 x, u32 y) {
    extern __shared__ __align__(1024) unsigned char smem[];
    u32 tile = (u32)__cvta_generic_to_shared(smem), bar = tile + 8192;
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(bar) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(8192) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0],[%1,{%3,%4}],[%2];"
            :: "r"(tile), "l"(&map), "r"(bar), "r"(x), "r"(y) : "memory");
    }
    asm volatile("{.reg .pred P; W%=: mbarrier.try_wait.parity.shared::cta.b64 P,[%0],%1; @!P bra W%=;}" :: "r"(bar), "r"(0) : "memory");
    for (u32 i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
        u32 a = 2 * i;
        out[i] = *(unsigned short*)(smem + (a ^ (((a >> 7) & 7) << 4)));
    }
}
"#;

struct Smoke {
    device: Device,
    stream: Stream,
    cache: CubinCache,
    folder: PathBuf,
    gib: usize,
}

fn main() -> Outcome {
    let mut args = std::env::args().skip(1);
    let folder = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let gib = args.next().map_or(Ok(2), |g| g.parse())?;
    let cubins = folder.join("smoke-cubins");
    let device = Device::open(0)?;
    println!("{:?}", device.properties());
    let cache = CubinCache::open(&cubins, DEFAULT_LIMIT)?;
    println!(
        "NVRTC {:?} from {:?}",
        nvrtc::version()?,
        library::loaded_from(library::Library::Nvrtc)
    );
    let smoke = Smoke {
        stream: device.stream()?,
        device,
        cache,
        folder,
        gib,
    };
    let steps: [(&str, Step); 7] = [
        ("memory", memory),
        ("launches", launches),
        ("tensor map", tensor_map),
        ("random weights", random_weights),
        ("stored weights", stored_weights),
        ("cuBLASLt", cublaslt),
        ("cache", warm_cache),
    ];
    let mut failures = 0;
    for (name, step) in steps {
        let start = Instant::now();
        match step(&smoke) {
            Ok(()) => println!("== {name}: ok in {:.2} s", start.elapsed().as_secs_f64()),
            Err(error) => {
                failures += 1;
                println!("== {name}: FAILED: {error}");
            }
        }
    }
    std::fs::remove_dir_all(cubins)?;
    if failures == 0 {
        Ok(())
    } else {
        Err(format!("{failures} steps failed").into())
    }
}

impl Smoke {
    fn kernels(&self) -> Result<nvrtc::Compiled, CudaError> {
        self.cache
            .get_or_compile(&Source::new("smoke", KERNELS), &self.folder)
    }

    fn function(&self, kernel: &str, shared: u32) -> Result<Function, CudaError> {
        self.device
            .load_module("smoke", &self.kernels()?.cubin)?
            .function(kernel, shared)
    }

    fn arena(&self, bytes: usize) -> Result<Arena, CudaError> {
        Arena::new(&self.device, "smoke", bytes, "use a larger GPU")
    }

    fn read(&self, ptr: DevicePtr, out: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: every caller passes a pointer into a live arena with at least these bytes, and waits here.
        unsafe { self.stream.copy_to_host(out, ptr)? };
        self.stream.synchronize()
    }
}

fn place<'a>(
    arena: &mut Arena,
    recipes: &'a [PackRecipe],
) -> Result<Vec<Placement<'a>>, CudaError> {
    let place = |recipe: &'a PackRecipe| {
        arena
            .alloc(recipe.bytes())
            .map(|dst| Placement { recipe, dst })
    };
    recipes.iter().map(place).collect()
}

fn ensure(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition {
        Ok(())
    } else {
        Err(what().into())
    }
}

fn memory(smoke: &Smoke) -> Outcome {
    let wanted = [("weights".to_owned(), 900usize << 30)];
    let Err(error) = check_fits(&smoke.device, &wanted, "lower --max_batch_size") else {
        return Err("900 GiB fit".into());
    };
    println!("{error}");
    let start = Instant::now();
    let pinned = Pinned::new(&smoke.device, 128 << 20)?;
    println!(
        "128 MiB pinned in {:.1} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
    ensure(pinned.as_slice().iter().all(|&b| b == 0), || {
        "pinned memory is not zeroed".into()
    })
}

fn launches(smoke: &Smoke) -> Outcome {
    let compiled = smoke.kernels()?;
    println!(
        "compiled in {:.0} ms, {:?}",
        compiled.duration.as_secs_f64() * 1e3,
        compiled.resources
    );
    let mut arena = smoke.arena(1 << 20)?;
    let counter = arena.alloc(4)?;
    let empty = smoke.function("empty", 0)?;
    // SAFETY: the counter is one word.
    unsafe { smoke.stream.fill_u32(counter, 0, 1)? };
    for pdl in [false, true] {
        let config = LaunchConfig {
            pdl,
            ..LaunchConfig::linear(132, 128)
        };
        let graph = Graph::capture(&smoke.stream, |stream| {
            let args = Args::new().ptr(counter);
            // SAFETY: one pointer; all blocks wait for the predecessor before anything else.
            (0..500).try_for_each(|_| unsafe { launch(stream, &empty, &config, &args) })
        })?;
        let us = time_graph(&smoke.stream, &graph, 11, 4)?;
        println!(
            "graph of {} kernels, pdl {pdl}: {:.3} us each",
            graph.nodes(),
            us / 500.0
        );
    }
    let mut count = [0u32];
    smoke.read(counter, bytes_of_mut(&mut count))?;
    ensure(count[0] == 2 * (2 + 11) * 4 * 500, || {
        format!("the counter is {}", count[0])
    })?;

    let ranks = smoke.function("ranks", 0)?;
    let out = arena.alloc(4 * 16)?;
    let config = LaunchConfig {
        cluster: [4, 1, 1],
        ..LaunchConfig::linear(16, 32)
    };
    // SAFETY: 16 blocks write one word each.
    unsafe { launch(&smoke.stream, &ranks, &config, &Args::new().ptr(out))? };
    let mut found = [0u32; 16];
    smoke.read(out, bytes_of_mut(&mut found))?;
    ensure(
        found.iter().enumerate().all(|(i, &r)| r == i as u32 % 4),
        || format!("cluster ranks {found:?}"),
    )?;

    let refused = LaunchConfig {
        block: [2048, 1, 1],
        ..LaunchConfig::linear(1, 1)
    };
    // SAFETY: refused before it runs.
    let error = unsafe { launch(&smoke.stream, &ranks, &refused, &Args::new().ptr(out)) };
    println!(
        "{}",
        error
            .err()
            .map_or("2048 threads were accepted".into(), |e| e.to_string())
    );
    Ok(())
}

fn tensor_map(smoke: &Smoke) -> Outcome {
    let (rows, cols) = (200usize, 136usize);
    let values: Vec<u16> = (0..rows * cols).map(|i| i as u16).collect();
    let mut arena = smoke.arena(1 << 20)?;
    let (base, out) = (arena.alloc(2 * values.len())?, arena.alloc(8192)?);
    // SAFETY: the arena has the bytes; `values` lives until the synchronisation in `read`.
    unsafe { smoke.stream.copy_to_device(base, bytes_of(&values))? };
    let map =
        TensorMapSpec::matrix_bf16("smoke", base, rows as u64, cols as u64, 64, 64).encode()?;
    let kernel = smoke.function("box", 8192 + 64)?;
    // The last box hangs over both edges: zeros there.
    for (x, y) in [(64usize, 64usize), (128, 192)] {
        let config = LaunchConfig {
            shared: 8192 + 64,
            ..LaunchConfig::linear(1, 128)
        };
        let args = Args::new()
            .tensor_map(map)
            .ptr(out)
            .u32(x as u32)
            .u32(y as u32);
        // SAFETY: parameters as in the kernel; it writes 64 * 64 values.
        unsafe { launch(&smoke.stream, &kernel, &config, &args)? };
        let mut found = vec![0u16; 64 * 64];
        smoke.read(out, bytes_of_mut(&mut found))?;
        for (i, &value) in found.iter().enumerate() {
            let (r, c) = (y + i / 64, x + i % 64);
            let expected = if r < rows && c < cols {
                values[r * cols + c]
            } else {
                0
            };
            ensure(value == expected, || {
                format!("box at {x}, {y}: element {i} is {value}, not {expected}")
            })?;
        }
    }
    Ok(())
}

/// Recipes that use every permutation, transpose, dtype and odd sizes.
fn recipes(dtype: PackDType) -> (Vec<(String, Vec<usize>)>, Vec<PackRecipe>) {
    let (h, d, i) = (264, 64, 136);
    let rope = RowPerm::RopeHalves { head_dim: d };
    let part = |part| RowPerm::Interleave8 { part };
    let tensors = [
        ("q.weight", vec![4 * d, h]),
        ("k.weight", vec![2 * d, h]),
        ("gate.weight", vec![i, h]),
        ("up.weight", vec![i, h]),
        ("h.c_fc.weight", vec![h, 3 * i]),
        ("odd.weight", vec![17, 35]),
        ("norm.weight", vec![h]),
        ("k.bias", vec![2 * d]),
    ];
    let recipe = |rows, cols, segments| PackRecipe {
        rows,
        cols,
        dtype,
        segments,
    };
    let recipes = vec![
        recipe(
            5 * d,
            h,
            vec![
                Segment {
                    src_rows: d..4 * d,
                    ..Segment::whole("q.weight", 4 * d, h, 0)
                }
                .with_perm(rope),
                Segment::whole("k.weight", 2 * d, h, 3 * d).with_perm(rope),
            ],
        ),
        recipe(
            2 * i,
            h,
            vec![
                Segment::whole("gate.weight", i, h, 0).with_perm(part(0)),
                Segment::whole("up.weight", i, h, 0).with_perm(part(1)),
            ],
        ),
        recipe(
            3 * i,
            h - 8,
            vec![Segment {
                src_cols: 8..h,
                transpose: true,
                ..Segment::whole("h.c_fc.weight", 3 * i, h, 0)
            }],
        ),
        PackRecipe::identity("odd.weight", 17, 35, dtype),
        PackRecipe::identity("norm.weight", h, 1, dtype),
        recipe(
            2 * d,
            1,
            vec![Segment::whole("k.bias", 2 * d, 1, 0).with_perm(rope)],
        ),
    ];
    (tensors.map(|(n, s)| (n.to_owned(), s)).to_vec(), recipes)
}

/// Uploads the recipes and compares every byte with the CPU's packing.
fn compare(smoke: &Smoke, source: &dyn WeightSource, recipes: &[PackRecipe]) -> Outcome {
    let mut arena = smoke.arena(recipes.iter().map(|r| r.bytes() + 256).sum())?;
    let placements = place(&mut arena, recipes)?;
    // SAFETY: the arena has the bytes of every recipe.
    unsafe {
        upload_weights(
            &smoke.stream,
            &placements,
            source,
            Some(&smoke.cache),
            UploadOptions::default(),
            &|_| (),
        )?
    };
    for (index, placement) in placements.iter().enumerate() {
        let recipe = placement.recipe;
        let (mut expected, mut found) = (vec![0u8; recipe.bytes()], vec![0u8; recipe.bytes()]);
        Packer::new(recipe, source)?.fill(0..recipe.rows, &mut expected)?;
        smoke.read(placement.dst, &mut found)?;
        let first = expected.iter().zip(&found).position(|(a, b)| a != b);
        ensure(first.is_none(), || {
            format!("recipe {index} {} differs at byte {first:?}", recipe.dtype)
        })?;
    }
    Ok(())
}

fn random_weights(smoke: &Smoke) -> Outcome {
    for dtype in [PackDType::F32, PackDType::Bf16, PackDType::F16] {
        let (tensors, recipes) = recipes(dtype);
        compare(smoke, &RandomWeights::new(&tensors, 11), &recipes)?;
    }
    // 16 GB as 70 matrices of the size of an 8B's gate|up.
    let (i, h, n) = (14336, 4096, 70);
    let name = |layer: usize, what: &str| format!("layers.{layer}.{what}.weight");
    let names =
        (0..n).flat_map(|l| [name(l, "gate"), name(l, "up")].map(|name| (name, vec![i, h])));
    let source = RandomWeights::new(&names.collect::<Vec<_>>(), 0);
    let part = |name, part| Segment::whole(name, i, h, 0).with_perm(RowPerm::Interleave8 { part });
    let recipe = |l| PackRecipe {
        rows: 2 * i,
        cols: h,
        dtype: PackDType::Bf16,
        segments: vec![part(name(l, "gate"), 0), part(name(l, "up"), 1)],
    };
    let recipes: Vec<PackRecipe> = (0..n).map(recipe).collect();
    let mut arena = smoke.arena(recipes.iter().map(PackRecipe::bytes).sum())?;
    let placements = place(&mut arena, &recipes)?;
    for _ in 0..2 {
        // SAFETY: the arena has the bytes of every recipe.
        let stats = unsafe {
            upload_weights(
                &smoke.stream,
                &placements,
                &source,
                Some(&smoke.cache),
                UploadOptions::default(),
                &|_| (),
            )?
        };
        let seconds = stats.duration.as_secs_f64();
        println!(
            "{:.2} GB generated in {seconds:.3} s",
            stats.generated as f64 / 1e9
        );
    }
    Ok(())
}

/// Writes a checkpoint of random bf16 tensors as a safetensors file.
fn write_checkpoint(folder: &Path, source: &RandomWeights) -> Outcome {
    std::fs::create_dir_all(folder)?;
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for name in source.names() {
        let shape = &source.info(name).ok_or("a tensor without a shape")?.shape;
        let bytes = 2 * shape.iter().product::<usize>();
        let entry =
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, at + bytes]});
        header.insert(name.to_owned(), entry);
        at += bytes;
    }
    let header = serde_json::to_vec(&header)?;
    let mut file =
        std::io::BufWriter::new(std::fs::File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for name in source.names() {
        let (rows, cols) = source
            .info(name)
            .ok_or("a tensor without a shape")?
            .matrix();
        let recipe = PackRecipe::identity(name, rows, cols, PackDType::Bf16);
        let mut bytes = vec![0u8; recipe.bytes()];
        Packer::new(&recipe, source)?.fill(0..rows, &mut bytes)?;
        file.write_all(&bytes)?;
    }
    Ok(file.flush()?)
}

fn stored_weights(smoke: &Smoke) -> Outcome {
    let folder = smoke.folder.join("smoke-checkpoint");
    let (tensors, small) = recipes(PackDType::Bf16);
    write_checkpoint(&folder, &RandomWeights::new(&tensors, 5))?;
    for dtype in [PackDType::F32, PackDType::Bf16] {
        let small: Vec<PackRecipe> = small
            .iter()
            .cloned()
            .map(|r| PackRecipe { dtype, ..r })
            .collect();
        compare(smoke, &Checkpoint::open(&folder)?, &small)?;
    }
    let (i, h) = (14336, 4096);
    let layers = (smoke.gib << 30) / (2 * 2 * i * h);
    let name = |layer: usize, what: &str| format!("layers.{layer}.{what}.weight");
    let names =
        (0..layers).flat_map(|l| [name(l, "gate"), name(l, "up")].map(|name| (name, vec![i, h])));
    write_checkpoint(&folder, &RandomWeights::new(&names.collect::<Vec<_>>(), 0))?;
    let path = folder.join("model.safetensors");
    let bytes = std::fs::metadata(&path)?.len() as f64;

    // What parallel reads of the file give, from the page cache.
    let file = std::fs::File::open(&path)?;
    let mut buffer = vec![1u8; 256 << 20];
    let chunks = bytes as u64 / buffer.len() as u64;
    for _ in 0..2 {
        let start = Instant::now();
        for chunk in 0..chunks {
            let offset = chunk * buffer.len() as u64;
            read_parallel(&file, offset, &mut buffer)?;
        }
        let rate = (chunks * buffer.len() as u64) as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!(
            "parallel reads: {rate:.1} GB/s on {} threads",
            rayon::current_num_threads()
        );
    }

    let checkpoint = Checkpoint::open(&folder)?;
    let part = |name, part| Segment::whole(name, i, h, 0).with_perm(RowPerm::Interleave8 { part });
    let recipe = |l| PackRecipe {
        rows: 2 * i,
        cols: h,
        dtype: PackDType::Bf16,
        segments: vec![part(name(l, "gate"), 0), part(name(l, "up"), 1)],
    };
    let recipes: Vec<PackRecipe> = (0..layers).map(recipe).collect();
    let mut arena = smoke.arena(recipes.iter().map(PackRecipe::bytes).sum())?;
    let placements = place(&mut arena, &recipes)?;
    for _ in 0..2 {
        // SAFETY: the arena has the bytes of every recipe.
        let stats = unsafe {
            upload_weights(
                &smoke.stream,
                &placements,
                &checkpoint,
                None,
                UploadOptions::default(),
                &|_| (),
            )?
        };
        let seconds = stats.duration.as_secs_f64();
        println!(
            "{:.2} GB uploaded at {:.1} GB/s",
            stats.copied as f64 / 1e9,
            stats.copied as f64 / seconds / 1e9
        );
    }
    let last = recipes.len() - 1;
    let (mut expected, mut found) = (
        vec![0u8; recipes[last].bytes()],
        vec![0u8; recipes[last].bytes()],
    );
    Packer::new(&recipes[last], &checkpoint)?.fill(0..2 * i, &mut expected)?;
    smoke.read(placements[last].dst, &mut found)?;
    std::fs::remove_dir_all(folder)?;
    ensure(expected == found, || "the last weight differs".into())
}

fn read_parallel(file: &std::fs::File, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    use rayon::prelude::*;
    use std::os::unix::fs::FileExt;
    let piece = 1 << 20;
    buffer
        .par_chunks_mut(piece)
        .enumerate()
        .try_for_each(|(i, out)| file.read_exact_at(out, offset + (i * piece) as u64))
}

fn cublaslt(smoke: &Smoke) -> Outcome {
    let shapes = [(512, 28672, 4096), (2048, 6144, 4096), (1, 4096, 4096)];
    let workspace = smoke.arena(WORKSPACE_BYTES)?;
    let lt = CublasLt::new(workspace.base())?;
    println!(
        "cuBLASLt from {:?}",
        library::loaded_from(library::Library::CublasLt)
    );
    for (m, n, k) in shapes {
        let copies = 4;
        let names: Vec<(String, Vec<usize>)> = (0..copies)
            .flat_map(|c| {
                [
                    (format!("w{c}.weight"), vec![n, k]),
                    (format!("x{c}.weight"), vec![m, k]),
                ]
            })
            .collect();
        let recipes: Vec<PackRecipe> = names
            .iter()
            .map(|(name, s)| PackRecipe::identity(name.as_str(), s[0], s[1], PackDType::Bf16))
            .collect();
        let mut arena = smoke.arena(copies * 2 * (n * k + m * k + m * n + 384))?;
        let placements = place(&mut arena, &recipes)?;
        let source = RandomWeights::new(&names, 1);
        // SAFETY: the arena has the bytes of every recipe.
        unsafe {
            upload_weights(
                &smoke.stream,
                &placements,
                &source,
                Some(&smoke.cache),
                UploadOptions::default(),
                &|_| (),
            )?
        };
        let operand = |c: usize| {
            let (w, x) = (placements[2 * c].dst, placements[2 * c + 1].dst);
            Ok(GemmOperands {
                x,
                w,
                y: arena.alloc(2 * m * n)?,
            })
        };
        let operands = (0..copies)
            .map(operand)
            .collect::<Result<Vec<_>, CudaError>>()?;
        check_fits(&smoke.device, &[], "")?;
        let mut gemm = lt.gemm(GemmShape { m, n, k })?;
        // SAFETY: all operands have the shape's sizes and live in the arena.
        let us = unsafe { gemm.tune(&smoke.stream, &operands, 7)? };
        let (tflops, gbs) = (
            (2 * m * n * k) as f64 / us / 1e6,
            (2 * n * k) as f64 / us / 1e3,
        );
        let (chosen, all) = (gemm.chosen(), gemm.algorithms());
        println!(
            "M={m} N={n} K={k}: {us:.1} us, {tflops:.0} TFLOP/s, {gbs:.0} GB/s (algorithm {chosen} of {all})"
        );
        // One element against a sum on the host.
        let (mut y, row, col) = (vec![half::bf16::ZERO; m * n], m / 2, n / 3);
        smoke.read(operands[0].y, bytes_of_mut(&mut y))?;
        let (w, x) = (source.data("w0.weight"), source.data("x0.weight"));
        let (
            Some(lathe_runtime::weights::TensorData::Random(w)),
            Some(lathe_runtime::weights::TensorData::Random(x)),
        ) = (w, x)
        else {
            return Err("random weights are not random".into());
        };
        let product = |i: usize| {
            x.value((row * k + i) as u64).to_f64() * w.value((col * k + i) as u64).to_f64()
        };
        let expected: f64 = (0..k).map(product).sum();
        let found = y[row * n + col].to_f64();
        ensure(
            (found - expected).abs() < 4e-3 * expected.abs().max(0.02),
            || format!("y[{row}, {col}] is {found}, not {expected}"),
        )?;
    }
    Ok(())
}

fn warm_cache(smoke: &Smoke) -> Outcome {
    let start = Instant::now();
    let compiled = smoke.kernels()?;
    println!(
        "from the cache in {:.2} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
    ensure(compiled.cached, || "the cache was not used".into())
}
