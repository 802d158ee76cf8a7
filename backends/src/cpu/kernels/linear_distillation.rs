//! Cross-entropy of a linear classifier together with its divergence from a teacher's, without holding the logits of either.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::classifier::{
    ClassifierShape, Rows, TargetOutOfRange, Tiles, Tokens, forward, forward_workspace, gradients, gradients_workspace,
    load_lanes, online_sum, tile_of,
};
use crate::cpu::kernels::linear_cross_entropy::{choose, take_from_targets};
use crate::cpu::kernels::product::{Left, Start, product};
use crate::cpu::kernels::tile::{LANES, Shared, TILE, cut, lanes};
use crate::cpu::vmath;

/// The teacher: its rows and its weights, and the temperature.
#[derive(Clone, Copy, Debug)]
pub struct Teacher<'a, T> {
    /// [N, E].
    pub x: &'a [T],
    /// [V, E].
    pub w: &'a [T],
    /// E.
    pub width: usize,
    /// T.
    pub temperature: f32,
}

impl<T: Element> Teacher<'_, T> {
    fn check(&self, shape: &ClassifierShape) {
        assert!(self.x.len() == shape.rows * self.width && self.w.len() == shape.vocabulary * self.width);
    }

    /// Loads the teacher's rows into lanes, for [`Teacher::logits`].
    fn begin(&self, of: Rows, scratch: &mut [f32]) {
        let (loaded, rest) = scratch.split_at_mut(TILE * self.width);
        load_lanes((self.x, self.width), of, loaded, &mut rest[..TILE * self.width]);
    }

    /// The teacher's logits of a tile of the vocabulary, divided by the temperature, at the end of `scratch`.
    fn logits<'s>(&self, of: Rows, tokens: Tokens, scratch: &'s mut [f32]) -> &'s mut [f32] {
        let mut scratch = scratch;
        let room = cut(&mut scratch, TILE * self.width);
        let x_lanes = cut(&mut scratch, TILE * self.width);
        let left =
            Left { data: tile_of((self.w, self.width), tokens.first, tokens.count, room), row: self.width, step: 1 };
        product([tokens.count, lanes(of.count), self.width], left, (x_lanes, TILE), Start::Zero, (scratch, TILE));
        divide(scratch, self.temperature);
        scratch
    }
}

/// Scratch of [`Teacher::begin`] and [`Teacher::logits`].
const fn teacher_scratch(width: usize) -> usize {
    2 * TILE * width + TILE * TILE
}

/// Logits at a temperature; nothing is done at 1.
pub(super) fn divide(logits: &mut [f32], temperature: f32) {
    if temperature != 1.0 {
        let factor = 1.0 / temperature;
        logits.iter_mut().for_each(|l| *l *= factor);
    }
}

/// Results of the forms of the op, f32 [N] each.
#[derive(Debug)]
pub struct Results<'a> {
    /// Cross-entropy.
    pub loss: &'a mut [f32],
    /// Divergence.
    pub kd: &'a mut [f32],
    /// ln sum exp of the logits.
    pub lse: &'a mut [f32],
    /// The same at the temperature.
    pub soft: &'a mut [f32],
    /// That of the teacher, or of the student's tokens that are not kept of the teacher.
    pub other: &'a mut [f32],
}

/// The results as pieces that tasks write.
pub(super) struct SharedResults([Shared<f32>; 5]);

impl SharedResults {
    pub(super) fn new(results: Results<'_>, rows: usize) -> SharedResults {
        let all = [results.loss, results.kd, results.lse, results.soft, results.other];
        SharedResults(all.map(|result| {
            assert_eq!(result.len(), rows);
            Shared::new(result)
        }))
    }

    /// Those of some rows.
    ///
    /// # Safety
    /// No other live pieces are of any of these rows.
    #[allow(clippy::mut_from_ref)] // As for `Shared::piece`.
    pub(super) unsafe fn of(&self, of: Rows) -> [&mut [f32]; 5] {
        // SAFETY: the caller's promise.
        self.0.each_ref().map(|result| unsafe { result.piece(of.first, of.count) })
    }
}

/// Workspace of [`linear_distillation`] in f32, for `threads` threads: about 3 x 64 x D and 2 x 64 x E each.
pub const fn linear_distillation_workspace(shape: &ClassifierShape, width: usize, threads: usize) -> usize {
    forward_workspace(shape, threads, SUMS * TILE + teacher_scratch(width))
}

/// Rows of running numbers of the forward.
const SUMS: usize = 8;

/// The running numbers of the forward, a row of TILE each: the target's logit, maximum and sum of the student, of the student
/// at the temperature, of the teacher, and the teacher's sum of exponentials times (teacher's logit - student's); then the
/// teacher's scratch.
struct Losses<'a, T> {
    targets: &'a [i32],
    teacher: Teacher<'a, T>,
}

