//! The embeddable API: its errors, training, and what a step that fails leaves behind.

use std::sync::Arc;

use moebius::{Element, Engine, Error, Optimizer, Session, Trainer};
use moebius_backends::Error as Backend;
use moebius_ir::{DType, Graph, Role, TensorType, Value};
use moebius_tests::Sketch;
use moebius_tests::device;
use moebius_tests::layers::{self, Moe};

const LAYER: Moe = Moe { width: 12, hidden: 16, experts: 3, k: 2, capacity: None, renormalise: true };

fn engine(threads: usize) -> Engine {
    Engine::with_backend(Arc::new(device::cpu(threads)))
}

fn small() -> Graph {
    let mut g = Graph::new();
    let x = g.feed("x", TensorType::f32([2, 3])).unwrap();
    let w = g.parameter("w", TensorType::f32([3, 4])).unwrap();
    let y = g.matmul(x, w).unwrap();
    g.output("y", y).unwrap();
    let large = g.cast(y, DType::Bf16).unwrap();
    g.output("half", large).unwrap();
    g
}

/// A node with more axes than the CPU's kernels take, none of which can be merged with its neighbour.
fn refused_graph() -> Graph {
    let mut g = Graph::new();
    let x = g.feed("x", TensorType::f32([2; 12])).unwrap();
    let reversed: Vec<usize> = (0..12).rev().collect();
    let y = g.transpose(x, &reversed).unwrap();
    g.output("y", y).unwrap();
    g
}

#[test]
fn names_types_and_lengths_are_checked() {
    let mut session = engine(1).session();
    let mut program = session.compile(&small()).unwrap();
    assert_eq!(session.names(), ["w"]);
    assert_eq!(session.ty("w"), Some(&TensorType::f32([3, 4])));

    let refused = program.feed("z", &[0f32; 6]).unwrap_err();
    assert!(
        matches!(&refused, Error::NoSuch { what: "feed", name, there } if name == "z" && there.contains(&"x".into()))
    );
    assert!(matches!(program.feed("x", &[0i32; 6]), Err(Error::ElementType { found: DType::I32, .. })));
    let refused = program.feed("x", &[0f32; 5]).unwrap_err();
    assert!(matches!(refused, Error::Backend(Backend::Bytes { wanted: 24, found: 20, .. })), "{refused}");
    assert!(matches!(program.feed("w", &[0f32; 12]), Err(Error::Backend(Backend::NoSuch { what: "feed", .. }))));

    session.write("w", &[1f32; 12]).unwrap();
    assert!(matches!(session.write("w", &[1i32; 12]), Err(Error::ElementType { .. })));
    assert!(matches!(session.write("w", &[1f32; 11]), Err(Error::Backend(Backend::Bytes { .. }))));
    assert!(matches!(session.write("v", &[1f32; 11]), Err(Error::Backend(Backend::NoSuch { .. }))));
    assert!(matches!(session.read::<f32>("v"), Err(Error::Backend(Backend::NoSuch { .. }))));
    assert!(matches!(session.read::<u32>("w"), Err(Error::ElementType { .. })));

    program.feed("x", &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    session.run(&mut program).unwrap();
    assert_eq!(program.output::<f32>("y").unwrap(), [6.0, 6.0, 6.0, 6.0, 15.0, 15.0, 15.0, 15.0]);
    assert!(matches!(program.output::<f32>("w"), Err(Error::NoSuch { what: "output", .. })));
    assert!(matches!(program.output::<f32>("half"), Err(Error::ElementType { .. })));
    assert!(matches!(program.scalar("y"), Err(Error::Backend(Backend::Bytes { .. }))));
    assert_eq!(<u8 as Element>::DTYPE, DType::Bool);

    // A graph that wants another type of the same name, and a tensor taken away.
    let mut other = Graph::new();
    let w = other.parameter("w", TensorType::f32([4])).unwrap();
    other.output("w", w).unwrap();
    assert!(matches!(session.compile(&other), Err(Error::Backend(Backend::StoredType { .. }))));
    session.insert("w", &TensorType::f32([7])).unwrap();
    assert!(matches!(session.run(&mut program), Err(Error::Backend(Backend::StoredType { .. }))));
    assert!(session.remove("w"));
    assert!(!session.remove("w"));
    assert!(matches!(session.run(&mut program), Err(Error::Backend(Backend::NoSuch { .. }))));
}

#[test]
fn values_of_any_dtype_go_in_and_out_as_bytes() {
    let mut session = engine(1).session();
    for dtype in DType::ALL {
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::new(dtype, [2, 3])).unwrap();
        let y = g.transpose(x, &[1, 0]).unwrap();
        g.output("y", y).unwrap();
        let mut program = session.compile(&g).unwrap();
        let width = dtype.bytes();
        let bytes: Vec<u8> = (0..6 * width).map(|i| u8::from(i % (2 * width) == 0)).collect();
        program.feed_bytes("x", &bytes).unwrap();
        session.run(&mut program).unwrap();
        let element = |row: usize, column: usize| &bytes[(row * 3 + column) * width..][..width];
        let wanted: Vec<u8> = (0..6).flat_map(|i| element(i % 2, i / 2).to_vec()).collect();
        assert_eq!(program.output_bytes("y").unwrap(), wanted, "{dtype}");
        let refused = program.feed_bytes("x", &bytes[1..]).unwrap_err();
        assert!(matches!(refused, Error::Backend(Backend::Bytes { .. })), "{refused}");
        assert!(matches!(program.feed_bytes("z", &bytes), Err(Error::NoSuch { what: "feed", .. })));
        assert!(matches!(program.output_bytes("x"), Err(Error::NoSuch { what: "output", .. })));
    }
}

