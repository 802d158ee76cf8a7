//! A fused elementwise chain as one kernel, whose text is written here: a register for each register of the chain.

use std::fmt::Write;

use moebius_ir::ops::{BinaryFn, CompareFn, ElementFn, Elementwise, Literal, UnaryFn};
use moebius_ir::{DType, Graph, Node, Op};

use super::Lowered;
use super::movement::stretched;
use crate::cuda::launch::{Arg, Launch};
use crate::cuda::source::{FUNCTIONS, Source, VECTORS};

const THREADS: usize = 256;
/// From here on a thread takes several elements: with fewer, more threads are faster.
const MANY: usize = 4096;

/// The type an element is stored as.
fn stored(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::I32 => "int",
        DType::U32 => "u32",
        DType::Bool => "u8",
    }
}

/// The type of a register.
fn register(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => "float",
        DType::I32 => "int",
        DType::U32 => "u32",
        DType::Bool => "u8",
    }
}

/// A function's name; of those that have one, the quick form for a result of 16 bits.
fn unary(function: UnaryFn, half: bool) -> &'static str {
    let quick = |exact, quick| if half { quick } else { exact };
    match function {
        UnaryFn::Neg => "fn_neg",
        UnaryFn::Exp => "fn_exp",
        UnaryFn::Ln => "fn_ln",
        UnaryFn::Sqrt => "fn_sqrt",
        UnaryFn::Rsqrt => "fn_rsqrt",
        UnaryFn::Reciprocal => "fn_reciprocal",
        UnaryFn::Tanh => "fn_tanh",
        UnaryFn::Sigmoid => quick("fn_sigmoid<0>", "fn_sigmoid<1>"),
        UnaryFn::GeluTanh => quick("fn_gelu_tanh<0>", "fn_gelu_tanh<1>"),
        UnaryFn::GeluErf => "fn_gelu_erf",
        UnaryFn::Silu => quick("fn_silu<0>", "fn_silu<1>"),
        UnaryFn::Relu => "fn_relu",
        UnaryFn::Abs => "fn_abs",
        UnaryFn::Sign => "fn_sign",
        UnaryFn::Square => "fn_square",
        UnaryFn::Sin => "fn_sin",
        UnaryFn::Cos => "fn_cos",
        UnaryFn::Floor => "fn_floor",
        UnaryFn::IsFinite => "fn_is_finite",
        UnaryFn::Not => "fn_not",
    }
}

fn binary(function: BinaryFn, half: bool) -> &'static str {
    let quick = |exact, quick| if half { quick } else { exact };
    match function {
        BinaryFn::Add => "fn_add",
        BinaryFn::Sub => "fn_sub",
        BinaryFn::Mul => "fn_mul",
        BinaryFn::Div => "fn_div",
        BinaryFn::Max => "fn_max",
        BinaryFn::Min => "fn_min",
        BinaryFn::Pow => "fn_pow",
        BinaryFn::GeluTanhGrad => quick("fn_gelu_tanh_grad<0>", "fn_gelu_tanh_grad<1>"),
        BinaryFn::GeluErfGrad => "fn_gelu_erf_grad",
        BinaryFn::SiluGrad => quick("fn_silu_grad<0>", "fn_silu_grad<1>"),
        BinaryFn::ReluGrad => "fn_relu_grad",
    }
}

fn compare(function: CompareFn) -> &'static str {
    match function {
        CompareFn::Eq => "==",
        CompareFn::Ne => "!=",
        CompareFn::Lt => "<",
        CompareFn::Le => "<=",
        CompareFn::Gt => ">",
        CompareFn::Ge => ">=",
    }
}

fn convert(to: DType) -> &'static str {
    match to {
        DType::F32 | DType::Bf16 | DType::F16 => "to_f32",
        DType::I32 => "to_int",
        DType::U32 => "to_uint",
        DType::Bool => "to_bool",
    }
}

/// A constant of a dtype in the kernel's language, bit for bit.
fn literal(dtype: DType, value: f64) -> String {
    let value = dtype.round(value);
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => format!("__uint_as_float(0x{:08x}u)", (value as f32).to_bits()),
        DType::I32 => format!("(int)0x{:08x}u", value as i32),
        DType::U32 => format!("0x{:08x}u", value as u32),
        DType::Bool => format!("(u8){}", u8::from(value != 0.0)),
    }
}

