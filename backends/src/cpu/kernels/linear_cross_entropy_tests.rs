//! Tests of `linear_cross_entropy` and its vjp, against f64 loops over whole rows of logits.

use half::bf16;

use super::*;
use crate::cpu::kernels::attention::tests::values;
use crate::cpu::kernels::rows::tests::{close, with_threads};

struct Run<T> {
    loss: Vec<f32>,
    lse: Vec<f32>,
    dx: Vec<T>,
    dw: Vec<f32>,
}

fn run<T: Element>(
    shape: &ClassifierShape,
    (x, w): (&[T], &[T]),
    targets: &[i32],
    dloss: &[f32],
    threads: usize,
) -> Run<T> {
    let mut out = Run {
        loss: vec![f32::NAN; shape.rows],
        lse: vec![f32::NAN; shape.rows],
        dx: vec![T::from_f32(f32::NAN); x.len()],
        dw: vec![f32::NAN; w.len()],
    };
    let mut space = vec![f32::NAN; linear_cross_entropy_workspace(shape, threads)];
    let mut grad_space = vec![f32::NAN; linear_cross_entropy_grad_workspace(shape, threads)];
    with_threads(threads, || {
        linear_cross_entropy(shape, x, w, targets, &mut out.loss, &mut out.lse, &mut space).unwrap();
        let Run { lse, dx, dw, .. } = &mut out;
        linear_cross_entropy_grad(shape, x, w, targets, lse, dloss, dx, dw, &mut grad_space).unwrap();
    });
    out
}

fn case<T: Element>(rows: usize, width: usize, vocabulary: usize) -> (ClassifierShape, Vec<T>, Vec<T>, Vec<i32>) {
    let shape = ClassifierShape { rows, width, vocabulary };
    let targets = (0..rows).map(|r| if r % 5 == 3 { -1 - r as i32 } else { ((r * 7919) % vocabulary) as i32 });
    (shape, values(rows * width, 1), values(vocabulary * width, 2), targets.collect())
}

const SIZES: [[usize; 3]; 8] =
    [[1, 1, 1], [1, 5, 3], [64, 16, 64], [65, 33, 65], [7, 100, 700], [200, 20, 257], [130, 128, 256], [2, 2, 5000]];

fn against_oracle<T: Element>(rounding: f64) {
    for [rows, width, vocabulary] in SIZES {
        let (shape, x, w, targets) = case::<T>(rows, width, vocabulary);
        let dloss = values::<f32>(rows, 3);
        let got = run(&shape, (&x, &w), &targets, &dloss, 2);
        let f64s = |x: &[T]| -> Vec<f64> { x.iter().map(|x| x.to_f32() as f64).collect() };
        let (x, w) = (f64s(&x), f64s(&w));
        let (mut loss, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        for r in 0..rows {
            let logits: Vec<f64> =
                (0..vocabulary).map(|v| (0..width).map(|d| x[r * width + d] * w[v * width + d]).sum()).collect();
            lse[r] = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            if targets[r] < 0 {
                continue;
            }
            let target = targets[r] as usize;
            loss[r] = lse[r] - logits[target];
            for v in 0..vocabulary {
                let dl = ((logits[v] - lse[r]).exp() - f64::from(u8::from(v == target))) * dloss[r] as f64;
                for d in 0..width {
                    dx[r * width + d] += dl * w[v * width + d];
                    dw[v * width + d] += dl * x[r * width + d];
                }
            }
        }
        close(&got.lse, &lse, 1e-5, "lse");
        close(&got.loss, &loss, 1e-5, "loss");
        close(&got.dx, &dx, rounding, "dx");
        close(&got.dw, &dw, 1e-5, "dw");
    }
}

#[test]
fn f32_agrees_with_the_oracle() {
    against_oracle::<f32>(1e-5);
}

#[test]
fn bf16_agrees_with_the_oracle() {
    against_oracle::<bf16>(1.0 / 250.0);
}

#[test]
fn the_bits_do_not_depend_on_the_threads() {
    let (shape, x, w, targets) = case::<f32>(300, 40, 600);
    let dloss = values::<f32>(300, 3);
    let one = run(&shape, (&x, &w), &targets, &dloss, 1);
    let three = run(&shape, (&x, &w), &targets, &dloss, 3);
    assert_eq!((one.loss, one.lse, one.dx, one.dw), (three.loss, three.lse, three.dx, three.dw));
}

#[test]
fn a_target_past_the_vocabulary_is_an_error_and_nothing_is_written() {
    let (shape, x, w, mut targets) = case::<f32>(10, 4, 6);
    targets[7] = 6;
    let (mut loss, mut lse, mut dx, mut dw) = ([9.0; 10], [9.0; 10], [9.0; 40], [9.0f32; 24]);
    let mut space = vec![0.0; linear_cross_entropy_workspace(&shape, 1)];
    let want = Err(TargetOutOfRange { row: 7, id: 6, vocabulary: 6 });
    assert_eq!(linear_cross_entropy(&shape, &x, &w, &targets, &mut loss, &mut lse, &mut space), want);
    let mut space = vec![0.0; linear_cross_entropy_grad_workspace(&shape, 1)];
    let got = linear_cross_entropy_grad(&shape, &x, &w, &targets, &lse, &[1.0; 10], &mut dx, &mut dw, &mut space);
    assert_eq!(got, want);
    assert_eq!((loss, lse, dx, dw), ([9.0; 10], [9.0; 10], [9.0; 40], [9.0; 24]));
}

#[test]
fn no_rows_give_a_zero_gradient_of_the_weights() {
    let got = run::<f32>(&ClassifierShape { rows: 0, width: 20, vocabulary: 300 }, (&[], &[1.0; 6000]), &[], &[], 2);
    assert!(got.dw.iter().all(|&x| x == 0.0));
}

#[test]
fn an_ignored_row_brings_nothing_into_the_gradients() {
    let (shape, mut x, w, targets) = case::<f32>(70, 8, 90);
    let dloss = vec![1.0; 70];
    let before = run(&shape, (&x, &w), &targets, &dloss, 1);
    x[3 * 8..4 * 8].fill(1e30);
    let after = run(&shape, (&x, &w), &targets, &dloss, 1);
    assert_eq!(before.dw, after.dw);
    assert_eq!(after.loss[3], 0.0);
    assert!(after.dx[3 * 8..4 * 8].iter().all(|&x| x == 0.0));
}
