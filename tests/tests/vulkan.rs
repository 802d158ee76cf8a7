//! The Vulkan backend in whole training steps, and its shaders without a device. What a device does in each op is in `conformance.rs`.
//! Says so where no driver shows a device.
#![cfg(feature = "vulkan")]

use std::collections::BTreeSet;
use std::sync::Arc;

use moebius::{Engine, MicroStep, Optimizer, Program, Session, StepOptions, Trainer};
use moebius_backends::Backend;
use moebius_backends::vulkan::{Choice, Limits, Vulkan};
use moebius_ir::Op;
use moebius_ir::passes;
use moebius_models::config::Config;
use moebius_models::gpt;
use moebius_tests::device::Device;
use moebius_tests::{cases, conformance, device, graphs};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

const SEQUENCE: usize = 6;
const BATCH: u64 = 3;

/// A large device without cooperative matrices.
const CARD: Limits = Limits {
    halves: true,
    shared: 48 << 10,
    range: (4 << 30) - 4,
    threads: 1024,
    subgroup: 32,
    shuffles: true,
    buffers: 64,
    ..Limits::LEAST
};

/// A small pyramid-residual model.
fn config() -> Config {
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    let small =
        ["model.layers=2", "model.width=12", "model.heads=2", "model.ffn=16", "model.sequence=6", "model.vocab=31"];
    for setting in small.iter().chain(&["model.experts=[4]"]) {
        config.set(setting).unwrap();
    }
    config.validate().unwrap();
    config
}

/// The device under the validation layer, or `None` where there is none or another kind is asked for.
#[expect(clippy::print_stderr, reason = "a test that did nothing should say so")]
fn vulkan() -> Option<Arc<Vulkan>> {
    let other = std::env::var("MOEBIUS_DEVICE").is_ok_and(|kind| kind != "vulkan");
    if other || !Vulkan::count().is_ok_and(|n| n > 0) {
        eprintln!("no Vulkan device: nothing is run");
        return None;
    }
    Some(Arc::new(Vulkan::open_validated(&Choice::Best).unwrap()))
}

struct Run {
    session: Session,
    trainer: Trainer,
    config: Config,
}

impl Run {
    fn new(backend: Arc<dyn Backend>) -> Run {
        let (config, mut session) = (config(), Engine::with_backend(backend).session());
        let training = gpt::training(&config.model, BATCH as usize).unwrap();
        // So large an eps makes a step a smooth function of its gradient: else the sign of a gradient near 0 would decide.
        let options =
            StepOptions { optimizer: Optimizer { eps: 1e-2, ..Optimizer::default() }, ..StepOptions::default() };
        let trainer = Trainer::with(&mut session, training.graph, training.loss, options).unwrap();
        gpt::initialise(&config.model, 5, |p, values| session.write(&p.name, values)).unwrap();
        Run { session, trainer, config }
    }

    /// Loss and norm of the gradients of so many steps.
    fn steps(&mut self, count: usize) -> Vec<(f32, f32)> {
        let noisy = gpt::is_noisy(&self.config.model);
        let mut feed = move |at: MicroStep, program: &mut Program| {
            let sequences = at.step * BATCH..(at.step + 1) * BATCH;
            let token = |i: u64, t: u64| ((i * 7 + t * t * 5 + i * t) % 31) as i32;
            let tokens: Vec<i32> = sequences.flat_map(|i| (0..SEQUENCE as u64).map(move |t| token(i, t))).collect();
            let targets: Vec<i32> = tokens.iter().map(|t| (t * 3 + 1) % 31).collect();
            program.feed("tokens", &tokens)?;
            program.feed("targets", &targets)?;
            if noisy {
                program.feed(gpt::NOISE_KEY, &[at.step as u32, at.micro_batch as u32])?;
            }
            Ok::<_, moebius::Error>(1e-2)
        };
        let mut step = |_| {
            let report = self.trainer.step_with(&mut self.session, &mut feed).unwrap();
            (report.loss, report.grad_norm)
        };
        (0..count).map(&mut step).collect()
    }

    /// Everything that a checkpoint holds, with its bytes.
    fn kept(&self) -> Vec<(String, Vec<u8>)> {
        let names = self.session.names().into_iter().filter(|n| !n.starts_with("trainer."));
        names.map(|n| (n.to_owned(), self.session.bytes(n).unwrap().into_owned())).collect()
    }

    /// Goes on from what another run has kept after so many steps.
    fn resume(&mut self, kept: &[(String, Vec<u8>)], step: u64) {
        for (name, bytes) in kept {
            self.session.write_bytes(name, bytes).unwrap();
        }
        self.trainer.resume_at(step);
    }
}

fn close(a: &[(f32, f32)], b: &[(f32, f32)]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        let near = |a: f32, b: f32| (a / b - 1.0).abs() < 2e-5;
        assert!(near(a.0, b.0) && near(a.1, b.1), "{a:?} for {b:?}");
    }
}

