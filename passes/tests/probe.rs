use lathe_ir::import::*;
use lathe_passes::pipeline::*;
use lathe_passes::egraph::cost::DeviceModel;
#[test]
fn probe() {
    let name = std::env::var("M").unwrap_or("llama-3.1-8b".into());
    let cfg = HfConfig::from_file(std::path::Path::new(&format!("../tests/fixtures/configs/{name}/config.json"))).unwrap();
    let t=std::time::Instant::now();
    let m = import(&cfg, &ImportOptions{dtype: lathe_ir::DType::BF16, max_seq_len: None}).unwrap();
    println!("import {:?} {} nodes", t.elapsed(), m.graph.nodes().len());
    let pc = PassConfig::new(DeviceModel::H100);
    let t=std::time::Instant::now();
    let c = compile_with(&m.graph, &pc, std::env::var("DUMPS").is_ok()).unwrap();
    println!("compile {:?} {:?}", t.elapsed(), c.phases);
    for t in &c.templates { println!("== {} layers {:?} imported {}", t.name, t.layers.len(), t.imported.nodes().len());
      for s in &t.stages { println!("  {:?} nodes {} classes {} iters {} matches {:?} {:?} {} -> {}", s.stage, s.nodes, s.classes, s.iterations, s.matches, s.saturate, s.cost_before, s.cost_after); }
      for (k, d) in [("decode",&t.decode),("general",&t.general)] {
      println!("{k}:");
      if let Some(d)=d { for (i,n) in d.nodes().iter().enumerate() { if !n.op.is_leaf() {println!("   %{i} = {} {:?} {:?}", n.op.name(), n.inputs.iter().map(|i| i.0).collect::<Vec<_>>(), n.prov.path); }} } }
    }
    println!("{:?}", c.no_step);
}
