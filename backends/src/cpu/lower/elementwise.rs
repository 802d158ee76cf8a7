//! Launch of a fused elementwise chain: the IR's registers, one per instruction, are mapped onto the few that the kernel
//! keeps in the first-level cache.

use std::ops::Range;

use moebius_ir::ops::{BinaryFn, CompareFn, ElementFn, Elementwise, Literal, UnaryFn};
use moebius_ir::{DType, Graph, Node, Op, Shape};
use smallvec::SmallVec;

use super::Lowered;
use super::args::{Args, Launch};
use crate::cpu::kernels::elementwise::{
    Action, Binary, Compare, Constant, Input, Instr, Kind, MAX_DIMS, MAX_OUTPUTS, MAX_REGISTERS, Output, Program,
    Register, Storage, Unary, elementwise_at, elementwise_part,
};

fn storage(dtype: DType) -> Storage {
    match dtype {
        DType::F32 => Storage::F32,
        DType::Bf16 => Storage::Bf16,
        DType::F16 => Storage::F16,
        DType::I32 => Storage::I32,
        DType::U32 => Storage::U32,
        DType::Bool => Storage::Bool,
    }
}

fn unary(function: UnaryFn) -> Unary {
    match function {
        UnaryFn::Neg => Unary::Neg,
        UnaryFn::Exp => Unary::Exp,
        UnaryFn::Ln => Unary::Ln,
        UnaryFn::Sqrt => Unary::Sqrt,
        UnaryFn::Rsqrt => Unary::Rsqrt,
        UnaryFn::Reciprocal => Unary::Reciprocal,
        UnaryFn::Tanh => Unary::Tanh,
        UnaryFn::Sigmoid => Unary::Sigmoid,
        UnaryFn::GeluTanh => Unary::GeluTanh,
        UnaryFn::GeluErf => Unary::GeluErf,
        UnaryFn::Silu => Unary::Silu,
        UnaryFn::Relu => Unary::Relu,
        UnaryFn::Abs => Unary::Abs,
        UnaryFn::Sign => Unary::Sign,
        UnaryFn::Square => Unary::Square,
        UnaryFn::Sin => Unary::Sin,
        UnaryFn::Cos => Unary::Cos,
        UnaryFn::Floor => Unary::Floor,
        UnaryFn::IsFinite => Unary::IsFinite,
        UnaryFn::Not => Unary::Not,
    }
}

fn binary(function: BinaryFn) -> Binary {
    match function {
        BinaryFn::Add => Binary::Add,
        BinaryFn::Sub => Binary::Sub,
        BinaryFn::Mul => Binary::Mul,
        BinaryFn::Div => Binary::Div,
        BinaryFn::Max => Binary::Max,
        BinaryFn::Min => Binary::Min,
        BinaryFn::Pow => Binary::Pow,
        BinaryFn::GeluTanhGrad => Binary::GeluTanhGrad,
        BinaryFn::GeluErfGrad => Binary::GeluErfGrad,
        BinaryFn::SiluGrad => Binary::SiluGrad,
        BinaryFn::ReluGrad => Binary::ReluGrad,
    }
}

fn compare(function: CompareFn) -> Compare {
    match function {
        CompareFn::Eq => Compare::Eq,
        CompareFn::Ne => Compare::Ne,
        CompareFn::Lt => Compare::Lt,
        CompareFn::Le => Compare::Le,
        CompareFn::Gt => Compare::Gt,
        CompareFn::Ge => Compare::Ge,
    }
}

/// Strides of an operand seen under `shape`, 0 where it is stretched.
fn strides(operand: &Shape, shape: &Shape) -> SmallVec<[usize; MAX_DIMS]> {
    let own = operand.strides();
    let lead = shape.len() - operand.len();
    (0..shape.len()).map(|i| if i < lead || operand[i - lead] == 1 { 0 } else { own[i - lead] }).collect()
}

