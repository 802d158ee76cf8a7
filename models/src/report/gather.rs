//! One pass over the records of a run: what the page needs of them.

use super::bins::{Bins, Merge};
use crate::metrics::{AlarmRecord, EvalRecord, LayerLoad, Record, TrainRecord};

/// Bins of the line charts: about one for two pixels.
const CURVE_BINS: usize = 480;
/// Bins of a heat map before the page thins them out.
const HEAT_BINS: usize = 160;
/// Bins of a layer's health before the page thins them out.
const HEALTH_BINS: usize = 160;
/// Alarms that are kept to be shown.
const MOST_ALARMS: usize = 20;

/// Everything the page shows of the measurements.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) train: Bins<TrainBin>,
    pub(super) evals: Vec<EvalRecord>,
    pub(super) layers: Vec<LayerBins>,
    pub(super) steps: u64,
    pub(super) tokens: u64,
    pub(super) trained: bool,
    /// First step whose loss was not finite.
    pub(super) not_finite: Option<u64>,
    /// The first alarms, and how many there were.
    pub(super) alarms: Vec<AlarmRecord>,
    pub(super) alarm_count: usize,
    /// The last step that followed a teacher.
    pub(super) taught: Option<u64>,
}

/// Mean, least and greatest of the finite values of one quantity.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stat {
    count: u64,
    sum: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

/// What the training records of a few steps measured.
#[derive(Debug, Clone)]
pub(super) struct TrainBin {
    step: Stat,
    pub(super) lm_loss: Stat,
    pub(super) aux_loss: Stat,
    pub(super) kd_loss: Stat,
    pub(super) lr: Stat,
    pub(super) grad_norm: Stat,
    pub(super) tokens_per_s: Stat,
}

/// How one MoE layer shared its tokens out over the run.
#[derive(Debug)]
pub(super) struct LayerBins {
    pub(super) layer: usize,
    pub(super) experts: usize,
    pub(super) bins: Bins<LoadBin>,
    pub(super) health: Bins<HealthBin>,
    /// Who was dead at the last measurement; `None` if it does not tell.
    pub(super) dead: Option<Vec<Dead>>,
}

/// An expert without a token for so many steps that its layer counts it as dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dead {
    pub(super) expert: usize,
    /// The step of its last token; `None` if it never had one.
    pub(super) last: Option<u64>,
}

/// The dead experts of a record, by number. It says how many they are, not after how many steps: those idle longest.
fn dead(step: u64, load: &LayerLoad) -> Option<Vec<Dead>> {
    let count = load.dead.filter(|&count| count <= load.idle.len())?;
    let mut experts: Vec<usize> = (0..load.idle.len()).collect();
    experts.sort_by_key(|&expert| (std::cmp::Reverse(load.idle[expert]), expert));
    experts.truncate(count);
    experts.sort_unstable();
    let last = |expert: usize| step.checked_sub(load.idle[expert].into()).filter(|&last| last > 0);
    Some(experts.into_iter().map(|expert| Dead { expert, last: last(expert) }).collect())
}

/// What the router of a layer measured in a few steps. Values that a file does not have count nothing.
#[derive(Debug, Clone)]
pub(super) struct HealthBin {
    step: Stat,
    pub(super) entropy: Stat,
    pub(super) dropped: Stat,
    pub(super) coefficient: Stat,
    pub(super) logit_scale: Stat,
    pub(super) dead: Stat,
}

/// Sums over the records of a few steps.
#[derive(Debug, Clone)]
pub(super) struct LoadBin {
    count: u64,
    load: Vec<f64>,
    dropped: f64,
}

impl Default for Gathered {
    fn default() -> Self {
        Self {
            train: Bins::new(CURVE_BINS),
            evals: Vec::new(),
            layers: Vec::new(),
            steps: 0,
            tokens: 0,
            trained: false,
            not_finite: None,
            alarms: Vec::new(),
            alarm_count: 0,
            taught: None,
        }
    }
}

impl Gathered {
    pub(super) fn add(&mut self, record: &Record) {
        self.steps = self.steps.max(record.step());
        match record {
            Record::Train(train) => self.add_train(train),
            Record::Eval(eval) => {
                self.tokens = self.tokens.max(eval.tokens);
                self.evals.push(eval.clone());
            }
            Record::Alarm(alarm) => self.add_alarm(alarm),
        }
    }

    fn add_alarm(&mut self, alarm: &AlarmRecord) {
        self.alarm_count += 1;
        if self.alarms.len() < MOST_ALARMS {
            self.alarms.push(alarm.clone());
        }
    }

    fn add_train(&mut self, record: &TrainRecord) {
        self.trained = true;
        self.tokens = self.tokens.max(record.tokens);
        if record.kd_loss.is_some() {
            self.taught = Some(record.step);
        }
        if !record.loss.is_finite() {
            self.not_finite.get_or_insert(record.step);
        }
        self.train.add(
            record.step,
            TrainBin {
                step: Stat::of(record.step as f64),
                lm_loss: Stat::of(record.lm_loss),
                aux_loss: Stat::of(record.aux_loss),
                kd_loss: Stat::of(record.kd_loss.unwrap_or(f64::NAN)),
                lr: Stat::of(record.lr),
                grad_norm: Stat::of(record.grad_norm),
                tokens_per_s: Stat::of(record.tokens_per_s),
            },
        );
        for load in record.experts.iter().filter(|load| !load.load.is_empty()) {
            self.add_load(record.step, load);
        }
    }

