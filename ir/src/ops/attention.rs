//! `attention`: scaled dot-product attention of packed queries, keys and values (Vaswani et al., arXiv 1706.03762).
//!
//! `qkv [B,T,(H+2G)*Dh] -> out [B,T,H*Dh] (its dtype), lse f32 [B,H,T]`. A row holds the H query heads, then the G key
//! heads, then the G value heads; query head h uses key and value head `h / (H/G)`. With `s_ij = scale * q_i · k_j` over
//! all keys j (`causal`: j <= i), `lse_i = ln sum_j exp s_ij` and `out_i = sum_j exp(s_ij - lse_i) v_j`. Differentiable
//! through `out`; `lse` is kept for [`super::AttentionGrad`] and carries no gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Attention over whole sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads H, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads G.
    pub kv_heads: usize,
    /// A token sees only itself and earlier ones.
    pub causal: bool,
    /// The factor on the scores, usually 1/sqrt(Dh).
    pub scale: f32,
}

/// Where the heads lie in a packed `qkv [B,T,(H+2G)*Dh]`.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    /// B.
    pub(super) batch: usize,
    /// T.
    pub(super) tokens: usize,
    /// H.
    pub(super) heads: usize,
    /// G.
    pub(super) kv_heads: usize,
    /// Dh.
    pub(super) dim: usize,
}

impl Packed {
    /// The layout of operand 0, if it and the attributes fit.
    pub(super) fn infer(
        operands: &[TensorType],
        heads: usize,
        kv_heads: usize,
        scale: f32,
    ) -> Result<Packed, Mismatch> {
        check::rank(operands, 0, 3)?;
        check::float(operands, 0)?;
        check::attribute(kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads), || {
            format!("heads to be a positive multiple of kv_heads, not {heads} and {kv_heads}")
        })?;
        check::attribute(scale.is_finite(), || format!("a finite scale, not {scale}"))?;
        let shape = &operands[0].shape;
        let in_row = kv_heads.saturating_mul(2).saturating_add(heads);
        if shape[2] == 0 || !shape[2].is_multiple_of(in_row) {
            let wanted = format!("[B,T,C] with C a positive multiple of heads + 2 kv_heads = {in_row}");
            return Err(Mismatch::operand(0, wanted));
        }
        Ok(Packed { batch: shape[0], tokens: shape[1], heads, kv_heads, dim: shape[2] / in_row })
    }

    /// The layout of a `qkv` that the shape rule accepted.
    pub(super) fn of(qkv: &Tensor, heads: usize, kv_heads: usize) -> Packed {
        let shape = &qkv.ty.shape;
        Packed { batch: shape[0], tokens: shape[1], heads, kv_heads, dim: shape[2] / (heads + 2 * kv_heads) }
    }

    /// The type of `out`.
    pub(super) fn out(&self, qkv: &TensorType) -> TensorType {
        TensorType::new(qkv.dtype, [self.batch, self.tokens, self.heads * self.dim])
    }

    /// The type of `lse`.
    pub(super) fn lse(&self) -> TensorType {
        TensorType::f32([self.batch, self.heads, self.tokens])
    }

    /// Where the query of head `h` starts in `qkv`.
    pub(super) fn query(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.tokens + t) * (self.heads + 2 * self.kv_heads) + h) * self.dim
    }

    /// Where the key that query head `h` uses starts in `qkv`.
    pub(super) fn key(&self, b: usize, t: usize, h: usize) -> usize {
        self.query(b, t, self.heads + h / (self.heads / self.kv_heads))
    }

    /// Where the value that query head `h` uses starts in `qkv`.
    pub(super) fn value(&self, b: usize, t: usize, h: usize) -> usize {
        self.key(b, t, h) + self.kv_heads * self.dim
    }

    /// Where the result of head `h` starts in `out`.
    pub(super) fn result(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.tokens + t) * self.heads + h) * self.dim
    }
}

