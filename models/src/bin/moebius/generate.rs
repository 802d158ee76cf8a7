//! `moebius generate`.

use std::io::Write;

use moebius::Session;
use moebius_models::generate::{Generator, Sampling};
use moebius_models::routes::RouteTap;
use moebius_models::tokenizer::Tokenizer;

use crate::cli::GenerateArgs;
use crate::failure::Failure;
use crate::model;

pub(crate) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let fits = sampling.temperature.is_finite() && sampling.temperature >= 0.0;
    if !fits {
        return Err(Failure::Usage(format!("--temperature: wanted 0 or more, found {}", sampling.temperature)));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(Failure::Usage(format!("--top-p: wanted more than 0 and at most 1, found {}", sampling.top_p)));
    }
    let mut model = model::open(&args.model, &args.device)?;
    let tap = RouteTap::open(&model.config, args.record_routes.as_deref(), args.replay_routes.as_deref())?;
    let mut generator = Generator::frozen(&mut model.session, &model.config.model, tap)?;
    model.load()?;
    crate::text::notes(model.session.engine());
    stream(&mut model.session, &mut generator, &model.tokenizer, &args.prompt, args.tokens, &sampling)?;
    Ok(generator.finish()?)
}

/// Prints `prompt` and then each token as it is chosen.
pub(crate) fn stream(
    session: &mut Session,
    generator: &mut Generator,
    tokenizer: &Tokenizer,
    prompt: &str,
    tokens: usize,
    sampling: &Sampling,
) -> Result<(), Failure> {
    let io = |source| Failure::Io { operation: "write to standard output", path: "-".into(), source };
    let mut stdout = std::io::stdout().lock();
    let ids: Vec<i32> = tokenizer.encode(prompt)?.into_iter().map(|id| id as i32).collect();
    if ids.is_empty() {
        return Err(Failure::Usage("--prompt: wanted at least one token of text, found none".into()));
    }
    // The last token is chosen and not run.
    generator.wants(ids.len() + tokens.saturating_sub(1))?;
    let known = tokenizer.vocab_size();
    // False when the reader has seen enough and closed the pipe.
    let mut put = |text: &str| match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(io(error)),
    };
    if !put(prompt)? {
        return Ok(());
    }
    let mut decoder = tokenizer.stream();
    let mut logits = generator.take(session, &ids)?;
    for index in 0..tokens {
        // A vocabulary padded beyond the tokenizer's has ids that stand for no text.
        let id = sampling.choose(&logits[..known.min(logits.len())], index as u64);
        let text = decoder.push(id as u32)?;
        if !put(&text)? {
            return Ok(());
        }
        if index + 1 < tokens {
            logits = generator.take(session, &[id as i32])?;
        }
    }
    let rest = decoder.finish()?;
    put(&format!("{rest}\n")).map(drop)
}
