//! What the losses of a linear classifier share: its logits `x w^T` tile by tile, and the gradients of x and w from the
//! cotangents of the logits. All logits are never held at once.
//!
//! Rows in tiles of 64 run over the vocabulary in tiles of 64; the vector lanes run over rows.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::product::{Left, Start, product};
use crate::cpu::kernels::tile::{
    LANES, Shared, TILE, as_f32, cut, lanes, load_rows, share_out, transpose, workspace_of,
};
use crate::cpu::vmath;

/// The sizes of a linear classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassifierShape {
    /// N, rows of x.
    pub rows: usize,
    /// D, columns of x and of w.
    pub width: usize,
    /// V, rows of w.
    pub vocabulary: usize,
}

/// A target that is no row of w.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the target of row {row} is {id}, but there are {vocabulary} tokens in the vocabulary")]
pub struct TargetOutOfRange {
    /// The row.
    pub row: usize,
    /// Its target.
    pub id: i32,
    /// V.
    pub vocabulary: usize,
}

impl ClassifierShape {
    /// The lengths are those of the shape, and every target is a token or negative.
    pub(super) fn check<T>(&self, x: &[T], w: &[T], targets: &[i32]) -> Result<(), TargetOutOfRange> {
        let Self { rows, width, vocabulary } = *self;
        assert!(x.len() == rows * width && w.len() == vocabulary * width && targets.len() == rows);
        match targets.iter().position(|&id| id >= 0 && id as usize >= vocabulary) {
            Some(row) => Err(TargetOutOfRange { row, id: targets[row], vocabulary }),
            None => Ok(()),
        }
    }

    /// Below this many multiplications waking another thread costs more than it brings.
    fn parallel(&self) -> bool {
        self.rows * self.width * self.vocabulary > 1 << 17
    }
}

/// A tile of rows: the first one, and how many.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) first: usize,
    pub(super) count: usize,
}

/// A tile of the vocabulary.
#[derive(Clone, Copy)]
pub(super) struct Tokens {
    pub(super) first: usize,
    pub(super) count: usize,
}

impl Tokens {
    /// Where a token lies in the tile, if it is there. Negative ids never are.
    #[inline(always)]
    pub(super) fn place(self, id: i32) -> Option<usize> {
        let at = (id as usize).wrapping_sub(self.first);
        (id >= 0 && at < self.count).then_some(at)
    }
}

/// What is done with the logits of a tile of rows.
pub(super) trait Tiles: Sync {
    /// f32 of scratch memory that a tile of rows keeps between the calls.
    fn scratch(&self) -> usize;

    /// Before the first tile of the vocabulary.
    fn begin(&self, rows: Rows, scratch: &mut [f32]);

    /// Takes the logits of a tile of the vocabulary, `[tokens, TILE]` with the rows in lanes; what it leaves there is for the
    /// gradients the cotangent of each logit, 0 in lanes without a row.
    fn tile(&self, rows: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]);
}

/// Rows of w whose logits the gradients hold at a time, for all rows of x.
const CHUNK: usize = 4 * TILE;

/// Workspace of [`forward`] in f32, for `threads` threads: about 3 x 64 x D each, and `scratch` of the [`Tiles`].
pub(super) const fn forward_workspace(shape: &ClassifierShape, threads: usize, scratch: usize) -> usize {
    workspace_of(threads, forward_scratch(shape.width) + scratch)
}

const fn forward_scratch(width: usize) -> usize {
    3 * TILE * width + TILE * TILE
}

/// Shows all logits to `tiles`, then calls `end` for each tile of rows. A row's bits depend neither on the other rows nor on the
/// thread count.
pub(super) fn forward<T: Element, S: Tiles>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    tiles: &S,
    workspace: &mut [f32],
    end: impl Fn(Rows, &mut [f32]) + Sync,
) {
    let ClassifierShape { rows, width, vocabulary } = *shape;
    let scratch = forward_scratch(width) + tiles.scratch();
    share_out(rows.div_ceil(TILE), shape.parallel(), workspace, scratch, |task, mut scratch| {
        let of = Rows { first: task * TILE, count: TILE.min(rows - task * TILE) };
        let n = lanes(of.count);
        let loaded = cut(&mut scratch, TILE * width);
        let x_lanes = cut(&mut scratch, TILE * width);
        let w_tile = cut(&mut scratch, TILE * width);
        let logits = cut(&mut scratch, TILE * TILE);
        load_lanes((x, width), of, loaded, x_lanes);
        tiles.begin(of, scratch);
        for first in (0..vocabulary).step_by(TILE) {
            let tokens = Tokens { first, count: TILE.min(vocabulary - first) };
            let left = Left { data: tile_of((w, width), first, tokens.count, w_tile), row: width, step: 1 };
            product([tokens.count, n, width], left, (x_lanes, TILE), Start::Zero, (logits, TILE));
            tiles.tile(of, tokens, logits, scratch);
        }
        end(of, scratch);
    });
}

