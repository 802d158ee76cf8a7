//! `moebius study`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moebius::Engine;
use moebius_models::study::{self, Outcome, PAGE_FILE, RunResult, Scale, Setup, StudyEvent, TABLE_FILE, Text};
use moebius_models::training::Event;

use crate::cli::{ScaleName, StudyArgs};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::stop;
use crate::text::{self, note};
use crate::train::shown;

pub(crate) fn run(args: &StudyArgs) -> Result<(), Failure> {
    let begun = Instant::now();
    let limit = args.time.as_deref().map(time).transpose()?;
    let scale = match args.scale {
        ScaleName::Smoke => Scale::Smoke,
        ScaleName::Cpu => Scale::Cpu,
        ScaleName::Gpu => Scale::Gpu,
    };
    let study = study::study(&args.name, scale)?;
    let engine = Engine::open(&args.device)?;
    let text = Text::open(args.data.as_deref())?;
    let stop = stop::asked("stopping after this step");
    if let Some(limit) = limit {
        stop_at(&stop, limit);
    }
    let setup = Setup {
        engine: &engine,
        text: &text,
        scale,
        out: &args.out,
        seeds: args.seeds.unwrap_or(scale.seeds()),
        tune: args.tune,
        set: &args.set,
        keep_checkpoints: args.keep_checkpoints,
        command: &std::env::args().collect::<Vec<_>>().join(" "),
        stop: &stop,
    };
    note!("{} on {} ({}), {}", study.title, engine.name(), engine.describe(), text.name);
    let mut progress = None;
    let outcome = study::run(&study, &setup, &mut |event| tell(event, &mut progress))?;
    text::notes(&engine);
    summary(&outcome);
    let (done, all) = outcome.sheet.runs();
    let folder = shown(&outcome.folder);
    if !outcome.done {
        note!(
            "stopped after {}, {done} of {all} runs are finished; the same command goes on",
            text::duration(begun.elapsed())
        );
        return Err(Failure::Stopped);
    }
    println!("\n{folder}/{TABLE_FILE} has the table, {folder}/{PAGE_FILE} the plots too");
    Ok(())
}

/// `90s`, `9m` or `1h`.
fn time(text: &str) -> Result<Duration, Failure> {
    let units = [("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let read = units.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?.parse::<f64>().ok()?, seconds)));
    let seconds = read.map(|(number, seconds)| number * seconds).filter(|s| (0.0..1e9).contains(s));
    match seconds {
        Some(seconds) => Ok(Duration::from_secs_f64(seconds)),
        None => Err(Failure::Usage(format!("--for: wanted a time as 90s, 9m or 1h, found `{text}`"))),
    }
}

/// Sets the flag after a while, unless the program has ended by then.
fn stop_at(stop: &Arc<AtomicBool>, limit: Duration) {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        note!("the time of --for is over: stopping after this step ...");
        stop.store(true, Ordering::Relaxed);
    });
}

fn tell(event: StudyEvent<'_>, progress: &mut Option<Progress>) {
    let result = |run: &RunResult| match run.validation_loss {
        Some(loss) => format!("validation loss {loss:.4}, {:.1} s of training", run.seconds),
        None => "diverged".into(),
    };
    match event {
        StudyEvent::Tuning { arm, number, of, learning_rate, aux_coef } => {
            note!("tuning {number}/{of}: {arm}, learning rate {learning_rate}, auxiliary coefficient {aux_coef}");
        }
        StudyEvent::Arm { arm, seed, number, of, finished } => {
            let there = finished.map_or(String::new(), |run| format!(": is there, {}", result(run)));
            note!("run {number}/{of}: {arm}, seed {seed}{there}");
        }
        StudyEvent::Training { config, resumed } => {
            if resumed {
                note!("  goes on");
            }
            *progress = Some(Progress::new(config.total_steps(), 0));
        }
        StudyEvent::Run(Event::Step(record)) => {
            if let Some(progress) = progress {
                progress.step(record);
            }
        }
        StudyEvent::Run(Event::Damaged(step, why)) => note!("  warning: checkpoint step-{step} cannot be used: {why}"),
        StudyEvent::Run(Event::Resumed(step)) => note!("  after step {step}"),
        StudyEvent::Run(
            Event::Evaluated(_) | Event::Alarm(_) | Event::Saved(_) | Event::Caching(_) | Event::TeacherLeft { .. },
        ) => {}
        StudyEvent::Finished(run) => {
            if let Some(progress) = progress.take() {
                progress.finish();
            }
            note!("  {}", result(run));
        }
        StudyEvent::Timing => note!("timing steps and generation, all arms in turns"),
        StudyEvent::Note(text) => note!("  {text}"),
    }
}

/// Losses and verdicts on the terminal.
fn summary(outcome: &Outcome<'_>) {
    let sheet = &outcome.sheet;
    let columns: Vec<_> = sheet.study.columns.iter().take(5).copied().collect();
    let mut rows: Vec<Vec<String>> =
        vec![std::iter::once(String::new()).chain(columns.iter().map(|c| c.heading())).collect()];
    for (at, arm) in sheet.study.arms.iter().enumerate() {
        rows.push(std::iter::once(arm.name.to_owned()).chain(columns.iter().map(|&c| sheet.text(at, c))).collect());
    }
    let widths: Vec<usize> =
        (0..=columns.len()).map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0)).collect();
    println!();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
    println!();
    for claim in &sheet.study.claims {
        let finding = sheet.finding(claim);
        println!("{}: {}", finding.verdict, claim.text);
        finding.numbers.iter().for_each(|numbers| println!("    {numbers}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let seconds = |text| time(text).ok().map(|t| t.as_secs_f64());
        assert_eq!([seconds("90s"), seconds("9m"), seconds("1.5h")], [Some(90.0), Some(540.0), Some(5400.0)]);
        for wrong in ["", "9", "m", "-1s", "9d", "NaNs", "1e99h"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
