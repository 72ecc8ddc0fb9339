//! Ctrl-C and termination (as batch systems and `timeout` ask for it) as a flag, so that a long run can end with
//! what it has.

use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on the first SIGINT (Ctrl-C) or SIGTERM sets the returned flag; a second one ends the process
/// as usual. On systems without signals the flag is never set.
pub fn interrupt_flag() -> &'static AtomicBool {
    #[cfg(unix)]
    unix::install();
    &INTERRUPTED
}

/// Whether the end was asked for since [`interrupt_flag`] was called first.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

#[cfg(unix)]
mod unix {
    use super::{INTERRUPTED, Ordering};

    const SIGINT: i32 = 2;
    const SIGTERM: i32 = 15;
    const SIG_DFL: usize = 0;

    unsafe extern "C" {
        fn signal(signum: i32, handler: usize) -> usize;
    }

    extern "C" fn handle(_signum: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
        for signum in [SIGINT, SIGTERM] {
            // SAFETY: signal is async-signal-safe (POSIX) and SIG_DFL a valid disposition.
            unsafe { signal(signum, SIG_DFL) };
        }
    }

    pub(super) fn install() {
        for signum in [SIGINT, SIGTERM] {
            // SAFETY: the handler has the signature that C expects and only stores to an atomic and
            // calls signal, both of which are async-signal-safe.
            unsafe { signal(signum, handle as extern "C" fn(i32) as usize) };
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    unsafe extern "C" {
        fn raise(signum: i32) -> i32;
    }

    #[test]
    fn the_first_interrupt_sets_the_flag() {
        for signum in [2, 15] {
            let flag = interrupt_flag();
            assert!(!flag.load(Ordering::Relaxed) && !is_interrupted());
            // SAFETY: raise has no preconditions; the signal has a handler since the call above.
            unsafe { raise(signum) };
            assert!(flag.load(Ordering::Relaxed) && is_interrupted());
            INTERRUPTED.store(false, Ordering::Relaxed);
        }
    }
}
