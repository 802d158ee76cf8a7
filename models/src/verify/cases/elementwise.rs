//! Sources and elementwise ops. A backend sees them in fused form only, as the passes leave them.

use moebius_ir::ops::{BinaryFn, CompareFn, Distribution, UnaryFn};
use moebius_ir::{DType, Role, Shape, TensorType};

use super::{Case, FLOATS, HALVES, ONE, case};
use crate::verify::tolerance::Class;

/// Away from 0 by at least `gap`.
fn away(x: f64, gap: f64) -> f64 {
    x + gap.copysign(x)
}

/// A standard normal number put where the function is defined and smooth.
fn domain(function: UnaryFn, x: f64) -> f64 {
    match function {
        UnaryFn::Ln | UnaryFn::Sqrt | UnaryFn::Rsqrt => x.abs() + 0.25,
        UnaryFn::Reciprocal => away(x, 0.3),
        UnaryFn::Relu | UnaryFn::Abs | UnaryFn::Sign => away(x, 0.1),
        // In the middle of the steps, where no rounding of the operand changes the result.
        UnaryFn::Floor => (4.0 * x).floor() + 0.5,
        UnaryFn::Neg
        | UnaryFn::Exp
        | UnaryFn::Tanh
        | UnaryFn::Sigmoid
        | UnaryFn::GeluTanh
        | UnaryFn::GeluErf
        | UnaryFn::Silu
        | UnaryFn::Square
        | UnaryFn::Sin
        | UnaryFn::Cos
        | UnaryFn::IsFinite
        | UnaryFn::Not => 1.5 * x,
    }
}

/// A derivative is often a difference, such as `1 - tanh(x)^2`, and crosses zero where its terms have about this size.
const DERIVATIVE_TERMS: f64 = 0.25;

fn unary() -> Vec<Case> {
    let mut cases = Vec::new();
    for f in UnaryFn::ALL {
        for shape in [vec![3, 37], vec![]] {
            let name = format!("{f:?} {shape:?}").to_lowercase();
            if f == UnaryFn::Not {
                cases.push(case("unary", name, Class::Exact, ONE, move |s| {
                    let ty = TensorType::new(DType::Bool, shape.clone());
                    let bits = s.normals(ty.elements()).into_iter().map(|x| f64::from(u8::from(x > 0.0))).collect();
                    let x = s.fixed(ty, bits)?;
                    let y = s.graph.not(x)?;
                    s.aux(y)
                }));
                continue;
            }
            let unary = case("unary", name, Class::Element, FLOATS, move |s| {
                let x = s.float(shape.clone(), |x| domain(f, x))?;
                let y = s.graph.unary(f, x)?;
                if f == UnaryFn::IsFinite { s.aux(y) } else { s.out(y) }
            });
            cases.push(unary.of_terms(0.0, DERIVATIVE_TERMS));
        }
        if f != UnaryFn::Not {
            let name = format!("{f:?} of hard values").to_lowercase();
            cases.push(case("unary", name, Class::Element, FLOATS, move |s| {
                let periodic = f == UnaryFn::Sin || f == UnaryFn::Cos;
                let large = if periodic { 100.0 } else { 1e30 };
                let hard = vec![
                    f64::INFINITY,
                    f64::NEG_INFINITY,
                    f64::NAN,
                    0.0,
                    -0.0,
                    1.0,
                    -1.0,
                    large,
                    -large,
                    1e-3,
                    88.0,
                    -87.0,
                    20.0,
                    -20.0,
                    9.0,
                    -9.0,
                    0.5,
                    -0.5,
                ];
                let x = s.fixed(TensorType::new(s.dtype, [hard.len()]), hard)?;
                let y = s.graph.unary(f, x)?;
                s.aux(y)
            }));
        }
    }
    cases
}

