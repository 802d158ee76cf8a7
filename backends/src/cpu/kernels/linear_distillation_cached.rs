//! Cross-entropy of a linear classifier together with its divergence from what is kept of a teacher: the probabilities of its
//! likeliest tokens, and that of all others together.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::classifier::{
    ClassifierShape, Rows, TargetOutOfRange, Tiles, Tokens, forward, forward_workspace, gradients, gradients_workspace,
    online_sum,
};
use crate::cpu::kernels::linear_cross_entropy::{choose, take_from_targets};
use crate::cpu::kernels::linear_distillation::{OfRows, Results, SharedResults, divide};
use crate::cpu::kernels::tile::{TILE, cut, lanes};
use crate::cpu::vmath;

/// What is kept of the teacher.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// Different tokens, [N, K].
    pub ids: &'a [i32],
    /// Their log-probabilities, [N, K].
    pub log_p: &'a [f32],
    /// Logarithm of the probability of all other tokens, [N].
    pub log_tail: &'a [f32],
    /// K.
    pub count: usize,
    /// T, at which these were taken.
    pub temperature: f32,
}

/// A target or a kept token that is no row of w.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutOfRange {
    /// A target.
    #[error(transparent)]
    Target(#[from] TargetOutOfRange),
    /// A kept token.
    #[error("a token kept for row {row} is {id}, but there are {vocabulary} tokens in the vocabulary")]
    Kept {
        /// The row.
        row: usize,
        /// The token.
        id: i32,
        /// V.
        vocabulary: usize,
    },
}

impl Kept<'_> {
    fn check(&self, shape: &ClassifierShape) -> Result<(), OutOfRange> {
        let all = shape.rows * self.count;
        assert!(self.ids.len() == all && self.log_p.len() == all && self.log_tail.len() == shape.rows);
        let vocabulary = shape.vocabulary;
        match self.ids.iter().position(|&id| id < 0 || id as usize >= vocabulary) {
            Some(at) => Err(OutOfRange::Kept { row: at / self.count, id: self.ids[at], vocabulary }),
            None => Ok(()),
        }
    }

    /// Calls `each` with row (in the tile), number of the kept token in `of`, its place in memory and its place in the tile of
    /// logits, for all that lie there.
    #[inline(always)]
    fn in_tile(&self, of: Rows, tokens: Tokens, mut each: impl FnMut(usize, usize, usize)) {
        let ids = &self.ids[of.first * self.count..][..of.count * self.count];
        for (r, ids) in ids.chunks_exact(self.count).enumerate() {
            for (k, &id) in ids.iter().enumerate() {
                if let Some(at) = tokens.place(id) {
                    each(r, r * self.count + k, at * TILE + r);
                }
            }
        }
    }

    /// Kept token `at` of the rows `of`: its log-probability and its probability.
    fn log_p(&self, of: Rows, at: usize) -> (f32, f32) {
        let log_p = self.log_p[of.first * self.count + at];
        (log_p, vmath::exp(log_p))
    }
}

/// Workspace of [`linear_distillation_cached`] in f32, for `threads` threads: about 3 x 64 x D and 64 x K each.
pub const fn linear_distillation_cached_workspace(shape: &ClassifierShape, kept: usize, threads: usize) -> usize {
    forward_workspace(shape, threads, (SUMS + kept) * TILE)
}

/// Rows of running numbers of the forward.
const SUMS: usize = 5;

/// The running numbers of the forward, a row of TILE each: the target's logit, maximum and sum of all tokens (where T is not 1),
/// maximum and sum of those that are not kept; then the logits of those that are.
struct Losses<'a> {
    targets: &'a [i32],
    kept: Kept<'a>,
}

