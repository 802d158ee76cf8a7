//! Tests of `linear_distillation`, whole and cached, and their vjps, against f64 loops over whole rows of logits.

use super::*;
use crate::cpu::kernels::attention::tests::values;
use crate::cpu::kernels::linear_cross_entropy::{
    linear_cross_entropy, linear_cross_entropy_grad, linear_cross_entropy_grad_workspace,
    linear_cross_entropy_workspace,
};
use crate::cpu::kernels::linear_distillation_cached::*;
use crate::cpu::kernels::rows::tests::{close, with_threads};

/// Inputs: the student, the teacher, and what is kept of it.
struct Case {
    shape: ClassifierShape,
    width: usize,
    temperature: f32,
    x: Vec<f32>,
    w: Vec<f32>,
    teacher_x: Vec<f32>,
    teacher_w: Vec<f32>,
    targets: Vec<i32>,
    ids: Vec<i32>,
    log_p: Vec<f32>,
    log_tail: Vec<f32>,
    dloss: Vec<f32>,
    dkd: Vec<f32>,
}

/// Five results and two gradients.
type Out = ([Vec<f32>; 5], Vec<f32>, Vec<f32>);

impl Case {
    fn new([rows, width, teacher, vocabulary, kept]: [usize; 5], temperature: f32) -> Case {
        let shape = ClassifierShape { rows, width, vocabulary };
        let ids = (0..rows * kept).map(|i| ((i / kept * 5 + i % kept) % vocabulary) as i32);
        let share = 0.9 / kept as f32;
        Case {
            shape,
            width: teacher,
            temperature,
            x: values(rows * width, 1),
            w: values(vocabulary * width, 2),
            teacher_x: values(rows * teacher, 3),
            teacher_w: values(vocabulary * teacher, 4),
            targets: (0..rows).map(|r| if r % 5 == 3 { -2 } else { (r * 31 % vocabulary) as i32 }).collect(),
            ids: ids.collect(),
            log_p: vec![share.ln(); rows * kept],
            log_tail: vec![if kept == vocabulary { f32::NEG_INFINITY } else { 0.1f32.ln() }; rows],
            dloss: values(rows, 5),
            dkd: values(rows, 6),
        }
    }

