//! Every op case on every backend against the reference, values and gradients; and what must hold for the bits.

use std::collections::BTreeSet;

use moebius_ir::ops::{Balance, Order, RouteInputs, Router, Score};
use moebius_ir::{DType, Graph, Op, Tensor, TensorType, Value, passes};
use moebius_tests::Sketch;
use moebius_tests::cases::{self, Case};
use moebius_tests::conformance;
use moebius_tests::device::{self, Device, Live, devices};
use moebius_tests::tolerance::{Class, difference, tolerance};

/// Runs `check` on each case and dtype of a group and reports all failures together.
fn each(group: &str, check: impl Fn(&Case, DType, &[Device]) -> Result<(), String>) {
    let (mut failures, devices) = (Vec::new(), devices());
    for case in cases::group(group).unwrap() {
        for &dtype in case.dtypes {
            if let Err(why) = check(&case, dtype, &devices) {
                failures.push(format!("{}: {why}", case.title(dtype)));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

macro_rules! groups {
    ($($group:ident),*) => {
        mod values {
            $(#[test] fn $group() { super::each(stringify!($group), super::conformance::forward); })*
        }
        mod gradients {
            $(#[test] fn $group() { super::each(stringify!($group), super::conformance::backward); })*
        }
        const TESTED: &[&str] = &[$(stringify!($group)),*];
    };
}

groups! { elementwise, movement, norms, dense, chains, distillation, router, sparse, optimizer }

/// What a kernel rejects is an error of the run, or of reading after it, and is forgotten with that.
#[test]
fn values_that_kernels_reject_are_errors_on_every_device() {
    for device in devices() {
        let mut s = Sketch::new(DType::F32);
        let (table, x) = (s.float([3, 2], |x| x), s.float([2, 4], |x| x));
        let w = s.float([5, 4], |x| x);
        let (ids, targets) = (s.ints([2], &[0, 1]), s.ints([2], &[4, 0]));
        let (ids_name, targets_name, kept_name) = ("x3", "x4", "x5");
        let rows = s.graph.embedding(table.unwrap(), ids.unwrap()).unwrap();
        let (student, targets) = ([x.unwrap(), w.unwrap()], targets.unwrap());
        let loss = s.graph.linear_cross_entropy(student[0], student[1], targets).unwrap();
        let kept = [s.ints([2, 1], &[4, 0]), s.float([2, 1], |_| -1.0), s.float([2], |_| -1.0)].map(Result::unwrap);
        let [_, kd] = s.graph.linear_distillation_cached(student, targets, kept, 1.0).unwrap();
        s.aux(rows).unwrap();
        s.aux(loss).unwrap();
        s.aux(kd).unwrap();
        let mut live = Live::new(device.backend.as_ref(), &s.graph).unwrap();
        let right = live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name));
        for (name, op, value) in [
            (ids_name, "embedding", 3),
            (ids_name, "embedding", -1),
            (targets_name, "linear_cross_entropy", 5),
            (kept_name, "linear_distillation_cached", 5),
            (kept_name, "linear_distillation_cached", -1),
        ] {
            let mut inputs = s.inputs.clone();
            let shape = inputs[name].ty.shape.clone();
            inputs.insert(name.into(), Tensor::i32(shape, &[0, value]));
            match live.run(&inputs) {
                Err(moebius_backends::Error::Kernel { op: at, found, .. }) => {
                    assert!(at == op && found.contains(&value.to_string()), "{}: {at}: {found}", device.name);
                }
                Err(other) => panic!("{}: {other}", device.name),
                Ok(_) => panic!("{}: {op} takes {value}", device.name),
            }
            let again = live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name));
            assert!(device::same_bits(&right, &again), "{}: after {op} rejected {value}", device.name);
        }
    }
}

/// A product of m rows and n columns, before what else a graph has.
type Product<'a> = &'a dyn Fn(&mut Sketch) -> moebius_ir::Result<Value>;

/// Numbers of every size of significand, which no sum gives exactly.
fn uneven(n: usize, at: usize) -> Vec<f64> {
    (0..n).map(|i| ((7 * i + at) % 19) as f64 / 7.0 - 1.0).collect()
}

/// Runs a chain behind a product of m rows and n columns, and the same chain on that product as it is stored, on each device, and compares
/// the bits: a chain that reads nothing else, and one that does. Where `joined`, a GPU must do the first in one step, and the second where
/// rows are few (large tiles have no time for what it reads).
fn same_bits_by_itself(what: &str, dtype: DType, [m, n]: [usize; 2], joined: bool, product: Product<'_>) {
    let own = || TensorType::new(dtype, [m, n]);
    for (device, reads) in devices().iter().flat_map(|device| [(device, false), (device, true)]) {
        let joined = joined && (!reads || m <= 8);
        let chain = |s: &mut Sketch, y| {
            let mut y = s.graph.silu(y)?;
            if reads {
                let r = s.fixed(own(), uneven(m * n, 5))?;
                y = s.graph.add(y, r)?;
            }
            s.aux(y)
        };
        let run = |s: &Sketch| {
            let mut live = Live::new(device.backend.as_ref(), &s.graph).unwrap();
            live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name)).remove("y0").unwrap()
        };
        let [mut both, mut first, mut second] = [(); 3].map(|()| Sketch::new(dtype));
        let y = product(&mut both).unwrap();
        chain(&mut both, y).unwrap();
        if joined && device.backend.name() != "cpu" {
            let plan = device.backend.plan(passes::optimise(&both.graph).unwrap()).unwrap();
            let any = plan.graph().nodes_with_ids().any(|(id, _)| plan.joined(id).is_some());
            assert!(any, "{}: {what}, {dtype}: the chain has a step of its own", device.name);
        }
        let y = product(&mut first).unwrap();
        first.aux(y).unwrap();
        let y = second.fixed(own(), run(&first).data).unwrap();
        chain(&mut second, y).unwrap();
        let (one, two) = (run(&both).to_bytes(), run(&second).to_bytes());
        assert!(one == two, "{}: {what}, {dtype}", device.name);
    }
}