impl<T: Element> Tiles for Losses<'_, T> {
    fn scratch(&self) -> usize {
        SUMS * TILE + teacher_scratch(self.teacher.width)
    }

    fn begin(&self, of: Rows, scratch: &mut [f32]) {
        let (sums, of_teacher) = scratch.split_at_mut(SUMS * TILE);
        sums.fill(0.0);
        for max in [1, 3, 5] {
            sums[max * TILE..][..TILE].fill(f32::NEG_INFINITY);
        }
        self.teacher.begin(of, of_teacher);
    }

    fn tile(&self, of: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]) {
        let (sums, of_teacher) = scratch.split_at_mut(SUMS * TILE);
        let mut sums = sums;
        let [chosen, max, sum, soft_max, soft_sum, teacher_max, teacher_sum, gap] =
            std::array::from_fn(|_| cut(&mut sums, TILE));
        choose(self.targets, of, tokens, logits, chosen);
        let teacher = self.teacher.logits(of, tokens, of_teacher);
        let n = lanes(of.count);
        simd(
            #[inline(always)]
            || online_sum(logits, tokens.count, n, max, sum),
        );
        if self.teacher.temperature != 1.0 {
            divide(&mut logits[..tokens.count * TILE], self.teacher.temperature);
            simd(
                #[inline(always)]
                || online_sum(logits, tokens.count, n, soft_max, soft_sum),
            );
        }
        simd(
            #[inline(always)]
            || online_gap((teacher, logits), tokens.count, n, teacher_max, teacher_sum, gap),
        );
    }
}

/// As [`online_sum`] of the teacher's logits, with the sum of exp(teacher's - maximum) (teacher's - student's) beside it.
#[inline(always)]
fn online_gap(
    (teacher, student): (&[f32], &[f32]),
    count: usize,
    n: usize,
    max: &mut [f32],
    sum: &mut [f32],
    gap: &mut [f32],
) {
    for j in (0..n).step_by(LANES) {
        let mut new = [0.0f32; LANES];
        new.copy_from_slice(&max[j..j + LANES]);
        for token in 0..count {
            let row = &teacher[token * TILE + j..][..LANES];
            for x in 0..LANES {
                new[x] = if row[x] > new[x] { row[x] } else { new[x] };
            }
        }
        let (mut total, mut weighted) = ([0.0f32; LANES], [0.0f32; LANES]);
        for x in 0..LANES {
            let old = vmath::exp_or_zero(max[j + x] - new[x]);
            total[x] = sum[j + x] * old;
            weighted[x] = gap[j + x] * old;
        }
        for token in 0..count {
            let row = &teacher[token * TILE + j..][..LANES];
            let other = &student[token * TILE + j..][..LANES];
            for x in 0..LANES {
                let e = vmath::exp_or_zero(row[x] - new[x]);
                total[x] += e;
                weighted[x] += e * (row[x] - other[x]);
            }
        }
        max[j..j + LANES].copy_from_slice(&new);
        sum[j..j + LANES].copy_from_slice(&total);
        gap[j..j + LANES].copy_from_slice(&weighted);
    }
}

/// With logits = x w^T, q = softmax(logits / T) and p = softmax(teacher's logits / T): loss and lse as of
/// [`super::linear_cross_entropy::linear_cross_entropy`], kd[n] = T^2 (sum over v of p (ln p - ln q)), soft[n] = ln(sum over v of
/// exp(logits[n, v] / T)), and `other` the same of the teacher. A negative target is ignored: loss and kd are 0.
///
/// # Errors
/// [`TargetOutOfRange`] for the first target of V or more; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`linear_distillation_workspace`] (bugs of the caller).
pub fn linear_distillation<T: Element>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    targets: &[i32],
    teacher: Teacher<'_, T>,
    results: Results<'_>,
    workspace: &mut [f32],
) -> Result<(), TargetOutOfRange> {
    shape.check(x, w, targets)?;
    teacher.check(shape);
    let results = SharedResults::new(results, shape.rows);
    let t = teacher.temperature;
    forward(shape, (x, w), &Losses { targets, teacher }, workspace, |of, scratch| {
        // SAFETY: one task has these rows.
        let [loss, kd, lse, soft, of_teacher] = unsafe { results.of(of) };
        let number = |what: usize, r: usize| scratch[what * TILE + r];
        for r in 0..of.count {
            lse[r] = number(1, r) + vmath::ln(number(2, r));
            soft[r] = if t == 1.0 { lse[r] } else { number(3, r) + vmath::ln(number(4, r)) };
            of_teacher[r] = number(5, r) + vmath::ln(number(6, r));
            let ignored = targets[of.first + r] < 0;
            loss[r] = if ignored { 0.0 } else { lse[r] - number(0, r) };
            kd[r] = if ignored { 0.0 } else { t * t * (number(7, r) / number(6, r) + (soft[r] - of_teacher[r])) };
        }
    });
    Ok(())
}

/// Workspace of [`linear_distillation_grad`] in f32, for `threads` threads: about N (D + 256), 3 x 64 x D and 2 x 64 x E each.
pub const fn linear_distillation_grad_workspace(shape: &ClassifierShape, width: usize, threads: usize) -> usize {
    gradients_workspace(shape, threads, GRADS * TILE + teacher_scratch(width))
}

