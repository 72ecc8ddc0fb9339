//! A table of kernels that were chosen by timing. Nothing here measures.

use super::key::GemmKey;
use super::variant::Variant;
use std::collections::BTreeMap;

/// Variants that were chosen by timing; GEMMs without an entry are left to the heuristics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices(BTreeMap<GemmKey, Variant>);

impl Choices {
    /// Enters a choice.
    pub fn insert(&mut self, key: GemmKey, variant: Variant) {
        self.0.insert(key, variant);
    }

    /// The choice for a GEMM.
    pub fn get(&self, key: &GemmKey) -> Option<Variant> {
        self.0.get(key).copied()
    }

    /// All choices, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&GemmKey, &Variant)> {
        self.0.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
