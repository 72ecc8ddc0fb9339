//! What petgraph's walks need of a program: for each value, the values that it is made of.

use fixedbitset::FixedBitSet;
use petgraph::visit::{GraphBase, IntoNeighbors, Visitable};

/// Values numbered from 0, with an edge from each to what it reads. Walks follow the order of the
/// operands, so that what they find is deterministic.
pub(crate) struct Reads<F> {
    values: usize,
    operands: F,
}

impl<F> Reads<F> {
    /// The graph of `values` values that read what `operands` says.
    pub(crate) fn new<I>(values: usize, operands: F) -> Reads<F>
    where
        F: Fn(usize) -> I,
        I: Iterator<Item = usize>,
    {
        Reads { values, operands }
    }
}

impl<F> GraphBase for Reads<F> {
    type NodeId = usize;
    type EdgeId = (usize, usize);
}

impl<F, I> IntoNeighbors for &Reads<F>
where
    F: Fn(usize) -> I,
    I: Iterator<Item = usize>,
{
    type Neighbors = I;

    fn neighbors(self, value: usize) -> I {
        (self.operands)(value)
    }
}

impl<F> Visitable for Reads<F> {
    type Map = FixedBitSet;

    fn visit_map(&self) -> FixedBitSet {
        FixedBitSet::with_capacity(self.values)
    }

    fn reset_map(&self, map: &mut FixedBitSet) {
        map.clear();
        map.grow(self.values);
    }
}
