//! What the paper says, and what the runs say about it.

use std::fmt;

use super::measure::Unit;
use super::sheet::{number, with_spread};
use super::stats::{Sample, Test};
use super::{Measure, Sheet, Training};

/// A probability below this counts as shown.
const LEVEL: f64 = 0.05;

/// Something that the paper says, in terms of a study's arms. It holds where all of its conditions do.
#[derive(Clone, Debug)]
pub struct Claim {
    /// A sentence.
    pub text: &'static str,
    /// Where the paper says it.
    pub source: &'static str,
    /// What has to hold.
    pub conditions: Vec<Condition>,
}

/// A condition on two arms.
#[derive(Clone, Copy, Debug)]
pub enum Condition {
    /// The validation loss of `of` is lower than that of `than`, or at most `margin` nats higher.
    Lower {
        /// An arm.
        of: &'static str,
        /// Another.
        than: &'static str,
        /// Nats per token; 0: it is lower.
        margin: f64,
    },
    /// A measurement of `of` is at most `share` times that of `than`; of plain steps by turn, as the arms of a turn share what else
    /// the machine does. For sizes and times.
    AtMost {
        /// The measurement.
        what: Measure,
        /// An arm.
        of: &'static str,
        /// Another.
        than: &'static str,
        /// The factor.
        share: f64,
    },
    /// `of` reaches the final loss of `than` with at least `times` fewer training FLOPs.
    LessTraining {
        /// An arm.
        of: &'static str,
        /// Another.
        than: &'static str,
        /// The factor.
        times: f64,
    },
}

/// What the runs say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It holds.
    Shown,
    /// Seeds differ too much, or are too few, to tell.
    NotShown,
    /// Runs are missing.
    Open,
    /// The contrary holds.
    Contradicted,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Shown => "shown",
            Verdict::NotShown => "not shown at this scale",
            Verdict::Open => "open: runs are missing",
            Verdict::Contradicted => "contradicted",
        })
    }
}

/// A verdict, and the numbers it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The verdict.
    pub verdict: Verdict,
    /// A sentence with the numbers for each condition.
    pub numbers: Vec<String>,
}

/// What numbers, one a seed, say about being larger than a constant.
fn judge(values: &[f64], constant: f64, bounds: usize) -> (Verdict, Option<Test>) {
    let test = Test::of(values, constant);
    let verdict = match test {
        Some(Test { p, mean, .. }) if p < LEVEL && mean < constant => Verdict::Contradicted,
        // A bound from above cannot show that something is large.
        Some(Test { p, mean, .. }) if p < LEVEL && mean > constant && bounds == 0 => Verdict::Shown,
        Some(_) | None => Verdict::NotShown,
    };
    (verdict, test)
}

fn tested(test: Option<Test>, bounds: usize) -> String {
    match test {
        Some(_) if bounds > 0 => format!(", a bound for {bounds} seeds that do not reach it"),
        Some(Test { count, p, .. }) if p < 1e-3 => format!(", {count} seeds, p < 0.001"),
        Some(Test { count, p, .. }) => format!(", {count} seeds, p = {p:.3}"),
        None => ", one seed has no spread".into(),
    }
}

