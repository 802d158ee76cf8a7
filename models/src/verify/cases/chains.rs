//! Elementwise chains right behind a matrix product, which a backend may compute together with it: what reads the product beside the
//! chain, what the chain reads beside the product, and both ways through the gradients.

use moebius_ir::ops::{BinaryFn, UnaryFn};
use moebius_ir::{Result, Value};

use super::sparse::{Routing, assigned};
use super::{Case, FLOATS, case};
use crate::verify::sketch::Sketch;
use crate::verify::tolerance::Class;

/// The kinds of chains. In the first nothing else reads the product.
const CHAINS: [&str; 6] =
    ["gelu", "gelu, and the product", "residual", "row and column", "two results", "the product twice"];

/// The tolerance of a chain. The products are sums without an error ([`quarters`] and [`halves`]), so that every device rounds them to the
/// same numbers; what follows is one function that may be inexact, or none. Of two results the second is made of the first: if that is
/// rounded the other way, a spacing off, its product with 1.5 is as much, and half a spacing more at either side by its own rounding, which
/// is what a gradient may be.
fn class(name: &str) -> Class {
    if name == "two results" { Class::Gradient } else { Class::Element }
}

/// A number as a multiple of 1/4 within 3.
fn quarters(x: f64) -> f64 {
    ((4.0 * x).round() / 4.0).clamp(-3.0, 3.0)
}

/// A weight as a multiple of 1/2, within 2.5, of the power of two next to 1 / sqrt(k). A sum of k of its products with [`quarters`] is
/// less than 60 k times their common divisor: exact in f32, whatever the order.
fn halves(k: usize) -> impl Fn(f64) -> f64 {
    let size = 2f64.powf(-((k as f64).log2() / 2.0).round());
    move |x| ((2.0 * x).round() / 2.0).clamp(-2.5, 2.5) * size
}

/// Two of them for each of many sizes: every kind is in its turn.
fn some(at: usize) -> [&'static str; 2] {
    [CHAINS[at % 6], CHAINS[(at + 3) % 6]]
}

/// The chain of this name behind the product `y` of m rows and n columns, and its outputs.
fn chain(s: &mut Sketch, name: &str, y: Value) -> Result<()> {
    let shape = s.graph.shape(y).to_vec();
    let (m, n) = (shape[0], shape[1]);
    let (y, result) = match name {
        "gelu" => (None, s.graph.unary(UnaryFn::GeluTanh, y)?),
        "gelu, and the product" => (Some(y), s.graph.unary(UnaryFn::GeluTanh, y)?),
        "residual" => {
            let residual = s.float([m, n], |x| x)?;
            (None, s.graph.add(residual, y)?)
        }
        "row and column" => {
            let (row, column) = (s.float([n], |x| x)?, s.float([m, 1], |x| 1.0 + x / 4.0)?);
            let weighted = s.graph.binary(BinaryFn::Mul, y, column)?;
            (None, s.graph.add(weighted, row)?)
        }
        "two results" => {
            let gated = s.graph.unary(UnaryFn::Silu, y)?;
            (Some(gated), s.graph.mul_scalar(gated, 1.5)?)
        }
        _twice => {
            let other = s.float([m, n], |x| x)?;
            let negative = s.graph.unary(UnaryFn::Neg, y)?;
            let square = s.graph.binary(BinaryFn::Mul, negative, y)?;
            (None, s.graph.add(square, other)?)
        }
    };
    y.into_iter().try_for_each(|y| s.out(y))?;
    s.out(result)
}

fn dense() -> Vec<Case> {
    let mut cases = Vec::new();
    // Few rows, few columns, a k that is cut up, tiles with and without rows of a multiple of 16 bytes, and several of them.
    for (at, (m, n, k, transposed)) in [
        (1, 136, 1040, false),
        (3, 72, 520, true),
        (12, 40, 264, false),
        (70, 2, 264, true),
        (33, 65, 17, false),
        (72, 136, 72, false),
        (296, 264, 40, true),
        (72, 72, 2048, false),
    ]
    .into_iter()
    .enumerate()
    {
        for name in some(at) {
            let title = format!("{m}x{n}x{k}, transposed {transposed}: {name}");
            cases.push(case("matmul", title, class(name), FLOATS, move |s| {
                let x = s.float([m, k], quarters)?;
                let w = s.float(if transposed { [n, k] } else { [k, n] }, halves(k))?;
                let bias = if k < 100 { Some(s.float([n], quarters)?) } else { None };
                let y = s.graph.matmul_with(x, w, bias, false, transposed)?;
                chain(s, name, y)
            }));
        }
    }
    cases
}

