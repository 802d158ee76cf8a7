//! `matmul`: matrix products, batched or with one shared right factor.
//!
//! `a [..B,M,K], b [K,N] or [..B,K,N] (, bias [N]) -> [..B,M,N]`; with `transpose_a` `a` is `[..B,K,M]`, with
//! `transpose_b` `b` is `[N,K]` or `[..B,N,K]`. `out = a · b + bias`, accumulated in f32, of the dtype of `a` and `b`; one of them
//! may be f32 beside a narrower other, as where a router in f32 meets rows of 16 bits, and then `out` is f32. The bias is of that
//! dtype, or f32. Differentiable in all operands.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::{Cotangents, ReduceFn, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// Matrix product over the last two axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matmul {
    /// The last two axes of `a` are K, M instead of M, K.
    pub transpose_a: bool,
    /// The last two axes of `b` are N, K instead of K, N.
    pub transpose_b: bool,
}

/// Rows and columns of the matrices of `shape` (of rank 2 or more), after the transpose.
fn extents(shape: &Shape, transpose: bool) -> (usize, usize) {
    let [rows, columns] = [shape[shape.len() - 2], shape[shape.len() - 1]];
    if transpose { (columns, rows) } else { (rows, columns) }
}

/// `x` with its last two axes exchanged.
fn transposed(g: &mut Graph, x: Value) -> Result<Value> {
    let rank = g.shape(x).len();
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(rank - 2, rank - 1);
    g.transpose(x, &perm)
}

/// `x [..,N]` as `[R,N]`.
fn flat(g: &mut Graph, x: Value) -> Result<Value> {
    let shape = &g.ty(x).shape;
    let matrix = [shape.rows(), shape.last()];
    g.reshape(x, matrix)
}

