//! Tables as Markdown and CSV.

use std::fmt::Write;

use super::{Measure, Sheet};
use crate::report::scale::short;

/// The heading of a table's first column.
const ARM: &str = "arm";

/// A table as Markdown.
fn table(header: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = vec!["---".to_owned(); header.len()];
    let mut text = line(header);
    text += &line(&rule);
    rows.iter().for_each(|row| text += &line(row));
    text
}

/// Heading and rows of the main table.
pub(super) fn main_table(sheet: &Sheet<'_>) -> (Vec<String>, Vec<Vec<String>>) {
    let columns = &sheet.study.columns;
    let header = std::iter::once(ARM.to_owned()).chain(columns.iter().map(|c| c.heading())).collect();
    let row = |(at, arm): (usize, &super::Arm)| {
        std::iter::once(arm.name.to_owned()).chain(columns.iter().map(|&c| sheet.text(at, c))).collect()
    };
    (header, sheet.study.arms.iter().enumerate().map(row).collect())
}

/// Heading and rows of what was tried.
pub(super) fn tuning_table(sheet: &Sheet<'_>) -> (Vec<String>, Vec<Vec<String>>) {
    let header = [ARM, "tried: learning rate / coefficient: validation loss", "taken"].map(str::to_owned).to_vec();
    let row = |tuning: &super::Tuning| {
        let one = |t: &super::tune::Try| {
            let loss = t.loss.map_or("diverged".into(), |loss| format!("{loss:.4}"));
            format!("{} / {}: {loss}", short(t.learning_rate), short(t.aux_coef))
        };
        let tries = match tuning.tries.is_empty() {
            true => format!("as {}", tuning.found_for),
            false => tuning.tries.iter().map(one).collect::<Vec<_>>().join("; "),
        };
        let edge = if tuning.is_at_the_edge() { ", at the edge of the grid" } else { "" };
        let taken = format!("{} / {}{edge}", short(tuning.learning_rate), short(tuning.aux_coef));
        vec![tuning.arm.to_owned(), tries, taken]
    };
    (header, sheet.tunings.iter().map(row).collect())
}

/// How the numbers are to be read.
pub(super) const NOTES: [&str; 4] = [
    "Numbers over several seeds are mean ± standard deviation (n - 1). A verdict is shown or contradicted where a two-sided paired \
     t-test over the seeds (by seed, as arms of a seed share batches) has p < 0.05; with few seeds that takes a difference well above its \
     spread, and many claims are tested at once.",
    "Validation loss is the mean over all of the validation text after the last step; the test text is looked at only then.",
    "Step and decode times are medians, all arms in turns, after the training, and claims about steps are tested over the turns; training time is that of the steps themselves, \
     without evaluations, as it happened.",
    "FLOPs are the model's arithmetic (`moebius inspect`), a forward and a backward pass.",
];

/// The page of a study.
pub(super) fn page(sheet: &Sheet<'_>, facts: &[(&str, String)], plots: &[(String, String)]) -> String {
    let study = sheet.study;
    let mut text = format!("# {}\n\n{}\n\n## Verdicts\n\n", study.title, study.question);
    for claim in &study.claims {
        let finding = sheet.finding(claim);
        let _ = writeln!(text, "- **{}**: {} (DeepSpeed-MoE {})", finding.verdict, claim.text, claim.source);
        finding.numbers.iter().for_each(|numbers| {
            let _ = writeln!(text, "  - {numbers}");
        });
    }
    let (header, rows) = main_table(sheet);
    let _ = write!(text, "\n## Table\n\n{}\n", table(&header, &rows));
    for (name, _) in plots {
        let _ = writeln!(text, "![{name}]({name})\n");
    }
    if !sheet.tunings.is_empty() {
        let (header, rows) = tuning_table(sheet);
        let _ = write!(text, "## Tuning\n\n{}\n", table(&header, &rows));
    }
    text += "## How\n\n";
    for (name, value) in facts {
        let _ = writeln!(text, "- {name}: {value}");
    }
    for note in NOTES {
        let _ = writeln!(text, "- {note}");
    }
    text
}

