//! The fusions of an attention: its kernel, whether that appends to the cache, and who attends for single rows.

use super::verdict::Verdict;
use crate::cuda::attention::heads::Heads;
use crate::cuda::bucket::Bucket;
use crate::plan::{ProgramKind, Step};
use lathe_ir::Op;
use std::collections::BTreeMap;

/// Fewest sequences of a general step whose decode rows get the decode kernel.
const RAGGED_SEQUENCES: usize = 16;

/// What is decided of an attention step. What is `None` there is no occasion for.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionFusion {
    /// The kernel that attends.
    pub kernel: AttentionKernel,
    /// Whether that kernel, too, puts new keys and values into the cache. If not, a launch before it does, with what
    /// a packed projection needs.
    pub append: Verdict,
    /// Whether sequences with one new row get the decode kernel beside the tiles.
    pub decode_rows: Option<Verdict>,
    /// The step whose list of query tiles is used. If there is none, a launch makes the list.
    pub tiles: Option<Verdict<usize>>,
}

/// Kernels that attend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// One row a sequence.
    Decode,
    /// Tiles of rows on tensor cores.
    Prefill,
    /// Any element type and any rows.
    Plain,
}

impl AttentionKernel {
    /// The name in decisions.
    pub fn name(self) -> &'static str {
        match self {
            AttentionKernel::Decode => "attn_decode",
            AttentionKernel::Prefill => "attn_prefill",
            AttentionKernel::Plain => "attn_plain",
        }
    }
}

/// Lists of query tiles that the steps so far have made, by rows of a tile and window.
pub(super) type TileLists = BTreeMap<(usize, Option<u32>), usize>;

/// Decides the fusions of the attention of step `at`.
pub(super) fn decide(
    bucket: &Bucket<'_>,
    lists: &mut TileLists,
    at: usize,
    step: &Step,
    heads: &Heads,
) -> AttentionFusion {
    let options = &bucket.options;
    let is_decode = bucket.program.kind == ProgramKind::Decode && heads.decode_takes(options);
    let (kernel, append) = match &step.op {
        // Separate q, k and v.
        Op::AttnStep(_) if is_decode => (
            AttentionKernel::Decode,
            Verdict::made((), "the decode kernel appends its own row"),
        ),
        Op::AttnStep(_) if options.per_op => (
            AttentionKernel::Plain,
            Verdict::made((), "every operation is one launch"),
        ),
        Op::AttnStep(_) if !heads.prefill_takes(options) => (
            AttentionKernel::Plain,
            Verdict::made((), "the plain kernel appends the rows of its sequence"),
        ),
        Op::AttnQkv(spec) if is_decode && spec.rope.is_some() => (
            AttentionKernel::Decode,
            Verdict::made((), "the decode kernel rotates and appends its own row"),
        ),
        _ => {
            let (kernel, reason) = if is_decode {
                (
                    AttentionKernel::Decode,
                    "without a rotation rows are appended before",
                )
            } else if heads.prefill_takes(options) {
                (
                    AttentionKernel::Prefill,
                    "tiles of a sequence read each other's rows",
                )
            } else {
                (
                    AttentionKernel::Plain,
                    "rows of a sequence read each other's keys",
                )
            };
            (kernel, Verdict::not(reason))
        }
    };
    let is_prefill = kernel == AttentionKernel::Prefill;
    AttentionFusion {
        kernel,
        append,
        decode_rows: is_prefill.then(|| decode_rows(bucket, heads)),
        tiles: is_prefill.then(|| {
            let list = (heads.prefill_rows(), heads.spec.mask.window);
            match lists.get(&list) {
                Some(&by) => Verdict::made(by, format!("step {by} has made the list of tiles")),
                None => {
                    lists.insert(list, at);
                    Verdict::not("no step before has tiles of these rows and this window")
                }
            }
        }),
    }
}

/// Tiles of many rows waste their arithmetic on single ones; a second launch is worth it where there may be many.
fn decode_rows(bucket: &Bucket<'_>, heads: &Heads) -> Verdict {
    let sequences = bucket.sizes.b;
    if sequences < RAGGED_SEQUENCES {
        return Verdict::not(format!(
            "{sequences} sequences are too few for a second launch, {RAGGED_SEQUENCES} are not"
        ));
    }
    match heads.decode_takes(&bucket.options) {
        true => Verdict::made(
            (),
            format!(
                "up to {sequences} sequences may have one new row, of which a tile wastes most"
            ),
        ),
        false => Verdict::not("the decode kernel does not take these heads"),
    }
}
