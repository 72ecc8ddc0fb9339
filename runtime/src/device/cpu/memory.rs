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

/// A value of /proc/meminfo in bytes; nothing where the system does not say.
pub(super) fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib = line.trim_start_matches(':').trim().trim_end_matches("kB");
    Some(kib.trim().parse::<u64>().ok()? * 1024)
}

/// Features of a head in memory: the kernels take heads in blocks of 16, so that others are filled up
/// with zeros.
pub(crate) fn padded_head(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Bytes of one token in all caches of a plan, as this device stores them.
pub(super) fn token_bytes(plan: &Plan) -> usize {
    let cache = |c: &lathe_codegen::plan::CacheSpec| {
        2 * c.kv_heads as usize * padded_head(c.head_dim as usize) * c.dtype.size()
    };
    plan.caches.iter().map(cache).sum()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_system_says_what_it_has() {
        assert!(meminfo("MemTotal").is_some_and(|total| total > 1 << 27));
        assert_eq!(meminfo("NoSuchKey"), None);
    }
}
