//! The router: softmax, top-k and the balance losses, forward and backward, in f32.

use crate::cpu::element::simd;
use crate::cpu::vmath;

use super::par::{LANES, Shared, dot, fold, greatest, sum, tasks};

/// Tokens per partial sum of the means over tokens, whatever the thread count.
pub(super) const TOKENS: usize = 32;

/// Which choices count as "routed" in the load-balancing loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BalanceMask {
    /// All k choices, divided by k (Switch for k = 1, ST-MoE, Mixtral).
    TopK,
    /// The first choice only (top-2 of GShard and of DeepSpeed-MoE).
    FirstChoice,
}

/// The scalars [`route`] computes beside the choices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteLosses {
    /// `E sum_e mean_n(p[n, e]) mean_n(m[n, e])`, without a coefficient; 0 without tokens.
    pub load_balancing_loss: f32,
    /// `mean_n(logsumexp(logits[n])^2)`, without a coefficient; 0 without tokens.
    pub z_loss: f32,
    /// `mean_n(-sum_e p[n, e] ln p[n, e])`; 0 without tokens.
    pub entropy: f32,
}

/// The scratch [`route`] needs for `n` tokens and `e` experts, in f32 elements.
pub fn route_workspace(n: usize, e: usize) -> usize {
    n.div_ceil(TOKENS) * (2 * e + 2)
}

/// Softmax of one row into `p`; returns (max, sum of e^(l - max)). A NaN, or no finite logit, makes every p NaN.
#[inline(always)]
pub(super) fn softmax(logits: &[f32], p: &mut [f32]) -> (f32, f32) {
    let max = greatest(logits);
    for (p, &l) in p.iter_mut().zip(logits) {
        *p = vmath::exp(l - max);
    }
    let sum = sum(p);
    let scale = 1.0 / sum;
    for p in p.iter_mut() {
        *p *= scale;
    }
    (max, sum)
}

/// `sum_e p (l - max)`, in which -inf with its p of 0 counts nothing.
#[inline(always)]
pub(super) fn mean_distance(p: &[f32], logits: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    // Where e^x is 0 in f32, any finite distance does.
    let term = |p: f32, l: f32| p * (l - max).max(-1e4);
    let ((p, p_rest), (l, l_rest)) = (p.as_chunks::<LANES>(), logits.as_chunks::<LANES>());
    for (p, l) in p.iter().zip(l) {
        for i in 0..LANES {
            lanes[i] += term(p[i], l[i]);
        }
    }
    for (lane, (&p, &l)) in lanes.iter_mut().zip(p_rest.iter().zip(l_rest)) {
        *lane += term(p, l);
    }
    fold(lanes)
}

/// The `k` largest of `p`, descending, ties to the lowest index. For a row of NaN: the experts 0..k.
#[inline(always)]
fn top_k(p: &[f32], index: &mut [i32], gate: &mut [f32]) {
    let k = index.len();
    gate.fill(-1.0);
    for (block, values) in p.chunks(LANES).enumerate() {
        // Most blocks hold nothing above the k-th value so far, which one vector comparison shows.
        let least = gate[k - 1];
        if !values.iter().fold(false, |any, &v| any | (v > least)) {
            continue;
        }
        for (i, &v) in values.iter().enumerate() {
            if v > gate[k - 1] {
                let mut at = k - 1;
                while at > 0 && v > gate[at - 1] {
                    gate[at] = gate[at - 1];
                    index[at] = index[at - 1];
                    at -= 1;
                }
                gate[at] = v;
                index[at] = (block * LANES + i) as i32;
            }
        }
    }
    // A row is NaN as a whole or not at all, so that either all choices were found or none.
    for j in 0..k {
        if gate[j] < 0.0 {
            index[j] = j as i32;
            gate[j] = p[j];
        }
    }
}