/// The axes of a chain as its kernel walks them.
#[derive(Debug, PartialEq)]
struct Axes {
    extents: Vec<usize>,
    /// Of each operand, 0 where it is stretched.
    strides: Vec<Vec<usize>>,
}

impl Axes {
    /// Without axes of one element, and with neighbours joined that all operands walk as one.
    fn joined(shape: &[usize], strides: &[Vec<usize>]) -> Axes {
        let mut axes = Axes { extents: Vec::new(), strides: vec![Vec::new(); strides.len()] };
        for i in (0..shape.len()).filter(|&i| shape[i] != 1) {
            let one_walk = |(mine, all): (&Vec<usize>, &Vec<usize>)| mine.last() == Some(&(all[i] * shape[i]));
            if !axes.extents.is_empty() && axes.strides.iter().zip(strides).all(one_walk) {
                *axes.extents.last_mut().unwrap_or_else(|| unreachable!("not empty")) *= shape[i];
                axes.strides.iter_mut().zip(strides).for_each(|(mine, all)| {
                    mine.pop();
                    mine.push(all[i]);
                });
            } else {
                axes.extents.push(shape[i]);
                axes.strides.iter_mut().zip(strides).for_each(|(mine, all)| mine.push(all[i]));
            }
        }
        axes
    }

    /// Where operand `i` is read, as an expression of the flat index and the coordinates.
    fn index(&self, i: usize) -> String {
        let strides = &self.strides[i];
        if self.is_flat(i) {
            return "i".into();
        }
        let terms: Vec<String> = strides
            .iter()
            .enumerate()
            .filter(|(_, s)| **s > 0)
            .map(|(axis, s)| format!("(i64)c{axis} * {s}"))
            .collect();
        if terms.is_empty() { "0".into() } else { terms.join(" + ") }
    }

    /// Elements that a thread may take together: at each of its places an operand then has as many that lie together, at a
    /// multiple of their bytes, or the same one for all.
    fn together(&self, wanted: usize) -> bool {
        let fits = |strides: &Vec<usize>| match strides.split_last() {
            Some((0, _)) => true,
            Some((1, outer)) => outer.iter().all(|s| s.is_multiple_of(wanted)),
            Some(_) | None => false,
        };
        self.extents.last().is_some_and(|n| n.is_multiple_of(wanted)) && self.strides.iter().all(fits)
    }

    /// Whether operand `i` is the same for all elements that a thread takes.
    fn is_stretched(&self, i: usize) -> bool {
        self.strides[i].last().is_none_or(|s| *s == 0)
    }

    /// Whether operand `i` lies in memory like the result.
    fn is_flat(&self, i: usize) -> bool {
        let mut inner = 1;
        self.extents.iter().zip(&self.strides[i]).rev().all(|(extent, stride)| {
            let flat = *stride == inner;
            inner *= extent;
            flat
        })
    }
}

