//! Packing: operands of any storage and strides become f32 panels in the order the kernels read.

use half::{bf16, f16};

use super::kernel::{ROW, Simd, Source};
use super::{Mat, Storage};

/// A group of tiles of A to pack, each into a panel of its own.
pub(super) struct ArgsA<'a> {
    /// A, at the first row (if `row_list` is `None`) and first `k` (if `k_list` is `None`) of the group.
    pub(super) a: Mat,
    pub(super) rows: usize,
    /// Among how many tiles the rows are shared out by [`edge`], at most [`GROUP`].
    pub(super) tiles: usize,
    /// Floats from one tile's panel to the next.
    pub(super) tile_step: usize,
    pub(super) k: usize,
    /// The group's rows by list.
    pub(super) row_list: Option<&'a [i32]>,
    /// The group's k by list.
    pub(super) k_list: Option<&'a [i32]>,
    /// Panels are k-wise (`dst[p * COL + i]`) instead of row-wise (`dst[i * ROW + p]`).
    pub(super) by_col: bool,
}

/// Most tiles of a group.
pub(super) const GROUP: usize = 9;

/// The first row of tile `i` when `rows` rows are shared out among `tiles` tiles, as evenly as can be.
pub(super) fn edge(rows: usize, tiles: usize, i: usize) -> usize {
    rows * i / tiles
}

/// Rows of A to prefetch ahead while packing along rows.
const ROWS_AHEAD: isize = 4;

pub(super) type PackA = unsafe fn(&ArgsA<'_>, *mut f32);

/// Packs a group of tiles of A.
///
/// # Safety
/// The source covers the group; each panel of `dst` has `rows of a tile * ROW` floats (k-wise: `k * COL`), a tile has
/// at most COL rows, and `k <= KC`.
#[inline(always)]
pub(super) unsafe fn pack_a<S: Simd>(args: &ArgsA<'_>, dst: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        match args.a.storage {
            Storage::F32 => pack_a_of::<S, f32>(args, dst),
            Storage::Bf16 => pack_a_of::<S, bf16>(args, dst),
            Storage::F16 => pack_a_of::<S, f16>(args, dst),
        }
    }
}

/// Where index `i` lies: through the list if there is one, `None` for zeros.
#[inline(always)]
pub(super) fn place(list: Option<&[i32]>, i: usize) -> Option<isize> {
    match list {
        None => Some(i as isize),
        Some(list) => (list[i] >= 0).then_some(list[i] as isize),
    }
}

#[inline(always)]
unsafe fn pack_a_of<S: Simd, T: Source>(args: &ArgsA<'_>, dst: *mut f32) {
    let Mat { data, row_stride, col_stride, .. } = args.a;
    let src = data.cast::<T>();
    let mut edges = [0; GROUP + 1];
    for (i, at) in edges.iter_mut().enumerate().take(args.tiles + 1) {
        *at = edge(args.rows, args.tiles, i);
    }
    // SAFETY: the caller's contract.
    unsafe {
        if args.by_col && row_stride == 1 && args.row_list.is_none() {
            // All tiles of one step of k at once: the rows of the source are far apart, often by a power of two, so
            // that a line would not stay in a cache until the next tile wants its share of it.
            for p in 0..args.k {
                let to = dst.add(p * S::COL);
                let from = place(args.k_list, p).map(|at| src.offset(at * col_stride));
                if args.k_list.is_none() {
                    let ahead = src.wrapping_offset((p + AHEAD) as isize * col_stride).cast::<u8>();
                    for byte in (0..args.rows * size_of::<T>()).step_by(64) {
                        S::prefetch(ahead.wrapping_add(byte));
                    }
                }
                for t in 0..args.tiles {
                    let to = to.add(t * args.tile_step);
                    match from {
                        Some(from) => S::copy_few(from.add(edges[t]), edges[t + 1] - edges[t], to),
                        None => to.write_bytes(0, S::COL),
                    }
                }
            }
            return;
        }
        let (i_step, p_step) = if args.by_col { (1, S::COL) } else { (ROW, 1) };
        let mut tile = 0;
        for i in 0..args.rows {
            if i == edges[tile + 1] {
                tile += 1;
            }
            let to = dst.add(tile * args.tile_step + (i - edges[tile]) * i_step);
            let Some(row) = place(args.row_list, i) else {
                for p in 0..args.k {
                    *to.add(p * p_step) = 0.0;
                }
                continue;
            };
            let from = src.offset(row * row_stride);
            if !args.by_col && col_stride == 1 && args.row_list.is_none() {
                // A row is a short run of memory, after which the hardware would have to learn the next one.
                let ahead = from.wrapping_offset(ROWS_AHEAD * row_stride).cast::<u8>();
                for byte in (0..args.k * size_of::<T>()).step_by(64) {
                    S::prefetch(ahead.wrapping_add(byte));
                }
            }
            if !args.by_col && col_stride == 1 && args.k_list.is_none() {
                convert::<S, T>(from, args.k, to);
                continue;
            }
            for p in 0..args.k {
                let value = place(args.k_list, p).map_or(0.0, |at| (*from.offset(at * col_stride)).to_f32());
                *to.add(p * p_step) = value;
            }
        }
    }
}

