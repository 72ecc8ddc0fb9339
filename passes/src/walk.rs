//! What petgraph's walks need of a program: for each value, the values that it is made of.

use fixedbitset::FixedBitSet;
use petgraph::visit::{Control, DfsEvent, GraphBase, IntoNeighbors, Time, Visitable};

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

/// As petgraph's `depth_first_search`, which calls itself for every value on a path and so runs out of stack on a chain
/// of a hundred thousand: a walk from the roots to what they read, operands in order.
///
/// # Errors
/// The visitor's.
pub(crate) fn depth_first<F, I, E>(
    reads: &Reads<F>,
    roots: impl IntoIterator<Item = usize>,
    mut visit: impl FnMut(DfsEvent<usize>) -> Result<Control<()>, E>,
) -> Result<(), E>
where
    F: Fn(usize) -> I,
    I: Iterator<Item = usize>,
{
    let (mut discovered, mut finished) = (reads.visit_map(), reads.visit_map());
    let mut time = 0;
    let mut tick = || {
        time += 1;
        Time(time - 1)
    };
    // The values on the way from a root, each with the operands that are still to be looked at.
    let mut path: Vec<(usize, Option<I>)> = Vec::new();
    let enter = |value: usize, to: Control<()>| match to {
        Control::Prune => (value, None),
        _ => (value, Some(reads.neighbors(value))),
    };
    for root in roots {
        if discovered.put(root) {
            continue;
        }
        path.push(enter(root, visit(DfsEvent::Discover(root, tick()))?));
        while let Some((user, rest)) = path.last_mut() {
            let user = *user;
            let Some(value) = rest.as_mut().and_then(Iterator::next) else {
                path.pop();
                finished.insert(user);
                visit(DfsEvent::Finish(user, tick()))?;
                continue;
            };
            if !discovered.put(value) {
                visit(DfsEvent::TreeEdge(user, value))?;
                path.push(enter(value, visit(DfsEvent::Discover(value, tick()))?));
            } else if finished.contains(value) {
                visit(DfsEvent::CrossForwardEdge(user, value))?;
            } else {
                visit(DfsEvent::BackEdge(user, value))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use petgraph::visit::depth_first_search;
    use proptest::prelude::*;

    proptest! {
        /// On any graph, cyclic ones too, and with any values that are not walked past.
        #[test]
        fn walks_as_petgraph_does(
            operands in proptest::collection::vec(proptest::collection::vec(0_usize..12, 0..4), 12),
            roots in proptest::collection::vec(0_usize..12, 0..4),
            pruned in proptest::collection::vec(any::<bool>(), 12),
        ) {
            let reads = Reads::new(12, |at: usize| operands[at].iter().copied());
            let next = |event: &DfsEvent<usize>| match event {
                DfsEvent::Discover(at, _) if pruned[*at] => Control::<()>::Prune,
                _ => Control::Continue,
            };
            let (mut theirs, mut ours) = (Vec::new(), Vec::new());
            depth_first_search(&reads, roots.iter().copied(), |event| {
                theirs.push(format!("{event:?}"));
                next(&event)
            });
            let walk: Result<(), ()> = depth_first(&reads, roots.iter().copied(), |event| {
                ours.push(format!("{event:?}"));
                Ok(next(&event))
            });
            prop_assert_eq!(walk, Ok(()));
            prop_assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn a_long_chain_takes_no_stack() {
        let reads = Reads::new(1_000_000, |at: usize| at.checked_sub(1).into_iter());
        let mut finished = 0;
        let walk: Result<(), ()> = depth_first(&reads, [999_999], |event| {
            finished += usize::from(matches!(event, DfsEvent::Finish(..)));
            Ok(Control::Continue)
        });
        assert_eq!((walk, finished), (Ok(()), 1_000_000));
    }
}