/// Routes `n` tokens over `e` experts.
///
/// p = softmax(logits), and per token the `k` largest p in descending order, ties to the lowest expert index.
/// - `logits` [n, e]
/// - `expert_index` [n, k] and `gate` [n, k] (p at the choice, not renormalised) are written
/// - `counts` `[e]` is written: the choices of each expert, all k included
/// - `workspace` has [`route_workspace`] elements
///
/// The losses are those of [`RouteLosses`]; m is 1 for a choice `mask` counts, divided by k for
/// [`BalanceMask::TopK`]. A token with a NaN logit (or no finite one) gets the experts 0..k with NaN gates.
/// Panics when the sizes disagree or k is not in 1..=e.
pub fn route(
    logits: &[f32],
    n: usize,
    e: usize,
    k: usize,
    mask: BalanceMask,
    expert_index: &mut [i32],
    gate: &mut [f32],
    counts: &mut [i32],
    workspace: &mut [f32],
) -> RouteLosses {
    assert!(0 < k && k <= e, "k is not in 1..=e");
    assert!(logits.len() == n * e && expert_index.len() == n * k && gate.len() == n * k && counts.len() == e);
    let chunks = n.div_ceil(TOKENS);
    let (sums, rest) = workspace[..route_workspace(n, e)].split_at_mut(chunks * e);
    let (rows, scalars) = rest.split_at_mut(chunks * e);
    let (index_out, gate_out) = (Shared::new(expert_index), Shared::new(gate));
    let (sums_out, rows_out, scalars_out) = (Shared::new(&mut *sums), Shared::new(rows), Shared::new(&mut *scalars));
    tasks(chunks, n * e, |c| {
        let (from, to) = (c * TOKENS, n.min((c + 1) * TOKENS));
        // SAFETY: each chunk has its own tokens, its own row of sums and its own pair of scalars.
        let (index, gate, sum, row, scalars) = unsafe {
            (
                index_out.part(from * k, (to - from) * k),
                gate_out.part(from * k, (to - from) * k),
                sums_out.part(c * e, e),
                rows_out.part(c * e, e),
                scalars_out.part(2 * c, 2),
            )
        };
        let logits = &logits[from * e..to * e];
        simd(
            #[inline(always)]
            || {
                sum.fill(0.0);
                scalars.fill(0.0);
                for t in 0..to - from {
                    let (max, total) = softmax(&logits[t * e..(t + 1) * e], row);
                    let lse = max + vmath::ln(total);
                    scalars[0] += lse * lse;
                    scalars[1] += vmath::ln(total) - mean_distance(row, &logits[t * e..(t + 1) * e], max);
                    for (s, &p) in sum.iter_mut().zip(row.iter()) {
                        *s += p;
                    }
                    top_k(row, &mut index[t * k..(t + 1) * k], &mut gate[t * k..(t + 1) * k]);
                }
            },
        );
    });
    finish(expert_index, n, e, k, mask, sums, scalars, counts)
}

/// The counts and losses, from the choices and what each chunk of tokens summed: p of each expert in `sums`, the squared
/// logsumexp and the entropy in `scalars`. A choice outside 0..e counts nothing.
pub(super) fn finish(
    expert_index: &[i32],
    n: usize,
    e: usize,
    k: usize,
    mask: BalanceMask,
    sums: &[f32],
    scalars: &[f32],
    counts: &mut [i32],
) -> RouteLosses {
    let chunks = n.div_ceil(TOKENS);
    counts.fill(0);
    let count = |counts: &mut [i32], choices: std::ops::Range<usize>| {
        for row in expert_index.chunks_exact(k) {
            for x in row[choices.clone()].iter().filter_map(|&x| expert(x, e)) {
                counts[x] += 1;
            }
        }
    };
    let balance = |counts: &[i32]| {
        let of_expert = |(x, &count): (usize, &i32)| {
            let sum: f64 = (0..chunks).map(|c| f64::from(sums[c * e + x])).sum();
            sum * f64::from(count)
        };
        counts.iter().enumerate().map(of_expert).sum::<f64>()
    };
    count(counts, 0..1);
    let (balance, choices_counted) = match mask {
        BalanceMask::FirstChoice => {
            let balance = balance(counts);
            count(counts, 1..k);
            (balance, 1)
        }
        BalanceMask::TopK => {
            count(counts, 1..k);
            (balance(counts), k)
        }
    };
    if n == 0 {
        return RouteLosses { load_balancing_loss: 0.0, z_loss: 0.0, entropy: 0.0 };
    }
    let tokens = n as f64;
    let total = |at| (0..chunks).map(|c| f64::from(scalars[2 * c + at])).sum::<f64>();
    RouteLosses {
        load_balancing_loss: (balance * e as f64 / (tokens * tokens * choices_counted as f64)) as f32,
        z_loss: (total(0) / tokens) as f32,
        entropy: (total(1) / tokens) as f32,
    }
}