/// Copies `n` contiguous values, converted.
#[inline(always)]
unsafe fn convert<S: Simd, T: Source>(src: *const T, n: usize, dst: *mut f32) {
    let mut p = 0;
    // SAFETY: both hold `n` values.
    unsafe {
        while p + 4 * S::LANES <= n {
            for u in 0..4 {
                S::store(dst.add(p + u * S::LANES), T::load::<S>(src.add(p + u * S::LANES)));
            }
            p += 4 * S::LANES;
        }
        while p + S::LANES <= n {
            S::store(dst.add(p), T::load::<S>(src.add(p)));
            p += S::LANES;
        }
        while p < n {
            *dst.add(p) = (*src.add(p)).to_f32();
            p += 1;
        }
    }
}

/// A block of B to pack.
pub(super) struct ArgsB {
    /// B at the block's first element: rows are k, columns are n.
    pub(super) b: Mat,
    pub(super) k: usize,
    pub(super) n: usize,
    /// Floats from one panel to the next, at least `k * nr`.
    pub(super) panel_step: usize,
    /// [`STAGE`] floats to use in between.
    pub(super) stage: *mut f32,
}

/// Steps of k that pass through the stage at once: long enough runs of memory, and they stay in L1.
const STAGE_K: usize = 128;
/// Floats between rows of the stage, odd in cache lines.
const STAGE_ROW: usize = STAGE_K + 16;
/// Runs to prefetch ahead. Fewer than L1 has ways: they may all fall on the same sets.
const RUNS_AHEAD: usize = 6;
/// Floats of the stage of the largest vectors.
pub(super) const STAGE: usize = 16 * STAGE_ROW;
/// Rows of B to prefetch ahead while packing along rows.
const AHEAD: usize = 8;

pub(super) type PackB = unsafe fn(&ArgsB, *mut f32);

/// Packs a block of B into panels of `nr = 2 * LANES` columns, `dst[panel * panel_step + p * nr + j]`; the last panel
/// is filled up with zeros.
///
/// # Safety
/// The source covers the block; `dst` has `ceil(n / nr) * panel_step` floats.
#[inline(always)]
pub(super) unsafe fn pack_b<S: Simd>(args: &ArgsB, dst: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        match args.b.storage {
            Storage::F32 => pack_b_of::<S, f32>(args, dst),
            Storage::Bf16 => pack_b_of::<S, bf16>(args, dst),
            Storage::F16 => pack_b_of::<S, f16>(args, dst),
        }
    }
}

