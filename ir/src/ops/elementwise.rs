//! `elementwise`: a chain of elementwise functions in one node, so that values in between never go to memory.
//!
//! `n operands, each broadcastable to shape -> one result per output, of shape`. A register machine without jumps,
//! run once per element: registers `0..n` are the operands, instruction `i` writes register `n+i`. A register's dtype
//! follows from the rules of the single ops, and what is written to it is rounded to that dtype, so a chain means the
//! same as its single ops one after another. No gradient: the fusion pass makes it after differentiation.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::broadcast::read_at;
use super::{BinaryFn, CompareFn, Cotangents, Rule, Types, UnaryFn, cast, select};
use crate::autodiff::Vjp;
use crate::dtype::DType;
use crate::error::{Mismatch, Result, Site};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// What one instruction computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ElementFn {
    /// As [`super::Unary`].
    Unary(UnaryFn),
    /// As [`super::Binary`].
    Binary(BinaryFn),
    /// As [`super::Compare`].
    Compare(CompareFn),
    /// As [`super::Select`].
    Select,
    /// As [`super::Cast`], to this dtype.
    Cast(DType),
}

impl ElementFn {
    /// Number of arguments.
    pub fn arity(self) -> usize {
        match self {
            ElementFn::Unary(_) | ElementFn::Cast(_) => 1,
            ElementFn::Binary(_) | ElementFn::Compare(_) => 2,
            ElementFn::Select => 3,
        }
    }

    /// The dtype of the result for arguments of these dtypes.
    ///
    /// # Errors
    /// [`Mismatch`] if their number is not [`ElementFn::arity`] or the single op refuses them.
    pub fn result(self, args: &[DType]) -> Result<DType, Mismatch> {
        match (self, args) {
            (ElementFn::Unary(function), &[x]) => function.result(x),
            (ElementFn::Binary(function), &[a, b]) => function.result(a, b),
            (ElementFn::Compare(function), &[a, b]) => function.result(a, b),
            (ElementFn::Select, &[condition, a, b]) => select::result(condition, a, b),
            (ElementFn::Cast(dtype), &[_]) => Ok(dtype),
            (
                ElementFn::Unary(_)
                | ElementFn::Binary(_)
                | ElementFn::Compare(_)
                | ElementFn::Select
                | ElementFn::Cast(_),
                _,
            ) => Err(Mismatch::op(format!("{} arguments, not {}", self.arity(), args.len()))),
        }
    }

    /// The meaning of one instruction on one element, in f64: integers exact, floats not rounded. `dtypes` are those of
    /// the arguments, `result` that of the result.
    ///
    /// # Panics
    /// If there are fewer arguments than [`ElementFn::arity`]: a bug of the caller.
    pub fn evaluate(self, args: &[f64], dtypes: &[DType], result: DType) -> f64 {
        match self {
            ElementFn::Unary(function) => function.evaluate(args[0]),
            ElementFn::Binary(function) => function.evaluate(args[0], args[1], dtypes[0]),
            ElementFn::Compare(function) => f64::from(u8::from(function.evaluate(args[0], args[1]))),
            ElementFn::Select => select::evaluate(args[0], args[1], args[2]),
            ElementFn::Cast(_) => cast::evaluate(args[0], dtypes[0], result),
        }
    }
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instr {
    /// What it computes.
    pub function: ElementFn,
    /// The registers it reads, all written before it.
    pub args: SmallVec<[u32; 3]>,
}

/// A chain of elementwise functions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Elementwise {
    /// The shape of every result.
    pub shape: Shape,
    /// The instructions, in order.
    pub instrs: Vec<Instr>,
    /// The registers that are results.
    pub outputs: Vec<u32>,
}

impl Elementwise {
    /// The dtype of every register: first those of the operands, then one per instruction.
    ///
    /// # Errors
    /// [`Mismatch`] naming the first instruction that reads a register not written before it or does not suit its
    /// arguments.
    pub fn register_dtypes(&self, operands: &[DType]) -> Result<Vec<DType>, Mismatch> {
        let mut registers = operands.to_vec();
        for (i, instr) in self.instrs.iter().enumerate() {
            let read = |&r: &u32| registers.get(r as usize).copied().ok_or(r);
            let args: SmallVec<[DType; 3]> = instr.args.iter().map(read).collect::<Result<_, u32>>().map_err(|r| {
                Mismatch::op(format!("instruction {i} to read registers below {}, not {r}", registers.len()))
            })?;
            let dtype = instr.function.result(&args).map_err(|m| {
                let argument = m.operand.map_or_else(String::new, |a| format!("as argument {a} "));
                let found = args.iter().map(|d| d.name()).collect::<Vec<_>>().join(", ");
                Mismatch::op(format!(
                    "{argument}of instruction {i} ({:?}) {}, found ({found})",
                    instr.function, m.wanted
                ))
            })?;
            registers.push(dtype);
        }
        Ok(registers)
    }
}

