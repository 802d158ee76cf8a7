//! The files of a study.

use std::path::Path;

use super::result::write_whole;
use super::{Setup, Sheet, StudyError, markdown, page, plot};

/// The table and the verdicts, as Markdown.
pub const TABLE_FILE: &str = "table.md";
/// The table for programs: an arm a line.
pub const TABLE_CSV_FILE: &str = "table.csv";
/// The runs for programs: an evaluation a line.
pub const RUNS_CSV_FILE: &str = "runs.csv";
/// What was tried to tune the arms: a setting a line.
pub const TUNING_CSV_FILE: &str = "tuning.csv";
/// The times of steps and generation.
pub const TIMING_FILE: &str = "timing.json";
/// The page for people, which needs no other file.
pub const PAGE_FILE: &str = "report.html";

/// Writes all files of a study, each whole or not at all.
pub(super) fn write(sheet: &Sheet<'_>, setup: &Setup<'_>, folder: &Path) -> Result<(), StudyError> {
    let plots: Vec<(String, String)> =
        sheet.study.plots.iter().map(|plot| (plot.file_name(), plot::svg(sheet, *plot))).collect();
    for (name, svg) in &plots {
        write_whole(&folder.join(name), svg.as_bytes())?;
    }
    let facts = facts(sheet, setup);
    write_whole(&folder.join(TABLE_FILE), markdown::page(sheet, &facts, &plots).as_bytes())?;
    write_whole(&folder.join(TABLE_CSV_FILE), markdown::table_csv(sheet).as_bytes())?;
    write_whole(&folder.join(RUNS_CSV_FILE), markdown::runs_csv(sheet).as_bytes())?;
    if !sheet.tunings.is_empty() {
        write_whole(&folder.join(TUNING_CSV_FILE), markdown::tuning_csv(sheet).as_bytes())?;
    }
    write_whole(&folder.join(PAGE_FILE), page::html(sheet, &facts, setup.command, &plots).as_bytes())
}

/// What is to be known of all runs: name and value.
fn facts(sheet: &Sheet<'_>, setup: &Setup<'_>) -> Vec<(&'static str, String)> {
    let (done, all) = sheet.runs();
    let mut devices: Vec<String> = sheet.results.iter().flatten().flatten().map(|run| run.device.clone()).collect();
    devices.sort();
    devices.dedup();
    let mut steps: Vec<String> = Vec::new();
    for config in &sheet.configs {
        let text = format!("{} steps of {} tokens", config.total_steps(), config.tokens_per_step());
        if !steps.contains(&text) {
            steps.push(text);
        }
    }
    let tuned = match sheet.tunings.is_empty() {
        true => "not tuned: all arms have the same learning rate and coefficient".to_owned(),
        false => {
            "learning rate and auxiliary coefficient by one short grid for every arm, on a seed of its own".to_owned()
        }
    };
    let mut facts = vec![
        ("Scale", setup.scale.name().to_owned()),
        ("Text", setup.text.name.clone()),
        ("Each run", steps.join("; ")),
        ("Seeds", format!("{}, shared by all arms: the same batches in the same order", sheet.seeds)),
        ("Tuning", tuned),
    ];
    match devices.len() {
        0 => {}
        1 => facts.push(("Device", devices.remove(0))),
        _ => facts.push(("Devices, so that times of training are not comparable", devices.join("; "))),
    }
    if done < all {
        facts.push(("Not finished", format!("{done} of {all} runs are there")));
    }
    facts
}
