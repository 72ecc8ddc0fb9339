//! Prints the steps of a model's programs: `plan_dump CONFIG DTYPE [DISABLED_STAGE...]`.
use lathe_ir::import::{HfConfig, ImportOptions, import};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let cfg = HfConfig::from_file(std::path::Path::new(&args[1])).unwrap();
    let m = import(&cfg, &ImportOptions { dtype: args[2].parse().unwrap(), max_seq_len: None }).unwrap();
    let pc = lathe_passes::pipeline::PassConfig::new(lathe_passes::egraph::cost::DeviceModel::H100);
    let pc = pc.disable(&args[3..].iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let t = std::time::Instant::now();
    let c = lathe_passes::pipeline::compile(&m.graph, &pc).unwrap();
    println!("compile {:?} no_step {:?}", t.elapsed(), c.no_step);
    let p = lathe_codegen::lower("m", args[2].parse().unwrap(), &lathe_codegen::Programs { decode: c.decode.as_ref(), general: c.general.as_ref(), full: if c.decode.is_none() { Some(&c.full) } else { None } }).unwrap();
    println!("weights {} tables {:?}", p.weights.len(), p.tables.iter().map(|t| (&t.name, t.data.len())).collect::<Vec<_>>());
    for pr in &p.programs {
        println!("== {} inputs {:?} slots {}", pr.kind.name(), pr.inputs, pr.slots.len());
        for s in pr.steps.iter() {
            if s.prov.layer.is_some_and(|l| l > 0) { continue; }
            println!("{:?}\n    {:?}\n    types {:?}\n    -> {:?} {:?}  [{}]", s.op, s.operands, s.types, s.results, s.ty, s.prov.path);
        }
        println!("out {:?}", pr.outputs);
    }
}
