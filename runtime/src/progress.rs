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

    /// A task is over, whether or not all units were done.
    fn end(&self, task: &'static str);
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

/// A task whose parts one thread counts: it is over, for the observer too, when this is dropped.
#[derive(Debug)]
pub struct Counted {
    task: &'static str,
    total: u64,
    done: u64,
}

impl Counted {
    /// Begins a task of `total` items.
    pub fn begin(task: &'static str, total: usize) -> Counted {
        advance(task, Unit::Items, 0, total as u64);
        Counted {
            task,
            total: total as u64,
            done: 0,
        }
    }

    /// One more item is done.
    pub fn step(&mut self) {
        self.done = self.total.min(self.done + 1);
        // The last one is told by the end.
        if self.done < self.total {
            advance(self.task, Unit::Items, self.done, self.total);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(observer) = OBSERVER.get() {
            observer.end(self.task);
        }
    }
}