/// Segments of experts: an idle one, unused slots, few slots and more than a tile.
fn experts() -> Vec<Case> {
    let mut cases = Vec::new();
    for (at, (tokens, k, n, transposed)) in
        [(1, 520, 40, true), (13, 264, 72, false), (83, 72, 136, false), (300, 40, 72, true), (50, 13, 21, false)]
            .into_iter()
            .enumerate()
    {
        for name in some(at) {
            let expert_index = (0..tokens as i32).map(|t| [3, 0, 3, -1, 4, 3][t as usize % 6]).collect();
            let r = Routing { name: "", tokens, k: 1, experts: 5, capacity: None, expert_index };
            let title = format!("{tokens} slots, {k}x{n}, transposed {transposed}: {name}");
            cases.push(case("expert_matmul", title, class(name), FLOATS, move |s| {
                let [_, _, offsets] = assigned(s, &r)?;
                let rows = s.float([tokens, k], quarters)?;
                let shape = [5, if transposed { n } else { k }, if transposed { k } else { n }];
                let w = s.float(shape, halves(k))?;
                let bias = if transposed { Some(s.float([5, n], quarters)?) } else { None };
                let y = s.graph.expert_matmul(rows, w, offsets, bias, transposed)?;
                chain(s, name, y)
            }));
        }
    }
    cases
}

/// One of the products of a network.
type Layer<'a> = &'a dyn Fn(&mut Sketch, Value) -> Result<Value>;

/// Two products with an activation between: the gradient of the first one's result is a product with a chain that reads what was kept
/// of the first one.
fn networks() -> Vec<Case> {
    let mut cases = Vec::new();
    for (function, m, d, hidden) in
        [(UnaryFn::GeluTanh, 72, 64, 136), (UnaryFn::Silu, 3, 72, 264), (UnaryFn::Relu, 40, 17, 33)]
    {
        let name = format!("{m} rows, {function:?} between {d} and {hidden}").to_lowercase();
        let made = move |s: &mut Sketch, [first, second]: [Layer<'_>; 2]| {
            let x = s.float([m, d], |x| x)?;
            let hidden = first(s, x)?;
            let active = s.graph.unary(function, hidden)?;
            let y = second(s, active)?;
            let y = s.graph.add(x, y)?;
            s.out(y)
        };
        let smaller = move |x: f64| x / (d as f64).sqrt();
        let dense = case("matmul", name.clone(), Class::Layer, FLOATS, move |s| {
            let up = |s: &mut Sketch, x| {
                let w = s.float([d, hidden], smaller)?;
                s.graph.matmul(x, w)
            };
            let down = |s: &mut Sketch, x| {
                let w = s.float([hidden, d], smaller)?;
                s.graph.matmul(x, w)
            };
            made(s, [&up, &down])
        });
        let sparse = case("expert_matmul", name, Class::Layer, FLOATS, move |s| {
            let expert_index = (0..m as i32).map(|t| [2, 0, 2, -1, 3][t as usize % 5]).collect();
            let r = Routing { name: "", tokens: m, k: 1, experts: 4, capacity: None, expert_index };
            let [_, _, offsets] = assigned(s, &r)?;
            let up = |s: &mut Sketch, x| {
                let w = s.float([4, d, hidden], smaller)?;
                s.graph.expert_matmul(x, w, offsets, None, false)
            };
            let down = |s: &mut Sketch, x| {
                let w = s.float([4, hidden, d], smaller)?;
                s.graph.expert_matmul(x, w, offsets, None, false)
            };
            made(s, [&up, &down])
        });
        // A relu has a corner.
        let rough = function == UnaryFn::Relu;
        cases.extend([dense, sparse].map(|case| if rough { case.rough() } else { case }));
    }
    cases
}

/// All of this file.
pub(super) fn cases() -> Vec<Case> {
    [dense(), experts(), networks()].into_iter().flatten().collect()
}
