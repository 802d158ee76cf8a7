//! What a fused chain of elementwise operations is: inputs, instructions, outputs, and the rules they obey.

use smallvec::SmallVec;

/// The most registers (inputs, constants and results together) a program may use: they lie on the stack.
pub const MAX_REGISTERS: usize = 32;
/// The most outputs a program may have.
pub const MAX_OUTPUTS: usize = 8;
/// The most dimensions the common shape may have.
pub const MAX_DIMS: usize = 8;

/// The type of the elements of an input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// IEEE single.
    F32,
    /// The upper half of an IEEE single; computed as f32, rounded to nearest even when stored.
    Bf16,
    /// IEEE half; computed as f32, rounded to nearest even when stored.
    F16,
    /// Two's complement, 32 bits.
    I32,
    /// Unsigned, 32 bits.
    U32,
    /// One byte; 0 is false, and true is stored as 1.
    Bool,
}

/// The type of the values of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// IEEE single.
    F32,
    /// Two's complement, 32 bits; arithmetic wraps.
    I32,
    /// Unsigned, 32 bits; arithmetic wraps.
    U32,
    /// A truth value.
    Bool,
}

impl Storage {
    /// The kind of register that holds elements of this type.
    pub fn kind(self) -> Kind {
        match self {
            Storage::F32 | Storage::Bf16 | Storage::F16 => Kind::F32,
            Storage::I32 => Kind::I32,
            Storage::U32 => Kind::U32,
            Storage::Bool => Kind::Bool,
        }
    }
}

/// A register by number: the inputs come first, then the constants, then results.
pub type Register = u8;

/// An operation on one value. Of f32 unless said otherwise; NaN gives NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unary {
    /// -x. Also of I32 and U32 (wrapping).
    Neg,
    /// e^x.
    Exp,
    /// The natural logarithm.
    Ln,
    /// The square root.
    Sqrt,
    /// 1 / sqrt(x), from a division (no estimate).
    Rsqrt,
    /// 1 / x.
    Reciprocal,
    /// tanh.
    Tanh,
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// GELU, tanh form.
    GeluTanh,
    /// GELU, exact form.
    GeluErf,
    /// x sigmoid(x).
    Silu,
    /// max(x, 0). Also of I32.
    Relu,
    /// |x|. Also of I32 (wrapping).
    Abs,
    /// -1, 0 or 1. Also of I32.
    Sign,
    /// x x. Also of I32 and U32 (wrapping).
    Square,
    /// The sine.
    Sin,
    /// The cosine.
    Cos,
    /// The largest integer not above x.
    Floor,
    /// Rounds to the nearest bf16 and back: a cast to bf16 in the middle of a chain.
    RoundBf16,
    /// Rounds to the nearest f16 and back.
    RoundF16,
    /// F32 to Bool: neither infinite nor NaN.
    IsFinite,
    /// Bool to Bool.
    Not,
}

/// An operation on two values of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binary {
    /// a + b; integers wrap.
    Add,
    /// a - b; integers wrap.
    Sub,
    /// a b; integers wrap; of Bool: and.
    Mul,
    /// a / b; integers truncate, and give 0 for b = 0.
    Div,
    /// The larger; NaN when either is; of Bool: or.
    Max,
    /// The smaller; NaN when either is; of Bool: and.
    Min,
    /// a^b; f32 only.
    Pow,
    /// b gelu_tanh'(a): a is the input, b the cotangent; f32 only.
    GeluTanhGrad,
    /// b gelu_erf'(a); f32 only.
    GeluErfGrad,
    /// b silu'(a); f32 only.
    SiluGrad,
    /// b where a > 0, else 0; f32 only.
    ReluGrad,
}

/// A comparison of two values of one kind; every one but `Ne` is false for a NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compare {
    /// a = b.
    Eq,
    /// a differs from b.
    Ne,
    /// a < b.
    Lt,
    /// a <= b.
    Le,
    /// a > b.
    Gt,
    /// a >= b.
    Ge,
}

