//! `attention_grad`: the cotangent of attention's operand (Dao et al., arXiv 2205.14135, algorithm 4).
//!
//! `qkv [B,T,(H+2G)*Dh], out [B,T,H*Dh], lse f32 [B,H,T], dout [B,T,H*Dh] -> dqkv` (type of `qkv`), with `out` and `lse`
//! as [`super::Attention`] gave them: `P_ij = exp(scale q_i · k_j - lse_i)` for visible j,
//! `dS_ij = P_ij (dout_i · v_j - dout_i · out_i)`, `dq_i = scale sum_j dS_ij k_j`, `dk_j = scale sum_i dS_ij q_i`,
//! `dv_j = sum_i P_ij dout_i`; a key or value head sums over its query heads. Not differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::attention::{Packed, dot};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The gradient of [`super::Attention`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionGrad {
    /// Query heads H, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads G.
    pub kv_heads: usize,
    /// A token sees only itself and earlier ones.
    pub causal: bool,
    /// The factor on the scores.
    pub scale: f32,
}

impl Rule for AttentionGrad {
    const NAME: &'static str = "attention_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 4)?;
        let packed = Packed::infer(operands, self.heads, self.kv_heads, self.scale)?;
        let out = packed.out(&operands[0]);
        check::ty(operands, 1, &out)?;
        check::ty(operands, 2, &packed.lse())?;
        check::ty(operands, 3, &out)?;
        Ok(smallvec![operands[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of attention is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (qkv, out, lse, dout) = (operands[0], operands[1], operands[2], operands[3]);
        let p = Packed::of(qkv, self.heads, self.kv_heads);
        let scale = f64::from(self.scale);
        let mut dqkv = Tensor::zeros(results[0].clone());
        for b in 0..p.batch {
            for h in 0..p.heads {
                for i in 0..p.tokens {
                    let (at, query) = (p.result(b, i, h), p.query(b, i, h));
                    let d = &dout.data[at..at + p.dim];
                    let delta = dot(d, &out.data[at..at + p.dim]);
                    let lse = lse.data[(b * p.heads + h) * p.tokens + i];
                    let visible = if self.causal { i + 1 } else { p.tokens };
                    for j in 0..visible {
                        let (key, value) = (p.key(b, j, h), p.value(b, j, h));
                        let score = scale * dot(&qkv.data[query..query + p.dim], &qkv.data[key..key + p.dim]);
                        let weight = (score - lse).exp();
                        let ds = scale * weight * (dot(d, &qkv.data[value..value + p.dim]) - delta);
                        for c in 0..p.dim {
                            dqkv.data[query + c] += ds * qkv.data[key + c];
                            dqkv.data[key + c] += ds * qkv.data[query + c];
                            dqkv.data[value + c] += weight * d[c];
                        }
                    }
                }
            }
        }
        vec![dqkv]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangent of attention's `qkv` from both its results and the cotangent of `out`; see [`AttentionGrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn attention_grad(
        &mut self,
        qkv: Value,
        out: Value,
        lse: Value,
        dout: Value,
        heads: usize,
        kv_heads: usize,
        causal: bool,
        scale: f32,
    ) -> Result<Value> {
        self.push_one(AttentionGrad { heads, kv_heads, causal, scale }, &[qkv, out, lse, dout])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_passes_its_cotangent_to_the_value_heads_alone() {
        // Two query heads share one value head of width 1; with one key the softmax is constant.
        let qkv = Tensor::f32([1, 1, 4], vec![1.0, 2.0, 3.0, 4.0]);
        let (out, lse) = (Tensor::f32([1, 1, 2], vec![4.0, 4.0]), Tensor::f32([1, 2, 1], vec![3.0, 6.0]));
        let dout = Tensor::f32([1, 1, 2], vec![10.0, 1.0]);
        let op = AttentionGrad { heads: 2, kv_heads: 1, causal: true, scale: 1.0 };
        let operands = [&qkv, &out, &lse, &dout];
        let types = op.infer(&operands.map(|t| t.ty.clone())).unwrap();
        assert_eq!(op.reference(&operands, &types)[0].data, [0.0, 0.0, 0.0, 11.0]);
        let refused = op.infer(&[&qkv, &out, &out, &dout].map(|t| t.ty.clone())).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(2), "f32[1,2,1]"));
    }
}
