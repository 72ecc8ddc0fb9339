//! Cutting a model into regions: embedding, one per decoder layer, head.
//!
//! Layers of one signature share a template that is optimised once and replayed for each, so 80
//! layers cost as much as one. A residual add belongs to the region that makes its second operand:
//! the last GEMM of a layer adds the residual in its epilogue, which no program of the whole model
//! does better (the tests compare them). What depends on positions only (masks, rotary angles) and
//! what depends on weights only is repeated in every region that uses it.

use crate::rules::STEP;
use crate::walk::{Reads, depth_first};
use lathe_ir::ops::select;
use lathe_ir::ops::{Expand, Input, Reshape, Select, Weight};
use lathe_ir::{Graph, NodeId, Op, Prov, Sym, TypeError, WeightRef};
use petgraph::visit::{Control, DfsEvent};
use std::collections::{BTreeMap, BTreeSet};

/// A value that a region takes from an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Name of the input in the region's template.
    pub input: String,
    /// Index of the region that makes the value.
    pub region: usize,
    /// Name of that region's output.
    pub output: String,
}

/// One region of a model.
#[derive(Clone, Debug)]
pub struct Region {
    /// Decoder layer, for layer regions.
    pub layer: Option<u32>,
    /// Index of its template in [`Regions::templates`].
    pub template: usize,
    /// Where its inputs come from.
    pub inputs: Vec<Boundary>,
}

/// A model cut into regions.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    /// One graph for each distinct region. Layer numbers in names are `*`, layers are 0.
    pub templates: Vec<Graph>,
    /// The regions in order of execution.
    pub regions: Vec<Region>,
}

impl Regions {
    /// The layers that use a template, in order.
    pub fn layers_of(&self, template: usize) -> Vec<u32> {
        self.regions
            .iter()
            .filter(|r| r.template == template)
            .filter_map(|r| r.layer)
            .collect()
    }
}

/// What stands for the layer's number in names of templates.
const LAYER: &str = "*";
/// The first value that a region hands on, and its name in the region that takes it.
const RESIDUAL: &str = "residual";

/// Replaces the first path segment that is the layer's number by `*`.
pub fn generic_name(name: &str, layer: u32) -> String {
    let number = layer.to_string();
    let mut done = false;
    let parts: Vec<&str> = name
        .split('.')
        .map(|p| {
            if !done && p == number {
                done = true;
                LAYER
            } else {
                p
            }
        })
        .collect();
    parts.join(".")
}

/// Puts a layer's number back for `*`.
pub fn layer_name(name: &str, layer: u32) -> String {
    name.replacen(LAYER, &layer.to_string(), 1)
}

/// The whole model as one region: for differential tests of the cut (`--no-roll`).
pub fn whole(graph: &Graph) -> Regions {
    Regions {
        templates: vec![graph.clone()],
        regions: vec![Region {
            layer: None,
            template: 0,
            inputs: Vec::new(),
        }],
    }
}

/// The input or weight of a graph that is called as what cut and step programs add: inputs of regions
/// and steps, and what stands for a layer's number.
pub fn reserved(graph: &Graph) -> Option<(&'static str, &str)> {
    graph.nodes().iter().find_map(|node| match &node.op {
        Op::Input(i) => {
            let numbered = i
                .name
                .strip_prefix("out")
                .is_some_and(|n| n.parse::<u32>().is_ok());
            let taken = i.name.starts_with(STEP) || i.name == RESIDUAL || numbered;
            taken.then_some(("input", i.name.as_str()))
        }
        Op::Weight(w) => {
            (w.weight.name.contains(LAYER)).then_some(("weight", w.weight.name.as_str()))
        }
        _ => None,
    })
}

/// Cuts a full-sequence graph into regions.
///
/// # Errors
/// A region is ill-typed, which would be a bug in the cut.
pub fn cut(graph: &Graph) -> Result<Regions, TypeError> {
    Cutter::new(graph).run()
}

struct Cutter<'a> {
    graph: &'a Graph,
    /// Region of each node; `None` for what is repeated in every user's region.
    home: Vec<Option<usize>>,
    /// The layers that have a region, in order; the embedding stands before them, the head after them.
    layers: Vec<u32>,
    count: usize,
}

