//! Studies: each trains the few models that a claim of the DeepSpeed-MoE paper is about, from scratch, several times, and writes
//! tables, plots and a verdict.
//!
//! A [`Study`] is plain data: [`Arm`]s (a model and how it is trained), [`Measure`]s that are the columns of its table, [`Plot`]s, and
//! [`Claim`]s with the conditions that make them true. One file in `studies/` describes one study; [`run`] knows none of them by
//! name. All arms of a seed have the same batches in the same order, so arms are compared seed by seed.
//!
//! Models are ordinary run folders. They are named by a hash of all that makes them (settings, seed, text, teacher), and studies
//! with one parent folder share them. A finished run leaves `result.json`, written whole; a study that was killed or stopped goes on
//! with the same command.

mod arm;
mod claim;
mod error;
mod files;
mod markdown;
mod measure;
mod page;
mod plot;
mod result;
mod runner;
mod scale;
mod sheet;
mod stats;
mod studies;
mod timing;
mod train;
mod tune;

pub use arm::{Arm, Training};
pub use claim::{Claim, Condition, Finding, Verdict};
pub use error::StudyError;
pub use files::{PAGE_FILE, RUNS_CSV_FILE, TABLE_CSV_FILE, TABLE_FILE, TIMING_FILE, TUNING_CSV_FILE};
pub use measure::Measure;
pub use plot::{Axis, Plot};
pub use result::{Point, RESULT_FILE, RunResult};
pub use runner::{Outcome, Setup, StudyEvent, run};
pub use scale::Scale;
pub use sheet::Sheet;
pub use stats::{Sample, Test, reach};
pub use studies::{NAMES, study};
pub use timing::Timing;
pub use train::Text;
pub use tune::Tuning;

/// A study as data.
#[derive(Clone, Debug)]
pub struct Study {
    /// Its name on the command line and of its folder.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// What it asks, and how the arms were made comparable.
    pub question: &'static str,
    /// The models. A teacher comes before its students.
    pub arms: Vec<Arm>,
    /// The columns of the table.
    pub columns: Vec<Measure>,
    /// The plots.
    pub plots: Vec<Plot>,
    /// What the paper says.
    pub claims: Vec<Claim>,
}

impl Study {
    /// The arm of that name.
    pub fn arm(&self, name: &str) -> Option<usize> {
        self.arms.iter().position(|arm| arm.name == name)
    }
}