    fn teacher(&self) -> Teacher<'_, f32> {
        Teacher { x: &self.teacher_x, w: &self.teacher_w, width: self.width, temperature: self.temperature }
    }

    fn kept(&self) -> Kept<'_> {
        let count = self.log_p.len() / self.shape.rows;
        Kept { ids: &self.ids, log_p: &self.log_p, log_tail: &self.log_tail, count, temperature: self.temperature }
    }

    fn results(out: &mut [Vec<f32>; 5]) -> Results<'_> {
        let [loss, kd, lse, soft, other] = out;
        Results { loss, kd, lse, soft, other }
    }

    fn of_rows<'a>(&'a self, out: &'a [Vec<f32>; 5]) -> OfRows<'a> {
        OfRows { lse: &out[2], soft: &out[3], other: &out[4], dloss: &self.dloss, dkd: &self.dkd }
    }

    fn whole(&self, threads: usize) -> Out {
        let (shape, own) = (&self.shape, (&self.x[..], &self.w[..]));
        let mut out: [Vec<f32>; 5] = std::array::from_fn(|_| vec![f32::NAN; shape.rows]);
        let (mut dx, mut dw) = (vec![f32::NAN; self.x.len()], vec![f32::NAN; self.w.len()]);
        let mut space = vec![f32::NAN; linear_distillation_workspace(shape, self.width, threads)];
        let mut grad_space = vec![f32::NAN; linear_distillation_grad_workspace(shape, self.width, threads)];
        with_threads(threads, || {
            let results = Case::results(&mut out);
            linear_distillation(shape, own, &self.targets, self.teacher(), results, &mut space).unwrap();
            let rows = self.of_rows(&out);
            let to = (&mut dx[..], &mut dw[..]);
            linear_distillation_grad(shape, own, &self.targets, self.teacher(), rows, to, &mut grad_space).unwrap();
        });
        (out, dx, dw)
    }

    fn cached(&self, threads: usize) -> Out {
        let (shape, own, k) = (&self.shape, (&self.x[..], &self.w[..]), self.kept().count);
        let mut out: [Vec<f32>; 5] = std::array::from_fn(|_| vec![f32::NAN; shape.rows]);
        let (mut dx, mut dw) = (vec![f32::NAN; self.x.len()], vec![f32::NAN; self.w.len()]);
        let mut space = vec![f32::NAN; linear_distillation_cached_workspace(shape, k, threads)];
        let mut grad_space = vec![f32::NAN; linear_distillation_cached_grad_workspace(shape, k, threads)];
        with_threads(threads, || {
            let results = Case::results(&mut out);
            linear_distillation_cached(shape, own, &self.targets, self.kept(), results, &mut space).unwrap();
            let rows = self.of_rows(&out);
            let to = (&mut dx[..], &mut dw[..]);
            linear_distillation_cached_grad(shape, own, &self.targets, self.kept(), rows, to, &mut grad_space).unwrap();
        });
        (out, dx, dw)
    }

    /// Checks results against f64 loops; `of_teacher` gives for a row of the student's softmax at T (and its sum over the tail) the
    /// divergence without its factor, and the teacher's part of the cotangents.
    fn check(&self, out: &Out, of_teacher: impl Fn(usize, &[f64]) -> (f64, Vec<f64>)) {
        let ClassifierShape { rows, width, vocabulary } = self.shape;
        let t = f64::from(self.temperature);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let (mut loss, mut kd) = (vec![0.0; rows], vec![0.0; rows]);
        let (mut dx, mut dw) = (vec![0.0; self.x.len()], vec![0.0; self.w.len()]);
        for r in (0..rows).filter(|&r| self.targets[r] >= 0) {
            let row = &self.x[r * width..][..width];
            let logits: Vec<f64> = (0..vocabulary).map(|v| dot(row, &self.w[v * width..][..width])).collect();
            let softmax = |t: f64| {
                let sum: f64 = logits.iter().map(|l| (l / t).exp()).sum();
                logits.iter().map(|l| (l / t).exp() / sum).collect::<Vec<f64>>()
            };
            let (q, soft) = (softmax(1.0), softmax(t));
            let target = self.targets[r] as usize;
            let (divergence, c) = of_teacher(r, &soft);
            loss[r] = -q[target].ln();
            kd[r] = t * t * divergence;
            for v in 0..vocabulary {
                let hard = q[v] - f64::from(u8::from(v == target));
                let c = f64::from(self.dloss[r]) * hard + f64::from(self.dkd[r]) * t * c[v];
                for d in 0..width {
                    dx[r * width + d] += c * f64::from(self.w[v * width + d]);
                    dw[v * width + d] += c * f64::from(row[d]);
                }
            }
        }
        close(&out.0[0], &loss, 1e-5, "loss");
        close(&out.0[1], &kd, 2e-5, "kd");
        close(&out.1, &dx, 1e-5, "dx");
        close(&out.2, &dw, 1e-5, "dw");
    }
}

const SIZES: [[usize; 5]; 6] = [
    [1, 1, 2, 1, 1],
    [5, 8, 3, 3, 3],
    [65, 33, 20, 65, 7],
    [7, 100, 40, 700, 32],
    [200, 20, 5, 257, 1],
    [130, 16, 16, 128, 128],
];