/// The value of an operand that is a constant, the same everywhere.
fn splat(graph: &Graph, node: &Node, i: usize) -> Option<Constant> {
    let Op::Constant(constant) = &graph.node(graph.producer(node.operands[i])).op else { return None };
    let Literal::Splat(value) = constant.literal else { return None };
    let value = constant.ty.dtype.round(value);
    Some(match storage(constant.ty.dtype).kind() {
        Kind::F32 => Constant::F32(value as f32),
        Kind::I32 => Constant::I32(value as i32),
        Kind::U32 => Constant::U32(value as u32),
        Kind::Bool => Constant::Bool(value != 0.0),
    })
}

/// Kernel registers handed out while the instructions are translated.
struct Registers {
    free: Vec<Register>,
    next: usize,
}

impl Registers {
    fn take(&mut self) -> Result<Register, String> {
        if let Some(register) = self.free.pop() {
            return Ok(register);
        }
        if self.next == MAX_REGISTERS {
            return Err(format!("a chain that needs at most {MAX_REGISTERS} registers at a time"));
        }
        self.next += 1;
        Ok((self.next - 1) as Register)
    }
}

/// A fused chain, ready to run on the memory of its operands and results.
pub(super) struct Chain {
    program: Program,
    /// The operands that are loaded, in the order of the program.
    loaded: Vec<usize>,
    results: usize,
}

/// The addresses of a chain's operands and results.
pub(super) struct ChainMemory {
    from: [*const u8; MAX_REGISTERS],
    to: [*mut u8; MAX_OUTPUTS],
}

// SAFETY: only `Chain` reads the addresses, as the contracts of its functions say.
unsafe impl Sync for ChainMemory {}

impl Chain {
    /// The memory of a step whose operands and results from these places on are the chain's.
    pub(super) fn memory(&self, args: &Args<'_>, operand: usize, result: usize) -> ChainMemory {
        let mut memory =
            ChainMemory { from: [std::ptr::null(); MAX_REGISTERS], to: [std::ptr::null_mut(); MAX_OUTPUTS] };
        for (from, &i) in memory.from.iter_mut().zip(&self.loaded) {
            *from = args.operand_ptr(operand + i);
        }
        (0..self.results).for_each(|i| memory.to[i] = args.result_ptr(result + i));
        memory
    }

    /// Runs all elements.
    fn run(&self, memory: &ChainMemory) {
        // SAFETY: planned memory of each value's type. A result shares memory only with an operand of its own type and
        // shape that the plan lets it overwrite, which the kernel allows.
        unsafe { elementwise_at(&self.program, &memory.from[..self.loaded.len()], &memory.to[..self.results]) }
    }

    /// Runs a part of the elements, seen as rows of `width`, on the calling thread.
    ///
    /// # Safety
    /// Nobody else uses these elements of the results, or writes those of the operands.
    pub(super) unsafe fn run_part(&self, memory: &ChainMemory, width: usize, rows: Range<usize>, cols: Range<usize>) {
        let (from, to) = (&memory.from[..self.loaded.len()], &memory.to[..self.results]);
        // SAFETY: as in `run`, and by the caller's contract.
        unsafe { elementwise_part(&self.program, from, to, width, rows, cols) }
    }
}

pub(super) fn lower_elementwise(graph: &Graph, node: &Node, op: &Elementwise) -> Lowered {
    let chain = lower_chain(graph, node, op)?;
    Ok(Launch::new(0, move |a| chain.run(&chain.memory(a, 0, 0))))
}

