//! What a compilation is asked for.

use super::CompileError;
use crate::chains;
use crate::egraph::cost::{CostPoint, DeviceModel};
use crate::rule::{Rule, Stage};
use crate::rules;
use lathe_ir::Both;
use std::collections::BTreeSet;

/// What to run and for which sizes.
#[derive(Clone, Debug)]
pub struct PassConfig {
    /// Names of rules and stages that are switched off.
    pub disabled: BTreeSet<String>,
    /// Optimise the whole model as one region instead of one template a kind of layer.
    pub no_roll: bool,
    /// Where each step program is chosen.
    pub points: Both<CostPoint>,
    /// Rules that run in the place of those of their names: wrong ones, for tests of what finds them.
    pub instead: Vec<&'static Rule>,
}

impl PassConfig {
    /// Everything on, for one device: decode at batch 1 and a general step of 2,048 tokens.
    pub fn new(device: DeviceModel) -> PassConfig {
        PassConfig {
            disabled: BTreeSet::new(),
            no_roll: false,
            points: Both {
                decode: CostPoint::decode(1, 512, device.clone()),
                general: CostPoint::prefill(2048, device),
            },
            instead: Vec::new(),
        }
    }

    /// Switches rules or stages off by name.
    ///
    /// # Errors
    /// A name is neither a rule nor a stage.
    pub fn disable(mut self, names: &[&str]) -> Result<PassConfig, CompileError> {
        for n in names {
            let known = rules::by_name(n).is_some()
                || Stage::ALL.iter().any(|s| s.name() == *n)
                || *n == chains::NAME;
            if !known {
                return Err(CompileError::UnknownRule((*n).to_string()));
            }
            self.disabled.insert((*n).to_string());
        }
        Ok(self)
    }

    /// Whether pointwise operations are grouped into chains: not without the stage `fuse`.
    pub fn makes_chains(&self) -> bool {
        !self.disabled.contains(chains::NAME) && !self.disabled.contains(Stage::Fuse.name())
    }

    /// The rules of a stage that are on.
    pub(super) fn rules_of(&self, stage: Stage) -> Vec<&'static Rule> {
        let is_on = |r: &&Rule| {
            r.stage == stage
                && !self.disabled.contains(r.name)
                && !self.disabled.contains(stage.name())
        };
        let place =
            |r: &'static Rule| *self.instead.iter().find(|i| i.name == r.name).unwrap_or(&r);
        rules::all().into_iter().filter(is_on).map(place).collect()
    }
}