#[test]
fn a_checked_engine_gives_the_same_bits_and_refusals_are_listed() {
    let plain = Engine::with_backend(Arc::new(device::cpu(2).with_checks(false)));
    let checked = plain.checked().unwrap();
    let results = [plain.clone(), checked].map(|engine| {
        let mut session = engine.session();
        let mut program = session.compile(&small()).unwrap();
        session.write("w", &[0.3f32; 12]).unwrap();
        program.feed("x", &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        session.run(&mut program).unwrap();
        (program.plan().arena_bytes(), program.output_bytes("y").unwrap())
    });
    assert_eq!(results[0].1, results[1].1);
    assert!(results[0].0 < results[1].0, "no fences: {} bytes with, {} without", results[1].0, results[0].0);

    assert_eq!(plain.refusals(&small()).unwrap(), []);
    let error = plain.session().compile(&refused_graph()).err().unwrap();
    assert_eq!(plain.refusals(&refused_graph()).unwrap(), error.refusals());
    assert!(!error.refusals().is_empty() && error.refusals().iter().all(|r| !r.wanted.is_empty()), "{error}");
    assert!(Error::NoChecks { device: "abacus" }.refusals().is_empty());
}

#[test]
fn devices_are_named() {
    let Err(Error::NoSuchDevice { wanted, there }) = Engine::open("abacus") else { panic!("opened an abacus") };
    assert!(wanted == "abacus" && there.contains(&"cpu".into()), "{there:?}");
    let engine = Engine::open("auto").unwrap();
    assert!(!engine.describe().is_empty());
    assert!(Engine::devices().iter().any(|d| d.name == "cpu" && d.state.is_ok()));
}

#[test]
fn a_value_that_a_kernel_rejects_is_an_error_with_its_line() {
    let mut g = Graph::new();
    let table = g.parameter("table", TensorType::f32([4, 2])).unwrap();
    let ids = g.feed("ids", TensorType::i32([3])).unwrap();
    let rows = g.embedding(table, ids).unwrap();
    g.output("rows", rows).unwrap();
    let mut session = engine(2).session();
    let mut program = session.compile(&g).unwrap();
    for wrong in [4, -1, i32::MAX, i32::MIN] {
        program.feed("ids", &[0, wrong, 1]).unwrap();
        let refused = session.run(&mut program).unwrap_err();
        let Error::Backend(Backend::Kernel { op, site, .. }) = &refused else { panic!("{refused}") };
        assert_eq!(*op, "embedding");
        assert!(site.file.ends_with("engine.rs"), "{refused}");
    }
    program.feed("ids", &[0, 3, 1]).unwrap();
    session.run(&mut program).unwrap();
}

#[test]
fn a_start_outside_of_the_cache_is_rejected() {
    let mut g = Graph::new();
    let qkv = g.feed("qkv", TensorType::f32([1, 2, 6])).unwrap();
    let [k, v] = ["k", "v"].map(|n| g.state(n, TensorType::f32([1, 5, 2])).unwrap());
    let start = g.feed("start", TensorType::i32([])).unwrap();
    let [out, new_k, new_v] = g.attention_cached(qkv, k, v, start, 1, 1, 1.0).unwrap();
    g.output("out", out).unwrap();
    g.update(k, new_k).unwrap();
    g.update(v, new_v).unwrap();
    let mut session = engine(1).session();
    let mut program = session.compile(&g).unwrap();
    program.feed("qkv", &(0..12).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
    session.run(&mut program).unwrap();
    let before = everything(&session);
    for wrong in [-1, 4, i32::MAX, i32::MIN] {
        program.feed("start", &[wrong]).unwrap();
        let refused = session.run(&mut program).unwrap_err();
        assert!(
            matches!(&refused, Error::Backend(Backend::Kernel { op: "attention_cached", .. })),
            "start {wrong}: {refused}"
        );
        assert_eq!(everything(&session), before, "a rejected start writes nothing");
    }
}

/// Eight tokens into a layer, a linear head with fixed targets; feeds `x`.
fn eight_tokens(sparse: bool) -> (Sketch, Value) {
    let mut s = Sketch::new(DType::F32).seeded(9);
    let build = |s: &mut Sketch| {
        let data = s.normals(8 * LAYER.width);
        let x = s.named("x", Role::Feed, TensorType::f32([8, LAYER.width]), data, false)?;
        let y =
            if sparse { layers::moe(s, "layer", x, LAYER)?.y } else { layers::dense_ffn(s, "layer", x, LAYER.hidden)? };
        let head = layers::parameter(s, "head", [5, LAYER.width], 0.2)?;
        let targets: Vec<i32> = (0..8).map(|i| i * 3 % 5).collect();
        let data = targets.iter().map(|&t| f64::from(t)).collect();
        let targets = s.graph.constant(TensorType::i32([8]), data)?;
        let losses = s.graph.linear_cross_entropy(y, head, targets)?;
        s.graph.mean_all(losses)
    };
    let loss = build(&mut s).unwrap();
    (s, loss)
}

fn floats(s: &Sketch, name: &str) -> Vec<f32> {
    s.inputs[name].data.iter().map(|&v| v as f32).collect()
}

fn trainer(threads: usize, sparse: bool) -> (Session, Trainer) {
    let (s, loss) = eight_tokens(sparse);
    let mut session = engine(threads).session();
    let optimizer = Optimizer { weight_decay: 0.0, ..Optimizer::default() };
    let mut trainer = Trainer::new(&mut session, s.graph.clone(), loss, &optimizer).unwrap();
    for name in trainer.parameters() {
        session.write(name, &floats(&s, name)).unwrap();
    }
    trainer.program().feed("x", &floats(&s, "x")).unwrap();
    (session, trainer)
}

#[test]
fn eight_tokens_are_learned_by_heart() {
    for sparse in [false, true] {
        let (mut session, mut trainer) = trainer(2, sparse);
        let first = trainer.step(&mut session, 1e-2).unwrap();
        assert!(first.loss > 1.0 && first.grad_norm > 0.0, "{first:?}");
        let mut last = first;
        for _ in 0..149 {
            last = trainer.step(&mut session, 1e-2).unwrap();
        }
        assert_eq!((last.step, trainer.steps_done()), (150, 150));
        assert!(last.loss < 0.02, "sparse {sparse}: {last:?}");
    }
}

/// Every stored tensor with its bytes.
fn everything(session: &Session) -> Vec<(String, Vec<u8>)> {
    session.names().into_iter().map(|n| (n.to_owned(), session.bytes(n).unwrap().into_owned())).collect()
}

#[test]
fn one_seed_gives_the_same_bits_on_any_threads() {
    let run = |threads| {
        let (mut session, mut trainer) = trainer(threads, true);
        let losses: Vec<u32> = (0..12).map(|_| trainer.step(&mut session, 3e-3).unwrap().loss.to_bits()).collect();
        (losses, everything(&session))
    };
    let wanted = run(1);
    assert_eq!(run(1), wanted);
    assert_eq!(run(3), wanted);
    assert!(wanted.1.iter().any(|(name, _)| name == "adam.m/layer.router"), "moments are stored");
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_names_the_first_bad_tensor() {
    let (s, _) = eight_tokens(true);
    let (mut session, mut trainer) = trainer(2, true);
    for _ in 0..3 {
        trainer.step(&mut session, 1e-2).unwrap();
    }
    let before = everything(&session);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = floats(&s, "x");
        x[17] = bad;
        trainer.program().feed("x", &x).unwrap();
        match trainer.step(&mut session, 1e-2) {
            Err(Error::NonFinite { step: 4, found: Some(found), .. }) => {
                assert!(found.site.file.ends_with("layers.rs"), "{found:?}");
                assert!(!found.value.is_finite(), "{found:?}");
                assert!(!found.scope.starts_with("backward") && found.op != "adamw", "not the first: {found:?}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(everything(&session), before);
        assert_eq!(trainer.steps_done(), 3);
    }
    // And training goes on as if nothing had been.
    trainer.program().feed("x", &floats(&s, "x")).unwrap();
    let after = trainer.step(&mut session, 1e-2).unwrap();
    let (mut session, mut trainer) = self::trainer(2, true);
    let straight = (0..4).map(|_| trainer.step(&mut session, 1e-2).unwrap()).last().unwrap();
    assert_eq!(after, straight);
}

#[test]
fn a_finite_loss_with_an_infinite_gradient_is_caught_too() {
    let mut g = Graph::new();
    let w = g.parameter("w", TensorType::f32([2])).unwrap();
    let root = g.sqrt(w).unwrap();
    let loss = g.sum_all(root).unwrap();
    // A state that the graph itself updates.
    let count = g.state("count", TensorType::f32([])).unwrap();
    let next = g.add_scalar(count, 1.0).unwrap();
    g.update(count, next).unwrap();
    let mut session = engine(1).session();
    let mut trainer = Trainer::new(&mut session, g, loss, &Optimizer::default()).unwrap();
    session.write("w", &[4f32, 1.0]).unwrap();
    trainer.step(&mut session, 0.0).unwrap();
    assert_eq!(session.read::<f32>("count").unwrap(), [1.0]);
    session.write("w", &[0f32, 1.0]).unwrap();
    let before = everything(&session);
    let refused = trainer.step(&mut session, 1e-2).unwrap_err();
    assert!(
        matches!(&refused, Error::NonFinite { loss, found: Some(f), .. } if *loss == 1.0 && f.scope.starts_with("backward")),
        "{refused}"
    );
    assert_eq!(everything(&session), before);
}

#[test]
fn training_ends_when_asked_and_resumes_where_told() {
    let (mut session, mut trainer) = trainer(1, false);
    let mut seen = Vec::new();
    let rate = |step: u64| 1e-2 / step as f32;
    trainer
        .train(
            &mut session,
            10,
            |step, _| Ok(rate(step)),
            |report, program, session| {
                assert_eq!(program.scalar("loss").unwrap(), report.loss);
                assert!(session.ty("head").is_some());
                seen.push(report.step);
                report.step < 4
            },
        )
        .unwrap();
    assert_eq!(seen, [1, 2, 3, 4]);
    // The bias correction depends on the step, so a trainer that starts again must be told where.
    let state = everything(&session);
    let (s, loss) = eight_tokens(false);
    let next = |resumed: u64| {
        let mut session = engine(1).session();
        let optimizer = Optimizer { weight_decay: 0.0, ..Optimizer::default() };
        let mut trainer = Trainer::new(&mut session, s.graph.clone(), loss, &optimizer).unwrap();
        state.iter().for_each(|(name, bytes)| session.write_bytes(name, bytes).unwrap());
        trainer.program().feed("x", &floats(&s, "x")).unwrap();
        trainer.resume_at(resumed);
        trainer.step(&mut session, 1e-2).unwrap();
        everything(&session)
    };
    trainer.step(&mut session, 1e-2).unwrap();
    assert_eq!(next(4), everything(&session));
    assert_ne!(next(0), everything(&session));
}

#[test]
fn a_step_that_a_kernel_ends_is_told_and_nothing_goes_on_from_what_it_left() {
    for device in device::devices() {
        let mut session = Engine::with_backend(device.backend.clone()).session();
        let mut g = Graph::new();
        let ids = g.feed("ids", TensorType::i32([2])).unwrap();
        let table = g.parameter("table", TensorType::f32([3, 4])).unwrap();
        let rows = g.embedding(table, ids).unwrap();
        let squares = g.mul(rows, rows).unwrap();
        let loss = g.sum_all(squares).unwrap();
        let mut trainer = Trainer::new(&mut session, g, loss, &Optimizer::default()).unwrap();
        session.write("table", &[1f32; 12]).unwrap();
        trainer.program().feed("ids", &[0i32, 2]).unwrap();
        trainer.step(&mut session, 0.1).unwrap();
        let saved = session.read::<f32>("table").unwrap();

        trainer.program().feed("ids", &[0i32, 7]).unwrap();
        let torn = trainer.step(&mut session, 0.1).unwrap_err();
        let text = torn.to_string();
        assert!(matches!(torn, Error::Torn { step: 2, .. }), "{}: {text}", device.name);
        assert!(text.contains("embedding") && text.contains('7') && text.contains("may be partly"), "{text}");
        // Another batch does not help.
        trainer.program().feed("ids", &[0i32, 2]).unwrap();
        for _ in 0..2 {
            assert!(matches!(trainer.step(&mut session, 0.1), Err(Error::StillTorn { step: 2 })));
        }
        session.write("table", &saved).unwrap();
        trainer.resume_at(1);
        assert_eq!(trainer.step(&mut session, 0.1).unwrap().step, 2);
    }
}
