//! Every other router than the plain softmax one: the general forward and backward, one token at a time, in f32.

use moebius_ir::ops::{GroupScore, Groups, NoiseUse, Router, Score};

use super::par::{Shared, dot, greatest, sum, tasks};
use super::route::{BalanceMask, RouteLosses, TOKENS, balance_shift, expert, finish, mean_distance, softmax};
use crate::cpu::element::simd;
use crate::cpu::vmath;

/// Rows of E elements that the forward of a chunk works in: p, the score values, the selection values, the scores of the
/// groups and which of them stay.
const ROWS: usize = 5;
/// Rows of E elements that the backward of a chunk works in: the score values and a softmax of SparseMixer.
const GRAD_ROWS: usize = 2;

/// What a token's route depends on beside the router; all row-major.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[n, e]`.
    pub logits: &'a [f32],
    /// `[e]`.
    pub selection_bias: Option<&'a [f32]>,
    /// `[n, e]`, and where it counts.
    pub noise: Option<(&'a [f32], NoiseUse)>,
    /// `[n]`, 0 for a token that goes nowhere.
    pub used: Option<&'a [u8]>,
    /// `[n, k]`: the choices, if they are given.
    pub choices: Option<&'a [i32]>,
}

/// The scratch [`route_any`] needs for `n` tokens and `e` experts, in f32 elements.
pub fn route_any_workspace(n: usize, e: usize) -> usize {
    n.div_ceil(TOKENS) * ((1 + ROWS) * e + 2)
}

/// Routes `n` tokens over `e` experts as [`moebius_ir::ops::Route`] says.
///
/// `expert_index` and `gate` `[n, k]` and `counts` `[e]` are written; `workspace` has [`route_any_workspace`] elements. Panics when
/// the sizes disagree.
pub fn route_any(
    router: &Router,
    mask: BalanceMask,
    inputs: Inputs<'_>,
    n: usize,
    e: usize,
    expert_index: &mut [i32],
    gate: &mut [f32],
    counts: &mut [i32],
    workspace: &mut [f32],
) -> RouteLosses {
    let k = router.k;
    assert!(inputs.logits.len() == n * e && expert_index.len() == n * k && gate.len() == n * k);
    let chunks = n.div_ceil(TOKENS);
    let (sums, rest) = workspace[..route_any_workspace(n, e)].split_at_mut(chunks * e);
    let (scalars, rows) = rest.split_at_mut(chunks * 2);
    let (index_out, gate_out) = (Shared::new(expert_index), Shared::new(gate));
    let (sums_out, rows_out, scalars_out) = (Shared::new(&mut *sums), Shared::new(rows), Shared::new(&mut *scalars));
    tasks(chunks, 4 * n * e, |c| {
        let (from, to) = (c * TOKENS, n.min((c + 1) * TOKENS));
        // SAFETY: each chunk has its own tokens, its own rows and its own pair of scalars.
        let (index, gate, sums, rows, scalars) = unsafe {
            (
                index_out.part(from * k, (to - from) * k),
                gate_out.part(from * k, (to - from) * k),
                sums_out.part(c * e, e),
                rows_out.part(c * ROWS * e, ROWS * e),
                scalars_out.part(c * 2, 2),
            )
        };
        simd(
            #[inline(always)]
            || {
                sums.fill(0.0);
                scalars.fill(0.0);
                for t in from..to {
                    let at = (t - from) * k..(t - from + 1) * k;
                    token(router, inputs, t, e, &mut index[at.clone()], &mut gate[at], sums, rows, scalars);
                }
            },
        );
    });
    finish(expert_index, n, e, k, mask, sums, scalars, counts)
}