/// Where a chain is computed, in the kernel of the product before it or in one of its own, does not show in the bits.
#[test]
fn a_chain_behind_a_product_has_the_bits_of_the_chain_by_itself() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for (m, k, n) in [(1, 1040, 136), (40, 72, 264), (70, 264, 2)] {
            // Of f32 only those of few rows or columns are.
            let joined = dtype != DType::F32 || m != 40;
            same_bits_by_itself(&format!("{m}x{k}x{n}"), dtype, [m, n], joined, &|s| {
                let x = s.fixed(TensorType::new(dtype, [m, k]), uneven(m * k, 3))?;
                let w = s.fixed(TensorType::new(dtype, [k, n]), uneven(k * n, 11))?;
                s.graph.matmul(x, w)
            });
        }
    }
}

/// The same behind products of experts: one that has most of the slots, two that have none, and slots that no expert has.
#[test]
fn a_chain_behind_products_of_experts_has_the_bits_of_the_chain_by_itself() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        // Few slots with a k that is cut up and with one that is not, and tiles, the last ones large.
        for (m, k, n, transposed) in [
            (2, 1040, 136, false),
            (13, 264, 40, true),
            (83, 72, 136, false),
            (150, 24, 72, true),
            (520, 16, 1416, false),
        ] {
            let (most, after) = (5 * m / 6, 5 * m / 6 + m / 9);
            let segments = [0, 0, most, most, after].map(|slot| slot as i32);
            same_bits_by_itself(&format!("{m} slots, {k}x{n}"), dtype, [m, n], true, &|s| {
                let rows = s.fixed(TensorType::new(dtype, [m, k]), uneven(m * k, 3))?;
                let shape = [4, if transposed { n } else { k }, if transposed { k } else { n }];
                let w = s.fixed(TensorType::new(dtype, shape), uneven(4 * k * n, 11))?;
                let offsets = s.ints([5], &segments)?;
                let bias =
                    if transposed { Some(s.fixed(TensorType::new(dtype, [4, n]), uneven(4 * n, 2))?) } else { None };
                s.graph.expert_matmul(rows, w, offsets, bias, transposed)
            });
        }
    }
}

/// Tokens, choices of each, experts, and the most that an expert takes.
type Choices = [usize; 4];

