//! Products on cooperative matrices, run by the interpreter, against plain loops in f64; and the rule which products they are.

use half::{bf16, f16};
use moebius_ir::ops::UnaryFn;
use moebius_ir::{DType, Fences, Graph, TensorType, Value, passes};

use super::interpreter;
use super::launch::{Action, At, Kernel, Number};
use super::limits::Limits;
use super::{Beside, launches, planned, spirv};

/// A card of which there is none here.
const CARD: Limits = Limits {
    halves: true,
    shared: 48 << 10,
    range: 1 << 32,
    subgroup: 32,
    matrices_bf16: true,
    matrices_f16: true,
    ..Limits::LEAST
};
/// The same without cooperative matrices.
const PLAIN: Limits = Limits { matrices_bf16: false, matrices_f16: false, ..CARD };

/// Numbers around 0 that the dtype has exactly.
pub(super) fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 5 + i * i % 11) % 17) as f32 / 8.0 - 1.0).collect()
}

pub(super) fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I32 | DType::U32 | DType::Bool => values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect(),
    }
}

pub(super) fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let two = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match dtype {
        DType::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_bits(two(b)).to_f32()).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_bits(two(b)).to_f32()).collect(),
        DType::F32 | DType::I32 | DType::U32 | DType::Bool => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
    }
}

/// The kernels of a graph of one product: one, or two if the sums are cut into parts.
fn kernels(graph: &Graph, limits: Limits) -> Vec<Kernel> {
    let plan = planned(passes::optimise(graph).unwrap(), limits, Fences::Off).unwrap();
    let actions =
        launches(plan.graph(), |id| Beside::of(&plan, id), limits).unwrap().into_iter().flat_map(|l| l.actions);
    actions.filter_map(|a| if let Action::Kernel(k) = a { Some(k) } else { None }).collect()
}

/// The first of them, which multiplies.
fn kernel(graph: &Graph, limits: Limits) -> Kernel {
    kernels(graph, limits).swap_remove(0)
}

/// A product with its feeds in the order of the operands.
struct Case {
    graph: Graph,
    feeds: Vec<(DType, Vec<f32>)>,
    out: DType,
    len: usize,
    /// Where the kernel leaves it.
    result: At,
}

impl Case {
    fn new(
        feeds: Vec<(TensorType, Vec<f32>)>,
        out: (DType, usize),
        build: impl Fn(&mut Graph, &[Value]) -> moebius_ir::Result<Value>,
    ) -> Case {
        let mut graph = Graph::new();
        let named = |(i, (ty, _)): (usize, &(TensorType, Vec<f32>))| graph.feed(format!("x{i}"), ty.clone()).unwrap();
        let values: Vec<Value> = feeds.iter().enumerate().map(named).collect();
        let y = build(&mut graph, &values).unwrap();
        graph.output("y", y).unwrap();
        let feeds = feeds.into_iter().map(|(ty, data)| (ty.dtype, data)).collect();
        Case { graph, feeds, out: out.0, len: out.1, result: At::Result(0) }
    }

