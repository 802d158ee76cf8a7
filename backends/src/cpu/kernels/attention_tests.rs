//! Tests of `attention` and `attention_grad`, against f64 loops over explicit probabilities.

use half::bf16;

use super::*;
use crate::cpu::crew::Crew;

/// Values in (-1, 1), the same on every run.
pub(crate) fn values<T: Element>(n: usize, seed: u32) -> Vec<T> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            T::from_f32((state >> 8) as f32 / 8_388_608.0 - 1.0)
        })
        .collect()
}

fn shape(batch: usize, tokens: usize, heads: usize, kv_heads: usize, head_dim: usize, causal: bool) -> AttentionShape {
    AttentionShape { batch, tokens, heads, kv_heads, head_dim, causal, scale: 1.7 / (head_dim as f32).sqrt() }
}

const SHAPES: [[usize; 5]; 9] = [
    [1, 1, 1, 1, 1],
    [2, 1, 4, 2, 8],
    [1, 7, 2, 1, 5],
    [2, 64, 2, 2, 16],
    [1, 65, 4, 2, 12],
    [1, 100, 3, 1, 32],
    [1, 200, 2, 2, 64],
    [3, 33, 6, 3, 20],
    [1, 129, 1, 1, 3],
];

/// out, lse, dqkv in f64; each query's probabilities are held whole.
fn oracle<T: Element>(s: &AttentionShape, qkv: &[T], dout: &[T]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (t_len, d_len, ld) = (s.tokens, s.head_dim, s.packed());
    let x: Vec<f64> = qkv.iter().map(|v| v.to_f32() as f64).collect();
    let mut out = vec![0.0; s.batch * t_len * s.heads * d_len];
    let mut lse = vec![0.0; s.batch * s.heads * t_len];
    let mut dx = vec![0.0; x.len()];
    for b in 0..s.batch {
        for h in 0..s.heads {
            let g = h * s.kv_heads / s.heads;
            let q = |t: usize, d: usize| (b * t_len + t) * ld + h * d_len + d;
            let k = |t: usize, d: usize| (b * t_len + t) * ld + (s.heads + g) * d_len + d;
            let v = |t: usize, d: usize| (b * t_len + t) * ld + (s.heads + s.kv_heads + g) * d_len + d;
            let o = |t: usize, d: usize| (b * t_len + t) * s.heads * d_len + h * d_len + d;
            for i in 0..t_len {
                let seen = if s.causal { i + 1 } else { t_len };
                let scores: Vec<f64> = (0..seen)
                    .map(|j| (0..d_len).map(|d| x[q(i, d)] * x[k(j, d)]).sum::<f64>() * s.scale as f64)
                    .collect();
                let sum: f64 = scores.iter().map(|x| x.exp()).sum();
                lse[(b * s.heads + h) * t_len + i] = sum.ln();
                let p: Vec<f64> = scores.iter().map(|x| x.exp() / sum).collect();
                let dp: Vec<f64> =
                    (0..seen).map(|j| (0..d_len).map(|d| dout[o(i, d)].to_f32() as f64 * x[v(j, d)]).sum()).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
                for j in 0..seen {
                    let ds = p[j] * (dp[j] - mean) * s.scale as f64;
                    for d in 0..d_len {
                        out[o(i, d)] += p[j] * x[v(j, d)];
                        dx[v(j, d)] += p[j] * dout[o(i, d)].to_f32() as f64;
                        dx[q(i, d)] += ds * x[k(j, d)];
                        dx[k(j, d)] += ds * x[q(i, d)];
                    }
                }
            }
        }
    }
    (out, lse, dx)
}

struct Run<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    dqkv: Vec<T>,
}

fn run<T: Element>(s: &AttentionShape, qkv: &[T], dout: &[T], threads: usize) -> Run<T> {
    let nan = T::from_f32(f32::NAN);
    let mut r = Run {
        out: vec![nan; dout.len()],
        lse: vec![f32::NAN; s.batch * s.heads * s.tokens],
        dqkv: vec![nan; qkv.len()],
    };
    let mut space = vec![f32::NAN; attention_workspace(s, threads)];
    let mut grad_space = vec![f32::NAN; attention_grad_workspace(s, threads)];
    Crew::new(threads).unwrap().lead(|| {
        attention(s, qkv, &mut r.out, &mut r.lse, &mut space);
        attention_grad(s, qkv, &r.out, &r.lse, dout, &mut r.dqkv, &mut grad_space);
    });
    r
}

fn close<T: Element>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let g = g.to_f32() as f64;
        assert!((g - w).abs() <= tolerance * (1.0 + w.abs()), "{what}[{i}]: {g}, not {w}");
    }
}

fn against_oracle<T: Element>(tolerance: f64) {
    for [batch, tokens, heads, kv_heads, head_dim] in SHAPES {
        for causal in [true, false] {
            let s = shape(batch, tokens, heads, kv_heads, head_dim, causal);
            let qkv = values::<T>(batch * tokens * s.packed(), 1);
            let dout = values::<T>(batch * tokens * heads * head_dim, 2);
            let (out, lse, dqkv) = oracle(&s, &qkv, &dout);
            let got = run(&s, &qkv, &dout, 2);
            close(&got.out, &out, tolerance, "out");
            close(&got.lse, &lse, 2e-6, "lse");
            close(&got.dqkv, &dqkv, 2.0 * tolerance, "dqkv");
        }
    }
}

#[test]
fn f32_agrees_with_the_oracle() {
    against_oracle::<f32>(5e-6);
}

#[test]
fn bf16_agrees_with_the_oracle() {
    against_oracle::<bf16>(1.0 / 128.0);
}

#[test]
fn the_bits_do_not_depend_on_the_threads() {
    let s = shape(2, 150, 4, 2, 24, true);
    let qkv = values::<f32>(2 * 150 * s.packed(), 3);
    let dout = values::<f32>(2 * 150 * 4 * 24, 4);
    let (one, three) = (run(&s, &qkv, &dout, 1), run(&s, &qkv, &dout, 3));
    assert_eq!(one.out, three.out);
    assert_eq!(one.lse, three.lse);
    assert_eq!(one.dqkv, three.dqkv);
}

#[test]
fn a_causal_row_depends_only_on_the_tokens_up_to_it() {
    let long = shape(1, 200, 2, 1, 16, true);
    let qkv = values::<f32>(200 * long.packed(), 5);
    let dout = vec![0.0; 200 * 32];
    let whole = run(&long, &qkv, &dout, 1);
    for tokens in [1, 5, 63, 64, 65, 130, 199] {
        let short = AttentionShape { tokens, ..long };
        let part = run(&short, &qkv[..tokens * long.packed()], &dout[..tokens * 32], 1);
        assert_eq!(part.out, whole.out[..tokens * 32]);
        for h in 0..2 {
            assert_eq!(part.lse[h * tokens..][..tokens], whole.lse[h * 200..][..tokens]);
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut s = shape(1, 70, 1, 1, 4, true);
    s.scale = 500.0;
    let qkv = values::<f32>(70 * s.packed(), 6);
    let dout = values::<f32>(70 * 4, 7);
    let got = run(&s, &qkv, &dout, 1);
    assert!(got.out.iter().chain(&got.lse).chain(&got.dqkv).all(|x| x.is_finite()));
    assert!(got.lse.iter().any(|&x| x > 90.0), "the case is too tame");
}
