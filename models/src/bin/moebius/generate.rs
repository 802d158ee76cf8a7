//! `moebius generate`.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moebius::Session;
use moebius_models::generate::Generator;
use moebius_models::routes::RouteTap;
use moebius_models::sampling::Sampling;
use moebius_models::tokenizer::Tokenizer;

use crate::cli::GenerateArgs;
use crate::failure::Failure;
use crate::{model, stop};

/// A text that comes in portions of less than this flows.
const NOTICED: Duration = Duration::from_millis(50);

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
    // From here on Ctrl-C ends the text after a whole token, and a file of routes is one of the text so far.
    let stop = stop::asked("stopping after this token");
    let asked = (args.prompt.as_str(), args.tokens);
    let whole = stream(&mut model.session, &mut generator, &model.tokenizer, asked, &sampling, &stop)?;
    generator.finish()?;
    if whole { Ok(()) } else { Err(Failure::Stopped) }
}

/// Prints a prompt and then each of so many tokens as it is chosen, as long as nobody asks to `stop`. Whether nobody did.
pub(crate) fn stream(
    session: &mut Session,
    generator: &mut Generator,
    tokenizer: &Tokenizer,
    (prompt, tokens): (&str, usize),
    sampling: &Sampling,
    stop: &AtomicBool,
) -> Result<bool, Failure> {
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
        return Ok(true);
    }
    let mut decoder = tokenizer.stream();
    let logits = generator.take(session, &ids)?;
    // A vocabulary padded beyond the tokenizer's has ids that stand for no text.
    let known = known.min(logits.len());
    let mut next = vec![sampling.choose(&logits[..known], 0) as i32];
    let (mut chosen, mut portion) = (0, 1);
    let by_device = sampling.temperature <= 0.0 && generator.follows();
    while chosen < tokens && !stop.load(Ordering::Relaxed) {
        chosen += next.len();
        for &id in &next {
            let text = decoder.push(id as u32)?;
            if !put(&text)? {
                return Ok(true);
            }
        }
        let Some(&last) = next.last().filter(|_| chosen < tokens) else { break };
        next = if by_device {
            let begun = Instant::now();
            let next = generator.follow(session, last, known, portion.min(tokens - chosen))?;
            // As many at a time as a reader does not notice.
            portion = if begun.elapsed() < NOTICED / 2 { 2 * portion } else { portion.div_ceil(2) };
            next
        } else {
            let logits = generator.take(session, &[last])?;
            vec![sampling.choose(&logits[..known], chosen as u64) as i32]
        };
    }
    let rest = decoder.finish()?;
    put(&format!("{rest}\n"))?;
    Ok(chosen == tokens)
}
