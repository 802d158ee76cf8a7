//! A run that follows a teacher: what it needs of it, and how it lets it go.

use std::sync::atomic::AtomicBool;

use moebius::{Engine, Program};

use super::{Event, Observer, Run, TrainingError, step};
use crate::config::Config;
use crate::data::{Batches, Corpus};
use crate::distill::cache::{Build, CacheReader, Identity, build};
use crate::distill::{Course, DistillError};
use crate::gpt::{Distilling, Lesson};
use crate::tokenizer::Tokenizer;

/// What a run has of its teacher while it follows it; a whole teacher is in the session.
pub(super) struct Teaching {
    /// The last step that follows it.
    pub(super) stop: u64,
    reader: Option<CacheReader>,
    ids: Vec<i32>,
}

/// A course, and the flag that ends the building of its cache.
pub(super) struct Distillation<'c> {
    pub(super) course: &'c mut Course,
    pub(super) stop: &'c AtomicBool,
}

impl Distillation<'_> {
    /// What a run that goes on after step `done` needs; `None` if the teacher has left by then. A cache is built here, if there is
    /// one and it is not there.
    pub(super) fn prepare(
        &mut self,
        engine: &Engine,
        config: &Config,
        (tokenizer, corpus, batches): (&Tokenizer, &Corpus, &Batches),
        done: u64,
        observer: &mut Observer<'_>,
    ) -> Result<Option<Teaching>, TrainingError> {
        let settings = self.course.settings().clone();
        if done >= settings.stop_step {
            return Ok(None);
        }
        let teacher = self.course.teacher()?;
        teacher.check(config, tokenizer)?;
        let mut reader = None;
        if let Some(cache) = &settings.cache {
            let identity = Identity::of(teacher, config, &corpus.train, tokenizer, &settings)?;
            let wanted = settings.stop_step.saturating_mul(config.train.accumulate as u64);
            let of = Build { identity: &identity, batches, wanted, folder: &cache.folder };
            reader = Some(build(engine, teacher, &of, self.stop, &mut |progress| observer(Event::Caching(progress)))?);
        }
        Ok(Some(Teaching { stop: settings.stop_step, reader, ids: Vec::new() }))
    }

    /// What the graph of a step is told of the teacher.
    pub(super) fn lesson(&mut self) -> Result<Distilling<'_>, DistillError> {
        let (options, lm_weight) = (self.course.options(), self.course.settings().lm_weight);
        let kept = self.course.settings().cache.as_ref().map(|cache| cache.top);
        let lesson = match kept {
            Some(top) => Lesson::Cached(top),
            None => Lesson::Live(&self.course.teacher()?.config().model),
        };
        Ok(Distilling { lesson, options, lm_weight })
    }
}

impl Teaching {
    /// Gives the program what is kept of the teacher for a batch of the run, counted from 0; a whole teacher needs nothing.
    pub(super) fn give(&mut self, batch: u64, program: &mut Program) -> Result<(), TrainingError> {
        match &self.reader {
            Some(reader) => Ok(reader.feed(batch, &mut self.ids, program)?),
            None => Ok(()),
        }
    }
}

impl Run {
    /// Goes on without the teacher: the step is compiled anew without the term, and the memory of the teacher is given back. All
    /// launched steps must have been collected.
    pub(super) fn dismiss_teacher(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
        let before = self.memory();
        self.feeds.teaching = None;
        let (graph, loss, options) = step::parts(&self.config)?;
        self.trainer.replace(&mut self.session, graph, loss, options)?;
        observer(Event::TeacherLeft { step: self.trainer.steps_done(), before, after: self.memory() });
        Ok(())
    }
}