/// Rows of x, in lanes.
pub(super) fn load_lanes<T: Element>((x, width): (&[T], usize), of: Rows, loaded: &mut [f32], to: &mut [f32]) {
    let rows = tile_of((x, width), of.first, of.count, loaded);
    simd(
        #[inline(always)]
        || transpose(of.count, width, (rows, width), to),
    );
}

/// Rows first..first + count as f32: in place if they are, else copied to `tile`.
pub(super) fn tile_of<'a, T: Element>(
    (rows, width): (&'a [T], usize),
    first: usize,
    count: usize,
    tile: &'a mut [f32],
) -> &'a [f32] {
    let rows = &rows[first * width..][..count * width];
    match as_f32(rows) {
        Some(rows) => rows,
        None => {
            simd(
                #[inline(always)]
                || load_rows(count, width, (rows, width), 1.0, (tile, width)),
            );
            tile
        }
    }
}

/// Brings each lane's running maximum, and sum of exp(logit - maximum), up to date with logits [count, n]. A logit of -inf counts
/// nothing.
///
/// The online softmax of Milakov and Gimelshein, arXiv:1805.02867.
#[inline(always)]
pub(super) fn online_sum(logits: &[f32], count: usize, n: usize, max: &mut [f32], sum: &mut [f32]) {
    for j in (0..n).step_by(LANES) {
        let mut new = [0.0f32; LANES];
        new.copy_from_slice(&max[j..j + LANES]);
        for token in 0..count {
            let row = &logits[token * TILE + j..][..LANES];
            for x in 0..LANES {
                new[x] = if row[x] > new[x] { row[x] } else { new[x] };
            }
        }
        // While nothing but -inf was seen there is no maximum to take away.
        let mut shift = [0.0f32; LANES];
        for x in 0..LANES {
            shift[x] = if new[x] == f32::NEG_INFINITY { 0.0 } else { new[x] };
        }
        let mut total = [0.0f32; LANES];
        for x in 0..LANES {
            total[x] = sum[j + x] * vmath::exp_or_zero(max[j + x] - shift[x]);
        }
        for token in 0..count {
            let row = &logits[token * TILE + j..][..LANES];
            for x in 0..LANES {
                total[x] += vmath::exp_or_zero(row[x] - shift[x]);
            }
        }
        max[j..j + LANES].copy_from_slice(&new);
        sum[j..j + LANES].copy_from_slice(&total);
    }
}

/// Workspace of [`gradients`] in f32, for `threads` threads: about N (D + 256), and 3 x 64 x D and `scratch` of the [`Tiles`] each.
pub(super) const fn gradients_workspace(shape: &ClassifierShape, threads: usize, scratch: usize) -> usize {
    let rows = shape.rows.next_multiple_of(TILE);
    rows * (shape.width + CHUNK) + workspace_of(threads, gradients_scratch(shape.width, scratch))
}

const fn gradients_scratch(width: usize, scratch: usize) -> usize {
    let (by_row, by_token) = (3 * TILE * width + scratch, 2 * TILE * TILE);
    if by_row > by_token { by_row } else { by_token }
}