/// Routes token `t`, adding its p and its statistics to those of the chunk.
#[inline(always)]
fn token(
    router: &Router,
    inputs: Inputs<'_>,
    t: usize,
    e: usize,
    index: &mut [i32],
    gate: &mut [f32],
    sums: &mut [f32],
    rows: &mut [f32],
    scalars: &mut [f32],
) {
    let k = index.len();
    let logits = &inputs.logits[t * e..(t + 1) * e];
    let (p, rows) = rows.split_at_mut(e);
    let (value, rows) = rows.split_at_mut(e);
    let (selection, groups) = rows.split_at_mut(e);
    let (max, total) = softmax(logits, p);
    let lse = max + vmath::ln(total);
    scalars[0] += lse * lse;
    let finite = !total.is_nan();
    values(router.score, logits, p, value);
    match router.score {
        Score::Sigmoid | Score::SqrtSoftplus if finite => {
            normalise(value, p);
            scalars[1] -= p.iter().map(|&p| p * vmath::ln(p.max(f32::MIN_POSITIVE))).sum::<f32>();
        }
        Score::Softmax | Score::Identity | Score::SparseMixer { .. } | Score::Sigmoid | Score::SqrtSoftplus => {
            scalars[1] += vmath::ln(total) - mean_distance(p, logits, max);
        }
    }
    for (s, &p) in sums.iter_mut().zip(p.iter()) {
        *s += p;
    }
    if inputs.used.is_some_and(|used| used[t] == 0) {
        index.fill(-1);
    } else if let Some(choices) = inputs.choices {
        for (to, &choice) in index.iter_mut().zip(&choices[t * k..(t + 1) * k]) {
            *to = expert(choice, e).map_or(-1, |x| x as i32);
        }
    } else if finite {
        let noise = inputs.noise.map(|(noise, of)| (&noise[t * e..(t + 1) * e], of));
        choose(router, logits, value, inputs.selection_bias, noise, selection, groups, index);
    } else {
        (0..).zip(index.iter_mut()).for_each(|(x, to)| *to = x);
    }
    for (j, g) in gate.iter_mut().enumerate() {
        let Some(x) = expert(index[j], e) else {
            *g = 0.0;
            continue;
        };
        *g = match router.score {
            Score::SparseMixer { .. } if !finite => f32::NAN,
            Score::SparseMixer { jitter_eps } => {
                // The values are the logits left, in which taken ones become -inf.
                let sum = mixer(value, jitter_eps as f32, selection);
                value[x] = f32::NEG_INFINITY;
                if sum > 0.0 { selection[x] / sum } else { 0.0 }
            }
            Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus | Score::Identity => value[x],
        };
    }
}

/// The score values, for SparseMixer the logits; NaN in a row whose softmax `p` is NaN.
#[inline(always)]
fn values(score: Score, logits: &[f32], p: &[f32], value: &mut [f32]) {
    match score {
        Score::Softmax => value.copy_from_slice(p),
        Score::Identity | Score::SparseMixer { .. } => value.copy_from_slice(logits),
        Score::Sigmoid => value.iter_mut().zip(logits).for_each(|(v, &l)| *v = vmath::sigmoid(l)),
        Score::SqrtSoftplus => value.iter_mut().zip(logits).for_each(|(v, &l)| *v = sqrt_softplus(l)),
    }
    if p[0].is_nan() {
        value.fill(f32::NAN);
    }
}

#[inline(always)]
fn sqrt_softplus(l: f32) -> f32 {
    let x = vmath::exp(-l.abs());
    let u = 1.0 + x;
    // ln(1 + x), without what rounding 1 + x loses.
    let ln_1p = if u == 1.0 { x } else { vmath::ln(u) * x / (u - 1.0) };
    (l.max(0.0) + ln_1p).sqrt()
}

/// dv/dl of a score that each logit has by itself.
#[inline(always)]
fn slope(score: Score, logit: f32, value: f32) -> f32 {
    match score {
        Score::Sigmoid => value * vmath::sigmoid(-logit),
        Score::SqrtSoftplus => {
            if value > 0.0 {
                vmath::sigmoid(logit) / (2.0 * value)
            } else {
                0.0
            }
        }
        Score::Identity | Score::Softmax | Score::SparseMixer { .. } => 1.0,
    }
}

/// `p = value / sum(value)`, uniform where all values are 0. Returns the sum, 0 in that case.
#[inline(always)]
fn normalise(value: &[f32], p: &mut [f32]) -> f32 {
    let sum = sum(value);
    if sum < f32::MIN_POSITIVE {
        p.fill(1.0 / p.len() as f32);
        return 0.0;
    }
    p.iter_mut().zip(value).for_each(|(p, &v)| *p = v / sum);
    sum
}

/// The weights of SparseMixer's softmax over the logits left, and their sum; see [`Score::SparseMixer`].
#[inline(always)]
fn mixer(left: &[f32], jitter_eps: f32, weight: &mut [f32]) -> f32 {
    let best = greatest(left);
    if best == f32::NEG_INFINITY {
        return 0.0;
    }
    for (w, &l) in weight.iter_mut().zip(left) {
        let near = best - l <= 2.0 * jitter_eps * best.max(l.abs());
        *w = if near { vmath::exp(l - best) } else { 0.0 };
    }
    sum(weight)
}

