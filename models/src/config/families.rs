//! The published routers, one row each: the only place where their rules are told apart.

use serde::{Deserialize, Serialize};

use super::router::{ApplyTo, BalanceOf, CapacityRule, GroupScore, Noise, Normalise, Order, Routing, Score, Side};

/// A published router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the rows of `routing` say what each is")]
pub enum Family {
    #[serde(rename = "top1")]
    Top1,
    #[serde(rename = "top2")]
    Top2,
    #[serde(rename = "topk")]
    TopK,
    Switch,
    Gshard,
    #[serde(rename = "deepspeed-top1")]
    DeepspeedTop1,
    #[serde(rename = "deepspeed-top2")]
    DeepspeedTop2,
    #[serde(rename = "deepspeed-topk")]
    DeepspeedTopK,
    Fair,
    Tutel,
    Mixtral,
    #[serde(rename = "qwen2-moe")]
    Qwen2Moe,
    #[serde(rename = "qwen3-moe")]
    Qwen3Moe,
    #[serde(rename = "qwen3-next")]
    Qwen3Next,
    Olmoe,
    #[serde(rename = "deepseek-v2")]
    DeepseekV2,
    #[serde(rename = "deepseek-v3")]
    DeepseekV3,
    #[serde(rename = "deepseek-v4")]
    DeepseekV4,
    #[serde(rename = "minimax-m2")]
    MinimaxM2,
    #[serde(rename = "ernie-4.5")]
    Ernie45,
    GptOss,
    Granite,
    #[serde(rename = "phi-3.5")]
    Phi35,
    #[serde(rename = "llama-4")]
    Llama4,
    Arctic,
    #[serde(rename = "gemma-4")]
    Gemma4,
    #[serde(rename = "nemotron-3")]
    Nemotron3,
    ExpertChoice,
}

/// Softmax over all experts, gates as they are, first come first served: every row below says how it differs.
const PLAIN: Routing = Routing {
    score: Score::Softmax,
    normalise: Normalise::None,
    scale: 1.0,
    apply_to: ApplyTo::Output,
    bias: false,
    selection_bias: false,
    bias_rate: 1e-3,
    groups: 1,
    group_keep: 1,
    group_score: GroupScore::Max,
    jitter: 0.0,
    noise: Noise::None,
    mixer_eps: 0.01,
    order: Order::Token,
    capacity: CapacityRule::Deepspeed,
    balance: BalanceOf::All,
    side: Side::None,
    shared_ffn: None,
    hash_layers: 0,
    expert_choice: false,
    allow_expert_choice_decoding: false,
};

const RENORMALISED: Routing = Routing { normalise: Normalise::BeforeDropping, ..PLAIN };
const TOP2: Routing =
    Routing { normalise: Normalise::AfterDropping, order: Order::Choice, balance: BalanceOf::First, ..PLAIN };
const TOPK: Routing = Routing { normalise: Normalise::AfterDropping, order: Order::Probability, ..PLAIN };
/// Sigmoid scores, an expert chosen by score plus bias, gates of unbiased scores that sum to 1 (arXiv 2412.19437, 2.1.2).
const SIGMOID: Routing = Routing { score: Score::Sigmoid, selection_bias: true, ..RENORMALISED };

impl Family {
    /// Every family.
    pub const ALL: [Family; 28] = [
        Family::Top1,
        Family::Top2,
        Family::TopK,
        Family::Switch,
        Family::Gshard,
        Family::DeepspeedTop1,
        Family::DeepspeedTop2,
        Family::DeepspeedTopK,
        Family::Fair,
        Family::Tutel,
        Family::Mixtral,
        Family::Qwen2Moe,
        Family::Qwen3Moe,
        Family::Qwen3Next,
        Family::Olmoe,
        Family::DeepseekV2,
        Family::DeepseekV3,
        Family::DeepseekV4,
        Family::MinimaxM2,
        Family::Ernie45,
        Family::GptOss,
        Family::Granite,
        Family::Phi35,
        Family::Llama4,
        Family::Arctic,
        Family::Gemma4,
        Family::Nemotron3,
        Family::ExpertChoice,
    ];