impl Tiles for Losses<'_> {
    fn scratch(&self) -> usize {
        (SUMS + self.kept.count) * TILE
    }

    fn begin(&self, _: Rows, scratch: &mut [f32]) {
        scratch.fill(0.0);
        for max in [1, 3] {
            scratch[max * TILE..][..TILE].fill(f32::NEG_INFINITY);
        }
    }

    fn tile(&self, of: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]) {
        let (mut sums, of_kept) = scratch.split_at_mut(SUMS * TILE);
        let [chosen, max, sum, tail_max, tail_sum] = std::array::from_fn(|_| cut(&mut sums, TILE));
        choose(self.targets, of, tokens, logits, chosen);
        let n = lanes(of.count);
        if self.kept.temperature != 1.0 {
            simd(
                #[inline(always)]
                || online_sum(logits, tokens.count, n, max, sum),
            );
            divide(&mut logits[..tokens.count * TILE], self.kept.temperature);
        }
        self.kept.in_tile(of, tokens, |_, at, place| {
            of_kept[at] = logits[place];
            logits[place] = f32::NEG_INFINITY;
        });
        simd(
            #[inline(always)]
            || online_sum(logits, tokens.count, n, tail_max, tail_sum),
        );
    }
}

/// loss, lse and soft as of [`super::linear_distillation::linear_distillation`]; with the probability of the tokens that are not
/// kept as one number, kd[n] = T^2 (sum over k of p_k (ln p_k - ln q_k) + p_tail (ln p_tail - ln q_tail)), where a probability of
/// 0 adds 0; `other` is ln(sum over the tokens that are not kept of exp(logits[n, v] / T)), -inf if there are none.
///
/// # Errors
/// [`OutOfRange`] for the first target of V or more, or kept token that is none; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`linear_distillation_cached_workspace`] (bugs of the
/// caller).
pub fn linear_distillation_cached<T: Element>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    targets: &[i32],
    kept: Kept<'_>,
    results: Results<'_>,
    workspace: &mut [f32],
) -> Result<(), OutOfRange> {
    shape.check(x, w, targets)?;
    kept.check(shape)?;
    let results = SharedResults::new(results, shape.rows);
    let (t, k) = (kept.temperature, kept.count);
    forward(shape, (x, w), &Losses { targets, kept }, workspace, |of, scratch| {
        // SAFETY: one task has these rows.
        let [loss, kd, lse, soft, tail] = unsafe { results.of(of) };
        let (sums, of_kept) = scratch.split_at(SUMS * TILE);
        for r in 0..of.count {
            let number = |what: usize| sums[what * TILE + r];
            let logits = &of_kept[r * k..][..k];
            tail[r] = number(3) + vmath::ln(number(4));
            let max = logits.iter().fold(tail[r], |max, &l| if l > max { l } else { max });
            let sum = logits.iter().fold(vmath::exp(tail[r] - max), |sum, &l| sum + vmath::exp(l - max));
            soft[r] = max + vmath::ln(sum);
            lse[r] = if t == 1.0 { soft[r] } else { number(1) + vmath::ln(number(2)) };
            if targets[of.first + r] < 0 {
                (loss[r], kd[r]) = (0.0, 0.0);
                continue;
            }
            loss[r] = lse[r] - number(0);
            // A probability of 0 adds 0, also if the student's is 0 too.
            let term = |log_p: f32, p: f32, logit: f32| if p == 0.0 { 0.0 } else { p * (log_p - (logit - soft[r])) };
            let log_tail = kept.log_tail[of.first + r];
            let of_tail = term(log_tail, vmath::exp(log_tail), tail[r]);
            let sum = logits.iter().enumerate().fold(of_tail, |sum, (i, &logit)| {
                let (log_p, p) = kept.log_p(of, r * k + i);
                sum + term(log_p, p, logit)
            });
            kd[r] = t * t * sum;
        }
    });
    Ok(())
}

/// Workspace of [`linear_distillation_cached_grad`] in f32, for `threads` threads: about N (D + 256), and 3 x 64 x D and 64 x K
/// each.
pub const fn linear_distillation_cached_grad_workspace(shape: &ClassifierShape, kept: usize, threads: usize) -> usize {
    gradients_workspace(shape, threads, (GRADS + kept) * TILE)
}

/// Rows of numbers of the gradients.
const GRADS: usize = 7;

/// The cotangents of the logits. Scratch, a row of TILE each: the three lse, the cotangent of the loss, that of kd times T, the
/// latter times the sum of all of the teacher's probabilities, and times that of the tail; then the logits of the kept tokens.
struct LossGrads<'a> {
    targets: &'a [i32],
    kept: Kept<'a>,
    rows: OfRows<'a>,
}

