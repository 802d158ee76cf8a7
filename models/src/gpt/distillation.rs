//! The distillation term of MoS: a student is drawn to the output distribution of a frozen teacher.
//!
//! Section 2.6 of the DeepSpeed-MoE specification (`calculate_mos_loss` of Megatron-DeepSpeed): with `p = softmax(logits / T)`
//! the term is `beta T^2 mean_n sum_v p_teacher (ln p_teacher - ln p_student)`, the forward KL divergence as a mean over all
//! tokens, no loss mask applied.

use moebius_ir::ops::ReduceFn;
use moebius_ir::{DType, Graph, Result, Value};

/// How strongly and how softly a student follows its teacher.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// T: both logits are divided by it.
    pub temperature: f64,
    /// Weight of the term in the loss.
    pub beta: f64,
}

impl Default for Distillation {
    /// Those of the released scripts: temperature 1 and weight 1.
    fn default() -> Self {
        Distillation { temperature: 1.0, beta: 1.0 }
    }
}

/// The distillation term, f32 scalar, of `student` and `teacher` logits of one shape `[.., V]`; computed in f32 whatever their
/// dtype. Its gradient of the student's logits is `beta T (p_student - p_teacher) / tokens`.
///
/// # Errors
/// [`moebius_ir::Error::Operands`] if the shapes differ or have no axis.
pub fn distillation(g: &mut Graph, student: Value, teacher: Value, options: Distillation) -> Result<Value> {
    let Distillation { temperature, beta } = options;
    let tokens = g.ty(student).shape.rows().max(1);
    let student = log_softmax(g, student, temperature)?;
    let teacher = log_softmax(g, teacher, temperature)?;
    let p = g.exp(teacher)?;
    // Logits are finite, so no probability is 0 times an infinite logarithm.
    let ratio = g.sub(teacher, student)?;
    let terms = g.mul(p, ratio)?;
    let sum = g.sum_all(terms)?;
    g.mul_scalar(sum, beta * temperature * temperature / tokens as f64)
}

/// `ln softmax(logits / T)` over the last axis in f32.
fn log_softmax(g: &mut Graph, logits: Value, temperature: f64) -> Result<Value> {
    let wide = g.cast(logits, DType::F32)?;
    let wide = g.mul_scalar(wide, 1.0 / temperature)?;
    let shape = g.ty(wide).shape.clone();
    let mut row = shape.to_vec();
    let last = row.len().saturating_sub(1);
    if let Some(extent) = row.last_mut() {
        *extent = 1;
    }
    let max = g.reduce(ReduceFn::Max, wide, &[last])?;
    let max = g.reshape(max, row.clone())?;
    let centred = g.sub(wide, max)?;
    let power = g.exp(centred)?;
    let sum = g.reduce(ReduceFn::Sum, power, &[last])?;
    let sum = g.reshape(sum, row)?;
    let log = g.ln(sum)?;
    g.sub(centred, log)
}
