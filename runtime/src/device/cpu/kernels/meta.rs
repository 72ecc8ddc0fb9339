//! A step's metadata and the KV cache's layout.

use super::{KernelError, check_index, check_len, whole_rows};

/// Which tokens a step has: T rows, the tokens of B sequences one after the other.
#[derive(Clone, Copy, Debug)]
pub struct StepMeta<'a> {
    /// `[T]`: position of each row's token in its sequence.
    pub positions: &'a [i32],
    /// `[T]`: sequence of each row.
    pub row_seq: &'a [i32],
    /// `[B + 1]`: rows of sequence b are `cu_seqlens[b]..cu_seqlens[b + 1]`.
    pub cu_seqlens: &'a [i32],
    /// `[B]`: cached tokens of each sequence, this step's included.
    pub kv_lens: &'a [i32],
    /// `[B, max_pages]`: page that holds positions `i * page_size ..` of sequence b at `[b][i]`.
    pub block_table: &'a [i32],
    /// Columns of `block_table`.
    pub max_pages: usize,
    /// Token slots of a page.
    pub page_size: usize,
}

/// Layout of one layer's cache: `[page][k, v][kv_head][token_in_page][head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Pages.
    pub pages: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Token slots of a page.
    pub page_size: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl CacheShape {
    /// The shape of a cache of `len` elements, a whole number of pages.
    pub(crate) fn of(
        kernel: &'static str,
        len: usize,
        kv_heads: usize,
        page_size: usize,
        head_dim: usize,
    ) -> Result<CacheShape, KernelError> {
        let page = 2 * kv_heads * page_size * head_dim;
        if page == 0 || !len.is_multiple_of(page) {
            let want = whole_rows(len, page);
            return Err(KernelError::Length {
                kernel,
                operand: "cache",
                got: len,
                want,
            });
        }
        Ok(CacheShape {
            pages: len / page,
            kv_heads,
            page_size,
            head_dim,
        })
    }

    /// Elements of a page.
    pub fn page_len(&self) -> usize {
        2 * self.kv_heads * self.page_size * self.head_dim
    }

    /// Element offset of the head vector at `slot` of `page`; `value` selects v instead of k.
    #[inline(always)]
    pub fn offset(&self, page: usize, value: bool, kv_head: usize, slot: usize) -> usize {
        let row = (page * 2 + usize::from(value)) * self.kv_heads + kv_head;
        (row * self.page_size + slot) * self.head_dim
    }
}

impl StepMeta<'_> {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Sequences of the step.
    pub fn sequences(&self) -> usize {
        self.kv_lens.len()
    }

    /// Checks the arrays against each other and every page that rows of this step may touch against `pages`.
    /// Afterwards page lookups of positions below a sequence's `kv_len` stay inside the cache.
    pub(crate) fn check(&self, kernel: &'static str, pages: usize) -> Result<(), KernelError> {
        let (rows, sequences) = (self.rows(), self.sequences());
        check_len(kernel, "row_seq", self.row_seq, rows)?;
        check_len(kernel, "cu_seqlens", self.cu_seqlens, sequences + 1)?;
        check_len(
            kernel,
            "block_table",
            self.block_table,
            sequences * self.max_pages,
        )?;
        if self.page_size == 0 {
            return Err(KernelError::Unsupported {
                kernel,
                what: "page_size is 0".into(),
            });
        }
        for b in 0..sequences {
            let len = check_index(
                kernel,
                "kv_len",
                b,
                self.kv_lens[b],
                self.max_pages * self.page_size + 1,
            )?;
            for &page in &self.block_table[b * self.max_pages..][..len.div_ceil(self.page_size)] {
                check_index(kernel, "page", b, page, pages)?;
            }
        }
        let mut row = 0;
        for b in 0..sequences {
            let start = check_index(kernel, "cu_seqlens", b, self.cu_seqlens[b], rows + 1)?;
            let end = check_index(
                kernel,
                "cu_seqlens",
                b + 1,
                self.cu_seqlens[b + 1],
                rows + 1,
            )?;
            if start != row || end < start {
                let got = i64::from(self.cu_seqlens[b]);
                return Err(KernelError::Index {
                    kernel,
                    index: "cu_seqlens",
                    row: b,
                    got,
                    limit: rows + 1,
                });
            }
            for r in start..end {
                if self.row_seq[r] != b as i32 {
                    let got = i64::from(self.row_seq[r]);
                    return Err(KernelError::Index {
                        kernel,
                        index: "row_seq",
                        row: r,
                        got,
                        limit: sequences,
                    });
                }
                check_index(
                    kernel,
                    "position",
                    r,
                    self.positions[r],
                    self.kv_lens[b] as usize,
                )?;
            }
            row = end;
        }
        if row != rows {
            return Err(KernelError::Length {
                kernel,
                operand: "positions",
                got: rows,
                want: row,
            });
        }
        Ok(())
    }

    /// Page and slot of `position` of sequence `b`.
    #[inline(always)]
    pub(crate) fn place(&self, b: usize, position: usize) -> (usize, usize) {
        let page = self.block_table[b * self.max_pages + position / self.page_size];
        (page as usize, position % self.page_size)
    }
}
