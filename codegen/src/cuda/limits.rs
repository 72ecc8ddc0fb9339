//! What the kernels here are written for.

use lathe_ir::KernelLimits;

pub(super) const LIMITS: KernelLimits = KernelLimits::HOPPER;
