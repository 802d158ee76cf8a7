//! Recording the routes of a program that runs, and forcing recorded ones on it.

use std::path::Path;

use moebius::Program;

use super::{LayerRoutes, Pass, RouteError, RouteHeader, RouteLayer, RouteReader, RouteWriter};
use crate::config::Config;
use crate::gpt::{self, Routes};

/// Stands beside a program: before a run it gives the recorded routes, after it it writes those that were taken. By default
/// it does neither.
///
/// Forced are the experts of each token. Gates are those of the present router for them, and capacity drops choices as it would
/// drop the router's own. Recorded tokens and those of the run must be the same, one by one; how they are cut into passes
/// may differ.
#[derive(Debug, Default)]
pub struct RouteTap {
    layers: Vec<RouteLayer>,
    top_k: usize,
    writer: Option<RouteWriter>,
    replay: Option<Replay>,
}

impl RouteTap {
    /// Whether routes are neither recorded nor forced.
    pub fn is_idle(&self) -> bool {
        self.writer.is_none() && self.replay.is_none()
    }

    /// For a model: writes routes to `record`, and forces those of `replay`, which is checked from end to end first.
    ///
    /// # Errors
    /// [`RouteError`]: [`RouteError::OtherModel`] if layers, experts, choices or vocabulary differ; whatever is wrong with a file;
    /// a model that has no routes.
    pub fn open(config: &Config, record: Option<&Path>, replay: Option<&Path>) -> Result<RouteTap, RouteError> {
        if record.is_none() && replay.is_none() {
            return Ok(RouteTap::default());
        }
        let header = RouteHeader::of(config)?;
        let replay = replay.map(|path| Replay::open(path, &header)).transpose()?;
        let writer = record.map(|path| RouteWriter::create(path, &header)).transpose()?;
        Ok(RouteTap { layers: header.layers, top_k: header.top_k, writer, replay })
    }

    /// What the graphs of the program need for it.
    pub fn routes(&self) -> Routes {
        Routes { recorded: self.writer.is_some(), given: self.replay.is_some() }
    }

    /// There are routes for as many further tokens.
    ///
    /// # Errors
    /// [`RouteError::TooShort`].
    pub fn wants(&self, tokens: u64) -> Result<(), RouteError> {
        match &self.replay {
            Some(replay) if tokens > replay.reader.tokens() - replay.position => {
                let found = replay.reader.tokens();
                let path = replay.reader.path().to_owned();
                Err(RouteError::TooShort { path, wanted: replay.position + tokens, found })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Before a run with these tokens.
    ///
    /// # Errors
    /// [`RouteError::TooShort`]; [`RouteError::OtherToken`]; as [`Program::feed`].
    pub fn before(&mut self, program: &mut Program, ids: &[i32]) -> Result<(), RouteError> {
        self.wants(ids.len() as u64)?;
        let Some(replay) = &mut self.replay else { return Ok(()) };
        let choices = replay.take(ids, self.layers.len(), self.top_k)?;
        for (layer, choices) in self.layers.iter().zip(choices) {
            program.feed(&gpt::choices_feed(layer.layer), &choices)?;
        }
        Ok(())
    }

    /// After a run with these tokens.
    ///
    /// # Errors
    /// [`RouteError::Io`]; as [`Program::output`].
    pub fn after(&mut self, program: &Program, ids: &[i32]) -> Result<(), RouteError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let mut pass = Pass { ids: ids.to_vec(), layers: Vec::with_capacity(self.layers.len()) };
        for &RouteLayer { layer, .. } in &self.layers {
            let dropped: Vec<i32> = program.output(&gpt::dropped_output(layer))?;
            pass.layers.push(LayerRoutes {
                dropped: dropped.first().map_or(0, |&d| d.unsigned_abs()),
                expert_index: program.output(&gpt::expert_index_output(layer))?,
                score: program.output(&gpt::score_output(layer))?,
            });
        }
        writer.pass(&pass)
    }

    /// Gives the recorded file its name.
    ///
    /// # Errors
    /// [`RouteError::Io`].
    pub fn finish(&mut self) -> Result<(), RouteError> {
        self.writer.take().map_or(Ok(()), RouteWriter::finish)
    }
}

/// A recording and how much of it was taken.
#[derive(Debug)]
struct Replay {
    reader: RouteReader,
    pass: Pass,
    /// Tokens of the pass that were taken, and of all passes.
    at: usize,
    position: u64,
}

impl Replay {
    fn open(path: &Path, wanted: &RouteHeader) -> Result<Replay, RouteError> {
        let mut reader = RouteReader::open(path)?;
        let found = reader.header();
        let layers = |header: &RouteHeader| {
            let layer = |l: &RouteLayer| format!("{} (of {} experts)", l.layer, l.experts);
            header.layers.iter().map(layer).collect::<Vec<_>>().join(", ")
        };
        for (what, wanted, found) in [
            ("MoE layers", layers(wanted), layers(found)),
            ("top_k", wanted.top_k.to_string(), found.top_k.to_string()),
            ("vocab", wanted.vocab.to_string(), found.vocab.to_string()),
        ] {
            if wanted != found {
                let recorded = reader.header().model.clone();
                return Err(RouteError::OtherModel { path: path.to_owned(), recorded, what, wanted, found });
            }
        }
        reader.verify()?;
        Ok(Replay { reader, pass: Pass::default(), at: 0, position: 0 })
    }

    /// The experts of the next tokens, for each layer `[n,k]`. There must be as many.
    fn take(&mut self, ids: &[i32], layers: usize, k: usize) -> Result<Vec<Vec<i32>>, RouteError> {
        let mut choices = vec![Vec::with_capacity(ids.len() * k); layers];
        let mut rest = ids;
        while !rest.is_empty() {
            if self.at == self.pass.ids.len() {
                let next = self.reader.next_pass()?;
                let found = self.reader.tokens();
                let short = || RouteError::TooShort { path: self.reader.path().to_owned(), wanted: found + 1, found };
                self.pass = next.ok_or_else(short)?;
                self.at = 0;
            }
            let n = rest.len().min(self.pass.ids.len() - self.at);
            let recorded = &self.pass.ids[self.at..self.at + n];
            if let Some(i) = (0..n).find(|&i| recorded[i] != rest[i]) {
                return Err(RouteError::OtherToken {
                    path: self.reader.path().to_owned(),
                    position: self.position + i as u64,
                    wanted: rest[i],
                    found: recorded[i],
                });
            }
            for (choices, layer) in choices.iter_mut().zip(&self.pass.layers) {
                choices.extend_from_slice(&layer.expert_index[self.at * k..(self.at + n) * k]);
            }
            self.at += n;
            self.position += n as u64;
            rest = &rest[n..];
        }
        Ok(choices)
    }
}