fn binary() -> Vec<Case> {
    let shapes: [(&str, &[usize], &[usize]); 5] = [
        ("equal shapes", &[5, 13], &[5, 13]),
        ("scalars", &[], &[]),
        ("a row", &[4, 9], &[9]),
        ("both stretched", &[3, 1, 7], &[2, 1]),
        ("a column", &[6, 1], &[6, 33]),
    ];
    let mut cases = Vec::new();
    for f in BinaryFn::ALL {
        for (what, a, b) in shapes {
            let name = format!("{f:?}, {what}").to_lowercase();
            let (a, b) = (a.to_vec(), b.to_vec());
            let activation =
                matches!(f, BinaryFn::GeluTanhGrad | BinaryFn::GeluErfGrad | BinaryFn::SiluGrad | BinaryFn::ReluGrad);
            let binary = case("binary", name, Class::Element, FLOATS, move |s| {
                // Whole numbers and quarters: a max or min has no ties.
                let ordered = f == BinaryFn::Max || f == BinaryFn::Min;
                let x = s.float(a.clone(), |x| match (ordered, f == BinaryFn::Pow) {
                    (true, _) => (2.0 * x).round() + 0.25,
                    (false, true) => x.abs() + 0.5,
                    (false, false) => away(x, 0.1),
                })?;
                let y = s.float(b.clone(), |x| if ordered { (2.0 * x).round() - 0.25 } else { away(x, 0.3) })?;
                if activation {
                    // Differentiable in the cotangent only.
                    s.wrt.remove(0);
                }
                let z = s.graph.binary(f, x, y)?;
                s.out(z)
            });
            cases.push(binary.of_terms(if activation { DERIVATIVE_TERMS } else { 0.0 }, DERIVATIVE_TERMS));
        }
    }
    for f in [BinaryFn::Add, BinaryFn::Sub, BinaryFn::Mul, BinaryFn::Max, BinaryFn::Min] {
        for dtype in [DType::I32, DType::U32] {
            let name = format!("{f:?} of {dtype} wraps").to_lowercase();
            cases.push(case("binary", name, Class::Exact, ONE, move |s| {
                let hard: &[f64] = if dtype == DType::I32 {
                    &[0.0, 1.0, -1.0, 7.0, -65_537.0, 46_341.0, 2_147_483_647.0, -2_147_483_648.0]
                } else {
                    &[0.0, 1.0, 7.0, 65_537.0, 2_147_483_648.0, 4_294_967_295.0, 3.0, 123_456_789.0]
                };
                let a = s.fixed(TensorType::new(dtype, [8, 1]), hard.to_vec())?;
                let b = s.fixed(TensorType::new(dtype, [8]), hard.to_vec())?;
                let y = s.graph.binary(f, a, b)?;
                s.aux(y)
            }));
        }
    }
    cases.push(
        case("binary", "max and min of ties", Class::Exact, FLOATS, |s| {
            let a = s.float([24], |x| (2.0 * x).round())?;
            let b = s.float([24], |x| (2.0 * x).round())?;
            let (most, least) = (s.graph.maximum(a, b)?, s.graph.minimum(a, b)?);
            s.out(most)?;
            s.out(least)
        })
        .rough(),
    );
    cases.push(case("binary", "max and min of nan and infinities", Class::Exact, FLOATS, |s| {
        let hard = vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, 1.0];
        let a = s.fixed(TensorType::new(s.dtype, [5, 1]), hard.clone())?;
        let b = s.fixed(TensorType::new(s.dtype, [5]), hard)?;
        let (most, least) = (s.graph.maximum(a, b)?, s.graph.minimum(a, b)?);
        s.aux(most)?;
        s.aux(least)
    }));
    cases
}