    /// The fields of the router; `k` decides whether the plain `topk` has gates to normalise.
    pub fn routing(self, k: usize) -> Routing {
        match self {
            // DeepSpeed's three gates (spec 1.3 to 1.5) without their noise; a single gate is never normalised here.
            Family::Top1 => PLAIN,
            Family::Top2 if k == 1 => Routing { normalise: Normalise::None, ..TOP2 },
            Family::Top2 => TOP2,
            Family::TopK if k == 1 => Routing { normalise: Normalise::None, ..TOPK },
            Family::TopK => TOPK,
            // arXiv 2101.03961; Mesh TensorFlow's switch gating: capacity factor 1.25, in evaluation 2.
            Family::Switch => Routing { jitter: 0.01, balance: BalanceOf::First, ..PLAIN },
            // arXiv 2006.16668, algorithm 1; Mesh TensorFlow's top-2 gating.
            Family::Gshard => Routing {
                normalise: Normalise::BeforeDropping,
                noise: Noise::RandomSecond,
                capacity: CapacityRule::Gshard,
                ..TOP2
            },
            // DeepSpeed sharded_moe.py, top1gating with use_rts.
            Family::DeepspeedTop1 => Routing { order: Order::Random, balance: BalanceOf::First, ..PLAIN },
            // The same file, top2gating with top2_2nd_expert_sampling.
            Family::DeepspeedTop2 => Routing { noise: Noise::SampleSecond, ..TOP2 },
            // The same file, topkgating with drop_policy 'probs'.
            Family::DeepspeedTopK => TOPK,
            // fairseq (branch moe) top2gate.py; evaluation capacity is a fraction of the tokens, 0.25 there.
            Family::Fair => Routing { noise: Noise::SampleSecond, capacity: CapacityRule::Fair, ..TOP2 },
            // Tutel fast_dispatch.py; its batch-prioritised form is `order = "batch"`.
            Family::Tutel => Routing { normalise: Normalise::BeforeDropping, capacity: CapacityRule::Tutel, ..TOP2 },
            // arXiv 2401.04088: softmax over the two largest logits, the same as renormalised probabilities.
            Family::Mixtral => RENORMALISED,
            // Qwen1.5-MoE, Qwen2-57B-A14B: norm_topk_prob false, shared expert weighted by a sigmoid.
            Family::Qwen2Moe => Routing { side: Side::Sigmoid, ..PLAIN },
            // arXiv 2505.09388: norm_topk_prob true, no shared expert.
            Family::Qwen3Moe => RENORMALISED,
            // Qwen3-Next-80B-A3B: as Qwen3 with the shared expert of Qwen2.
            Family::Qwen3Next => Routing { side: Side::Sigmoid, ..RENORMALISED },
            // arXiv 2409.02060: norm_topk_prob false, z-loss 0.001 and balance loss 0.01.
            Family::Olmoe => PLAIN,
            // arXiv 2405.04434, 2.1.2: groups by their best expert, scale 16; the Lite model has `groups = 1`, `scale = 1`.
            Family::DeepseekV2 => Routing { groups: 8, group_keep: 3, scale: 16.0, side: Side::Constant, ..PLAIN },
            // arXiv 2412.19437, 2.1.2: groups by the sum of their two best biased scores, scale 2.5.
            Family::DeepseekV3 => Routing {
                groups: 8,
                group_keep: 4,
                group_score: GroupScore::Top2Sum,
                scale: 2.5,
                side: Side::Constant,
                ..SIGMOID
            },
            // Scores sqrt(softplus), first layers by token id. The scale differs between its models: give it.
            Family::DeepseekV4 => {
                Routing { score: Score::SqrtSoftplus, hash_layers: 3, side: Side::Constant, ..SIGMOID }
            }
            // MiniMax-M2: sigmoid scores with a correction bias, no shared expert.
            Family::MinimaxM2 => SIGMOID,
            // ERNIE 4.5: the correction bias is added to softmax probabilities.
            Family::Ernie45 => Routing { selection_bias: true, side: Side::Constant, ..RENORMALISED },
            // gpt-oss-20b/120b: a router bias, softmax over the chosen logits.
            Family::GptOss => Routing { score: Score::Identity, normalise: Normalise::Softmax, bias: true, ..PLAIN },
            // Granite 3 MoE, JetMoE: softmax over the chosen logits.
            Family::Granite => Routing { score: Score::Identity, normalise: Normalise::Softmax, ..PLAIN },
            // Phi-3.5-MoE: SparseMixer-v2 in its evaluation form, router_jitter_noise 0.01.
            Family::Phi35 => Routing { score: Score::SparseMixer, ..PLAIN },
            // Llama 4 Scout and Maverick: a sigmoid on the input of the expert, a shared expert added.
            Family::Llama4 => {
                Routing { score: Score::Sigmoid, apply_to: ApplyTo::Input, side: Side::Constant, ..PLAIN }
            }
            // Snowflake Arctic: a dense network added to two renormalised experts.
            Family::Arctic => Routing { side: Side::Constant, ..RENORMALISED },
            // Gemma 4 26B-A4B (transformers, Gemma4TextRouter): eight renormalised experts of 128 and a dense network added. Its
            // learned factor of each expert's gate is one of that expert's second matrix here.
            Family::Gemma4 => Routing { side: Side::Constant, ..RENORMALISED },
            // Nemotron 3 (Nano: 128 experts, 6 chosen): as DeepSeek-V3 without groups.
            Family::Nemotron3 => Routing { scale: 2.5, side: Side::Constant, ..SIGMOID },
            // arXiv 2202.09368: each expert takes its ceil(N f / E) best tokens by softmax over experts.
            Family::ExpertChoice => Routing { order: Order::Probability, expert_choice: true, ..PLAIN },
        }
    }

