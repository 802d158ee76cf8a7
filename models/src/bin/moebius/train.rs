//! `moebius train`.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use moebius::Engine;
use moebius::checkpoint::Checkpoints;
use moebius_models::config::Config;
use moebius_models::data::{Corpus, CorpusSpec, Source, Validation, default_cache_dir};
use moebius_models::distill::{Course, DistillError, Settings};
use moebius_models::generate::{GenerateError, Generator};
use moebius_models::gpt::DecodingError;
use moebius_models::health::Alarms;
use moebius_models::report::{self, RunFacts};
use moebius_models::sampling::Sampling;
use moebius_models::tokenizer::Tokenizer;
use moebius_models::training::{
    CONFIG_FILE, Ending, Event, METRICS_FILE, REPORT_FILE, Run, TOKENIZER_FILE, TrainingError,
};

use crate::cli::TrainArgs;
use crate::failure::Failure;
use crate::progress::{Caching, Progress};
use crate::stop;
use crate::text::{self, note};

/// Trained when neither a preset nor a file is named.
const QUICK_START: &str = "tiny-pr-moe";
/// What the sample after training starts from, and how long it is.
const SAMPLE_PROMPT: &str = "ROMEO:\n";
const SAMPLE_TOKENS: usize = 400;

pub(crate) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let engine = Engine::open(&args.device)?;
    let out = out_folder(args, None)?;
    let mut config = configuration(args, &out, None)?;
    let tokenizer = tokenizer(args, &out, None)?;
    fit_vocabulary(args, &mut config, &tokenizer)?;
    config.validate()?;
    train(args, &Job { command: "train", engine, out, tokenizer }, config, None)
}

/// What a run is made with beside its settings.
pub(crate) struct Job {
    /// The command that goes on with the run.
    pub(crate) command: &'static str,
    pub(crate) engine: Engine,
    pub(crate) out: PathBuf,
    pub(crate) tokenizer: Tokenizer,
}

/// Trains, plainly or by a course.
pub(crate) fn train(args: &TrainArgs, job: &Job, config: Config, course: Option<&mut Course>) -> Result<(), Failure> {
    let Job { command, engine, out, tokenizer } = job;
    let (alarms, ends) = alarms(args, &config)?;
    let corpus = corpus(args, &config, tokenizer)?;

    let stop = stop::asked("stopping after this step");

    let parameters = config.parameters();
    note!(
        "{}: {} parameters, {} active per token, on {} ({})",
        config.model.name,
        text::count(parameters.total as f64),
        text::count(parameters.active as f64),
        engine.name(),
        engine.describe()
    );
    let followed = course.as_ref().map(|course| course.settings().clone());
    if let Some(settings) = &followed {
        note!("{}", crate::distill::summary(settings, config.total_steps()));
    }
    let mut early: Vec<String> = Vec::new();
    let mut caching = None;
    let mut opening = |event: Event<'_>| match event {
        Event::Damaged(step, why) => early.push(format!("warning: checkpoint step-{step} cannot be used: {why}")),
        Event::Resumed(step) => early.push(format!("resuming after step {step}")),
        Event::Caching(progress) => caching.get_or_insert_with(Caching::begin).show(progress),
        Event::Step(_) | Event::Evaluated(_) | Event::Alarm(_) | Event::Saved(_) | Event::TeacherLeft { .. } => {}
    };
    let opened = match course {
        None => Run::open(engine, config, tokenizer, &corpus, out, args.resume, &mut opening),
        Some(course) => {
            let text = (tokenizer, &corpus);
            Run::distil(engine, config, text, out, args.resume, (course, &*stop), &mut opening)
        }
    };
    if let Some(caching) = caching {
        caching.finish();
    }
    let mut run = match opened {
        Err(TrainingError::Distill(why @ DistillError::Stopped { .. })) => {
            note!("{why}; the same command goes on with it");
            return Err(Failure::Stopped);
        }
        opened => opened?,
    };
    early.iter().for_each(|line| note!("{line}"));
    run.watch(alarms, ends);
    text::notes(engine);
    let (arena, state) = run.memory();
    note!(
        "memory: {} of parameters and optimizer, {} of activations; writing to {}",
        text::bytes(state as f64),
        text::bytes(arena as f64),
        out.display()
    );

    let mut progress = Progress::new(run.config().total_steps(), run.steps_done());
    let mut saved: Option<PathBuf> = None;
    let ending = run.train(&stop, &mut |event| match event {
        Event::Step(record) => progress.step(record),
        Event::Evaluated(record) => progress.evaluated(record),
        Event::Alarm(record) => progress.say(&format!("alarm: {record}")),
        Event::Saved(path) => saved = Some(path.to_owned()),
        Event::TeacherLeft { step, before, after } => {
            let bytes = |(arena, state): (usize, usize)| text::bytes((arena + state) as f64);
            let (before, after) = (bytes(before), bytes(after));
            progress.say(&format!("step {step}: the teacher has left; memory of the run {before} before, {after} now"));
        }
        Event::Damaged(..) | Event::Resumed(_) | Event::Caching(_) => {}
    });
    progress.finish();
    // The report is written also when the run ended badly: it shows how.
    let reported = write_report(&run, engine, out, (args, followed.as_ref()));
    let ending = match ending {
        Ok(ending) => ending,
        Err(error) => return Err(broken(error, &run, job)),
    };
    reported?;
    match ending {
        Ending::Stopped => {
            note!(
                "stopped after step {}; go on with:\n  moebius {command} --resume --out {}",
                run.steps_done(),
                shown(out)
            );
            Err(Failure::Stopped)
        }
        Ending::Alarmed => {
            let alarm = args.alarm.as_deref().map(|alarm| format!(" --alarm {}", shown(Path::new(alarm))));
            note!(
                "ended by an alarm after step {}, with a checkpoint; to go on in spite of it:\n  moebius {command} --resume --out \
                 {}{}{}",
                run.steps_done(),
                shown(out),
                alarm.unwrap_or_default(),
                if args.alarm_exit { " --alarm-exit" } else { "" }
            );
            Err(Failure::Alarmed)
        }
        Ending::Done => finish(&mut run, tokenizer, out, &stop),
    }
}

