//! What depends on weights alone: layouts become recipes of the loader, all else is computed once.

use crate::pack::{PackError, PackRecipe, RowPerm, Segment};
use indexmap::IndexMap;
use lathe_ir::Operands;
use lathe_ir::ops::{Pack, Permute, Reshape, Slice, Weight};
use lathe_ir::ops::{X, binary};
use lathe_ir::{BinaryFn, Graph, Known, NodeId, Op, TypeError};
use std::collections::BTreeMap;
use std::ops::Range;

/// Most segments of one recipe; values of more pieces are computed.
const MAX_SEGMENTS: usize = 4096;
/// Most pieces on the way to a recipe.
const MAX_RUNS: usize = 1 << 20;

/// Which values are laid out or computed before the first step. Of the leaves these are the weights: constants and
/// tables are operands as they are.
pub(crate) fn fixed(graph: &Graph) -> Vec<bool> {
    let known = Known::of_graph(graph).into_iter();
    let fixed = known.zip(graph.nodes()).map(|(known, node)| {
        known.before_steps() && (!node.op.is_leaf() || matches!(node.op, Op::Weight(_)))
    });
    fixed.collect()
}

/// The program that computes weights, under construction.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    /// The operations, equal ones once.
    pub(crate) graph: Graph,
    nodes: BTreeMap<(Op, Operands<NodeId>), NodeId>,
    /// Results with their indices among the plan's weights.
    pub(crate) weights: IndexMap<NodeId, usize>,
}

impl Folded {
    /// Adds a value with all that it is computed from, up to what is read through a recipe.
    pub(crate) fn import(&mut self, from: &Graph, id: NodeId) -> Result<NodeId, TypeError> {
        let node = from.node(id);
        let inputs = node.inputs.try_map(|&i| self.import(from, i))?;
        let key = (node.op.clone(), inputs);
        if let Some(&known) = self.nodes.get(&key) {
            return Ok(known);
        }
        let new = self.graph.add(key.0.clone(), &key.1, &node.prov)?;
        self.nodes.insert(key, new);
        Ok(new)
    }
}

/// The parts of a weight whose columns are multiplied: `[rows, cols]` rows of checkpoint tensors and a
/// vector of `cols`, both of one type.
pub(crate) fn scaled_columns(graph: &Graph, id: NodeId) -> Option<(NodeId, NodeId)> {
    let node = graph.node(id);
    if node.op != Op::Binary(BinaryFn::Mul) {
        return None;
    }
    let (w, g) = (node.inputs[binary::A], node.inputs[binary::B]);
    let (wt, gt) = (graph.tensor(w)?, graph.tensor(g)?);
    let fits = wt.rank() == 2 && gt.shape[..] == wt.shape[1..] && gt.dtype == wt.dtype;
    (fits && is_layout(graph, w)).then_some((w, g))
}

/// Whether a value is read through a recipe.
pub(crate) fn is_layout(graph: &Graph, id: NodeId) -> bool {
    matches!(recipe(graph, id), Ok(Some(_)))
}

/// The recipe of a value whose rows are rows of checkpoint tensors; `None` for other values.
///
/// # Errors
/// The recipe contradicts itself, which would be a bug.
pub(crate) fn recipe(graph: &Graph, id: NodeId) -> Result<Option<PackRecipe>, PackError> {
    let Some(ty) = graph.tensor(id) else {
        return Ok(None);
    };
    let node = graph.node(id);
    let segments = match &node.op {
        Op::Pack(kind) => {
            let parts: Option<Vec<Vec<Segment>>> =
                node.inputs.iter().map(|&i| segments(graph, i)).collect();
            parts.and_then(|p| place(*kind, p))
        }
        _ => segments(graph, id),
    };
    let Some(segments) = segments.filter(|s| !s.is_empty()) else {
        return Ok(None);
    };
    let recipe = PackRecipe {
        rows: segments.iter().map(|s| s.src_rows.len()).sum(),
        cols: segments[0].src_cols.len(),
        dtype: ty.dtype.into(),
        segments,
    };
    recipe.validate()?;
    Ok(Some(recipe))
}

