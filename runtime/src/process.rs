//! What the process got from whoever started it, standard streams and limits, and the limits that it sets itself.

#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(target_os = "linux")]
static WITHOUT_STDOUT: AtomicBool = AtomicBool::new(false);

/// Whether the process was started without a standard output (`lathe ... >&-`). The standard library has opened
/// /dev/null in its place, where writing succeeds, so it is looked at before that. Known on Linux only.
pub fn started_without_stdout() -> bool {
    #[cfg(target_os = "linux")]
    return WITHOUT_STDOUT.load(Ordering::Relaxed);
    #[cfg(not(target_os = "linux"))]
    return false;
}

#[cfg(target_os = "linux")]
extern "C" fn look_at_stdout() {
    // SAFETY: fcntl with F_GETFD only asks; on a descriptor that is not open it fails.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    WITHOUT_STDOUT.store(flags == -1, Ordering::Relaxed);
}

// SAFETY: the loader calls the functions of this section, which take any arguments, before `main`; this one needs
// nothing of the standard library that has to be set up first.
#[cfg(target_os = "linux")]
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_AT_STDOUT: extern "C" fn() = look_at_stdout;

/// From now on a file that grows beyond the limit of the process (`ulimit -f`) is an error of writing rather than the
/// end of the process, so that nothing half-written is left behind.
pub fn fail_large_writes() {
    #[cfg(unix)]
    // SAFETY: ignoring a signal installs no code and has no preconditions.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// What a process may take from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Seconds on a CPU; it is ended then.
    pub cpu_seconds: u64,
    /// Bytes of address space; allocations beyond fail.
    pub address_space: u64,
}

impl Limits {
    /// Sets the limits of this process, where they are below those that it has. It writes no core file and no file at
    /// all. Where the system has no such limits nothing happens.
    ///
    /// # Errors
    /// The system refuses.
    pub fn set(self) -> std::io::Result<()> {
        #[cfg(unix)]
        {
            lower(libc::RLIMIT_CPU, self.cpu_seconds)?;
            lower(libc::RLIMIT_AS, self.address_space)?;
            lower(libc::RLIMIT_CORE, 0)?;
            lower(libc::RLIMIT_FSIZE, 0)?;
        }
        Ok(())
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
type Resource = libc::__rlimit_resource_t;
#[cfg(all(unix, not(all(target_os = "linux", target_env = "gnu"))))]
type Resource = libc::c_int;

/// Sets both bounds of a limit to `most`, or leaves them where they are lower.
#[cfg(unix)]
fn lower(resource: Resource, most: u64) -> std::io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the answer.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    limit.rlim_max = limit.rlim_max.min(most);
    limit.rlim_cur = limit.rlim_cur.min(most);
    // SAFETY: `limit` is a valid limit, and the pointer is only read.
    if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
