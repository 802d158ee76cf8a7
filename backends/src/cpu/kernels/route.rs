//! The router: softmax, top-k and the balance losses, forward and backward, in f32.

use crate::cpu::element::simd;
use crate::cpu::vmath;

use super::par::{LANES, Shared, dot, fold, greatest, sum, tasks};

/// Tokens per partial sum of the means over tokens, whatever the thread count.
const TOKENS: usize = 32;

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
fn softmax(logits: &[f32], p: &mut [f32]) -> (f32, f32) {
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
fn mean_distance(p: &[f32], logits: &[f32], max: f32) -> f32 {
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
    counts.fill(0);
    for t in 0..n {
        counts[expert_index[t * k] as usize] += 1;
    }
    let later_choices = |counts: &mut [i32]| {
        for choices in expert_index.chunks_exact(k) {
            for &e in &choices[1..] {
                counts[e as usize] += 1;
            }
        }
    };
    let mut balance = 0.0_f64;
    let mut add_balance = |counts: &[i32]| {
        for (x, &count) in counts.iter().enumerate() {
            let sum: f64 = (0..chunks).map(|c| f64::from(sums[c * e + x])).sum();
            balance += sum * f64::from(count);
        }
    };
    let choices_counted = match mask {
        BalanceMask::FirstChoice => {
            add_balance(counts);
            later_choices(counts);
            1
        }
        BalanceMask::TopK => {
            later_choices(counts);
            add_balance(counts);
            k
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
fn expert(index: i32, e: usize) -> Option<usize> {
    usize::try_from(index).ok().filter(|&i| i < e)
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
    shift.fill(0.0);
    if let Some(d) = d_load_balancing_loss {
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
mod tests {
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;

    type Routed = (Vec<i32>, Vec<f32>, Vec<i32>, RouteLosses);

    fn run(logits: &[f32], n: usize, e: usize, k: usize, mask: BalanceMask) -> Routed {
        let (mut index, mut gate, mut counts) = (vec![-7; n * k], vec![f32::NAN; n * k], vec![-7; e]);
        let mut workspace = vec![f32::NAN; route_workspace(n, e)];
        let losses = route(logits, n, e, k, mask, &mut index, &mut gate, &mut counts, &mut workspace);
        (index, gate, counts, losses)
    }

    fn softmax64(logits: &[f32]) -> (Vec<f64>, f64) {
        let max = logits.iter().fold(f64::MIN, |m, &l| m.max(f64::from(l)));
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        (logits.iter().map(|&l| (f64::from(l) - max).exp() / sum).collect(), max + sum.ln())
    }

    /// L = sum(d_gate * gate) + d_lb * balance + d_z * z in f64, at fixed choices, with the mask held constant.
    fn loss64(
        logits: &[f64],
        index: &[i32],
        (n, e, k): (usize, usize, usize),
        mask: BalanceMask,
        d_gate: &[f32],
        (d_lb, d_z): (f64, f64),
    ) -> f64 {
        let (mut me, mut ce, mut z, mut total) = (vec![0.0; e], vec![0.0; e], 0.0, 0.0);
        for t in 0..n {
            let row = &logits[t * e..(t + 1) * e];
            let sum: f64 = row.iter().map(|l| l.exp()).sum();
            z += sum.ln().powi(2) / n as f64;
            for x in 0..e {
                me[x] += row[x].exp() / sum / n as f64;
            }
            for j in 0..k {
                let x = index[t * k + j] as usize;
                total += f64::from(d_gate[t * k + j]) * row[x].exp() / sum;
                match mask {
                    BalanceMask::TopK => ce[x] += 1.0 / (n * k) as f64,
                    BalanceMask::FirstChoice => ce[x] += if j == 0 { 1.0 / n as f64 } else { 0.0 },
                }
            }
        }
        let balance: f64 = (0..e).map(|x| me[x] * ce[x]).sum::<f64>() * e as f64;
        total + d_lb * balance + d_z * z
    }

    #[test]
    fn forward_against_f64() {
        let mut rng = Rng(1);
        let sizes =
            [(1, 1, 1), (1, 8, 8), (1, 128, 2), (7, 5, 3), (200, 17, 17), (33, 64, 1), (1000, 40, 6), (0, 4, 2)];
        for (n, e, k) in sizes {
            for mask in [BalanceMask::TopK, BalanceMask::FirstChoice] {
                let logits = rng.values(n * e, 6.0);
                let (index, gate, counts, losses) = run(&logits, n, e, k, mask);
                let mut want_counts = vec![0; e];
                let (mut want_gate, mut z) = (vec![], 0.0);
                for t in 0..n {
                    let (p, lse) = softmax64(&logits[t * e..(t + 1) * e]);
                    z += lse * lse / n as f64;
                    let mut order: Vec<usize> = (0..e).collect();
                    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
                    for j in 0..k {
                        let x = index[t * k + j] as usize;
                        want_counts[x] += 1;
                        // Two logits may be too close for f32 to keep apart: then the probabilities agree closely.
                        assert!(x == order[j] || (p[x] - p[order[j]]).abs() < 1e-6 * p[x]);
                        want_gate.push(p[x]);
                    }
                    let mut distinct = index[t * k..(t + 1) * k].to_vec();
                    distinct.sort_unstable();
                    distinct.dedup();
                    assert_eq!(distinct.len(), k);
                }
                assert_eq!(counts, want_counts);
                assert_close(&gate, &want_gate, 2e-6);
                assert_close(&[losses.z_loss], &[z], 1e-5);
                let logits64: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
                let balance = loss64(&logits64, &index, (n, e, k), mask, &vec![0.0; n * k], (1.0, 0.0));
                assert_close(&[losses.load_balancing_loss], &[if n == 0 { 0.0 } else { balance }], 1e-5);
            }
        }
    }

    #[test]
    fn ties_go_to_the_lowest_expert_index() {
        let logits = [0.0, 1.0, 1.0, 0.0, 1.0, -200.0, -300.0, 0.0].repeat(5);
        let (index, gate, ..) = run(&logits, 1, 40, 40, BalanceMask::TopK);
        // Groups of equal probability (two of them 0 in f32), each in ascending order.
        for group in [0..15, 15..30, 30..40] {
            assert!(index[group.clone()].windows(2).all(|w| w[0] < w[1]), "{:?}", &index[group]);
        }
        assert!(gate.windows(2).all(|w| w[0] >= w[1]));
    }

    #[test]
    fn nan_and_infinite_logits_keep_indices_in_range() {
        let (n, e, k) = (6, 20, 3);
        let mut logits = Rng(3).values(n * e, 1.0);
        logits[4] = f32::NAN;
        logits[e + 3] = f32::INFINITY;
        logits[2 * e..3 * e].fill(f32::NEG_INFINITY);
        logits[3 * e..4 * e].fill(f32::NAN);
        logits[4 * e..5 * e - 1].fill(f32::NEG_INFINITY);
        let (index, gate, counts, losses) = run(&logits, n, e, k, BalanceMask::TopK);
        for t in 0..4 {
            assert_eq!(index[t * k..(t + 1) * k], [0, 1, 2]);
            assert!(gate[t * k..(t + 1) * k].iter().all(|g| g.is_nan()));
        }
        assert_eq!((&index[12..15], &gate[12..15]), (&[19, 0, 1][..], &[1.0, 0.0, 0.0][..]));
        assert_eq!(counts.iter().sum::<i32>(), (n * k) as i32);
        assert!(losses.z_loss.is_nan() && losses.load_balancing_loss.is_nan());
        let mut d = vec![0.0; n * e];
        let gates = vec![1.0; n * k];
        let mut workspace = vec![0.0; e];
        let d_gate = Some(&gates[..]);
        route_grad(&logits, &index, n, e, k, BalanceMask::TopK, d_gate, None, None, &mut d, &mut workspace);
        assert!(d[5 * e..].iter().all(|d| d.is_finite()));
    }

    #[test]
    fn gradient_against_central_differences() {
        let mut rng = Rng(5);
        for (n, e, k) in [(1, 1, 1), (1, 6, 6), (5, 4, 2), (70, 9, 3)] {
            for mask in [BalanceMask::TopK, BalanceMask::FirstChoice] {
                let logits = rng.values(n * e, 2.0);
                let (index, ..) = run(&logits, n, e, k, mask);
                let d_gate = rng.values(n * k, 1.0);
                for (gates, lb, z) in [(true, None, None), (false, Some(0.7), None), (true, Some(-1.5), Some(0.3))] {
                    let mut got = vec![f32::NAN; n * e];
                    let mut workspace = vec![f32::NAN; route_grad_workspace(e)];
                    let cotangent = gates.then_some(&d_gate[..]);
                    route_grad(&logits, &index, n, e, k, mask, cotangent, lb, z, &mut got, &mut workspace);
                    let d_gate = if gates { d_gate.clone() } else { vec![0.0; n * k] };
                    let scalars = (f64::from(lb.unwrap_or(0.0)), f64::from(z.unwrap_or(0.0)));
                    let mut at: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
                    let mut want = vec![];
                    for i in 0..n * e {
                        let x = at[i];
                        at[i] = x + 1e-5;
                        let up = loss64(&at, &index, (n, e, k), mask, &d_gate, scalars);
                        at[i] = x - 1e-5;
                        let down = loss64(&at, &index, (n, e, k), mask, &d_gate, scalars);
                        at[i] = x;
                        want.push((up - down) / 2e-5);
                    }
                    assert_close(&got, &want, 2e-6);
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (n, e, k) = (3000, 24, 2);
        let mut rng = Rng(8);
        let (logits, d_gate) = (rng.values(n * e, 4.0), rng.values(n * k, 1.0));
        same_on_any_thread_count(|| {
            let (index, gate, counts, losses) = run(&logits, n, e, k, BalanceMask::TopK);
            let (mut d, mut workspace) = (vec![f32::NAN; n * e], vec![0.0; e]);
            let (lb, z) = (Some(0.5), Some(0.25));
            let mask = BalanceMask::FirstChoice;
            route_grad(&logits, &index, n, e, k, mask, Some(&d_gate), lb, z, &mut d, &mut workspace);
            (index, bits(&gate), counts, bits(&[losses.load_balancing_loss, losses.z_loss]), bits(&d))
        });
    }
}