/// Where rows of experts are combined, in the kernel of the product that makes them or in one of its own, does not show in the bits: of one
/// slot and several, with choices that are dropped, slots that no choice has, a side that the same kernel makes or that is there before,
/// and a chain behind them.
#[test]
fn a_combine_behind_products_of_experts_has_the_bits_of_the_combine_by_itself() {
    let choices: [Choices; 5] = [[1, 1, 3, 1], [2, 1, 1, 1], [3, 2, 4, 1], [4, 2, 2, 8], [8, 1, 5, 2]];
    for (device, dtype) in devices().iter().flat_map(|d| [DType::F32, DType::Bf16, DType::F16].map(|dtype| (d, dtype)))
    {
        for (at, [tokens, k, experts, capacity]) in choices.into_iter().enumerate() {
            // Sides: none, one that is there before, the twin's. A k that is cut up may have to be added up by a kernel of its own.
            for (side, (width, d, transposed)) in
                [(at % 3, (72, 136, false)), ((at + 1) % 3, (264, 40, true)), (2, (1040, 136, false))]
            {
                let float = |s: &mut Sketch, shape: &[usize], by: usize| {
                    let ty = TensorType::new(dtype, shape.to_vec());
                    let data = uneven(ty.elements(), by);
                    s.fixed(ty, data)
                };
                let shape = |of: &[usize]| [of, &if transposed { [d, width] } else { [width, d] }].concat();
                let assigned = |s: &mut Sketch| {
                    let ids: Vec<i32> = (0..tokens * k).map(|i| ((i * i + i / k) % experts) as i32).collect();
                    let index = s.ints([tokens, k], &ids)?;
                    s.graph.assign(index, None, experts, Some(capacity), Order::ChoiceMajor)
                };
                let products = |s: &mut Sketch, [slot_choice, choice_slot, offsets, _]: [Value; 4]| {
                    let slots = s.graph.shape(slot_choice)[0];
                    // The kernel may also find the rows of slots itself.
                    let rows = if at % 2 == 0 {
                        let x = float(s, &[tokens, width], 2)?;
                        s.graph.dispatch(x, slot_choice, choice_slot, None)?
                    } else {
                        float(s, &[slots, width], 3)?
                    };
                    let w = float(s, &shape(&[experts]), 11)?;
                    let rows = s.graph.expert_matmul(rows, w, offsets, None, transposed)?;
                    if side < 2 {
                        return Ok((rows, None));
                    }
                    let (x, w) = (float(s, &[tokens, width], 4)?, float(s, &shape(&[]), 12)?);
                    Ok((rows, Some(s.graph.matmul_with(x, w, None, false, transposed)?)))
                };
                // Coefficients: none, as they are, and as the softmax of others, which is there before the products.
                let weights = |s: &mut Sketch| {
                    if side == 0 || at % 2 != 0 {
                        return Ok(None);
                    }
                    let weights = s.fixed(TensorType::f32([tokens, 2]), uneven(2 * tokens, 8))?;
                    (if at % 4 == 0 { s.graph.softmax(weights) } else { Ok(weights) }).map(Some)
                };
                let combined = |s: &mut Sketch, [slot_choice, choice_slot, ..]: [Value; 4], weights, (rows, made)| {
                    let gate = s.fixed(TensorType::f32([tokens, k]), uneven(tokens * k, 6))?;
                    let made = if side == 1 { Some(float(s, &[tokens, d], 7)?) } else { made };
                    let gate = Some(gate).filter(|_| at != 3);
                    let mut y = s.graph.combine_with(rows, slot_choice, choice_slot, gate, made, weights)?;
                    if at != 1 {
                        let residual = float(s, &[tokens, d], 9)?;
                        y = s.graph.add(residual, y)?;
                    }
                    s.aux(y)
                };
                let run = |s: &Sketch| {
                    let mut live = Live::new(device.backend.as_ref(), &s.graph).unwrap();
                    // The first run puts kernels on the stream, later ones replay it: what blocks count begins at 0 in each.
                    let [first, _, third] =
                        [(); 3].map(|()| live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name)));
                    assert!(device::same_bits(&first, &third), "{}: runs of the same graph", device.name);
                    first
                };
                let what =
                    format!("{}: {tokens} {k} {experts} {capacity}, side {side}, {width}x{d}, {dtype}", device.name);
                let [mut both, mut first, mut second] = [(); 3].map(|()| Sketch::new(dtype));
                let index = assigned(&mut both).unwrap();
                let given = weights(&mut both).unwrap();
                let made: moebius_ir::Result<_> = products(&mut both, index);
                let made = made.unwrap();
                let slots = both.graph.shape(made.0)[0];
                // A block has no place for more rows of a twin than of the experts.
                let few = slots <= 8 && (side < 2 || tokens <= slots.next_power_of_two());
                combined(&mut both, index, given, made).unwrap();
                // A side of the same kernel is there too late for Vulkan's, which have tokens of one choice.
                let does = match device.backend.name() {
                    "cuda" => width < 1000,
                    "vulkan" => k == 1 && side < 2,
                    _cpu => false,
                };
                if few && does {
                    let plan = device.backend.plan(passes::optimise(&both.graph).unwrap()).unwrap();
                    let mut nodes = plan.graph().nodes_with_ids();
                    let joined = nodes.any(|(id, n)| matches!(n.op, Op::Combine(_)) && plan.joined_onto(id).is_some());
                    assert!(joined, "{what}: the combine has a step of its own");
                }
                let slots = assigned(&mut first).unwrap();
                let (rows, made) = products(&mut first, slots).unwrap();
                [Some(rows), made].into_iter().flatten().try_for_each(|v| first.aux(v)).unwrap();
                let outputs = run(&first);
                let (slots, given) = (assigned(&mut second).unwrap(), weights(&mut second).unwrap());
                let mut stored =
                    |name: &str| outputs.get(name).map(|t| second.fixed(t.ty.clone(), t.data.clone()).unwrap());
                let made = (stored("y0").unwrap(), stored("y1"));
                combined(&mut second, slots, given, made).unwrap();
                assert!(device::same_bits(&run(&both), &run(&second)), "{what}");
            }
        }
    }
}

