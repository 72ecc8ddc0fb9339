//! Which program a seed stands for.

use crate::check::{self, Defect, Verdict};
use crate::mutate::mutate;
use crate::programs::program;
use crate::rng::Rng;
use crate::shrink::shrink;
use lathe_ir::import::{HfConfig, ImportOptions, import};
use lathe_ir::{DType, Graph, text};
use lathe_passes::sample::Samples;
use lathe_passes::{Rule, rules};
use std::path::Path;
use std::sync::OnceLock;

/// Where a program comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Made of pieces, perhaps changed.
    Made,
    /// An imported model with changes.
    Model,
    /// A sample or near miss of a rule with changes.
    Sample,
}

/// A program and how it is checked.
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    pub(crate) graph: Graph,
}

impl Case {
    /// The program of a seed; none where its parts do not fit.
    pub(crate) fn new(seed: u64) -> Option<Case> {
        let kind = match seed % 8 {
            0..=3 => Kind::Made,
            4 => Kind::Model,
            _ => Kind::Sample,
        };
        Case::of(kind, seed)
    }

    /// The program of a kind and seed.
    pub(crate) fn of(kind: Kind, seed: u64) -> Option<Case> {
        let mut rng = Rng::new(seed);
        let (graph, changes) = match kind {
            Kind::Made => (program(rng.next())?, rng.pick(&[0, 0, 0, 1, 2])),
            Kind::Model => (rng.pick(models()), rng.pick(&[1, 1, 1, 2, 3])),
            Kind::Sample => (sample(&mut rng), rng.pick(&[0, 1, 1, 2, 3])),
        };
        let graph = mutate(&graph, changes, &mut rng);
        Some(Case { seed, kind, graph })
    }

    /// Through everything, with some rules instead of those of their names.
    pub(crate) fn check(&self, instead: &[&'static Rule]) -> Verdict {
        self.checked(&self.graph, instead)
    }

    fn checked(&self, graph: &Graph, instead: &[&'static Rule]) -> Verdict {
        match self.kind {
            Kind::Sample => check::piece(graph, self.seed),
            Kind::Made | Kind::Model => check::model(graph, self.seed, instead),
        }
    }

    /// The report of a defect: how to replay it, and the program, as small as can be with `small`.
    pub(crate) fn report(&self, defect: &Defect, instead: &[&'static Rule], small: bool) -> String {
        let mut last = defect.clone();
        let graph = match small {
            true => self.smallest(&mut last, instead),
            false => self.graph.clone(),
        };
        let (seed, kind) = (self.seed, self.kind);
        let (stage, what) = (last.stage, last.what);
        let text = text::print(&graph);
        format!(
            "seed {seed}, {kind:?}, {stage}: {what}\nreplay: make fuzz SEED={seed} MINUTES=0\n{text}"
        )
    }

    /// A smaller program with a defect of the same stage.
    fn smallest(&self, last: &mut Defect, instead: &[&'static Rule]) -> Graph {
        let stage = last.stage;
        shrink(
            &self.graph,
            &mut |graph| match self.checked(graph, instead) {
                Verdict::Defect(d) if d.stage == stage => {
                    *last = d;
                    true
                }
                _ => false,
            },
        )
    }
}

/// All golden models with few features, in both element types.
fn models() -> &'static [Graph] {
    static MODELS: OnceLock<Vec<Graph>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        let entries = std::fs::read_dir(folder).unwrap();
        let mut paths: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        paths.sort();
        assert!(paths.len() >= 14, "{paths:?}");
        let of = |path: &Path| [DType::F32, DType::BF16].map(|dtype| small(path, dtype));
        paths.iter().flat_map(|p| of(p)).collect()
    })
}

/// A golden model of one layer with few features.
fn small(folder: &Path, dtype: DType) -> Graph {
    let config = HfConfig::from_file(folder).unwrap();
    let sizes = [
        ("hidden_size", 32),
        ("n_embd", 32),
        ("num_attention_heads", 4),
        ("n_head", 4),
        ("num_key_value_heads", 2),
        ("num_kv_heads", 2),
        ("head_dim", 16),
        ("intermediate_size", 24),
        ("ffn_hidden_size", 24),
        ("num_hidden_layers", 1),
        ("n_layer", 1),
        ("vocab_size", 11),
        ("sliding_window", 3),
    ];
    // Only what the configuration says of itself; one KV head stays one, and as many as heads stay so.
    let heads = config.get("num_attention_heads").cloned();
    let overrides = sizes.iter().filter_map(|&(key, n)| {
        let old = config.get(key)?;
        let n = match key {
            _ if old.is_null() => return None,
            "num_key_value_heads" if old == 1 => 1,
            "num_key_value_heads" if Some(old) == heads.as_ref() => 4,
            _ => n,
        };
        Some((key, serde_json::Value::from(n)))
    });
    let overrides: Vec<(&str, serde_json::Value)> = overrides.collect();
    let name = folder.display();
    let config = config
        .clone()
        .with_overrides(overrides.iter().map(|(k, v)| (*k, v)));
    let config = config.unwrap_or_else(|e| panic!("{name}: {e}"));
    let options = ImportOptions {
        dtype,
        max_seq_len: None,
    };
    let model = import(&config, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
    model.graph
}

/// A program in which some rule must match, or must not.
fn sample(rng: &mut Rng) -> Graph {
    static SAMPLES: OnceLock<Vec<Samples>> = OnceLock::new();
    let all = SAMPLES.get_or_init(|| {
        let of = |rule: &Rule| Samples::of(rule).unwrap_or_else(|e| panic!("{e}"));
        rules::all().into_iter().map(of).collect()
    });
    let of = &all[rng.below(all.len())];
    let i = rng.below(of.samples.len() + of.near_misses.len());
    let template = of
        .samples
        .get(i)
        .unwrap_or_else(|| &of.near_misses[i - of.samples.len()]);
    template.graph(rng.next()).unwrap_or_else(|e| panic!("{e}"))
}
