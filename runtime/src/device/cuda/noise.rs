//! Random numbers for what is only timed: zeros would draw less power and run faster.

use super::driver::Stream;
use super::{CudaError, DevicePtr};
use half::bf16;

/// `count` bf16 values between -1 and 1, the same in each run.
pub(super) fn noise(count: usize) -> Vec<u8> {
    // A linear congruential generator: the numbers need only look random to the wires.
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..count).flat_map(|_| random().to_le_bytes()).collect()
}

/// Fills `bytes` bytes at `dst` with `pattern`, over and over.
///
/// # Safety
/// The range is memory on the device that nothing else uses.
///
/// # Errors
/// The device fails.
pub(super) unsafe fn fill_repeated(
    stream: &Stream,
    dst: DevicePtr,
    bytes: usize,
    pattern: &[u8],
) -> Result<(), CudaError> {
    let mut done = pattern.len().min(bytes);
    // SAFETY: within the range; source and destination of each copy are apart; the wait keeps the
    // pattern alive long enough.
    unsafe {
        stream.copy_to_device(dst, &pattern[..done])?;
        while done > 0 && done < bytes {
            let more = done.min(bytes - done);
            stream.copy_on_device(dst + done as DevicePtr, dst, more)?;
            done += more;
        }
    }
    stream.synchronize()
}
