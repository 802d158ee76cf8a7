//! Shapes and tensor types; all shapes are static.

use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::DType;

/// The extent of each axis, outermost first; `[]` is a scalar.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shape(SmallVec<[usize; 4]>);

impl Shape {
    /// A shape with these extents.
    pub fn new(dims: impl IntoIterator<Item = usize>) -> Self {
        Shape(dims.into_iter().collect())
    }

    /// Number of elements, 1 for a scalar; `None` if it does not fit a `usize`, or if the extents that are not 0 multiply
    /// to more: rows, strides and parts of a shape without elements must be countable too.
    pub fn checked_elements(&self) -> Option<usize> {
        let most = self.0.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))?;
        Some(if self.0.contains(&0) { 0 } else { most })
    }

    /// Whether every count made of its extents, in bytes too, can be addressed.
    pub fn addressable(&self) -> bool {
        let most = self.0.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
        most.is_some_and(|n| n <= isize::MAX as usize / 8)
    }

    /// Number of elements, 1 for a scalar. Types in a graph were checked not to overflow.
    pub fn elements(&self) -> usize {
        self.0.iter().product()
    }

    /// Product of all extents but the last; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.0.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The last extent; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Row-major strides in elements.
    pub fn strides(&self) -> SmallVec<[usize; 4]> {
        let mut strides = SmallVec::from_elem(1, self.0.len());
        for axis in (1..self.0.len()).rev() {
            strides[axis - 1] = strides[axis] * self.0[axis];
        }
        strides
    }

    /// The shape both broadcast to, aligned at the last axis, where an extent of 1 stretches; `None` if they clash.
    pub fn broadcast(&self, other: &Shape) -> Option<Shape> {
        let rank = self.len().max(other.len());
        let at = |s: &Shape, i: usize| if i + s.len() >= rank { s[i + s.len() - rank] } else { 1 };
        let mut dims = SmallVec::new();
        for i in 0..rank {
            dims.push(match (at(self, i), at(other, i)) {
                (a, b) if a == b => a,
                (1, b) => b,
                (a, 1) => a,
                (_, _) => return None,
            });
        }
        Some(Shape(dims))
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Shape::new(dims)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Shape::new(dims.iter().copied())
    }
}

impl From<Vec<usize>> for Shape {
    fn from(dims: Vec<usize>) -> Self {
        Shape::new(dims)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, d) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{d}")?;
        }
        f.write_str("]")
    }
}

/// Element type and shape of one value; prints as `f32[2,128]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Shape,
}

impl TensorType {
    /// A tensor type.
    pub fn new(dtype: DType, shape: impl Into<Shape>) -> Self {
        TensorType { dtype, shape: shape.into() }
    }

    /// `f32` of this shape.
    pub fn f32(shape: impl Into<Shape>) -> Self {
        TensorType::new(DType::F32, shape)
    }

    /// `i32` of this shape.
    pub fn i32(shape: impl Into<Shape>) -> Self {
        TensorType::new(DType::I32, shape)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Size in bytes, without padding.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_extent_does_not_hide_extents_that_cannot_be_counted() {
        let huge = 1usize << 40;
        assert_eq!(Shape::from([0, huge, huge]).checked_elements(), None);
        assert_eq!(Shape::from([huge, huge, 0]).checked_elements(), None);
        assert_eq!(Shape::from([0, huge]).checked_elements(), Some(0));
        assert_eq!(Shape::default().checked_elements(), Some(1));
        assert!(!Shape::from([usize::MAX, 0]).addressable() && Shape::from([huge, 0]).addressable());
    }
}
