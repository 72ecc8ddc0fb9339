//! Device memory in arenas whose sizes were predicted and checked, and pinned host memory.

use std::ffi::c_void;
use std::ptr::NonNull;

use cudarc::driver::result;

use super::driver::{Device, log_drop};
use super::error::{During, gib};
use super::{CudaError, DevicePtr};

/// Alignment of everything in an arena: enough for tensor maps, bulk copies and full memory sectors.
pub const ALIGN: usize = 256;

/// Bytes that are left to the driver beside the arenas: loaded modules, graphs, local memory.
pub const DRIVER_RESERVE: usize = 512 << 20;

/// Rounds up to [`ALIGN`].
pub fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// Checks that all of `wanted` (names and bytes) fit into free memory together, before any of it is allocated.
///
/// # Errors
/// [`CudaError::Memory`]; `hint` says what to lower.
pub fn check_fits(
    device: &Device,
    wanted: &[(String, usize)],
    hint: &str,
) -> Result<(), CudaError> {
    let (free, total) = device.memory()?;
    check_against(wanted, free.saturating_sub(DRIVER_RESERVE), total, hint)
}

pub(super) fn check_against(
    wanted: &[(String, usize)],
    free: usize,
    total: usize,
    hint: &str,
) -> Result<(), CudaError> {
    let sum = wanted
        .iter()
        .try_fold(0usize, |sum, w| sum.checked_add(w.1));
    if sum.is_some_and(|sum| sum <= free) {
        return Ok(());
    }
    Err(CudaError::Memory {
        wanted: wanted.to_vec(),
        free,
        total,
        hint: hint.to_owned(),
    })
}

/// One allocation of device memory from which buffers are cut, never to be returned one by one.
#[derive(Debug)]
pub struct Arena {
    name: String,
    base: DevicePtr,
    capacity: usize,
    used: usize,
    device: Device,
}

impl Arena {
    /// Allocates an arena. Use [`check_fits`] on all arenas first.
    ///
    /// # Errors
    /// [`CudaError::Memory`] if it does not fit, before allocating.
    pub fn new(device: &Device, name: &str, bytes: usize, hint: &str) -> Result<Self, CudaError> {
        let capacity = aligned(bytes.max(1));
        let (free, total) = device.memory()?;
        check_against(&[(name.to_owned(), capacity)], free, total, hint)?;
        // SAFETY: the memory is uninitialised and only reached through raw device pointers.
        let base = unsafe { result::malloc_sync(capacity) }
            .map_err(|e| refused(e, name, capacity, device.memory().ok(), hint))?;
        Ok(Arena {
            name: name.to_owned(),
            base,
            capacity,
            used: 0,
            device: device.clone(),
        })
    }

    /// Cuts off `bytes`, aligned to [`ALIGN`]. The pointer is valid as long as the arena.
    ///
    /// # Errors
    /// The arena is full.
    pub fn alloc(&mut self, bytes: usize) -> Result<DevicePtr, CudaError> {
        let end = aligned(bytes)
            .checked_add(self.used)
            .filter(|&end| end <= self.capacity);
        let Some(end) = end else {
            let (arena, capacity, used) = (self.name.clone(), self.capacity, self.used);
            return Err(CudaError::ArenaFull {
                arena,
                capacity,
                used,
                bytes,
            });
        };
        let ptr = self.base + self.used as DevicePtr;
        self.used = end;
        Ok(ptr)
    }

    /// Its first byte.
    pub fn base(&self) -> DevicePtr {
        self.base
    }

    /// Its bytes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes cut off so far.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Makes all of it free again; pointers cut before must not be used any more.
    pub fn reset(&mut self) {
        self.used = 0;
    }
}

/// The error of an allocation: memory that another process took since it was seen to be free, or that
/// is too fragmented, is reported like memory that was never there.
fn refused(
    source: result::DriverError,
    name: &str,
    bytes: usize,
    memory: Option<(usize, usize)>,
    hint: &str,
) -> CudaError {
    let full = source.0 == cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    match memory.filter(|_| full) {
        Some((free, total)) => CudaError::Memory {
            wanted: vec![(name.to_owned(), bytes)],
            free,
            total,
            hint: hint.to_owned(),
        },
        None => CudaError::Driver {
            what: format!("allocating {} for {name}", gib(bytes)),
            source,
        },
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: allocated in `new`, freed only here. cuMemFree waits for work that uses the memory.
        log_drop("freeing an arena", unsafe { result::free_sync(self.base) });
    }
}

