//! The memory of a step in the self-test: every buffer between guards, all of it known before and
//! compared after.

use crate::device::cuda::driver::{Device, Stream};
use crate::device::cuda::memory::{Arena, aligned};
use crate::device::cuda::state::MetaLayout;
use crate::device::cuda::{CudaError, DevicePtr};
use crate::device::step::StepBatch;
use crate::selftest::compare::{Tolerance, compare};
use crate::selftest::{Outcome, POISON, gather, spread};
use lathe_codegen::Program;
use lathe_codegen::cuda::Workspace;
use lathe_ir::{DType, SymEnv};
use std::collections::BTreeMap;

/// Poisoned bytes before and after each buffer.
const GUARD: usize = 1024;

/// A result of a step and what it should be.
pub(super) struct Output {
    /// Where it starts in the image.
    pub(super) offset: usize,
    /// Extents of the batch's part.
    pub(super) part: Vec<usize>,
    /// Extents in memory.
    pub(super) whole: Vec<usize>,
    pub(super) dtype: DType,
    pub(super) want: Vec<f64>,
    pub(super) tolerance: Tolerance,
}

impl Output {
    fn bytes(&self) -> usize {
        self.whole.iter().product::<usize>() * self.dtype.size()
    }

    /// The batch's part of what memory holds.
    pub(super) fn found(&self, memory: &[u8]) -> Vec<u8> {
        let here = &memory[self.offset..][..self.bytes()];
        gather(here, &self.whole, &self.part, self.dtype.size())
    }

    pub(super) fn judge(&self, memory: &[u8]) -> Outcome {
        let row = self.part.last().copied().unwrap_or(1);
        compare(
            &self.want,
            &self.found(memory),
            self.dtype,
            row,
            self.tolerance,
        )
    }
}

/// Slots, sampled tokens and the step's metadata in one allocation, with its image on the host.
pub(super) struct Image {
    arena: Arena,
    host: Vec<u8>,
    /// Offsets of the slots.
    slots: Vec<usize>,
    sampled: usize,
    meta_at: usize,
    meta: MetaLayout,
    names: Vec<(usize, String)>,
}

impl Image {
    pub(super) fn new(
        device: &Device,
        program: &Program,
        bucket: &SymEnv,
        meta: &MetaLayout,
        batch: &StepBatch,
    ) -> Result<Image, CudaError> {
        let mut end = GUARD;
        let mut names = Vec::new();
        let mut cut = |bytes: usize, name: String| {
            let at = end;
            end += aligned(bytes) + GUARD;
            names.push((at, name));
            at
        };
        let slots = program
            .slots
            .iter()
            .enumerate()
            .map(|(i, s)| cut(s.bytes(bucket), format!("slot {i}")))
            .collect();
        let rows = bucket.get(lathe_ir::Sym::R) as usize;
        let sampled = cut(4 * rows, "the sampled tokens".into());
        let meta_at = cut(meta.bytes(), "the step's metadata".into());
        let mut image = Image {
            arena: Arena::new(device, "the self-test", end, "use another GPU")?,
            host: vec![0; end],
            slots,
            sampled,
            meta_at,
            meta: meta.clone(),
            names,
        };
        image.poison(batch);
        Ok(image)
    }

    pub(super) fn slot(&self, i: usize) -> DevicePtr {
        self.arena.base() + self.slots[i] as DevicePtr
    }

    pub(super) fn slot_offset(&self, i: usize) -> usize {
        self.slots[i]
    }

    pub(super) fn sampled(&self) -> DevicePtr {
        self.arena.base() + self.sampled as DevicePtr
    }

    pub(super) fn sampled_offset(&self) -> usize {
        self.sampled
    }

    pub(super) fn meta(&self) -> DevicePtr {
        self.arena.base() + self.meta_at as DevicePtr
    }

    /// Poison everywhere but in the metadata.
    pub(super) fn poison(&mut self, batch: &StepBatch) {
        for word in self.host.as_chunks_mut::<4>().0 {
            *word = POISON.to_le_bytes();
        }
        let bytes = self.meta.bytes();
        self.meta
            .write(batch, &mut self.host[self.meta_at..][..bytes]);
    }

    /// Puts an operand into its slot. Rows of padding stay poisoned if they are floats; integers are
    /// zeros, as kernels may use them as indices.
    pub(super) fn put(
        &mut self,
        slot: usize,
        bytes: &[u8],
        part: &[usize],
        whole: &[usize],
        dtype: DType,
    ) {
        let size = dtype.size();
        let n = whole.iter().product::<usize>() * size;
        let to = &mut self.host[self.slots[slot]..][..n];
        if !dtype.is_float() {
            to.fill(0);
        }
        spread(bytes, part, to, whole, size);
    }

    pub(super) fn upload(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: the arena has the image's size; the wait ends the copy.
        unsafe { stream.copy_to_device(self.arena.base(), &self.host)? };
        stream.synchronize()
    }

    pub(super) fn download(&self, stream: &Stream) -> Result<Vec<u8>, CudaError> {
        let mut out = vec![0; self.host.len()];
        // SAFETY: as above.
        unsafe { stream.copy_to_host(&mut out, self.arena.base())? };
        stream.synchronize()?;
        Ok(out)
    }