/// The inner product.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Adds to `out` the values weighted by the softmax of the scaled scores of one query; returns their logsumexp.
pub(super) fn attend(query: &[f64], scale: f32, keys_values: &[(&[f64], &[f64])], out: &mut [f64]) -> f64 {
    let scores: Vec<f64> = keys_values.iter().map(|(key, _)| f64::from(scale) * dot(query, key)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    for (score, (_, value)) in scores.iter().zip(keys_values) {
        let p = (score - lse).exp();
        out.iter_mut().zip(*value).for_each(|(out, v)| *out += p * v);
    }
    lse
}

impl Rule for Attention {
    const NAME: &'static str = "attention";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        let packed = Packed::infer(operands, self.heads, self.kv_heads, self.scale)?;
        Ok(smallvec![packed.out(&operands[0]), packed.lse()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        if cx.cotangents[1].is_some() {
            return cx.refuse(Self::NAME, "its lse carries no gradient");
        }
        let (qkv, out, lse, d) = (cx.operands[0], cx.results[0], cx.results[1], cx.cotangent());
        let Attention { heads, kv_heads, causal, scale } = *self;
        Ok(smallvec![Cotangent::Value(cx.graph.attention_grad(qkv, out, lse, d, heads, kv_heads, causal, scale)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let qkv = operands[0];
        let p = Packed::of(qkv, self.heads, self.kv_heads);
        let (mut out, mut lse) = (Tensor::zeros(results[0].clone()), Tensor::zeros(results[1].clone()));
        let head = |at: usize| &qkv.data[at..at + p.dim];
        for b in 0..p.batch {
            for h in 0..p.heads {
                for i in 0..p.tokens {
                    let visible = if self.causal { i + 1 } else { p.tokens };
                    let keys_values: Vec<_> =
                        (0..visible).map(|j| (head(p.key(b, j, h)), head(p.value(b, j, h)))).collect();
                    let row = &mut out.data[p.result(b, i, h)..][..p.dim];
                    lse.data[(b * p.heads + h) * p.tokens + i] =
                        attend(head(p.query(b, i, h)), self.scale, &keys_values, row);
                }
            }
        }
        vec![out, lse]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Attention of the packed `qkv [B,T,(H+2G)*Dh]`; returns `out [B,T,H*Dh]`. See [`Attention`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `qkv` does not fit the heads.
    #[track_caller]
    pub fn attention(&mut self, qkv: Value, heads: usize, kv_heads: usize, causal: bool, scale: f32) -> Result<Value> {
        self.push_all::<2>(Attention { heads, kv_heads, causal, scale }, &[qkv]).map(|[out, _]| out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, gradients};

    #[test]
    fn a_causal_token_sees_the_past_in_equal_parts_where_scores_are_equal() {
        // One head of width 1: columns q, k, v. Keys of 0 make all scores 0.
        let qkv = Tensor::f32([1, 3, 3], vec![1.0, 0.0, 2.0, 5.0, 0.0, 4.0, 9.0, 0.0, 9.0]);
        let op = Attention { heads: 1, kv_heads: 1, causal: true, scale: 1.0 };
        let types = op.infer(std::slice::from_ref(&qkv.ty)).unwrap();
        let out = op.reference(&[&qkv], &types);
        let near = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-15);
        assert!(near(&out[0].data, &[2.0, 3.0, 5.0]), "{:?}", out[0]);
        assert!(near(&out[1].data, &[0.0, 2f64.ln(), 3f64.ln()]), "{:?}", out[1]);
        let open = Attention { causal: false, ..op }.reference(&[&qkv], &types);
        assert!(near(&open[0].data, &[5.0, 5.0, 5.0]), "{:?}", open[0]);
    }

    #[test]
    fn query_heads_share_key_heads_in_order() {
        // Four query heads, two key heads of width 1, one token: the result is the value that the head uses.
        let qkv = Tensor::f32([1, 1, 8], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 70.0, 80.0]);
        let op = Attention { heads: 4, kv_heads: 2, causal: true, scale: 0.5 };
        let types = op.infer(std::slice::from_ref(&qkv.ty)).unwrap();
        let out = op.reference(&[&qkv], &types);
        assert_eq!((&out[0].data[..], &out[1].data[..]), (&[70.0, 70.0, 80.0, 80.0][..], &[2.5, 5.0, 9.0, 12.0][..]));
        let refused = Attention { heads: 3, ..op.clone() }.infer(std::slice::from_ref(&qkv.ty)).unwrap_err();
        assert!(refused.wanted.contains("not 3 and 2"), "{refused:?}");
        let refused = op.infer(&[TensorType::f32([1, 1, 12])]).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.contains("= 8")), (Some(0), true));
    }

    #[test]
    fn gradients_agree_with_differences_and_lse_has_none() {
        let data = (0..48).map(|i| (f64::from(i) * 1.3).sin()).collect();
        let qkv = Tensor::f32([2, 3, 8], data);
        for causal in [true, false] {
            check::assert_gradients(std::slice::from_ref(&qkv), |g, v| g.attention(v[0], 2, 1, causal, 0.75));
        }
        let mut g = Graph::new();
        let qkv = g.parameter("qkv", qkv.ty).unwrap();
        let op = Attention { heads: 2, kv_heads: 1, causal: true, scale: 1.0 };
        let [_, lse] = g.push_all(op, &[qkv]).unwrap();
        let loss = g.sum_all(lse).unwrap();
        let error = gradients(&mut g, loss, &[qkv]).unwrap_err();
        assert!(matches!(error, Error::NotDifferentiable { op: "attention", operand: 0, .. }), "{error}");
    }
}
