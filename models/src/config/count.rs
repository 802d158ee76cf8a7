//! Parameters, operations and bytes of a model by closed formulas; nothing is allocated.

use serde::Serialize;

use moebius_ir::Shape;

use super::{ComputeDtype, Config, Moments, Norm, Recompute, Side};
use crate::gpt::Parameter;

/// Parameters of one layer. H width, K width of all key heads, F inner width, E experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerCount {
    /// The layer, counted from 1.
    pub layer: usize,
    /// Experts, 0 for a dense layer.
    pub experts: usize,
    /// Two norms: 4 H, or 2 H for RMS norm.
    pub norms: u64,
    /// Query and output 2 (H^2 + H), key and value 2 (H K + K).
    pub attention: u64,
    /// Router: E H, and E if it has a bias. A selection bias is no parameter.
    pub router: u64,
    /// One expert: 2 H F + F + H. 0 in a dense layer.
    pub expert: u64,
    /// The dense network, 2 H F + F + H, of a dense layer or beside the experts (with the F of `shared_ffn`); else 0.
    pub dense: u64,
    /// The coefficients of the network beside the experts: 2 H + 2 for a softmax, H for a sigmoid, else 0.
    pub coefficient: u64,
    /// All parameters of the layer.
    pub total: u64,
    /// Those a token meets: all but the experts it does not go to.
    pub active: u64,
}

/// Parameters of a model (3.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParameterCount {
    /// All parameters.
    pub total: u64,
    /// Those a token meets.
    pub active: u64,
    /// Token embedding: V H. It is the output matrix too when tied.
    pub token_embedding: u64,
    /// Learned positions: `sequence` times H.
    pub position_embedding: u64,
    /// The norm after the last layer.
    pub final_norm: u64,
    /// The output matrix when it is not the embedding, else 0.
    pub output: u64,
    /// Each layer.
    pub per_layer: Vec<LayerCount>,
}

/// Floating-point operations of training one token, a multiplication and an addition counted as two. The backward pass is
/// counted as twice the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Flops {
    /// 6 for each element of the matrices a token is multiplied with, the output matrix among them.
    pub matmul: u64,
    /// Causal attention: 6 (T + 1) H for each layer, for scores and weighted sum over (T + 1) / 2 tokens on average.
    pub attention: u64,
    /// Both: the arithmetic of the model, without what is computed twice.
    pub total: u64,
    /// What the backward pass computes again with `train.recompute = true`: the forward pass of all blocks but the last. Else 0, also
    /// for the routers' logits that `"light"` computes again.
    pub recomputed: u64,
}

/// Bytes of what a training run keeps between steps, and of its gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Parameters in f32.
    pub weights: u64,
    /// The copy the matrix products read, when they are not in f32.
    pub compute_weights: u64,
    /// Both moments of AdamW, as `train.moments` keeps them.
    pub optimizer: u64,
    /// Gradients in f32.
    pub gradients: u64,
}

/// Sizes as wide integers, so that no product below overflows for bounded sizes.
struct Sizes {
    h: u128,
    k: u128,
    f: u128,
    norm: u128,
    router_bias: bool,
    side: Side,
    /// Inner width of the network beside the experts.
    s: u128,
}

impl Config {
    fn sizes(&self) -> Sizes {
        let m = &self.model;
        let h = m.width as u128;
        let norm = match m.norm {
            Norm::Layer => 2 * h,
            Norm::Rms => h,
        };
        let k = h / (m.heads as u128).max(1) * m.kv_heads() as u128;
        let routing = m.routing();
        let (side, router_bias) = (routing.side, routing.bias);
        Sizes { h, k, f: m.ffn() as u128, norm, router_bias, side, s: m.shared_ffn() as u128 }
    }

    fn embeddings(&self) -> [u128; 4] {
        let (m, s) = (&self.model, self.sizes());
        let tokens = m.vocab as u128 * s.h;
        [tokens, m.sequence as u128 * s.h, s.norm, if m.tied_embeddings { 0 } else { tokens }]
    }

    /// All parameters, for sizes `validate` has bounded.
    pub(super) fn count(&self) -> u128 {
        let s = self.sizes();
        let layers = self.model.experts_per_layer().into_iter().map(|e| s.layer(0, e, 0).total_wide());
        self.embeddings().into_iter().sum::<u128>() + layers.sum::<u128>()
    }

    /// Counts the parameters, biases included (3.1). The configuration must be valid.
    pub fn parameters(&self) -> ParameterCount {
        let s = self.sizes();
        let experts = self.model.experts_per_layer();
        let layer = |(i, &e): (usize, &usize)| s.layer(i + 1, e, self.model.experts_per_token(e)).finish();
        let per_layer: Vec<LayerCount> = experts.iter().enumerate().map(layer).collect();
        let [token_embedding, position_embedding, final_norm, output] = self.embeddings().map(narrow);
        let shared = token_embedding + position_embedding + final_norm + output;
        ParameterCount {
            total: shared + per_layer.iter().map(|l| l.total).sum::<u64>(),
            active: shared + per_layer.iter().map(|l| l.active).sum::<u64>(),
            token_embedding,
            position_embedding,
            final_norm,
            output,
            per_layer,
        }
    }