/// Where tokens are routed and given slots, behind the product of their logits, in that of their rows or in kernels of its own, does not show in
/// the bits: of one token and several, with one choice and more, by softmax and by other scores, with logits that are equal.
#[test]
fn a_route_between_products_has_the_bits_of_the_route_by_itself() {
    let cases: [(usize, usize, usize, Score); 5] = [
        (1, 5, 1, Score::Softmax),
        (1, 40, 1, Score::Sigmoid),
        (1, 64, 2, Score::Softmax),
        (3, 33, 1, Score::Softmax),
        (8, 4, 2, Score::SqrtSoftplus),
    ];
    for (device, dtype) in devices().iter().flat_map(|d| [DType::F32, DType::Bf16].map(|dtype| (d, dtype))) {
        for (tokens, experts, k, score) in cases {
            let (width, d) = (136, 72);
            let float = |s: &mut Sketch, dtype, shape: &[usize], by: usize| {
                let ty = TensorType::new(dtype, shape.to_vec());
                let data = uneven(ty.elements(), by);
                s.fixed(ty, data)
            };
            let logits = |s: &mut Sketch| {
                // Every other expert has the weights of the one before.
                let x = float(s, DType::F32, &[tokens, width], 3)?;
                let half = uneven(experts.div_ceil(2) * width, 7);
                let twice: Vec<f64> = half.chunks(width).flat_map(|row| [row, row].concat()).collect();
                let router = s.fixed(TensorType::f32([experts, width]), twice[..experts * width].to_vec())?;
                s.graph.matmul_with(x, router, None, false, true)
            };
            let rest = |s: &mut Sketch, logits: Value| {
                let router = Router { score, ..Router::softmax(k, Balance::AllChoices) };
                let [gate, index, ..] = s.graph.route_with(logits, &router, RouteInputs::default())?;
                let [slot_choice, choice_slot, offsets, dropped] =
                    s.graph.assign(index, None, experts, None, Order::TokenMajor)?;
                let x = float(s, dtype, &[tokens, width], 4)?;
                let w = float(s, dtype, &[experts, width, d], 11)?;
                let rows = s.graph.dispatch(x, slot_choice, choice_slot, None)?;
                let rows = s.graph.expert_matmul(rows, w, offsets, None, false)?;
                [gate, index, slot_choice, choice_slot, offsets, dropped, rows].into_iter().try_for_each(|v| s.aux(v))
            };
            let run = |s: &Sketch| {
                let mut live = Live::new(device.backend.as_ref(), &s.graph).unwrap();
                // Workgroups that count themselves begin at 0 in each run.
                let [first, second] =
                    [(); 2].map(|()| live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name)));
                assert!(device::same_bits(&first, &second), "{}: runs of the same graph", device.name);
                first
            };
            let what = format!("{}: {tokens} tokens, {experts} experts, {k}, {score:?}, {dtype}", device.name);
            let [mut both, mut first, mut second] = [(); 3].map(|()| Sketch::new(dtype));
            let made = logits(&mut both).unwrap();
            rest(&mut both, made).unwrap();
            if device.backend.name() != "cpu" {
                let plan = device.backend.plan(passes::optimise(&both.graph).unwrap()).unwrap();
                let mut nodes = plan.graph().nodes_with_ids();
                let (assign, _) = nodes.find(|(_, n)| matches!(n.op, Op::Assign(_))).unwrap();
                // By the product behind the assign, or on Vulkan by the one before the route.
                let route = plan.joined_onto(assign).expect("the assign has a step of its own");
                let with = if tokens == 1 && k == 1 { plan.joined(assign) } else { plan.joined_onto(route) };
                let alone = device.backend.name() == "cuda" && (tokens, k) != (1, 1);
                assert_eq!(with.is_none(), alone, "{what}: whether the route has a step of its own");
            }
            let made = logits(&mut first).unwrap();
            first.aux(made).unwrap();
            let made = run(&first).remove("y0").unwrap();
            let made = second.fixed(TensorType::f32([tokens, experts]), made.data).unwrap();
            rest(&mut second, made).unwrap();
            assert!(device::same_bits(&run(&both), &run(&second)), "{what}");
        }
    }
}