fn compare_select_cast() -> Vec<Case> {
    let mut cases = Vec::new();
    for f in CompareFn::ALL {
        for dtype in DType::ALL {
            let name = format!("{f:?} of {dtype}").to_lowercase();
            cases.push(case("compare", name, Class::Exact, ONE, move |s| {
                let mut hard = vec![0.0, 1.0, 1.0, 0.0, 1.0];
                if dtype.is_float() {
                    hard.extend([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, -2.5]);
                } else if dtype == DType::U32 {
                    hard.extend([4_294_967_295.0, 2_147_483_648.0]);
                } else if dtype == DType::I32 {
                    hard.extend([-1.0, 2_147_483_647.0, -2_147_483_648.0]);
                }
                let n = hard.len();
                let a = s.fixed(TensorType::new(dtype, [n, 1]), hard.clone())?;
                let b = s.fixed(TensorType::new(dtype, [n]), hard)?;
                let y = s.graph.compare(f, a, b)?;
                s.aux(y)
            }));
        }
    }
    for (what, c, a, b) in [
        ("equal shapes", vec![4, 11], vec![4, 11], vec![4, 11]),
        ("all stretched", vec![2, 1, 1], vec![3, 1], vec![5]),
        ("scalar condition", vec![], vec![7], vec![7]),
        ("scalar branches", vec![4, 3], vec![], vec![]),
    ] {
        cases.push(case("select", what, Class::Exact, FLOATS, move |s| {
            let ty = TensorType::new(DType::Bool, c.clone());
            let bits = s.normals(ty.elements()).into_iter().map(|x| f64::from(u8::from(x > 0.0))).collect();
            let condition = s.fixed(ty, bits)?;
            let (a, b) = (s.float(a.clone(), |x| x)?, s.float(b.clone(), |x| x)?);
            let y = s.graph.select(condition, a, b)?;
            s.out(y)
        }));
    }
    cases.push(case("select", "integers and bools", Class::Exact, ONE, |s| {
        let c = s.fixed(TensorType::new(DType::Bool, [4]), vec![1.0, 0.0, 0.0, 1.0])?;
        let not = s.graph.not(c)?;
        let (a, b) = (s.ints([4], &[1, 2, 3, -4])?, s.ints([], &[i32::MIN])?);
        let (ints, bools) = (s.graph.select(c, a, b)?, s.graph.select(c, not, c)?);
        s.aux(ints)?;
        s.aux(bools)
    }));
    for from in DType::ALL {
        for to in DType::ALL {
            if from == to {
                continue;
            }
            cases.push(case("cast", format!("{from} to {to}"), Class::Exact, ONE, move |s| {
                let hard: Vec<f64> = match from {
                    DType::F32 | DType::Bf16 | DType::F16 => vec![
                        0.0,
                        -0.0,
                        0.5,
                        -0.5,
                        1.75,
                        -1.75,
                        255.5,
                        1.003_906_25,
                        3e9,
                        -3e9,
                        5e9,
                        f64::INFINITY,
                        f64::NEG_INFINITY,
                        f64::NAN,
                        65_520.0,
                        1e-7,
                    ],
                    DType::I32 => vec![0.0, 1.0, -1.0, 257.0, 16_777_217.0, 2_147_483_647.0, -2_147_483_648.0],
                    DType::U32 => vec![0.0, 1.0, 257.0, 16_777_217.0, 2_147_483_648.0, 4_294_967_295.0],
                    DType::Bool => vec![0.0, 1.0],
                };
                let x = s.fixed(TensorType::new(from, [hard.len()]), hard)?;
                let y = s.graph.cast(x, to)?;
                s.aux(y)
            }));
        }
    }
    cases.push(case("cast", "there and back is differentiable", Class::Exact, HALVES, |s| {
        let x = s.float([3, 5], |x| x)?;
        let wide = s.graph.cast(x, DType::F32)?;
        let back = s.graph.cast(wide, s.dtype)?;
        s.out(back)
    }));
    cases
}

/// A chain over 200 rows with a row, a column and a scalar beside them, and results of its dtype and of f32.
fn big(name: &str, columns: usize) -> Case {
    case("elementwise", name.to_owned(), Class::Sum, FLOATS, move |s| {
        s.direct = false;
        let (x, row) = (s.float([200, columns], |x| x)?, s.float([columns], |x| x)?);
        let (column, scalar) = (s.float_as(DType::F32, [200, 1], |x| x)?, s.float([], |x| x)?);
        let g = &mut s.graph;
        let sum = g.add(x, row)?;
        let product = g.mul(sum, scalar)?;
        let wide = g.cast(product, DType::F32)?;
        let scaled = g.mul(wide, column)?;
        let gelu = g.gelu(product)?;
        s.out(gelu)?;
        s.out(scaled)
    })
}

fn chains() -> Vec<Case> {
    vec![
        case("elementwise", "a chain with several results", Class::Sum, FLOATS, |s| {
            s.direct = false;
            let (x, y) = (s.float([6, 19], |x| x)?, s.float([19], |x| away(x, 0.5))?);
            let g = &mut s.graph;
            let sum = g.add(x, y)?;
            let tanh = g.tanh(sum)?;
            let silu = g.silu(x)?;
            let product = g.mul(tanh, silu)?;
            let quotient = g.div(product, y)?;
            s.out(quotient)?;
            s.out(tanh)?;
            s.out(product)
        }),
        case("elementwise", "more functions and results than one kernel holds", Class::Sum, FLOATS, |s| {
            s.direct = false;
            let mut x = s.float([5, 7], |x| 0.5 * x)?;
            for i in 0..45 {
                let g = &mut s.graph;
                let half = g.mul_scalar(x, 0.5)?;
                let next = if i % 3 == 0 { g.sin(half)? } else { g.add_scalar(half, 0.25)? };
                x = next;
                if i % 4 == 0 {
                    s.out(x)?;
                }
            }
            s.out(x)
        }),
        case("elementwise", "a stretched operand in a chain", Class::Sum, FLOATS, |s| {
            s.direct = false;
            let (x, row) = (s.float([8, 3, 10], |x| x)?, s.float([3, 1], |x| x)?);
            let g = &mut s.graph;
            let wide = g.broadcast(row, [8, 3, 10])?;
            let product = g.mul(x, wide)?;
            let gelu = g.gelu(product)?;
            s.out(gelu)
        }),
        // So many elements that GPUs take several of them together; the columns of one case cannot be.
        big("many elements", 88),
        big("many elements, odd rows", 83),
        case("elementwise", "two chains around a reduction", Class::Sum, FLOATS, |s| {
            s.direct = false;
            let x = s.float([12, 6], |x| x)?;
            let g = &mut s.graph;
            let square = g.square(x)?;
            let sum = g.reduce(moebius_ir::ops::ReduceFn::Sum, square, &[1])?;
            let shifted = g.add_scalar(sum, 1.0)?;
            let scale = g.rsqrt(shifted)?;
            let scale = g.reshape(scale, [12, 1])?;
            let y = g.mul(x, scale)?;
            s.out(y)
        }),
    ]
}

