//! Launches of products with few rows, or few columns, in which reading the long matrix is the work.

use moebius_ir::DType;

use super::chosen::{self, Chosen};
use super::combined::{self, Combined};
use super::gemm::{Product, Strides};
use super::joined::{self, Joined};
use super::lead::{self, Lead};
use super::twin::{self, Twin};
use super::{float, int};
use crate::cuda::chip::Chip;
use crate::cuda::launch::{Action, Arg, Launch, Scratch, kernel};
use crate::cuda::source::{CLUSTER, FUNCTIONS, HALVES, Header, LEAD, NORM, Source, VECTORS};

const TEXT: &str = include_str!("../kernels/few_rows.cu");
/// Behind the text of a chain, which it gives elements to.
const COMBINED: &str = include_str!("../kernels/combined.cuh");
const THREADS: usize = 256;
/// The most rows for which an element is read once.
const MOST_ROWS: usize = 8;
/// Blocks that keep a large GPU busy: two for each of 132 processors.
const ENOUGH_BLOCKS: usize = 264;
/// The most blocks of a cluster that every GPU with clusters takes.
pub(super) const MOST_CLUSTER: usize = 8;
/// Blocks in clusters that are enough: one for most of 132 processors.
const ENOUGH_CLUSTERED: usize = 96;
/// Blocks that run at once on a large GPU: three on each of 132 processors, by their registers.
const MOST_CLUSTERED: usize = 396;
/// The most loads that a thread has on their way at a time, as in the kernel.
const MOST_AHEAD: usize = 8;
/// Loads that a thread should have: shorter chunks of k cost more than they give.
const LEAST_LOADS: usize = 4;

/// Which side of a product is the short one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Few {
    /// The rows.
    Rows,
    /// The columns: the product is done as its transpose.
    Columns,
}

/// Operands of a launch.
pub(super) struct Operands {
    pub(super) a: Arg,
    pub(super) b: Arg,
    /// Null for a dense product.
    pub(super) offsets: Arg,
    pub(super) bias: Arg,
}

/// How many products there are.
#[derive(Clone, Copy)]
pub(super) enum Number {
    /// A batch of as many.
    Batch(usize),
    /// One, whose rows are slots of as many experts.
    Experts(usize),
}

/// What is around a product.
#[derive(Clone, Copy)]
pub(super) struct Around<'a> {
    pub(super) joined: Option<&'a Joined>,
    /// What makes its rows.
    pub(super) lead: Option<&'a Lead>,
    /// The route and the assign before the dispatch of one token; then the lead is that.
    pub(super) chosen: Option<&'a Chosen<'a>>,
    /// What runs beside a product of experts.
    pub(super) twin: Option<&'a Twin>,
    /// What is behind a product of experts that no chain is behind.
    pub(super) combined: Option<&'a Combined>,
    /// Whether all that it reads but its rows is as it was before the run.
    pub(super) early: bool,
}

/// The headers of a product in clusters or not, behind a norm or not, or behind a route.
fn headers(clustered: bool, normalises: bool, chooses: bool) -> &'static [Header] {
    const CHOOSES: [Header; 7] = {
        let [router, route, order, routing] = chosen::HEADERS;
        [FUNCTIONS, VECTORS, LEAD, router, route, order, routing]
    };
    const CLUSTER_CHOOSES: [Header; 9] = {
        let [router, route, order, routing] = chosen::HEADERS;
        [HALVES, CLUSTER, FUNCTIONS, VECTORS, LEAD, router, route, order, routing]
    };
    match (clustered, normalises, chooses) {
        (false, _, true) => &CHOOSES,
        (true, _, true) => &CLUSTER_CHOOSES,
        (false, false, false) => &[FUNCTIONS, VECTORS, LEAD],
        (false, true, false) => &[FUNCTIONS, VECTORS, NORM, LEAD],
        (true, false, false) => &[HALVES, CLUSTER, FUNCTIONS, VECTORS, LEAD],
        (true, true, false) => &[HALVES, CLUSTER, FUNCTIONS, VECTORS, NORM, LEAD],
    }
}

/// How k is cut.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunks {
    pub(super) count: usize,
    /// Elements of one.
    pub(super) length: usize,
}

/// Chunks of k for `tiles` blocks without them, of which `enough` keep a GPU busy, when a block takes `step` elements of k at a
/// time.
pub(super) fn chunks(tiles: usize, k: usize, step: usize, enough: usize) -> Chunks {
    let wanted = enough.div_ceil(tiles.max(1)).min(k.div_ceil(LEAST_LOADS * step)).max(1);
    let length = k.div_ceil(wanted).next_multiple_of(step);
    Chunks { count: if length == 0 { 1 } else { k.div_ceil(length) }, length }
}