    /// The result on such a device; of these workgroups only, if there are any.
    fn run(&self, limits: Limits, only: &[[u32; 3]], backwards: bool) -> Vec<f32> {
        let kernels = kernels(&self.graph, limits);
        assert!(kernels.len() <= 2 && (only.is_empty() || kernels.len() == 1));
        // The result, and sums of parts.
        let mut made: Vec<(At, Vec<u8>)> = vec![(self.result, vec![0xff; self.len * self.out.bytes()])];
        for kernel in kernels {
            let words = spirv::compile(&kernel.source.text, kernel.source.cooperative, true).unwrap();
            let mut buffers: Vec<Vec<u8>> = kernel
                .buffers
                .iter()
                .map(|at| match *at {
                    At::Operand(i) => bytes(self.feeds[i].0, &self.feeds[i].1),
                    At::Scratch { bytes, .. } if !made.iter().any(|(m, _)| m == at) => vec![0xff; bytes],
                    At::Result(_) | At::Scratch { .. } => made.iter().find(|(m, _)| m == at).unwrap().1.clone(),
                    At::Fault | At::Arrivals | At::Null => panic!("{at:?}"),
                })
                .collect();
            let word = |number: &Number| match *number {
                Number::Word(word) => word.to_le_bytes(),
                Number::Step => [0; 4],
            };
            let numbers: Vec<u8> = kernel.numbers.iter().flat_map(word).collect();
            let all = kernel.groups.map(|n| n as u32);
            let every: Vec<[u32; 3]> =
                (0..all[2]).flat_map(|z| (0..all[1]).flat_map(move |y| (0..all[0]).map(move |x| [x, y, z]))).collect();
            let groups = if only.is_empty() { &every } else { only };
            interpreter::run(&words, &mut buffers, &numbers, groups, all, backwards).unwrap_or_else(|e| panic!("{e}"));
            for (at, bytes) in kernel.buffers.into_iter().zip(buffers) {
                if !matches!(at, At::Operand(_)) {
                    made.retain(|(m, _)| *m != at);
                    made.push((at, bytes));
                }
            }
        }
        floats(self.out, &made.iter().find(|(at, _)| *at == self.result).unwrap().1)
    }

    /// On cooperative matrices, whatever lane is first, and by the plain kernel, the result is this one.
    fn check(&self, wanted: &[f64]) {
        assert!(kernel(&self.graph, CARD).source.cooperative.is_some() && wanted.len() == self.len);
        assert!(kernel(&self.graph, PLAIN).source.cooperative.is_none());
        let results = [self.run(CARD, &[], false), self.run(CARD, &[], true), self.run(PLAIN, &[], false)];
        for (name, result) in ["forwards", "backwards", "plain"].iter().zip(&results) {
            for (i, (&found, &wanted)) in result.iter().zip(wanted).enumerate() {
                assert!(self.near(found, wanted), "{name}: element {i} is {found}, wanted {wanted}");
            }
        }
    }

    fn near(&self, found: f32, wanted: f64) -> bool {
        let digits = match self.out {
            DType::Bf16 => 8e-3,
            DType::F16 => 1e-3,
            DType::F32 | DType::I32 | DType::U32 | DType::Bool => 1e-6,
        };
        (f64::from(found) - wanted).abs() <= digits * wanted.abs().max(1.0)
    }
}

fn typed(dtype: DType, shape: &[usize], data: Vec<f32>) -> (TensorType, Vec<f32>) {
    assert_eq!(data.len(), shape.iter().product::<usize>());
    (TensorType::new(dtype, shape.to_vec()), data)
}

/// Products of m rows, n columns and sums of k, none a multiple of a tile, of every way to lie in memory.
#[test]
fn products_are_right_wherever_the_factors_lie() {
    let (m, n, k) = (72, 88, 40);
    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
    let bias = numbers(n, 3);
    for (dtype, ta, tb) in
        [(DType::Bf16, false, false), (DType::F16, false, true), (DType::Bf16, true, false), (DType::Bf16, true, true)]
    {
        let shape = |rows: usize, columns: usize, turned| if turned { [columns, rows] } else { [rows, columns] };
        let feeds = vec![
            typed(dtype, &shape(m, k, ta), a.clone()),
            typed(dtype, &shape(k, n, tb), b.clone()),
            typed(dtype, &[n], bias.clone()),
        ];
        let case = Case::new(feeds, (dtype, m * n), |g, x| g.matmul_with(x[0], x[1], Some(x[2]), ta, tb));
        let of_a = |i: usize, l: usize| f64::from(if ta { a[l * m + i] } else { a[i * k + l] });
        let of_b = |l: usize, j: usize| f64::from(if tb { b[j * k + l] } else { b[l * n + j] });
        let element = |at: usize| {
            let (i, j) = (at / n, at % n);
            (0..k).map(|l| of_a(i, l) * of_b(l, j)).sum::<f64>() + f64::from(bias[j])
        };
        case.check(&(0..m * n).map(element).collect::<Vec<_>>());
    }
}

