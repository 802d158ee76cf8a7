//! `moebius distill`.

use moebius::Engine;
use moebius_models::config::Config;
use moebius_models::distill::{CacheSettings, Course, DistillError, Settings, Stop, Teacher, cut, inherit};

use crate::cli::DistillArgs;
use crate::failure::Failure;
use crate::text::note;
use crate::train::{self, Job};

/// Tokens that a cache keeps where nothing else is said.
const CACHE_TOP: usize = 32;

pub(crate) fn run(args: &DistillArgs) -> Result<(), Failure> {
    let engine = Engine::open(&args.train.device)?;
    if args.train.resume { resume(args, engine) } else { begin(args, engine) }
}

/// The course in a sentence.
pub(crate) fn summary(settings: &Settings, total: u64) -> String {
    let Settings { teacher, stop_step, kd_weight, kd_temperature, lm_weight, cache, .. } = settings;
    if *stop_step == 0 {
        return format!("teacher {}, which is not followed (--kd-stop 0)", teacher.display());
    }
    let until = if *stop_step >= total { "to the end".into() } else { format!("until step {stop_step} of {total}") };
    let from = match cache {
        None => "in memory".into(),
        Some(CacheSettings { folder, top }) => format!("top {top} tokens from {}", folder.display()),
    };
    format!(
        "teacher {} {until}, {from}: weight {kd_weight}, temperature {kd_temperature}, weight of the cross entropy {lm_weight}",
        teacher.display()
    )
}

fn begin(args: &DistillArgs, engine: Engine) -> Result<(), Failure> {
    let train = &args.train;
    if args.layers.is_none() && train.preset.is_none() && train.config.is_none() {
        return Err(Failure::Usage("distill: wanted a student: --layers N, --preset NAME or --config FILE".into()));
    }
    let stop: Stop = match &args.kd_stop {
        None => Stop::default(),
        Some(text) => text.parse().map_err(|e| Failure::Usage(format!("--kd-stop: {e}")))?,
    };
    let Some(path) = &args.teacher else {
        return Err(Failure::Usage("distill: wanted --teacher DIR".into()));
    };
    let teacher = Teacher::open(path)?;
    for (step, why) in teacher.damaged() {
        note!("moebius: warning: the teacher's checkpoint step-{step} cannot be used: {why}");
    }
    let student: Option<Config> = args.layers.map(|layers| cut(teacher.config(), layers)).transpose()?;
    let name = student.as_ref().map(|config| config.model.name.clone());
    let out = train::out_folder(train, name.as_deref())?;
    let tokenizer = train::tokenizer(train, &out, teacher.tokenizer())?;
    let config = train::configuration(train, &out, student)?;
    config.validate()?;
    if args.init_from_teacher {
        let inherited = inherit(&config.model, &teacher.config().model)?;
        let all = moebius_models::training::parameter_infos(&config).len();
        note!("the student begins with {} of its {all} tensors from the teacher", inherited.len());
    }
    let cache = args.teacher_cache.as_ref().map(|folder| CacheSettings {
        folder: std::path::absolute(folder).unwrap_or_else(|_| folder.clone()),
        top: args.cache_top.unwrap_or(CACHE_TOP),
    });
    let settings = Settings {
        kd_weight: args.kd_weight.unwrap_or(1.0),
        kd_temperature: args.kd_temp.unwrap_or(1.0),
        lm_weight: args.lm_weight.unwrap_or(1.0),
        init_from_teacher: args.init_from_teacher,
        cache,
        ..Settings::default()
    };
    let mut course = Course::new(teacher, &config, &tokenizer, stop, settings)?;
    train::train(train, &Job { command: "distill", engine, out, tokenizer }, config, Some(&mut course))
}

fn resume(args: &DistillArgs, engine: Engine) -> Result<(), Failure> {
    let train = &args.train;
    let Some(out) = train.out.clone() else {
        return Err(Failure::Usage("distill --resume: wanted --out DIR, the folder of the run".into()));
    };
    if args.layers.is_some() {
        return Err(Failure::Usage("--resume takes the student from its folder: leave out --layers".into()));
    }
    let config = train::configuration(train, &out, None)?;
    config.validate()?;
    let Some(mut course) = Course::of_run(&out)? else {
        return Err(DistillError::OtherKind { path: out, distilled: false }.into());
    };
    if let Some(path) = &args.teacher {
        course.move_teacher(path);
    }
    let tokenizer = train::tokenizer(train, &out, None)?;
    train::train(train, &Job { command: "distill", engine, out, tokenizer }, config, Some(&mut course))
}
