//! Attention over the paged cache: the fused decode kernel, append and tensor-core prefill, or the
//! plain kernel for element types and head sizes that those do not take.

pub(super) mod heads;

use super::context::{Call, Context, Geometry};
use super::error::CudaError;
use super::fusion::{AttentionFusion, AttentionKernel, Verdict};
use super::launch::{Arg, MapArg, MapSwizzle, Meta, Ref};
use super::source::{Body, Defines, literal};
use crate::cuda::limits::LIMITS;
use crate::work::{AttnWork, KernelClass, Work};
use heads::Heads;
use lathe_ir::ops::{AttnQkv, Rope, attn_qkv, attn_step, rope};
use lathe_ir::{DType, Op, Real, Slot};

/// Launches the kernels of an attention as they were decided.
///
/// # Errors
/// An operand is missing, or no kernel takes the heads.
pub(super) fn step(cx: &mut Context<'_>, fusion: &AttentionFusion) -> Result<(), CudaError> {
    let heads = match Heads::of(cx.step(), &cx.env) {
        Some(heads) => heads.map_err(|reason| cx.refuse(reason))?,
        None => return Err(cx.refuse("it is no attention")),
    };
    match cx.step().op {
        Op::AttnQkv(spec) => packed(cx, &heads, fusion, &spec),
        _ => split(cx, &heads, fusion),
    }
}

fn meta(m: Meta) -> Arg {
    Arg::Ptr(Ref::Meta(m))
}

/// Cosine and sine tables of the frequencies in an operand.
fn rope_tables(cx: &Context<'_>, operand: Slot, scaling: Real) -> Result<[Arg; 2], CudaError> {
    let Ref::Table(table) = cx.operand(operand)? else {
        return Err(cx.refuse("the rotary frequencies are no table"));
    };
    Ok([false, true].map(|sine| {
        Arg::Ptr(Ref::Rope {
            table,
            scaling,
            sine,
        })
    }))
}

pub(super) fn rotate(cx: &mut Context<'_>, spec: Rope) -> Result<(), CudaError> {
    let x = cx.tensor(rope::X)?;
    let (rows, d) = cx.matrix(x);
    let positions = cx.tensor(rope::POSITIONS)?.elements(&cx.env);
    if cx.operand(rope::POSITIONS)? != Ref::Meta(Meta::Positions)
        || positions == 0
        || rows % positions != 0
    {
        return Err(cx.refuse("positions are not those of the step"));
    }
    let heads = rows / positions;
    let [cos, sin] = rope_tables(cx, rope::INV_FREQ, spec.scaling)?;
    let defines = cx
        .defines(x.dtype)
        .def("LATHE_D", d)
        .def("LATHE_HEADS", heads);
    let args = vec![
        Arg::Ptr(cx.operand(rope::X)?),
        cos,
        sin,
        meta(Meta::Positions),
        Arg::Ptr(cx.result(0)?),
        Arg::I32(rows as i32),
    ];
    let grid = [(rows * d / 2).div_ceil(256), 1, 1];
    let label = format!("h{heads}_d{d}_{}", x.dtype);
    cx.launch(
        Body::Rope,
        &label,
        defines,
        Geometry::new(grid, 256, 0),
        args,
    );
    Ok(())
}

/// Separate q, k and v: one kernel that appends and attends, or one for each where tensor cores
/// compute the attention of prompts.
fn split(cx: &mut Context<'_>, h: &Heads, fusion: &AttentionFusion) -> Result<(), CudaError> {
    check_causal(cx, h)?;
    let q = cx.operand(attn_step::Q)?;
    let (k, v) = (cx.operand(attn_step::K)?, cx.operand(attn_step::V)?);
    let (cache, out) = (cx.operand(attn_step::CACHE)?, cx.result(0)?);
    match (fusion.kernel, fusion.append.is_made()) {
        (AttentionKernel::Decode, true) => {
            let extra = Decode {
                fused: true,
                defines: cx.defines(h.dtype).def("LATHE_SPLIT", 1),
                bias: Arg::Ptr(k),
                norms: [Arg::Ptr(v), Arg::Ptr(Ref::Null)],
                tables: [Arg::Ptr(Ref::Null), Arg::Ptr(Ref::Null)],
                ragged: false,
                name: "_split",
            };
            decode(cx, h, q, cache, out, extra);
            Ok(())
        }
        (_, true) => plain(cx, h, q, cache, out, Some([k, v])),
        (_, false) => {
            append(cx, h, k, v, &cache);
            attend(cx, h, fusion, q, cache, out)
        }
    }
}

