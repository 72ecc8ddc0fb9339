//! Calls into libraries that read a checkpoint's text files and may panic where those are not what they expect: the
//! panic becomes an error of one line.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, which leaves nothing half-changed behind when it unwinds.
///
/// # Errors
/// It panicked: the message, which is then not printed.
pub(super) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                others(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    outcome.map_err(|panic| format!("the library failed: {}", one_line(&message(&*panic))))
}

/// [`guarded`] in a thread with a stack that the deepest of real templates fits into many times, which the main thread's
/// may not be.
///
/// # Errors
/// As [`guarded`]; there is no such thread.
pub(super) fn guarded_apart<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    const STACK: usize = 32 << 20;
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().stack_size(STACK);
        let thread = builder
            .spawn_scoped(scope, || guarded(work))
            .map_err(|error| format!("no thread to read it in: {error}"))?;
        thread
            .join()
            .unwrap_or_else(|panic| Err(one_line(&message(&*panic))))
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "for no given reason".into())
}

/// Text on one line, as a message shows it: blanks and line ends become one blank, other control characters go.
pub(super) fn one_line(text: &str) -> String {
    let words: Vec<&str> = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_line() {
        assert_eq!(guarded(|| 3), Ok(3));
        assert_eq!(guarded_apart(|| 3), Ok(3));
        let failed = guarded(|| guarded(|| panic!("no\nsuch {}", "thing")));
        assert_eq!(failed, Ok(Err("the library failed: no such thing".into())));
        assert!(guarded(|| [1]["ab".len()]).is_err());
    }
}