/// What an instruction computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// An operation on register `x`.
    Unary {
        /// The operation.
        op: Unary,
        /// Its operand.
        x: Register,
    },
    /// An operation on registers `a` and `b`.
    Binary {
        /// The operation.
        op: Binary,
        /// Its first operand.
        a: Register,
        /// Its second operand.
        b: Register,
    },
    /// A comparison of registers `a` and `b`, giving a Bool.
    Compare {
        /// The comparison.
        op: Compare,
        /// Its first operand.
        a: Register,
        /// Its second operand.
        b: Register,
    },
    /// `a` where `condition` (a Bool) is true, else `b`.
    Select {
        /// The Bool that chooses.
        condition: Register,
        /// Taken where true.
        a: Register,
        /// Taken where false.
        b: Register,
    },
    /// A conversion: f32 to an integer truncates and saturates (NaN: 0), between integers keeps the bits, to Bool is
    /// "not zero", from Bool gives 0 or 1.
    Cast {
        /// The operand.
        x: Register,
        /// The kind of the result.
        to: Kind,
    },
}

/// One step of a program. Its result may replace an earlier result that is no longer needed, of whatever kind, but
/// not one of its own operands, nor an input or constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Instr {
    /// What is computed.
    pub action: Action,
    /// Where the result goes.
    pub out: Register,
}

/// A value equal everywhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Constant {
    /// Of kind F32.
    F32(f32),
    /// Of kind I32.
    I32(i32),
    /// Of kind U32.
    U32(u32),
    /// Of kind Bool.
    Bool(bool),
}

impl Constant {
    pub(super) fn kind(self) -> Kind {
        match self {
            Constant::F32(_) => Kind::F32,
            Constant::I32(_) => Kind::I32,
            Constant::U32(_) => Kind::U32,
            Constant::Bool(_) => Kind::Bool,
        }
    }

    pub(super) fn word(self) -> u32 {
        match self {
            Constant::F32(v) => v.to_bits(),
            Constant::I32(v) => v as u32,
            Constant::U32(v) => v,
            Constant::Bool(v) => u32::from(v),
        }
    }
}

/// An input tensor, seen under the common shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Input {
    /// The type of its elements.
    pub storage: Storage,
    /// One stride in elements for each dimension of the common shape; 0 broadcasts.
    pub strides: SmallVec<[usize; MAX_DIMS]>,
}

/// An output tensor: row-major in the common shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    /// The type of its elements, of the kind of `register`.
    pub storage: Storage,
    /// The register stored.
    pub register: Register,
}

/// Why a program was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// The common shape has too many dimensions.
    #[error("the shape has {found} dimensions, at most {MAX_DIMS} are supported")]
    Dims {
        /// The number of dimensions.
        found: usize,
    },
    /// The common shape has more elements than usize counts.
    #[error("the shape has more elements than this machine can address")]
    Elements,
    /// An input has not one stride per dimension.
    #[error("input {input} has {found} strides for {wanted} dimensions")]
    Strides {
        /// The number of the input.
        input: usize,
        /// The dimensions of the shape.
        wanted: usize,
        /// The strides given.
        found: usize,
    },
    /// More registers than there are.
    #[error("the program uses register {register}, at most {MAX_REGISTERS} are supported")]
    Registers {
        /// The register in question.
        register: usize,
    },
    /// No output, or too many.
    #[error("the program has {found} outputs, 1 to {MAX_OUTPUTS} are supported")]
    Outputs {
        /// The number of outputs.
        found: usize,
    },
    /// An operand that nothing wrote before.
    #[error("step {step} reads register {register} before it is written")]
    Unwritten {
        /// The instruction, or for an output the number of instructions.
        step: usize,
        /// The register.
        register: Register,
    },
    /// A result in the place of an input, a constant or one of the instruction's own operands.
    #[error("instruction {step} writes register {register}, an input, a constant or one of its operands")]
    Overwrites {
        /// The instruction.
        step: usize,
        /// The register.
        register: Register,
    },
    /// An operation that does not exist for the kinds of its operands.
    #[error("instruction {step}, {action:?}, does not exist for operands of kind {found:?}")]
    Operands {
        /// The instruction.
        step: usize,
        /// What it does.
        action: Action,
        /// The kinds of its operands.
        found: [Option<Kind>; 3],
    },
    /// An output whose storage is of another kind than its register.
    #[error("output {output} is stored as {storage:?} but its register holds {found:?}")]
    Stored {
        /// The number of the output.
        output: usize,
        /// The type of its elements.
        storage: Storage,
        /// The kind of its register.
        found: Kind,
    },
}

/// How an input is walked in the order of the output: extents and strides, outermost first, with neighbouring
/// dimensions merged where one stride serves both. A full input is one run, a scalar one run of stride 0.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    pub(super) dims: SmallVec<[(usize, usize); MAX_DIMS]>,
    /// Elements the input must at least have.
    pub(super) span: usize,
}