impl Sheet<'_> {
    /// What the runs say about a claim: the worst of its conditions.
    pub fn finding(&self, claim: &Claim) -> Finding {
        let of = |condition: &Condition| match *condition {
            Condition::Lower { of, than, margin } => self.lower(of, than, margin),
            Condition::AtMost { what, of, than, share } => self.at_most(what, of, than, share),
            Condition::LessTraining { of, than, times } => self.less_training(of, than, times),
        };
        let all: Vec<(Verdict, String)> = claim.conditions.iter().map(of).collect();
        let verdict = all.iter().map(|one| one.0).max().unwrap_or(Verdict::Open);
        Finding { verdict, numbers: all.into_iter().map(|one| one.1).collect() }
    }

    /// Losses of both arms by seed, of the seeds that both have finished.
    fn pairs(&self, of: &str, than: &str) -> Vec<(f64, f64)> {
        let (Some(of), Some(than)) = (self.study.arm(of), self.study.arm(than)) else { return Vec::new() };
        let loss = |arm: usize, seed: usize| self.results[arm].get(seed)?.as_ref()?.validation_loss;
        (0..self.seeds).filter_map(|seed| Some((loss(of, seed)?, loss(than, seed)?))).collect()
    }

    fn lower(&self, of: &str, than: &str, margin: f64) -> (Verdict, String) {
        let pairs = self.pairs(of, than);
        if pairs.len() < self.seeds {
            return (Verdict::Open, format!("{of} and {than}: {} of {} seeds are there", pairs.len(), self.seeds));
        }
        let sample = |values: Vec<f64>| Sample { values, bounds: 0 };
        let (own, other) = pairs.iter().copied().unzip();
        let lower: Vec<f64> = pairs.iter().map(|(own, other)| other - own).collect();
        let (verdict, test) = judge(&lower, -margin, 0);
        let text = |values| with_spread(&sample(values), Unit::Loss);
        let side = if sample(lower.clone()).mean() < 0.0 { "higher" } else { "lower" };
        let turned = if side == "higher" { -1.0 } else { 1.0 };
        let wanted = if margin > 0.0 { format!(", wanted at most {margin} higher") } else { String::new() };
        let numbers = format!(
            "{of} {}, {than} {}: {} nats {side}{wanted}; paired by seed{}",
            text(own),
            text(other),
            text(lower.iter().map(|difference| turned * difference).collect()),
            tested(test, 0)
        );
        (verdict, numbers)
    }

    fn at_most(&self, what: Measure, of: &str, than: &str, share: f64) -> (Verdict, String) {
        let value = |arm: &str| {
            let sample = self.sample(self.study.arm(arm)?, what);
            Some(sample.mean()).filter(|v| v.is_finite())
        };
        let heading = what.heading();
        let (Some(own), Some(other)) = (value(of), value(than)) else {
            return (Verdict::Open, format!("{heading} of {of} and {than}: not measured yet"));
        };
        let (once, own, other) = (own / other, number(own, what.unit()), number(other, what.unit()));
        let numbers = format!("{heading}: {of} {own}, {than} {other}");
        let turns = if what == Measure::StepMs { self.by_turn(of, than) } else { Vec::new() };
        if turns.is_empty() {
            let verdict = if once <= share { Verdict::Shown } else { Verdict::Contradicted };
            return (verdict, format!("{numbers}: {once:.3} of it, wanted at most {share}"));
        }
        let room: Vec<f64> = turns.iter().map(|ratio| share - ratio).collect();
        let (verdict, test) = judge(&room, 0.0, 0);
        let p = test.map_or(f64::NAN, |test| test.p);
        let ratio = with_spread(&Sample { values: turns, bounds: 0 }, Unit::Times);
        let count = room.len();
        (verdict, format!("{numbers}; {ratio} of it by turn, wanted at most {share}, {count} turns, p = {p:.3}"))
    }

    /// The time of a step of one arm by that of another, for each turn; nothing where a teacher takes part in one of them.
    fn by_turn(&self, of: &str, than: &str) -> Vec<f64> {
        let plain = |name: &str| {
            let arm = self.study.arm(name).filter(|&arm| self.study.arms[arm].training == Training::Plain)?;
            Some(&self.timings.get(arm)?.turns_ms)
        };
        match (plain(of), plain(than)) {
            (Some(own), Some(other)) => own.iter().zip(other).map(|(own, other)| own / other).collect(),
            (None | Some(_), _) => Vec::new(),
        }
    }

    fn less_training(&self, of: &str, than: &str, times: f64) -> (Verdict, String) {
        let Some(arm) = self.study.arm(of) else { return (Verdict::Open, format!("there is no arm {of}")) };
        let reference = self.study.arms.iter().map(|arm| arm.name).find(|name| *name == than);
        let Some(than) = reference else { return (Verdict::Open, format!("there is no arm {than}")) };
        let sample = self.sample(arm, Measure::LessTraining(than));
        if sample.values.len() < self.seeds {
            return (
                Verdict::Open,
                format!("{of} and {than}: {} of {} seeds are there", sample.values.len(), self.seeds),
            );
        }
        let (verdict, test) = judge(&sample.values, times, sample.bounds);
        let less = if sample.bounds > 0 { "less than " } else { "" };
        let numbers = format!(
            "{of} reaches the final loss of {than} with {less}{} times fewer training FLOPs, wanted {times}{}",
            with_spread(&sample, Unit::Times),
            tested(test, sample.bounds)
        );
        (verdict, numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arm, Point, RunResult, Study};
    use super::*;
    use crate::config::Config;

    fn study() -> Study {
        let config = Config::preset("tiny-pr-moe").unwrap();
        let arms = vec![Arm::plain("a", config.clone()), Arm::plain("b", config)];
        Study { name: "s", title: "", question: "", arms, columns: vec![], plots: vec![], claims: vec![] }
    }

    fn run(loss: f64, curve: &[(u64, f64)]) -> Option<RunResult> {
        let curve = curve.iter().map(|&(step, loss)| Point { step, loss, seconds: step as f64 / 2.0 }).collect();
        Some(RunResult {
            key: String::new(),
            device: String::new(),
            steps: 100,
            tokens: 100,
            validation_loss: Some(loss),
            validation_bits: None,
            test_loss: None,
            test_bits: None,
            seconds: 50.0,
            curve,
        })
    }

    fn sheet<'s>(study: &'s Study, losses: [&[f64]; 2]) -> Sheet<'s> {
        Sheet {
            study,
            seeds: 3,
            configs: study.arms.iter().map(|arm| arm.config.clone()).collect(),
            results: losses.iter().map(|l| l.iter().map(|&l| run(l, &[])).collect()).collect(),
            timings: vec![],
            tunings: vec![],
        }
    }

    fn verdict(sheet: &Sheet<'_>, condition: Condition) -> Verdict {
        sheet.finding(&Claim { text: "", source: "", conditions: vec![condition] }).verdict
    }

    #[test]
    fn a_lower_loss_is_shown_contradicted_or_neither() {
        let study = study();
        let lower = |margin| Condition::Lower { of: "a", than: "b", margin };
        let clear = sheet(&study, [&[1.0, 2.0, 3.0], &[1.101, 2.100, 3.099]]);
        assert_eq!(verdict(&clear, lower(0.0)), Verdict::Shown);
        let turned = sheet(&study, [&[1.101, 2.100, 3.099], &[1.0, 2.0, 3.0]]);
        assert_eq!(verdict(&turned, lower(0.0)), Verdict::Contradicted);
        // Within a margin of 0.2 it is as good, of 0.05 it is not.
        assert_eq!(verdict(&turned, lower(0.2)), Verdict::Shown);
        assert_eq!(verdict(&turned, lower(0.05)), Verdict::Contradicted);
        let noise = sheet(&study, [&[1.0, 2.0, 3.0], &[1.2, 1.9, 3.1]]);
        assert_eq!(verdict(&noise, lower(0.0)), Verdict::NotShown);
        let missing = sheet(&study, [&[1.0, 2.0, 3.0], &[1.1, 2.1]]);
        assert_eq!(verdict(&missing, lower(0.0)), Verdict::Open);
        // One seed shows nothing, whatever the difference.
        let one = Sheet { seeds: 1, ..sheet(&study, [&[1.0], &[9.0]]) };
        assert_eq!(verdict(&one, lower(0.0)), Verdict::NotShown);
    }

    #[test]
    fn the_worst_condition_is_the_verdict() {
        let study = study();
        let clear = sheet(&study, [&[1.0, 2.0, 3.0], &[1.101, 2.100, 3.099]]);
        let lower = Condition::Lower { of: "a", than: "b", margin: 0.0 };
        let size = |share| Condition::AtMost { what: Measure::Parameters, of: "a", than: "b", share };
        let of = |conditions| clear.finding(&Claim { text: "", source: "", conditions });
        assert_eq!(of(vec![lower, size(1.0)]).verdict, Verdict::Shown);
        let mixed = of(vec![lower, size(0.5)]);
        assert_eq!(mixed.verdict, Verdict::Contradicted);
        assert_eq!(mixed.numbers.len(), 2);
        let untimed = Condition::AtMost { what: Measure::StepMs, of: "a", than: "b", share: 0.5 };
        assert_eq!(of(vec![lower, untimed]).verdict, Verdict::Open);
    }

    #[test]
    fn step_times_are_compared_turn_by_turn() {
        let study = study();
        let mut sheet = sheet(&study, [&[1.0; 3], &[1.0; 3]]);
        let timing = |turns: &[f64]| super::super::Timing {
            plain_ms: turns[1],
            turns_ms: turns.to_vec(),
            ..super::super::Timing::default()
        };
        let step = |share| Condition::AtMost { what: Measure::StepMs, of: "a", than: "b", share };
        // Turns differ by far more than the arms do.
        sheet.timings = vec![timing(&[8.0, 40.0, 16.2]), timing(&[10.1, 50.0, 20.0])];
        assert_eq!(verdict(&sheet, step(0.9)), Verdict::Shown);
        assert_eq!(verdict(&sheet, step(0.7)), Verdict::Contradicted);
        sheet.timings = vec![timing(&[8.0, 60.0, 16.0]), timing(&[10.0, 30.0, 20.0])];
        assert_eq!(verdict(&sheet, step(0.9)), Verdict::NotShown);
    }

    #[test]
    fn less_training_is_read_off_the_curves() {
        let study = study();
        let mut sheet = sheet(&study, [&[], &[]]);
        let fast = [(20, 3.0), (40, 1.0), (100, 0.5)];
        let slow = [(20, 4.0), (40, 3.0), (100, 2.0)];
        sheet.results = vec![vec![run(0.5, &fast); 3], vec![run(2.0, &slow); 3]];
        // 2.0 is reached half way between 20 and 40 of 100 steps; both arms have the same FLOPs a step.
        let sample = sheet.sample(0, Measure::LessTraining("b"));
        assert!(sample.values.iter().all(|v| (v - 100.0 / 30.0).abs() < 1e-9), "{sample:?}");
        assert_eq!(sheet.sample(0, Measure::SecondsToReach("b")).values, [15.0; 3]);
        let less = |of, than, times| Condition::LessTraining { of, than, times };
        assert_eq!(verdict(&sheet, less("a", "b", 3.0)), Verdict::Shown);
        assert_eq!(verdict(&sheet, less("a", "b", 4.0)), Verdict::Contradicted);
        // The other never reaches it: less than once, whatever it would need.
        let bound = sheet.sample(1, Measure::LessTraining("a"));
        assert_eq!((bound.bounds, bound.values.as_slice()), (3, &[1.0; 3][..]));
        assert_eq!(verdict(&sheet, less("b", "a", 2.0)), Verdict::Contradicted);
        assert_eq!(verdict(&sheet, less("b", "a", 0.5)), Verdict::NotShown);
        assert_eq!(sheet.text(1, Measure::FlopsToReach("a")), "not reached");
        assert!(sheet.text(1, Measure::LessTraining("a")).starts_with("< 1.00"));
    }
}