/// A cell of CSV.
fn cell(text: &str) -> String {
    match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

fn line(cells: &[String]) -> String {
    cells.iter().map(|text| cell(text)).collect::<Vec<_>>().join(",") + "\n"
}

/// A number so that it is read back as it was; nothing for none.
fn exact(value: f64) -> String {
    if value.is_finite() { value.to_string() } else { String::new() }
}

/// The table with all digits: for each column the mean, and where each run has its own number its standard deviation and the seeds
/// for which it is a bound or missing.
pub(super) fn table_csv(sheet: &Sheet<'_>) -> String {
    let mut header = vec![ARM.to_owned()];
    for column in &sheet.study.columns {
        let key = column.key();
        header.push(key.clone());
        if column.is_of_runs() {
            // What kind of number it is stays at the end of the name.
            let (name, end) = ["_ms", "_s", "_time"]
                .iter()
                .find_map(|end| Some((key.strip_suffix(end)?.to_owned(), *end)))
                .unwrap_or((key.clone(), ""));
            header.extend([format!("{name}_deviation{end}"), format!("{name}_bounds{end}")]);
        }
    }
    let mut text = line(&header);
    for (at, arm) in sheet.study.arms.iter().enumerate() {
        let mut cells = vec![arm.name.to_owned()];
        for &column in &sheet.study.columns {
            if column == Measure::Experts {
                cells.push(sheet.text(at, column));
                continue;
            }
            let sample = sheet.sample(at, column);
            cells.push(exact(sample.mean()));
            if column.is_of_runs() {
                cells.extend([exact(sample.deviation()), sample.bounds.to_string()]);
            }
        }
        text += &line(&cells);
    }
    text
}

/// All evaluations of all runs; the last line of a run is its end, with the losses on the whole texts.
pub(super) fn runs_csv(sheet: &Sheet<'_>) -> String {
    let header = [
        "arm",
        "seed",
        "step",
        "tokens",
        "flops",
        "evaluation_loss",
        "validation_loss",
        "test_bits_per_byte",
        "training_s",
    ];
    let mut text = line(&header.map(str::to_owned));
    for (at, arm) in sheet.study.arms.iter().enumerate() {
        for (seed, run) in sheet.results[at].iter().enumerate() {
            let Some(run) = run else { continue };
            for (i, point) in run.curve.iter().enumerate() {
                let end = i + 1 == run.curve.len();
                let at_end = |value: Option<f64>| value.filter(|_| end).map_or(String::new(), exact);
                text += &line(&[
                    arm.name.to_owned(),
                    (seed + 1).to_string(),
                    point.step.to_string(),
                    (point.step * sheet.configs[at].tokens_per_step()).to_string(),
                    exact(sheet.flops(at, point.step as f64)),
                    exact(point.loss),
                    at_end(run.validation_loss),
                    at_end(run.test_bits),
                    exact(point.seconds),
                ]);
            }
        }
    }
    text
}

/// All settings that were tried.
pub(super) fn tuning_csv(sheet: &Sheet<'_>) -> String {
    let mut text = line(&["arm", "learning_rate", "aux_coef", "validation_loss"].map(str::to_owned));
    for tuning in &sheet.tunings {
        for one in &tuning.tries {
            let loss = one.loss.map_or("diverged".into(), exact);
            text += &line(&[tuning.arm.to_owned(), exact(one.learning_rate), exact(one.aux_coef), loss]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        assert_eq!(line(&["a".into(), "b,c".into(), "d \"e\"".into()]), "a,\"b,c\",\"d \"\"e\"\"\"\n");
        let rows = [vec!["a|b".to_owned(), "1".to_owned()]];
        assert_eq!(table(&["x".into(), "y".into()], &rows), "| x | y |\n| --- | --- |\n| a\\|b | 1 |\n");
        assert_eq!([exact(0.1), exact(f64::NAN), exact(1e21)], ["0.1", "", "1000000000000000000000"]);
    }
}