#[test]
fn both_forms_agree_with_the_oracle() {
    for (i, sizes) in SIZES.into_iter().enumerate() {
        let case = Case::new(sizes, [1.0, 2.0, 0.5][i % 3]);
        let (t, v) = (f64::from(case.temperature), case.shape.vocabulary);
        case.check(&case.whole(2), |r, q| {
            let of = |v: usize| -> f64 {
                let row = &case.teacher_x[r * case.width..][..case.width];
                row.iter().zip(&case.teacher_w[v * case.width..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let e: Vec<f64> = (0..v).map(|v| (of(v) / t).exp()).collect();
            let sum: f64 = e.iter().sum();
            let p: Vec<f64> = e.iter().map(|e| e / sum).collect();
            (p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum(), q.iter().zip(&p).map(|(q, p)| q - p).collect())
        });
        let k = case.kept().count;
        case.check(&case.cached(2), |r, q| {
            let ids = &case.ids[r * k..][..k];
            let p = |i: usize| f64::from(case.log_p[r * k + i]).exp();
            let tail = f64::from(case.log_tail[r]).exp();
            let others: f64 = (0..v).filter(|v| !ids.contains(&(*v as i32))).map(|v| q[v]).sum();
            let of_tail = if tail == 0.0 { 0.0 } else { tail * (tail / others).ln() };
            let kd = (0..k).map(|i| p(i) * (p(i) / q[ids[i] as usize]).ln()).sum::<f64>() + of_tail;
            let all = (0..k).map(p).sum::<f64>() + tail;
            let of = |v: usize| match ids.iter().position(|&id| id == v as i32) {
                Some(i) => all * q[v] - p(i),
                None => all * q[v] - tail * q[v] / others,
            };
            (kd, (0..v).map(of).collect())
        });
    }
}

#[test]
fn the_bits_do_not_depend_on_the_threads() {
    let case = Case::new([300, 40, 24, 600, 9], 1.0);
    assert_eq!(case.whole(1), case.whole(3));
    assert_eq!(case.cached(1), case.cached(3));
}

#[test]
fn without_a_cotangent_of_the_divergence_the_gradient_is_that_of_the_cross_entropy() {
    let mut case = Case::new([100, 24, 8, 300, 10], 1.0);
    case.dkd.fill(0.0);
    let ClassifierShape { rows, .. } = case.shape;
    let (mut loss, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
    let (mut dx, mut dw) = (case.x.clone(), case.w.clone());
    let mut space = vec![0.0; linear_cross_entropy_workspace(&case.shape, 1)];
    linear_cross_entropy(&case.shape, &case.x, &case.w, &case.targets, &mut loss, &mut lse, &mut space).unwrap();
    let mut space = vec![0.0; linear_cross_entropy_grad_workspace(&case.shape, 1)];
    let (x, w) = (&case.x, &case.w);
    linear_cross_entropy_grad(&case.shape, x, w, &case.targets, &lse, &case.dloss, &mut dx, &mut dw, &mut space)
        .unwrap();
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    for (out, what) in [(case.whole(1), "whole"), (case.cached(1), "cached")] {
        close(&out.0[0], &wide(&loss), 1e-6, what);
        close(&out.1, &wide(&dx), 1e-6, what);
        close(&out.2, &wide(&dw), 1e-6, what);
    }
}

#[test]
fn what_is_no_token_is_an_error_and_nothing_is_written() {
    let mut case = Case::new([10, 4, 4, 6, 2], 1.0);
    let shape = case.shape;
    let mut out: [Vec<f32>; 5] = std::array::from_fn(|_| vec![9.0; 10]);
    let mut space = vec![0.0; linear_distillation_cached_workspace(&shape, 2, 1)];
    case.ids[7] = 6;
    let own = (&case.x[..], &case.w[..]);
    let got = linear_distillation_cached(&shape, own, &case.targets, case.kept(), Case::results(&mut out), &mut space);
    assert_eq!(got, Err(OutOfRange::Kept { row: 3, id: 6, vocabulary: 6 }));
    case.ids[7] = 0;
    case.targets[2] = 7;
    let own = (&case.x[..], &case.w[..]);
    let wanted = TargetOutOfRange { row: 2, id: 7, vocabulary: 6 };
    let got = linear_distillation_cached(&shape, own, &case.targets, case.kept(), Case::results(&mut out), &mut space);
    assert_eq!(got, Err(OutOfRange::Target(wanted)));
    let mut space = vec![0.0; linear_distillation_workspace(&shape, 4, 1)];
    let got = linear_distillation(&shape, own, &case.targets, case.teacher(), Case::results(&mut out), &mut space);
    assert_eq!(got, Err(wanted));
    assert!(out.iter().flatten().all(|&x| x == 9.0));
}