    /// A byte that changed outside the outputs, described.
    pub(super) fn stray(&self, outputs: &[Output], memory: &[u8]) -> Option<String> {
        let mut ranges: Vec<_> = outputs
            .iter()
            .map(|o| o.offset..o.offset + o.bytes())
            .collect();
        ranges.sort_by_key(|r| r.start);
        ranges.push(self.host.len()..self.host.len());
        let mut from = 0;
        for r in ranges {
            let (before, after) = (&self.host[from..r.start], &memory[from..r.start]);
            if before != after {
                let i = before.iter().zip(after).position(|(a, b)| a != b);
                return Some(self.describe(from + i.unwrap_or(0)));
            }
            from = r.end;
        }
        None
    }

    fn describe(&self, at: usize) -> String {
        let owner = self.names.iter().rev().find(|(start, _)| *start <= at);
        match owner {
            Some((start, name)) => format!(
                "wrote outside its results: byte {} after the start of {name}",
                at - start
            ),
            None => "wrote outside its results: before the first slot".to_owned(),
        }
    }
}

/// Workspaces of a program, each between guards.
pub(super) struct Work {
    arena: Arena,
    spaces: Vec<(usize, Workspace)>,
}

impl Work {
    pub(super) fn new(stream: &Stream, workspaces: &[Workspace]) -> Result<Work, CudaError> {
        let mut end = GUARD;
        let spaces = workspaces
            .iter()
            .map(|w| {
                let at = end;
                end += aligned(w.bytes) + GUARD;
                (at, w.clone())
            })
            .collect();
        let arena = Arena::new(stream.device(), "the self-test", end, "use another GPU")?;
        let work = Work { arena, spaces };
        // SAFETY: the ranges lie in the arena, which nothing uses yet.
        unsafe {
            stream.fill_u32(work.arena.base(), POISON, work.arena.capacity() / 4)?;
            for (at, w) in &work.spaces {
                if let Some(word) = w.fill {
                    let place = work.arena.base() + *at as DevicePtr;
                    stream.fill_u32(place, word, w.bytes.div_ceil(4))?;
                }
            }
        }
        Ok(work)
    }

    pub(super) fn addresses(&self) -> BTreeMap<String, DevicePtr> {
        let at =
            |(at, w): &(usize, Workspace)| (w.name.clone(), self.arena.base() + *at as DevicePtr);
        self.spaces.iter().map(at).collect()
    }

    /// What some of the workspaces hold that are not filled once: sums may lie there that a step adds to, so
    /// that it can run twice only with [`Self::restore`] between.
    pub(super) fn carried(
        &self,
        stream: &Stream,
        used: &[usize],
    ) -> Result<Vec<(usize, Vec<u8>)>, CudaError> {
        let mut found = Vec::new();
        for &i in used {
            let (at, w) = &self.spaces[i];
            if w.fill.is_some() || found.iter().any(|(known, _)| known == at) {
                continue;
            }
            let mut memory = vec![0; w.bytes];
            // SAFETY: the workspace has these bytes; the wait ends the copy.
            unsafe { stream.copy_to_host(&mut memory, self.arena.base() + *at as DevicePtr)? };
            stream.synchronize()?;
            found.push((*at, memory));
        }
        Ok(found)
    }

    /// Puts back what [`Self::carried`] has found.
    pub(super) fn restore(
        &self,
        stream: &Stream,
        carried: &[(usize, Vec<u8>)],
    ) -> Result<(), CudaError> {
        for (at, memory) in carried {
            // SAFETY: as above.
            unsafe { stream.copy_to_device(self.arena.base() + *at as DevicePtr, memory)? };
            stream.synchronize()?;
        }
        Ok(())
    }

    /// What is wrong with some of the workspaces after a step: a guard was written, or one that is
    /// filled once was not left as it was found.
    pub(super) fn fault(
        &self,
        stream: &Stream,
        used: &[usize],
    ) -> Result<Option<String>, CudaError> {
        let mut seen = Vec::new();
        for &i in used {
            if seen.contains(&i) {
                continue;
            }
            seen.push(i);
            let (at, w) = &self.spaces[i];
            let words = w.bytes.div_ceil(4);
            let mut memory = vec![0; GUARD + 4 * words + GUARD];
            let from = self.arena.base() + (at - GUARD) as DevicePtr;
            // SAFETY: a workspace has guards on both sides; the wait ends the copy.
            unsafe { stream.copy_to_host(&mut memory, from)? };
            stream.synchronize()?;
            let all = |part: &[u8], word: u32| {
                part.as_chunks::<4>()
                    .0
                    .iter()
                    .all(|b| *b == word.to_le_bytes())
            };
            let (head, rest) = memory.split_at(GUARD);
            let (body, tail) = rest.split_at(4 * words);
            if !all(head, POISON) || !all(tail, POISON) {
                return Ok(Some(format!("wrote outside the workspace {}", w.name)));
            }
            if let Some(word) = w.fill.filter(|&word| !all(body, word)) {
                return Ok(Some(format!(
                    "left the workspace {} other than filled with {word:#x}",
                    w.name
                )));
            }
        }
        Ok(None)
    }
}
