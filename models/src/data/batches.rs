//! Batches: what is trained on at a step, what is validated on.

use moebius_ir::philox::philox4x32_10;

use super::{DataError, Stream};

/// Training batches drawn at random from a stream. Batch `i` is a pure function of (stream, seed, i), so a resumed run
/// goes on with the very batches it would have seen.
#[derive(Debug, Clone)]
pub struct Batches {
    stream: Stream,
    seed: u64,
    batch: usize,
    seq: usize,
}

/// Bits per byte of text: `loss * tokens / (bytes * ln 2)`, with `loss` the mean cross entropy in nats per token over
/// `tokens` tokens that stand for `bytes` bytes of text.
pub fn bits_per_byte(loss: f64, tokens: u64, bytes: u64) -> f64 {
    loss * tokens as f64 / (bytes as f64 * std::f64::consts::LN_2)
}

impl Batches {
    /// Batches of `batch` sequences of `seq` tokens.
    ///
    /// # Errors
    /// [`DataError::EmptyBatch`]; [`DataError::TooShort`] if the stream has fewer than `seq + 1` tokens.
    pub fn new(stream: &Stream, seed: u64, batch: usize, seq: usize) -> Result<Self, DataError> {
        check(stream, batch, seq)?;
        Ok(Self { stream: stream.clone(), seed, batch, seq })
    }

    /// Writes the batch of a step. `inputs` and `targets` are `[B, T]` row by row; `targets[b][t]` is the token after
    /// `inputs[b][t]`. Each row starts at a position drawn uniformly from all that have `T + 1` tokens from there.
    ///
    /// # Errors
    /// [`DataError::Io`] if a file can no longer be read.
    ///
    /// # Panics
    /// If a slice does not have `B * T` elements: a bug of the caller.
    pub fn fill(&self, step: u64, inputs: &mut [i32], targets: &mut [i32]) -> Result<(), DataError> {
        assert_eq!((inputs.len(), targets.len()), (self.batch * self.seq, self.batch * self.seq));
        let starts = (self.stream.len() - self.seq) as u64;
        let rows = inputs.chunks_exact_mut(self.seq).zip(targets.chunks_exact_mut(self.seq));
        for (row, (inputs, targets)) in rows.enumerate() {
            let start = uniform(self.seed, step, row as u32, starts) as usize;
            fill_row(&self.stream, start, inputs, targets)?;
        }
        Ok(())
    }

    /// Sequences per batch, B.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens per sequence, T.
    pub fn seq(&self) -> usize {
        self.seq
    }
}

/// Validation windows: `T` inputs and the `T` tokens after each of them, one window beginning where the one before
/// ended, so that every token is a target at most once.
#[derive(Debug, Clone)]
pub struct Windows {
    stream: Stream,
    batch: usize,
    seq: usize,
    /// Windows the stream has room for.
    room: usize,
    batches: usize,
    bytes: u64,
}

impl Windows {
    /// Chooses at most `max_batches` batches of `batch` windows of `seq` tokens (none: as many as there are), evenly
    /// spread over the stream. Only whole batches are used, so up to `batch * seq` tokens at the end may be left out. A
    /// stream with fewer than `batch` windows gives one batch in which windows come again in turn.
    ///
    /// # Errors
    /// [`DataError::EmptyBatch`]; [`DataError::TooShort`] if the stream has fewer than `seq + 1` tokens; [`DataError::Io`]
    /// if a file can no longer be read.
    pub fn new(stream: &Stream, batch: usize, seq: usize, max_batches: Option<usize>) -> Result<Self, DataError> {
        check(stream, batch, seq)?;
        let room = (stream.len() - 1) / seq;
        let batches = (room / batch).min(max_batches.unwrap_or(usize::MAX)).max(1);
        let mut windows = Self { stream: stream.clone(), batch, seq, room, batches, bytes: 0 };
        for window in 0..batches * batch {
            let first = windows.start(window) + 1;
            windows.bytes += windows.stream.text_bytes(first..first + seq)?;
        }
        Ok(windows)
    }

    /// Number of batches.
    pub fn batches(&self) -> usize {
        self.batches
    }

    /// Targets in all batches together: `batches * B * T`.
    pub fn tokens(&self) -> u64 {
        (self.batches * self.batch * self.seq) as u64
    }

    /// Bytes of text those targets stand for; for [`bits_per_byte`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes batch `index`, `[B, T]` as in [`Batches::fill`].
    ///
    /// # Errors
    /// [`DataError::Io`] if a file can no longer be read.
    ///
    /// # Panics
    /// If `index` is not below [`Windows::batches`] or a slice does not have `B * T` elements: a bug of the caller.
    pub fn fill(&self, index: usize, inputs: &mut [i32], targets: &mut [i32]) -> Result<(), DataError> {
        assert!(index < self.batches, "batch {index} of {}", self.batches);
        assert_eq!((inputs.len(), targets.len()), (self.batch * self.seq, self.batch * self.seq));
        let rows = inputs.chunks_exact_mut(self.seq).zip(targets.chunks_exact_mut(self.seq));
        for (row, (inputs, targets)) in rows.enumerate() {
            fill_row(&self.stream, self.start(index * self.batch + row), inputs, targets)?;
        }
        Ok(())
    }

    /// Position of the first input of a window.
    fn start(&self, window: usize) -> usize {
        let count = self.batches * self.batch;
        let place = if count <= self.room { window * self.room / count } else { window % self.room };
        place * self.seq
    }
}

fn check(stream: &Stream, batch: usize, seq: usize) -> Result<(), DataError> {
    if batch == 0 || seq == 0 {
        return Err(DataError::EmptyBatch { batch, seq });
    }
    if stream.len() <= seq {
        let name = stream.name().to_owned();
        return Err(DataError::TooShort { name, seq, wanted: seq.saturating_add(1), found: stream.len() });
    }
    Ok(())
}

fn fill_row(stream: &Stream, start: usize, inputs: &mut [i32], targets: &mut [i32]) -> Result<(), DataError> {
    stream.read(start, inputs)?;
    stream.read(start + 1, targets)
}

/// A number in `0..bound` for (seed, step, row): the high part of a 64-bit random times the bound, whose bias is below
/// bound / 2^64.
fn uniform(seed: u64, step: u64, row: u32, bound: u64) -> u64 {
    let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
    let ([low, high], key) = (halves(step), halves(seed));
    let random = philox4x32_10(key, [low, high, row, 0]);
    let wide = u64::from(random[0]) | u64::from(random[1]) << 32;
    ((u128::from(wide) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_stays_below_its_bound_and_fills_it() {
        let mut seen = [0u32; 7];
        for step in 0..7000 {
            seen[uniform(3, step, 1, 7) as usize] += 1;
        }
        // 1000 expected each, standard deviation 29.
        assert!(seen.iter().all(|n| (850..1150).contains(n)), "{seen:?}");
    }
}