impl Tiles for LossGrads<'_> {
    fn scratch(&self) -> usize {
        (GRADS + self.kept.count) * TILE
    }

    fn begin(&self, of: Rows, scratch: &mut [f32]) {
        // Lanes without a row have logits 0: with these numbers their cotangents are 0.
        scratch.fill(0.0);
        let OfRows { lse, soft, other, dloss, dkd } = self.rows;
        let k = self.kept.count;
        for r in 0..of.count {
            let row = of.first + r;
            let of_row = if self.targets[row] < 0 {
                // exp(logit - inf) = 0 for every finite logit: the exponential cannot overflow to inf * 0.
                [f32::INFINITY, f32::INFINITY, f32::INFINITY, 0.0, 0.0, 0.0, 0.0]
            } else {
                let tail = vmath::exp(self.kept.log_tail[row]);
                let all = (0..k).fold(tail, |sum, i| sum + self.kept.log_p(of, r * k + i).1);
                let dkd = dkd[row] * self.kept.temperature;
                [lse[row], soft[row], other[row], dloss[row], dkd, dkd * all, dkd * tail]
            };
            for (i, number) in of_row.into_iter().enumerate() {
                scratch[i * TILE + r] = number;
            }
        }
    }

    fn tile(&self, of: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]) {
        let n = lanes(of.count);
        let (mut numbers, of_kept) = scratch.split_at_mut(GRADS * TILE);
        let [lse, soft, tail, dloss, dkd, all, of_tail] = std::array::from_fn(|_| &cut(&mut numbers, TILE)[..n]);
        let t = self.kept.temperature;
        let colder = 1.0 / t;
        self.kept.in_tile(of, tokens, |_, at, place| of_kept[at] = logits[place]);
        simd(
            #[inline(always)]
            || {
                for row in logits.chunks_exact_mut(TILE).take(tokens.count) {
                    let row = &mut row[..n];
                    // A token of the tail is at most all of it; of one that is kept, which comes below, it would be anything.
                    let share = |logit: f32, tail: f32| {
                        let above = logit - tail;
                        vmath::exp_or_zero(if above > 0.0 { 0.0 } else { above })
                    };
                    if t == 1.0 {
                        // One softmax is both.
                        for x in 0..n {
                            let q = vmath::exp_or_zero(row[x] - lse[x]);
                            row[x] = (dloss[x] + all[x]) * q - of_tail[x] * share(row[x], tail[x]);
                        }
                    } else {
                        for x in 0..n {
                            let q = vmath::exp_or_zero(row[x] - lse[x]);
                            let cold = row[x] * colder;
                            let soft_q = vmath::exp_or_zero(cold - soft[x]);
                            row[x] = dloss[x] * q + all[x] * soft_q - of_tail[x] * share(cold, tail[x]);
                        }
                    }
                }
            },
        );
        self.kept.in_tile(of, tokens, |r, at, place| {
            if self.targets[of.first + r] >= 0 {
                let logit = of_kept[at];
                let q = vmath::exp_or_zero(logit - lse[r]);
                let soft_q = if t == 1.0 { q } else { vmath::exp_or_zero(logit * colder - soft[r]) };
                logits[place] = dloss[r] * q + all[r] * soft_q - dkd[r] * self.kept.log_p(of, at).1;
            }
        });
        take_from_targets(self.targets, of, tokens, dloss, logits);
    }
}

/// The vjp of [`linear_distillation_cached`] for the student: with q = softmax(logits), Q the same at T and s the sum of all of the
/// teacher's probabilities, c[n, v] = dloss[n] (q - [v = targets[n]]) + dkd[n] T (s Q - P), where P is p_k of a kept token and
/// p_tail exp(logits / T - other) of another, and 0 where the target is ignored; dx = c w and dw = c^T x.
///
/// # Errors
/// [`OutOfRange`] as the forward; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`linear_distillation_cached_grad_workspace`] (bugs of the
/// caller).
pub fn linear_distillation_cached_grad<T: Element, G: Element>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    targets: &[i32],
    kept: Kept<'_>,
    rows: OfRows<'_>,
    (dx, dw): (&mut [T], &mut [G]),
    workspace: &mut [f32],
) -> Result<(), OutOfRange> {
    shape.check(x, w, targets)?;
    kept.check(shape)?;
    rows.check(shape.rows);
    gradients(shape, (x, w), &LossGrads { targets, kept, rows }, dx, dw, workspace);
    Ok(())
}
