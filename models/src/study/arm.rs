//! An arm of a study: a model, and how it is trained.

use crate::config::Config;

/// How an arm is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Training {
    /// On the text alone.
    Plain,
    /// Following a teacher, which is in memory, for a part of the run.
    Distilled {
        /// The arm that teaches: the one of the same seed.
        teacher: &'static str,
        /// The fraction of the run in which it is followed.
        stop: f64,
    },
}

/// An arm of a study.
#[derive(Clone, Debug)]
pub struct Arm {
    /// Its name in the study.
    pub name: &'static str,
    /// Its run folders begin with this; an arm that another study trains too has the same there.
    pub folder: &'static str,
    /// The model and its training run.
    pub config: Config,
    /// How it is trained.
    pub training: Training,
    /// The arm whose tuned settings it takes; absent: it is tuned itself.
    pub tuned_as: Option<&'static str>,
}

impl Arm {
    /// An arm that is trained on the text alone.
    pub(super) fn plain(name: &'static str, config: Config) -> Arm {
        Arm { name, folder: name, config, training: Training::Plain, tuned_as: None }
    }

    /// The same model under the name that a study calls it by.
    pub(super) fn called(self, name: &'static str) -> Arm {
        Arm { name, ..self }
    }

    /// Whether the model has experts, and with them an auxiliary loss.
    pub fn is_sparse(&self) -> bool {
        self.config.model.experts_per_layer().iter().any(|&experts| experts > 0)
    }
}
