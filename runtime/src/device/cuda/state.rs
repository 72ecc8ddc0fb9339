//! What describes a step on the device: one block of arrays, written by one copy from pinned memory.

use super::memory::bytes_of;
use crate::device::load::LoadOptions;
use crate::device::step::{RowSampler, StepBatch, StepError};
use lathe_codegen::cuda::{Meta, Sizes};

/// Offsets of the arrays of a bucket in the block, in bytes.
#[derive(Clone, Debug)]
pub(crate) struct MetaLayout {
    sizes: Sizes,
    max_pages: usize,
    offsets: [usize; 13],
    bytes: usize,
}

const ORDER: [Meta; 13] = [
    Meta::Tokens,
    Meta::Positions,
    Meta::RowSeq,
    Meta::CuSeqlens,
    Meta::KvLens,
    Meta::Rows,
    Meta::Temperature,
    Meta::TopK,
    Meta::TopP,
    Meta::SamplePositions,
    Meta::Seed,
    Meta::Request,
    Meta::BlockTable,
];

impl MetaLayout {
    pub(crate) fn new(sizes: Sizes, max_pages: usize) -> MetaLayout {
        let Sizes { t, b, r } = sizes;
        let mut offsets = [0; 13];
        let mut bytes = 0;
        for (offset, meta) in offsets.iter_mut().zip(ORDER) {
            *offset = bytes;
            let size = match meta {
                Meta::Tokens | Meta::Positions | Meta::RowSeq => 4 * t,
                Meta::CuSeqlens => 4 * (b + 1),
                Meta::KvLens => 4 * b,
                Meta::Seed | Meta::Request => 8 * r,
                Meta::BlockTable => 4 * b * max_pages,
                _ => 4 * r,
            };
            bytes += size.next_multiple_of(16);
        }
        MetaLayout {
            sizes,
            max_pages,
            offsets,
            bytes,
        }
    }