impl Rule for Matmul {
    const NAME: &'static str = "matmul";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::between(operands, 2, 3)?;
        check::float(operands, 0)?;
        let TensorType { dtype, shape: a } = &operands[0];
        let b = &operands[1].shape;
        if a.len() < 2 {
            return Err(Mismatch::operand(0, "rank 2 or more"));
        }
        check::float(operands, 1)?;
        let dtype = match [*dtype, operands[1].dtype] {
            [DType::F32, _] | [_, DType::F32] => DType::F32,
            [own, _] => own,
        };
        if operands[1].dtype != DType::F32 && dtype != DType::F32 {
            check::dtype(operands, 1, dtype)?;
        }
        let outer = &a[..a.len() - 2];
        if b.len() != 2 && (b.len() != a.len() || b[..b.len() - 2] != *outer) {
            let leading = Shape::from(outer);
            return Err(Mismatch::operand(1, format!("rank 2, or rank {} with leading axes {leading}", a.len())));
        }
        let ((m, k), (k_of_b, n)) = (extents(a, self.transpose_a), extents(b, self.transpose_b));
        if k_of_b != k {
            let order = if self.transpose_b { format!("[..,N,{k}]") } else { format!("[..,{k},N]") };
            return Err(Mismatch::operand(1, format!("{order}, as operand 0 gives K = {k}")));
        }
        if operands.len() == 3 {
            check::shape(operands, 2, [n])?;
            if operands[2].dtype != DType::F32 {
                check::dtype(operands, 2, dtype)?;
            }
        }
        Ok(smallvec![TensorType::new(dtype, Shape::new(outer.iter().copied().chain([m, n])))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (a, b, d) = (cx.operands[0], cx.operands[1], cx.cotangent());
        let (ta, tb) = (self.transpose_a, self.transpose_b);
        // A shared right factor of more than one matrix: its gradient is one product over the rows of all of them.
        let shared = cx.graph.shape(b).len() == 2 && cx.graph.shape(a).len() > 2;
        let [of_a, of_b] = [a, b].map(|v| cx.graph.ty(v).dtype);
        let mut cotangents: Cotangents = smallvec![
            cx.when(0, |cx| {
                let g = &mut *cx.graph;
                let da = match (ta, shared) {
                    (false, _) => g.matmul_with(d, b, None, false, !tb)?,
                    (true, false) => g.matmul_with(b, d, None, tb, true)?,
                    (true, true) => {
                        let da = g.matmul_with(d, b, None, false, !tb)?;
                        transposed(g, da)?
                    }
                };
                g.cast(da, of_a)
            })?,
            cx.when(1, |cx| {
                let g = &mut *cx.graph;
                let (a, d, ta) = if shared {
                    let rows = if ta { transposed(g, a)? } else { a };
                    (flat(g, rows)?, flat(g, d)?, false)
                } else {
                    (a, d, ta)
                };
                let db = if tb { g.matmul_with(d, a, None, true, ta)? } else { g.matmul_with(a, d, None, !ta, false)? };
                g.cast(db, of_b)
            })?,
        ];
        if let Some(&bias) = cx.operands.get(2) {
            cotangents.push(cx.when(2, |cx| {
                let outer: Vec<usize> = (0..cx.graph.shape(d).len() - 1).collect();
                let sum = cx.graph.reduce(ReduceFn::Sum, d, &outer)?;
                let dtype = cx.graph.ty(bias).dtype;
                cx.graph.cast(sum, dtype)
            })?);
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (a, b) = (operands[0], operands[1]);
        let ((m, k), (_, n)) = (extents(&a.ty.shape, self.transpose_a), extents(&b.ty.shape, self.transpose_b));
        let mut out = Tensor::zeros(results[0].clone());
        let outer: usize = a.ty.shape[..a.ty.shape.len() - 2].iter().product();
        for batch in 0..outer {
            let (a_at, b_at) = (batch * m * k, if b.ty.shape.len() == 2 { 0 } else { batch * k * n });
            let b_rows: Vec<f64> =
                (0..k * n).map(|at| b.data[b_at + if self.transpose_b { at % n * k + at / n } else { at }]).collect();
            for i in 0..m {
                // The sums of a row grow together, each in the order of l, so that neighbours are read one after another.
                let sums = &mut out.data[(batch * m + i) * n..][..n];
                if let Some(bias) = operands.get(2) {
                    sums.copy_from_slice(&bias.data);
                }
                for l in 0..k {
                    let x = a.data[a_at + if self.transpose_a { l * m + i } else { i * k + l }];
                    for (sum, y) in sums.iter_mut().zip(&b_rows[l * n..][..n]) {
                        *sum += x * y;
                    }
                }
            }
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `a [..B,M,K]` times `b [K,N]` or `[..B,K,N]`; see [`Matmul`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn matmul(&mut self, a: Value, b: Value) -> Result<Value> {
        self.matmul_with(a, b, None, false, false)
    }

    /// [`Graph::matmul`] with transposed factors and a bias `[N]`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn matmul_with(
        &mut self,
        a: Value,
        b: Value,
        bias: Option<Value>,
        transpose_a: bool,
        transpose_b: bool,
    ) -> Result<Value> {
        let operands: SmallVec<[Value; 4]> = [a, b].into_iter().chain(bias).collect();
        self.push_one(Matmul { transpose_a, transpose_b }, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Matmul = Matmul { transpose_a: false, transpose_b: false };

    #[test]
    fn transposed_storage_gives_the_same_product() {
        let a = [Tensor::f32([1, 2, 2], vec![1.0, 2.0, 3.0, 4.0]), Tensor::f32([1, 2, 2], vec![1.0, 3.0, 2.0, 4.0])];
        let b = [Tensor::f32([2, 1], vec![10.0, 1.0]), Tensor::f32([1, 2], vec![10.0, 1.0])];
        let bias = Tensor::f32([1], vec![0.5]);
        for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
            let operands = [&a[usize::from(transpose_a)], &b[usize::from(transpose_b)], &bias];
            let op = Matmul { transpose_a, transpose_b };
            let types = op.infer(&operands.map(|t| t.ty.clone())).unwrap();
            assert_eq!(types[0], TensorType::f32([1, 2, 1]));
            assert_eq!(op.reference(&operands, &types)[0].data, [12.5, 34.5]);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let wanted = |a: &[usize], b: &[usize]| {
            let mismatch = PLAIN.infer(&[TensorType::f32(a), TensorType::f32(b)]).unwrap_err();
            (mismatch.operand, mismatch.wanted)
        };
        assert_eq!(wanted(&[3], &[3, 2]), (Some(0), "rank 2 or more".into()));
        assert_eq!(wanted(&[5, 3], &[4, 2]), (Some(1), "[..,3,N], as operand 0 gives K = 3".into()));
        assert_eq!(wanted(&[6, 5, 3], &[7, 3, 2]), (Some(1), "rank 2, or rank 3 with leading axes [6]".into()));
        assert_eq!(wanted(&[5, 3], &[3]).0, Some(1));
        let bf16 = |shape: &[usize]| TensorType::new(DType::Bf16, shape);
        assert!(PLAIN.infer(&[bf16(&[5, 3]), bf16(&[3, 2]), TensorType::f32([2])]).is_ok());
        // f32 on one side makes the result f32; two kinds of 16 bits do not go together.
        for [a, b] in [[DType::F32, DType::Bf16], [DType::Bf16, DType::F32]] {
            let types = [TensorType::new(a, [5, 3]), TensorType::new(b, [3, 2])];
            assert_eq!(PLAIN.infer(&types).unwrap()[0], TensorType::f32([5, 2]));
        }
        assert_eq!(PLAIN.infer(&[bf16(&[5, 3]), TensorType::new(DType::F16, [3, 2])]).unwrap_err().operand, Some(1));
        let f16 = TensorType::new(DType::F16, [2]);
        assert_eq!(PLAIN.infer(&[bf16(&[5, 3]), bf16(&[3, 2]), f16]).unwrap_err().operand, Some(2));
    }

    #[test]
    fn gradients_agree_with_differences() {
        let ramp = |shape: &[usize]| {
            let n: usize = shape.iter().product();
            Tensor::f32(shape, (0..n).map(|i| (i as f64 * 0.7).sin()).collect())
        };
        for leading in [&[][..], &[2], &[2, 1]] {
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let with = |matrix: [usize; 2]| [leading, &matrix].concat();
                let a = ramp(&with(if ta { [3, 2] } else { [2, 3] }));
                let shared = if tb { [4, 3] } else { [3, 4] };
                for b in [ramp(&shared), ramp(&with(shared))] {
                    let inputs = [a.clone(), b, ramp(&[4])];
                    check::assert_gradients(&inputs, |g, v| g.matmul_with(v[0], v[1], Some(v[2]), ta, tb));
                }
            }
        }
    }
}