/// Writes the experts of a token that chooses by itself.
#[inline(always)]
fn choose(
    router: &Router,
    logits: &[f32],
    value: &[f32],
    bias: Option<&[f32]>,
    noise: Option<(&[f32], NoiseUse)>,
    selection: &mut [f32],
    groups: &mut [f32],
    index: &mut [i32],
) {
    let select = |selection: &mut [f32], noise: Option<&[f32]>| {
        match noise {
            Some(noise) => selection.iter_mut().zip(logits.iter().zip(noise)).for_each(|(s, (&l, &z))| *s = l + z),
            None => selection.copy_from_slice(value),
        }
        if let Some(bias) = bias {
            selection.iter_mut().zip(bias).for_each(|(s, &b)| *s += b);
        }
        selection.iter_mut().for_each(|s| *s = if s.is_nan() { f32::NEG_INFINITY } else { *s });
    };
    let later = noise.filter(|&(_, of)| of == NoiseUse::LaterChoices).map(|(noise, _)| noise);
    select(selection, if later.is_some() { None } else { noise.map(|(noise, _)| noise) });
    let mut size = 1;
    if let Some(of) = router.groups {
        size = keep_groups(of, selection, groups);
    }
    let grouped = router.groups.is_some();
    let kept = &groups[logits.len()..];
    let candidate = |x: usize| !grouped || kept[x / size] > 0.0;
    match later {
        Some(noise) => {
            let (first, others) = index.split_at_mut(1);
            largest(selection, candidate, first);
            select(selection, Some(noise));
            let best = first[0];
            largest(selection, |x| x as i32 != best && candidate(x), others);
        }
        None => largest(selection, candidate, index),
    }
}

/// Marks the groups that stay with 1 in the second row of `groups`, after their scores in the first; returns their size.
#[inline(always)]
fn keep_groups(of: Groups, selection: &[f32], groups: &mut [f32]) -> usize {
    let e = selection.len();
    let size = e / of.count;
    let (scores, kept) = groups.split_at_mut(e);
    kept.fill(0.0);
    for (score, group) in scores.iter_mut().zip(selection.chunks_exact(size)) {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &v in group {
            second = second.max(first.min(v));
            first = first.max(v);
        }
        let value = match of.by {
            GroupScore::Max => first,
            GroupScore::Top2Sum => first + second,
        };
        *score = if value.is_nan() { f32::NEG_INFINITY } else { value };
    }
    for _ in 0..of.keep {
        let mut best = None;
        for g in (0..of.count).filter(|&g| kept[g] == 0.0) {
            if best.is_none_or(|b: usize| scores[g] > scores[b]) {
                best = Some(g);
            }
        }
        best.into_iter().for_each(|g| kept[g] = 1.0);
    }
    size
}

/// The largest values of the candidates, descending, ties to the lowest index; there are enough candidates.
#[inline(always)]
fn largest(values: &[f32], candidate: impl Fn(usize) -> bool, index: &mut [i32]) {
    let k = index.len();
    let mut filled = 0;
    for (x, &v) in values.iter().enumerate() {
        let full = filled == k;
        let above = |index: &[i32], at: usize| v > values[index[at] as usize];
        if k == 0 || full && !above(index, k - 1) || !candidate(x) {
            continue;
        }
        let mut at = if full { k - 1 } else { filled };
        while at > 0 && above(index, at - 1) {
            index[at] = index[at - 1];
            at -= 1;
        }
        index[at] = x as i32;
        filled = k.min(filled + 1);
    }
}

/// The scratch [`route_any_grad`] needs for `n` tokens and `e` experts, in f32 elements.
pub fn route_any_grad_workspace(n: usize, e: usize) -> usize {
    e + n.div_ceil(TOKENS) * GRAD_ROWS * e
}

/// The gradient of [`route_any`] with respect to the logits; see [`moebius_ir::ops::RouteGrad`].
///
/// `d_logits` `[n, e]` is written; `workspace` has [`route_any_grad_workspace`] elements. Panics when the sizes disagree.
pub fn route_any_grad(
    score: Score,
    mask: BalanceMask,
    logits: &[f32],
    expert_index: &[i32],
    n: usize,
    e: usize,
    k: usize,
    d_gate: &[f32],
    d_load_balancing_loss: f32,
    d_z_loss: f32,
    d_logits: &mut [f32],
    workspace: &mut [f32],
) {
    assert!(logits.len() == n * e && expert_index.len() == n * k && d_gate.len() == n * k && d_logits.len() == n * e);
    let (shift, rows) = workspace[..route_any_grad_workspace(n, e)].split_at_mut(e);
    balance_shift(expert_index, n, e, k, mask, d_load_balancing_loss, shift);
    let shift = &*shift;
    let z_scale = 2.0 * d_z_loss / n.max(1) as f32;
    let (out, rows) = (Shared::new(d_logits), Shared::new(rows));
    tasks(n.div_ceil(TOKENS), 4 * n * e, |c| {
        let (from, to) = (c * TOKENS, n.min((c + 1) * TOKENS));
        // SAFETY: each chunk has its own tokens and its own rows.
        let (out, rows) = unsafe { (out.part(from * e, (to - from) * e), rows.part(c * GRAD_ROWS * e, GRAD_ROWS * e)) };
        simd(
            #[inline(always)]
            || {
                for t in from..to {
                    let d = &mut out[(t - from) * e..(t - from + 1) * e];
                    let at = t * k..(t + 1) * k;
                    let (logits, choices) = (&logits[t * e..(t + 1) * e], &expert_index[at.clone()]);
                    token_grad(score, logits, choices, &d_gate[at], shift, z_scale, d, rows);
                }
            },
        );
    });
}