/// The scratch [`route_grad`] needs for `e` experts, in f32 elements.
pub fn route_grad_workspace(e: usize) -> usize {
    e
}

/// The expert of a choice, if it is one.
#[inline(always)]
pub(super) fn expert(index: i32, e: usize) -> Option<usize> {
    usize::try_from(index).ok().filter(|&i| i < e)
}

/// What the balance loss with the cotangent `d` adds to dL/dp of every token, for each expert: `d E mean_n(m[n, e]) / n`.
pub(super) fn balance_shift(
    expert_index: &[i32],
    n: usize,
    e: usize,
    k: usize,
    mask: BalanceMask,
    d: f32,
    shift: &mut [f32],
) {
    shift.fill(0.0);
    let counted = match mask {
        BalanceMask::TopK => k,
        BalanceMask::FirstChoice => 1,
    };
    for choices in expert_index.chunks_exact(k.max(1)) {
        for x in choices[..counted].iter().filter_map(|&x| expert(x, e)) {
            shift[x] += 1.0;
        }
    }
    let tokens = n as f64;
    let scale = f64::from(d) * e as f64 / (tokens * tokens * counted as f64);
    shift.iter_mut().for_each(|s| *s = (f64::from(*s) * scale) as f32);
}

/// The gradient of [`route`] with respect to the logits.
///
/// dL/dl = p (d - sum_e d p) + d_z 2 lse p / n, where d[t, e] is `d_gate` at the choices plus
/// d_lb E mean_n(m[n, e]) / n (the mask m has no gradient).
/// - `logits` [n, e], `expert_index` [n, k] as [`route`] gave it (a choice outside 0..e adds nothing)
/// - `d_gate` [n, k], `d_load_balancing_loss`, `d_z_loss`: the cotangents that exist
/// - `d_logits` [n, e] is written; `workspace` has [`route_grad_workspace`] elements
///
/// Panics when the sizes disagree.
pub fn route_grad(
    logits: &[f32],
    expert_index: &[i32],
    n: usize,
    e: usize,
    k: usize,
    mask: BalanceMask,
    d_gate: Option<&[f32]>,
    d_load_balancing_loss: Option<f32>,
    d_z_loss: Option<f32>,
    d_logits: &mut [f32],
    workspace: &mut [f32],
) {
    assert!(logits.len() == n * e && expert_index.len() == n * k && d_logits.len() == n * e);
    assert!(d_gate.is_none_or(|d| d.len() == n * k));
    // What the balance loss adds to dL/dp of every token.
    let shift = &mut workspace[..e];
    balance_shift(expert_index, n, e, k, mask, d_load_balancing_loss.unwrap_or(0.0), shift);
    let shift = &*shift;
    let z_scale = 2.0 * d_z_loss.unwrap_or(0.0) / n.max(1) as f32;
    let out = Shared::new(d_logits);
    tasks(n.div_ceil(TOKENS), n * e, |c| {
        let (from, to) = (c * TOKENS, n.min((c + 1) * TOKENS));
        // SAFETY: each chunk has its own tokens.
        let out = unsafe { out.part(from * e, (to - from) * e) };
        simd(
            #[inline(always)]
            || {
                for t in from..to {
                    let row = &mut out[(t - from) * e..(t - from + 1) * e];
                    let logits = &logits[t * e..(t + 1) * e];
                    let choices = &expert_index[t * k..(t + 1) * k];
                    let (max, sum) = softmax(logits, row);
                    let mut mean = dot(row, shift);
                    if let Some(d) = d_gate {
                        for (&x, &d) in choices.iter().zip(&d[t * k..(t + 1) * k]) {
                            mean += expert(x, e).map_or(0.0, |x| row[x] * d);
                        }
                    }
                    let lse = max + vmath::ln(sum);
                    let minus = mean - if d_z_loss.is_some() { z_scale * lse } else { 0.0 };
                    for (p, &s) in row.iter_mut().zip(shift) {
                        *p *= s - minus;
                    }
                    if let Some(d) = d_gate {
                        for (&x, &d) in choices.iter().zip(&d[t * k..(t + 1) * k]) {
                            if let Some(x) = expert(x, e) {
                                // p again, since its place holds the gradient by now.
                                row[x] += vmath::exp(logits[x] - max) * (1.0 / sum) * d;
                            }
                        }
                    }
                }
            },
        );
    });
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
