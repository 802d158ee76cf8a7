//! Generation with a key/value cache: a decoding step is the same model as in training, over one or a few new tokens.

use moebius::ir::Graph;
use moebius::{Program, Session};

use crate::config::ModelConfig;
use crate::gpt;
use crate::routes::{RouteError, RouteTap};

/// Why a model does not generate.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is no decoding graph.
    #[error(transparent)]
    Decoding(#[from] gpt::DecodingError),
    /// The device.
    #[error(transparent)]
    Engine(#[from] moebius::Error),
    /// Routes that are recorded or forced.
    #[error(transparent)]
    Routes(#[from] RouteError),
    /// A device that continues a text by itself has met a NaN.
    #[error("cannot choose a token: wanted numbers as logits after token {token} of the text, found one that is none")]
    NoChoice {
        /// The token's place in the cache, from 0.
        token: usize,
    },
}

/// Tokens of a prompt that are taken in one run; the rest is taken one by one.
const CHUNK: usize = 32;

/// Compiles the step that takes `tokens` tokens.
fn program(
    session: &mut Session,
    config: &ModelConfig,
    tokens: usize,
    frozen: bool,
    tap: &RouteTap,
) -> Result<Program, GenerateError> {
    compile(session, &gpt::decoding_with(config, tokens, tap.routes())?, frozen)
}

/// Compiles a graph beside a training step, or of a model that is not trained.
fn compile(session: &mut Session, graph: &Graph, frozen: bool) -> Result<Program, GenerateError> {
    Ok(if frozen { session.compile_frozen(graph)? } else { session.compile(graph)? })
}

/// A model that continues one text.
pub struct Generator {
    sequence: usize,
    chunk: usize,
    prefill: Option<Program>,
    decode: Program,
    /// The step that chooses the next token itself, and among how many tokens.
    greedy: Option<(usize, Program)>,
    /// The tokens whose keys and values are in the cache.
    text: Vec<i32>,
    logits: Vec<f32>,
    config: ModelConfig,
    frozen: bool,
    tap: RouteTap,
}

impl Generator {
    /// Compiles the decoding step beside a training step, whose parameters it reads.
    ///
    /// # Errors
    /// [`gpt::DecodingError::FutureTokens`] for a router in which experts choose tokens; else as [`Session::compile`].
    pub fn new(session: &mut Session, config: &ModelConfig) -> Result<Generator, GenerateError> {
        Generator::compiled(session, config, false, RouteTap::default())
    }

    /// Compiles the decoding step of a model that is not trained in this session. The parameters are added as zeros in the dtype
    /// that the model computes in ([`Session::compile_frozen`]): write them after this, by [`Session::write_rounded`].
    /// Routes are recorded or forced by `tap`: those of all tokens in the order in which they are run.
    ///
    /// # Errors
    /// As [`Generator::new`].
    pub fn frozen(session: &mut Session, config: &ModelConfig, tap: RouteTap) -> Result<Generator, GenerateError> {
        Generator::compiled(session, config, true, tap)
    }

    fn compiled(
        session: &mut Session,
        config: &ModelConfig,
        frozen: bool,
        tap: RouteTap,
    ) -> Result<Generator, GenerateError> {
        let decode = program(session, config, 1, frozen, &tap)?;
        Ok(Generator {
            frozen,
            sequence: config.sequence,
            chunk: CHUNK.min(config.sequence),
            prefill: None,
            decode,
            greedy: None,
            text: Vec::new(),
            logits: vec![0.0; config.vocab],
            config: config.clone(),
            tap,
        })
    }

    /// There are recorded routes, if any are forced, for `tokens` tokens from the start, those run again included.
    ///
    /// # Errors
    /// [`GenerateError::Routes`] with [`RouteError::TooShort`].
    pub fn wants(&self, tokens: usize) -> Result<(), GenerateError> {
        Ok(self.tap.wants(tokens_run(self.sequence, tokens))?)
    }

    /// Gives the recorded routes, if any are, their name.
    ///
    /// # Errors
    /// [`GenerateError::Routes`].
    pub fn finish(&mut self) -> Result<(), GenerateError> {
        Ok(self.tap.finish()?)
    }

    /// The program that takes one token.
    pub fn program(&mut self) -> &mut Program {
        &mut self.decode
    }

    /// Forgets the text.
    pub fn reset(&mut self) {
        self.text.clear();
    }

    /// Takes further tokens and returns the logits after the last of them, one per token of the vocabulary. When the
    /// model's sequence is full, the text goes on from its last half.
    ///
    /// # Errors
    /// As [`Session::run`]; a token beyond the vocabulary is rejected.
    pub fn take(&mut self, session: &mut Session, tokens: &[i32]) -> Result<&[f32], GenerateError> {
        let mut rest = tokens;
        while !rest.is_empty() {
            let room = self.room(session)?;
            let (now, later) = rest.split_at(rest.len().min(room));
            self.run_all(session, now)?;
            rest = later;
        }
        Ok(&self.logits)
    }

    /// Whether [`Generator::follow`] can be used: where routes are recorded or forced, the host has a part in each token.
    pub fn follows(&self) -> bool {
        self.tap.is_idle()
    }

    /// Takes `first` and then `count - 1` times the token that is most likely next among the first `known` of the vocabulary, the first of
    /// equals, and returns the `count` tokens that were chosen, of which the last is not taken yet: those of [`Generator::take`] and
    /// [`crate::sampling::most_likely`], chosen by the device, which the host waits for once. Records no routes.
    ///
    /// # Errors
    /// As [`Generator::take`]; [`GenerateError::NoChoice`] if a logit is NaN.
    pub fn follow(
        &mut self,
        session: &mut Session,
        first: i32,
        known: usize,
        count: usize,
    ) -> Result<Vec<i32>, GenerateError> {
        let (mut next, mut chosen) = (first, Vec::with_capacity(count));
        while chosen.len() < count {
            let runs = self.room(session)?.min(count - chosen.len());
            let start = self.text.len();
            // Compiling it adds the states that are written then.
            let program = self.greedy(session, known)?;
            session.write(gpt::NEXT_TOKEN, &[next])?;
            session.write(gpt::NEXT_POSITION, &[start as i32])?;
            let mut last = [0];
            // A device beside the host tells what it rejected when an output is read.
            let ran = session.run_times(program, runs).and_then(|()| program.output_into("token", &mut last));
            let all = session.read::<i32>(gpt::CHOSEN)?;
            let new = &all[start..start + runs];
            // What is no token is rejected by the run after.
            if let Some(at) = new.iter().position(|id| !(0..self.config.vocab as i32).contains(id)) {
                return Err(GenerateError::NoChoice { token: start + at });
            }
            ran?;
            self.text.push(next);
            self.text.extend_from_slice(&new[..runs - 1]);
            chosen.extend_from_slice(new);
            next = last[0];
        }
        Ok(chosen)
    }

    /// The step that chooses among the first `known` tokens, compiled when it is first asked for.
    fn greedy(&mut self, session: &mut Session, known: usize) -> Result<&mut Program, GenerateError> {
        self.greedy.take_if(|(of, _)| *of != known);
        match &mut self.greedy {
            Some((_, program)) => Ok(program),
            none => {
                let program = compile(session, &gpt::greedy(&self.config, known)?, self.frozen)?;
                Ok(&mut none.insert((known, program)).1)
            }
        }
    }

    /// How many more tokens fit the sequence. If none does, the text goes on from its last half first.
    fn room(&mut self, session: &mut Session) -> Result<usize, GenerateError> {
        if self.text.len() == self.sequence {
            let half = self.text.split_off(self.sequence - self.sequence / 2);
            self.text.clear();
            self.run_all(session, &half)?;
        }
        Ok(self.sequence - self.text.len())
    }

    /// Runs tokens that fit the sequence: whole chunks, then one by one.
    fn run_all(&mut self, session: &mut Session, tokens: &[i32]) -> Result<(), GenerateError> {
        if tokens.len() >= self.chunk && self.prefill.is_none() {
            self.prefill = Some(program(session, &self.config, self.chunk, self.frozen, &self.tap)?);
        }
        let mut rest = tokens;
        while !rest.is_empty() {
            let (program, n) = match &mut self.prefill {
                Some(prefill) if rest.len() >= self.chunk => (prefill, self.chunk),
                Some(_) | None => (&mut self.decode, 1),
            };
            let (now, later) = rest.split_at(n);
            let start = self.text.len() as i32;
            program.feed("tokens", now)?;
            if n == 1 {
                program.feed("positions", &[start])?;
            } else {
                let positions: Vec<i32> = (start..start + n as i32).collect();
                program.feed("positions", &positions)?;
            }
            program.feed("start", &[start])?;
            self.tap.before(program, now)?;
            session.run(program)?;
            self.tap.after(program, now)?;
            if later.is_empty() {
                program.output_into("logits", &mut self.logits)?;
            }
            self.text.extend_from_slice(now);
            rest = later;
        }
        Ok(())
    }
}

/// Tokens that a model of this sequence runs for a text of `tokens`: where the sequence is full, its last half is run again.
fn tokens_run(sequence: usize, tokens: usize) -> u64 {
    let half = sequence / 2;
    let beyond = tokens.saturating_sub(sequence);
    // After the first time there is room for the other half each time.
    let again = beyond.div_ceil((sequence - half).max(1));
    tokens as u64 + again as u64 * half as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_are_run_again_are_counted() {
        for (sequence, tokens) in (1..9).flat_map(|s| (0..60).map(move |t| (s, t))) {
            // As the generator does it, token by token.
            let (mut held, mut run) = (0, 0);
            for _ in 0..tokens {
                if held == sequence {
                    held = sequence / 2;
                    run += held as u64;
                }
                held += 1;
                run += 1;
            }
            assert_eq!(tokens_run(sequence, tokens), run, "{sequence} {tokens}");
        }
    }
}