/// Puts keys and values into the cache.
fn append(cx: &mut Context<'_>, h: &Heads, k: Ref, v: Ref, cache: &Ref) {
    let defines = cx
        .defines(h.dtype)
        .def("LATHE_HKV", h.hkv)
        .def("LATHE_D", h.d)
        .def("LATHE_PAGE", cx.options.page_size);
    let args = vec![
        Arg::Ptr(k),
        Arg::Ptr(v),
        meta(Meta::Positions),
        meta(Meta::RowSeq),
        meta(Meta::BlockTable),
        Arg::Ptr(cache.clone()),
        Arg::I32(cx.options.max_pages as i32),
    ];
    let rows = cx.sizes.t;
    cx.call(Call {
        body: Body::KvAppend,
        label: &format!("h{}_d{}_{}", h.hkv, h.d, h.dtype),
        defines,
        geometry: Geometry::new([rows, 1, 1], 256, 0),
        args,
        work: Some(h.copied(rows, 2 * h.hkv)),
        library: None,
    });
}

fn check_causal(cx: &Context<'_>, h: &Heads) -> Result<(), CudaError> {
    match h.spec.mask.causal {
        true => Ok(()),
        false => Err(cx.refuse("a cache holds earlier tokens only: attention must be causal")),
    }
}

/// A packed projection: head norms, RoPE, append and attention.
fn packed(
    cx: &mut Context<'_>,
    h: &Heads,
    fusion: &AttentionFusion,
    spec: &AttnQkv,
) -> Result<(), CudaError> {
    let blocks = h.d.div_ceil(16);
    let whole = h.d.is_multiple_of(16) || (spec.head_norm.is_none() && spec.rope.is_none());
    if !whole || blocks > 32 {
        return Err(cx.refuse(format!("no kernel splits heads of {} features", h.d)));
    }
    let [cos, sin] = match spec.rope {
        Some(r) => rope_tables(cx, attn_qkv::INV_FREQ, r.scaling)?,
        None => [Arg::Ptr(Ref::Null), Arg::Ptr(Ref::Null)],
    };
    let norms = [attn_qkv::Q_NORM, attn_qkv::K_NORM];
    let [q_norm, k_norm] = norms.map(|s| cx.operand(s).map(Arg::Ptr));
    let norms = [q_norm?, k_norm?];
    let with_norm = |d: Defines| match spec.head_norm {
        Some(eps) => d
            .def("LATHE_QKNORM", 1)
            .def("LATHE_EPS", literal(eps.get())),
        None => d,
    };
    let qkv = cx.operand(attn_qkv::QKV)?;
    let (cache, out) = (cx.operand(attn_qkv::CACHE)?, cx.result(0)?);
    if fusion.append.is_made() {
        let [qnorm, knorm] = norms;
        let extra = Decode {
            fused: true,
            defines: with_norm(cx.defines(h.dtype)),
            bias: Arg::Ptr(Ref::Null),
            norms: [qnorm, knorm],
            tables: [cos, sin],
            ragged: false,
            name: if spec.head_norm.is_some() {
                "_qknorm"
            } else {
                ""
            },
        };
        decode(cx, h, qkv, cache, out, extra);
        return Ok(());
    }
    let rows = cx.sizes.t;
    let q = cx.work("q", rows * h.hq * h.d * h.dtype.size(), None);
    let defines = with_norm(cx.defines(h.dtype))
        .def("LATHE_HQ", h.hq)
        .def("LATHE_HKV", h.hkv)
        .def("LATHE_D", h.d)
        .def("LATHE_PAGE", cx.options.page_size)
        .def("LATHE_ROPE", u8::from(spec.rope.is_some()));
    let [qnorm, knorm] = norms;
    let args = vec![
        Arg::Ptr(qkv),
        Arg::Ptr(Ref::Null),
        qnorm,
        knorm,
        cos,
        sin,
        meta(Meta::Positions),
        meta(Meta::RowSeq),
        meta(Meta::BlockTable),
        Arg::Ptr(q.clone()),
        Arg::Ptr(cache.clone()),
        Arg::I32(rows as i32),
        Arg::I32(cx.options.max_pages as i32),
    ];
    let threads = (h.hq + 2 * h.hkv) * blocks.next_power_of_two();
    let label = format!("q{}_kv{}_d{}_{}", h.hq, h.hkv, h.d, h.dtype);
    let geometry = Geometry::new([rows, threads.div_ceil(256), 1], 256, 0);
    cx.call(Call {
        body: Body::RopeAppend,
        label: &label,
        defines,
        geometry,
        args,
        work: Some(h.copied(rows, h.hq + 2 * h.hkv)),
        library: None,
    });
    attend(cx, h, fusion, q, cache, out)
}

