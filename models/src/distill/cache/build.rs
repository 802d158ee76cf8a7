//! Building a cache: one pass of the teacher over the batches of the run.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use moebius::{Engine, Program, Session};

use super::write::{CacheWriter, Kept};
use super::{CACHE_FILE, CacheError, CacheReader, Identity};
use crate::data::Batches;
use crate::distill::{DistillError, Teacher};
use crate::gpt;

/// How far a cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Batches that are there.
    pub done: u64,
    /// Batches that are wanted.
    pub wanted: u64,
    /// Batches that were there when it was begun or gone on with.
    pub before: u64,
    /// Bytes of a batch.
    pub bytes_per_batch: u64,
}

/// A cache to be built.
#[derive(Debug)]
pub struct Build<'b> {
    /// Of what it is.
    pub identity: &'b Identity,
    /// The batches of the run, in their order.
    pub batches: &'b Batches,
    /// How many of them.
    pub wanted: u64,
    /// The cache's folder, made if needed.
    pub folder: &'b Path,
}

/// Rows of logits that are on the device and on their way from it at a time: at most so many bytes.
const MOST_BYTES: usize = 64 << 20;
/// Below this many logits, waking threads costs more than it brings.
const FEW_LOGITS: usize = 1 << 18;

/// Opens the cache, after building what is missing: the teacher is only loaded for that, and is gone again when this returns.
/// `progress` hears of every batch.
///
/// # Errors
/// [`DistillError::Cache`], among them [`CacheError::Other`] if the folder has a cache for another run; [`DistillError::Stopped`] if
/// `stop` was set: what is built stays, and the next call goes on with it; [`DistillError::NotFinite`].
pub fn build(
    engine: &Engine,
    teacher: &mut Teacher,
    of: &Build<'_>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<CacheReader, DistillError> {
    let path = of.folder.join(CACHE_FILE);
    match CacheReader::of(&path, of.identity, of.wanted) {
        Ok(reader) => return Ok(reader),
        Err(CacheError::Short { .. }) => {}
        Err(CacheError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let io = |source| CacheError::Io { operation: "create the folder", path: of.folder.to_owned(), source };
    std::fs::create_dir_all(of.folder).map_err(io)?;
    let mut writer = CacheWriter::open(&path, of.identity)?;
    let bytes_per_batch = writer.block_bytes();
    if bytes_per_batch.checked_mul(of.wanted).is_none_or(|bytes| bytes > i64::MAX as u64) {
        return Err(CacheError::TooLong { path, batches: of.wanted, block: bytes_per_batch }.into());
    }
    let before = writer.batches();
    let mut told = |done| progress(Progress { done, wanted: of.wanted, before, bytes_per_batch });
    told(before);
    let mut source = Source::new(engine, teacher, of)?;
    let mut kept = Kept::default();
    while writer.batches() < of.wanted {
        let batch = writer.batches();
        if stop.load(Ordering::Relaxed) {
            writer.finish()?;
            return Err(DistillError::Stopped { done: batch, wanted: of.wanted });
        }
        source.keep(batch, &mut kept)?;
        writer.push(&kept)?;
        told(writer.batches());
    }
    writer.finish()?;
    drop(source);
    Ok(CacheReader::of(&path, of.identity, of.wanted)?)
}

/// The teacher at work.
struct Source<'b> {
    of: &'b Build<'b>,
    session: Session,
    hidden: Program,
    logits: Program,
    /// Rows of logits at a time.
    rows: usize,
    tokens: Vec<i32>,
    targets: Vec<i32>,
    values: Vec<f32>,
}

impl<'b> Source<'b> {
    fn new(engine: &Engine, teacher: &mut Teacher, of: &'b Build<'b>) -> Result<Source<'b>, DistillError> {
        let Identity { batch, sequence, vocabulary, .. } = *of.identity;
        let tokens = batch * sequence;
        let rows = (MOST_BYTES / (4 * vocabulary)).clamp(1, tokens);
        let mut session = engine.session();
        let model = &teacher.config().model;
        let hidden = session.compile(&gpt::teacher_hidden(model, batch, sequence)?)?;
        let logits = session.compile(&gpt::teacher_logits(model, tokens, rows)?)?;
        teacher.load(&mut session)?;
        let values = vec![0.0; rows * vocabulary];
        Ok(Source { of, session, hidden, logits, rows, tokens: vec![0; tokens], targets: vec![0; tokens], values })
    }

    /// What is kept for the tokens of a batch.
    fn keep(&mut self, batch: u64, kept: &mut Kept) -> Result<(), DistillError> {
        let identity = self.of.identity;
        self.of.batches.fill(batch, &mut self.tokens, &mut self.targets)?;
        self.hidden.feed("tokens", &self.tokens)?;
        self.session.run(&mut self.hidden)?;
        let (n, k) = (self.tokens.len(), identity.top);
        kept.ids.resize(n * k, 0);
        kept.log_p.resize(n * k, 0.0);
        kept.log_tail.resize(n, 0.0);
        for first in (0..n).step_by(self.rows) {
            let count = self.rows.min(n - first);
            // Rows beyond the last are computed for nothing.
            let rows: Vec<i32> = (first..first + self.rows).map(|row| row.min(n - 1) as i32).collect();
            self.logits.feed("rows", &rows)?;
            self.session.run(&mut self.logits)?;
            self.logits.output_into("logits", &mut self.values)?;
            let logits = &self.values[..count * identity.vocabulary];
            if let Some(&found) = logits.iter().find(|l| !l.is_finite()) {
                return Err(DistillError::NotFinite { teacher: identity.teacher.clone(), batch, found });
            }
            let (ids, log_p) = (&mut kept.ids[first * k..][..count * k], &mut kept.log_p[first * k..][..count * k]);
            keep_rows(logits, identity, ids, log_p, &mut kept.log_tail[first..first + count]);
        }
        Ok(())
    }
}

