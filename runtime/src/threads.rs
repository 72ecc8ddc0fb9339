//! Threads, on machines and under limits that give fewer than wanted: what is left is slower, not broken.

use std::panic::resume_unwind;
use std::sync::mpsc::channel;
use std::thread::{Builder, available_parallelism, scope};

/// Starts the threads that loading shares its work out to, fewer where there are not so many. To be called once, before
/// anything is loaded.
///
/// # Errors
/// Not even one can be started.
pub fn start() -> Result<(), String> {
    // A pool that could not be started cannot be started again with fewer threads, so they are there before it is.
    let mut failure = None;
    let mut waiting = Vec::new();
    for i in 0..available_parallelism().map_or(1, usize::from) {
        let (sender, receiver) = channel::<rayon::ThreadBuilder>();
        let work = move || {
            if let Ok(thread) = receiver.recv() {
                thread.run();
            }
        };
        match Builder::new().name(format!("lathe-{i}")).spawn(work) {
            Ok(_) => waiting.push(sender),
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if let (Some(error), true) = (failure, waiting.is_empty()) {
        return Err(format!(
            "no thread can be started: {error}; see `ulimit -u` and `ulimit -v`"
        ));
    }
    // An error means that there is a pool already; the threads end then, for want of a sender.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(waiting.len())
        .spawn_handler(|thread| {
            let waiting = waiting.get(thread.index());
            waiting.map_or(Ok(()), |sender| {
                let taken = sender.send(thread);
                taken.map_err(|_| std::io::Error::other("its thread has ended"))
            })
        })
        .build_global();
    Ok(())
}

/// Runs `work` on `n` threads, this one among them, or on as many of them as there are. Returns what each has made.
pub(crate) fn on_several<T: Send>(n: usize, work: impl Fn() -> T + Sync) -> Vec<T> {
    scope(|scope| {
        let others: Vec<_> = (1..n)
            .map_while(|_| Builder::new().spawn_scoped(scope, &work).ok())
            .collect();
        let mut made = vec![work()];
        let join = |thread: std::thread::ScopedJoinHandle<'_, T>| {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        made.extend(others.into_iter().map(join));
        made
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_works() {
        assert_eq!(start(), Ok(()));
        assert_eq!(start(), Ok(()), "a second call changes nothing");
        assert_eq!(on_several(3, || 7), [7, 7, 7]);
        assert_eq!(on_several(0, || 7), [7]);
    }
}
