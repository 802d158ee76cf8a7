//! `report.html`: what happened in a run, as one file that fetches nothing and reads well in any browser, light or dark.
//!
//! The drawings are static SVG; a short inline script only adds read-outs under the pointer. Runs of any length give a
//! page of bounded size, because measurements are gathered into bins of steps that widen as the run goes on.

mod bins;
mod chart;
mod gather;
mod health;
mod heat;
mod page;
pub(crate) mod scale;

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::data::write_atomic;
use crate::metrics::{MetricsError, MetricsReader, Record};
use gather::Gathered;
pub(crate) use page::escape;

/// What the page says about a run besides its measurements.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunFacts {
    /// Heading, for example the name of the preset.
    pub title: String,
    /// The command that started the run; left out if empty.
    pub command: String,
    /// The device, in words; left out if empty.
    pub device: String,
    /// Parameters in all; left out if 0.
    pub total_params: u64,
    /// Parameters that work on one token; left out if 0 or equal to the total.
    pub active_params: u64,
    /// The configuration as text (TOML); left out if empty.
    pub config: String,
    /// Further rows of the summary table: name and value.
    pub more: Vec<(String, String)>,
}

/// Why a report was not written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The measurements could not be read.
    #[error("report: the measurements cannot be read")]
    Metrics(#[from] MetricsError),
    /// The page could not be written; what was there before is untouched.
    #[error("{}: cannot write the report", path.display())]
    Write {
        /// The page.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Reads a `metrics.jsonl` and writes the page to `path`, whole or not at all.
///
/// # Errors
/// [`ReportError`].
pub fn write_report(path: &Path, facts: &RunFacts, metrics: &Path) -> Result<(), ReportError> {
    let mut gathered = Gathered::default();
    for record in MetricsReader::open(metrics)? {
        gathered.add(&record?);
    }
    let html = page::html(facts, &gathered);
    let written: Result<(), std::io::Error> = write_atomic(path, |file| file.write_all(html.as_bytes()));
    written.map_err(|source| ReportError::Write { path: path.to_owned(), source })
}

/// The page as a string, from records in the order they were written.
pub fn render<'r>(facts: &RunFacts, records: impl IntoIterator<Item = &'r Record>) -> String {
    let mut gathered = Gathered::default();
    records.into_iter().for_each(|record| gathered.add(record));
    page::html(facts, &gathered)
}

#[cfg(test)]
mod tests;
