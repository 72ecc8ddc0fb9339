//! What every stage must leave behind: forms of the type of their value, and programs that verify.
//!
//! Faults here are bugs in a rule or in what joins programs; the error names the stage, the rule if
//! one is known, and the value.

use super::CompileError;
use super::terms::{Term, Terms};
use crate::egraph::EGraph;
use crate::egraph::analysis::{Applied, Data, op_of, operands_of};
use egg::Id;
use lathe_ir::text::format_type;
use lathe_ir::{Graph, infer, verify};
use std::collections::BTreeSet;

/// Where the fault is, and what it is.
struct Fault {
    class: Option<Id>,
    op: &'static str,
    value: String,
    reason: String,
}

impl Fault {
    fn error(self, stage: &'static str, program: &str, egraph: Option<&EGraph>) -> CompileError {
        CompileError::Malformed {
            stage,
            program: program.to_string(),
            value: self.value,
            rule: egraph
                .zip(self.class)
                .and_then(|(g, id)| maker(g, id, self.op)),
            reason: self.reason,
        }
    }
}

/// The last rule that gave a class a form of an operation.
fn maker(egraph: &EGraph, class: Id, op: &str) -> Option<&'static str> {
    let class = egraph.find(class);
    let log = egraph.analysis.log.iter().rev();
    let mut made = log.filter(|a| a.op == op && egraph.find(a.class) == class);
    made.next().map(|a| a.rule)
}

/// Checks that every form of the values that rules were applied to has the value's type.
///
/// # Errors
/// The first form that has not.
pub(super) fn check_forms(
    egraph: &EGraph,
    applied: &[Applied],
    stage: &'static str,
    template: &str,
) -> Result<(), CompileError> {
    let touched: BTreeSet<Id> = applied.iter().map(|a| egraph.find(a.class)).collect();
    for class in touched.into_iter().map(|id| &egraph[id]) {
        let Data::Value(value) = &class.data else {
            continue;
        };
        for node in &class.nodes {
            let op = op_of(egraph, node);
            let operands = operands_of(egraph, node).map(|&c| &egraph[c].data.value().ty);
            let reason = match infer(&op, operands) {
                Ok(ty) if ty == value.ty => continue,
                Ok(ty) => format!("a form of it has type {}", format_type(&ty)),
                Err(e) => e.reason,
            };
            let path = value.origin().map_or("", |p| &p.path);
            let fault = Fault {
                class: Some(class.id),
                op: op.name(),
                value: format!("{} : {} ({path})", op.name(), format_type(&value.ty)),
                reason,
            };
            return Err(fault.error(stage, template, Some(egraph)));
        }
    }
    Ok(())
}

/// Checks a program that was chosen among terms.
///
/// # Errors
/// The first thing that a program must not have.
pub(super) fn check_term(
    terms: &Terms,
    term: &Term,
    stage: &'static str,
    template: &str,
) -> Result<(), CompileError> {
    match fault(&term.graph, Some(&term.classes)) {
        None => Ok(()),
        Some(fault) => Err(fault.error(stage, template, Some(&terms.egraph))),
    }
}

/// Checks a program.
///
/// # Errors
/// The first thing that a program must not have.
pub(super) fn check_program(graph: &Graph, stage: &'static str) -> Result<(), CompileError> {
    match fault(graph, None) {
        None => Ok(()),
        Some(fault) => Err(fault.error(stage, &graph.name, None)),
    }
}

fn fault(graph: &Graph, classes: Option<&[Id]>) -> Option<Fault> {
    let error = verify(graph).into_iter().next()?;
    let node = error.node.as_ref();
    Some(Fault {
        class: node.and_then(|n| classes?.get(n.id.index()).copied()),
        op: node.map_or("", |n| n.op),
        value: node.map_or("a result".to_string(), |n| {
            format!("{} = {} ({})", n.id, n.op, n.prov)
        }),
        reason: error.kind.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egraph::TensorAnalysis;
    use crate::egraph::convert::add_graph;
    use lathe_ir::text;

    fn graph(body: &str) -> Graph {
        text::parse(&format!("graph \"g\" {{\n{body}\n}}\n")).unwrap()
    }

    #[test]
    fn a_form_of_another_type_is_found_with_its_rule() {
        let mut egraph = EGraph::new(TensorAnalysis::default());
        let g = graph("  %x = input {name=\"x\"} : f32[2]\n  %y = exp %x : f32[2]\n  return y=%y");
        let ids = add_graph(&mut egraph, &g);
        egraph.rebuild();
        let applied = [Applied {
            rule: "wrong",
            class: ids[1],
            op: "exp",
            assumes: None,
        }];
        egraph.analysis.log = applied.to_vec();
        assert!(check_forms(&egraph, &applied, "fuse", "0-layer").is_ok());
        // As if a rule had united the value with one of other extents.
        if let Data::Value(v) = &mut egraph[ids[1]].data {
            v.ty = lathe_ir::Type::tensor(lathe_ir::DType::F32, [3_i64.into()]);
        }
        let e = check_forms(&egraph, &applied, "fuse", "0-layer").unwrap_err();
        let expected = "internal: after fuse of 0-layer, exp : f32[3] () made by rule wrong: a form of it has type f32[2]";
        assert_eq!(e.to_string(), expected);
    }

    #[test]
    fn a_program_that_does_not_verify_is_found() {
        let mut g = graph("  %x = input {name=\"x\"} : f32[2]\n  return y=%x");
        assert!(check_program(&g, "stitch").is_ok());
        let id = g.output("y").unwrap();
        g.set_output("y", id);
        let e = check_program(&g, "stitch").unwrap_err().to_string();
        assert_eq!(
            e,
            "internal: after stitch of g, a result: output 'y' is declared twice"
        );
    }
}