/// Types of which every byte pattern is a value, without padding.
pub trait Plain: Copy + private::Sealed {}

mod private {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($t:ty),*) => { $(impl private::Sealed for $t {} impl Plain for $t {})* };
}
plain!(
    u8,
    i8,
    u16,
    i16,
    u32,
    i32,
    u64,
    i64,
    f32,
    f64,
    half::bf16,
    half::f16
);

/// The bytes of plain values.
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: T has no padding, so all its bytes are initialised; the length is that of the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(values)) }
}

/// The bytes of plain values, to be written.
pub fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`, and every byte pattern is a value of T.
    unsafe {
        std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), std::mem::size_of_val(values))
    }
}

/// Page-locked host memory, cached (not write-combined: tokens are read back through it), zeroed.
#[derive(Debug)]
pub struct Pinned {
    ptr: NonNull<u8>,
    bytes: usize,
    device: Device,
}

// SAFETY: it is plain memory owned by this object.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates `bytes`, aligned to a page.
    ///
    /// # Errors
    /// The host cannot lock that much.
    pub fn new(device: &Device, bytes: usize) -> Result<Self, CudaError> {
        device.bind()?;
        let what = || format!("locking {} of host memory", gib(bytes));
        // SAFETY: the memory is initialised below before anything reads it.
        let ptr = unsafe { result::malloc_host(bytes.max(1), 0) }.during(what)?;
        // SAFETY: the allocation has these bytes. Writing them also takes the page faults here and not later.
        unsafe { std::ptr::write_bytes(ptr.cast::<u8>(), 0, bytes.max(1)) };
        let refused = result::DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(refused).during(what)?;
        Ok(Pinned {
            ptr,
            bytes,
            device: device.clone(),
        })
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised memory owned by `self`. A device that writes into it does so under the contract of
        // `Stream::copy_to_host`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.bytes) }
    }

    /// Its bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.bytes) }
    }

    /// Its values; bytes behind the last whole one are left out.
    pub fn as_slice_of<T: Plain>(&self) -> &[T] {
        // SAFETY: page-aligned, initialised, and every byte pattern is a value of T.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.bytes / size_of::<T>()) }
    }

    /// Its values, to be written.
    pub fn as_mut_slice_of<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.bytes / size_of::<T>())
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: allocated in `new`, freed only here.
        log_drop("unlocking host memory", unsafe {
            result::free_host(self.ptr.as_ptr().cast::<c_void>())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_allocation_says_what_to_lower() {
        use cudarc::driver::sys::CUresult;
        let error = |code| {
            let memory = Some((3 << 30, 80 << 30));
            let source = result::DriverError(code);
            refused(source, "KV cache", 9 << 30, memory, "lower it").to_string()
        };
        assert_eq!(
            error(CUresult::CUDA_ERROR_OUT_OF_MEMORY),
            "GPU memory: 9.00 GiB (KV cache 9.00 GiB) wanted, 3.00 GiB free of 80.00 GiB, 6.00 GiB missing; lower it"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let wanted = [
            ("weights".to_owned(), 15 << 30),
            ("KV cache".to_owned(), 9 << 30),
        ];
        assert!(check_against(&wanted, 24 << 30, 80 << 30, "").is_ok());
        let error =
            check_against(&wanted, 20 << 30, 80 << 30, "lower --max_batch_size").unwrap_err();
        assert_eq!(
            error.to_string(),
            "GPU memory: 24.00 GiB (weights 15.00 GiB + KV cache 9.00 GiB) wanted, 20.00 GiB free of 80.00 GiB, \
             4.00 GiB missing; lower --max_batch_size"
        );
        let huge = [("a".to_owned(), usize::MAX), ("b".to_owned(), 2)];
        assert!(check_against(&huge, usize::MAX, usize::MAX, "").is_err());
    }
}
