//! Distillation: training a student that follows a teacher for a part of the run.
//!
//! The term itself is in [`crate::gpt`]. Here are the [`Course`] that a run follows (by which teacher, how strongly, until when), the
//! [`Teacher`] in its checkpoint, students that are cut from it ([`cut`]), and the [`cache`] of its log-probabilities, with which a run
//! needs no teacher in memory. [`crate::training::Run::distil`] follows a course.

pub mod cache;
mod course;
mod error;
mod stop;
mod student;
mod teacher;

pub use course::{CacheSettings, Course, DISTILL_FILE, Settings};
pub use error::DistillError;
pub use stop::{Stop, StopError};
pub use student::{Inheritance, cut, inherit};
pub use teacher::Teacher;
