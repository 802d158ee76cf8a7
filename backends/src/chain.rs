//! What the kernels of fused elementwise chains have in common: which operands are read and where, and the statements of the chain
//! in the language of the kernels.

use std::fmt::Write;

use moebius_ir::ops::{BinaryFn, CompareFn, ElementFn, Elementwise, Literal, UnaryFn};
use moebius_ir::{DType, Graph, Node, Op};

use crate::views::stretched;

/// A chain as its kernel sees it.
pub(crate) struct Chain<'a> {
    op: &'a Elementwise,
    /// Of each register; those of the operands come first.
    pub(crate) dtypes: Vec<DType>,
    /// The value of each operand that is one constant everywhere.
    pub(crate) splats: Vec<Option<f64>>,
    /// The operands that are read from memory, in the order of `axes`.
    pub(crate) loaded: Vec<usize>,
    /// How those are walked.
    pub(crate) axes: Axes,
    /// Elements of each result.
    pub(crate) elements: usize,
}

impl<'a> Chain<'a> {
    /// The chain of a node.
    ///
    /// # Errors
    /// What is wanted instead of its dtypes.
    pub(crate) fn of(graph: &Graph, node: &Node, op: &'a Elementwise) -> Result<Chain<'a>, String> {
        let dtypes: Vec<DType> = node.operands.iter().map(|&v| graph.ty(v).dtype).collect();
        let dtypes = op.register_dtypes(&dtypes).map_err(|m| m.wanted)?;
        let splat = |v: &moebius_ir::Value| {
            let Op::Constant(constant) = &graph.node(graph.producer(*v)).op else { return None };
            let Literal::Splat(value) = constant.literal else { return None };
            Some(value)
        };
        let splats: Vec<Option<f64>> = node.operands.iter().map(splat).collect();
        let loaded: Vec<usize> = (0..splats.len()).filter(|&i| splats[i].is_none()).collect();
        let strides: Vec<Vec<usize>> =
            loaded.iter().map(|&i| stretched(&graph.ty(node.operands[i]).shape, &op.shape).to_vec()).collect();
        let axes = Axes::joined(&op.shape, &strides);
        Ok(Chain { op, dtypes, splats, loaded, axes, elements: op.shape.elements() })
    }

    /// The statements that give every register of the chain its value, those of the operands first: a loaded one that of
    /// `element`, an expression for the operand at this place of `loaded`.
    pub(crate) fn statements(&self, language: &dyn Language, element: impl Fn(usize) -> String) -> String {
        let mut text = String::new();
        let mut let_be = |r: usize, value: String| {
            let _ = writeln!(text, "    {} = {value};", language.declare(r, self.dtypes[r]));
        };
        for (i, &splat) in self.splats.iter().enumerate() {
            let value = match (splat, self.loaded.iter().position(|&l| l == i)) {
                (Some(value), _) => language.literal(self.dtypes[i], value),
                (None, Some(at)) => element(at),
                (None, None) => unreachable!("an operand is a splat or loaded"),
            };
            let_be(i, value);
        }
        for (at, instr) in self.op.instrs.iter().enumerate() {
            let target = self.splats.len() + at;
            let dtype = self.dtypes[target];
            let args: Vec<String> = instr.args.iter().map(|r| format!("r{r}")).collect();
            let of: Vec<DType> = instr.args.iter().map(|&r| self.dtypes[r as usize]).collect();
            let value = match instr.function {
                ElementFn::Unary(f) => language.call(unary(f), dtype, of[0], &args),
                ElementFn::Binary(f) => language.call(binary(f), dtype, of[0], &args),
                ElementFn::Compare(f) => language.compare(compare(f), &args),
                ElementFn::Select => language.select(&args),
                ElementFn::Cast(to) => language.convert(to, of[0], &args[0]),
            };
            // A half-width value in the middle of a chain is rounded there, as it would be in memory.
            let value = match dtype {
                DType::Bf16 => format!("round_bf16({value})"),
                DType::F16 => format!("round_f16({value})"),
                DType::F32 | DType::I32 | DType::U32 | DType::Bool => value,
            };
            let_be(target, value);
        }
        text
    }

    /// The registers of the results with their dtypes.
    pub(crate) fn results(&self) -> impl Iterator<Item = (u32, DType)> {
        self.op.outputs.iter().map(|&r| (r, self.dtypes[r as usize]))
    }
}

/// Whether the quick form of a function, by what the device itself has of e^x, is enough for a result: one of 16 bits. `None` for a
/// function that has none.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn is_quick(function: &str, result: DType) -> Option<bool> {
    let has = ["fn_sigmoid", "fn_gelu_tanh", "fn_silu", "fn_gelu_tanh_grad", "fn_silu_grad"].contains(&function);
    has.then_some(matches!(result, DType::Bf16 | DType::F16))
}

