//! Distillation by what is kept of a teacher against distillation by the whole one: how far apart they may be, on every device.

use moebius_ir::{DType, Role, Tensor, TensorType, Value, gradients};
use moebius_tests::device::{Device, Live, devices};
use moebius_tests::{Sketch, cases_of};
use proptest::prelude::*;

/// A student and a teacher given by their logits, N rows of V.
#[derive(Clone, Debug)]
struct Pair {
    v: usize,
    temperature: f64,
    student: Vec<f64>,
    teacher: Vec<f64>,
}

/// What is kept of a row of the teacher: K tokens with their log-probabilities, and the logarithm of the others'.
struct Kept {
    ids: Vec<i32>,
    log_p: Vec<f64>,
    log_tail: Vec<f64>,
    k: usize,
}

impl Pair {
    /// Log-probabilities of the teacher in row `n` at the temperature.
    fn log_p(&self, n: usize) -> Vec<f64> {
        let row = self.teacher[n * self.v..][..self.v].iter().map(|l| l / self.temperature);
        let sum: f64 = row.clone().map(f64::exp).sum();
        row.map(|l| l - sum.ln()).collect()
    }

    fn rows(&self) -> usize {
        self.student.len() / self.v
    }

    /// The K likeliest tokens of each row.
    fn keep(&self, k: usize, round: impl Fn(f64) -> f64) -> Kept {
        let mut kept = Kept { ids: Vec::new(), log_p: Vec::new(), log_tail: Vec::new(), k };
        for n in 0..self.rows() {
            let log_p = self.log_p(n);
            let mut order: Vec<usize> = (0..self.v).collect();
            order.sort_by(|&a, &b| log_p[b].total_cmp(&log_p[a]));
            kept.ids.extend(order[..k].iter().map(|&i| i as i32));
            kept.log_p.extend(order[..k].iter().map(|&i| round(log_p[i])));
            kept.log_tail.push(order[k..].iter().map(|&i| log_p[i].exp()).sum::<f64>().ln());
        }
        kept
    }

    /// Input for logits, and weights that give them back.
    fn logits(&self, s: &mut Sketch, name: &str, values: &[f64]) -> [Value; 2] {
        let (v, n) = (self.v, self.rows());
        let identity = (0..v * v).map(|i| f64::from(u8::from(i / v == i % v))).collect();
        let x = s.named(name, Role::Feed, TensorType::f32([n, v]), values.to_vec(), false).unwrap();
        [x, s.graph.constant(TensorType::f32([v, v]), identity).unwrap()]
    }

    /// The terms of all rows and their gradient of the student's logits, by the whole teacher or by what is kept.
    fn run(&self, device: &Device, kept: Option<&Kept>) -> (Tensor, Tensor) {
        let mut s = Sketch::new(DType::F32);
        let n = self.rows();
        let own = self.logits(&mut s, "student", &self.student);
        let targets = s.ints([n], &vec![0; n]).unwrap();
        let t = self.temperature as f32;
        let [_, kd] = match kept {
            None => {
                let teacher = self.logits(&mut s, "teacher", &self.teacher);
                s.graph.linear_distillation(own, targets, teacher, t).unwrap()
            }
            Some(Kept { ids, log_p, log_tail, k }) => {
                let ids = s.ints([n, *k], ids).unwrap();
                let log_p = s.fixed(TensorType::f32([n, *k]), log_p.clone()).unwrap();
                let log_tail = s.fixed(TensorType::f32([n]), log_tail.clone()).unwrap();
                s.graph.linear_distillation_cached(own, targets, [ids, log_p, log_tail], t).unwrap()
            }
        };
        let sum = s.graph.sum_all(kd).unwrap();
        let gradient = gradients(&mut s.graph, sum, &[own[0]]).unwrap()[0];
        s.graph.output("kd", kd).unwrap();
        s.graph.output("gradient", gradient).unwrap();
        let mut results = Live::new(device.backend.as_ref(), &s.graph).unwrap().run(&s.inputs).unwrap();
        (results.remove("kd").unwrap(), results.remove("gradient").unwrap())
    }

    /// For each row the distance of two gradients, as the sum of what their elements differ.
    fn distances(&self, a: &Tensor, b: &Tensor) -> Vec<f64> {
        let difference: Vec<f64> = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs()).collect();
        difference.chunks(self.v).map(|row| row.iter().sum()).collect()
    }
}

fn pair() -> impl Strategy<Value = (Pair, usize)> {
    let sizes = (1usize..90, 1usize..5, prop_oneof![Just(1.0), Just(2.0), Just(0.5)], 0.3f64..8.0);
    sizes.prop_flat_map(|(v, n, temperature, spread)| {
        let logits = || prop::collection::vec(-spread..spread, v * n);
        (logits(), logits(), 1..=v).prop_map(move |(student, teacher, k)| {
            // As they are in f32, so that the roundings of the inputs are none of the difference.
            let narrow = |x: Vec<f64>| x.into_iter().map(|x| f64::from(x as f32)).collect();
            (Pair { v, temperature, student: narrow(student), teacher: narrow(teacher) }, k)
        })
    })
}

