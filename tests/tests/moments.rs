//! Training with the optimizer's moments in f32, bf16 and 8 bits: what is kept, how large it is, and that it is kept exactly.

use std::sync::Arc;

use moebius::{Engine, MicroStep, Program, Session, Trainer};
use moebius_ir::{DType, Moments};
use moebius_models::config::Config;
use moebius_models::{gpt, training};
use moebius_tests::device;

/// A small model with tensors of more than 4096 elements, which are kept in 8 bits, and of less. Steps are two micro-batches.
fn config(moments: Moments, more: &[&str]) -> Config {
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    let moments = format!("train.moments={moments}");
    let small = [
        "model.layers=2",
        "model.width=64",
        "model.heads=2",
        "model.ffn=65",
        "model.sequence=6",
        "model.vocab=31",
        "model.experts=[3]",
        "train.batch=2",
        "train.accumulate=2",
        &moments,
    ];
    small.iter().chain(more).for_each(|setting| config.set(setting).unwrap());
    config.validate().unwrap();
    config
}

struct Run {
    session: Session,
    trainer: Trainer,
    config: Config,
}

impl Run {
    fn new(config: Config, threads: usize) -> Run {
        let engine = Engine::with_backend(Arc::new(device::cpu(threads)));
        let mut session = engine.session();
        let trainer = training::trainer(&engine, &mut session, &config).unwrap();
        gpt::initialise(&config.model, 5, |p, values| session.write(&p.name, values)).unwrap();
        Run { session, trainer, config }
    }

    /// The losses of so many steps.
    fn steps(&mut self, count: u64, rate: f32) -> Vec<f32> {
        let (batch, noisy) = (self.config.train.batch as u64, gpt::is_noisy(&self.config.model));
        let mut feed = move |at: MicroStep, program: &mut Program| {
            let first = (at.step * 2 + at.micro_batch as u64) * batch;
            let ids = first..first + batch;
            let tokens: Vec<i32> =
                ids.flat_map(|i| (0..6).map(move |t| ((i * 7 + t * t * 5 + i * t) % 31) as i32)).collect();
            let targets: Vec<i32> = tokens.iter().map(|t| (t * 3 + 1) % 31).collect();
            program.feed("tokens", &tokens)?;
            program.feed("targets", &targets)?;
            if noisy {
                program.feed(gpt::NOISE_KEY, &[at.step as u32, at.micro_batch as u32])?;
            }
            Ok::<_, moebius::Error>(rate)
        };
        (0..count).map(|_| self.trainer.step_with(&mut self.session, &mut feed).unwrap().loss).collect()
    }

    /// Parameters, copies and moments, with their bytes.
    fn kept(&self) -> Vec<(String, Vec<u8>)> {
        let names = self.session.names().into_iter().filter(|n| !n.starts_with("accumulated/"));
        let names = names.filter(|n| !n.starts_with("trainer."));
        names.map(|n| (n.to_owned(), self.session.bytes(n).unwrap().into_owned())).collect()
    }
}

#[test]
fn moments_have_the_stated_types_and_bytes() {
    let wanted = [(Moments::F32, DType::F32), (Moments::Bf16, DType::Bf16), (Moments::Eight, DType::U32)];
    for (moments, dtype) in wanted {
        for model in ["f32", "bf16"] {
            let mut run = Run::new(config(moments, &[&format!("model.dtype={model}")]), 1);
            let names = run.trainer.moments();
            let bytes: usize = names.iter().map(|name| run.session.bytes(name).unwrap().len()).sum();
            assert_eq!(bytes as u64, run.config.training_bytes().optimizer, "{moments}");
            let of = |name: &str| run.session.ty(&format!("adam.v/{name}")).unwrap().clone();
            let parameters = run.trainer.parameters();
            let large: Vec<&String> =
                parameters.iter().filter(|p| run.session.ty(p).unwrap().elements() >= 4096).collect();
            assert!(large.len() > 5 && large.len() < parameters.len());
            assert!(large.iter().all(|name| of(name).dtype == dtype), "{moments}");
            let coded = names.iter().filter(|name| name.starts_with("adam.scales/")).count();
            assert_eq!(coded, if moments == Moments::Eight { large.len() } else { 0 });
            // Everything stored is a parameter, a moment, a copy or a sum; nothing else grew.
            let plan = run.trainer.program().plan();
            assert!(plan.overlap().is_none() && plan.state_bytes() > bytes);
        }
    }
}

#[test]
fn moments_in_fewer_bits_train_as_f32_does() {
    let mut plain = Run::new(config(Moments::F32, &[]), 2);
    let wanted = plain.steps(60, 3e-3);
    for moments in [Moments::Bf16, Moments::Eight] {
        let losses = Run::new(config(moments, &[]), 2).steps(60, 3e-3);
        let mean = |losses: &[f32]| losses[50..].iter().sum::<f32>() / 10.0;
        assert!(mean(&losses) < 0.5 * losses[0], "{moments}: {losses:?}");
        let apart = (mean(&losses) - mean(&wanted)).abs();
        assert!(apart < 0.05 * losses[0] && losses != wanted, "{moments}: {apart}");
    }
}

#[test]
fn a_run_goes_on_with_the_same_bits_from_what_it_stored() {
    for moments in [Moments::Bf16, Moments::Eight] {
        for model in ["f32", "bf16"] {
            let make = |threads| Run::new(config(moments, &[&format!("model.dtype={model}")]), threads);
            let mut straight = make(1);
            straight.steps(3, 1e-2);
            let (stored, names) = (straight.kept(), straight.trainer.moments());
            straight.steps(2, 1e-2);
            let go_on = |skipped: Option<&String>| {
                let mut resumed = make(3);
                for (name, bytes) in stored.iter().filter(|(name, _)| Some(name) != skipped) {
                    resumed.session.write_bytes(name, bytes).unwrap();
                }
                resumed.trainer.resume_at(3);
                resumed.steps(2, 1e-2);
                resumed.kept()
            };
            assert!(go_on(None) == straight.kept(), "{moments} {model}");
            // Each kind of tensor counts.
            for kind in ["adam.m/", "adam.v/", "adam.scales/"] {
                if let Some(name) = names.iter().find(|name| name.starts_with(kind)) {
                    assert!(go_on(Some(name)) != straight.kept(), "{moments} without {name}");
                }
            }
        }
    }
}

#[test]
fn a_learning_rate_that_is_not_finite_leaves_every_moment() {
    for moments in Moments::ALL {
        let mut run = Run::new(config(moments, &[]), 2);
        run.steps(2, 1e-2);
        let of_optimizer = |run: &Run| {
            let kept = run.kept().into_iter().filter(|(name, _)| name.starts_with("adam."));
            kept.collect::<Vec<_>>()
        };
        let before = of_optimizer(&run);
        run.steps(1, f32::NAN);
        assert!(of_optimizer(&run) == before, "{moments}");
        run.steps(1, 0.0);
        assert!(of_optimizer(&run) != before, "{moments}");
    }
}