    pub(super) fn offset(&self, meta: Meta) -> usize {
        let at = ORDER.iter().position(|m| *m == meta);
        self.offsets[at.expect("every array has a place")]
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes a batch that fits the bucket, with padding.
    pub(crate) fn write(&self, batch: &StepBatch, out: &mut [u8]) {
        let Sizes { t, b, r } = self.sizes;
        let (tokens, sequences) = (batch.tokens.len(), batch.kv_lens.len());
        self.ints(out, Meta::Tokens, &batch.tokens, t, 0);
        self.ints(out, Meta::Positions, &batch.positions, t, 0);
        self.ints(out, Meta::RowSeq, &batch.row_seq, t, -1);
        self.ints(
            out,
            Meta::CuSeqlens,
            &batch.cu_seqlens,
            b + 1,
            tokens as i32,
        );
        self.ints(out, Meta::KvLens, &batch.kv_lens, b, 0);
        self.ints(out, Meta::Rows, &batch.rows, r, 0);
        let at = self.offset(Meta::BlockTable);
        let width = batch.max_pages.min(self.max_pages);
        let table = &mut out[at..][..4 * b * self.max_pages];
        for (s, row) in table
            .chunks_exact_mut((4 * self.max_pages).max(4))
            .enumerate()
        {
            let n = if s < sequences { width } else { 0 };
            let pages = match n {
                0 => &[],
                n => &batch.block_table[s * batch.max_pages..][..n],
            };
            let (used, unused) = row.split_at_mut(4 * n);
            used.copy_from_slice(bytes_of(pages));
            unused.fill(0);
        }
        // Rows without parameters are greedy.
        let samplers = &batch.samplers[..batch.samplers.len().min(r)];
        self.each(out, Meta::Temperature, samplers, 0f32.to_le_bytes(), |s| {
            s.params.temperature.to_le_bytes()
        });
        self.each(out, Meta::TopK, samplers, 1u32.to_le_bytes(), |s| {
            s.params.top_k.to_le_bytes()
        });
        self.each(out, Meta::TopP, samplers, 1f32.to_le_bytes(), |s| {
            s.params.top_p.to_le_bytes()
        });
        // The kernel takes the position of the input token and draws for the one after it.
        self.each(out, Meta::SamplePositions, samplers, [0; 4], |s| {
            s.position.wrapping_sub(1).to_le_bytes()
        });
        self.each(out, Meta::Seed, samplers, [0; 8], |s| {
            s.params.seed.to_le_bytes()
        });
        self.each(out, Meta::Request, samplers, [0; 8], |s| {
            s.request.to_le_bytes()
        });
    }

    fn ints(&self, out: &mut [u8], meta: Meta, values: &[i32], len: usize, pad: i32) {
        let values = &values[..values.len().min(len)];
        let out = &mut out[self.offset(meta)..][..4 * len];
        let (given, padding) = out.split_at_mut(4 * values.len());
        given.copy_from_slice(bytes_of(values));
        for to in padding.chunks_exact_mut(4) {
            to.copy_from_slice(&pad.to_le_bytes());
        }
    }

    /// One field of all samplers, with `pad` for the rows beyond them.
    fn each<const N: usize>(
        &self,
        out: &mut [u8],
        meta: Meta,
        samplers: &[RowSampler],
        pad: [u8; N],
        field: impl Fn(&RowSampler) -> [u8; N],
    ) {
        let out = &mut out[self.offset(meta)..][..N * self.sizes.r];
        let (given, padding) = out.split_at_mut(N * samplers.len());
        for (to, s) in given.chunks_exact_mut(N).zip(samplers) {
            to.copy_from_slice(&field(s));
        }
        for to in padding.chunks_exact_mut(N) {
            to.copy_from_slice(&pad);
        }
    }
}

/// Checks a batch against the limits that it was loaded with, so that kernels cannot leave their
/// buffers. `sampled` is the number of rows that the step before sampled.
pub(super) fn check(
    b: &StepBatch,
    o: &LoadOptions,
    vocab: usize,
    sampled: usize,
) -> Result<(), StepError> {
    let fail = |what: String| Err(StepError::Batch(what));
    let (t, n, r) = (b.tokens.len(), b.kv_lens.len(), b.rows.len());
    let max_rows = o.max_rows.max(o.max_sequences);
    if t == 0 || t > o.max_tokens || n > o.max_sequences || r > max_rows {
        return fail(format!(
            "{t} tokens of {n} sequences with {r} sampled rows; limits are {}, {} and {max_rows}",
            o.max_tokens, o.max_sequences
        ));
    }
    if b.positions.len() != t || b.row_seq.len() != t || b.cu_seqlens.len() != n + 1 {
        return fail("metadata of another length than the rows".into());
    }
    if b.block_table.len() != n * b.max_pages || b.samplers.len() > r {
        return fail("a block table or samplers of another size than the sequences".into());
    }
    let known = |&t: &i32| t < vocab as i32 && i64::from(t) >= -(sampled as i64);
    if let Some(t) = b.tokens.iter().find(|t| !known(t)) {
        return fail(format!(
            "token {t} is outside the vocabulary of {vocab} and no row of {sampled} sampled ones"
        ));
    }
    let inside = |v: &[i32], limit: usize| v.iter().all(|&x| x >= 0 && (x as usize) < limit);
    let pages_hold = |(p, s): (&i32, &i32)| (*p as usize) < b.max_pages * o.page_size && *s >= 0;
    if !inside(&b.positions, o.max_seq_len) || !b.positions.iter().zip(&b.row_seq).all(pages_hold) {
        return fail(format!("a position beyond max_seq_len {}", o.max_seq_len));
    }
    if !inside(&b.row_seq, n) || !inside(&b.rows, t) || !inside(&b.block_table, o.pages) {
        return fail("an index outside its range".into());
    }
    let reach = (b.max_pages * o.page_size).min(o.max_seq_len);
    if b.kv_lens.iter().any(|&l| l < 1 || l as usize > reach) {
        return fail("a sequence longer than its pages".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::SamplingParams;

    fn int(out: &[u8], layout: &MetaLayout, meta: Meta, i: usize) -> i32 {
        let at = layout.offset(meta) + 4 * i;
        i32::from_le_bytes(out[at..at + 4].try_into().unwrap())
    }

    /// Two sequences in a bucket of four, over bytes of an earlier step.
    #[test]
    fn a_step_is_written_with_its_padding() {
        let layout = MetaLayout::new(Sizes { t: 8, b: 4, r: 4 }, 3);
        let mut batch = StepBatch {
            max_pages: 2,
            ..StepBatch::default()
        };
        let sampler = |request, position| RowSampler {
            params: SamplingParams {
                temperature: 0.5,
                top_k: 9,
                top_p: 0.25,
                seed: 1 << 40,
            },
            request,
            position,
        };
        batch.push_sequence(&[11, 12, 13], 4, &[6, 7], Some(sampler(3, 7)));
        batch.push_sequence(&[-1], 1, &[5], Some(sampler(4, 2)));
        let mut out = vec![0xaa; layout.bytes()];
        layout.write(&batch, &mut out);
        let ints =
            |meta, n: usize| -> Vec<i32> { (0..n).map(|i| int(&out, &layout, meta, i)).collect() };
        assert_eq!(ints(Meta::Tokens, 8), [11, 12, 13, -1, 0, 0, 0, 0]);
        assert_eq!(ints(Meta::Positions, 8), [4, 5, 6, 1, 0, 0, 0, 0]);
        assert_eq!(ints(Meta::RowSeq, 8), [0, 0, 0, 1, -1, -1, -1, -1]);
        assert_eq!(ints(Meta::CuSeqlens, 5), [0, 3, 4, 4, 4]);
        assert_eq!(ints(Meta::KvLens, 4), [7, 2, 0, 0]);
        assert_eq!(ints(Meta::Rows, 4), [2, 3, 0, 0]);
        let table = [6, 7, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(ints(Meta::BlockTable, 12), table);
        assert_eq!(ints(Meta::TopK, 4), [9, 9, 1, 1]);
        assert_eq!(ints(Meta::SamplePositions, 4), [6, 1, 0, 0]);
        let float = |meta, i| f32::from_bits(int(&out, &layout, meta, i) as u32);
        assert_eq!(
            [0, 1, 2].map(|i| float(Meta::Temperature, i)),
            [0.5, 0.5, 0.0]
        );
        assert_eq!([1, 3].map(|i| float(Meta::TopP, i)), [0.25, 1.0]);
        assert_eq!(ints(Meta::Request, 8), [3, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(ints(Meta::Seed, 4), [0, 256, 0, 256]);
    }
}
