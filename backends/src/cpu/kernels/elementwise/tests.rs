//! Every operation against f64 or i64, broadcasts against a naive walk, and what a program refuses.

use smallvec::SmallVec;

use super::super::par::tests::{Rng, bits, same_on_any_thread_count};
use super::*;

fn full(shape: &[usize], storage: Storage) -> Input {
    let mut strides: SmallVec<[usize; MAX_DIMS]> = SmallVec::from_elem(1, shape.len());
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    Input { storage, strides }
}

/// Runs one action on full f32 inputs.
fn floats(action: Action, inputs: &[&[f32]]) -> Vec<f32> {
    let n = inputs[0].len();
    let out = inputs.len() as Register;
    let list: Vec<Input> = inputs.iter().map(|_| full(&[n], Storage::F32)).collect();
    let output = Output { storage: Storage::F32, register: out };
    let program = Program::new(&[n], &list, &[], &[Instr { action, out }], &[output]).unwrap();
    let operands: Vec<Operand<'_>> = inputs.iter().map(|x| Operand::F32(x)).collect();
    let mut result = vec![f32::NAN; n];
    elementwise(&program, &operands, &mut [OperandMut::F32(&mut result)]);
    result
}

fn near(got: f32, want: f64) -> bool {
    let got = f64::from(got);
    (got.is_nan() && want.is_nan()) || got == want || (got - want).abs() <= 3e-6 * want.abs().max(1.0)
}

/// erf in f64 from its Taylor series, enough for |x| < 4.
fn erf64(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn phi(x: f64) -> f64 {
    0.5 * (1.0 + erf64(x / std::f64::consts::SQRT_2))
}

#[test]
fn float_operations_against_f64() {
    let mut x = Rng(50).values(3000, 4.0);
    x[..6].copy_from_slice(&[0.0, 1.0, -1.0, f32::NAN, 2.0, 0.5]);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gelu = |x: f64| 0.5 * x * (1.0 + (0.797_884_56 * (x + 0.044_715 * x.powi(3))).tanh());
    let slope = |f: &dyn Fn(f64) -> f64, x: f64| (f(x + 1e-5) - f(x - 1e-5)) / 2e-5;
    type Case<'a> = (Unary, &'a dyn Fn(f64) -> f64);
    let cases: [Case<'_>; 18] = [
        (Unary::Neg, &|x| -x),
        (Unary::Exp, &f64::exp),
        (Unary::Ln, &f64::ln),
        (Unary::Sqrt, &f64::sqrt),
        (Unary::Rsqrt, &|x| 1.0 / x.sqrt()),
        (Unary::Reciprocal, &|x| 1.0 / x),
        (Unary::Tanh, &f64::tanh),
        (Unary::Sigmoid, &sigmoid),
        (Unary::GeluTanh, &gelu),
        (Unary::GeluErf, &|x| x * phi(x)),
        (Unary::Silu, &|x| x * sigmoid(x)),
        (Unary::Relu, &|x| if x.is_nan() { x } else { x.max(0.0) }),
        (Unary::Abs, &f64::abs),
        (Unary::Sign, &|x| if x == 0.0 || x.is_nan() { x } else { x.signum() }),
        (Unary::Square, &|x| x * x),
        (Unary::Sin, &f64::sin),
        (Unary::Cos, &f64::cos),
        (Unary::Floor, &f64::floor),
    ];
    for (op, want) in cases {
        let got = floats(Action::Unary { op, x: 0 }, &[&x]);
        for (&x, &got) in x.iter().zip(&got) {
            let want = want(f64::from(x));
            assert!(near(got, want), "{op:?} {x}: {got} for {want}");
        }
    }
    let mut y = Rng(51).values(3000, 4.0);
    y[..6].copy_from_slice(&[1.0, f32::NAN, 0.0, 1.0, 2.0, -3.0]);
    let nan_or = |a: f64, b: f64, v: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { v };
    let silu = |x: f64| x * sigmoid(x);
    type Pair<'a> = (Binary, &'a dyn Fn(f64, f64) -> f64);
    let pairs: [Pair<'_>; 11] = [
        (Binary::Add, &|a, b| a + b),
        (Binary::Sub, &|a, b| a - b),
        (Binary::Mul, &|a, b| a * b),
        (Binary::Div, &|a, b| a / b),
        (Binary::Max, &|a, b| nan_or(a, b, a.max(b))),
        (Binary::Min, &|a, b| nan_or(a, b, a.min(b))),
        (Binary::Pow, &f64::powf),
        (Binary::GeluTanhGrad, &|a, b| b * slope(&gelu, a)),
        (Binary::GeluErfGrad, &|a, b| b * slope(&|x| x * phi(x), a)),
        (Binary::SiluGrad, &|a, b| b * slope(&silu, a)),
        (Binary::ReluGrad, &|a, b| if a > 0.0 { b } else { 0.0 }),
    ];
    for (op, want) in pairs {
        let got = floats(Action::Binary { op, a: 0, b: 1 }, &[&x, &y]);
        for (i, &got) in got.iter().enumerate() {
            let want = want(f64::from(x[i]), f64::from(y[i]));
            assert!(near(got, want), "{op:?} {} {}: {got} for {want}", x[i], y[i]);
        }
    }
    for (op, round) in [
        (Unary::RoundBf16, (|x| bf16::from_f32(x).to_f32()) as fn(f32) -> f32),
        (Unary::RoundF16, |x| f16::from_f32(x).to_f32()),
    ] {
        let got = floats(Action::Unary { op, x: 0 }, &[&x]);
        assert!(got.iter().zip(&x).all(|(g, &x)| g.is_nan() && x.is_nan() || *g == round(x)));
    }
}

