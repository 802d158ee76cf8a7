//! How the program ends when it cannot do what was asked.

use std::path::PathBuf;
use std::process::ExitCode;

use moebius_models::config::ConfigError;
use moebius_models::data::DataError;
use moebius_models::distill::DistillError;
use moebius_models::generate::GenerateError;
use moebius_models::gpt::DecodingError;
use moebius_models::health::AlarmError;
use moebius_models::report::ReportError;
use moebius_models::routes::RouteError;
use moebius_models::study::StudyError;
use moebius_models::tokenizer::TokenizerError;
use moebius_models::trained::FindError;
use moebius_models::training::TrainingError;
use moebius_models::verify::VerifyError;

use crate::text::note;

/// Exit code of a program that was ended by Ctrl-C, as shells know it.
pub(crate) const INTERRUPTED: u8 = 130;
/// Exit code of a training run that an alarm ended.
pub(crate) const ALARMED: u8 = 3;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line or configuration asks for something that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Arguments that do not go together.
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Training(#[from] TrainingError),
    #[error(transparent)]
    Engine(#[from] moebius::Error),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Graph(#[from] moebius::ir::Error),
    #[error(transparent)]
    Checkpoint(#[from] moebius::checkpoint::CheckpointError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error(transparent)]
    Routes(#[from] RouteError),
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    NoModel(#[from] FindError),
    #[error(transparent)]
    Distill(#[from] DistillError),
    /// A run that ended before its time; `hint` says what is left of it.
    #[error("{}\n{hint}", with_causes(error))]
    Broken { error: TrainingError, hint: String },
    /// Training was asked to stop and did; everything is said and saved.
    #[error("stopped")]
    Stopped,
    /// The device is not what it should be; the table says where.
    #[error("not verified")]
    Unverified,
    /// Training was ended by an alarm; everything is said and saved.
    #[error("ended by an alarm")]
    Alarmed,
    #[error(transparent)]
    Study(#[from] StudyError),
    /// What `--alarm` asks for.
    #[error("--alarm: {0}")]
    Alarm(#[from] AlarmError),
}

impl Failure {
    /// Prints the failure and gives its exit code.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Failure::Stopped | Failure::Unverified | Failure::Alarmed => {}
            Failure::Config(_)
            | Failure::Usage(_)
            | Failure::Training(_)
            | Failure::Engine(_)
            | Failure::Generate(_)
            | Failure::Graph(_)
            | Failure::Checkpoint(_)
            | Failure::Data(_)
            | Failure::Tokenizer(_)
            | Failure::Report(_)
            | Failure::Routes(_)
            | Failure::Verify(_)
            | Failure::Io { .. }
            | Failure::NoModel(_)
            | Failure::Distill(_)
            | Failure::Alarm(_)
            | Failure::Study(_)
            | Failure::Broken { .. } => note!("moebius: {}", with_causes(self)),
        }
        ExitCode::from(self.code())
    }

    /// The exit code of the program.
    pub(crate) fn code(&self) -> u8 {
        if matches!(self, Failure::Stopped) {
            return INTERRUPTED;
        }
        if matches!(self, Failure::Alarmed) {
            return ALARMED;
        }
        if self.is_wrong_use() { 2 } else { 1 }
    }

    fn is_wrong_use(&self) -> bool {
        match self {
            Failure::Config(_) | Failure::Usage(_) | Failure::Alarm(_) => true,
            Failure::Training(e) => match e {
                TrainingError::Config(_) | TrainingError::OtherMoments { .. } => true,
                TrainingError::Distill(e) => is_wrong_lesson(e),
                TrainingError::Engine(_)
                | TrainingError::Graph(_)
                | TrainingError::Checkpoint(_)
                | TrainingError::Data(_)
                | TrainingError::Metrics(_)
                | TrainingError::Routes(_)
                | TrainingError::Io { .. }
                | TrainingError::TooLarge { .. }
                | TrainingError::RunExists { .. }
                | TrainingError::NoRun { .. }
                | TrainingError::OtherConfig { .. }
                | TrainingError::OtherTokenizer { .. }
                | TrainingError::RouterState { .. }
                | TrainingError::AllDamaged { .. } => false,
            },
            Failure::Distill(e) => is_wrong_lesson(e),
            Failure::Study(e) => is_wrong_study(e),
            Failure::Engine(e) => matches!(e, moebius::Error::NoSuchDevice { .. }),
            // A model that has no routes to record, as opposed to a file that does not fit.
            Failure::Routes(e) => matches!(e, RouteError::ExpertsChoose | RouteError::Dense { .. }),
            Failure::Generate(e) => matches!(e, GenerateError::Decoding(DecodingError::FutureTokens)),
            Failure::Verify(e) => matches!(e, VerifyError::Unknown { .. }),
            Failure::Graph(_)
            | Failure::Checkpoint(_)
            | Failure::Data(_)
            | Failure::Tokenizer(_)
            | Failure::Report(_)
            | Failure::Io { .. }
            | Failure::NoModel(_)
            | Failure::Broken { .. }
            | Failure::Unverified
            | Failure::Alarmed
            | Failure::Stopped => false,
        }
    }
}

/// Whether teacher and student do not go together, as opposed to files that are not what they should be.
fn is_wrong_lesson(error: &DistillError) -> bool {
    matches!(
        error,
        DistillError::Vocabulary { .. }
            | DistillError::Tokenizer { .. }
            | DistillError::Sequence { .. }
            | DistillError::Layers { .. }
            | DistillError::Inheritance { .. }
            | DistillError::Number { .. }
    )
}

/// Whether a study is asked for that cannot be, as opposed to one that went wrong.
fn is_wrong_study(error: &StudyError) -> bool {
    matches!(error, StudyError::Unknown { .. } | StudyError::Seeds { .. } | StudyError::Config { .. })
}

/// An error's message and those of its causes, as far as they say something new.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Says that a panic is a bug of the program, unless standard output was closed by its reader.
pub(crate) fn report_panic(info: &std::panic::PanicHookInfo<'_>) {
    let text = info.payload_as_str().unwrap_or("no message");
    if text.starts_with("failed printing to stdout") && text.contains("Broken pipe") {
        std::process::exit(0);
    }
    let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
    if let Some(why) = text.strip_prefix("failed printing to stdout: ") {
        note!("moebius: cannot write to standard output: {why}");
        std::process::exit(1);
    }
    note!("moebius: a bug in moebius{place}: {text}\nPlease report it with the command you ran.");
}
