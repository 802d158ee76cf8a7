//! `metrics.jsonl`: what a run measured, one JSON object a line.
//!
//! A line is written with one call to the system and ends in a line break, so a process killed at any moment leaves at
//! most one torn line, the last: it has no line break. [`MetricsWriter::resume`] takes it away together with the lines
//! beyond the step the run goes on from. Numbers that are not finite are written as `null` and read back as NaN.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What can go wrong with a metrics file.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The system failed.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// What was tried ("create", "read", ...).
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line, other than a torn last one, is no metrics record.
    #[error("{}:{line}: not a metrics record", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser said.
        source: serde_json::Error,
    },
}

/// One line of the file; its JSON has `"kind": "train"`, `"kind": "eval"` or `"kind": "alarm"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A training step.
    Train(TrainRecord),
    /// An evaluation.
    Eval(EvalRecord),
    /// A router that left the limits it was given.
    Alarm(AlarmRecord),
}

/// What a training step measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// What was minimised: `lm_loss` plus the weighted auxiliary losses.
    #[serde(with = "finite_or_null")]
    pub loss: f64,
    /// Mean cross entropy, nats per token.
    #[serde(with = "finite_or_null")]
    pub lm_loss: f64,
    /// Load-balancing loss and other auxiliary losses, as weighted in `loss`.
    #[serde(with = "finite_or_null")]
    pub aux_loss: f64,
    /// Distillation term, as weighted in `loss`; only of a step that follows a teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kd_loss: Option<f64>,
    /// Learning rate of the step.
    #[serde(with = "finite_or_null")]
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    #[serde(with = "finite_or_null")]
    pub grad_norm: f64,
    /// Training speed, tokens per second.
    #[serde(with = "finite_or_null")]
    pub tokens_per_s: f64,
    /// One entry per MoE layer, lowest layer first; empty (and left out) in steps that the host did not look at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<LayerLoad>,
}

/// How a MoE layer shared its tokens out, and how its router fares. What an older file does not have is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Number of the layer in the model, from 0.
    pub layer: usize,
    /// For each expert the fraction of the routed (token, choice) pairs it was given; balanced is 1 / experts.
    pub load: Vec<f32>,
    /// Fraction of the routed pairs dropped because the capacity was full; 0 when dropless.
    pub dropped: f32,
    /// Mean entropy of the router's probabilities, nats per token: 0 where every token is sure, at most ln(experts).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<f32>,
    /// Root of the mean square over the tokens of logsumexp(logits), the root of the z-loss: how large the logits are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_scale: Option<f32>,
    /// Mean over the tokens of the coefficient of the network beside the experts, 0 to 1; only where the router learns it. At 1
    /// the residual network of PR-MoE does all the work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coefficient: Option<f32>,
    /// For each expert the steps since its last token, 0 if it had one in this step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub idle: Vec<u32>,
    /// Experts that had no token for [`crate::health::DEAD_AFTER`] steps, or for as many as an alarm says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead: Option<usize>,
}

/// One event: a value that left the limits an alarm gives it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlarmRecord {
    /// Steps done.
    pub step: u64,
    /// What was looked at.
    pub alarm: AlarmKind,
    /// Number of the layer in the model, from 0.
    pub layer: usize,
    /// The expert, for [`AlarmKind::DeadExperts`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<usize>,
    /// What was found, in the unit of the kind.
    #[serde(with = "finite_or_null")]
    pub value: f64,
    /// The limit that it passed.
    #[serde(with = "finite_or_null")]
    pub limit: f64,
}

/// What an alarm looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlarmKind {
    /// Steps since an expert's last token.
    DeadExperts,
    /// Fraction of choices that were dropped.
    Drop,
    /// Entropy of the router, nats per token.
    Entropy,
    /// Mean coefficient of the network beside the experts.
    Coefficient,
    /// Scale of the logits, see [`LayerLoad::logit_scale`].
    LogitScale,
}

/// What an evaluation measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps done.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean cross entropy on validation text, nats per token.
    #[serde(with = "finite_or_null")]
    pub val_loss: f64,
    /// The same in bits per byte of text.
    #[serde(with = "finite_or_null")]
    pub bits_per_byte: f64,
}