impl<'a> Cutter<'a> {
    fn new(graph: &'a Graph) -> Cutter<'a> {
        let layers: BTreeSet<u32> = graph.nodes().iter().filter_map(|n| n.prov.layer).collect();
        let layers: Vec<u32> = layers.into_iter().collect();
        let count = if layers.is_empty() {
            1
        } else {
            layers.len() + 2
        };
        let mut varies = vec![false; graph.nodes().len()];
        let mut home: Vec<Option<usize>> = vec![None; graph.nodes().len()];
        for id in graph.ids() {
            let node = graph.node(id);
            // A value varies if it depends on the tokens; all else is repeated where it is used.
            varies[id.index()] =
                matches!(node.op, Op::Input(_)) || node.inputs.iter().any(|i| varies[i.index()]);
            if !varies[id.index()] {
                continue;
            }
            let latest = node.inputs.iter().filter_map(|i| home[i.index()]).max();
            let layer = node.prov.layer.and_then(|l| layers.binary_search(&l).ok());
            home[id.index()] = Some(match (layer, latest) {
                // What reads a later layer cannot run before it, whatever layer it says it is of.
                (Some(l), latest) => latest.unwrap_or(0).max(l + 1),
                (None, Some(r)) if r > 0 => count - 1,
                (None, _) => 0,
            });
        }
        // A result that depends on nothing is made where results are made.
        for (_, id) in graph.outputs() {
            home[id.index()].get_or_insert(count - 1);
        }
        Cutter {
            graph,
            home,
            layers,
            count,
        }
    }

    /// Whether a value is made by another region than this.
    fn is_foreign(&self, at: usize, region: usize) -> bool {
        self.home[at].is_some_and(|home| home != region)
    }

    /// The values that each region makes.
    fn members(&self) -> Vec<Vec<usize>> {
        let mut members = vec![Vec::new(); self.count];
        for (at, home) in self.home.iter().enumerate() {
            if let Some(region) = home {
                members[*region].push(at);
            }
        }
        members
    }

    fn run(&self) -> Result<Regions, TypeError> {
        // Outputs that each region owes to later ones, in order of first use.
        let mut owed: Vec<Vec<NodeId>> = vec![Vec::new(); self.count];
        let mut builds = Vec::new();
        for (region, own) in self.members().into_iter().enumerate() {
            builds.push(RegionBuild::new(self, region, own)?);
        }
        for b in &builds {
            for (source, _) in &b.inputs {
                let home = self.home[source.index()].expect("boundary values vary");
                if !owed[home].contains(source) {
                    owed[home].push(*source);
                }
            }
        }
        let mut templates: Vec<Graph> = Vec::new();
        let mut regions = Vec::new();
        let outputs: BTreeSet<NodeId> = self.graph.outputs().iter().map(|&(_, id)| id).collect();
        for (region, mut b) in builds.into_iter().enumerate() {
            for (i, source) in owed[region].iter().enumerate() {
                b.graph.set_output(&output_name(i), b.map[source]);
            }
            for (name, id) in self.graph.outputs() {
                if outputs.contains(id) && self.home[id.index()] == Some(region) {
                    b.graph.set_output(name, b.map[id]);
                }
            }
            if b.graph.outputs().is_empty() {
                continue;
            }
            let template = match templates.iter().position(|t| *t == b.graph) {
                Some(t) => t,
                None => {
                    templates.push(b.graph);
                    templates.len() - 1
                }
            };
            regions.push((region, b.layer, template, b.inputs));
        }
        let place: BTreeMap<usize, usize> =
            regions.iter().enumerate().map(|(i, r)| (r.0, i)).collect();
        let regions = regions
            .into_iter()
            .map(|(_, layer, template, inputs)| Region {
                layer,
                template,
                inputs: inputs
                    .into_iter()
                    .map(|(source, input)| {
                        let home = self.home[source.index()].expect("boundary values vary");
                        let i = owed[home].iter().position(|s| *s == source).expect("owed");
                        Boundary {
                            input,
                            region: place[&home],
                            output: output_name(i),
                        }
                    })
                    .collect(),
            })
            .collect();
        Ok(Regions { templates, regions })
    }
}

fn output_name(i: usize) -> String {
    if i == 0 {
        RESIDUAL.to_string()
    } else {
        format!("out{i}")
    }
}

struct RegionBuild {
    layer: Option<u32>,
    graph: Graph,
    map: BTreeMap<NodeId, NodeId>,
    /// Values taken from earlier regions, with their input names.
    inputs: Vec<(NodeId, String)>,
}

impl RegionBuild {
    fn new(c: &Cutter<'_>, region: usize, own: Vec<usize>) -> Result<RegionBuild, TypeError> {
        let inside = region > 0 && region + 1 < c.count;
        let layer = inside.then(|| c.layers[region - 1]);
        let name = match layer {
            Some(_) => "layer",
            None if region == 0 => "embed",
            None => "head",
        };
        let mut b = RegionBuild {
            layer,
            graph: Graph::new(name),
            map: BTreeMap::new(),
            inputs: Vec::new(),
        };
        let reads = Reads::new(c.graph.nodes().len(), |at| {
            c.graph.nodes()[at].inputs.iter().map(|i| i.index())
        });
        depth_first(&reads, own, |event| match event {
            // Values of earlier regions become inputs: what they are made of stays there.
            DfsEvent::Discover(at, _) if c.is_foreign(at, region) => Ok(Control::Prune),
            DfsEvent::Finish(at, _) => {
                b.take(c, region, NodeId(at as u32))?;
                Ok(Control::Continue)
            }
            _ => Ok(Control::Continue),
        })?;
        Ok(b)
    }

