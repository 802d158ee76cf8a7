//! The router against f64 loops.

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
    let sizes = [(1, 1, 1), (1, 8, 8), (1, 128, 2), (7, 5, 3), (200, 17, 17), (33, 64, 1), (1000, 40, 6), (0, 4, 2)];
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