#[inline(always)]
unsafe fn pack_b_of<S: Simd, T: Source>(args: &ArgsB, dst: *mut f32) {
    let nr = 2 * S::LANES;
    let Mat { data, row_stride, col_stride, .. } = args.b;
    let src = data.cast::<T>();
    let full = args.n / nr;
    // SAFETY: the caller's contract.
    unsafe {
        if col_stride == 1 {
            // Along the rows of B, over all panels: whole rows are what memory delivers fastest.
            for p in 0..args.k {
                let from = src.offset(p as isize * row_stride);
                let ahead = from.wrapping_offset(AHEAD as isize * row_stride).cast::<u8>();
                for panel in 0..full {
                    let to = dst.add(panel * args.panel_step + p * nr);
                    let mut byte = panel * nr * size_of::<T>();
                    while byte < (panel + 1) * nr * size_of::<T>() {
                        S::prefetch(ahead.wrapping_add(byte));
                        byte += 64;
                    }
                    S::store(to, T::load::<S>(from.add(panel * nr)));
                    S::store(to.add(S::LANES), T::load::<S>(from.add(panel * nr + S::LANES)));
                }
            }
        } else if row_stride == 1 {
            for panel in 0..full {
                for half in 0..2 {
                    let from = src.offset((panel * nr + half * S::LANES) as isize * col_stride);
                    let to = dst.add(panel * args.panel_step + half * S::LANES);
                    transpose_columns::<S, T>(from, col_stride, args.k, to, nr, args.stage);
                }
            }
        } else {
            for panel in 0..full {
                let from = src.offset((panel * nr) as isize * col_stride);
                let to = dst.add(panel * args.panel_step);
                for p in 0..args.k {
                    for j in 0..nr {
                        *to.add(p * nr + j) =
                            (*from.offset(p as isize * row_stride + j as isize * col_stride)).to_f32();
                    }
                }
            }
        }
        let rest = args.n - full * nr;
        if rest > 0 {
            let from = src.offset((full * nr) as isize * col_stride);
            let to = dst.add(full * args.panel_step);
            for p in 0..args.k {
                for j in 0..rest {
                    *to.add(p * nr + j) = (*from.offset(p as isize * row_stride + j as isize * col_stride)).to_f32();
                }
                to.add(p * nr + rest).write_bytes(0, nr - rest);
            }
        }
    }
}

/// LANES columns of B that are each contiguous along k become rows of a panel.
///
/// They are copied beside each other first: columns a power of two apart share L1 sets, so that a transpose straight
/// from them would fetch every line twice; and memory delivers long runs faster.
#[inline(always)]
unsafe fn transpose_columns<S: Simd, T: Source>(
    src: *const T,
    stride: isize,
    k: usize,
    dst: *mut f32,
    nr: usize,
    stage: *mut f32,
) {
    let mut done = 0;
    // SAFETY: the caller's contract; the stage has LANES rows.
    unsafe {
        while done < k {
            let len = STAGE_K.min(k - done);
            for j in 0..S::LANES {
                let from = src.offset(j as isize * stride).add(done);
                // The run that comes RUNS_AHEAD runs later: of this round, or of the next one.
                let (column, step) = ((j + RUNS_AHEAD) % S::LANES, (j + RUNS_AHEAD) / S::LANES * STAGE_K);
                let ahead = src.wrapping_offset(column as isize * stride).wrapping_add(done + step).cast::<u8>();
                let mut byte = 0;
                while byte < len * size_of::<T>() {
                    S::prefetch(ahead.wrapping_add(byte));
                    byte += 64;
                }
                convert::<S, T>(from, len, stage.add(j * STAGE_ROW));
            }
            let blocks = len / S::LANES * S::LANES;
            for p in (0..blocks).step_by(S::LANES) {
                let mut rows = [S::zero(); 16];
                for j in 0..S::LANES {
                    rows[j] = S::load(stage.add(j * STAGE_ROW + p));
                }
                S::transpose(&mut rows);
                for q in 0..S::LANES {
                    S::store(dst.add((done + p + q) * nr), rows[q]);
                }
            }
            for p in blocks..len {
                for j in 0..S::LANES {
                    *dst.add((done + p) * nr + j) = *stage.add(j * STAGE_ROW + p);
                }
            }
            done += len;
        }
    }
}
