//! `attention_cached`: attention of new tokens over the keys and values of all tokens so far (generation).
//!
//! `qkv [B,T,(H+2G)*Dh], k_cache [B,S,G*Dh], v_cache [B,S,G*Dh], start i32 [] -> out [B,T,H*Dh], k_cache', v_cache'`, all of
//! the dtype of `qkv`, packed as in [`super::Attention`]. The new keys and values overwrite rows `start..start+T` of the
//! caches, in place; then token i sees the cache rows `0..=start+i`. `start` is clamped to `0..=S-T`. Not
//! differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::attention::{Packed, attend};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// Causal attention over a cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionCached {
    /// Query heads H, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads G.
    pub kv_heads: usize,
    /// The factor on the scores, usually 1/sqrt(Dh).
    pub scale: f32,
}

impl Rule for AttentionCached {
    const NAME: &'static str = "attention_cached";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 4)?;
        let packed = Packed::infer(operands, self.heads, self.kv_heads, self.scale)?;
        let (tokens, width) = (packed.tokens, packed.kv_heads * packed.dim);
        check::rank(operands, 1, 3)?;
        let room = operands[1].shape[1];
        if room < tokens {
            return Err(Mismatch::operand(1, format!("[B,S,G*Dh] with room for the {tokens} new tokens")));
        }
        let cache = TensorType::new(operands[0].dtype, [packed.batch, room, width]);
        check::ty(operands, 1, &cache)?;
        check::ty(operands, 2, &cache)?;
        check::ty(operands, 3, &TensorType::i32(Shape::default()))?;
        Ok(smallvec![packed.out(&operands[0]), cache.clone(), cache])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "attention over a cache is for generation; train with attention")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (qkv, mut k_cache, mut v_cache) = (operands[0], operands[1].clone(), operands[2].clone());
        let p = Packed::of(qkv, self.heads, self.kv_heads);
        let (room, width) = (k_cache.ty.shape[1], p.kv_heads * p.dim);
        let start = operands[3].data[0].clamp(0.0, (room - p.tokens) as f64) as usize;
        let mut out = Tensor::zeros(results[0].clone());
        for b in 0..p.batch {
            for t in 0..p.tokens {
                let (to, key, value) = ((b * room + start + t) * width, p.key(b, t, 0), p.value(b, t, 0));
                k_cache.data[to..to + width].copy_from_slice(&qkv.data[key..key + width]);
                v_cache.data[to..to + width].copy_from_slice(&qkv.data[value..value + width]);
            }
            for h in 0..p.heads {
                let kv_head = h / (p.heads / p.kv_heads);
                let at = |row: usize| (b * room + row) * width + kv_head * p.dim;
                for i in 0..p.tokens {
                    let keys_values: Vec<_> = (0..=start + i)
                        .map(|row| (&k_cache.data[at(row)..][..p.dim], &v_cache.data[at(row)..][..p.dim]))
                        .collect();
                    let query = &qkv.data[p.query(b, i, h)..][..p.dim];
                    attend(query, self.scale, &keys_values, &mut out.data[p.result(b, i, h)..][..p.dim]);
                }
            }
        }
        vec![out, k_cache, v_cache]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[(1, 1), (2, 2)]
    }
}

impl Graph {
    /// Writes the keys and values of `qkv [B,T,(H+2G)*Dh]` into the caches `[B,S,G*Dh]` from row `start` (i32 scalar) on and
    /// attends over them; returns `out [B,T,H*Dh]` and the caches. See [`AttentionCached`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn attention_cached(
        &mut self,
        qkv: Value,
        k_cache: Value,
        v_cache: Value,
        start: Value,
        heads: usize,
        kv_heads: usize,
        scale: f32,
    ) -> Result<[Value; 3]> {
        self.push_all(AttentionCached { heads, kv_heads, scale }, &[qkv, k_cache, v_cache, start])
    }
}

#[cfg(test)]
mod tests {
    use super::super::Attention;
    use super::*;

    const OP: AttentionCached = AttentionCached { heads: 2, kv_heads: 1, scale: 0.5 };

    fn run(qkv: &Tensor, k: &Tensor, v: &Tensor, start: i32) -> Vec<Tensor> {
        let start = Tensor::i32(Shape::default(), &[start]);
        let operands = [qkv, k, v, &start];
        let types = OP.infer(&operands.map(|t| t.ty.clone())).unwrap();
        OP.reference(&operands, &types)
    }

    #[test]
    fn two_calls_give_what_attention_gives_at_once() {
        let data: Vec<f64> = (0..24).map(|i| (f64::from(i) * 1.7).sin()).collect();
        let whole = Tensor::f32([1, 3, 8], data.clone());
        let op = Attention { heads: 2, kv_heads: 1, causal: true, scale: 0.5 };
        let want = op.reference(&[&whole], &op.infer(std::slice::from_ref(&whole.ty)).unwrap());
        let cache = Tensor::f32([1, 4, 2], vec![f64::NAN; 8]);
        let first = run(&Tensor::f32([1, 2, 8], data[..16].to_vec()), &cache, &cache, 0);
        let second = run(&Tensor::f32([1, 1, 8], data[16..].to_vec()), &first[1], &first[2], 2);
        assert_eq!([&first[0].data[..], &second[0].data[..]].concat(), want[0].data);
        assert_eq!((second[1].data[4], second[2].data[4], second[1].data[6].is_nan()), (data[20], data[22], true));
    }

    #[test]
    fn start_is_clamped_and_a_small_cache_is_named() {
        let qkv = Tensor::f32([1, 1, 8], (0..8).map(f64::from).collect());
        let cache = Tensor::f32([1, 2, 2], vec![-1.0; 4]);
        assert_eq!(run(&qkv, &cache, &cache, 9)[1].data, [-1.0, -1.0, 4.0, 5.0]);
        assert_eq!(run(&qkv, &cache, &cache, -9)[2].data, [6.0, 7.0, -1.0, -1.0]);
        let types = [TensorType::f32([1, 3, 8]), cache.ty.clone(), cache.ty, TensorType::i32([])];
        let refused = OP.infer(&types).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.contains("3 new tokens")), (Some(1), true));
    }
}