/// Roundings of both ways in f32: numbers of size 1 with chains of a few ops, and terms that grow with the temperature.
const ROUNDING: f64 = 2e-5;

/// The relative error of a probability whose logarithm has the precision of f16.
fn half(log_p: f64) -> f64 {
    (log_p.abs().max(2f64.powi(-14)) * 2f64.powi(-11)).exp() - 1.0
}

proptest! {
    #![proptest_config(cases_of(concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/distillation.txt")))]

    /// The gradient differs by the tail alone: at most T times twice its probability, and the roundings of what is kept. The term
    /// itself is at most the whole one, as joining tokens cannot tell two distributions further apart.
    #[test]
    fn what_is_kept_is_as_good_as_its_tail_is_small((pair, k) in pair()) {
        for device in devices() {
            let (whole, of_whole) = pair.run(&device, None);
            let kept = pair.keep(k, |p| p);
            let (part, of_part) = pair.run(&device, Some(&kept));
            let t = pair.temperature;
            for (n, distance) in pair.distances(&of_whole, &of_part).into_iter().enumerate() {
                let bound = t * 2.0 * kept.log_tail[n].exp() + t * ROUNDING;
                prop_assert!(distance <= bound, "{}: row {n}: {distance} for at most {bound}", device.name);
                let size = 1.0 + whole.data[n].abs();
                prop_assert!(part.data[n] <= whole.data[n] + t * t * ROUNDING * size, "row {n}: {part:?} {whole:?}");
                prop_assert!(part.data[n] >= -t * t * ROUNDING, "row {n}: {part:?}");
            }
        }
    }

    /// With all tokens kept in f16 the two ways differ by those roundings alone.
    #[test]
    fn all_tokens_kept_is_the_whole_teacher_to_the_rounding_of_f16((pair, _) in pair()) {
        let round = |p: f64| Tensor::new(TensorType::new(DType::F16, [1]), vec![p]).rounded().data[0];
        for device in devices() {
            let (whole, of_whole) = pair.run(&device, None);
            let kept = pair.keep(pair.v, round);
            prop_assert!(kept.log_tail.iter().all(|t| *t == f64::NEG_INFINITY));
            let (part, of_part) = pair.run(&device, Some(&kept));
            let t = pair.temperature;
            for (n, distance) in pair.distances(&of_whole, &of_part).into_iter().enumerate() {
                // Of each probability, and of the sum of all that the student's is weighted by.
                let rounded: f64 = pair.log_p(n).iter().map(|p| p.exp() * half(*p)).sum();
                let bound = t * (2.0 * rounded + ROUNDING);
                prop_assert!(distance <= bound, "{}: row {n}: {distance} for at most {bound}", device.name);
                // Both the probability and its logarithm are rounded: the ratios of both are of a few spreads.
                let bound = t * t * rounded * 40.0 + t * t * ROUNDING * (1.0 + whole.data[n].abs());
                let error = (part.data[n] - whole.data[n]).abs();
                prop_assert!(error <= bound, "{}: row {n}: {error} for at most {bound}", device.name);
            }
        }
    }
}

/// A student that gives the tail a probability of e^-60 where the teacher gives it a half: the sum over the tail is not a difference
/// of numbers near 1, in which it would be nothing.
#[test]
fn a_tail_that_the_student_does_not_believe_in_is_exact() {
    let (v, far) = (4, 60.0);
    let student = vec![0.0, 0.0, -far, -far];
    let teacher = vec![0.0; 4];
    let pair = Pair { v, temperature: 1.0, student, teacher };
    let kept = Kept { ids: vec![0, 1], log_p: vec![0.25f64.ln(); 2], log_tail: vec![0.5f64.ln()], k: 2 };
    for device in devices() {
        let (kd, gradient) = pair.run(&device, Some(&kept));
        // 2 (1/4 (ln 1/4 - ln 1/2)) + 1/2 (ln 1/2 - ln e^-60).
        let wanted = 0.5 * 0.5f64.ln() + 0.5 * (0.5f64.ln() + far);
        assert!((kd.data[0] - wanted).abs() < 1e-5 * wanted, "{}: {} for {wanted}", device.name, kd.data[0]);
        for (got, wanted) in gradient.data.iter().zip([0.25, 0.25, -0.25, -0.25]) {
            assert!((got - wanted).abs() < 1e-6, "{}: {gradient:?}", device.name);
        }
    }
}