/// A value as rows of one checkpoint tensor.
#[derive(Clone)]
struct View {
    tensor: String,
    transpose: bool,
    /// Extents of the rows' indices.
    shape: Vec<usize>,
    /// The rows of the tensor that they are, in row-major order, as maximal runs: extents may be billions.
    rows: Vec<Range<usize>>,
    /// Columns of the tensor; a vector has one, and no axis for it.
    cols: Range<usize>,
    vector: bool,
}

impl View {
    fn len(&self) -> usize {
        self.rows.iter().map(ExactSizeIterator::len).sum()
    }

    /// The rows at `kept` of every `period` rows; `None` if these are too many pieces.
    fn every(&self, period: usize, kept: Range<usize>) -> Option<Vec<Range<usize>>> {
        if kept == (0..period) {
            return Some(self.rows.clone());
        }
        let len = self.len();
        if kept.is_empty() || len / period > MAX_RUNS {
            return kept.is_empty().then(Vec::new);
        }
        let mut rows: Vec<Range<usize>> = Vec::new();
        let mut runs = self.rows.iter();
        let (mut at, mut run) = (0, runs.next()?);
        for start in (0..len).step_by(period) {
            let mut wanted = start + kept.start..start + kept.end;
            while !wanted.is_empty() {
                while at + run.len() <= wanted.start {
                    at += run.len();
                    run = runs.next()?;
                }
                let first = run.start + (wanted.start - at);
                let n = wanted.len().min(run.end - first);
                match rows.last_mut() {
                    Some(last) if last.end == first => last.end += n,
                    _ => rows.push(first..first + n),
                }
                wanted.start += n;
            }
        }
        Some(rows)
    }
}

/// Reads a chain of changes of layout back to its weight.
fn view(graph: &Graph, id: NodeId) -> Option<View> {
    let node = graph.node(id);
    let extents = |t: &[lathe_ir::Dim]| -> Option<Vec<usize>> {
        t.iter().map(|d| usize::try_from(d.known()?).ok()).collect()
    };
    match &node.op {
        Op::Weight(Weight { weight, .. }) => {
            let extents = weight.shape.iter().map(|&n| usize::try_from(n).ok());
            let shape = extents.collect::<Option<Vec<usize>>>()?;
            let (shape, cols, vector) = match &shape[..] {
                [] => return None,
                &[n] => (vec![n], 1, true),
                [rows @ .., k] => (rows.to_vec(), *k, false),
            };
            Some(View {
                tensor: weight.name.clone(),
                transpose: false,
                rows: std::iter::once(0..product(&shape)?)
                    .filter(|r| !r.is_empty())
                    .collect(),
                shape,
                cols: 0..cols,
                vector,
            })
        }
        Op::Reshape(Reshape(to)) => {
            let mut v = view(graph, node.inputs[X])?;
            let mut to = extents(to)?;
            if !v.vector && to.pop()? != v.cols.len() {
                return None;
            }
            v.shape = to;
            (product(&v.shape)? == v.len()).then_some(v)
        }
        Op::Slice(Slice { axis, start, end }) => {
            let mut v = view(graph, node.inputs[X])?;
            let axis = usize::from(*axis);
            let (start, end) = (usize::try_from(*start).ok()?, usize::try_from(*end).ok()?);
            if axis == v.shape.len() && !v.vector {
                v.cols = v.cols.start + start..v.cols.start + end;
                return Some(v);
            }
            let extent = *v.shape.get(axis)?;
            let inner = product(&v.shape[axis + 1..])?;
            v.rows = v.every(extent * inner, start * inner..end * inner)?;
            v.shape[axis] = end - start;
            Some(v)
        }
        Op::Permute(Permute(p)) if p[..] == [1, 0] => {
            let v = view(graph, node.inputs[X])?;
            let [rows] = &v.rows[..] else { return None };
            let (rows, cols) = (rows.clone(), v.cols);
            (v.shape.len() == 1 && !v.vector).then(|| View {
                tensor: v.tensor,
                transpose: !v.transpose,
                shape: vec![cols.len()],
                rows: vec![cols],
                cols: rows,
                vector: false,
            })
        }
        _ => None,
    }
}

/// The product of extents, if it is no more than memory could hold.
fn product(extents: &[usize]) -> Option<usize> {
    extents.iter().try_fold(1usize, |p, &n| p.checked_mul(n))
}