/// The gradient of one token's logits.
#[inline(always)]
fn token_grad(
    score: Score,
    logits: &[f32],
    choices: &[i32],
    d_gate: &[f32],
    shift: &[f32],
    z_scale: f32,
    d: &mut [f32],
    rows: &mut [f32],
) {
    let e = logits.len();
    let (value, row) = rows.split_at_mut(e);
    let (max, total) = softmax(logits, d);
    if total.is_nan() {
        d.fill(f32::NAN);
        return;
    }
    let of_z = z_scale * (max + vmath::ln(total));
    values(score, logits, d, value);
    match score {
        Score::Sigmoid | Score::SqrtSoftplus => {
            d.iter_mut().for_each(|d| *d *= of_z);
            let sum = normalise(value, row);
            if sum > 0.0 {
                let mean = dot(row, shift);
                for x in 0..e {
                    d[x] += slope(score, logits[x], value[x]) / sum * (shift[x] - mean);
                }
            }
        }
        Score::Softmax | Score::Identity | Score::SparseMixer { .. } => {
            let minus = dot(d, shift) - of_z;
            d.iter_mut().zip(shift).for_each(|(d, &s)| *d *= s - minus);
        }
    }
    for (&choice, &of_gate) in choices.iter().zip(d_gate) {
        let Some(x) = expert(choice, e) else { continue };
        match score {
            Score::SparseMixer { jitter_eps } => {
                let sum = mixer(value, jitter_eps as f32, row);
                value[x] = f32::NEG_INFINITY;
                if sum > 0.0 {
                    let q = row[x] / sum;
                    d.iter_mut().zip(row.iter()).for_each(|(d, &w)| *d -= of_gate * q * (w / sum));
                    d[x] += of_gate * q;
                }
            }
            // Never lowered to this kernel: the plain softmax router has its own.
            Score::Softmax => {
                softmax(logits, row);
                let q = row[x];
                d.iter_mut().zip(row.iter()).for_each(|(d, &p)| *d -= of_gate * q * p);
                d[x] += of_gate * q;
            }
            Score::Sigmoid | Score::SqrtSoftplus | Score::Identity => {
                d[x] += of_gate * slope(score, logits[x], value[x]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, bits, same_on_any_thread_count};
    use super::*;
    use moebius_ir::ops::Balance;

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (n, e, k) = (2000, 24, 3);
        let mut rng = Rng(8);
        let (logits, d_gate, bias) = (rng.values(n * e, 4.0), rng.values(n * k, 1.0), rng.values(e, 1.0));
        let noise = rng.values(n * e, 1.0);
        for score in [Score::Sigmoid, Score::SqrtSoftplus, Score::Identity, Score::SparseMixer { jitter_eps: 0.1 }] {
            let groups = Some(Groups { count: 4, keep: 2, by: GroupScore::Top2Sum });
            let router = Router { score, groups, ..Router::softmax(k, Balance::AllChoices) };
            let noise = Some((&noise[..], NoiseUse::LaterChoices));
            let inputs = Inputs { logits: &logits, selection_bias: Some(&bias), noise, used: None, choices: None };
            same_on_any_thread_count(|| {
                let (mut index, mut gate, mut counts) = (vec![-7; n * k], vec![f32::NAN; n * k], vec![-7; e]);
                let mut work = vec![f32::NAN; route_any_workspace(n, e).max(route_any_grad_workspace(n, e))];
                let mask = BalanceMask::TopK;
                let losses = route_any(&router, mask, inputs, n, e, &mut index, &mut gate, &mut counts, &mut work);
                let scalars = [losses.load_balancing_loss, losses.z_loss, losses.entropy];
                let mut d = vec![f32::NAN; n * e];
                route_any_grad(score, mask, &logits, &index, n, e, k, &d_gate, 0.5, 0.25, &mut d, &mut work);
                assert!(d.iter().chain(&gate).chain(&scalars).all(|v| v.is_finite()));
                (index, bits(&gate), counts, bits(&scalars), bits(&d))
            });
        }
    }
}
