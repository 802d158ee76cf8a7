//! The loss of a language model's last layer: a linear map to logits and their cross-entropy, without holding the logits.
//!
//! Rows in tiles of 64 run over the vocabulary in tiles of 64 with a running logsumexp (the online softmax of Milakov and
//! Gimelshein, arXiv:1805.02867); the vjp computes the logits again. The vector lanes run over rows.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::product::{Left, Start, product};
use crate::cpu::kernels::tile::{
    LANES, Shared, TILE, as_f32, cut, lanes, load_rows, share_out, transpose, workspace_of,
};
use crate::cpu::vmath;

/// The sizes of a linear map with cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearCrossEntropyShape {
    /// N, rows of x.
    pub rows: usize,
    /// D, columns of x and of w.
    pub width: usize,
    /// V, rows of w.
    pub vocabulary: usize,
}

/// A target that is no row of w.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("linear_cross_entropy: the target of row {row} is {id}, but there are {vocabulary} tokens in the vocabulary")]
pub struct TargetOutOfRange {
    /// The row.
    pub row: usize,
    /// Its target.
    pub id: i32,
    /// V.
    pub vocabulary: usize,
}

impl LinearCrossEntropyShape {
    fn check<T>(&self, x: &[T], w: &[T], targets: &[i32]) -> Result<(), TargetOutOfRange> {
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

/// Rows of w whose logits the vjp holds at a time, for all rows of x.
const CHUNK: usize = 4 * TILE;

/// Workspace of [`linear_cross_entropy`] in f32, for `threads` threads: about 3 x 64 x D each.
pub const fn linear_cross_entropy_workspace(shape: &LinearCrossEntropyShape, threads: usize) -> usize {
    workspace_of(threads, forward_scratch(shape.width))
}

const fn forward_scratch(width: usize) -> usize {
    3 * TILE * width + TILE * TILE + 3 * TILE
}

/// loss[n] = lse[n] - logits[n, targets[n]], lse[n] = ln(sum over v of exp(logits[n, v])), logits = x w^T.
///
/// `x` [N, D]; `w` [V, D]; `targets`, `loss` (natural logarithm), `lse` [N]. A negative target is ignored: its loss is 0.
/// A row's bits depend neither on the other rows nor on the thread count.
///
/// # Errors
/// [`TargetOutOfRange`] for the first target of V or more; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`linear_cross_entropy_workspace`] (bugs of the
/// caller).
pub fn linear_cross_entropy<T: Element>(
    shape: &LinearCrossEntropyShape,
    x: &[T],
    w: &[T],
    targets: &[i32],
    loss: &mut [f32],
    lse: &mut [f32],
    workspace: &mut [f32],
) -> Result<(), TargetOutOfRange> {
    shape.check(x, w, targets)?;
    let LinearCrossEntropyShape { rows, width, vocabulary } = *shape;
    assert!(loss.len() == rows && lse.len() == rows);
    let (loss, lse) = (Shared::new(loss), Shared::new(lse));
    share_out(rows.div_ceil(TILE), shape.parallel(), workspace, forward_scratch(width), |task, mut scratch| {
        let first = task * TILE;
        let count = TILE.min(rows - first);
        let n = lanes(count);
        // SAFETY: one task has these rows.
        let (loss, lse) = unsafe { (loss.piece(first, count), lse.piece(first, count)) };
        let targets = &targets[first..first + count];
        let loaded = cut(&mut scratch, TILE * width);
        let x_lanes = cut(&mut scratch, TILE * width);
        let w_tile = cut(&mut scratch, TILE * width);
        let logits = cut(&mut scratch, TILE * TILE);
        let max = cut(&mut scratch, TILE);
        let sum = cut(&mut scratch, TILE);
        let chosen = cut(&mut scratch, TILE);
        load_lanes((x, width), first, count, loaded, x_lanes);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        for token in (0..vocabulary).step_by(TILE) {
            let tokens = TILE.min(vocabulary - token);
            let left = Left { data: tile_of((w, width), token, tokens, w_tile), row: width, step: 1 };
            product([tokens, n, width], left, (x_lanes, TILE), Start::Zero, (logits, TILE));
            for (r, &id) in targets.iter().enumerate() {
                if id >= 0 && (token..token + tokens).contains(&(id as usize)) {
                    chosen[r] = logits[(id as usize - token) * TILE + r];
                }
            }
            simd(
                #[inline(always)]
                || online_sum(logits, tokens, n, max, sum),
            );
        }
        simd(
            #[inline(always)]
            || {
                for r in 0..count {
                    lse[r] = max[r] + vmath::ln(sum[r]);
                }
            },
        );
        for r in 0..count {
            loss[r] = if targets[r] < 0 { 0.0 } else { lse[r] - chosen[r] };
        }
    });
    Ok(())
}

/// Rows first..first + count of x, in lanes.
fn load_lanes<T: Element>((x, width): (&[T], usize), first: usize, count: usize, loaded: &mut [f32], to: &mut [f32]) {
    let rows = tile_of((x, width), first, count, loaded);
    simd(
        #[inline(always)]
        || transpose(count, width, (rows, width), to),
    );
}

/// Rows first..first + count as f32: in place if they are, else copied to `tile`.
fn tile_of<'a, T: Element>(
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

/// Brings each lane's running maximum, and sum of exp(logit - maximum), up to date with logits [count, n].
#[inline(always)]
fn online_sum(logits: &[f32], count: usize, n: usize, max: &mut [f32], sum: &mut [f32]) {
    for j in (0..n).step_by(LANES) {
        let mut new = [0.0f32; LANES];
        new.copy_from_slice(&max[j..j + LANES]);
        for token in 0..count {
            let row = &logits[token * TILE + j..][..LANES];
            for x in 0..LANES {
                new[x] = if row[x] > new[x] { row[x] } else { new[x] };
            }
        }
        let mut total = [0.0f32; LANES];
        for x in 0..LANES {
            total[x] = sum[j + x] * vmath::exp_or_zero(max[j + x] - new[x]);
        }
        for token in 0..count {
            let row = &logits[token * TILE + j..][..LANES];
            for x in 0..LANES {
                total[x] += vmath::exp_or_zero(row[x] - new[x]);
            }
        }
        max[j..j + LANES].copy_from_slice(&new);
        sum[j..j + LANES].copy_from_slice(&total);
    }
}

/// Workspace of [`linear_cross_entropy_grad`] in f32, for `threads` threads: about N (D + 256) and 3 x 64 x D each.
pub const fn linear_cross_entropy_grad_workspace(shape: &LinearCrossEntropyShape, threads: usize) -> usize {
    let rows = shape.rows.next_multiple_of(TILE);
    rows * (shape.width + CHUNK) + workspace_of(threads, grad_scratch(shape.width))
}

const fn grad_scratch(width: usize) -> usize {
    let (by_row, by_token) = (3 * TILE * width + 2 * TILE, 2 * TILE * TILE);
    if by_row > by_token { by_row } else { by_token }
}

/// The vjp of [`linear_cross_entropy`]: with dl[n, v] = dloss[n] (exp(logits[n, v] - lse[n]) - [v = targets[n]]), and 0 where
/// the target is ignored, dx = dl w and dw = dl^T x.
///
/// `x`, `dx` [N, D]; `w`, `dw` [V, D]; `targets`, `dloss` [N]; `lse` [N] from the forward. The logits are computed again for
/// 256 tokens of the vocabulary at a time. Sums over rows and over the vocabulary go tile by tile in order, whatever the
/// thread count.
///
/// # Errors
/// [`TargetOutOfRange`] as the forward; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`linear_cross_entropy_grad_workspace`] (bugs of the
/// caller).
pub fn linear_cross_entropy_grad<T: Element, G: Element>(
    shape: &LinearCrossEntropyShape,
    x: &[T],
    w: &[T],
    targets: &[i32],
    lse: &[f32],
    dloss: &[f32],
    dx: &mut [T],
    dw: &mut [G],
    workspace: &mut [f32],
) -> Result<(), TargetOutOfRange> {
    shape.check(x, w, targets)?;
    let LinearCrossEntropyShape { rows, width, vocabulary } = *shape;
    assert!(lse.len() == rows && dloss.len() == rows && dx.len() == x.len() && dw.len() == w.len());
    let tiles = rows.div_ceil(TILE);
    let mut rest = &mut *workspace;
    let dl = cut(&mut rest, tiles * TILE * CHUNK);
    let dx_lanes = Shared::new(cut(&mut rest, tiles * TILE * width));
    let (dx, dw) = (Shared::new(dx), Shared::new(dw));
    if vocabulary == 0 {
        // SAFETY: no other piece is live.
        unsafe { dx.piece(0, rows * width) }.fill(T::from_f32(0.0));
    }
    for chunk in (0..vocabulary).step_by(CHUNK) {
        let tokens = CHUNK.min(vocabulary - chunk);
        let shared = Shared::new(&mut *dl);
        share_out(tiles, shape.parallel(), rest, grad_scratch(width), |tile, scratch| {
            let first = tile * TILE;
            let count = TILE.min(rows - first);
            // SAFETY: one task has these rows.
            let (dl, dx_lanes, dx) = unsafe {
                (
                    shared.piece(first * CHUNK, TILE * CHUNK),
                    dx_lanes.piece(first * width, TILE * width),
                    dx.piece(first * width, count * width),
                )
            };
            let rows = Rows { first, count, targets, lse, dloss };
            logit_grads(&rows, (x, w, width), (chunk, tokens), dl, dx_lanes, scratch);
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
        share_out(tokens.div_ceil(TILE) * columns, shape.parallel(), rest, grad_scratch(width), |task, scratch| {
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
    Ok(())
}

/// A tile of rows, with what belongs to all rows.
struct Rows<'a> {
    first: usize,
    count: usize,
    targets: &'a [i32],
    lse: &'a [f32],
    dloss: &'a [f32],
}

/// The cotangents of the logits of some rows for `tokens` of the vocabulary from `chunk` on, to `dl` [tokens, TILE]; and
/// their part of dx, added to `dx_lanes` [width, TILE] (which it starts if `chunk` is 0).
fn logit_grads<T: Element>(
    rows: &Rows<'_>,
    (x, w, width): (&[T], &[T], usize),
    (chunk, tokens): (usize, usize),
    dl: &mut [f32],
    dx_lanes: &mut [f32],
    mut scratch: &mut [f32],
) {
    let &Rows { first, count, targets, lse, dloss } = rows;
    let n = lanes(count);
    let loaded = cut(&mut scratch, TILE * width);
    let x_lanes = cut(&mut scratch, TILE * width);
    let w_tile = cut(&mut scratch, TILE * width);
    let denominators = cut(&mut scratch, TILE);
    let factors = cut(&mut scratch, TILE);
    load_lanes((x, width), first, count, loaded, x_lanes);
    // Lanes without a row have logits 0: with these numbers their cotangents are 0.
    denominators.fill(0.0);
    factors.fill(0.0);
    for r in 0..count {
        if targets[first + r] >= 0 {
            denominators[r] = lse[first + r];
            factors[r] = dloss[first + r];
        } else {
            // exp(logit - inf) = 0 for every finite logit: the exponential cannot overflow to inf * 0.
            denominators[r] = f32::INFINITY;
        }
    }
    for token in (0..tokens).step_by(TILE) {
        let count_here = TILE.min(tokens - token);
        let w_rows = tile_of((w, width), chunk + token, count_here, w_tile);
        let dl = &mut dl[token * TILE..];
        let left = Left { data: w_rows, row: width, step: 1 };
        product([count_here, n, width], left, (x_lanes, TILE), Start::Zero, (dl, TILE));
        simd(
            #[inline(always)]
            || {
                let (denominators, factors) = (&denominators[..n], &factors[..n]);
                for row in dl.chunks_exact_mut(TILE).take(count_here) {
                    let row = &mut row[..n];
                    for x in 0..n {
                        row[x] = vmath::exp_or_zero(row[x] - denominators[x]) * factors[x];
                    }
                }
            },
        );
        for r in 0..count {
            let id = targets[first + r];
            if id >= 0 && (chunk + token..chunk + token + count_here).contains(&(id as usize)) {
                dl[(id as usize - chunk - token) * TILE + r] -= factors[r];
            }
        }
        let left = Left { data: w_rows, row: 1, step: width };
        let before = if chunk + token == 0 { Start::Zero } else { Start::Keep };
        product([width, n, count_here], left, (dl, TILE), before, (dx_lanes, TILE));
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

#[cfg(test)]
#[path = "linear_cross_entropy_tests.rs"]
mod tests;