/// Attention of roped queries over keys that are in the cache.
fn attend(
    cx: &mut Context<'_>,
    h: &Heads,
    fusion: &AttentionFusion,
    q: Ref,
    cache: Ref,
    out: Ref,
) -> Result<(), CudaError> {
    check_causal(cx, h)?;
    let roped = |cx: &Context<'_>, ragged: bool| Decode {
        fused: false,
        defines: cx.defines(h.dtype),
        bias: Arg::Ptr(Ref::Null),
        norms: [Arg::Ptr(Ref::Null), Arg::Ptr(Ref::Null)],
        tables: [Arg::Ptr(Ref::Null), Arg::Ptr(Ref::Null)],
        name: if ragged { "_ragged" } else { "" },
        ragged,
    };
    match fusion.kernel {
        AttentionKernel::Decode => {
            let extra = roped(cx, false);
            decode(cx, h, q, cache, out, extra);
        }
        AttentionKernel::Prefill => {
            let singles = fusion.decode_rows.as_ref().is_some_and(Verdict::is_made);
            if singles {
                let extra = roped(cx, true);
                decode(cx, h, q.clone(), cache.clone(), out.clone(), extra);
            }
            let list_is_made = fusion.tiles.as_ref().is_some_and(Verdict::is_made);
            let min_rows = if singles { 2 } else { 1 };
            prefill(cx, h, [q, cache, out], min_rows, list_is_made);
        }
        AttentionKernel::Plain => plain(cx, h, q, cache, out, None)?,
    }
    Ok(())
}

/// The plain kernel; with `fresh` keys and values it puts those into the cache.
fn plain(
    cx: &mut Context<'_>,
    h: &Heads,
    q: Ref,
    cache: Ref,
    out: Ref,
    fresh: Option<[Ref; 2]>,
) -> Result<(), CudaError> {
    if h.d > LIMITS.head_dim {
        return Err(cx.refuse(format!("heads of {} features are too large", h.d)));
    }
    let mut defines = head_defines(cx, h, cx.defines(h.dtype));
    let mut label = head_label(h);
    let mut args = vec![
        Arg::Ptr(q),
        Arg::Ptr(cache),
        meta(Meta::Positions),
        meta(Meta::RowSeq),
        meta(Meta::BlockTable),
        Arg::Ptr(out),
        Arg::I32(cx.options.max_pages as i32),
    ];
    let fresh_heads = if fresh.is_some() { 2 * h.hkv } else { 0 };
    if let Some(kv) = fresh {
        defines = defines.def("LATHE_APPEND", 1);
        label.push_str("_append");
        args.extend(kv.map(Arg::Ptr));
        args.push(meta(Meta::CuSeqlens));
    }
    let geometry = Geometry::new([cx.sizes.t, h.hq, 1], 128, 0);
    let read = h.hq + fresh_heads;
    cx.call(Call {
        body: Body::AttnPlain,
        label: &label,
        defines,
        geometry,
        args,
        work: Some(h.attended(read, AttnWork::ALL_ROWS)),
        library: None,
    });
    Ok(())
}

fn head_defines(cx: &Context<'_>, h: &Heads, defines: Defines) -> Defines {
    defines
        .def("LATHE_HQ", h.hq)
        .def("LATHE_HKV", h.hkv)
        .def("LATHE_D", h.d)
        .def("LATHE_PAGE", cx.options.page_size)
        .def("LATHE_SCALE", literal(h.spec.scale.get()))
        .def(
            "LATHE_SOFTCAP",
            literal(h.spec.softcap.map_or(0.0, Real::get)),
        )
        .def("LATHE_WINDOW", h.spec.mask.window.unwrap_or(0))
}

fn head_label(h: &Heads) -> String {
    let window = h
        .spec
        .mask
        .window
        .map_or(String::new(), |w| format!("_w{w}"));
    format!("q{}_kv{}_d{}{window}_{}", h.hq, h.hkv, h.d, h.dtype)
}

