//! What a GPU's driver is called for in training steps. Says so where there is no GPU; an emulated one counts the same calls.

use std::sync::Arc;

use moebius::{Engine, Error, History, Recompute, StepOptions, Trainer};
use moebius_backends::cuda::Cuda;
use moebius_models::config::Config;
use moebius_models::gpt;

const STEPS: u64 = 6;

/// After the first two steps, which load the kernels and record the plan, a step is one launch of a recorded graph for each of its
/// micro-batches, and the host waits once for all steps together.
#[test]
#[expect(clippy::print_stderr, reason = "a test that did nothing should say so")]
fn steps_are_graph_launches_and_one_wait() {
    let asked = std::env::var("MOEBIUS_DEVICE");
    if asked.is_ok_and(|device| device == "cpu") || !Cuda::count().is_ok_and(|n| n > 0) {
        eprintln!("no GPU: nothing is counted");
        return;
    }
    for (count, recomputes) in [(1, false), (3, true)] {
        let cuda = Arc::new(Cuda::open(0).unwrap());
        let mut session = Engine::with_backend(cuda.clone()).session();
        let mut config = Config::preset("tiny-pr-moe").unwrap();
        for setting in [
            "model.layers=2",
            "model.experts=[2]",
            "model.width=16",
            "model.heads=2",
            "model.ffn=16",
            "model.sequence=4",
        ] {
            config.set(setting).unwrap();
        }
        config.validate().unwrap();
        let training = gpt::training_accumulated(&config.model, 1, count).unwrap();
        let options = StepOptions {
            micro_batches: training.micro_batches,
            recompute: if recomputes { Recompute::Between(training.borders) } else { Recompute::Nothing },
            history: Some(History { steps: STEPS as usize, outputs: vec!["lm_loss".into()] }),
            ..StepOptions::default()
        };
        let mut trainer = Trainer::with(&mut session, training.graph, training.loss, options).unwrap();
        gpt::initialise(&config.model, 5, |p, values| session.write(&p.name, values)).unwrap();
        let mut feed = |at: moebius::MicroStep, program: &mut moebius::Program| {
            let first = (at.step * 3 + at.micro_batch as u64) as i32;
            program.feed("tokens", &[first, first + 1, 7, 1])?;
            program.feed("targets", &[first + 1, 7, 1, first])?;
            Ok::<f32, Error>(1e-3)
        };
        let mut losses = Vec::new();
        let mut window = |trainer: &mut Trainer, steps: u64| {
            for _ in 0..steps {
                trainer.launch(&mut session, &mut feed).unwrap();
            }
            trainer.collect(&mut session, &mut feed, |report, _| losses.push(report.loss)).unwrap();
        };
        window(&mut trainer, 2);
        let before = cuda.calls();
        window(&mut trainer, STEPS);
        let after = cuda.calls();
        assert_eq!(after.graph_launches - before.graph_launches, STEPS * count as u64);
        assert_eq!(after.synchronisations - before.synchronisations, 1);
        assert_eq!(after.launches, before.launches, "a kernel was launched beside the recorded graph");
        assert!(before.launches > 100, "{before:?}");
        assert_eq!(losses.len() as u64, 2 + STEPS);
        assert!(losses.iter().all(|l| l.is_finite()) && losses[7] != losses[2], "{losses:?}");
    }
}