/// A chain that is joined onto the product, which nothing else reads; eight elements leave at a time, or one.
#[test]
fn chains_behind_products_are_right() {
    for (dtype, m, n, k) in [(DType::Bf16, 72, 88, 40), (DType::F16, 40, 48, 64)] {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let feeds = vec![typed(dtype, &[m, k], a.clone()), typed(dtype, &[k, n], b.clone())];
        let case = Case::new(feeds, (dtype, m * n), |g, x| {
            let y = g.matmul(x[0], x[1])?;
            g.unary(UnaryFn::GeluTanh, y)
        });
        // The chain's results follow the product's.
        let case = Case { result: At::Result(1), ..case };
        assert!(kernel(&case.graph, CARD).buffers.iter().all(|at| *at != At::Result(0)), "the product is stored");
        let element = |at: usize| {
            let (i, j) = (at / n, at % n);
            let x = (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j])).sum::<f64>();
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh())
        };
        case.check(&(0..m * n).map(element).collect::<Vec<_>>());
    }
}

/// The large tiles, that of a b which lies along k too: the last one of a batch of many.
#[test]
fn large_tiles_are_right() {
    // The sums end within a block of either.
    let (batch, side, k) = (96, 128, 80);
    let (a, b) = (numbers(batch * side * k, 1), numbers(batch * k * side, 2));
    for transpose in [false, true] {
        let of_b = if transpose { [batch, side, k] } else { [batch, k, side] };
        let feeds = vec![typed(DType::Bf16, &[batch, side, k], a.clone()), typed(DType::Bf16, &of_b, b.clone())];
        let case = Case::new(feeds, (DType::Bf16, batch * side * side), |g, x| {
            g.matmul_with(x[0], x[1], None, false, transpose)
        });
        let of = kernel(&case.graph, CARD);
        assert_eq!((of.groups, of.source.cooperative), ([1, 1, batch], Some(DType::Bf16)));
        // Only the one for a b along k has more than four subgroups.
        assert_eq!(of.source.text.contains("@workgroup_size(256)"), transpose);
        let result = case.run(CARD, &[[0, 0, 95]], false);
        let (of_a, of_b, of_c) = (95 * side * k, 95 * k * side, 95 * side * side);
        for at in 0..side * side {
            let (i, j) = (at / side, at % side);
            let b_at = |l: usize| of_b + if transpose { j * k + l } else { l * side + j };
            let wanted = (0..k).map(|l| f64::from(a[of_a + i * k + l]) * f64::from(b[b_at(l)])).sum();
            assert!(case.near(result[of_c + at], wanted), "{i}, {j}: {} for {wanted}", result[of_c + at]);
        }
    }
}

/// Few tiles and long sums, of which two workgroups have a part each; the last part ends within a block.
#[test]
fn sums_in_parts_are_right() {
    let (m, n, k) = (40, 48, 1096);
    let (a, b, bias) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3));
    for transpose in [false, true] {
        let shape = if transpose { [n, k] } else { [k, n] };
        let feeds = vec![
            typed(DType::Bf16, &[m, k], a.clone()),
            typed(DType::Bf16, &shape, b.clone()),
            typed(DType::Bf16, &[n], bias.clone()),
        ];
        let case =
            Case::new(feeds, (DType::Bf16, m * n), |g, x| g.matmul_with(x[0], x[1], Some(x[2]), false, transpose));
        assert_eq!((kernels(&case.graph, CARD).len(), kernel(&case.graph, CARD).groups), (2, [1, 1, 2]));
        let element = |at: usize| {
            let (i, j) = (at / n, at % n);
            let of_b = |l: usize| f64::from(if transpose { b[j * k + l] } else { b[l * n + j] });
            (0..k).map(|l| f64::from(a[i * k + l]) * of_b(l)).sum::<f64>() + f64::from(bias[j])
        };
        case.check(&(0..m * n).map(element).collect::<Vec<_>>());
    }
}

