//! What a step and a token of an arm cost: measured side by side, in turns, after the runs.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use moebius::{Engine, Session};
use serde::{Deserialize, Serialize};

use super::result::{read_json, write_json};
use super::train::remove;
use super::{Arm, StudyError, Text, Training};
use crate::config::{Config, ModelConfig, hash};
use crate::data::Batches;
use crate::distill::cache::{Build, CacheReader, Identity, build};
use crate::distill::{CacheSettings, Course, DistillError, Settings, Stop, Teacher};
use crate::generate::Generator;
use crate::gpt::{self, Distilling, Lesson};
use crate::routes::RouteTap;
use crate::sampling::most_likely;
use crate::timed::{TimedStep, median};
use crate::tokenizer::Tokenizer;

/// Steps, or tokens, that warm a device up and are not counted.
const WARM_UP: usize = 3;
/// Tokens that the timed cache keeps for each token.
const CACHE_TOP: usize = 32;

/// What was measured of an arm.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timing {
    /// Milliseconds of a plain training step: the median.
    pub plain_ms: f64,
    /// Milliseconds of each of those steps. The arms' steps of one turn were taken one after the other.
    #[serde(default)]
    pub turns_ms: Vec<f64>,
    /// The same with the teacher in memory; of a student that has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_ms: Option<f64>,
    /// The same with the teacher's likeliest tokens from a cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_ms: Option<f64>,
    /// Milliseconds to generate a token, one text at a time: the median.
    pub decode_ms: f64,
    /// Bytes on the device in the most expensive step of its training: state and arena, a teacher in memory included.
    pub training_bytes: u64,
}

/// The file of a study's timings: those of its arms, in their order.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Timings {
    key: String,
    pub(super) arms: Vec<Timing>,
}

impl Timings {
    /// What the file has for these arms; none if they were not measured, or on another device.
    pub(super) fn read(path: &Path, key: &str) -> Result<Option<Timings>, StudyError> {
        Ok(read_json::<Timings>(path)?.filter(|timings| timings.key == key))
    }
}

/// A hash of what is timed, and on which device.
pub(super) fn key(engine: &Engine, arms: &[(&Arm, Config)], counts: (usize, usize)) -> String {
    let arms: Vec<_> = arms.iter().map(|(arm, c)| (&c.model, c.train.batch, format!("{:?}", arm.training))).collect();
    hash(&serde_json::json!(["by turn", engine.describe(), arms, counts]))
}

/// How a student is taught while it is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Live,
    Cached,
}

/// A compiled step of one kind, of one or several arms.
struct Way {
    kind: Kind,
    config: Config,
    teacher: Option<usize>,
    step: TimedStep,
}

/// What is kept of a teacher for the steps that are timed.
fn cache_of(
    engine: &Engine,
    teacher: Teacher,
    config: &Config,
    text: &Text,
    batches: &Batches,
    (folder, wanted, stop): (&Path, u64, &AtomicBool),
) -> Result<CacheReader, StudyError> {
    let settings =
        Settings { cache: Some(CacheSettings { folder: folder.to_owned(), top: CACHE_TOP }), ..Settings::default() };
    let mut course = Course::new(teacher, config, &Tokenizer::Bytes, Stop::Fraction(1.0), settings)?;
    let settings = course.settings().clone();
    let teacher = course.teacher()?;
    let identity = Identity::of(teacher, config, &text.corpus.train, &Tokenizer::Bytes, &settings)?;
    let of = Build { identity: &identity, batches, wanted, folder };
    Ok(build(engine, teacher, &of, stop, &mut |_| ())?)
}