    /// Copies a node, whose operands are there, into the region.
    fn take(&mut self, c: &Cutter<'_>, region: usize, id: NodeId) -> Result<(), TypeError> {
        let node = c.graph.node(id);
        let new = if c.is_foreign(id.index(), region) {
            let ty = c.graph.tensor(id).expect("boundary values are tensors");
            let name = output_name(self.inputs.len());
            self.inputs.push((id, name.clone()));
            let op = Op::Input(Input {
                name,
                dtype: ty.dtype,
                shape: ty.shape.clone(),
            });
            // Where the value comes from differs between layers and does not matter to a template.
            let prov = match self.layer {
                Some(_) => Prov::layer(0, "boundary"),
                None => node.prov.clone(),
            };
            self.graph.add(op, [], &prov)?
        } else {
            let inputs = node.inputs.map(|i| self.map[i]);
            let op = match (&node.op, self.layer) {
                (Op::Weight(Weight { weight, dtype }), Some(l)) => Op::Weight(Weight {
                    weight: WeightRef {
                        name: generic_name(&weight.name, l),
                        shape: weight.shape.clone(),
                    },
                    dtype: *dtype,
                }),
                (op, _) => op.clone(),
            };
            self.graph.add(op, inputs, &self.generic(&node.prov))?
        };
        self.map.insert(id, new);
        Ok(())
    }

    /// In a layer's region everything belongs to that layer: it has one KV cache.
    fn generic(&self, prov: &Prov) -> Prov {
        match (self.layer, prov.layer) {
            (Some(l), Some(p)) => Prov {
                layer: Some(0),
                path: match l == p {
                    true => generic_name(&prov.path, l).into(),
                    false => prov.path.clone(),
                },
            },
            _ => prov.clone(),
        }
    }
}

/// The decode form of a step program: every row is sampled, so rows are not selected and `R = T`.
///
/// # Errors
/// The program is ill-typed after the change, which would be a bug.
pub fn select_all(graph: &Graph) -> Result<Graph, TypeError> {
    let mut out = Graph::new(&graph.name);
    let mut map: Vec<NodeId> = Vec::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        let inputs = node.inputs.map(|i| map[i.index()]);
        if node.op.is::<Select>() {
            map.push(inputs[select::X]);
            continue;
        }
        let op = match &node.op {
            Op::Reshape(Reshape(s)) => Op::Reshape(Reshape(
                s.iter().map(|d| d.rename(Sym::R, Sym::T)).collect(),
            )),
            Op::Expand(Expand(s)) => {
                Op::Expand(Expand(s.iter().map(|d| d.rename(Sym::R, Sym::T)).collect()))
            }
            op => op.clone(),
        };
        map.push(out.add(op, inputs, &node.prov)?);
    }
    for (name, id) in graph.outputs() {
        out.set_output(name, map[id.index()]);
    }
    Ok(out.without_dead())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_numbers_become_stars_and_back() {
        let name = "model.layers.12.self_attn.q_proj.weight";
        let generic = generic_name(name, 12);
        assert_eq!(generic, "model.layers.*.self_attn.q_proj.weight");
        assert_eq!(layer_name(&generic, 12), name);
        assert_eq!(generic_name("lm_head.weight", 3), "lm_head.weight");
    }
}