/// What the vjp is given for each row, f32 [N]: what the forward found, and the cotangents of its losses.
#[derive(Clone, Copy, Debug)]
pub struct OfRows<'a> {
    /// As in [`Results`].
    pub lse: &'a [f32],
    /// As in [`Results`].
    pub soft: &'a [f32],
    /// As in [`Results`].
    pub other: &'a [f32],
    /// Cotangent of the loss.
    pub dloss: &'a [f32],
    /// Cotangent of kd.
    pub dkd: &'a [f32],
}

impl OfRows<'_> {
    pub(super) fn check(&self, rows: usize) {
        for slice in [self.lse, self.soft, self.other, self.dloss, self.dkd] {
            assert_eq!(slice.len(), rows);
        }
    }
}

/// Rows of numbers of the gradients.
const GRADS: usize = 5;

/// The cotangents of the logits. Scratch, a row of TILE each: the three lse, the cotangent of the loss, that of kd times T; then the
/// teacher's scratch.
struct LossGrads<'a, T> {
    targets: &'a [i32],
    teacher: Teacher<'a, T>,
    rows: OfRows<'a>,
}

impl<T: Element> Tiles for LossGrads<'_, T> {
    fn scratch(&self) -> usize {
        GRADS * TILE + teacher_scratch(self.teacher.width)
    }

    fn begin(&self, of: Rows, scratch: &mut [f32]) {
        let (numbers, of_teacher) = scratch.split_at_mut(GRADS * TILE);
        // Lanes without a row have logits 0: with these numbers their cotangents are 0.
        numbers.fill(0.0);
        let OfRows { lse, soft, other, dloss, dkd } = self.rows;
        for r in 0..of.count {
            let row = of.first + r;
            // exp(logit - inf) = 0 for every finite logit: the exponential cannot overflow to inf * 0.
            let ignored = [f32::INFINITY, f32::INFINITY, f32::INFINITY, 0.0, 0.0];
            let given = [lse[row], soft[row], other[row], dloss[row], dkd[row] * self.teacher.temperature];
            for (i, number) in (if self.targets[row] < 0 { ignored } else { given }).into_iter().enumerate() {
                numbers[i * TILE + r] = number;
            }
        }
        self.teacher.begin(of, of_teacher);
    }

    fn tile(&self, of: Rows, tokens: Tokens, logits: &mut [f32], scratch: &mut [f32]) {
        let n = lanes(of.count);
        let (mut numbers, of_teacher) = scratch.split_at_mut(GRADS * TILE);
        let [lse, soft, of_all, dloss, dkd] = std::array::from_fn(|_| &cut(&mut numbers, TILE)[..n]);
        let teacher = self.teacher.logits(of, tokens, of_teacher);
        let t = self.teacher.temperature;
        let colder = 1.0 / t;
        simd(
            #[inline(always)]
            || {
                let rows = logits.chunks_exact_mut(TILE).zip(teacher.chunks_exact(TILE));
                for (row, teacher) in rows.take(tokens.count) {
                    let (row, teacher) = (&mut row[..n], &teacher[..n]);
                    if t == 1.0 {
                        // One softmax is both.
                        for x in 0..n {
                            let q = vmath::exp_or_zero(row[x] - lse[x]);
                            let p = vmath::exp_or_zero(teacher[x] - of_all[x]);
                            row[x] = dloss[x] * q + dkd[x] * (q - p);
                        }
                    } else {
                        for x in 0..n {
                            let q = vmath::exp_or_zero(row[x] - lse[x]);
                            let soft_q = vmath::exp_or_zero(row[x] * colder - soft[x]);
                            let p = vmath::exp_or_zero(teacher[x] - of_all[x]);
                            row[x] = dloss[x] * q + dkd[x] * (soft_q - p);
                        }
                    }
                }
            },
        );
        take_from_targets(self.targets, of, tokens, dloss, logits);
    }
}

/// The vjp of [`linear_distillation`] for the student: with q = softmax(logits), Q and P the softmaxes of student and teacher at T,
/// c[n, v] = dloss[n] (q - [v = targets[n]]) + dkd[n] T (Q - P), and 0 where the target is ignored, dx = c w and dw = c^T x.
///
/// # Errors
/// [`TargetOutOfRange`] as the forward; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`linear_distillation_grad_workspace`] (bugs of the caller).
pub fn linear_distillation_grad<T: Element, G: Element>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    targets: &[i32],
    teacher: Teacher<'_, T>,
    rows: OfRows<'_>,
    (dx, dw): (&mut [T], &mut [G]),
    workspace: &mut [f32],
) -> Result<(), TargetOutOfRange> {
    shape.check(x, w, targets)?;
    teacher.check(shape);
    rows.check(shape.rows);
    gradients(shape, (x, w), &LossGrads { targets, teacher, rows }, dx, dw, workspace);
    Ok(())
}

#[cfg(test)]
#[path = "linear_distillation_tests.rs"]
mod tests;
