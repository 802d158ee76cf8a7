//! Fuzzing of everything that reads text or bytes from outside: no input may panic, take long, or ask for much more memory
//! than its own size. The program `fuzz` (`tests/src/bin/fuzz.rs`) runs it.
//!
//! Input `i` of a target is a pure function of seed, target and `i`, so a failure is repeated with the numbers it is
//! reported with, and a run can go on anywhere. To add a target: a function that makes a [`Target`], and its line in
//! [`targets`].

mod caches;
mod configs;
mod files;
mod graphs;
mod mutate;
mod routes;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;

pub use mutate::Words;

/// What must hold of something that was read, beyond that it was read: an error says what does not.
pub type Then = Box<dyn FnOnce() -> Result<(), String>>;

/// Makes a changed input whole.
pub type Repair = Box<dyn Fn(Vec<u8>, &mut Words) -> Vec<u8>>;
/// Reads an input.
pub type Parse = Box<dyn Fn(&[u8]) -> Option<Then>>;

/// A parser under test.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Valid inputs, from which others are made.
    pub seeds: Vec<Vec<u8>>,
    /// Words that mean something to the parser.
    pub words: Vec<String>,
    /// Makes what a change broke whole again (numbers of lines, lengths, hashes), so that later stages are reached too.
    pub repair: Repair,
    /// Reads an input; `None` if it is refused. Memory is measured here only.
    pub parse: Parse,
}

/// All targets, in a fixed order: their places seed their inputs.
///
/// # Errors
/// If a scratch folder cannot be made.
pub fn targets() -> std::io::Result<Vec<Target>> {
    Ok(vec![
        graphs::target(),
        configs::target(),
        files::safetensors()?,
        files::state()?,
        files::metrics()?,
        routes::target()?,
        caches::target()?,
    ])
}

/// The allocator's counters.
#[derive(Clone, Copy)]
pub struct Meter {
    /// Forgets the peak.
    pub reset: fn(),
    /// Bytes allocated at once, at most, since the last reset, beyond those that were allocated then.
    pub peak: fn() -> usize,
}

/// What is allocated when an input's turn begins.
static BASE: AtomicUsize = AtomicUsize::new(0);

impl Meter {
    /// Of a program whose global allocator is [`PeakAlloc`], which counts for the whole program.
    pub const PEAK: Meter = Meter {
        reset: || {
            BASE.store(PeakAlloc.current_usage(), Relaxed);
            PeakAlloc.reset_peak_usage();
        },
        peak: || PeakAlloc.peak_usage().saturating_sub(BASE.load(Relaxed)),
    };
}

/// A parser may hold this many times the input's size,
const MOST_TIMES: usize = 16;
/// and this many bytes besides: a reader's buffer of 64 KiB, an error's text, short inputs of many small parts.
const MOST_BESIDES: usize = 128 << 10;
/// An input longer than this is cut.
const MOST_BYTES: usize = 16 << 10;
/// An input that takes longer is given again, and then may not take longer on the processor.
const DEADLINE: Duration = Duration::from_secs(2);

/// What a run saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Inputs.
    pub inputs: u64,
    /// Inputs that were read without an error.
    pub read: u64,
    /// The most memory an input took while it was read.
    pub most_bytes: usize,
    /// The longest time of an input.
    pub slowest: Duration,
}

/// An input that broke its parser.
#[derive(Debug)]
pub struct Failure {
    /// Number of the input.
    pub index: u64,
    /// What happened.
    pub what: String,
    /// The input.
    pub input: Vec<u8>,
}

/// Gives inputs `from..from + count` of a target to it, until `until`; `watch` hears the number of each input before its turn.
///
/// # Errors
/// The first failure.
pub fn run(
    (place, target): (usize, &Target),
    seed: u64,
    inputs: std::ops::Range<u64>,
    until: Option<Instant>,
    meter: Meter,
    watch: &dyn Fn(u64),
) -> Result<Report, Box<Failure>> {
    let mut report = Report::default();
    for index in inputs {
        if until.is_some_and(|end| Instant::now() > end) {
            break;
        }
        let input = input(place, target, seed, index);
        watch(index);
        let fail = |what: String| Box::new(Failure { index, what, input: input.clone() });
        let (read, bytes, time) = attempt(target, &input, meter).map_err(fail)?;
        let allowed = MOST_TIMES * input.len() + MOST_BESIDES;
        if bytes > allowed {
            return Err(fail(format!("{bytes} bytes of memory for {} bytes of input", input.len())));
        }
        let mut time = time;
        if time > DEADLINE {
            // The machine may have been busy or asleep: what counts is the processor's time of a second attempt.
            let before = on_processor();
            time = attempt(target, &input, meter).map_err(fail)?.2;
            time = before.and_then(|before| on_processor()?.checked_sub(before)).unwrap_or(time);
            if time > DEADLINE {
                return Err(fail(format!("took {time:?}")));
            }
        }
        report.inputs += 1;
        report.read += u64::from(read);
        report.most_bytes = report.most_bytes.max(bytes);
        report.slowest = report.slowest.max(time);
    }
    Ok(report)
}

/// How long this thread has been on a processor; `None` where the system does not tell.
fn on_processor() -> Option<Duration> {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    told.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// Whether the input was read, the peak of memory while it was, and the time of everything.
fn attempt(target: &Target, input: &[u8], meter: Meter) -> Result<(bool, usize, Duration), String> {
    let start = Instant::now();
    let whole = AssertUnwindSafe(|| {
        (meter.reset)();
        let then = (target.parse)(input);
        let bytes = (meter.peak)();
        let read = then.is_some();
        then.map_or(Ok(()), |then| then()).map(|()| (read, bytes))
    });
    match catch_unwind(whole) {
        Ok(held) => held.map(|(read, bytes)| (read, bytes, start.elapsed())),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}

/// Input `index` of a target.
pub fn input(place: usize, target: &Target, seed: u64, index: u64) -> Vec<u8> {
    let mut words = Words::new(seed, place as u32, index);
    let mut input = mutate::input(target, &mut words);
    input.truncate(MOST_BYTES);
    (target.repair)(input, &mut words)
}