fn sources() -> Vec<Case> {
    let mut cases = vec![
        case("input", "feeds, parameters and states pass through", Class::Exact, FLOATS, |s| {
            let ty = TensorType::new(s.dtype, [3, 5]);
            for role in [Role::Feed, Role::Parameter, Role::State] {
                let data = s.normals(15);
                let x = s.input(role, ty.clone(), data, true)?;
                s.out(x)?;
            }
            Ok(())
        }),
        case("input", "an update that no op carries out in place", Class::Exact, FLOATS, |s| {
            let ty = TensorType::new(s.dtype, [3, 5]);
            let (old, new) = (s.normals(15), s.normals(15));
            let state = s.input(Role::State, ty.clone(), old, false)?;
            let x = s.fixed(ty, new)?;
            let y = s.graph.maximum(state, x)?;
            s.graph.update(state, y)?;
            s.aux(y)
        }),
        case("constant", "of many elements, and one everywhere", Class::Exact, FLOATS, |s| {
            let ty = TensorType::new(s.dtype, [70, 71]);
            let data = s.normals(ty.elements());
            let dense = s.graph.constant(ty, data)?;
            s.aux(dense)?;
            let splat = s.graph.splat(TensorType::new(s.dtype, [3, 2]), 0.1)?;
            s.aux(splat)?;
            let hard = vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0];
            let hard = s.graph.constant(TensorType::new(s.dtype, [4]), hard)?;
            s.aux(hard)
        }),
        case("constant", "integers, words and bools", Class::Exact, ONE, |s| {
            let words = s.graph.constant(TensorType::new(DType::U32, [3]), vec![0.0, 4_294_967_295.0, 7.0])?;
            let ints = s.graph.constant(TensorType::i32([2]), vec![-2_147_483_648.0, 2_147_483_647.0])?;
            let bools = s.graph.constant(TensorType::new(DType::Bool, [2, 1]), vec![1.0, 0.0])?;
            [words, ints, bools].into_iter().try_for_each(|v| s.aux(v))
        }),
    ];
    for distribution in [Distribution::Uniform, Distribution::Normal, Distribution::Gumbel, Distribution::Bits] {
        for (shape, stream) in [(Shape::from([7, 19]), 0), (Shape::default(), 5), (Shape::from([4099]), u32::MAX)] {
            let name = format!("{distribution:?} {shape} of stream {stream}").to_lowercase();
            cases.push(case("random", name, Class::Exact, ONE, move |s| {
                let key = s.fixed(TensorType::new(DType::U32, [2]), vec![4_294_967_295.0, 12.0])?;
                let y = s.graph.random(distribution, shape.clone(), stream, key)?;
                s.aux(y)
            }));
        }
    }
    cases
}

/// Enough elements for a kernel to take several together, with operands that are stretched along either axis.
fn many() -> Vec<Case> {
    [40, 36, 35]
        .map(|width| {
            case(
                "elementwise",
                format!("rows of {width}, a row, a column and a choice"),
                Class::Sum,
                FLOATS,
                move |s| {
                    let (x, y) = (s.float([120, width], |x| x)?, s.float_as(DType::F32, [120, width], |x| x)?);
                    let (row, column) = (s.float([width], |x| x)?, s.float([120, 1], |x| away(x, 0.3))?);
                    let sum = s.graph.binary(BinaryFn::Add, x, row)?;
                    let scaled = s.graph.binary(BinaryFn::Mul, sum, column)?;
                    let y = s.graph.cast(y, s.dtype)?;
                    let greater = s.graph.compare(CompareFn::Gt, x, y)?;
                    let z = s.graph.select(greater, scaled, y)?;
                    s.aux(greater)?;
                    s.aux(z)
                },
            )
        })
        .into()
}

pub(super) fn cases() -> Vec<Case> {
    [sources(), unary(), binary(), compare_select_cast(), chains(), many()].into_iter().flatten().collect()
}
