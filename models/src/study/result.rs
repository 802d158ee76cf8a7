//! What is kept of a finished run.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::StudyError;
use crate::data::write_atomic;

/// The file in a run's folder.
pub const RESULT_FILE: &str = "result.json";

/// An evaluation during a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done.
    pub step: u64,
    /// Mean cross entropy on a part of the validation text, nats per token.
    pub loss: f64,
    /// Time of the training steps so far, seconds, without evaluations.
    pub seconds: f64,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunResult {
    /// Hash of everything that makes the run.
    pub key: String,
    /// The device, as [`moebius::Engine::describe`] says it.
    pub device: String,
    /// Training steps.
    pub steps: u64,
    /// Training tokens.
    pub tokens: u64,
    /// Mean cross entropy on all of the validation text at the end, nats per token; absent if training diverged.
    pub validation_loss: Option<f64>,
    /// The same in bits per byte.
    pub validation_bits: Option<f64>,
    /// Mean cross entropy on the test text, nats per token; absent for a run that only tunes.
    pub test_loss: Option<f64>,
    /// The same in bits per byte.
    pub test_bits: Option<f64>,
    /// Time of all training steps, seconds.
    pub seconds: f64,
    /// The evaluations.
    pub curve: Vec<Point>,
}

impl RunResult {
    /// The result in a run's folder; none if the run is not finished.
    ///
    /// # Errors
    /// [`StudyError::Io`]; [`StudyError::Damaged`] if the file is none.
    pub fn read(folder: &Path) -> Result<Option<RunResult>, StudyError> {
        read_json(&folder.join(RESULT_FILE))
    }

    /// Writes it into the run's folder, whole or not at all.
    pub(super) fn write(&self, folder: &Path) -> Result<(), StudyError> {
        write_json(&folder.join(RESULT_FILE), self)
    }
}

/// A JSON file, if it is there.
pub(super) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, StudyError> {
    match std::fs::read(path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(source) => Err(StudyError::Damaged { path: path.to_owned(), source }),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StudyError::Io { operation: "read", path: path.to_owned(), source }),
    }
}

/// Writes a value as JSON, whole or not at all.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StudyError> {
    let fail = |source| StudyError::Io { operation: "write", path: path.to_owned(), source };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| fail(e.into()))?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Writes a file, whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StudyError> {
    let written: Result<(), std::io::Error> = write_atomic(path, |file| file.write_all(bytes));
    written.map_err(|source| StudyError::Io { operation: "write", path: path.to_owned(), source })
}
