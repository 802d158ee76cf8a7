//! The sparse layer of the models with the router of any family, at random sizes and with inputs that are edges: idle experts, one
//! busy expert, experts or tokens that are equal, one token, k = E, capacities that leave no slot. [`dense`] is the same layer
//! without a sparse op, [`oracle`] who is chosen and kept, computed here from the routers' rules.

pub mod check;
pub mod dense;
pub mod oracle;

use std::sync::LazyLock;

use moebius_ir::{DType, Result, Role, TensorType, Value, gradients};
use moebius_models::config::{Config, Family, Mlp, ModelConfig, Noise, Normalise, Order, RouterTable, Routing, Side};
use moebius_models::gpt::router::{RouterNoise, Source};
use moebius_models::gpt::{MoeStatistics, Parameters, Pass, moe_layer};

use crate::Sketch;

/// How the numbers of a draw lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Normal numbers.
    Plain,
    /// Every second expert is far behind, so that no token wants it if there is another.
    Idle,
    /// One expert is far ahead.
    Single,
    /// Experts are equal in pairs.
    EqualExperts,
    /// Tokens are equal, in pairs or all of them.
    EqualTokens,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] = [Kind::Plain, Kind::Idle, Kind::Single, Kind::EqualExperts, Kind::EqualTokens];
}

/// A random layer and its tokens; [`Draw::fitted`] makes it one that its family allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// The router's preset.
    pub family: Family,
    /// Experts, at least 2.
    pub experts: usize,
    /// Choices of a token.
    pub k: usize,
    /// Tokens.
    pub tokens: usize,
    /// Columns of a token, at least 2.
    pub width: usize,
    /// Columns inside an expert.
    pub hidden: usize,
    /// Capacity factor; `None` for dropless.
    pub capacity: Option<f64>,
    /// Least capacity.
    pub least: usize,
    /// A dense network beside the experts, weighted by a softmax, whatever the family has there.
    pub residual: bool,
    /// The router's noise is on, where the family has any.
    pub noisy: bool,
    /// The layer is one that routes by token id, where the family has such layers.
    pub by_id: bool,
    /// How the numbers lie.
    pub kind: Kind,
    /// Seed of the numbers.
    pub seed: u32,
}

/// How far ahead or behind experts are: more than their logits differ otherwise.
const FAR: f64 = 12.0;

impl Draw {
    /// The nearest draw that the family allows.
    #[must_use]
    pub fn fitted(mut self) -> Draw {
        let plain = self.family.routing(2);
        if plain.groups > 1 {
            self.experts = (self.experts / 2).max(2) * 2;
        }
        if self.family == Family::ExpertChoice {
            self.k = 1;
            self.capacity = self.capacity.or(Some(1.0));
        } else if let Some(k) = self.family.fixed_top_k() {
            self.k = k;
        } else {
            // A single gate that is divided by itself is a constant, which the models refuse.
            let least = if self.family.routing(1).normalise == Normalise::None { 1 } else { 2 };
            self.k = self.k.clamp(least, self.experts);
        }
        self
    }

    /// The same with as many choices as experts, unless the family has one choice only.
    #[must_use]
    pub fn with_all_experts(mut self) -> Draw {
        self.k = self.experts;
        let fitted = self.fitted();
        if fitted.k == 2 { Draw { experts: 2, ..fitted } } else { fitted }
    }