/// Runs `action` on words of `kind`, the result of `to`.
fn words(action: Action, kind: Storage, to: Storage, inputs: &[&[u32]]) -> Vec<u32> {
    let n = inputs[0].len();
    let out = inputs.len() as Register;
    let list: Vec<Input> = inputs.iter().map(|_| full(&[n], kind)).collect();
    let output = Output { storage: to, register: out };
    let program = Program::new(&[n], &list, &[], &[Instr { action, out }], &[output]).unwrap();
    let bytes: Vec<Vec<u8>> = inputs.iter().map(|x| x.iter().map(|&w| w as u8).collect()).collect();
    let operands: Vec<Operand<'_>> = inputs
        .iter()
        .zip(&bytes)
        .map(|(x, bytes)| match kind {
            Storage::F32 => Operand::F32(bytemuck::cast_slice(x)),
            Storage::I32 => Operand::I32(bytemuck::cast_slice(x)),
            Storage::U32 => Operand::U32(x),
            Storage::Bool => Operand::Bool(bytes),
            Storage::Bf16 | Storage::F16 => panic!("not used here"),
        })
        .collect();
    let (mut result, mut byte_result) = (vec![9; n], vec![9; n]);
    let mut target = match to {
        Storage::F32 => OperandMut::F32(bytemuck::cast_slice_mut(&mut result)),
        Storage::I32 => OperandMut::I32(bytemuck::cast_slice_mut(&mut result)),
        Storage::U32 => OperandMut::U32(&mut result),
        Storage::Bool => OperandMut::Bool(&mut byte_result),
        Storage::Bf16 | Storage::F16 => panic!("not used here"),
    };
    elementwise(&program, &operands, std::slice::from_mut(&mut target));
    if to == Storage::Bool { byte_result.iter().map(|&b| u32::from(b)).collect() } else { result }
}

const EXTREMES: [u32; 12] =
    [0, 1, 2, u32::MAX, u32::MAX - 1, 1 << 31, (1 << 31) - 1, (1 << 31) + 1, 1 << 24, (1 << 24) + 1, 7, 123_456_789];

/// All pairs of extreme and random words.
fn pairs() -> (Vec<u32>, Vec<u32>) {
    let mut rng = Rng(52);
    let mut all = EXTREMES.to_vec();
    all.extend((0..40).map(|_| rng.next() as u32));
    all.iter().flat_map(|&a| all.iter().map(move |&b| (a, b))).unzip()
}