    fn add_load(&mut self, step: u64, load: &LayerLoad) {
        let finite = |value: f32| if value.is_finite() { f64::from(value.max(0.0)) } else { 0.0 };
        let bin =
            LoadBin { count: 1, load: load.load.iter().copied().map(finite).collect(), dropped: finite(load.dropped) };
        let experts = bin.load.len();
        let or_none = |value: Option<f32>| Stat::of(value.map_or(f64::NAN, f64::from));
        let health = HealthBin {
            step: Stat::of(step as f64),
            entropy: or_none(load.entropy),
            dropped: or_none(Some(load.dropped)),
            coefficient: or_none(load.coefficient),
            logit_scale: or_none(load.logit_scale),
            dead: Stat::of(load.dead.map_or(f64::NAN, |dead| dead as f64)),
        };
        let same = |layer: &&mut LayerBins| layer.layer == load.layer && layer.experts == experts;
        let dead = dead(step, load);
        match self.layers.iter_mut().find(same) {
            Some(layer) => {
                layer.bins.add(step, bin);
                layer.health.add(step, health);
                layer.dead = dead;
            }
            None => {
                let (mut bins, mut healths) = (Bins::new(HEAT_BINS), Bins::new(HEALTH_BINS));
                bins.add(step, bin);
                healths.add(step, health);
                self.layers.push(LayerBins { layer: load.layer, experts, bins, health: healths, dead });
            }
        }
    }

    /// The evaluation with the lowest loss.
    pub(super) fn best(&self) -> Option<&EvalRecord> {
        self.evals.iter().filter(|e| e.val_loss.is_finite()).min_by(|a, b| a.val_loss.total_cmp(&b.val_loss))
    }

    /// Points (step, mean) of one quantity.
    pub(super) fn curve(&self, of: impl Fn(&TrainBin) -> Stat) -> Vec<(f64, f64)> {
        self.train.filled().filter_map(|bin| Some((bin.step.mean()?, of(bin).mean()?))).collect()
    }

    /// Points (step, least, greatest) of one quantity.
    pub(super) fn band(&self, of: impl Fn(&TrainBin) -> Stat) -> Vec<(f64, f64, f64)> {
        let bounds = |bin: &TrainBin| {
            let stat = of(bin);
            stat.mean().map(|_| (stat.min, stat.max))
        };
        self.train
            .filled()
            .filter_map(|bin| bounds(bin).and_then(|(lo, hi)| Some((bin.step.mean()?, lo, hi))))
            .collect()
    }
}

impl Stat {
    fn of(value: f64) -> Self {
        if value.is_finite() {
            Self { count: 1, sum: value, min: value, max: value }
        } else {
            Self { count: 0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY }
        }
    }

    fn mean(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

impl Merge for Stat {
    fn merge(&mut self, later: Self) {
        self.count += later.count;
        self.sum += later.sum;
        self.min = self.min.min(later.min);
        self.max = self.max.max(later.max);
    }
}

impl Merge for TrainBin {
    fn merge(&mut self, later: Self) {
        self.step.merge(later.step);
        self.lm_loss.merge(later.lm_loss);
        self.aux_loss.merge(later.aux_loss);
        self.kd_loss.merge(later.kd_loss);
        self.lr.merge(later.lr);
        self.grad_norm.merge(later.grad_norm);
        self.tokens_per_s.merge(later.tokens_per_s);
    }
}

impl Merge for HealthBin {
    fn merge(&mut self, later: Self) {
        self.step.merge(later.step);
        self.entropy.merge(later.entropy);
        self.dropped.merge(later.dropped);
        self.coefficient.merge(later.coefficient);
        self.logit_scale.merge(later.logit_scale);
        self.dead.merge(later.dead);
    }
}

impl HealthBin {
    /// The point (step, mean) of one quantity, if there is one.
    pub(super) fn point(&self, of: impl Fn(&HealthBin) -> Stat) -> Option<(f64, f64)> {
        Some((self.step.mean()?, of(self).mean()?))
    }
}

impl Merge for LoadBin {
    fn merge(&mut self, later: Self) {
        self.count += later.count;
        self.dropped += later.dropped;
        self.load.iter_mut().zip(later.load).for_each(|(sum, load)| *sum += load);
    }
}

impl LoadBin {
    /// Mean share of each expert, as a multiple of the balanced share.
    pub(super) fn ratios(&self) -> impl Iterator<Item = f64> {
        let scale = self.load.len() as f64 / self.count as f64;
        self.load.iter().map(move |load| load * scale)
    }

    /// Mean dropped share.
    pub(super) fn dropped(&self) -> f64 {
        self.dropped / self.count as f64
    }
}

/// A centred moving mean. Its window shrinks towards the start, where values fall fast and a wide one would be off; at the
/// end it only loses the half that is not there, so that the last value is no noisier than the others.
pub(super) fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 70;
    (0..points.len())
        .map(|at| {
            let reach = reach.min(at);
            let window = &points[at - reach..=(at + reach).min(points.len() - 1)];
            (points[at].0, window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}