    /// A model whose only layer is this one.
    ///
    /// # Panics
    /// If the text of the configuration is no configuration: a bug.
    pub fn config(&self) -> ModelConfig {
        // Read once: properties draw thousands.
        static PLAIN: LazyLock<ModelConfig> = LazyLock::new(|| {
            let text = "[model]\nname = \"drawn\"\nvocab = 16\nlayers = 1\nwidth = 8\nheads = 1\nsequence = 8\n\
                        [train]\nbatch = 1\nsteps = 1\nlearning_rate = 1.0\n";
            Config::from_toml(text, "drawn").unwrap_or_else(|e| panic!("{e}")).model
        });
        let mut m = PLAIN.clone();
        let plain = self.family.routing(self.k);
        let grouped = plain.groups > 1;
        m.router = Some(RouterTable {
            preset: Some(self.family),
            groups: grouped.then_some(2),
            // Two groups, of which one stays where it has enough experts.
            group_keep: grouped.then_some(1 + usize::from(self.k > self.experts / 2)),
            hash_layers: (plain.hash_layers > 0).then_some(usize::from(self.by_id)),
            side: self.residual.then_some(Side::Softmax),
            ..RouterTable::default()
        });
        m.mlp = if self.residual { Mlp::Residual } else { Mlp::Standard };
        (m.expert_interval, m.experts, m.top_k) = (1, vec![self.experts], Some(self.k));
        (m.width, m.ffn, m.sequence) = (self.width, Some(self.hidden), self.tokens);
        (m.capacity_factor, m.min_capacity) = (self.capacity, self.least);
        m
    }
}

/// The layer of a [`Draw`], with everything that is known of it.
pub struct Layer {
    /// Its graph and inputs.
    pub s: Sketch,
    /// The configuration.
    pub config: ModelConfig,
    /// The router.
    pub routing: Routing,
    /// The tokens, f32 `[1,T,W]`.
    pub x: Value,
    /// The result, of the same type.
    pub y: Value,
    /// Losses, counts and choices.
    pub statistics: MoeStatistics,
}

impl Layer {
    /// The layer as the models build it. Inputs are named `x`, `dy` (what the result is weighted by), `ids`, `jitter`, `choice`,
    /// `priority`, and as the models name parameters; a parameter that `change` names gets what it returns.
    ///
    /// # Errors
    /// Those of the ops: a bug.
    pub fn new(draw: &Draw, change: &dyn Fn(&str, &mut [f64])) -> Result<Layer> {
        let Draw { experts: e, tokens: t, width: w, kind, .. } = *draw;
        let config = draw.config();
        let routing = config.routing();
        let mut s = Sketch::new(DType::F32).seeded(draw.seed);
        let mut rows = s.normals(t * w);
        // A column of ones, by which the router can prefer an expert.
        rows.chunks_mut(w).for_each(|row| row[w - 1] = 1.0);
        if kind == Kind::EqualTokens {
            let equal = if draw.seed.is_multiple_of(2) { 2 } else { t };
            (0..t).filter(|i| i % equal > 0).for_each(|i| rows.copy_within((i - 1) * w..i * w, i * w));
        }
        let ty = TensorType::f32([1, t, w]);
        let x = s.named("x", Role::Feed, ty.clone(), rows, true)?;
        let dy = s.normals(t * w);
        s.named("dy", Role::Feed, ty, dy, false)?;
        let ids = (0..t).map(|i| (i * 7 % 16) as f64).collect();
        let ids = s.named("ids", Role::Feed, TensorType::i32([1, t]), ids, false)?;
        let noise = if draw.noisy { noise(&mut s, &routing, [t, w, e, draw.k])? } else { RouterNoise::default() };
        let pass = Pass { training: true, noise, ids: Some(ids), ..Pass::default() };
        let (y, statistics) = moe_layer(&mut s.graph, &mut Parameters::new(&config), 0, e, x, &pass)?;
        let open: Vec<(String, Value)> =
            s.graph.inputs().iter().filter(|(name, _)| !s.inputs.contains_key(name)).cloned().collect();
        for (name, value) in open {
            let ty = s.graph.ty(value).clone();
            let size = if name.ends_with("selection_bias") { 0.3 } else { 1.0 };
            let mut data: Vec<f64> = s.normals(ty.elements()).into_iter().map(|v| size * v).collect();
            let name = name.as_str();
            let per_expert = data.len() / e;
            match kind {
                Kind::Idle | Kind::Single if name.ends_with("router.weight") => {
                    for x in 0..e {
                        let far = match kind {
                            Kind::Single if x == e / 2 => FAR,
                            Kind::Idle if x % 2 == 1 => -FAR,
                            Kind::Plain | Kind::Idle | Kind::Single | Kind::EqualExperts | Kind::EqualTokens => 0.0,
                        };
                        data[x * w + w - 1] += far;
                    }
                }
                // Only what chooses is equal; the experts themselves differ.
                Kind::EqualExperts if name.contains(".router.") => {
                    for i in 0..e / 2 {
                        data.copy_within(2 * i * per_expert..(2 * i + 1) * per_expert, (2 * i + 1) * per_expert);
                    }
                }
                Kind::Plain | Kind::Idle | Kind::Single | Kind::EqualExperts | Kind::EqualTokens => {}
            }
            change(name, &mut data);
            let parameter = s.graph.input_of(value).is_some_and(|i| i.role == Role::Parameter);
            s.give(name, value, data, parameter);
        }
        Ok(Layer { s, config, routing, x, y, statistics })
    }