/// What the fused form of the decode kernel has beside the heads.
struct Decode {
    fused: bool,
    defines: Defines,
    bias: Arg,
    norms: [Arg; 2],
    tables: [Arg; 2],
    /// Part of the kernel's name.
    name: &'static str,
    /// Only sequences with one new token, of any rows.
    ragged: bool,
}

/// Shared memory of the bf16 decode kernel, by the formula at the top of `attn_decode.cu`.
fn decode_shared(group: usize, d: usize, nt: usize, stages: usize, cluster: usize) -> usize {
    let up = |b: usize| b.next_multiple_of(16);
    let partial = (group * (d + 2)).next_multiple_of(4) * 4;
    256 * stages * nt * d
        + 32 * d
        + up(16 * group * (d + 2))
        + 4 * d
        + up(8)
        + 64
        + if cluster > 1 { cluster * partial } else { 0 }
}

fn decode(cx: &mut Context<'_>, h: &Heads, q: Ref, cache: Ref, out: Ref, extra: Decode) {
    let batch = cx.sizes.b;
    let (group, items) = (h.hq / h.hkv, batch * h.hkv);
    let cluster = [8, 4, 2]
        .into_iter()
        .find(|c| items * c <= cx.options.sms as usize)
        .unwrap_or(1);
    let (nt, stages) = if h.d <= 64 { (2, 2) } else { (1, 3) };
    // Large heads leave no room for a third stage, or for the partial results of a whole cluster.
    let (cluster, stages) = (0..)
        .map(|halvings| (cluster >> halvings).max(1))
        .flat_map(|c| [(c, stages), (c, 2)])
        .find(|&(c, s)| {
            c == 1 && s == 2 || decode_shared(group, h.d, nt, s, c) <= LIMITS.shared_bytes
        })
        .unwrap_or((1, 2));
    let mut defines = head_defines(cx, h, extra.defines);
    defines = defines
        .def("LATHE_FUSED", u8::from(extra.fused))
        .def("LATHE_RAGGED", u8::from(extra.ragged));
    let (grid, shared) = if h.dtype == DType::BF16 {
        defines = defines
            .def("LATHE_CLUSTER", cluster)
            .def("LATHE_NT", nt)
            .def("LATHE_STAGES", stages)
            // The step state is written before the step, by copies that no kernel overtakes.
            .def("LATHE_PREFETCH", u8::from(extra.fused && cx.early));
        let shared = decode_shared(group, h.d, nt, stages, cluster);
        (items * cluster, shared)
    } else {
        (items, 4 * group * h.d + 16 * group * (h.d + 2))
    };
    let fused = if extra.fused { "_fused" } else { "" };
    let label = format!("{}{fused}{}_c{cluster}", head_label(h), extra.name);
    let [qnorm, knorm] = extra.norms;
    let [cos, sin] = extra.tables;
    let args = vec![
        Arg::Ptr(q),
        extra.bias,
        qnorm,
        knorm,
        cos,
        sin,
        Arg::Ptr(cache),
        meta(Meta::BlockTable),
        meta(Meta::KvLens),
        Arg::Ptr(out),
        Arg::Ptr(Ref::Null),
        Arg::Ptr(Ref::Null),
        Arg::I32(batch as i32),
        Arg::I32(cx.options.max_pages as i32),
        meta(Meta::CuSeqlens),
    ];
    // The packed rows hold the new keys and values, which the kernel appends.
    let rows = if extra.ragged {
        (1, 1)
    } else {
        AttnWork::ALL_ROWS
    };
    let read = if extra.fused { h.hq + 2 * h.hkv } else { h.hq };
    // Cluster dimensions are in the source.
    cx.call(Call {
        body: Body::AttnDecode,
        label: &label,
        defines,
        geometry: Geometry::new([grid, 1, 1], 128, shared),
        args,
        work: Some(h.attended(read, rows)),
        library: None,
    });
}