/// The language of a backend's kernels. Register `i` is called `ri`; floats of all widths are f32 in registers.
pub(crate) trait Language {
    /// The left side of the definition of a register.
    fn declare(&self, register: usize, dtype: DType) -> String;
    /// A constant of a dtype, bit for bit.
    fn literal(&self, dtype: DType, value: f64) -> String;
    /// The function of this name on arguments of a dtype.
    fn call(&self, function: &str, result: DType, arguments: DType, args: &[String]) -> String;
    /// A comparison, as a register of bools has it.
    fn compare(&self, sign: &str, args: &[String]) -> String;
    /// The second or the third argument, as the first says.
    fn select(&self, args: &[String]) -> String;
    /// An argument converted to a dtype.
    fn convert(&self, to: DType, from: DType, arg: &str) -> String;
}

fn unary(function: UnaryFn) -> &'static str {
    match function {
        UnaryFn::Neg => "fn_neg",
        UnaryFn::Exp => "fn_exp",
        UnaryFn::Ln => "fn_ln",
        UnaryFn::Sqrt => "fn_sqrt",
        UnaryFn::Rsqrt => "fn_rsqrt",
        UnaryFn::Reciprocal => "fn_reciprocal",
        UnaryFn::Tanh => "fn_tanh",
        UnaryFn::Sigmoid => "fn_sigmoid",
        UnaryFn::GeluTanh => "fn_gelu_tanh",
        UnaryFn::GeluErf => "fn_gelu_erf",
        UnaryFn::Silu => "fn_silu",
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

fn binary(function: BinaryFn) -> &'static str {
    match function {
        BinaryFn::Add => "fn_add",
        BinaryFn::Sub => "fn_sub",
        BinaryFn::Mul => "fn_mul",
        BinaryFn::Div => "fn_div",
        BinaryFn::Max => "fn_max",
        BinaryFn::Min => "fn_min",
        BinaryFn::Pow => "fn_pow",
        BinaryFn::GeluTanhGrad => "fn_gelu_tanh_grad",
        BinaryFn::GeluErfGrad => "fn_gelu_erf_grad",
        BinaryFn::SiluGrad => "fn_silu_grad",
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

/// The axes of a chain as its kernel walks them.
#[derive(Debug, PartialEq)]
pub(crate) struct Axes {
    pub(crate) extents: Vec<usize>,
    /// Of each operand, 0 where it is stretched.
    pub(crate) strides: Vec<Vec<usize>>,
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

    /// Where operand `i` is read, as an expression of the flat index `i` and the coordinates `c0`, `c1`, .., which `wide` turns into
    /// the type of an index.
    pub(crate) fn index(&self, i: usize, wide: &str) -> String {
        let strides = &self.strides[i];
        if self.is_flat(i) {
            return "i".into();
        }
        let terms: Vec<String> = strides
            .iter()
            .enumerate()
            .filter(|(_, s)| **s > 0)
            .map(|(axis, s)| format!("{wide}c{axis} * {s}"))
            .collect();
        if terms.is_empty() { "0".into() } else { terms.join(" + ") }
    }

    /// Whether some operand is read by the coordinates.
    pub(crate) fn has_coordinates(&self) -> bool {
        !(0..self.strides.len()).all(|i| self.is_flat(i) || self.strides[i].iter().all(|s| *s == 0))
    }

    #[cfg(any(feature = "cuda", feature = "vulkan", test))]
    /// Elements that a thread may take together: at each of its places an operand then has as many that lie together, at a
    /// multiple of their bytes, or the same one for all.
    pub(crate) fn together(&self, wanted: usize) -> bool {
        let fits = |strides: &Vec<usize>| match strides.split_last() {
            Some((0, _)) => true,
            Some((1, outer)) => outer.iter().all(|s| s.is_multiple_of(wanted)),
            Some(_) | None => false,
        };
        self.extents.last().is_some_and(|n| n.is_multiple_of(wanted)) && self.strides.iter().all(fits)
    }

    #[cfg(any(feature = "cuda", feature = "vulkan"))]
    /// Whether operand `i` is the same for all elements that a thread takes.
    pub(crate) fn is_stretched(&self, i: usize) -> bool {
        self.strides[i].last().is_none_or(|s| *s == 0)
    }

    /// Whether operand `i` lies in memory like the result.
    pub(crate) fn is_flat(&self, i: usize) -> bool {
        let mut inner = 1;
        self.extents.iter().zip(&self.strides[i]).rev().all(|(extent, stride)| {
            let flat = *stride == inner;
            inner *= extent;
            flat
        })
    }
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
        assert_eq!((axes.index(0, "(i64)"), axes.index(1, "(i64)")), ("i".into(), "0".into()));
    }

    #[test]
    fn a_row_and_a_column_keep_the_axes_apart() {
        let axes = joined(&[5, 2, 3], &[&[0, 3, 1], &[1, 0, 0], &[6, 3, 1]]);
        assert_eq!(axes.extents, [5, 6]);
        assert_eq!(
            (axes.index(0, "(i64)"), axes.index(1, "(i64)"), axes.index(2, "(i64)")),
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
}