impl Walk {
    fn new(shape: &[usize], strides: &[usize]) -> Walk {
        let mut dims: SmallVec<[(usize, usize); MAX_DIMS]> = SmallVec::new();
        let mut last: usize = 0;
        for (&n, &stride) in shape.iter().zip(strides).filter(|&(&n, _)| n != 1) {
            last = last.saturating_add(n.saturating_sub(1).saturating_mul(stride));
            match dims.last_mut() {
                Some(outer) if outer.1 == stride.saturating_mul(n) => *outer = (outer.0.saturating_mul(n), stride),
                Some(_) | None => dims.push((n, stride)),
            }
        }
        if dims.is_empty() {
            dims.push((1, 0));
        }
        let empty = shape.contains(&0);
        Walk { dims, span: if empty { 0 } else { last.saturating_add(1) } }
    }

    /// Whether every element is the first one.
    pub(super) fn is_scalar(&self) -> bool {
        self.dims.iter().all(|d| d.1 == 0)
    }
}

/// An instruction with the kind of its operands (of the branches, for a selection).
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) instr: Instr,
    pub(super) kind: Kind,
}

/// A checked chain of elementwise operations over one shape; build it once, run it often.
#[derive(Clone, Debug)]
pub struct Program {
    pub(super) len: usize,
    pub(super) inputs: Vec<(Storage, Walk)>,
    pub(super) constants: Vec<Constant>,
    pub(super) steps: Vec<Step>,
    pub(super) outputs: Vec<Output>,
    pub(super) registers: usize,
    /// The cost of one element in elements touched, roughly.
    pub(super) weight: usize,
}

impl Program {
    /// Checks a program over the common shape `shape` (every input broadcast to it, every output of it). The inputs
    /// are registers 0.., the constants follow, and instructions write the registers after those.
    ///
    /// # Errors
    /// A [`ProgramError`] for every breach of the rules written at the parts.
    pub fn new(
        shape: &[usize],
        inputs: &[Input],
        constants: &[Constant],
        instrs: &[Instr],
        outputs: &[Output],
    ) -> Result<Program, ProgramError> {
        if shape.len() > MAX_DIMS {
            return Err(ProgramError::Dims { found: shape.len() });
        }
        let len = if shape.contains(&0) {
            0
        } else {
            shape.iter().try_fold(1, |len: usize, &n| len.checked_mul(n)).ok_or(ProgramError::Elements)?
        };
        let first = inputs.len() + constants.len();
        let highest = instrs.iter().map(|i| usize::from(i.out) + 1).max().unwrap_or(0).max(first);
        if highest > MAX_REGISTERS {
            return Err(ProgramError::Registers { register: highest - 1 });
        }
        if outputs.is_empty() || outputs.len() > MAX_OUTPUTS {
            return Err(ProgramError::Outputs { found: outputs.len() });
        }
        let mut kinds = [None; MAX_REGISTERS];
        let mut walks = Vec::with_capacity(inputs.len());
        for (i, input) in inputs.iter().enumerate() {
            if input.strides.len() != shape.len() {
                return Err(ProgramError::Strides { input: i, wanted: shape.len(), found: input.strides.len() });
            }
            kinds[i] = Some(input.storage.kind());
            walks.push((input.storage, Walk::new(shape, &input.strides)));
        }
        for (kind, constant) in kinds[inputs.len()..].iter_mut().zip(constants) {
            *kind = Some(constant.kind());
        }
        let read = |kinds: &[Option<Kind>; MAX_REGISTERS], step: usize, register: Register| {
            let kind = kinds.get(usize::from(register)).copied().flatten();
            kind.ok_or(ProgramError::Unwritten { step, register })
        };
        let mut steps = Vec::with_capacity(instrs.len());
        let mut cost = inputs.len() + outputs.len();
        for (step, &instr) in instrs.iter().enumerate() {
            let (registers, count) = instr.action.operands();
            let mut found = [None; 3];
            for (kind, &register) in found.iter_mut().zip(&registers[..count]) {
                *kind = Some(read(&kinds, step, register)?);
            }
            if usize::from(instr.out) < first || registers[..count].contains(&instr.out) {
                return Err(ProgramError::Overwrites { step, register: instr.out });
            }
            let refused = ProgramError::Operands { step, action: instr.action, found };
            let (kind, result) = instr.action.kinds(found).ok_or(refused)?;
            kinds[usize::from(instr.out)] = Some(result);
            steps.push(Step { instr, kind });
            cost += instr.action.cost();
        }
        for (i, output) in outputs.iter().enumerate() {
            let found = read(&kinds, instrs.len(), output.register)?;
            if found != output.storage.kind() {
                return Err(ProgramError::Stored { output: i, storage: output.storage, found });
            }
        }
        Ok(Program {
            len,
            inputs: walks,
            constants: constants.to_vec(),
            steps,
            outputs: outputs.to_vec(),
            registers: highest,
            weight: cost.div_ceil(4),
        })
    }