impl Rule for Elementwise {
    const NAME: &'static str = "elementwise";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        for (i, operand) in operands.iter().enumerate() {
            if operand.shape.broadcast(&self.shape).as_ref() != Some(&self.shape) {
                return Err(Mismatch::operand(i, format!("a shape that broadcasts to {}", self.shape)));
            }
        }
        let dtypes: Vec<DType> = operands.iter().map(|t| t.dtype).collect();
        let registers = self.register_dtypes(&dtypes)?;
        if self.outputs.is_empty() {
            return Err(Mismatch::op("at least one output"));
        }
        let result = |&r: &u32| match registers.get(r as usize) {
            Some(&dtype) => Ok(TensorType::new(dtype, self.shape.clone())),
            None => Err(Mismatch::op(format!("outputs below register {}, not {r}", registers.len()))),
        };
        self.outputs.iter().map(result).collect()
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "chains are fused after differentiation")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let types: Vec<DType> = operands.iter().map(|t| t.ty.dtype).collect();
        let dtypes = self.register_dtypes(&types).unwrap_or_else(|m| unreachable!("passed the shape rule: {m:?}"));
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        let mut registers: Vec<f64> = Vec::with_capacity(dtypes.len());
        for i in 0..self.shape.elements() {
            registers.clear();
            registers.extend(operands.iter().map(|t| t.data[read_at(i, &self.shape, &t.ty.shape)]));
            for instr in &self.instrs {
                let args: SmallVec<[f64; 3]> = instr.args.iter().map(|&r| registers[r as usize]).collect();
                let from: SmallVec<[DType; 3]> = instr.args.iter().map(|&r| dtypes[r as usize]).collect();
                let to = dtypes[registers.len()];
                registers.push(to.round(instr.function.evaluate(&args, &from, to)));
            }
            for (tensor, &r) in out.iter_mut().zip(&self.outputs) {
                tensor.data[i] = registers[r as usize];
            }
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// A chain of elementwise functions; returns one value per output.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if an operand does not broadcast to the chain's shape, or an instruction or output is
    /// not legal.
    #[track_caller]
    pub fn elementwise(&mut self, op: Elementwise, operands: &[Value]) -> Result<SmallVec<[Value; 3]>> {
        self.push(op.into(), operands, Site::caller())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instr(function: ElementFn, args: &[u32]) -> Instr {
        Instr { function, args: args.into() }
    }

    #[test]
    fn a_chain_is_its_single_ops_with_their_roundings() {
        let op = Elementwise {
            shape: [2, 2].into(),
            instrs: vec![
                instr(ElementFn::Binary(BinaryFn::Add), &[0, 1]),
                instr(ElementFn::Compare(CompareFn::Gt), &[2, 0]),
                instr(ElementFn::Select, &[3, 2, 1]),
                instr(ElementFn::Cast(DType::I32), &[4]),
            ],
            outputs: vec![5, 3, 0],
        };
        let x = Tensor::new(TensorType::new(DType::Bf16, [2, 2]), vec![256.0, 1.5, -2.0, 0.0]);
        let row = Tensor::new(TensorType::new(DType::Bf16, [2]), vec![1.0, -1.0]);
        let types = op.infer(&[x.ty.clone(), row.ty.clone()]).unwrap();
        assert_eq!(types.iter().map(ToString::to_string).collect::<Vec<_>>(), ["i32[2,2]", "bool[2,2]", "bf16[2,2]"]);
        let out = op.reference(&[&x, &row], &types);
        // 256 + 1 rounds to 256 in bf16, which is not above 256, so the row's 1 is chosen.
        assert_eq!(out[0].data, [1.0, -1.0, -1.0, -1.0]);
        assert_eq!(out[1].data, [0.0, 0.0, 1.0, 0.0]);
        assert_eq!(out[2].data, x.data);
        let text = serde_json::to_string(&op).unwrap();
        assert!(text.contains(r#"{"function":{"binary":"add"},"args":[0,1]}"#), "{text}");
        assert_eq!(serde_json::from_str::<Elementwise>(&text).unwrap(), op);
    }

    #[test]
    fn illegal_chains_name_the_instruction() {
        let with = |instrs: Vec<Instr>, outputs: Vec<u32>| Elementwise { shape: [2].into(), instrs, outputs };
        let wanted = |op: Elementwise| op.infer(&[TensorType::f32([2])]).unwrap_err().wanted;
        let exp = ElementFn::Unary(UnaryFn::Exp);
        assert!(
            wanted(with(vec![instr(exp, &[1])], vec![1])).contains("instruction 0 to read registers below 1, not 1")
        );
        assert!(wanted(with(vec![instr(exp, &[0, 0])], vec![1])).contains("1 arguments, not 2"));
        let select = instr(ElementFn::Select, &[0, 0, 0]);
        assert!(wanted(with(vec![select], vec![1])).contains("as argument 0 of instruction 0 (Select) bool"));
        assert!(wanted(with(vec![], vec![])).contains("at least one output"));
        assert!(wanted(with(vec![instr(exp, &[0])], vec![2])).contains("below register 2"));
        let op = with(vec![instr(exp, &[0])], vec![1]);
        assert_eq!(op.infer(&[TensorType::f32([3])]).unwrap_err().operand, Some(0));
        let dtypes = op.register_dtypes(&[DType::F16]).unwrap();
        assert_eq!(dtypes, [DType::F16, DType::F16]);
    }
}