/// [`keep_row`] for each row, on all cores where there is enough to do.
fn keep_rows(logits: &[f32], identity: &Identity, ids: &mut [u32], log_p: &mut [f32], log_tail: &mut [f32]) {
    let Identity { vocabulary: v, top: k, temperature, .. } = *identity;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = if logits.len() < FEW_LOGITS { log_tail.len() } else { log_tail.len().div_ceil(threads) }.max(1);
    let keep = move |logits: &[f32], ids: &mut [u32], log_p: &mut [f32], log_tail: &mut [f32]| {
        let mut order = Vec::with_capacity(v);
        let rows = logits.chunks_exact(v).zip(ids.chunks_exact_mut(k)).zip(log_p.chunks_exact_mut(k)).zip(log_tail);
        for (((logits, ids), log_p), log_tail) in rows {
            *log_tail = keep_row(logits, temperature, &mut order, ids, log_p);
        }
    };
    std::thread::scope(|scope| {
        let shares = logits.chunks(share * v).zip(ids.chunks_mut(share * k)).zip(log_p.chunks_mut(share * k));
        for (((logits, ids), log_p), log_tail) in shares.zip(log_tail.chunks_mut(share)) {
            if share * v >= logits.len() && logits.len() < FEW_LOGITS {
                keep(logits, ids, log_p, log_tail);
            } else {
                scope.spawn(move || keep(logits, ids, log_p, log_tail));
            }
        }
    });
}

/// The likeliest tokens of a row of logits in ascending order, of equals the lower ones, with their log-probabilities at the
/// temperature; returns the logarithm of the probability of all others, -inf for none.
fn keep_row(logits: &[f32], temperature: f64, order: &mut Vec<u32>, ids: &mut [u32], log_p: &mut [f32]) -> f32 {
    let k = ids.len();
    order.clear();
    order.extend(0..logits.len() as u32);
    let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, likelier);
    }
    let (kept, others) = order.split_at_mut(k);
    kept.sort_unstable();
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let scaled = |id: u32| (f64::from(logits[id as usize]) - max) / temperature;
    // The others in order, so that their sum does not depend on how they were selected.
    others.sort_unstable();
    let of_others: f64 = others.iter().map(|&id| scaled(id).exp()).sum();
    let all = kept.iter().map(|&id| scaled(id).exp()).sum::<f64>() + of_others;
    for ((id, log_p), &mut token) in ids.iter_mut().zip(log_p).zip(kept) {
        (*id, *log_p) = (token, (scaled(token) - all.ln()) as f32);
    }
    (of_others / all).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_are_kept_and_the_others_are_one() {
        let logits = [1.0f32, 3.0, -1.0, 3.0, 0.0, 1.0];
        let (mut order, mut ids, mut log_p) = (Vec::new(), [9; 3], [0.0; 3]);
        let tail = keep_row(&logits, 2.0, &mut order, &mut ids, &mut log_p);
        // Of the two tokens with logit 1 the lower one.
        assert_eq!(ids, [0, 1, 3]);
        let e = |l: f32| f64::from(l / 2.0).exp();
        let all: f64 = logits.iter().map(|&l| e(l)).sum();
        let near = |got: f32, want: f64| (f64::from(got) - want.ln()).abs() < 1e-6;
        assert!(near(log_p[1], e(3.0) / all) && near(log_p[0], e(1.0) / all), "{log_p:?}");
        assert!(near(tail, (e(-1.0) + e(0.0) + e(1.0)) / all), "{tail}");
        let (mut ids, mut log_p) = ([9; 6], [0.0; 6]);
        assert_eq!(keep_row(&logits, 1.0, &mut order, &mut ids, &mut log_p), f32::NEG_INFINITY);
        assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn many_rows_are_kept_as_one_is() {
        let (v, k, rows) = (300, 7, 2000);
        let logits: Vec<f32> = (0..rows * v).map(|i| ((i * 7919 + i / v * 31) % 1009) as f32 / 100.0).collect();
        let identity = Identity {
            teacher: String::new(),
            teacher_model: String::new(),
            teacher_weights: String::new(),
            data: String::new(),
            tokenizer: String::new(),
            vocabulary: v,
            sequence: rows,
            batch: 1,
            seed: 0,
            top: k,
            temperature: 1.0,
        };
        let (mut ids, mut log_p, mut tail) = (vec![0; rows * k], vec![0.0; rows * k], vec![0.0; rows]);
        keep_rows(&logits, &identity, &mut ids, &mut log_p, &mut tail);
        let mut order = Vec::new();
        for row in 0..rows {
            let (mut of_row, mut p) = (vec![0; k], vec![0.0; k]);
            let other = keep_row(&logits[row * v..][..v], 1.0, &mut order, &mut of_row, &mut p);
            assert_eq!((&ids[row * k..][..k], &log_p[row * k..][..k], tail[row]), (&of_row[..], &p[..], other));
        }
    }
}