#[test]
fn integer_operations_are_exact() {
    let (a, b) = pairs();
    for (kind, wide) in [(Storage::I32, (|w| i64::from(w as i32)) as fn(u32) -> i64), (Storage::U32, |w| i64::from(w))]
    {
        type Pair<'a> = (Binary, &'a dyn Fn(i64, i64) -> i64);
        let cases: [Pair<'_>; 6] = [
            (Binary::Add, &|a, b| a + b),
            (Binary::Sub, &|a, b| a - b),
            (Binary::Mul, &i64::wrapping_mul),
            (Binary::Div, &|a, b| if b == 0 { 0 } else { a / b }),
            (Binary::Max, &i64::max),
            (Binary::Min, &i64::min),
        ];
        for (op, want) in cases {
            let got = words(Action::Binary { op, a: 0, b: 1 }, kind, kind, &[&a, &b]);
            for i in 0..a.len() {
                assert_eq!(got[i], want(wide(a[i]), wide(b[i])) as u32, "{op:?} {} {}", wide(a[i]), wide(b[i]));
            }
        }
        type One<'a> = (Unary, &'a dyn Fn(i64) -> i64);
        let cases: [One<'_>; 5] = [
            (Unary::Neg, &|a| -a),
            (Unary::Square, &|a| a.wrapping_mul(a)),
            (Unary::Relu, &|a| a.max(0)),
            (Unary::Abs, &i64::abs),
            (Unary::Sign, &i64::signum),
        ];
        for (op, want) in cases.into_iter().take(if kind == Storage::I32 { 5 } else { 2 }) {
            let got = words(Action::Unary { op, x: 0 }, kind, kind, &[&a]);
            assert!(got.iter().zip(&a).all(|(&g, &a)| g == want(wide(a)) as u32), "{op:?}");
        }
    }
    let (p, q): (Vec<u32>, Vec<u32>) = (vec![0, 0, 1, 1], vec![0, 1, 0, 1]);
    for (op, want) in [(Binary::Mul, [0, 0, 0, 1]), (Binary::Min, [0, 0, 0, 1]), (Binary::Max, [0, 1, 1, 1])] {
        assert_eq!(words(Action::Binary { op, a: 0, b: 1 }, Storage::Bool, Storage::Bool, &[&p, &q]), want);
    }
    // Any byte but 0 is true.
    assert_eq!(words(Action::Unary { op: Unary::Not, x: 0 }, Storage::Bool, Storage::Bool, &[&[0, 1, 255]]), [1, 0, 0]);
}

#[test]
fn comparisons_selection_and_finiteness() {
    let (mut a, mut b) = pairs();
    let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.5].map(f32::to_bits);
    for x in specials {
        for y in specials {
            a.push(x);
            b.push(y);
        }
    }
    type Order = Option<std::cmp::Ordering>;
    let order = |kind, a: u32, b: u32| -> Order {
        match kind {
            Storage::F32 => f32::from_bits(a).partial_cmp(&f32::from_bits(b)),
            Storage::I32 => (a as i32).partial_cmp(&(b as i32)),
            Storage::U32 | Storage::Bool | Storage::Bf16 | Storage::F16 => a.partial_cmp(&b),
        }
    };
    type Case = (Compare, fn(Order) -> bool);
    let cases: [Case; 6] = [
        (Compare::Eq, |o| o.is_some_and(|o| o.is_eq())),
        (Compare::Ne, |o| o.is_none_or(|o| o.is_ne())),
        (Compare::Lt, |o| o.is_some_and(|o| o.is_lt())),
        (Compare::Le, |o| o.is_some_and(|o| o.is_le())),
        (Compare::Gt, |o| o.is_some_and(|o| o.is_gt())),
        (Compare::Ge, |o| o.is_some_and(|o| o.is_ge())),
    ];
    for kind in [Storage::F32, Storage::I32, Storage::U32] {
        for (op, want) in cases {
            let got = words(Action::Compare { op, a: 0, b: 1 }, kind, Storage::Bool, &[&a, &b]);
            for i in 0..a.len() {
                assert_eq!(got[i], u32::from(want(order(kind, a[i], b[i]))), "{op:?} {kind:?} {} {}", a[i], b[i]);
            }
        }
    }
    let got = words(Action::Unary { op: Unary::IsFinite, x: 0 }, Storage::F32, Storage::Bool, &[&a]);
    assert!(got.iter().zip(&a).all(|(&g, &a)| g == u32::from(f32::from_bits(a).is_finite())));
    // clamp(x, lo) through a selection with a constant.
    let x: Vec<i32> = (-5000..5000).collect();
    let instrs = [
        Instr { action: Action::Compare { op: Compare::Lt, a: 0, b: 1 }, out: 2 },
        Instr { action: Action::Select { condition: 2, a: 1, b: 0 }, out: 3 },
    ];
    let input = full(&[x.len()], Storage::I32);
    let output = Output { storage: Storage::I32, register: 3 };
    let program = Program::new(&[x.len()], &[input], &[Constant::I32(-7)], &instrs, &[output]).unwrap();
    let mut got = vec![0; x.len()];
    elementwise(&program, &[Operand::I32(&x)], &mut [OperandMut::I32(&mut got)]);
    assert!(got.iter().zip(&x).all(|(&g, &x)| g == x.max(-7)));
}