/// Measures all arms; `teacher` gives the trained model of an arm. None if it was asked to stop.
pub(super) fn measure(
    engine: &Engine,
    arms: &[(&Arm, Config)],
    text: &Text,
    (path, key): (&Path, &str),
    (steps, tokens): (usize, usize),
    stop: &AtomicBool,
    teacher: &dyn Fn(usize) -> Result<Teacher, StudyError>,
) -> Result<Option<Timings>, StudyError> {
    let find = |name: &str| arms.iter().position(|(arm, _)| arm.name == name);
    let mut ways: Vec<Way> = Vec::new();
    // For each arm its ways.
    let mut of_arms: Vec<Vec<usize>> = Vec::new();
    for (arm, config) in arms {
        let taught = match arm.training {
            Training::Plain => None,
            Training::Distilled { teacher, .. } => find(teacher),
        };
        let kinds = if taught.is_some() { &[Kind::Plain, Kind::Live, Kind::Cached][..] } else { &[Kind::Plain] };
        let mut own = Vec::new();
        for &kind in kinds {
            let of_way = if kind == Kind::Plain { None } else { taught };
            let alike = |way: &Way| way.kind == kind && way.teacher == of_way && way.config.model == config.model;
            let at = match ways.iter().position(alike) {
                Some(at) => at,
                None => {
                    let model = of_way.map(|i| &arms[i].1.model);
                    let teacher = of_way.filter(|_| kind == Kind::Live).map(teacher).transpose()?;
                    ways.push(way(engine, kind, config, of_way, model, teacher)?);
                    ways.len() - 1
                }
            };
            own.push(at);
        }
        of_arms.push(own);
    }

    let folder = path.with_extension("cache");
    let wanted = (steps + WARM_UP) as u64 * ways.first().map_or(1, |way| way.config.train.accumulate as u64);
    let mut readers = Vec::new();
    for way in &ways {
        let train = &way.config.train;
        let batches = Batches::new(&text.corpus.train, train.seed, train.batch, way.config.model.sequence)?;
        let reader = match way.teacher.filter(|_| way.kind == Kind::Cached) {
            None => None,
            Some(at) => {
                let cached = cache_of(engine, teacher(at)?, &way.config, text, &batches, (&folder, wanted, stop));
                match cached {
                    Err(StudyError::Distill(DistillError::Stopped { .. })) => return Ok(None),
                    cached => Some(cached?),
                }
            }
        };
        readers.push((batches, reader));
    }
    for step in 0..steps + WARM_UP {
        // In turns, so that whatever else the machine does is shared by all.
        for (way, (batches, reader)) in ways.iter_mut().zip(&readers) {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let seconds = way.step.run(batches, reader.as_ref())?;
            if step >= WARM_UP {
                way.step.times.push(seconds);
            }
        }
    }
    drop(readers);
    remove(&folder)?;

    let mut measured = Vec::new();
    let turns: Vec<Vec<f64>> = ways.iter().map(|way| way.step.times.iter().map(|s| s * 1e3).collect()).collect();
    for Way { kind, step, .. } in &mut ways {
        let plan = step.trainer.program().plan();
        let bytes = (plan.state_bytes() + plan.arena_bytes()) as u64;
        measured.push((*kind, median(std::mem::take(&mut step.times)) * 1e3, bytes));
    }
    // Their memory is the generators'.
    drop(ways);
    let decoded = decode(engine, arms, tokens)?;
    let mut timings = Vec::new();
    for ((own, (arm, _)), seconds) in of_arms.iter().zip(arms).zip(decoded) {
        let ms = |kind: Kind| own.iter().map(|&i| measured[i]).find(|way| way.0 == kind).map(|way| way.1);
        let needed = match arm.training {
            Training::Plain => Kind::Plain,
            Training::Distilled { .. } => Kind::Live,
        };
        let bytes = own.iter().map(|&i| measured[i]).find(|way| way.0 == needed).map_or(0, |way| way.2);
        timings.push(Timing {
            plain_ms: ms(Kind::Plain).unwrap_or(f64::NAN),
            turns_ms: own.first().map_or_else(Vec::new, |&i| turns[i].clone()),
            live_ms: ms(Kind::Live),
            cached_ms: ms(Kind::Cached),
            decode_ms: seconds * 1e3,
            training_bytes: bytes,
        });
    }
    let timings = Timings { key: key.to_owned(), arms: timings };
    write_json(path, &timings)?;
    Ok(Some(timings))
}

fn way(
    engine: &Engine,
    kind: Kind,
    config: &Config,
    at: Option<usize>,
    of_teacher: Option<&ModelConfig>,
    teacher: Option<Teacher>,
) -> Result<Way, StudyError> {
    let options = gpt::Distillation { temperature: 1.0, beta: 1.0 };
    let lesson = match (kind, of_teacher) {
        (Kind::Live, Some(model)) => Some(Lesson::Live(model)),
        (Kind::Cached, Some(_)) => Some(Lesson::Cached(CACHE_TOP.min(config.model.vocab))),
        (Kind::Plain | Kind::Live | Kind::Cached, _) => None,
    };
    let lesson = lesson.map(|lesson| Distilling { lesson, options, lm_weight: 1.0 });
    let mut step = TimedStep::new(engine, config, lesson.as_ref())?;
    if let Some(mut teacher) = teacher {
        teacher.load(&mut step.session)?;
    }
    Ok(Way { kind, config: config.clone(), teacher: at, step })
}

/// The median seconds of a generated token of each model, in turns as the steps.
fn decode(engine: &Engine, arms: &[(&Arm, Config)], tokens: usize) -> Result<Vec<f64>, StudyError> {
    struct Decoder {
        session: Session,
        generator: Generator,
        next: i32,
        times: Vec<f64>,
    }
    let mut decoders = Vec::new();
    for (_, config) in arms {
        let mut session = engine.session();
        let generator = Generator::frozen(&mut session, &config.model, RouteTap::default())?;
        gpt::initialise(&config.model, config.train.seed, |p, values| session.write_rounded(&p.name, values))?;
        decoders.push(Decoder { session, generator, next: 0, times: Vec::with_capacity(tokens) });
    }
    for i in 0..tokens + WARM_UP {
        for Decoder { session, generator, next, times } in &mut decoders {
            let begun = Instant::now();
            let logits = generator.take(session, &[*next])?;
            *next = most_likely(logits) as i32;
            if i >= WARM_UP {
                times.push(begun.elapsed().as_secs_f64());
            }
        }
    }
    Ok(decoders.into_iter().map(|decoder| median(decoder.times)).collect())
}
