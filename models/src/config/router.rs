//! Section `[model.router]`: how experts are chosen and weighted, as fields that hold for every published router.
//!
//! `y = c0 * sum_j w_j E_j(a_j x) + c1 * S(x)`: a score of each expert, a rule which are chosen, a rule for the weights
//! `w` (or `a`), and a side branch `S`. A preset fills all fields ([`Family::routing`]); each can be given on its own.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Family, Mlp, ModelConfig, Renormalise};

/// What the file says of the router; what it leaves out is the preset's.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterTable {
    /// The published router that fills what is absent here. Absent: `top1`, `top2` or `topk`, by `top_k`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Family>,
    /// Score of an expert.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<Score>,
    /// What is done to the gates of a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalise: Option<Normalise>,
    /// Factor of the gates, after that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Whether gates weight an expert's output or its input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apply_to: Option<ApplyTo>,
    /// Whether the router's linear layer has a bias.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<bool>,
    /// Whether there is a bias that only chooses, moved after each step towards an even load (arXiv 2408.15664).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selection_bias: Option<bool>,
    /// How far the selection bias moves in a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias_rate: Option<f64>,
    /// Groups of experts of which a token may use `group_keep`; 1 for no groups.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<usize>,
    /// Groups a token may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_keep: Option<usize>,
    /// Score of a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_score: Option<GroupScore>,
    /// Half width of the uniform factor around 1 on the router's copy of its input, in training; 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<f64>,
    /// Noise on the choice, in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<Noise>,
    /// Relative distance to the best score beyond which SparseMixer leaves an expert out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer_eps: Option<f64>,
    /// Who stays when an expert has more choices than slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// How a capacity factor becomes a number of slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<CapacityRule>,
    /// Which choices the load-balancing loss counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<BalanceOf>,
    /// The network beside the experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<Side>,
    /// Inner width of that network. Absent: that of an expert.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_ffn: Option<usize>,
    /// MoE layers, the first ones, in which a fixed table maps token ids to experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_layers: Option<usize>,
    /// Whether experts choose tokens (arXiv 2202.09368) and not tokens experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_choice: Option<bool>,
    /// Whether to generate with such a router nevertheless, although it saw future tokens in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_expert_choice_decoding: Option<bool>,
}

macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$vm:meta])* $variant:ident,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$vm])* $variant,)* }
    };
}

named! {
    /// Score of an expert from its logit `l`.
    Score {
        /// `softmax(l)` over all experts.
        Softmax,
        /// `1 / (1 + exp(-l))`.
        Sigmoid,
        /// `sqrt(ln(1 + exp(l)))`.
        SqrtSoftplus,
        /// `l`.
        Identity,
        /// One softmax for each choice, over the experts near the best one that is left (arXiv 2310.00811, 2409.12136).
        SparseMixer,
    }
}

named! {
    /// What is done to the gates of a token.
    Normalise {
        /// Nothing: gates are scores.
        None,
        /// Softmax over the chosen experts (for `score = "identity"`).
        Softmax,
        /// Divided by their sum, whether or not a choice is dropped later.
        BeforeDropping,
        /// Those of the choices that were not dropped are divided by their sum.
        AfterDropping,
    }
}

named! {
    /// What gates weight.
    ApplyTo {
        /// The output of an expert.
        Output,
        /// Its input.
        Input,
    }
}

named! {
    /// Score of a group of experts.
    GroupScore {
        /// The largest selection value in it.
        Max,
        /// The sum of the two largest.
        Top2Sum,
    }
}

named! {
    /// Noise on the choice, in training.
    Noise {
        /// None.
        None,
        /// Gumbel noise on the logits for all choices (DeepSpeed's RSample).
        Sample,
        /// Gumbel noise on the logits for the choices after the first (DeepSpeed and FAIR).
        SampleSecond,
        /// A choice after the first is kept with probability `min(1, 2 gate)` (GShard).
        RandomSecond,
    }
}

named! {
    /// Who stays when an expert has more choices than slots.
    Order {
        /// Earlier tokens.
        Token,
        /// First choices, then second ones; earlier tokens among equals.
        Choice,
        /// Larger scores.
        Probability,
        /// Random ones in training (DeepSpeed's Random Token Selection), earlier tokens in evaluation.
        Random,
        /// First choices, then second ones; among equals tokens with a larger first gate (batch-prioritised, Tutel).
        Batch,
    }
}