/// The chain of a node.
pub(super) fn lower_chain(graph: &Graph, node: &Node, op: &Elementwise) -> Result<Chain, String> {
    let operands = node.operands.len();
    let dtypes: Vec<DType> = node.operands.iter().map(|&v| graph.ty(v).dtype).collect();
    let dtypes = op.register_dtypes(&dtypes).map_err(|m| m.wanted)?;

    // Operands that are splats become constants of the program; the kernel numbers those after the others.
    let splats: Vec<Option<Constant>> = (0..operands).map(|i| splat(graph, node, i)).collect();
    let loaded: Vec<usize> = (0..operands).filter(|&i| splats[i].is_none()).collect();
    let constants: Vec<Constant> = splats.iter().flatten().copied().collect();
    let inputs: Vec<Input> = loaded
        .iter()
        .map(|&i| {
            let ty = graph.ty(node.operands[i]);
            Input { storage: storage(ty.dtype), strides: strides(&ty.shape, &op.shape) }
        })
        .collect();
    if operands > MAX_REGISTERS {
        return Err(format!("at most {MAX_REGISTERS} operands"));
    }
    let mut place: Vec<Option<Register>> = vec![None; operands + op.instrs.len()];
    let in_order = loaded.iter().copied().chain((0..operands).filter(|&i| splats[i].is_some()));
    in_order.enumerate().for_each(|(register, i)| place[i] = Some(register as Register));

    let mut last_use = vec![0usize; place.len()];
    for (at, instr) in op.instrs.iter().enumerate() {
        instr.args.iter().for_each(|&a| last_use[a as usize] = at);
    }
    let is_output = |r: usize| op.outputs.contains(&(r as u32));
    let mut registers = Registers { free: Vec::new(), next: operands };
    let mut instrs: Vec<Instr> = Vec::with_capacity(op.instrs.len());
    for (at, instr) in op.instrs.iter().enumerate() {
        let target = operands + at;
        let arg =
            |i: usize| place[instr.args[i] as usize].unwrap_or_else(|| unreachable!("written by an earlier step"));
        let out = registers.take()?;
        let action = match instr.function {
            ElementFn::Unary(f) => Action::Unary { op: unary(f), x: arg(0) },
            ElementFn::Binary(f) => Action::Binary { op: binary(f), a: arg(0), b: arg(1) },
            ElementFn::Compare(f) => Action::Compare { op: compare(f), a: arg(0), b: arg(1) },
            ElementFn::Select => Action::Select { condition: arg(0), a: arg(1), b: arg(2) },
            ElementFn::Cast(to) => Action::Cast { x: arg(0), to: storage(to).kind() },
        };
        instrs.push(Instr { action, out });
        place[target] = Some(out);
        // A half-width value in the middle of a chain is rounded there, as it would be in memory.
        let round = match dtypes[target] {
            DType::Bf16 => Some(Unary::RoundBf16),
            DType::F16 => Some(Unary::RoundF16),
            DType::F32 | DType::I32 | DType::U32 | DType::Bool => None,
        };
        if let Some(round) = round.filter(|_| last_use[target] > at) {
            let rounded = registers.take()?;
            instrs.push(Instr { action: Action::Unary { op: round, x: out }, out: rounded });
            registers.free.push(out);
            place[target] = Some(rounded);
        }
        let mut done: SmallVec<[usize; 4]> = instr.args.iter().map(|&a| a as usize).collect();
        done.push(target);
        done.sort_unstable();
        done.dedup();
        for r in done {
            // The target of a dead instruction is free at once.
            let over = if r == target { last_use[r] <= at } else { last_use[r] == at };
            if r >= operands && over && !is_output(r) {
                registers.free.extend(place[r]);
            }
        }
    }
    let outputs: Vec<Output> = op
        .outputs
        .iter()
        .zip(&node.results)
        .map(|(&r, &result)| {
            let register = place[r as usize].unwrap_or_else(|| unreachable!("checked by the shape rule"));
            Output { storage: storage(graph.ty(result).dtype), register }
        })
        .collect();
    let program = Program::new(&op.shape, &inputs, &constants, &instrs, &outputs).map_err(|e| e.to_string())?;
    Ok(Chain { program, loaded, results: node.results.len() })
}
