//! The memory that one rendering of a chat template may take: bytes are charged before they are made.

use std::cell::Cell;
use std::fmt::{self, Write};

use minijinja::value::Value;
use minijinja::{Error, ErrorKind};

/// Bytes of all texts and lists that a rendering makes, dropped ones included. Real templates make some times their
/// messages.
const BYTES: u64 = 256 << 20;
/// Bytes of an item of a list.
const ITEM: u64 = 32;

thread_local! {
    /// What the rendering in this thread may still make.
    static LEFT: Cell<u64> = const { Cell::new(0) };
}

/// A rendering starts in this thread.
pub(super) fn start() {
    LEFT.set(BYTES);
}

/// Takes bytes off the budget.
///
/// # Errors
/// There are not so many left.
pub(super) fn charge(bytes: u64) -> Result<(), Error> {
    match LEFT.get().checked_sub(bytes) {
        Some(left) => LEFT.set(left),
        None => return Err(spent()),
    }
    Ok(())
}

/// Takes so many items of lists off the budget.
pub(super) fn charge_items(items: u64) -> Result<(), Error> {
    charge(items.saturating_mul(ITEM))
}

/// Bytes of a value as text.
///
/// # Errors
/// They are more than what is left.
pub(super) fn weigh(value: &Value) -> Result<u64, Error> {
    match value.as_str() {
        Some(text) => Ok(text.len() as u64),
        None => {
            let mut left = Left(LEFT.get());
            write!(left, "{value}").map_err(|_| spent())?;
            Ok(LEFT.get() - left.0)
        }
    }
}

/// Items of a list or map, bytes of a text.
pub(super) fn length(value: &Value) -> u64 {
    let text = value.as_str().map(str::len);
    text.or_else(|| value.len()).unwrap_or(1) as u64
}

fn spent() -> Error {
    let reason = format!("stopped, it makes more than {BYTES} bytes");
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Counts down and keeps nothing.
struct Left(u64);

impl Write for Left {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 = self.0.checked_sub(text.len() as u64).ok_or(fmt::Error)?;
        Ok(())
    }
}