/// Where a norm is computed, in the kernel of the product behind it or in one of its own, does not show in the bits.
#[test]
fn a_norm_before_a_product_has_the_bits_of_the_norm_by_itself() {
    for (device, dtype) in devices().iter().flat_map(|d| [DType::F32, DType::Bf16, DType::F16].map(|dtype| (d, dtype)))
    {
        for (m, k, n, layer_norm) in [(1, 1024, 136, true), (1, 264, 40, false), (5, 40, 72, false), (8, 136, 40, true)]
        {
            let x = |s: &mut Sketch| s.fixed(TensorType::new(dtype, [m, k]), uneven(m * k, 3));
            let norm = |s: &mut Sketch| {
                let x = x(s)?;
                let gamma = s.fixed(TensorType::f32([k]), uneven(k, 7))?;
                let beta = s.fixed(TensorType::f32([k]), uneven(k, 13))?;
                if layer_norm { s.graph.layer_norm(x, gamma, beta, 1e-5) } else { s.graph.rms_norm(x, gamma, 1e-5) }
            };
            let product = |s: &mut Sketch, y| {
                let w = s.fixed(TensorType::new(dtype, [k, n]), uneven(k * n, 11))?;
                let y = s.graph.matmul(y, w)?;
                s.aux(y)
            };
            let run = |s: &Sketch| {
                let mut live = Live::new(device.backend.as_ref(), &s.graph).unwrap();
                live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name)).remove("y0").unwrap()
            };
            let [mut both, mut first, mut second] = [(); 3].map(|()| Sketch::new(dtype));
            let y = norm(&mut both).unwrap();
            product(&mut both, y).unwrap();
            let what = format!("{}: {m}x{k}x{n}, {dtype}", device.name);
            if device.backend.name() != "cpu" {
                let plan = device.backend.plan(passes::optimise(&both.graph).unwrap()).unwrap();
                let any = plan.graph().nodes_with_ids().any(|(id, _)| plan.joined(id).is_some());
                assert!(any, "{what}: the norm has a step of its own");
            }
            let y = norm(&mut first).unwrap();
            first.aux(y).unwrap();
            let y = second.fixed(TensorType::new(dtype, [m, k]), run(&first).data).unwrap();
            product(&mut second, y).unwrap();
            assert!(run(&both).to_bytes() == run(&second).to_bytes(), "{what}");
        }
    }
}