    /// Outputs `y`, `balance`, `z`, `expert_index`, `dropped`, and `d.NAME` for `<y, dy>` plus the losses as far as `losses`.
    ///
    /// # Errors
    /// Those of the ops: a bug.
    pub fn outputs(&mut self, losses: bool) -> Result<()> {
        let statistics = self.statistics;
        let named = [("balance", statistics.load_balancing_loss), ("z", statistics.z_loss)];
        outputs(&mut self.s, self.y, &named, losses)?;
        self.s.graph.output("expert_index", statistics.expert_index)?;
        self.s.graph.output("dropped", statistics.dropped)
    }
}

/// Outputs `y`, those named, and `d.NAME` for the loss `<y, dy>`, plus those named if `losses`.
pub(crate) fn outputs(s: &mut Sketch, y: Value, named: &[(&str, Value)], losses: bool) -> Result<()> {
    let g = &mut s.graph;
    let dy = g.input_named("dy").unwrap_or_else(|| unreachable!("every layer has a feed dy"));
    let product = g.mul(y, dy)?;
    let mut loss = g.sum_all(product)?;
    g.output("y", y)?;
    for &(name, value) in named {
        g.output(name, value)?;
        loss = if losses { g.add(loss, value)? } else { loss };
    }
    let wrt: Vec<Value> = s.wrt.iter().map(|&(_, v)| v).collect();
    let grads = gradients(g, loss, &wrt)?;
    for ((name, _), grad) in s.wrt.iter().zip(grads) {
        g.output(format!("d.{name}"), grad)?;
    }
    Ok(())
}

/// The numbers that the router wants, as inputs.
fn noise(s: &mut Sketch, routing: &Routing, [t, w, e, k]: [usize; 4]) -> Result<RouterNoise> {
    let given = |s: &mut Sketch, name: &str, shape: [usize; 2], map: &dyn Fn(f64) -> f64| {
        let data = s.normals(shape[0] * shape[1]).into_iter().map(map).collect();
        s.named(name, Role::Feed, TensorType::f32(shape), data, false).map(Source::Given)
    };
    // Any number between 0 and 1 that is not the same for two.
    let uniform = |x: f64| 0.5 + 0.5 * x.tanh();
    let mut noise = RouterNoise::default();
    if routing.jitter > 0.0 {
        noise.jitter = given(s, "jitter", [t, w], &|x| 1.0 + 0.1 * x.tanh())?;
    }
    match routing.noise {
        Noise::None => {}
        Noise::Sample | Noise::SampleSecond => noise.choice = given(s, "choice", [t, e], &|x| x)?,
        Noise::RandomSecond => noise.choice = given(s, "choice", [t, k], &uniform)?,
    }
    if routing.order == Order::Random {
        noise.priority = given(s, "priority", [t, e], &uniform)?;
    }
    Ok(noise)
}