/// The limits to watch and whether leaving one ends the run: those of the command line, else those of the configuration.
fn alarms(args: &TrainArgs, config: &Config) -> Result<(Alarms, bool), Failure> {
    let text = args.alarm.as_deref().or(config.train.alarm.as_deref());
    if args.alarm_exit && text.is_none() {
        return Err(Failure::Usage("--alarm-exit: wanted an alarm (--alarm or train.alarm), found none".into()));
    }
    let alarms = text.map(Alarms::parse).transpose()?.unwrap_or_default();
    alarms.check(&config.model)?;
    Ok((alarms, args.alarm_exit || config.train.alarm_exit == Some(true)))
}

/// An error in the middle of a run, with what is left of the run.
fn broken(error: TrainingError, run: &Run, Job { command, out, .. }: &Job) -> Failure {
    let mut hint = String::new();
    if matches!(error, TrainingError::Engine(moebius::Error::NonFinite { .. })) {
        hint += &format!("The parameters were not changed by step {}. ", run.steps_done() + 1);
    }
    hint += &match Checkpoints::open(out).and_then(|checkpoints| checkpoints.latest()) {
        Ok(Some(step)) => format!(
            "The last good checkpoint is of step {step}; to go on from it:\n  moebius {command} --resume --out {}",
            shown(out)
        ),
        Ok(None) | Err(_) => "No checkpoint was written before (see --checkpoint-every).".into(),
    };
    Failure::Broken { error, hint }
}

/// The folder of the run: the one named, or `runs/NAME` with the first number that is free. NAME is that of the preset or file, or
/// `other` where there is neither.
pub(crate) fn out_folder(args: &TrainArgs, other: Option<&str>) -> Result<PathBuf, Failure> {
    if let Some(out) = &args.out {
        return Ok(out.clone());
    }
    let name = match (&args.preset, &args.config) {
        (Some(name), _) => name.clone(),
        (None, Some(file)) => file.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned()),
        (None, None) => other.unwrap_or(QUICK_START).into(),
    };
    let numbered = |n: usize| Path::new("runs").join(if n == 1 { name.clone() } else { format!("{name}-{n}") });
    let free = (1..).find(|&n| !numbered(n).join(CONFIG_FILE).exists()).unwrap_or(1);
    if !args.resume {
        return Ok(numbered(free));
    }
    if free == 1 {
        return Err(TrainingError::NoRun { path: numbered(1) }.into());
    }
    Ok(numbered(free - 1))
}

/// The configuration of the run with all changes: that of the folder when it goes on, else that of the preset or file, or `other`
/// where there is neither.
pub(crate) fn configuration(args: &TrainArgs, out: &Path, other: Option<Config>) -> Result<Config, Failure> {
    let mut config = if args.resume {
        let path = out.join(CONFIG_FILE);
        if !path.exists() {
            return Err(TrainingError::NoRun { path: out.into() }.into());
        }
        if args.preset.is_some() || args.config.is_some() {
            let message = format!("--resume takes the model from {}: leave out --preset and --config", path.display());
            return Err(Failure::Usage(message));
        }
        Config::from_file(&path)?
    } else {
        match (&args.config, &args.preset, other) {
            (Some(file), _, _) => Config::from_file(file)?,
            (None, Some(name), _) => Config::preset(name)?,
            (None, None, Some(other)) => other,
            (None, None, None) => Config::preset(QUICK_START)?,
        }
    };
    if let Some(steps) = args.steps {
        config.train.steps = Some(steps);
        config.train.tokens = None;
    }
    if let Some(seed) = args.seed {
        config.train.seed = seed;
    }
    if let Some(every) = args.checkpoint_every {
        config.train.checkpoint_every = every;
    }
    if let Some(every) = args.eval_every {
        config.train.eval_every = every;
    }
    if let Some(count) = args.accumulate {
        config.train.accumulate = count;
    }
    if let Some(recompute) = args.recompute {
        config.train.recompute = recompute;
    }
    if let Some(moments) = args.moments {
        config.train.moments = moments;
    }
    for setting in &args.set {
        config.set(setting)?;
    }
    Ok(config)
}