named! {
    /// Slots of an expert for N tokens, E experts, k choices and capacity factor f.
    CapacityRule {
        /// `ceil(N / E * k f)`, at least `min_capacity` (spec 1.1).
        Deepspeed,
        /// `floor(k f N / E)`, at least `min_capacity` and at most N (Mesh TensorFlow).
        Gshard,
        /// `ceil(f k ceil(N / E))`; in evaluation `ceil(f N)` if `eval_capacity_factor` is given (fairseq).
        Fair,
        /// `k floor(f ceil(N / E))` (Tutel).
        Tutel,
    }
}

named! {
    /// Which choices the load-balancing loss counts.
    BalanceOf {
        /// First choices.
        First,
        /// All choices, 1/k each.
        All,
    }
}

named! {
    /// The network beside the experts, and its coefficient.
    Side {
        /// No such network.
        None,
        /// Its output is added: a shared expert.
        Constant,
        /// Its output is weighted by a sigmoid of its own score.
        Sigmoid,
        /// Experts and network are weighted by a softmax of two scores (PR-MoE).
        Softmax,
    }
}

/// All fields of a router.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the fields are those of RouterTable")]
pub struct Routing {
    pub score: Score,
    pub normalise: Normalise,
    pub scale: f64,
    pub apply_to: ApplyTo,
    pub bias: bool,
    pub selection_bias: bool,
    pub bias_rate: f64,
    pub groups: usize,
    pub group_keep: usize,
    pub group_score: GroupScore,
    pub jitter: f64,
    pub noise: Noise,
    pub mixer_eps: f64,
    pub order: Order,
    pub capacity: CapacityRule,
    pub balance: BalanceOf,
    pub side: Side,
    pub shared_ffn: Option<usize>,
    pub hash_layers: usize,
    pub expert_choice: bool,
    pub allow_expert_choice_decoding: bool,
}

impl Routing {
    /// Whether a training step needs random numbers for the router.
    pub fn is_noisy(&self) -> bool {
        self.jitter > 0.0 || self.noise != Noise::None || self.order == Order::Random
    }
}

impl fmt::Display for Routing {
    /// One line for people: what differs from the plainest router.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Routing { score, normalise, scale, jitter, groups, group_keep, .. } = self;
        write!(f, "score {}, gates normalised {}", name(score), name(normalise))?;
        for (holds, what) in [
            (*scale != 1.0, format!("scale {scale}")),
            (self.apply_to == ApplyTo::Input, "applied to the input".into()),
            (self.bias, "bias".into()),
            (self.selection_bias, format!("selection bias moved by {}", self.bias_rate)),
            (*groups > 1, format!("{group_keep} of {groups} groups by {}", name(&self.group_score))),
            (*jitter > 0.0, format!("jitter {jitter}")),
            (self.noise != Noise::None, format!("noise {}", name(&self.noise))),
            (self.expert_choice, "experts choose tokens".into()),
            (self.hash_layers > 0, format!("{} layers by token id", self.hash_layers)),
            (self.side != Side::None, format!("side branch {}", name(&self.side))),
            (true, format!("overflow by {}", name(&self.order))),
        ] {
            if holds {
                write!(f, ", {what}")?;
            }
        }
        Ok(())
    }
}

/// The name a value has in a file.
fn name<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