    /// Choices of a token in the family's (smallest) published model; `top_k` overrides it.
    pub fn top_k(self) -> usize {
        match self {
            Family::Top1 | Family::Switch | Family::DeepspeedTop1 | Family::Llama4 | Family::ExpertChoice => 1,
            Family::Top2
            | Family::TopK
            | Family::Gshard
            | Family::DeepspeedTop2
            | Family::DeepspeedTopK
            | Family::Fair
            | Family::Tutel
            | Family::Mixtral
            | Family::Phi35
            | Family::Arctic => 2,
            Family::Qwen2Moe | Family::GptOss => 4,
            Family::DeepseekV2 | Family::DeepseekV4 | Family::Ernie45 | Family::Nemotron3 => 6,
            Family::Qwen3Moe
            | Family::Olmoe
            | Family::DeepseekV3
            | Family::MinimaxM2
            | Family::Granite
            | Family::Gemma4 => 8,
            Family::Qwen3Next => 10,
        }
    }

    /// The only number of choices the router is defined for, if there is one.
    pub fn fixed_top_k(self) -> Option<usize> {
        match self {
            Family::Top1 | Family::DeepspeedTop1 => Some(1),
            Family::Top2 | Family::DeepspeedTop2 | Family::Fair | Family::Gshard => Some(2),
            Family::TopK
            | Family::Switch
            | Family::DeepspeedTopK
            | Family::Tutel
            | Family::Mixtral
            | Family::Qwen2Moe
            | Family::Qwen3Moe
            | Family::Qwen3Next
            | Family::Olmoe
            | Family::DeepseekV2
            | Family::DeepseekV3
            | Family::DeepseekV4
            | Family::MinimaxM2
            | Family::Ernie45
            | Family::GptOss
            | Family::Granite
            | Family::Phi35
            | Family::Llama4
            | Family::Arctic
            | Family::Gemma4
            | Family::Nemotron3
            | Family::ExpertChoice => None,
        }
    }
}