/// The device's steps are the processor's, and either goes on from what the other has kept. The validation layer would make a step fail.
#[test]
fn training_steps_are_those_of_the_processor() {
    let Some(vulkan) = vulkan() else { return };
    let (mut device, mut cpu) = (Run::new(vulkan.clone()), Run::new(Arc::new(device::cpu(2))));
    let (of_device, of_cpu) = (device.steps(4), cpu.steps(4));
    close(&of_device, &of_cpu);
    assert!(of_device[3].0 < of_device[0].0, "{of_device:?}");
    let (kept, wanted) = (device.kept(), cpu.kept());
    let mut moved = 0.0f32;
    for ((name, a), (other, b)) in kept.iter().zip(&wanted) {
        assert_eq!((name, a.len()), (other, b.len()));
        if name.ends_with(".idle") {
            assert_eq!(a, b, "{name}");
            continue;
        }
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let (a, b) = (floats(a), floats(b));
        let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let apart = a.iter().zip(&b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(apart <= 2e-5 * largest, "{name}: {apart} of {largest}");
        moved = moved.max(if name.starts_with("adam.m/") { largest } else { 0.0 });
    }
    assert!(moved > 1e-3, "no gradient: {moved}");
    // Each goes on from the other's state.
    device.resume(&wanted, 4);
    cpu.resume(&kept, 4);
    close(&device.steps(2), &cpu.steps(2));
}

/// The same steps give the same bits.
#[test]
fn a_run_is_repeated_bit_for_bit() {
    let Some(vulkan) = vulkan() else { return };
    let mut runs = [Run::new(vulkan.clone()), Run::new(vulkan)];
    let [a, b] = runs.each_mut().map(|run| run.steps(2));
    assert_eq!(a, b);
    assert_eq!(runs[0].kept(), runs[1].kept());
}

/// A case of every op, in its first dtype and its last, with its gradients, while the validation layer looks on where it is installed:
/// a run that it objects to is an error.
#[test]
fn no_op_makes_the_validation_layer_object() {
    let Some(vulkan) = vulkan() else { return };
    let devices = [Device { name: "vulkan", backend: vulkan }];
    let all: Vec<_> = cases::groups().into_iter().flat_map(|(_, cases)| cases).collect();
    for op in Op::NAMES {
        let case = all.iter().find(|c| c.op == *op).unwrap_or_else(|| panic!("no case of {op}"));
        for dtype in [case.dtypes.first(), case.dtypes.last()].into_iter().flatten() {
            let done = conformance::forward(case, *dtype, &devices);
            let done = done.and_then(|()| conformance::backward(case, *dtype, &devices));
            done.unwrap_or_else(|e| panic!("{}: {e}", case.title(*dtype)));
        }
    }
}

/// Every shader that the op cases need is one, on a large device and on the least that is supported.
#[test]
fn every_shader_is_translated() {
    let large = Limits { groups: 1 << 20, range: 1 << 32, ..CARD };
    let least = Limits { halves: true, processor: true, ..Limits::LEAST };
    let texts = graphs::of_all_cases(|graph, title| {
        [large, least].map(|limits| Vulkan::kernels(graph, limits).unwrap_or_else(|e| panic!("{title}: {e}"))).concat()
    });
    assert!(texts.len() > 200, "only {} shaders", texts.len());
    texts.par_iter().for_each(|shader| {
        let words = shader.translate().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(words[0], 0x0723_0203, "{}: SPIR-V begins with its number", shader.title);
    });
    let titles: BTreeSet<&str> = texts.iter().map(|t| t.title.as_str()).collect();
    assert!(titles.len() > 40, "only {titles:?}");
}

/// A device without floats of 16 bits refuses them by name, all at once, and takes f32.
#[test]
fn what_a_device_lacks_is_refused_by_name() {
    let (mut refused, mut taken) = (0, 0);
    for case in cases::groups().into_iter().flat_map(|(_, cases)| cases).filter(|c| c.op == "softmax") {
        for &dtype in case.dtypes {
            let graph = passes::optimise(&case.sketch(dtype).unwrap().graph).unwrap();
            match Vulkan::kernels(&graph, Limits::LEAST) {
                Ok(_) => {
                    assert_eq!(dtype.bytes(), 4);
                    taken += 1;
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("softmax") && text.contains(dtype.name()), "{text}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
}

/// In the decoding of a model, a token at a time, some commands share no memory with those just before, and do not wait for them.
#[test]
fn commands_wait_only_for_what_they_share_memory_with() {
    let config = Config::preset("350m-pr-moe-32-64").unwrap();
    let graph = passes::narrow_parameters(&gpt::decoding(&config.model, 1).unwrap()).unwrap();
    let graph = passes::optimise(&graph).unwrap();
    let [commands, waits] = Vulkan::commands(graph, CARD).unwrap();
    let layers = config.model.layers;
    assert!(waits >= 6 * layers, "{waits} of {commands}: a layer's products, norm and attention follow one another");
    assert!(waits * 10 < commands * 9, "{waits} of {commands}");
}