impl ModelConfig {
    /// The router in full: what the file gives, else what its preset says.
    ///
    /// Without a table and without a preset that is the plain router of `top_k`. `mlp = "residual"` is the side branch
    /// `softmax`, `renormalise` the older spelling of two of the `normalise` rules.
    pub fn routing(&self) -> Routing {
        let absent = RouterTable::default();
        let t = self.router.as_ref().unwrap_or(&absent);
        let base = self.family().routing(self.top_k());
        let older = self.renormalise.map(|r| match r {
            Renormalise::Never => Normalise::None,
            Renormalise::AfterDropping => Normalise::AfterDropping,
        });
        let residual = (self.mlp == Mlp::Residual).then_some(Side::Softmax);
        Routing {
            score: t.score.unwrap_or(base.score),
            normalise: t.normalise.or(older).unwrap_or(base.normalise),
            scale: t.scale.unwrap_or(base.scale),
            apply_to: t.apply_to.unwrap_or(base.apply_to),
            bias: t.bias.unwrap_or(base.bias),
            selection_bias: t.selection_bias.unwrap_or(base.selection_bias),
            bias_rate: t.bias_rate.unwrap_or(base.bias_rate),
            groups: t.groups.unwrap_or(base.groups),
            group_keep: t.group_keep.unwrap_or(base.group_keep),
            group_score: t.group_score.unwrap_or(base.group_score),
            jitter: t.jitter.unwrap_or(base.jitter),
            noise: t.noise.unwrap_or(base.noise),
            mixer_eps: t.mixer_eps.unwrap_or(base.mixer_eps),
            order: t.order.unwrap_or(base.order),
            capacity: t.capacity.unwrap_or(base.capacity),
            balance: t.balance.unwrap_or(base.balance),
            side: t.side.or(residual).unwrap_or(base.side),
            shared_ffn: t.shared_ffn.or(base.shared_ffn),
            hash_layers: t.hash_layers.unwrap_or(base.hash_layers),
            expert_choice: t.expert_choice.unwrap_or(base.expert_choice),
            allow_expert_choice_decoding: t.allow_expert_choice_decoding.unwrap_or(base.allow_expert_choice_decoding),
        }
    }

    /// The preset of the router, or the plain router of `top_k`.
    pub fn family(&self) -> Family {
        self.router.as_ref().and_then(|t| t.preset).unwrap_or(match self.top_k() {
            1 => Family::Top1,
            2 => Family::Top2,
            _ => Family::TopK,
        })
    }

    /// Experts a token goes to: `top_k`, else that of the router's preset, else 1.
    pub fn top_k(&self) -> usize {
        let of_preset = || self.router.as_ref().and_then(|t| t.preset).map(Family::top_k);
        self.top_k.or_else(of_preset).unwrap_or(1)
    }

    /// Whether the layer at this index (from 0, over all layers) is one of the MoE layers that route by token id.
    pub fn routes_by_id(&self, layer: usize) -> bool {
        let experts = self.experts_per_layer();
        let before = experts.iter().take(layer).filter(|&&e| e > 0).count();
        experts.get(layer).is_some_and(|&e| e > 0) && before < self.routing().hash_layers
    }

    /// Experts that a token meets on average in a layer of `experts`: `top_k`, or the capacity factor, rounded up, where
    /// experts choose.
    pub fn experts_per_token(&self, experts: usize) -> usize {
        match self.capacity_factor {
            Some(factor) if self.routing().expert_choice => (factor.ceil() as usize).clamp(1, experts.max(1)),
            Some(_) | None => self.top_k(),
        }
    }

    /// Inner width of the network beside the experts.
    pub fn shared_ffn(&self) -> usize {
        self.routing().shared_ffn.unwrap_or(self.ffn())
    }
}

/// A router as a file has it: a table, or the bare name of a preset.
pub(super) fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Option<RouterTable>, D::Error> {
    struct Visitor;
    impl<'de> de::Visitor<'de> for Visitor {
        type Value = RouterTable;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the name of a router or a table")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<RouterTable, E> {
            let preset = Family::deserialize(StrDeserializer::new(text))?;
            Ok(RouterTable { preset: Some(preset), ..RouterTable::default() })
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<RouterTable, A::Error> {
            RouterTable::deserialize(MapAccessDeserializer::new(map))
        }
    }
    // An empty table says nothing.
    from.deserialize_any(Visitor).map(|table| Some(table).filter(|t| *t != RouterTable::default()))
}

/// The reverse of [`read`]: a router that is only a preset is its name.
pub(super) fn write<S: Serializer>(router: &Option<RouterTable>, to: S) -> Result<S::Ok, S::Error> {
    match router {
        Some(table) => match table.preset {
            Some(preset) if *table == (RouterTable { preset: Some(preset), ..RouterTable::default() }) => {
                preset.serialize(to)
            }
            Some(_) | None => table.serialize(to),
        },
        None => to.serialize_none(),
    }
}
