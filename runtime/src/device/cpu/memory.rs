//! The activations of a program: one arena, with an offset for each slot; and the size of the cache.

use lathe_codegen::{Plan, Program};
use lathe_ir::SymEnv;

/// A cache line.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code)] [u8; 64]);

/// Memory aligned to cache lines.
pub(super) struct Arena {
    lines: Vec<Line>,
}

impl Arena {
    /// Zeroed memory of at least `bytes` bytes.
    pub(super) fn new(bytes: usize) -> Arena {
        Arena {
            lines: vec![Line([0; 64]); bytes.div_ceil(64)],
        }
    }

    /// The first byte.
    pub(super) fn base(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }
}

/// Offsets of a program's slots at its largest sizes.
pub(super) struct Layout {
    pub(super) offsets: Vec<usize>,
    pub(super) bytes: usize,
}

impl Layout {
    pub(super) fn new(program: &Program, env: &SymEnv) -> Layout {
        let mut offsets = Vec::with_capacity(program.slots.len());
        let mut bytes = 0;
        for slot in &program.slots {
            offsets.push(bytes);
            bytes += slot.bytes(env).next_multiple_of(64);
        }
        Layout { offsets, bytes }
    }
}

/// Features of a head in memory: the kernels take heads in blocks of 16, so that others are filled up
/// with zeros.
pub(super) fn padded_head(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Bytes of one token in all caches of a plan, as this device stores them.
pub fn token_bytes(plan: &Plan) -> usize {
    let cache = |c: &lathe_codegen::plan::CacheSpec| {
        2 * c.kv_heads as usize * padded_head(c.head_dim as usize) * c.dtype.size()
    };
    plan.caches.iter().map(cache).sum()
}