/// Attention of the sequences with at least `min_rows` new tokens: queries, cache and outputs.
fn prefill(
    cx: &mut Context<'_>,
    h: &Heads,
    [q, cache, out]: [Ref; 3],
    min_rows: i32,
    list_is_made: bool,
) {
    let (t, b) = (cx.sizes.t, cx.sizes.b);
    let group = h.hq / h.hkv;
    let nwg = h.prefill_groups();
    let dp = [64, 128].into_iter().find(|&p| h.d <= p).unwrap_or(256);
    let (bn, q_stages) = if h.d > 128 { (64, 1) } else { (128, 2) };
    let kv_stages = 2;
    let tq = h.prefill_rows();
    let page = cx.options.page_size;
    let page_box = page.min(64);
    let window = h.spec.mask.window;
    let max_items = (t + b * (tq - 1)) / tq;
    let (work, count) = tile_list(cx, tq, window, max_items);
    if !list_is_made {
        launch_list(cx, [&work, &count], (tq, max_items), min_rows, window);
    }
    let counter = cx.work("attn.counter", 16, Some(0));
    let defines = cx
        .defines(h.dtype)
        .def("D", h.d)
        .def("GROUP", group)
        .def("NWG", nwg)
        .def("BN", bn)
        .def("KV_STAGES", kv_stages)
        .def("Q_STAGES", q_stages)
        .def("PAGE_BOX", page_box)
        .def("WINDOW", u8::from(window.is_some()))
        .def("SOFTCAP", u8::from(h.spec.softcap.is_some()));
    let size = 2u64;
    let q_map = MapArg {
        base: q,
        dims: vec![h.d as u64, h.hq as u64, t as u64],
        strides: vec![size * h.d as u64, size * (h.hq * h.d) as u64],
        block: vec![64, group as u32, tq as u32],
        swizzle: MapSwizzle::B128,
    };
    let kv_map = MapArg {
        base: cache,
        dims: vec![h.d as u64, 0],
        strides: vec![size * h.d as u64],
        block: vec![64, page_box as u32],
        swizzle: MapSwizzle::B128,
    };
    let args = vec![
        Arg::Map(q_map),
        Arg::Map(kv_map),
        Arg::Ptr(out),
        meta(Meta::CuSeqlens),
        meta(Meta::KvLens),
        meta(Meta::BlockTable),
        Arg::Ptr(work),
        Arg::Ptr(count),
        Arg::Ptr(counter),
        Arg::I32(h.hkv as i32),
        Arg::I32(page as i32),
        Arg::I32(cx.options.max_pages as i32),
        Arg::I32((h.hq * h.d) as i32),
        Arg::F32(h.spec.scale.get() as f32),
        Arg::I32(window.unwrap_or(0) as i32),
        Arg::F32(h.spec.softcap.map_or(0.0, |c| c.get() as f32)),
    ];
    let shared = 2 * dp * (64 * nwg * q_stages + 2 * kv_stages * bn) + 32 * kv_stages + 256;
    let grid = (max_items * h.hkv).min(cx.options.sms as usize);
    let cap = if h.spec.softcap.is_some() { "_cap" } else { "" };
    let windowed = if window.is_some() { "_window" } else { "" };
    let label = format!("d{}_g{group}{windowed}{cap}", h.d);
    let geometry = Geometry::new([grid, 1, 1], 128 * (nwg + 1), shared);
    cx.call(Call {
        body: Body::AttnPrefill,
        label: &label,
        defines,
        geometry,
        args,
        work: Some(h.attended(h.hq, (min_rows as usize, usize::MAX))),
        library: None,
    });
}

/// Where the list of query tiles is, and their number.
fn tile_list(cx: &mut Context<'_>, tq: usize, window: Option<u32>, max_items: usize) -> (Ref, Ref) {
    let name = format!("attn.tiles.{tq}.{}", window.unwrap_or(0));
    let list = cx.work(&name, 32 * max_items, None);
    (list, cx.work(&format!("{name}.count"), 16, None))
}

/// Makes the list of query tiles of the sequences with at least `min_rows` new tokens.
fn launch_list(
    cx: &mut Context<'_>,
    [list, count]: [&Ref; 2],
    (tq, max_items): (usize, usize),
    min_rows: i32,
    window: Option<u32>,
) {
    let b = cx.sizes.b;
    let args = vec![
        meta(Meta::CuSeqlens),
        meta(Meta::KvLens),
        Arg::Ptr(list.clone()),
        Arg::Ptr(count.clone()),
        Arg::I32(b as i32),
        Arg::I32(tq as i32),
        Arg::I32(min_rows),
        Arg::I32(1),
        Arg::I32(window.unwrap_or(0) as i32),
    ];
    let shared = 4 * (b + 1 + max_items) + 128;
    let bytes = 4 * (2 * b + 1) + 32 * max_items;
    let defines = cx.defines(DType::BF16);
    cx.call(Call {
        body: Body::AttnPlan,
        label: "",
        defines,
        geometry: Geometry::new([1, 1, 1], 1024, shared),
        args,
        work: Some(Work::rows(KernelClass::Attention, max_items, 8, bytes)),
        library: None,
    });
}