/// dx = c w and dw = c^T x, with the cotangents c of the logits that `tiles` leaves.
///
/// The logits are computed again for 256 tokens of the vocabulary at a time. Sums over rows and over the vocabulary go tile by
/// tile in order, whatever the thread count.
pub(super) fn gradients<T: Element, G: Element>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    tiles: &impl Tiles,
    dx: &mut [T],
    dw: &mut [G],
    workspace: &mut [f32],
) {
    let ClassifierShape { rows, width, vocabulary } = *shape;
    assert!(dx.len() == x.len() && dw.len() == w.len());
    let per_thread = gradients_scratch(width, tiles.scratch());
    let row_tiles = rows.div_ceil(TILE);
    let mut rest = &mut *workspace;
    let dl = cut(&mut rest, row_tiles * TILE * CHUNK);
    let dx_lanes = Shared::new(cut(&mut rest, row_tiles * TILE * width));
    let (dx, dw) = (Shared::new(dx), Shared::new(dw));
    if vocabulary == 0 {
        // SAFETY: no other piece is live.
        unsafe { dx.piece(0, rows * width) }.fill(T::from_f32(0.0));
    }
    for chunk in (0..vocabulary).step_by(CHUNK) {
        let tokens = CHUNK.min(vocabulary - chunk);
        let shared = Shared::new(&mut *dl);
        share_out(row_tiles, shape.parallel(), rest, per_thread, |tile, scratch| {
            let of = Rows { first: tile * TILE, count: TILE.min(rows - tile * TILE) };
            // SAFETY: one task has these rows.
            let (dl, dx_lanes, dx) = unsafe {
                (
                    shared.piece(of.first * CHUNK, TILE * CHUNK),
                    dx_lanes.piece(of.first * width, TILE * width),
                    dx.piece(of.first * width, of.count * width),
                )
            };
            logit_grads(of, (x, w, width), (chunk, tokens), tiles, dl, dx_lanes, scratch);
            if chunk + tokens == vocabulary {
                simd(
                    #[inline(always)]
                    || {
                        for (r, dx) in dx.chunks_exact_mut(width.max(1)).enumerate() {
                            for (d, dx) in dx.iter_mut().enumerate() {
                                *dx = T::from_f32(dx_lanes[d * TILE + r]);
                            }
                        }
                    },
                );
            }
        });
        let dl = &*dl;
        let columns = width.div_ceil(TILE);
        share_out(tokens.div_ceil(TILE) * columns, shape.parallel(), rest, per_thread, |task, scratch| {
            let (token, column) = (task / columns * TILE, task % columns * TILE);
            let (count, wide) = (TILE.min(tokens - token), TILE.min(width - column));
            weight_grad(dl, (token, count), (x, rows, width), (column, wide), scratch);
            for (r, sums) in scratch[..count * TILE].chunks_exact(TILE).enumerate() {
                // SAFETY: one task has these rows and columns of dw.
                let dw = unsafe { dw.piece((chunk + token + r) * width + column, wide) };
                for (dw, sum) in dw.iter_mut().zip(sums) {
                    *dw = G::from_f32(*sum);
                }
            }
        });
    }
}

/// The cotangents of the logits of some rows for `tokens` of the vocabulary from `chunk` on, to `dl` [tokens, TILE]; and
/// their part of dx, added to `dx_lanes` [width, TILE] (which it starts if `chunk` is 0).
fn logit_grads<T: Element>(
    of: Rows,
    (x, w, width): (&[T], &[T], usize),
    (chunk, tokens): (usize, usize),
    tiles: &impl Tiles,
    dl: &mut [f32],
    dx_lanes: &mut [f32],
    mut scratch: &mut [f32],
) {
    let n = lanes(of.count);
    let loaded = cut(&mut scratch, TILE * width);
    let x_lanes = cut(&mut scratch, TILE * width);
    let w_tile = cut(&mut scratch, TILE * width);
    load_lanes((x, width), of, loaded, x_lanes);
    tiles.begin(of, scratch);
    for token in (0..tokens).step_by(TILE) {
        let of_tokens = Tokens { first: chunk + token, count: TILE.min(tokens - token) };
        let w_rows = tile_of((w, width), of_tokens.first, of_tokens.count, w_tile);
        let dl = &mut dl[token * TILE..];
        let left = Left { data: w_rows, row: width, step: 1 };
        product([of_tokens.count, n, width], left, (x_lanes, TILE), Start::Zero, (dl, TILE));
        tiles.tile(of, of_tokens, dl, scratch);
        let left = Left { data: w_rows, row: 1, step: width };
        let before = if of_tokens.first == 0 { Start::Zero } else { Start::Keep };
        product([width, n, of_tokens.count], left, (dl, TILE), before, (dx_lanes, TILE));
    }
}
/// dl^T x for `count` tokens from `token` of the chunk and `wide` columns from `column`, to the first [count, TILE] of
/// `scratch`.
fn weight_grad<T: Element>(
    dl: &[f32],
    (token, count): (usize, usize),
    (x, rows, width): (&[T], usize, usize),
    (column, wide): (usize, usize),
    scratch: &mut [f32],
) {
    let (sums, tile) = scratch.split_at_mut(TILE * TILE);
    let n = lanes(wide);
    // Rows of x that fill whole registers are read in place.
    let in_place = as_f32(x).filter(|_| n == wide);
    tile[..TILE * TILE].fill(0.0);
    for first in (0..rows).step_by(TILE) {
        let rows_here = TILE.min(rows - first);
        let at = first * width + column;
        let right = match in_place {
            Some(x) => (&x[at..], width),
            None => {
                simd(
                    #[inline(always)]
                    || load_rows(rows_here, wide, (&x[at..], width), 1.0, (tile, TILE)),
                );
                (&*tile, TILE)
            }
        };
        let left = Left { data: &dl[first * CHUNK + token * TILE..], row: TILE, step: 1 };
        let before = if first == 0 { Start::Zero } else { Start::Keep };
        product([count, n, rows_here], left, right, before, (sums, TILE));
    }
    if rows == 0 {
        sums.fill(0.0);
    }
}
