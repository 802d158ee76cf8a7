//! The little statistics that a verdict needs.

/// Numbers, one for each seed, and how many of them are only bounds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// In the order of the seeds. One alone is not measured by seeds: a size, or a time that was measured once.
    pub values: Vec<f64>,
    /// How many of them are upper bounds, or are missing because there is no such number.
    pub bounds: usize,
}

impl Sample {
    /// A number that does not depend on a seed.
    pub fn exact(value: f64) -> Sample {
        Sample { values: vec![value], bounds: 0 }
    }

    /// Mean of the values; NaN without any.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }

    /// Standard deviation over the seeds (with n - 1); NaN for fewer than two values.
    pub fn deviation(&self) -> f64 {
        let (mean, n) = (self.mean(), self.values.len() as f64);
        if n < 2.0 {
            return f64::NAN;
        }
        (self.values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
    }
}

/// Student's t-test of numbers against a constant; of differences by seed it is the paired test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Test {
    /// Mean of the numbers.
    pub mean: f64,
    /// Their standard deviation (with n - 1).
    pub deviation: f64,
    /// How many they are.
    pub count: usize,
    /// The probability, if the true mean were the constant, of a mean at least as far from it on either side.
    pub p: f64,
}

impl Test {
    /// Tests whether the mean of `values` is `constant`; none for fewer than two values.
    pub fn of(values: &[f64], constant: f64) -> Option<Test> {
        let sample = Sample { values: values.to_vec(), bounds: 0 };
        let (mean, deviation, count) = (sample.mean(), sample.deviation(), values.len());
        if count < 2 {
            return None;
        }
        let error = deviation / (count as f64).sqrt();
        let p = match (mean - constant).abs() {
            0.0 => 1.0,
            // Equal values far from the constant: there is no spread that could explain it.
            _ if error == 0.0 => 0.0,
            distance => outside(distance / error, count - 1),
        };
        Some(Test { mean, deviation, count, p })
    }
}

/// The probability that Student's t with `freedom` degrees of freedom lies outside of -t to t. Abramowitz and Stegun 26.7.3 and
/// 26.7.4: finite sums for a whole number of degrees.
fn outside(t: f64, freedom: usize) -> f64 {
    let angle = (t / (freedom as f64).sqrt()).atan();
    let (sine, cosine) = angle.sin_cos();
    let odd = freedom % 2 == 1;
    let (mut term, mut sum) = if odd { (cosine, cosine) } else { (1.0, 1.0) };
    if freedom == 1 {
        sum = 0.0;
    }
    // The powers of the cosine go in steps of two, up to freedom - 2.
    let mut power = if odd { 1 } else { 0 };
    while power + 2 <= freedom.saturating_sub(2) {
        let factor = (power + 1) as f64 / (power + 2) as f64;
        term *= cosine * cosine * factor;
        sum += term;
        power += 2;
    }
    let inside = if odd { (angle + sine * sum) * std::f64::consts::FRAC_2_PI } else { sine * sum };
    (1.0 - inside).clamp(0.0, 1.0)
}

/// Where a curve of (x, loss), x rising, first comes down to `target`: between two points in proportion to their losses. The first
/// point's own x if it is low enough, as nothing is known before it; none if no point is.
pub fn reach(curve: &[(f64, f64)], target: f64) -> Option<f64> {
    let at = curve.iter().position(|&(_, loss)| loss <= target)?;
    let (x, loss) = curve[at];
    let Some(&(before, above)) = at.checked_sub(1).and_then(|i| curve.get(i)) else { return Some(x) };
    // above > target >= loss, so there is no division by 0.
    Some(before + (x - before) * (above - target) / (above - loss))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_tables() {
        // Critical values of the two-sided test at 5 % and 1 %.
        for (freedom, t, p) in [
            (1, 12.706, 0.05),
            (2, 4.3027, 0.05),
            (2, 9.9248, 0.01),
            (3, 3.1824, 0.05),
            (4, 2.7764, 0.05),
            (5, 2.5706, 0.05),
            (10, 2.2281, 0.05),
            (11, 3.1058, 0.01),
        ] {
            assert!((outside(t, freedom) - p).abs() < 1e-4, "{freedom}: {}", outside(t, freedom));
        }
        for freedom in 1..9 {
            assert!((outside(0.0, freedom) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn a_paired_test_sees_what_the_seeds_share() {
        // Two arms that differ by 0.01 in every seed, while seeds differ by far more.
        let (a, b) = ([2.00, 2.31, 1.72], [2.0101, 2.3199, 1.7300]);
        let differences: Vec<f64> = b.iter().zip(a).map(|(b, a)| b - a).collect();
        let test = Test::of(&differences, 0.0).unwrap();
        assert!((test.mean - 0.01).abs() < 1e-9 && test.p < 0.001, "{test:?}");
        assert_eq!(Test::of(&[0.5], 0.0), None);
        assert_eq!(Test::of(&[0.5, 0.5], 0.5).unwrap().p, 1.0);
        assert_eq!(Test::of(&[0.5, 0.5], 0.0).unwrap().p, 0.0);
        assert_eq!(Test::of(&[0.0, 0.0], 0.0).unwrap().p, 1.0);
    }

    #[test]
    fn a_loss_is_reached_between_two_evaluations() {
        let curve = [(10.0, 4.0), (20.0, 3.0), (30.0, 3.5), (40.0, 2.0)];
        assert_eq!(reach(&curve, 3.5), Some(15.0));
        assert_eq!(reach(&curve, 3.0), Some(20.0));
        // The first time counts, and from there on the curve may rise.
        assert_eq!(reach(&curve, 2.75), Some(35.0));
        assert_eq!(reach(&curve, 5.0), Some(10.0));
        assert_eq!(reach(&curve, 1.9), None);
        assert_eq!(reach(&[], 1.0), None);
    }
}
