//! The op set: closed, closed under differentiation, one file per op named like the op.
//!
//! Each file holds, in this order: the doc (formula, operand shapes, what is differentiable), the struct with the
//! attributes, its [`Rule`] (`infer`, `vjp`, `reference`), the builder method on [`Graph`], and tests of the edges.
//! Adding an op is: its file, one line in the list below, and then the compiler names every place that must handle it.

use serde::Serialize;
use serde::de::DeserializeOwned;
use smallvec::SmallVec;

use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::tensor::Tensor;
use crate::types::TensorType;

pub(crate) mod check;

/// The result types of an op.
pub type Types = SmallVec<[TensorType; 3]>;

/// The cotangents of an op's operands, one each.
pub type Cotangents = SmallVec<[Cotangent; 4]>;

/// What every op defines. There are no default methods: an op that forgets one does not compile.
pub trait Rule: Clone + PartialEq + Serialize + DeserializeOwned {
    /// The op's name in text and errors; also the name of its file.
    const NAME: &'static str;

    /// The result types for these operand types.
    ///
    /// # Errors
    /// [`Mismatch`] naming the operand at fault and what is wanted.
    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch>;

    /// Emits the cotangent of every operand from those of the results, using ops of this set only.
    ///
    /// # Errors
    /// [`crate::Error::NotDifferentiable`] if the op has no gradient.
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents>;

    /// The meaning of the op: plain loops in f64, without rounding to the result's dtype.
    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor>;

    /// Pairs (result, operand): the op computes that result in the storage of that operand, whose old value is gone after it.
    fn in_place(&self) -> &'static [(usize, usize)];
}

macro_rules! ops {
    ($($module:ident :: $Op:ident),* $(,)?) => {
        $(mod $module;)*
        $(pub use $module::$Op;)*

        /// Every op. Match it without a wildcard, so that a new op breaks the build where it is not handled.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Op {
            $($Op($Op),)*
        }

        impl Op {
            /// The names of all ops, in the order of the list.
            pub const NAMES: &'static [&'static str] = &[$($Op::NAME),*];

            /// The op's name.
            pub fn name(&self) -> &'static str {
                match self { $(Op::$Op(_) => $Op::NAME,)* }
            }

            /// The result types; see [`Rule::infer`].
            ///
            /// # Errors
            /// [`Mismatch`] naming the operand at fault and what is wanted.
            pub fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
                match self { $(Op::$Op(op) => op.infer(operands),)* }
            }

            pub(crate) fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
                match self { $(Op::$Op(op) => op.vjp(cx),)* }
            }

            /// The results in f64; see [`Rule::reference`].
            pub fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
                match self { $(Op::$Op(op) => op.reference(operands, results),)* }
            }

            /// Results computed in an operand's storage; see [`Rule::in_place`].
            pub fn in_place(&self) -> &'static [(usize, usize)] {
                match self { $(Op::$Op(op) => op.in_place(),)* }
            }

            /// The attributes as one line of JSON; `{}` where there are none.
            pub(crate) fn attributes(&self) -> String {
                let json = match self { $(Op::$Op(op) => serde_json::to_string(op),)* };
                json.unwrap_or_else(|e| unreachable!("attributes are plain data: {e}"))
            }

            /// The op of this name with these attributes; `None` if there is no such op.
            pub(crate) fn parse(name: &str, attributes: &str) -> Option<Result<Op, serde_json::Error>> {
                $(if name == $Op::NAME {
                    return Some(serde_json::from_str(attributes).map(Op::$Op));
                })*
                None
            }
        }

        $(impl From<$Op> for Op {
            fn from(op: $Op) -> Op { Op::$Op(op) }
        })*
    };
}

ops! {
    // Sources
    input::Input, constant::Constant, random::Random,
    // Elementwise
    unary::Unary, binary::Binary, compare::Compare, select::Select, cast::Cast, elementwise::Elementwise,
    // Shape and movement
    reshape::Reshape, after::After, transpose::Transpose, broadcast::Broadcast, slice::Slice, pad::Pad,
    concat::Concat,
    // Reductions and norms
    reduce::Reduce, softmax::Softmax, softmax_grad::SoftmaxGrad, layer_norm::LayerNorm, layer_norm_grad::LayerNormGrad,
    rms_norm::RmsNorm, rms_norm_grad::RmsNormGrad,
    // Dense
    matmul::Matmul, attention::Attention, attention_grad::AttentionGrad, attention_cached::AttentionCached,
    embedding::Embedding, embedding_grad::EmbeddingGrad, linear_cross_entropy::LinearCrossEntropy,
    linear_cross_entropy_grad::LinearCrossEntropyGrad, linear_distillation::LinearDistillation,
    linear_distillation_grad::LinearDistillationGrad, linear_distillation_cached::LinearDistillationCached,
    linear_distillation_cached_grad::LinearDistillationCachedGrad,
    // Sparse experts
    route::Route, route_grad::RouteGrad, assign::Assign, dispatch::Dispatch, combine::Combine, gate_grad::GateGrad,
    expert_matmul::ExpertMatmul, expert_matmul_wgrad::ExpertMatmulWgrad, segment_sum::SegmentSum,
    // Optimizer
    global_norm::GlobalNorm, adamw::Adamw,
}

pub use adamw::AdamwState;
pub use assign::Order;
pub use binary::BinaryFn;
pub use compare::CompareFn;
pub use constant::Literal;
pub use elementwise::{ElementFn, Instr};
pub use input::Role;
pub use random::Distribution;
pub use reduce::ReduceFn;
pub use route::RouteOperands;
pub use unary::UnaryFn;

pub use crate::router::{Balance, GroupScore, Groups, NoiseUse, RouteInputs, Router, Score};

impl Op {
    /// The input this op is, if it is one.
    pub fn as_input(&self) -> Option<&Input> {
        if let Op::Input(input) = self { Some(input) } else { None }
    }

    /// Whether its only result is its first operand under another name, in the same storage.
    pub fn is_alias(&self) -> bool {
        matches!(self, Op::Reshape(_) | Op::After(_))
    }
}
