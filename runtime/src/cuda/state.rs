//! What describes a step on the device: one block of arrays, written by one copy from pinned memory.

use crate::load::LoadOptions;
use crate::step::{StepBatch, StepError};
use lathe_codegen::cuda::{Meta, Sizes};

/// Offsets of the arrays of a bucket in the block, in bytes.
#[derive(Clone, Debug)]
pub(super) struct MetaLayout {
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
    pub(super) fn new(sizes: Sizes, max_pages: usize) -> MetaLayout {
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

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes a batch that fits the bucket, with padding.
    pub(super) fn write(&self, batch: &StepBatch, out: &mut [u8]) {
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
        for s in 0..b {
            let row = &mut out[at + 4 * s * self.max_pages..][..4 * self.max_pages];
            let n = match s < sequences {
                true => batch.max_pages.min(self.max_pages),
                false => 0,
            };
            let pages = match n {
                0 => &[],
                n => &batch.block_table[s * batch.max_pages..][..n],
            };
            for (to, page) in row.chunks_exact_mut(4).zip(pages) {
                to.copy_from_slice(&page.to_le_bytes());
            }
            row[4 * n..].fill(0);
        }
        for (i, s) in batch.samplers.iter().enumerate().take(r) {
            self.word(
                out,
                Meta::Temperature,
                i,
                &s.params.temperature.to_le_bytes(),
            );
            self.word(out, Meta::TopK, i, &s.params.top_k.to_le_bytes());
            self.word(out, Meta::TopP, i, &s.params.top_p.to_le_bytes());
            // The kernel takes the position of the input token and draws for the one after it.
            let before = s.position.wrapping_sub(1);
            self.word(out, Meta::SamplePositions, i, &before.to_le_bytes());
            self.word(out, Meta::Seed, i, &s.params.seed.to_le_bytes());
            self.word(out, Meta::Request, i, &s.request.to_le_bytes());
        }
        // Rows without parameters are greedy.
        for i in batch.samplers.len()..r {
            self.word(out, Meta::Temperature, i, &0f32.to_le_bytes());
            self.word(out, Meta::TopK, i, &1u32.to_le_bytes());
            self.word(out, Meta::TopP, i, &1f32.to_le_bytes());
            self.word(out, Meta::SamplePositions, i, &0u32.to_le_bytes());
            self.word(out, Meta::Seed, i, &0u64.to_le_bytes());
            self.word(out, Meta::Request, i, &0u64.to_le_bytes());
        }
    }

    fn ints(&self, out: &mut [u8], meta: Meta, values: &[i32], len: usize, pad: i32) {
        let out = &mut out[self.offset(meta)..][..4 * len];
        let padded = values.iter().copied().chain(std::iter::repeat(pad));
        for (to, v) in out.chunks_exact_mut(4).zip(padded) {
            to.copy_from_slice(&v.to_le_bytes());
        }
    }

    fn word(&self, out: &mut [u8], meta: Meta, i: usize, bytes: &[u8]) {
        let at = self.offset(meta) + i * bytes.len();
        out[at..at + bytes.len()].copy_from_slice(bytes);
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