pub(super) fn lower_elementwise(graph: &Graph, node: &Node, op: &Elementwise) -> Lowered {
    let operands = node.operands.len();
    let dtypes: Vec<DType> = node.operands.iter().map(|&v| graph.ty(v).dtype).collect();
    let dtypes = op.register_dtypes(&dtypes).map_err(|m| m.wanted)?;
    let splats: Vec<Option<f64>> = node
        .operands
        .iter()
        .map(|&v| {
            let Op::Constant(constant) = &graph.node(graph.producer(v)).op else { return None };
            let Literal::Splat(value) = constant.literal else { return None };
            Some(value)
        })
        .collect();
    let loaded: Vec<usize> = (0..operands).filter(|&i| splats[i].is_none()).collect();
    let strides: Vec<Vec<usize>> =
        loaded.iter().map(|&i| stretched(&graph.ty(node.operands[i]).shape, &op.shape).to_vec()).collect();
    let axes = Axes::joined(&op.shape, &strides);
    let elements = op.shape.elements();

    let mut parameters = vec!["i64 n".to_owned()];
    let mut args = vec![Arg::size(elements)];
    for &i in &loaded {
        parameters.push(format!("const {}* p{i}", stored(dtypes[i])));
        args.push(Arg::Operand(i));
    }
    for (o, &value) in node.results.iter().enumerate() {
        parameters.push(format!("{}* o{o}", stored(graph.ty(value).dtype)));
        args.push(Arg::Result(o));
    }
    // 16 bytes of the narrowest floats, if that many elements lie together.
    let halves = dtypes.iter().any(|d| d.is_float() && d.bytes() == 2);
    let sizes: &[usize] = if halves { &[8, 4] } else { &[4] };
    let many = sizes.iter().copied().find(|&n| elements >= MANY && axes.together(n));
    let own = many.unwrap_or(1);
    let mut body = format!("KERNEL elementwise({}) {{\n    begin();\n", parameters.join(", "));
    let _ = writeln!(body, "    i64 i = ((i64)blockIdx.x * {THREADS} + threadIdx.x) * {own};\n    if (i >= n) return;");
    if !(0..loaded.len()).all(|l| axes.is_flat(l) || axes.strides[l].iter().all(|s| *s == 0)) {
        // Division of 32-bit numbers is many times faster.
        let index = if elements <= i32::MAX as usize { "u32" } else { "u64" };
        let _ = writeln!(body, "    {index} rest = ({index})i;");
        for (axis, extent) in axes.extents.iter().enumerate().rev() {
            let _ = writeln!(body, "    {index} c{axis} = rest % {extent}u; rest /= {extent}u;");
        }
    }
    if many.is_some() {
        for (at, i) in loaded.iter().enumerate() {
            let index = axes.index(at);
            let _ = match axes.is_stretched(at) {
                true => writeln!(body, "    {} v{i} = p{i}[{index}];", stored(dtypes[*i])),
                false => writeln!(body, "    auto v{i} = load_vector<{own}>(p{i} + {index});"),
            };
        }
        for (o, &value) in node.results.iter().enumerate() {
            let _ = writeln!(body, "    Vector<{}, {own}> w{o};", stored(graph.ty(value).dtype));
        }
        let _ = writeln!(body, "#pragma unroll\n    for (int j = 0; j < {own}; j++) {{");
    }
    for i in 0..operands {
        let ty = register(dtypes[i]);
        let element = |at: usize| match (many.is_some(), axes.is_stretched(at)) {
            (false, _) => format!("p{i}[{}]", axes.index(at)),
            (true, true) => format!("v{i}"),
            (true, false) => format!("v{i}.at[j]"),
        };
        let value = match (splats[i], loaded.iter().position(|&l| l == i)) {
            (Some(value), _) => literal(dtypes[i], value),
            (None, Some(at)) if dtypes[i].is_float() => format!("to_float({})", element(at)),
            (None, Some(at)) => element(at),
            (None, None) => unreachable!("an operand is a splat or loaded"),
        };
        let _ = writeln!(body, "    {ty} r{i} = {value};");
    }
    for (at, instr) in op.instrs.iter().enumerate() {
        let target = operands + at;
        let a = |i: usize| format!("r{}", instr.args[i]);
        let half = matches!(dtypes[target], DType::Bf16 | DType::F16);
        let value = match instr.function {
            ElementFn::Unary(f) => format!("{}({})", unary(f, half), a(0)),
            ElementFn::Binary(f) => format!("{}({}, {})", binary(f, half), a(0), a(1)),
            ElementFn::Compare(f) => format!("{} {} {}", a(0), compare(f), a(1)),
            ElementFn::Select => format!("{} ? {} : {}", a(0), a(1), a(2)),
            ElementFn::Cast(to) => format!("{}({})", convert(to), a(0)),
        };
        // A half-width value in the middle of a chain is rounded there, as it would be in memory.
        let value = match dtypes[target] {
            DType::Bf16 => format!("round_bf16({value})"),
            DType::F16 => format!("round_f16({value})"),
            DType::F32 | DType::I32 | DType::U32 | DType::Bool => value,
        };
        let _ = writeln!(body, "    {} r{target} = {value};", register(dtypes[target]));
    }
    for (o, &r) in op.outputs.iter().enumerate() {
        let dtype = dtypes[r as usize];
        let value = if dtype.is_float() { format!("from_float<{}>(r{r})", stored(dtype)) } else { format!("r{r}") };
        let place = if many.is_some() { format!("w{o}.at[j]") } else { format!("o{o}[i]") };
        let _ = writeln!(body, "    {place} = {value};");
    }
    if many.is_some() {
        body.push_str("    }\n");
        for o in 0..node.results.len() {
            let _ = writeln!(body, "    store_vector<{own}>(o{o} + i, w{o});");
        }
    }
    body.push_str("}\n");
    let source = Source::generated("elementwise.cu", &[FUNCTIONS, VECTORS], body).exact();
    Ok(Launch::one(source, "elementwise", [(elements / own).div_ceil(THREADS), 1, 1], THREADS as u32, args))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(shape: &[usize], strides: &[&[usize]]) -> Axes {
        Axes::joined(shape, &strides.iter().map(|s| s.to_vec()).collect::<Vec<_>>())
    }

    #[test]
    fn operands_of_the_same_shape_are_walked_as_one_axis() {
        let axes = joined(&[2, 1, 3, 4], &[&[12, 12, 4, 1], &[0, 0, 0, 0]]);
        assert_eq!(axes, Axes { extents: vec![24], strides: vec![vec![1], vec![0]] });
        assert_eq!((axes.index(0), axes.index(1)), ("i".into(), "0".into()));
    }

    #[test]
    fn a_row_and_a_column_keep_the_axes_apart() {
        let axes = joined(&[5, 2, 3], &[&[0, 3, 1], &[1, 0, 0], &[6, 3, 1]]);
        assert_eq!(axes.extents, [5, 6]);
        assert_eq!(
            (axes.index(0), axes.index(1), axes.index(2)),
            ("(i64)c1 * 1".into(), "(i64)c0 * 1".into(), "i".into())
        );
    }

    /// The index of every operand at every element, against the strides themselves.
    #[test]
    fn joined_axes_read_the_same_elements() {
        let shape = [3, 1, 4, 2, 5];
        let views: [&[usize]; 4] = [&[40, 40, 10, 5, 1], &[0, 0, 10, 5, 1], &[4, 4, 1, 0, 0], &[0, 0, 0, 1, 0]];
        let axes = joined(&shape, &views);
        for i in 0..shape.iter().product::<usize>() {
            let at = |extents: &[usize], strides: &[usize]| {
                let mut rest = i;
                extents.iter().zip(strides).rev().fold(0, |sum, (extent, stride)| {
                    let c = rest % extent;
                    rest /= extent;
                    sum + c * stride
                })
            };
            for (view, mine) in views.iter().zip(&axes.strides) {
                assert_eq!(at(&axes.extents, mine), at(&shape, view), "element {i}");
            }
        }
    }

    #[test]
    fn elements_are_taken_together_where_every_operand_has_them_so() {
        assert!(joined(&[64, 40], &[&[40, 1], &[0, 1], &[1, 0]]).together(8));
        // A row of 36 begins at multiples of 4 only, and a transposed operand nowhere.
        let rows = joined(&[64, 36], &[&[36, 1], &[0, 1]]);
        assert_eq!((rows.together(8), rows.together(4)), (false, true));
        assert!(!joined(&[64, 40], &[&[40, 1], &[1, 64]]).together(4));
        assert!(!joined(&[], &[&[]]).together(4));
    }

    #[test]
    fn constants_keep_their_bits() {
        assert_eq!(literal(DType::F32, 0.1), "__uint_as_float(0x3dcccccdu)");
        assert_eq!(literal(DType::Bf16, f64::NEG_INFINITY), "__uint_as_float(0xff800000u)");
        assert_eq!(literal(DType::I32, -1.0), "(int)0xffffffffu");
        assert_eq!((literal(DType::U32, 4e9), literal(DType::Bool, 1.0)), ("0xee6b2800u".into(), "(u8)1".into()));
    }
}