#[test]
fn casts() {
    let f: Vec<u32> = [0.0, -0.0, 1.9, -1.9, 3e9, -3e9, 5e9, f32::NAN, f32::INFINITY, 0.25].map(f32::to_bits).to_vec();
    let cast = |x: &[u32], from, to: Storage| words(Action::Cast { x: 0, to: to.kind() }, from, to, &[x]);
    let value = |w: &u32| f32::from_bits(*w);
    let same =
        |got: Vec<u32>, x: &[u32], want: &dyn Fn(&u32) -> u32| assert_eq!(got, x.iter().map(want).collect::<Vec<_>>());
    same(cast(&f, Storage::F32, Storage::I32), &f, &|w| value(w) as i32 as u32);
    same(cast(&f, Storage::F32, Storage::U32), &f, &|w| value(w) as u32);
    same(cast(&f, Storage::F32, Storage::Bool), &f, &|w| u32::from(value(w) != 0.0));
    same(cast(&f, Storage::F32, Storage::F32), &f, &|w| *w);
    let e = &EXTREMES;
    same(cast(e, Storage::I32, Storage::F32), e, &|w| (f64::from(*w as i32) as f32).to_bits());
    same(cast(e, Storage::U32, Storage::F32), e, &|w| (f64::from(*w) as f32).to_bits());
    same(cast(e, Storage::I32, Storage::U32), e, &|w| *w);
    same(cast(e, Storage::U32, Storage::Bool), e, &|w| u32::from(*w != 0));
    same(cast(&[0, 1], Storage::Bool, Storage::F32), &[0, 1], &|w| (*w as f32).to_bits());
    same(cast(&[0, 1], Storage::Bool, Storage::I32), &[0, 1], &|w| *w);
}