/// The kernel of a file that adds up the chunks' results, `each` elements a thread; `joined` if it is one that takes a chain.
pub(super) fn finish(
    source: Source,
    name: &'static str,
    threads: usize,
    each: usize,
    (partial, total): (Arg, usize),
    chunks: &Chunks,
    joined: Option<&Joined>,
) -> Result<Action, String> {
    let mut args = vec![partial, Arg::size(total), Arg::I32(int(chunks.count, "chunks")?), joined::out(joined)];
    args.extend(joined::args(joined));
    Ok(kernel(source, name, [total.div_ceil(each * threads), 1, 1], threads as u32, args))
}

/// Blocks along z of `batch` products of `rows` rows.
pub(super) fn groups(batch: usize, rows: usize) -> usize {
    batch.saturating_mul(rows.div_ceil(MOST_ROWS))
}

/// The launch on such a GPU of products of factors of these dtypes.
pub(super) fn launch(
    chip: Chip,
    [of_a, of_b]: [DType; 2],
    product: &Product,
    few: Few,
    number: Number,
    operands: Operands,
    Around { joined, lead, chosen, twin, combined, early }: Around<'_>,
) -> Result<Launch, String> {
    let (batch, experts) = match number {
        Number::Batch(batch) => (batch, None),
        Number::Experts(experts) => (1, Some(experts)),
    };
    // What the kernel calls a and b, as rows by k and k by columns.
    let (p, turned) = (product, |s: Strides| Strides { row: s.column, column: s.row });
    let (a, a_batch, b, b_batch, m, n) = match few {
        Few::Rows => (p.a, p.a_batch, p.b, p.b_batch, p.m, p.n),
        Few::Columns => (turned(p.b), p.b_batch, turned(p.a), p.a_batch, p.n, p.m),
    };
    let [of_row, of_column] = match few {
        Few::Rows => [0, 1],
        Few::Columns => [1, 0],
    };
    // Of c, which is row-major in the product's own sense.
    let [c_row, c_column] = if few == Few::Rows { [p.n, 1] } else { [1, p.n] };
    let (few_dtype, dtype) = if few == Few::Rows { (of_a, of_b) } else { (of_b, of_a) };
    let result = if of_a == of_b { of_a } else { DType::F32 };
    let vector = 16 / dtype.bytes();
    let transposed = b.column != 1;
    let (line, width) = if transposed { (b.column, p.k) } else { (b.row, n) };
    let aligned = [line, width, b_batch].iter().all(|n| n.is_multiple_of(vector));
    let together = a.column == 1 && [a.row, a_batch].iter().all(|n| n.is_multiple_of(vector));
    let most = m.clamp(1, MOST_ROWS).next_power_of_two();
    let twin = twin.filter(|twin| twin.fits(most));
    let warps = THREADS / 32;
    // Columns of a block, in the rule of the chunks as for one row, so that these do not depend on the rows.
    let (columns, of_rule, step) = match transposed {
        true => (warps * if most > 2 { 2 } else { 1 }, warps, 32 * vector),
        false => (8 * vector, 8 * vector, 4 * warps),
    };
    let tiles = n.div_ceil(of_rule) * batch * if twin.is_some() { 2 } else { 1 };
    // As many chunks as a cluster has blocks, if these are enough: more would need another kernel to add up.
    let enough =
        if chip.hopper && tiles * MOST_CLUSTER >= ENOUGH_CLUSTERED { tiles * MOST_CLUSTER } else { ENOUGH_BLOCKS };
    let chunks = chunks(tiles, p.k, step, enough.min(ENOUGH_BLOCKS));
    let z = if experts.is_some() { m + usize::from(twin.is_some()) } else { groups(batch, m) };
    // The chunks of a tile are a cluster where there are clusters as large, and all of them run at once: a block that waits for the
    // others of its cluster keeps those behind it from starting.
    let across = n.div_ceil(columns) + usize::from(chosen.is_some());
    let blocks = across.saturating_mul(chunks.count).saturating_mul(z);
    let clustered = chip.hopper && (2..=MOST_CLUSTER).contains(&chunks.count) && blocks <= MOST_CLUSTERED;
    let whole = chunks.count == 1 || clustered;
    if twin.is_some() && !whole {
        // Whoever adds up chunks elsewhere has no place for a second product's.
        let around = Around { joined, lead, chosen, twin: None, combined: None, early };
        return launch(chip, [of_a, of_b], product, few, number, operands, around);
    }
    let combined = combined.filter(|_| whole && joined.is_none() && n > 0 && z > 0);
    let (alone, chain) = (z == 1, combined.map_or(joined, Combined::chain));
    let total = batch * m * n;
    let mut scratch = Scratch::default();
    let partial = if chunks.count > 1 && !clustered { scratch.take(4 * chunks.count * total) } else { Arg::Null };
    let mut bytes = Vec::with_capacity(120);
    let bias_batch = if experts.is_some() { n } else { 0 };
    let strides = [
        [a.row, a.column, a_batch],
        [line, b_batch, c_row],
        [c_column, p.c_batch, of_row],
        [of_column, bias_batch, total],
    ];
    strides.as_flattened().iter().for_each(|&s| bytes.extend((s as i64).to_le_bytes()));
    for n in [m, n, p.k, chunks.length, experts.unwrap_or(0), usize::from(p.wide_bias)] {
        bytes.extend(int(n, "an extent of a product")?.to_le_bytes());
    }
    let lead = lead.filter(|lead| n > 0 && lead.fits(m, p.k, few_dtype, MOST_ROWS));
    if chosen.is_some() && (lead.is_none() || combined.is_some() || experts.is_none()) {
        return Err("the rows of a token that is chosen for, and a combine elsewhere".into());
    }
    let headers = headers(clustered, lead.is_some_and(Lead::is_norm), chosen.is_some());
    let text = format!("#line 1 \"combined.cuh\"\n{COMBINED}\n#line 1 \"few_rows.cu\"\n{TEXT}");
    let source = joined::source(chain, "few_rows.cu", headers, &text);
    let source = chosen::source(chosen, lead::source(lead, source))?;
    let source = combined::source(combined, alone, twin::source(twin, source))
        .define("THREADS", THREADS)
        .define("GROUPED", u8::from(experts.is_some()))
        .define("EARLY", u8::from(early && experts.is_none()))
        .define("LOADS", chunks.length.div_ceil(step).clamp(1, MOST_AHEAD))
        .define("CLUSTER", if clustered { chunks.count } else { 1 })
        .define("T", float(dtype)?)
        .define("TA", float(few_dtype)?)
        .define("TC", float(result)?)
        .define("WIDE", u8::from(dtype == DType::F32))
        .define("TRANSPOSED", u8::from(transposed))
        .define("ALIGNED", u8::from(aligned))
        .define("TOGETHER", u8::from(together && aligned && transposed))
        .define("MOST", most);
    let Operands { a, b, offsets, bias } = operands;
    let [a, b] = if few == Few::Rows { [lead.map_or(a, |lead| lead.rows.clone()), b] } else { [b, a] };
    let out = if combined.is_some() { combined::out(alone) } else { joined::out(joined) };
    let mut args = vec![a, b, offsets, bias, partial.clone(), out, Arg::Bytes(bytes)];
    args.extend(lead::args(lead));
    args.extend(chosen::args(chosen));
    args.extend(combined.map_or_else(|| joined::args(joined), |combined| combined::args(combined, alone)));
    args.extend(twin::args(twin));
    let grid = [across, chunks.count, z];
    let mut actions = vec![kernel(source.clone(), "few_rows", grid, THREADS as u32, args)];
    if chunks.count > 1 && !clustered {
        actions.push(finish(source, "few_rows_finish", THREADS, 1, (partial, total), &chunks, joined)?);
    }
    let why = format!(
        "tiles {most} x {columns} x {}: {} {}, few enough (8, or 16 if k is long) that reading the other matrix is the work",
        chunks.length,
        m,
        if few == Few::Rows { "rows" } else { "columns" },
    );
    let mut launch = joined::with(joined, Launch::of(actions).with_scratch(scratch.bytes())).because(why);
    launch.before = lead::joint(lead);
    launch.twin = twin::joint(twin);
    Ok(match combined {
        None => launch,
        Some(combined) => combined::with(combined, alone, n.div_ceil(columns), launch),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_k_and_are_worth_a_block() {
        for tiles in [1, 16, 64, 263, 264, 6000] {
            for k in [1, 127, 128, 129, 1000, 1024, 4096, 50_257] {
                for step in [32, 128, 256] {
                    let c = chunks(tiles, k, step, ENOUGH_BLOCKS);
                    assert!(c.count * c.length >= k && (c.count - 1) * c.length < k, "{tiles} {k} {step}: {c:?}");
                    assert!(c.length.is_multiple_of(step));
                    assert!(c.count == 1 || c.length >= LEAST_LOADS * step / 2, "{tiles} {k} {step}: {c:?}");
                }
            }
        }
        assert_eq!(chunks(16, 1024, 32, ENOUGH_BLOCKS), Chunks { count: 8, length: 128 });
        assert_eq!(chunks(264, 4096, 32, ENOUGH_BLOCKS), Chunks { count: 1, length: 4096 });
        assert_eq!(chunks(3, 0, 32, ENOUGH_BLOCKS), Chunks { count: 1, length: 0 });
    }
}
