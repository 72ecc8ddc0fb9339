//! From the terms of templates to a program of the whole model.

use crate::region::{Regions, layer_name};
use crate::rules::STEP;
use lathe_ir::ops::{Cache, Input, Weight};
use lathe_ir::{Graph, NodeId, Op, Output, Prov, TypeError, WeightRef};
use std::collections::BTreeMap;

/// What the inputs of regions are called in the terms that are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inputs {
    /// As the regions name them: terms of full sequences.
    Full,
    /// With the prefix of a step.
    Step,
}

/// Replays the term of each template for every region that uses it, and joins them.
///
/// # Errors
/// The terms do not fit together, which would be a bug.
pub(super) fn stitch(
    regions: &Regions,
    name: &str,
    terms: &[&Graph],
    inputs: Inputs,
) -> Result<Graph, TypeError> {
    let mut out = Graph::new(name);
    let mut leaves: BTreeMap<Op, NodeId> = BTreeMap::new();
    let mut results: Vec<BTreeMap<&str, NodeId>> = Vec::new();
    let mut finals = Vec::new();
    for region in &regions.regions {
        let term = terms[region.template];
        let bound: BTreeMap<String, NodeId> = region
            .inputs
            .iter()
            .map(|b| {
                let input = match inputs {
                    Inputs::Full => b.input.clone(),
                    Inputs::Step => format!("{STEP}{}", b.input),
                };
                (input, results[b.region][b.output.as_str()])
            })
            .collect();
        let mut map: Vec<NodeId> = Vec::with_capacity(term.nodes().len());
        for node in term.nodes() {
            if let Op::Input(Input { name, .. }) = &node.op
                && let Some(&id) = bound.get(name)
            {
                map.push(id);
                continue;
            }
            let op = op_of_layer(&node.op, region.layer);
            if let Some(&id) = leaves.get(&op) {
                map.push(id);
                continue;
            }
            let operands = node.inputs.map(|i| map[i.index()]);
            let leaf = op.is_leaf().then(|| op.clone());
            let id = out.add(op, operands, &prov_of_layer(&node.prov, region.layer))?;
            leaves.extend(leaf.map(|op| (op, id)));
            map.push(id);
        }
        let named: BTreeMap<&str, NodeId> = term
            .outputs()
            .iter()
            .map(|(name, id)| (name.as_str(), map[id.index()]))
            .collect();
        for name in [Output::Next, Output::Logits].map(Output::name) {
            finals.extend(named.get(name).map(|&id| (name, id)));
        }
        results.push(named);
    }
    for (name, id) in finals {
        out.set_output(name, id);
    }
    Ok(out.without_dead())
}

/// An operation of a template in a layer: weights have the layer's number, caches are its own.
fn op_of_layer(op: &Op, layer: Option<u32>) -> Op {
    match (op, layer) {
        (Op::Weight(Weight { weight, dtype }), Some(l)) => Op::Weight(Weight {
            weight: WeightRef {
                name: layer_name(&weight.name, l),
                shape: weight.shape.clone(),
            },
            dtype: *dtype,
        }),
        (
            Op::Cache(Cache {
                kv_heads, head_dim, ..
            }),
            Some(layer),
        ) => Op::Cache(Cache {
            layer,
            kv_heads: *kv_heads,
            head_dim: *head_dim,
        }),
        (op, _) => op.clone(),
    }
}

fn prov_of_layer(prov: &Prov, layer: Option<u32>) -> Prov {
    match (layer, prov.layer) {
        (Some(l), Some(_)) => Prov {
            layer: Some(l),
            path: layer_name(&prov.path, l).into(),
        },
        _ => prov.clone(),
    }
}