/// Rows as segments of one checkpoint tensor, one after the other.
fn segments(graph: &Graph, id: NodeId) -> Option<Vec<Segment>> {
    let v = view(graph, id)?;
    if v.rows.len() > MAX_SEGMENTS {
        return None;
    }
    let mut dst_row = 0;
    let place = |rows: Range<usize>| {
        let segment = Segment {
            tensor: v.tensor.clone(),
            src_cols: v.cols.clone(),
            dst_row,
            perm: RowPerm::Identity,
            transpose: v.transpose,
            src_rows: rows,
        };
        dst_row += segment.src_rows.len();
        segment
    };
    Some(v.rows.into_iter().map(place).collect())
}

/// Segments of a pack with their places and permutations; `None` if a permutation would go across
/// the bounds of a segment.
fn place(kind: Pack, parts: Vec<Vec<Segment>>) -> Option<Vec<Segment>> {
    let mut placed = Vec::new();
    let mut row = 0;
    for (i, part) in parts.into_iter().enumerate() {
        let rows: usize = part.iter().map(|s| s.src_rows.len()).sum();
        let rope = |head_dim: u32| RowPerm::RopeHalves {
            head_dim: head_dim as usize,
        };
        let (perm, unit) = match kind {
            Pack::GateUp => (RowPerm::Interleave8 { part: i }, 8),
            Pack::Qkv {
                head_dim,
                interleave: true,
            } if i < 2 => (rope(head_dim), head_dim as usize),
            Pack::Head { head_dim } => (rope(head_dim), head_dim as usize),
            Pack::Qkv { .. } => (RowPerm::Identity, 1),
        };
        let several = part.len() > 1;
        for mut s in part {
            if several && !(s.dst_row.is_multiple_of(unit) && s.src_rows.len().is_multiple_of(unit))
            {
                return None;
            }
            s.dst_row = match kind {
                // Gate and up take turns: their blocks lie twice as far apart.
                Pack::GateUp => 2 * s.dst_row,
                _ => row + s.dst_row,
            };
            s.perm = perm;
            placed.push(s);
        }
        row += rows;
    }
    Some(placed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::ops::{Cast, Input};
    use lathe_ir::{DType, Dim, Prov, WeightRef};

    fn weight(g: &mut Graph, name: &str, shape: &[i64]) -> NodeId {
        let op = Op::Weight(Weight {
            weight: WeightRef {
                name: name.into(),
                shape: shape.to_vec(),
            },
            dtype: DType::BF16,
        });
        g.add(op, [], &Prov::global("w")).unwrap()
    }

    fn dims(shape: &[i64]) -> Vec<Dim> {
        shape.iter().map(|&n| Dim::new(n)).collect()
    }

    /// The rows of a grouped QKV weight `[groups, q + k + v heads, D, K]` (Falcon) as packed q, k, v.
    #[test]
    fn slices_of_groups_become_segments() {
        let mut g = Graph::new("falcon");
        let at = Prov::global("w");
        let w = weight(&mut g, "qkv", &[192, 8]);
        let grouped = g.add(Reshape(dims(&[2, 96, 8])), [w], &at).unwrap();
        let mut part = |start, end, rows| {
            let s = g
                .add(
                    Slice {
                        axis: 1,
                        start,
                        end,
                    },
                    [grouped],
                    &at,
                )
                .unwrap();
            g.add(Reshape(dims(&[rows, 8])), [s], &at).unwrap()
        };
        let parts = [part(0, 64, 128), part(64, 80, 32), part(80, 96, 32)];
        let kind = Pack::Qkv {
            head_dim: 16,
            interleave: true,
        };
        let packed = g.add(kind, parts, &at).unwrap();
        let recipe = recipe(&g, packed).unwrap().unwrap();
        assert_eq!((recipe.rows, recipe.segments.len()), (192, 6));
        // Against the meaning of the operations: source rows of the pack over rows of the slices.
        let source = kind.source_rows(&[128, 32, 32]).unwrap();
        for (row, s) in recipe.row_sources().unwrap().iter().enumerate() {
            let (part, r) = source[row];
            let (len, start) = [(64, 0), (16, 64), (16, 80)][part];
            assert_eq!(s.row as usize, r / len * 96 + start + r % len, "row {row}");
        }
        // Half heads cannot be interleaved segment by segment.
        let kind = Pack::Qkv {
            head_dim: 128,
            interleave: true,
        };
        assert!(
            place(
                kind,
                parts.iter().map(|&p| segments(&g, p).unwrap()).collect()
            )
            .is_none()
        );
    }

    /// Conv1D weights `[K, N]`: a slice of columns, transposed.
    #[test]
    fn transposed_slices_are_columns() {
        let mut g = Graph::new("gpt2");
        let at = Prov::global("w");
        let w = weight(&mut g, "c_attn", &[8, 48]);
        let s = g
            .add(
                Slice {
                    axis: 1,
                    start: 16,
                    end: 32,
                },
                [w],
                &at,
            )
            .unwrap();
        let t = g.add(Permute(vec![1, 0]), [s], &at).unwrap();
        let recipe = recipe(&g, t).unwrap().unwrap();
        let [segment] = &recipe.segments[..] else {
            panic!("{recipe:?}")
        };
        assert!(segment.transpose);
        assert_eq!(
            (segment.src_rows.clone(), segment.src_cols.clone()),
            (16..32, 0..8)
        );
        assert_eq!((recipe.rows, recipe.cols), (16, 8));
    }

    #[test]
    fn arithmetic_is_no_layout() {
        let mut g = Graph::new("gemma");
        let at = Prov::global("w");
        let w = weight(&mut g, "norm", &[8]);
        let f = g.add(Cast(DType::F32), [w], &at).unwrap();
        assert_eq!(recipe(&g, f).unwrap(), None);
        assert!(recipe(&g, w).unwrap().is_some());
        assert_eq!(fixed(&g), [true, true]);
        let x = g.add(
            Input {
                name: "x".into(),
                dtype: DType::F32,
                shape: dims(&[8]),
            },
            [],
            &at,
        );
        let sum = g
            .add(lathe_ir::BinaryFn::Add, [f, x.unwrap()], &at)
            .unwrap();
        assert!(!fixed(&g)[sum.index()]);
    }

    /// A slice of a slice, against its meaning row by row.
    #[test]
    fn slices_keep_the_rows_that_they_name() {
        for (outer, extent, inner) in [(1, 5, 1), (3, 4, 2), (2, 6, 3), (5, 1, 4)] {
            let every_row = 7..7 + outer * extent * inner;
            let whole = View {
                tensor: "w".into(),
                transpose: false,
                shape: vec![outer, extent, inner],
                rows: vec![every_row],
                cols: 0..1,
                vector: false,
            };
            for start in 0..=extent {
                for end in start..=extent {
                    let kept = |row: &usize| (start..end).contains(&((row - 7) / inner % extent));
                    let expected: Vec<usize> = whole.rows[0].clone().filter(kept).collect();
                    let rows = whole
                        .every(extent * inner, start * inner..end * inner)
                        .unwrap();
                    assert!(rows.windows(2).all(|w| w[0].end != w[1].start), "{rows:?}");
                    assert_eq!(rows.iter().cloned().flatten().collect::<Vec<_>>(), expected);
                    // And once more, of what is left of each outer index.
                    let (left, view) = (
                        (end - start) * inner,
                        View {
                            rows,
                            ..whole.clone()
                        },
                    );
                    if left > 1 {
                        let rows = view.every(left, 1..left).unwrap();
                        let expected = expected.chunks(left).flat_map(|c| &c[1..]).copied();
                        assert_eq!(
                            rows.into_iter().flatten().collect::<Vec<_>>(),
                            expected.collect::<Vec<_>>()
                        );
                    }
                }
            }
        }
    }

    /// Recipes are ranges: billions of rows take no time and no memory.
    #[test]
    fn extents_may_be_billions() {
        let mut g = Graph::new("wide");
        let at = Prov::global("w");
        let n = i64::from(i32::MAX) / 16 * 16;
        let [gate, up] = ["gate", "up"].map(|name| weight(&mut g, name, &[n, 8]));
        let packed = g.add(Pack::GateUp, [gate, up], &at).unwrap();
        assert_eq!(recipe(&g, packed).unwrap().unwrap().rows as i64, 2 * n);
        let grouped = g.add(Reshape(dims(&[n / 2, 2, 8])), [gate], &at).unwrap();
        let odd = Op::Slice(Slice {
            axis: 1,
            start: 1,
            end: 2,
        });
        let odd = g.add(odd, [grouped], &at).unwrap();
        assert_eq!(recipe(&g, odd).unwrap(), None, "too many pieces");
    }
}