/// The tokenizer: the file named, that of the run that goes on, or `other` where there is neither; else bytes.
pub(crate) fn tokenizer(args: &TrainArgs, out: &Path, other: Option<PathBuf>) -> Result<Tokenizer, Failure> {
    let of_run = Some(out.join(TOKENIZER_FILE)).filter(|path| args.resume && path.exists());
    match args.tokenizer.clone().or(of_run).or(other) {
        Some(path) => Ok(Tokenizer::from_file(&path)?),
        None => Ok(Tokenizer::Bytes),
    }
}

/// A model that is too small for the tokenizer gets a vocabulary of the next multiple of 128, as Megatron pads it, unless
/// the size was set on purpose.
fn fit_vocabulary(args: &TrainArgs, config: &mut Config, tokenizer: &Tokenizer) -> Result<(), Failure> {
    let wanted = tokenizer.vocab_size();
    if config.model.vocab >= wanted {
        return Ok(());
    }
    if args.resume || args.set.iter().any(|s| s.starts_with("model.vocab")) {
        let found = config.model.vocab;
        let name = tokenizer.name();
        return Err(Failure::Usage(format!(
            "tokenizer {name} has {wanted} tokens: wanted model.vocab of at least that, found {found}"
        )));
    }
    config.model.vocab = wanted.next_multiple_of(128);
    Ok(())
}

fn corpus(args: &TrainArgs, config: &Config, tokenizer: &Tokenizer) -> Result<Corpus, Failure> {
    let files = |paths: &[PathBuf]| paths.iter().cloned().map(Source::File).collect::<Vec<_>>();
    let train = if args.data.is_empty() { vec![Source::TinyShakespeare] } else { files(&args.data) };
    let validation = files(&args.val_data);
    let validation = if validation.is_empty() { Validation::Fraction(0.1) } else { Validation::Sources(&validation) };
    let cache = default_cache_dir();
    let spec = CorpusSpec { train: &train, validation, tokenizer, vocab: Some(config.model.vocab), cache_dir: &cache };
    let mut told = None;
    Ok(Corpus::open(&spec, &mut |name, done, all| {
        let tenth = done * 10 / all.max(1);
        if told != Some(tenth) {
            told = Some(tenth);
            note!("tokenising {name}: {} %", tenth * 10);
        }
    })?)
}

fn write_report(
    run: &Run,
    engine: &Engine,
    out: &Path,
    (args, followed): (&TrainArgs, Option<&Settings>),
) -> Result<(), Failure> {
    let config = run.config();
    let parameters = config.parameters();
    let data = if args.data.is_empty() {
        "Tiny Shakespeare".into()
    } else {
        args.data.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    };
    let mut more = vec![("Text".into(), data), ("Training time".into(), text::duration(run.training_time()))];
    if let Some(settings) = followed {
        more.push(("Distillation".into(), crate::distill::summary(settings, config.total_steps())));
    }
    let facts = RunFacts {
        title: config.model.name.clone(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        device: format!("{} ({})", engine.name(), engine.describe()),
        total_params: parameters.total,
        active_params: parameters.active,
        config: config.to_toml()?,
        more,
    };
    Ok(report::write_report(&out.join(REPORT_FILE), &facts, &out.join(METRICS_FILE))?)
}

fn finish(run: &mut Run, tokenizer: &Tokenizer, out: &Path, stop: &AtomicBool) -> Result<(), Failure> {
    if let Some(e) = run.last_evaluation() {
        println!(
            "trained {} steps in {}: validation loss {:.4} nats per token, {:.4} bits per byte",
            run.steps_done(),
            text::duration(run.training_time()),
            e.loss,
            e.bits_per_byte
        );
    }
    let config = run.config().model.clone();
    match Generator::new(run.session(), &config) {
        Ok(mut generator) => {
            println!("\nA sample:\n");
            let sampling = Sampling::default();
            let asked = (SAMPLE_PROMPT, SAMPLE_TOKENS);
            crate::generate::stream(run.session(), &mut generator, tokenizer, asked, &sampling, stop)?;
        }
        // The training is done and saved all the same.
        Err(why @ GenerateError::Decoding(DecodingError::FutureTokens)) => println!("\nNo sample: {why}"),
        Err(error) => return Err(error.into()),
    }
    let out = shown(out);
    println!("\nNext:");
    println!("  moebius generate --model {out} --prompt \"JULIET:\" --tokens 300");
    println!("  moebius eval --model {out} --data FILE");
    println!("  open {out}/{REPORT_FILE} in a browser for loss curves and the load of each expert");
    println!("  moebius train --help");
    println!("(`moebius` is target/release/moebius; `cargo run --release -- ...` does the same)");
    Ok(())
}

/// A path as it can be typed into a shell.
pub(crate) fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    if text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c)) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