/// Random shapes with full, scalar, row, column and arbitrary broadcasts in all floating-point storages; two outputs.
#[test]
fn broadcasts_against_a_naive_walk() {
    let mut rng = Rng(53);
    for round in 0..200 {
        let rank = if round == 0 { 0 } else { rng.below(MAX_DIMS + 1) };
        let most = [3000, 3000, 70, 16, 8, 5, 4, 3, 3][rank];
        let shape: Vec<usize> = (0..rank).map(|_| rng.below(most) + usize::from(round % 9 != 8)).collect();
        let n: usize = shape.iter().product();
        let mut layout = || {
            let mode = rng.below(5);
            let (mut strides, mut size) = (full(&shape, Storage::F32).strides, 1);
            for i in (0..rank).rev() {
                let keep = match mode {
                    0 => true,
                    1 => false,
                    2 => i + 1 == rank,
                    3 => i + 1 != rank,
                    _ => rng.below(2) == 0,
                };
                strides[i] = if keep { size } else { 0 };
                size *= if keep { shape[i].max(1) + usize::from(mode == 4 && rng.below(3) == 0) } else { 1 };
            }
            if mode == 4 && rank > 1 {
                strides.swap(0, rank - 1);
                size = 1 + (0..rank).map(|i| strides[i] * shape[i]).sum::<usize>();
            }
            let values: Vec<f32> = rng.values(size, 100.0);
            (strides, values)
        };
        let (a, b, c) = (layout(), layout(), layout());
        let low: Vec<bf16> = b.1.iter().map(|&v| bf16::from_f32(v)).collect();
        let half: Vec<f16> = c.1.iter().map(|&v| f16::from_f32(v)).collect();
        let inputs = [
            Input { storage: Storage::F32, strides: a.0.clone() },
            Input { storage: Storage::Bf16, strides: b.0.clone() },
            Input { storage: Storage::F16, strides: c.0.clone() },
        ];
        let instrs = [
            Instr { action: Action::Binary { op: Binary::Mul, a: 1, b: 2 }, out: 4 },
            Instr { action: Action::Binary { op: Binary::Add, a: 4, b: 0 }, out: 5 },
            Instr { action: Action::Binary { op: Binary::Mul, a: 5, b: 3 }, out: 4 },
        ];
        let outputs = [
            Output { storage: Storage::F32, register: 5 },
            Output { storage: Storage::Bf16, register: 4 },
            Output { storage: Storage::F16, register: 4 },
        ];
        let program = Program::new(&shape, &inputs, &[Constant::F32(0.25)], &instrs, &outputs).unwrap();
        assert_eq!(program.elements(), n);
        let (mut x, mut y, mut z) = (vec![f32::NAN; n], vec![bf16::NAN; n], vec![f16::NAN; n]);
        let operands = [Operand::F32(&a.1), Operand::Bf16(&low), Operand::F16(&half)];
        let mut outs = [OperandMut::F32(&mut x), OperandMut::Bf16(&mut y), OperandMut::F16(&mut z)];
        elementwise(&program, &operands, &mut outs);
        for i in 0..n {
            let at = |strides: &[usize]| {
                let (mut rest, mut offset) = (i, 0);
                for d in (0..rank).rev() {
                    offset += rest % shape[d] * strides[d];
                    rest /= shape[d];
                }
                offset
            };
            let want = low[at(&b.0)].to_f32() * half[at(&c.0)].to_f32() + a.1[at(&a.0)];
            let fourth = want * 0.25;
            assert!(x[i] == want && y[i] == bf16::from_f32(fourth) && z[i] == f16::from_f32(fourth), "{shape:?} {i}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let shape = [300, 517];
    let mut rng = Rng(54);
    let (x, row) = (rng.values(300 * 517, 3.0), rng.values(517, 1.0));
    let inputs = [full(&shape, Storage::F32), Input { storage: Storage::F32, strides: SmallVec::from_slice(&[0, 1]) }];
    let instrs = [
        Instr { action: Action::Binary { op: Binary::Add, a: 0, b: 1 }, out: 2 },
        Instr { action: Action::Unary { op: Unary::GeluTanh, x: 2 }, out: 3 },
    ];
    let output = Output { storage: Storage::F32, register: 3 };
    let program = Program::new(&shape, &inputs, &[], &instrs, &[output]).unwrap();
    same_on_any_thread_count(|| {
        let mut out = vec![f32::NAN; x.len()];
        elementwise(&program, &[Operand::F32(&x), Operand::F32(&row)], &mut [OperandMut::F32(&mut out)]);
        bits(&out)
    });
}

#[test]
fn what_a_program_refuses() {
    let inputs = [full(&[4], Storage::F32), full(&[4], Storage::I32)];
    let new = |instrs: &[Instr], output: Output| Program::new(&[4], &inputs, &[], instrs, &[output]).map(|_| ());
    let float = |register| Output { storage: Storage::F32, register };
    let neg = |x, out| Instr { action: Action::Unary { op: Unary::Neg, x }, out };
    assert_eq!(new(&[neg(0, 2)], float(2)), Ok(()));
    assert_eq!(new(&[neg(3, 2)], float(2)), Err(ProgramError::Unwritten { step: 0, register: 3 }));
    assert_eq!(new(&[neg(200, 2)], float(2)), Err(ProgramError::Unwritten { step: 0, register: 200 }));
    assert_eq!(new(&[neg(0, 2)], float(5)), Err(ProgramError::Unwritten { step: 1, register: 5 }));
    assert_eq!(new(&[neg(0, 1)], float(1)), Err(ProgramError::Overwrites { step: 0, register: 1 }));
    assert_eq!(new(&[neg(0, 2), neg(2, 2)], float(2)), Err(ProgramError::Overwrites { step: 1, register: 2 }));
    assert_eq!(new(&[neg(0, 32)], float(32)), Err(ProgramError::Registers { register: 32 }));
    let found = Kind::I32;
    assert_eq!(new(&[], float(1)), Err(ProgramError::Stored { output: 0, storage: Storage::F32, found }));
    let action = Action::Binary { op: Binary::Add, a: 0, b: 1 };
    let found = [Some(Kind::F32), Some(Kind::I32), None];
    assert_eq!(new(&[Instr { action, out: 2 }], float(2)), Err(ProgramError::Operands { step: 0, action, found }));
    let action = Action::Unary { op: Unary::Exp, x: 1 };
    let found = [Some(Kind::I32), None, None];
    assert_eq!(new(&[Instr { action, out: 2 }], float(2)), Err(ProgramError::Operands { step: 0, action, found }));
    let action = Action::Select { condition: 0, a: 0, b: 0 };
    assert!(matches!(new(&[Instr { action, out: 2 }], float(2)), Err(ProgramError::Operands { .. })));
    let bare = |shape: &[usize], outputs: &[Output]| Program::new(shape, &inputs, &[], &[], outputs).map(|_| ());
    assert_eq!(bare(&[4, 1], &[float(0)]), Err(ProgramError::Strides { input: 0, wanted: 2, found: 1 }));
    assert_eq!(bare(&[1; 9], &[float(0)]), Err(ProgramError::Dims { found: 9 }));
    assert_eq!(bare(&[4], &[]), Err(ProgramError::Outputs { found: 0 }));
    assert_eq!(bare(&[usize::MAX, 2], &[float(0)]), Err(ProgramError::Elements));
}

#[test]
#[should_panic(expected = "too short")]
fn a_short_input_is_refused() {
    let output = Output { storage: Storage::F32, register: 0 };
    let program = Program::new(&[4], &[full(&[4], Storage::F32)], &[], &[], &[output]).unwrap();
    elementwise(&program, &[Operand::F32(&[0.0; 3])], &mut [OperandMut::F32(&mut [0.0; 4])]);
}

/// An output over an input that a later instruction still reads, whichever of the two it is.
#[test]
fn an_output_may_lie_over_an_input() {
    let mut rng = Rng(56);
    let n = 3000;
    let (a, b) = (rng.values(n, 1.0), rng.values(n, 1.0));
    let add = Instr { action: Action::Binary { op: Binary::Add, a: 0, b: 1 }, out: 2 };
    let sub = Instr { action: Action::Binary { op: Binary::Sub, a: 0, b: 1 }, out: 3 };
    let outputs = [2, 3].map(|register| Output { storage: Storage::F32, register });
    let list = [full(&[n], Storage::F32), full(&[n], Storage::F32)];
    let program = Program::new(&[n], &list, &[], &[add, sub], &outputs).unwrap();
    for over in 0..2 {
        let mut inputs = [a.clone(), b.clone()];
        let mut apart = vec![f32::NAN; n];
        let [x, y] = inputs.each_mut().map(|x| x.as_mut_ptr().cast::<u8>());
        let first = [x, y][over];
        // SAFETY: initialised f32 of the program's shape; the first output lies exactly over an input.
        unsafe { elementwise_at(&program, &[x.cast_const(), y], &[first, apart.as_mut_ptr().cast()]) };
        for i in 0..n {
            assert_eq!((inputs[over][i], apart[i]), (a[i] + b[i], a[i] - b[i]), "{i}");
        }
    }
}

/// The parts of a table give what the whole gives, whatever their order.
#[test]
fn parts_have_the_bits_of_the_whole() {
    let mut rng = Rng(57);
    let (rows, width) = (7, 2500);
    let n = rows * width;
    let (a, b) = (rng.values(n, 2.0), rng.values(width, 2.0));
    let bias = Input { storage: Storage::F32, strides: [0, 1].into_iter().collect() };
    let steps = [
        Instr { action: Action::Binary { op: Binary::Add, a: 0, b: 1 }, out: 2 },
        Instr { action: Action::Unary { op: Unary::GeluTanh, x: 2 }, out: 3 },
    ];
    let outputs = [2, 3].map(|register| Output { storage: Storage::F32, register });
    let program =
        Program::new(&[rows, width], &[full(&[rows, width], Storage::F32), bias], &[], &steps, &outputs).unwrap();
    let run = |parts: bool| {
        let (mut x, mut y) = (vec![f32::NAN; n], vec![f32::NAN; n]);
        let (from, to) = ([a.as_ptr().cast(), b.as_ptr().cast()], [x.as_mut_ptr().cast(), y.as_mut_ptr().cast()]);
        let columns = [0..1, 1..1, 1..130, 130..2400, 2400..2500];
        // SAFETY: memory of the program's shapes, and each part is run once.
        unsafe {
            if parts {
                for (r, c) in [4..7, 0..4].iter().flat_map(|r| columns.iter().map(move |c| (r, c))) {
                    elementwise_part(&program, &from, &to, width, r.clone(), c.clone());
                }
            } else {
                elementwise_at(&program, &from, &to);
            }
        }
        (bits(&x), bits(&y))
    };
    assert!(run(true) == run(false));
}
