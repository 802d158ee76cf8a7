//! The loss of a language model's last layer: a linear map to logits and their cross-entropy, without holding the logits.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::classifier::{
    ClassifierShape, Rows, TargetOutOfRange, Tiles, Tokens, forward, forward_workspace, gradients, gradients_workspace,
    online_sum,
};
use crate::cpu::kernels::tile::{Shared, TILE, lanes};
use crate::cpu::vmath;

/// Workspace of [`linear_cross_entropy`] in f32, for `threads` threads: about 3 x 64 x D each.
pub const fn linear_cross_entropy_workspace(shape: &ClassifierShape, threads: usize) -> usize {
    forward_workspace(shape, threads, 3 * TILE)
}

/// The running sums of the forward. Scratch: maximum, sum and the target's logit of each row.
struct Losses<'a> {
    targets: &'a [i32],
}

/// The target's logit of each row whose target is in the tile.
pub(super) fn choose(targets: &[i32], of: Rows, tokens: Tokens, logits: &[f32], chosen: &mut [f32]) {
    for (r, &id) in targets[of.first..][..of.count].iter().enumerate() {
        if let Some(at) = tokens.place(id) {
            chosen[r] = logits[at * TILE + r];
        }
    }
}

/// Takes `share` of each row from the cotangent of its target, if that is in the tile.
pub(super) fn take_from_targets(targets: &[i32], of: Rows, tokens: Tokens, share: &[f32], cotangents: &mut [f32]) {
    for (r, &id) in targets[of.first..][..of.count].iter().enumerate() {
        if let Some(at) = tokens.place(id) {
            cotangents[at * TILE + r] -= share[r];
        }
    }
}

impl Tiles for Losses<'_> {
    fn scratch(&self) -> usize {
        3 * TILE
    }

    fn begin(&self, _: Rows, scratch: &mut [f32]) {
        scratch[..TILE].fill(f32::NEG_INFINITY);
        scratch[TILE..2 * TILE].fill(0.0);
    }

    fn tile(&self, of: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]) {
        let (max, rest) = scratch.split_at_mut(TILE);
        let (sum, chosen) = rest.split_at_mut(TILE);
        choose(self.targets, of, tokens, logits, chosen);
        simd(
            #[inline(always)]
            || online_sum(logits, tokens.count, lanes(of.count), max, sum),
        );
    }
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
    shape: &ClassifierShape,
    x: &[T],
    w: &[T],
    targets: &[i32],
    loss: &mut [f32],
    lse: &mut [f32],
    workspace: &mut [f32],
) -> Result<(), TargetOutOfRange> {
    shape.check(x, w, targets)?;
    assert!(loss.len() == shape.rows && lse.len() == shape.rows);
    let (loss, lse) = (Shared::new(loss), Shared::new(lse));
    forward(shape, (x, w), &Losses { targets }, workspace, |of, scratch| {
        // SAFETY: one task has these rows.
        let (loss, lse) = unsafe { (loss.piece(of.first, of.count), lse.piece(of.first, of.count)) };
        let (max, sum, chosen) = (&scratch[..TILE], &scratch[TILE..2 * TILE], &scratch[2 * TILE..]);
        simd(
            #[inline(always)]
            || {
                for r in 0..of.count {
                    lse[r] = max[r] + vmath::ln(sum[r]);
                }
            },
        );
        for (r, &target) in targets[of.first..][..of.count].iter().enumerate() {
            loss[r] = if target < 0 { 0.0 } else { lse[r] - chosen[r] };
        }
    });
    Ok(())
}

/// Workspace of [`linear_cross_entropy_grad`] in f32, for `threads` threads: about N (D + 256) and 3 x 64 x D each.
pub const fn linear_cross_entropy_grad_workspace(shape: &ClassifierShape, threads: usize) -> usize {
    gradients_workspace(shape, threads, 2 * TILE)
}

/// The cotangents of the logits. Scratch: of each row what is taken from the logit, and the factor.
struct LossGrads<'a> {
    targets: &'a [i32],
    lse: &'a [f32],
    dloss: &'a [f32],
}

impl Tiles for LossGrads<'_> {
    fn scratch(&self) -> usize {
        2 * TILE
    }

    fn begin(&self, of: Rows, scratch: &mut [f32]) {
        let (denominators, factors) = scratch.split_at_mut(TILE);
        // Lanes without a row have logits 0: with these numbers their cotangents are 0.
        denominators.fill(0.0);
        factors.fill(0.0);
        for r in 0..of.count {
            if self.targets[of.first + r] >= 0 {
                denominators[r] = self.lse[of.first + r];
                factors[r] = self.dloss[of.first + r];
            } else {
                // exp(logit - inf) = 0 for every finite logit: the exponential cannot overflow to inf * 0.
                denominators[r] = f32::INFINITY;
            }
        }
    }

    fn tile(&self, of: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]) {
        let n = lanes(of.count);
        let (denominators, factors) = scratch.split_at(TILE);
        simd(
            #[inline(always)]
            || {
                let (denominators, factors) = (&denominators[..n], &factors[..n]);
                for row in logits.chunks_exact_mut(TILE).take(tokens.count) {
                    let row = &mut row[..n];
                    for x in 0..n {
                        row[x] = vmath::exp_or_zero(row[x] - denominators[x]) * factors[x];
                    }
                }
            },
        );
        take_from_targets(self.targets, of, tokens, factors, logits);
    }
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
    shape: &ClassifierShape,
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
    assert!(lse.len() == shape.rows && dloss.len() == shape.rows);
    gradients(shape, (x, w), &LossGrads { targets, lse, dloss }, dx, dw, workspace);
    Ok(())
}

#[cfg(test)]
#[path = "linear_cross_entropy_tests.rs"]
mod tests;