    /// Operations of training one token in a full sequence. The configuration must be valid.
    pub fn flops_per_token(&self) -> Flops {
        let (m, s) = (&self.model, self.sizes());
        let mut elements = m.vocab as u128 * s.h;
        let mut before = elements;
        for experts in m.experts_per_layer() {
            before = elements;
            elements += 2 * s.h * (s.h + s.k);
            let network = 2 * s.h * s.f;
            elements += match experts {
                0 => network,
                e => {
                    let beside = match s.side {
                        Side::None => 0,
                        Side::Constant => 2 * s.h * s.s,
                        Side::Sigmoid => 2 * s.h * s.s + s.h,
                        Side::Softmax => 2 * s.h * s.s + 2 * s.h,
                    };
                    e as u128 * s.h + m.experts_per_token(e) as u128 * network + beside
                }
            };
        }
        let matmul = narrow(6 * elements);
        let of_block = 6 * (m.sequence as u128 + 1) * s.h;
        let attention = narrow(of_block * m.layers as u128);
        // All blocks but the last: what came before it, without the output matrix.
        let again = 2 * (before - m.vocab as u128 * s.h) + of_block / 3 * (m.layers as u128).saturating_sub(1);
        let recomputed = match self.train.recompute {
            Recompute::Blocks => narrow(again),
            // No products but routers' logits, which are not counted.
            Recompute::Nothing | Recompute::Light => 0,
        };
        Flops { matmul, attention, total: matmul.saturating_add(attention), recomputed }
    }

    /// Bytes of the rows that dispatch moves for one token in one forward pass: the token's row in the dtype of the products, once
    /// for each of its choices, in every MoE layer. As many come back, and as many move again each way in the backward pass; with
    /// a capacity that drops, fewer. The configuration must be valid.
    pub fn dispatch_bytes_per_token(&self) -> u64 {
        let m = &self.model;
        let row = (m.width * m.dtype.bytes()) as u64;
        let experts = m.experts_per_layer();
        experts.into_iter().filter(|&e| e > 0).map(|e| m.experts_per_token(e) as u64 * row).sum()
    }

    /// Bytes of training state. The configuration must be valid.
    pub fn training_bytes(&self) -> Bytes {
        let n = self.parameters().total;
        let compute_weights = match self.model.dtype {
            ComputeDtype::F32 => 0,
            ComputeDtype::Bf16 => 2 * n,
        };
        let moments = self.train.moments;
        let of_tensor = |shape: Shape| {
            let elements = shape.elements() as u64;
            moments.of_tensor(elements).bytes(elements)
        };
        let optimizer = match moments {
            Moments::F32 | Moments::Bf16 => moments.bytes(n),
            Moments::Eight => Parameter::list(&self.model).into_iter().map(|p| of_tensor(p.shape)).sum(),
        };
        Bytes { weights: 4 * n, compute_weights, optimizer, gradients: 4 * n }
    }
}

/// A layer before its sums are narrowed.
struct WideLayer {
    layer: usize,
    experts: usize,
    top_k: usize,
    norms: u128,
    attention: u128,
    router: u128,
    expert: u128,
    dense: u128,
    coefficient: u128,
}

impl Sizes {
    fn layer(&self, layer: usize, experts: usize, top_k: usize) -> WideLayer {
        let network = |f: u128| 2 * self.h * f + f + self.h;
        let moe = experts != 0;
        WideLayer {
            layer,
            experts,
            top_k,
            norms: 2 * self.norm,
            attention: 2 * (self.h * self.h + self.h) + 2 * (self.h * self.k + self.k),
            router: experts as u128 * (self.h + u128::from(self.router_bias)),
            expert: if moe { network(self.f) } else { 0 },
            dense: match (moe, self.side) {
                (false, _) => network(self.f),
                (true, Side::None) => 0,
                (true, Side::Constant | Side::Sigmoid | Side::Softmax) => network(self.s),
            },
            coefficient: match (moe, self.side) {
                (false, _) | (true, Side::None | Side::Constant) => 0,
                (true, Side::Sigmoid) => self.h,
                (true, Side::Softmax) => 2 * self.h + 2,
            },
        }
    }
}

impl WideLayer {
    fn with_experts(&self, experts: usize) -> u128 {
        self.norms + self.attention + self.router + self.expert * experts as u128 + self.dense + self.coefficient
    }

    fn total_wide(&self) -> u128 {
        self.with_experts(self.experts)
    }

    fn finish(&self) -> LayerCount {
        LayerCount {
            layer: self.layer,
            experts: self.experts,
            norms: narrow(self.norms),
            attention: narrow(self.attention),
            router: narrow(self.router),
            expert: narrow(self.expert),
            dense: narrow(self.dense),
            coefficient: narrow(self.coefficient),
            total: narrow(self.total_wide()),
            active: narrow(self.with_experts(self.top_k.min(self.experts))),
        }
    }
}

/// A valid configuration's counts fit 64 bits.
fn narrow(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