/// Segments that begin anywhere, one of them empty, and slots that no expert has.
const OFFSETS: [usize; 5] = [0, 37, 37, 40, 105];
const SLOTS: usize = 112;

fn offsets() -> (TensorType, Vec<f32>) {
    typed(DType::I32, &[OFFSETS.len()], OFFSETS.map(|o| o as f32).to_vec())
}

#[test]
fn rows_of_experts_are_right() {
    let (n, k, experts) = (48, 32, OFFSETS.len() - 1);
    let (rows, w, bias) = (numbers(SLOTS * k, 1), numbers(experts * k * n, 2), numbers(experts * n, 3));
    for transpose in [false, true] {
        let shape = if transpose { [experts, n, k] } else { [experts, k, n] };
        let feeds = vec![
            typed(DType::Bf16, &[SLOTS, k], rows.clone()),
            typed(DType::Bf16, &shape, w.clone()),
            offsets(),
            typed(DType::Bf16, &[experts, n], bias.clone()),
        ];
        let case =
            Case::new(feeds, (DType::Bf16, SLOTS * n), |g, x| g.expert_matmul(x[0], x[1], x[2], Some(x[3]), transpose));
        let element = |at: usize| {
            let (slot, j) = (at / n, at % n);
            let Some(e) = (0..experts).find(|&e| (OFFSETS[e]..OFFSETS[e + 1]).contains(&slot)) else { return 0.0 };
            let of_w = |l: usize| f64::from(w[e * k * n + if transpose { j * k + l } else { l * n + j }]);
            (0..k).map(|l| f64::from(rows[slot * k + l]) * of_w(l)).sum::<f64>() + f64::from(bias[e * n + j])
        };
        case.check(&(0..SLOTS * n).map(element).collect::<Vec<_>>());
    }
}

#[test]
fn gradients_of_weights_are_right() {
    let (m, n, experts) = (40, 72, OFFSETS.len() - 1);
    // On average a segment must be long enough.
    let slots = 128;
    let (a, b) = (numbers(slots * m, 1), numbers(slots * n, 2));
    let feeds = vec![typed(DType::F16, &[slots, m], a.clone()), typed(DType::F16, &[slots, n], b.clone()), offsets()];
    let case = Case::new(feeds, (DType::F16, experts * m * n), |g, x| g.expert_matmul_wgrad(x[0], x[1], x[2]));
    let element = |at: usize| {
        let (e, i, j) = (at / (m * n), at / n % m, at % n);
        (OFFSETS[e]..OFFSETS[e + 1]).map(|s| f64::from(a[s * m + i]) * f64::from(b[s * n + j])).sum()
    };
    case.check(&(0..experts * m * n).map(element).collect::<Vec<_>>());
}

/// What the rule leaves to the plain kernels: other dtypes, rows that begin between parts, few rows, devices without.
#[test]
fn other_products_stay_plain() {
    let chosen = |dtype: DType, m: usize, n: usize, k: usize, limits: Limits| {
        let feeds = vec![typed(dtype, &[m, k], numbers(m * k, 1)), typed(dtype, &[k, n], numbers(k * n, 2))];
        let case = Case::new(feeds, (dtype, m * n), |g, x| g.matmul(x[0], x[1]));
        kernel(&case.graph, limits).source.cooperative
    };
    assert_eq!(chosen(DType::Bf16, 64, 64, 64, CARD), Some(DType::Bf16));
    assert_eq!(chosen(DType::F16, 64, 64, 64, CARD), Some(DType::F16));
    assert_eq!(chosen(DType::F16, 64, 64, 64, Limits { matrices_f16: false, ..CARD }), None);
    assert_eq!(chosen(DType::Bf16, 64, 64, 64, PLAIN), None);
    assert_eq!(chosen(DType::F32, 64, 64, 64, CARD), None);
    for (m, n, k) in [(64, 68, 64), (64, 64, 68), (4, 64, 64), (64, 16, 64), (64, 64, 16)] {
        assert_eq!(chosen(DType::Bf16, m, n, k, CARD), None, "{m} {n} {k}");
    }
}
