//! Checks that shape rules share.

use crate::dtype::DType;
use crate::error::Mismatch;
use crate::types::{Shape, TensorType};

type Check<T = ()> = Result<T, Mismatch>;

/// Exactly `n` operands.
pub(crate) fn count(operands: &[TensorType], n: usize) -> Check {
    between(operands, n, n)
}

/// From `least` to `most` operands.
pub(crate) fn between(operands: &[TensorType], least: usize, most: usize) -> Check {
    if (least..=most).contains(&operands.len()) {
        return Ok(());
    }
    let wanted = if least == most { format!("{least} operands") } else { format!("{least} to {most} operands") };
    Err(Mismatch::op(format!("{wanted}, not {}", operands.len())))
}

/// Operand `i` has this rank.
pub(crate) fn rank(operands: &[TensorType], i: usize, rank: usize) -> Check {
    if operands[i].shape.len() == rank { Ok(()) } else { Err(Mismatch::operand(i, format!("rank {rank}"))) }
}

/// Operand `i` is a float.
pub(crate) fn float(operands: &[TensorType], i: usize) -> Check {
    if operands[i].dtype.is_float() { Ok(()) } else { Err(Mismatch::operand(i, "a float")) }
}

/// Operand `i` has this dtype.
pub(crate) fn dtype(operands: &[TensorType], i: usize, dtype: DType) -> Check {
    if operands[i].dtype == dtype { Ok(()) } else { Err(Mismatch::operand(i, format!("{dtype}"))) }
}

/// Operand `i` has this shape.
pub(crate) fn shape(operands: &[TensorType], i: usize, wanted: impl Into<Shape>) -> Check {
    let wanted = wanted.into();
    if operands[i].shape == wanted { Ok(()) } else { Err(Mismatch::operand(i, format!("shape {wanted}"))) }
}

/// Operand `i` has this type.
pub(crate) fn ty(operands: &[TensorType], i: usize, wanted: &TensorType) -> Check {
    if operands[i] == *wanted { Ok(()) } else { Err(Mismatch::operand(i, wanted.to_string())) }
}

/// An attribute holds.
pub(crate) fn attribute(holds: bool, wanted: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(Mismatch::op(wanted())) }
}
