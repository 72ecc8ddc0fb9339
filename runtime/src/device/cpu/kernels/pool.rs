//! The kernels' thread pool: a parallel loop whose start and end cost about a microsecond.
//!
//! A decode step makes some 200 calls of tens of microseconds each, so waking sleeping workers for each call
//! (what a work-stealing pool does when its queues run dry) would be a visible share of a token. Here a worker
//! spins for a short time after its last loop before it parks; an idle process uses no CPU.
//!
//! One loop runs at a time. A loop started while another one runs (from another thread or from inside a loop)
//! runs on its own thread alone, so there is no deadlock and no oversubscription.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};

/// Polls of the state word before a worker parks: about 50 microseconds.
const SPINS: usize = 1500;
/// `state`: bit 0 = a loop is open for workers, bits 1..16 = workers inside it, the rest = the loop's number.
const OPEN: u64 = 1;
const ONE_INSIDE: u64 = 2;
const INSIDE_MASK: u64 = 0xfffe;
const EPOCH: u64 = 1 << 16;

/// A borrowed loop body with its lifetime erased; valid while its loop is open or a worker is inside it.
#[derive(Clone, Copy)]
struct Body(*const (dyn Fn(usize) + Sync));
// SAFETY: the pointee is Sync and `run` keeps it alive until no worker is inside the loop.
unsafe impl Send for Body {}

struct Shared {
    state: AtomicU64,
    body: Mutex<Option<Body>>,
    len: AtomicUsize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

struct Worker {
    thread: Thread,
    parked: Arc<AtomicBool>,
}

struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    gate: Mutex<()>,
}

static POOL: OnceLock<Pool> = OnceLock::new();

/// Threads a loop runs on, the calling one included.
pub fn threads() -> usize {
    pool().workers.len() + 1
}

/// Sets the number of threads to `n` (at least 1). Returns false if the pool had already started.
pub fn set_threads(n: usize) -> bool {
    let mut started = false;
    POOL.get_or_init(|| {
        started = true;
        Pool::new(n.max(1))
    });
    started
}

/// Calls `body(i)` once for every `i < len`, in any order and from several threads, and returns when all are done.
///
/// A panic of `body` reaches the caller after the loop has ended.
pub fn parallel_for(len: usize, body: impl Fn(usize) + Sync) {
    if len == 0 {
        return;
    }
    let pool = pool();
    if len == 1 || pool.workers.is_empty() {
        (0..len).for_each(body);
        return;
    }
    match pool.gate.try_lock() {
        Ok(_gate) => pool.run(len, &body),
        Err(_) => (0..len).for_each(body),
    }
}

fn pool() -> &'static Pool {
    POOL.get_or_init(|| Pool::new(thread::available_parallelism().map_or(1, usize::from)))
}

impl Pool {
    fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            body: Mutex::new(None),
            len: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
        });
        let workers = (1..threads.min(1 << 14))
            .map_while(|i| {
                let parked = Arc::new(AtomicBool::new(false));
                let (shared, flag) = (Arc::clone(&shared), Arc::clone(&parked));
                // A thread that cannot be started only makes the pool smaller.
                let handle = thread::Builder::new()
                    .name(format!("lathe-cpu-{i}"))
                    .spawn(move || work(&shared, &flag))
                    .ok()?;
                Some(Worker {
                    thread: handle.thread().clone(),
                    parked,
                })
            })
            .collect();
        Pool {
            shared,
            workers,
            gate: Mutex::new(()),
        }
    }

    fn run(&self, len: usize, body: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; this function returns after the last worker has left the loop.
        let erased = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize) + Sync + '_),
                *const (dyn Fn(usize) + Sync + 'static),
            >(body)
        };
        *shared.body.lock().unwrap_or_else(|e| e.into_inner()) = Some(Body(erased));
        shared.len.store(len, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        let closed = shared.state.load(Ordering::Relaxed) & !(INSIDE_MASK | OPEN);
        shared
            .state
            .store((closed + EPOCH) | OPEN, Ordering::Release);
        // Orders the opening before the reads of `parked`; pairs with the fence of a worker about to park.
        fence(Ordering::SeqCst);
        for worker in &self.workers {
            if worker.parked.load(Ordering::Relaxed) && worker.parked.swap(false, Ordering::AcqRel)
            {
                worker.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| drain(shared, len, body)));
        if own.is_err() {
            shared.next.store(len, Ordering::Relaxed);
        }
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut polls = 0usize;
        while shared.state.load(Ordering::Acquire) & INSIDE_MASK != 0 {
            polls += 1;
            if polls < SPINS {
                std::hint::spin_loop()
            } else {
                thread::yield_now()
            }
        }
        let worker_panicked = shared.panicked.swap(false, Ordering::Relaxed);
        match own {
            Err(panic) => resume_unwind(panic),
            Ok(()) => assert!(
                !worker_panicked,
                "invariant parallel-body: a kernel panicked on a worker thread"
            ),
        }
    }
}

fn drain(shared: &Shared, len: usize, body: &(dyn Fn(usize) + Sync)) {
    loop {
        let i = shared.next.fetch_add(1, Ordering::Relaxed);
        if i >= len {
            return;
        }
        body(i);
    }
}

fn work(shared: &Shared, parked: &AtomicBool) {
    let mut last = 0;
    let mut polls = 0;
    loop {
        let state = shared.state.load(Ordering::Acquire);
        let epoch = state & !(INSIDE_MASK | OPEN);
        if state & OPEN == 0 || epoch == last {
            polls += 1;
            if polls < SPINS {
                std::hint::spin_loop();
                continue;
            }
            parked.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let state = shared.state.load(Ordering::Relaxed);
            if state & OPEN == 0 || state & !(INSIDE_MASK | OPEN) == last {
                thread::park();
            }
            parked.store(false, Ordering::Relaxed);
            polls = 0;
            continue;
        }
        let joined = state + ONE_INSIDE;
        if shared
            .state
            .compare_exchange(state, joined, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            continue;
        }
        last = epoch;
        polls = 0;
        let body = *shared.body.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(body) = body {
            let len = shared.len.load(Ordering::Relaxed);
            // SAFETY: this worker is inside the loop, and `run` waits for it before the body's borrow ends.
            let body = unsafe { &*body.0 };
            if catch_unwind(AssertUnwindSafe(|| drain(shared, len, body))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
                shared.next.store(len, Ordering::Relaxed);
            }
        }
        shared.state.fetch_sub(ONE_INSIDE, Ordering::Release);
    }
}

/// A base pointer that the bodies of one loop share; each writes a part of the buffer that no other touches.
pub(crate) struct SharedMut<T>(*mut T);
// SAFETY: users write disjoint parts, each stated where it is used.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> SharedMut<T> {
        SharedMut(slice.as_mut_ptr())
    }

    /// Pointer to element `i`, which the caller keeps inside the slice.
    #[inline(always)]
    pub(crate) fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}