/// Runs that are asked for together are as many runs, one after another, each with what the one before left; the feed is that of the time.
#[test]
fn runs_that_are_asked_for_together_follow_one_another() {
    for device in devices() {
        let mut graph = Graph::new();
        let (x, step) =
            (graph.state("x", TensorType::f32([5])).unwrap(), graph.feed("step", TensorType::f32([5])).unwrap());
        let next = graph.add(x, step).unwrap();
        graph.update(x, next).unwrap();
        graph.output("y", next).unwrap();
        let mut live = Live::new(device.backend.as_ref(), &graph).unwrap();
        let (instance, store) = live.instance();
        let mut wanted = 0.0f32;
        for (step, times) in [(1.0f32, 1), (0.5, 0), (2.0, 3), (0.25, 131), (4.0, 64), (1.0, 7)] {
            instance.write("step", &[step.to_le_bytes(); 5].concat()).unwrap();
            instance.run_times(store, times).unwrap();
            wanted += step * times as f32;
            assert!(*store.bytes("x").unwrap() == [wanted.to_le_bytes(); 5].concat(), "{}: {times} runs", device.name);
        }
    }
}

#[test]
fn every_group_and_every_op_is_tested() {
    let groups = cases::groups();
    assert_eq!(groups.iter().map(|(name, _)| *name).collect::<Vec<_>>(), TESTED);
    let covered: BTreeSet<&str> = groups.iter().flat_map(|(_, cases)| cases.iter().map(|c| c.op)).collect();
    let all: BTreeSet<&str> = Op::NAMES.iter().copied().collect();
    assert_eq!(covered, all);
    // Each case does use its op: as it was built, or in the form the passes give it.
    for case in groups.iter().flat_map(|(_, cases)| cases) {
        let graph = case.sketch(case.dtypes[0]).unwrap().graph;
        let optimised = passes::optimise(&graph).unwrap_or_else(|e| panic!("{e}"));
        let uses = |g: &moebius_ir::Graph| g.nodes().iter().any(|n| n.op.name() == case.op);
        assert!(uses(&graph) || uses(&optimised), "{} does not use {}", case.name, case.op);
    }
}

#[test]
fn titles_tell_cases_apart() {
    let groups = cases::groups();
    let mut titles = BTreeSet::new();
    for case in groups.iter().flat_map(|(_, cases)| cases) {
        assert!(titles.insert(case.title(case.dtypes[0])), "{} twice", case.title(case.dtypes[0]));
    }
}

#[test]
fn a_comparison_notices_what_it_should() {
    let ramp = |f: &dyn Fn(f64) -> f64| Tensor::f32([50], (0..50).map(|i| f(f64::from(i) - 20.3)).collect());
    let wanted = ramp(&|x| x);
    for class in [Class::Element, Class::Sum, Class::Weighted, Class::Gradient] {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let tolerance = tolerance(class, dtype);
            assert_eq!(difference(&wanted, &wanted, tolerance), None);
            for wrong in [ramp(&|x| -x), ramp(&|x| x + 1.0), ramp(&|x| 1.1 * x), ramp(&|_| f64::NAN)] {
                assert!(difference(&wrong, &wanted, tolerance).is_some(), "{class:?} {dtype}");
            }
        }
    }
    let infinite = |v: f64| Tensor::f32([2], vec![1.0, v]);
    for wrong in [1e38, f64::NEG_INFINITY, f64::NAN] {
        for class in [Class::Exact, Class::Element, Class::Sum, Class::Weighted, Class::Gradient] {
            let tolerance = tolerance(class, DType::F32);
            assert!(difference(&infinite(wrong), &infinite(f64::INFINITY), tolerance).is_some(), "{class:?} {wrong}");
        }
    }
    let narrow = Tensor::f32([49], wanted.data[..49].to_vec());
    assert!(difference(&narrow, &wanted, tolerance(Class::Sum, DType::F32)).is_some());
}
