//! `moebius eval`.

use moebius_models::data::{Corpus, CorpusSpec, Source, Validation, Windows, default_cache_dir};
use moebius_models::evaluation::Evaluator;
use moebius_models::routes::RouteTap;
use serde_json::json;

use crate::cli::EvalArgs;
use crate::failure::Failure;
use crate::model;

pub(crate) fn run(args: &EvalArgs) -> Result<(), Failure> {
    let mut model = model::open(&args.model, &args.device)?;
    let sources: Vec<Source> = args.data.iter().cloned().map(Source::File).collect();
    let cache = default_cache_dir();
    let spec = CorpusSpec {
        train: &sources,
        validation: Validation::Fraction(0.0),
        tokenizer: &model.tokenizer,
        vocab: Some(model.config.model.vocab),
        cache_dir: &cache,
    };
    let corpus = Corpus::open(&spec, &mut |_, _, _| {})?;
    let sequence = model.config.model.sequence;
    // Not more sequences at a time than the text has, so that none is counted twice.
    let batch = args.batch.min((corpus.train.len().saturating_sub(1) / sequence).max(1));
    if args.batch == 0 {
        return Err(Failure::Usage("--batch: wanted at least 1, found 0".into()));
    }
    let windows = Windows::new(&corpus.train, batch, sequence, None)?;
    let mut tap = RouteTap::open(&model.config, args.record_routes.as_deref(), args.replay_routes.as_deref())?;
    let mut evaluator = Evaluator::frozen(&mut model.session, &model.config.model, batch, tap.routes())?;
    model.load()?;
    crate::text::notes(model.session.engine());
    let found = evaluator.run_with(&mut model.session, &windows, &mut tap)?;
    if args.json {
        println!("{}", json!({ "loss": found.loss, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens }));
    } else {
        println!("loss           {:.6} nats per token", found.loss);
        println!("bits per byte  {:.6}", found.bits_per_byte);
        println!("tokens         {}", found.tokens);
    }
    Ok(())
}