impl Record {
    /// Steps done when the record was written.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(record) => record.step,
            Self::Eval(record) => record.step,
            Self::Alarm(record) => record.step,
        }
    }
}

/// JSON has no NaN and no infinity.
mod finite_or_null {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { to.serialize_f64(*value) } else { to.serialize_none() }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
    }
}

/// Writes `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    line: Vec<u8>,
}

impl MetricsWriter {
    /// Begins an empty file; what was there is gone.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn create(path: &Path) -> Result<Self, MetricsError> {
        let file = File::create(path).map_err(|source| io("create", path, source))?;
        Ok(Self { path: path.to_owned(), file, line: Vec::new() })
    }

    /// Opens the file of a run that goes on after `step`: a torn last line is removed, and so is everything from the
    /// first line of a later step on. A missing file is begun.
    ///
    /// # Errors
    /// [`MetricsError::Io`]; [`MetricsError::Line`] for a line in the part that is kept that is no record. The file is
    /// then as it was.
    pub fn resume(path: &Path, step: u64) -> Result<Self, MetricsError> {
        let fail = |source| io("open", path, source);
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
        let mut lines = Lines::new(path, &file);
        let mut keep = 0;
        // A last line that is whole but for its line break gets one here.
        let mut unended = false;
        while let Some((record, end)) = lines.next_record()? {
            if record.step() > step {
                break;
            }
            keep = end;
            unended = lines.unended;
        }
        let fail = |source| io("shorten", path, source);
        file.set_len(keep).map_err(fail)?;
        file.seek(SeekFrom::Start(keep)).map_err(fail)?;
        if unended {
            file.write_all(b"\n").map_err(fail)?;
        }
        Ok(Self { path: path.to_owned(), file, line: Vec::new() })
    }

    /// Writes one line; it is with the system when this returns.
    ///
    /// # Errors
    /// [`MetricsError::Io`] (for example a full disk). Lines before this one stay whole.
    pub fn write(&mut self, record: &Record) -> Result<(), MetricsError> {
        self.line.clear();
        let fail = |source| io("write", &self.path, source);
        serde_json::to_writer(&mut self.line, record).map_err(|error| fail(error.into()))?;
        self.line.push(b'\n');
        self.file.write_all(&self.line).map_err(fail)
    }
}

/// Reads `metrics.jsonl` record by record, without keeping more than a line in memory. Unknown fields are ignored and a
/// torn last line is left out.
#[derive(Debug)]
pub struct MetricsReader {
    lines: Lines<File>,
    failed: bool,
}

impl MetricsReader {
    /// Opens the file.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn open(path: &Path) -> Result<Self, MetricsError> {
        let file = File::open(path).map_err(|source| io("open", path, source))?;
        Ok(Self { lines: Lines::new(path, file), failed: false })
    }
}

impl Iterator for MetricsReader {
    type Item = Result<Record, MetricsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.lines.next_record().map(|next| next.map(|(record, _)| record)).transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}

#[derive(Debug)]
struct Lines<R: std::io::Read> {
    path: PathBuf,
    from: BufReader<R>,
    buffer: Vec<u8>,
    line: usize,
    end: u64,
    /// Whether the latest line has no line break.
    unended: bool,
}

impl<R: std::io::Read> Lines<R> {
    fn new(path: &Path, from: R) -> Self {
        let from = BufReader::with_capacity(1 << 16, from);
        Self { path: path.to_owned(), from, buffer: Vec::new(), line: 0, end: 0, unended: false }
    }

    /// The next record and where its line ends in the file; none at the end and for a torn last line.
    fn next_record(&mut self) -> Result<Option<(Record, u64)>, MetricsError> {
        loop {
            self.buffer.clear();
            let read = self.from.read_until(b'\n', &mut self.buffer);
            let read = read.map_err(|source| io("read", &self.path, source))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            self.end += read as u64;
            self.unended = self.buffer.last() != Some(&b'\n');
            if self.buffer.trim_ascii().is_empty() {
                continue;
            }
            return match serde_json::from_slice(&self.buffer) {
                Ok(record) => Ok(Some((record, self.end))),
                Err(_) if self.unended => Ok(None),
                Err(source) => Err(MetricsError::Line { path: self.path.clone(), line: self.line, source }),
            };
        }
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> MetricsError {
    MetricsError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
