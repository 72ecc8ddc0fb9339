//! How far long work is: the runtime tells, a program may watch. Nothing here knows of terminals.

use std::sync::OnceLock;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Kernels, candidates and the like.
    Items,
}

/// Who is told. Called from any thread, often: it must be quick.
pub trait Observer: Send + Sync {
    /// Of a task, named as people read it, `done` of `total` units are done. The same task may start
    /// again.
    fn advance(&self, task: &'static str, unit: Unit, done: u64, total: u64);
}

static OBSERVER: OnceLock<Box<dyn Observer>> = OnceLock::new();

/// Names the observer of this process, once; later ones are not taken. Returns whether this one was.
pub fn observe(observer: Box<dyn Observer>) -> bool {
    OBSERVER.set(observer).is_ok()
}

/// Tells the observer, if there is one.
pub fn advance(task: &'static str, unit: Unit, done: u64, total: u64) {
    if let Some(observer) = OBSERVER.get() {
        observer.advance(task, unit, done, total);
    }
}