    /// The number of elements of the common shape.
    pub fn elements(&self) -> usize {
        self.len
    }
}

impl Action {
    /// The registers read, and how many there are.
    fn operands(self) -> ([Register; 3], usize) {
        match self {
            Action::Unary { x, .. } | Action::Cast { x, .. } => ([x, 0, 0], 1),
            Action::Binary { a, b, .. } | Action::Compare { a, b, .. } => ([a, b, 0], 2),
            Action::Select { condition, a, b } => ([condition, a, b], 3),
        }
    }

    /// The kind that selects the code and the kind of the result, if the operation exists for these operands.
    fn kinds(self, found: [Option<Kind>; 3]) -> Option<(Kind, Kind)> {
        let x = found[0]?;
        let same = found[1].is_none_or(|b| b == x);
        match self {
            Action::Unary { op, .. } => match op {
                Unary::Neg | Unary::Square => (x != Kind::Bool).then_some((x, x)),
                Unary::Relu | Unary::Abs | Unary::Sign => matches!(x, Kind::F32 | Kind::I32).then_some((x, x)),
                Unary::Exp | Unary::Ln | Unary::Sqrt | Unary::Rsqrt | Unary::Reciprocal | Unary::Tanh => float(x),
                Unary::Sigmoid | Unary::GeluTanh | Unary::GeluErf | Unary::Silu | Unary::Sin | Unary::Cos => float(x),
                Unary::Floor | Unary::RoundBf16 | Unary::RoundF16 => float(x),
                Unary::IsFinite => (x == Kind::F32).then_some((x, Kind::Bool)),
                Unary::Not => (x == Kind::Bool).then_some((x, x)),
            },
            Action::Binary { .. } if !same => None,
            Action::Binary { op, .. } => match op {
                Binary::Add | Binary::Sub | Binary::Div => (x != Kind::Bool).then_some((x, x)),
                Binary::Mul | Binary::Max | Binary::Min => Some((x, x)),
                Binary::Pow | Binary::GeluTanhGrad | Binary::GeluErfGrad | Binary::SiluGrad | Binary::ReluGrad => {
                    float(x)
                }
            },
            Action::Compare { .. } => same.then_some((x, Kind::Bool)),
            Action::Select { .. } => {
                let kind = found[1]?;
                (x == Kind::Bool && found[2] == Some(kind)).then_some((kind, kind))
            }
            Action::Cast { to, .. } => Some((x, to)),
        }
    }

    /// Roughly how many plain operations this takes.
    fn cost(self) -> usize {
        match self {
            Action::Unary { op, .. } => match op {
                Unary::Exp | Unary::Ln | Unary::Tanh | Unary::Sigmoid | Unary::GeluTanh | Unary::GeluErf => 8,
                Unary::Silu => 8,
                Unary::Sin | Unary::Cos => 32,
                Unary::Sqrt | Unary::Rsqrt | Unary::Reciprocal | Unary::RoundF16 => 2,
                Unary::Neg | Unary::Relu | Unary::Abs | Unary::Sign | Unary::Square | Unary::Floor => 1,
                Unary::RoundBf16 | Unary::IsFinite | Unary::Not => 1,
            },
            Action::Binary { op, .. } => match op {
                Binary::Pow => 32,
                Binary::GeluTanhGrad | Binary::GeluErfGrad | Binary::SiluGrad => 12,
                Binary::Div => 2,
                Binary::Add | Binary::Sub | Binary::Mul | Binary::Max | Binary::Min | Binary::ReluGrad => 1,
            },
            Action::Compare { .. } | Action::Select { .. } | Action::Cast { .. } => 1,
        }
    }
}

fn float(x: Kind) -> Option<(Kind, Kind)> {
    (x == Kind::F32).then_some((x, x))
}
