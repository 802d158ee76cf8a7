//! A sparse layer without a sparse op: GShard's form of masks and products (arXiv 2006.16668, algorithm 1) for any router, and the
//! mixture of all experts. Both are graphs of their own over the same inputs, evaluated in f64.

use moebius_ir::ops::ReduceFn;
use moebius_ir::{DType, Graph, Result, Role, Tensor, TensorType, Value};
use moebius_models::config::{ApplyTo, BalanceOf, Normalise, Score, Side};

use super::oracle::Routes;
use super::{Layer, outputs};
use crate::Sketch;

/// The values that the layer's parts need again and again.
struct Dense<'a> {
    layer: &'a Layer,
    s: Sketch,
    /// `[T,W]`.
    x: Value,
    /// f32 `[T,E]`.
    logits: Value,
    tokens: usize,
    experts: usize,
}

impl<'a> Dense<'a> {
    /// All inputs of the layer, and the logits.
    fn new(layer: &'a Layer) -> Result<Dense<'a>> {
        let mut s = Sketch::new(DType::F32);
        for (name, value) in layer.s.graph.inputs() {
            let ty = layer.s.graph.ty(*value).clone();
            let role = layer.s.graph.input_of(*value).map_or(Role::Feed, |i| i.role);
            let wrt = layer.s.wrt.iter().any(|(n, _)| n == name);
            s.named(name, role, ty, layer.s.inputs[name].data.clone(), wrt)?;
        }
        // The gradients in the order of the layer's.
        s.wrt.sort_by_key(|(name, _)| layer.s.wrt.iter().position(|(n, _)| n == name));
        let input = |g: &Graph, name: &str| g.input_named(name);
        let g = &mut s.graph;
        let x = input(g, "x").unwrap_or_else(|| unreachable!("every layer has x"));
        let (tokens, width) = (g.shape(x)[1], g.shape(x)[2]);
        let x = g.reshape(x, [tokens, width])?;
        let of_router = match input(g, "jitter") {
            Some(jitter) => g.mul(x, jitter)?,
            None => x,
        };
        let parameter = |g: &Graph, name: &str| input(g, &format!("layers.0.moe.router.{name}"));
        let weight = parameter(g, "weight").unwrap_or_else(|| unreachable!("every layer has a router"));
        let experts = g.shape(weight)[0];
        let bias = parameter(g, "bias");
        let logits = g.matmul_with(of_router, weight, bias, false, true)?;
        Ok(Dense { layer, s, x, logits, tokens, experts })
    }

    fn parameter(&self, name: &str) -> Value {
        let found = self.s.graph.input_named(&format!("layers.0.moe.{name}"));
        found.unwrap_or_else(|| unreachable!("the layer has no {name}"))
    }

    /// Rows of `x`, each the sum over axis 1, `[rows,1]`.
    fn row_sums(&mut self, x: Value) -> Result<Value> {
        let rows = self.s.graph.shape(x)[0];
        let sum = self.s.graph.reduce(ReduceFn::Sum, x, &[1])?;
        self.s.graph.reshape(sum, [rows, 1])
    }

    /// The score of every expert `[T,E]` but for a mixer, by its definition.
    fn scores(&mut self) -> Result<Value> {
        let g = &mut self.s.graph;
        match self.layer.routing.score {
            Score::Softmax => g.softmax(self.logits),
            Score::Sigmoid => g.sigmoid(self.logits),
            Score::SqrtSoftplus => {
                let exp = g.exp(self.logits)?;
                let more = g.add_scalar(exp, 1.0)?;
                let softplus = g.ln(more)?;
                g.sqrt(softplus)
            }
            Score::Identity | Score::SparseMixer => Ok(self.logits),
        }
    }

    /// Load-balancing loss and z-loss by their definitions; `chosen [T,E]` is the mask of the choices that count, its rows
    /// summing to 1.
    fn losses(&mut self, scores: Value, chosen: Value) -> Result<[Value; 2]> {
        let p = match self.layer.routing.score {
            Score::Sigmoid | Score::SqrtSoftplus => {
                let sum = self.row_sums(scores)?;
                self.s.graph.div(scores, sum)?
            }
            Score::Softmax | Score::Identity | Score::SparseMixer => self.s.graph.softmax(self.logits)?,
        };
        let experts = self.experts as f64;
        let expert_choice = self.layer.routing.expert_choice;
        let g = &mut self.s.graph;
        let balance = if expert_choice {
            g.scalar(0.0)?
        } else {
            let (p, m) = (g.reduce(ReduceFn::Mean, p, &[0])?, g.reduce(ReduceFn::Mean, chosen, &[0])?);
            let product = g.mul(p, m)?;
            let sum = g.sum_all(product)?;
            g.mul_scalar(sum, experts)?
        };
        let exp = g.exp(self.logits)?;
        let sum = g.reduce(ReduceFn::Sum, exp, &[1])?;
        let lse = g.ln(sum)?;
        let square = g.square(lse)?;
        Ok([balance, g.mean_all(square)?])
    }

    fn mask(&self, name: &str) -> Result<Value> {
        Ok(self.s.graph.input_named(name).unwrap_or_else(|| unreachable!("no mask {name}")))
    }

    fn feed_mask(&mut self, name: String, shape: [usize; 2], data: Vec<f64>) -> Result<Value> {
        self.s.named(&name, Role::Feed, TensorType::f32(shape), data, false)
    }

    /// `rows [E,C,W]` of every expert through that expert, `[E*C,W]`.
    fn experts_on(&mut self, rows: Value) -> Result<Value> {
        let [up, up_bias, down, down_bias] =
            ["up.weight", "up.bias", "down.weight", "down.bias"].map(|n| self.parameter(&format!("experts.{n}")));
        let e = self.experts;
        let g = &mut self.s.graph;
        let (c, w, h) = (g.shape(rows)[1], g.shape(rows)[2], g.shape(up)[2]);
        let hidden = g.matmul(rows, up)?;
        let bias = g.reshape(up_bias, [e, 1, h])?;
        let hidden = g.add(hidden, bias)?;
        let hidden = g.gelu(hidden)?;
        let y = g.matmul(hidden, down)?;
        let bias = g.reshape(down_bias, [e, 1, w])?;
        let y = g.add(y, bias)?;
        g.reshape(y, [e * c, w])
    }

    /// The dense network beside the experts, `[T,W]`.
    fn network(&mut self) -> Result<Value> {
        let [up, up_bias, down, down_bias] =
            ["up.weight", "up.bias", "down.weight", "down.bias"].map(|n| self.parameter(&format!("mlp.{n}")));
        let g = &mut self.s.graph;
        let h = g.matmul_with(self.x, up, Some(up_bias), false, false)?;
        let h = g.gelu(h)?;
        g.matmul_with(h, down, Some(down_bias), false, false)
    }

    /// The experts' sum `y [T,W]` with the side branch.
    fn beside(&mut self, y: Value) -> Result<Value> {
        match self.layer.routing.side {
            Side::None => Ok(y),
            Side::Constant => {
                let side = self.network()?;
                self.s.graph.add(y, side)
            }
            Side::Sigmoid => {
                let (side, weight) = (self.network()?, self.parameter("coefficient.weight"));
                let g = &mut self.s.graph;
                let score = g.matmul_with(self.x, weight, None, false, true)?;
                let coefficient = g.sigmoid(score)?;
                let side = g.mul(side, coefficient)?;
                g.add(y, side)
            }
            Side::Softmax => {
                let (side, weight) = (self.network()?, self.parameter("coefficient.weight"));
                let bias = self.parameter("coefficient.bias");
                let g = &mut self.s.graph;
                let score = g.matmul_with(self.x, weight, Some(bias), false, true)?;
                let c = g.softmax(score)?;
                let (of_experts, of_side) = (g.slice(c, 1, 0, 1)?, g.slice(c, 1, 1, 1)?);
                let (y, side) = (g.mul(y, of_experts)?, g.mul(side, of_side)?);
                g.add(y, side)
            }
        }
    }

    fn finish(mut self, y: Value, balance_and_z: Option<[Value; 2]>, losses: bool) -> Result<Sketch> {
        let y = self.beside(y)?;
        let shape = self.layer.s.graph.shape(self.layer.x).to_vec();
        let y = self.s.graph.reshape(y, shape)?;
        let named: Vec<(&str, Value)> = ["balance", "z"].into_iter().zip(balance_and_z.into_iter().flatten()).collect();
        outputs(&mut self.s, y, &named, losses)?;
        Ok(self.s)
    }
}

/// The logits of the layer `[T,E]`, in f64.
///
/// # Errors
/// Those of the ops: a bug.
pub fn logits(layer: &Layer) -> Result<Tensor> {
    let dense = Dense::new(layer)?;
    let run = moebius_ir::reference::run(&dense.s.graph, &dense.s.inputs, moebius_ir::reference::Precision::Exact)?;
    Ok(run.value(dense.logits).clone())
}

/// GShard's form for these routes and `slots` slots of each expert, with outputs as [`Layer::outputs`] names them.
///
/// # Errors
/// Those of the ops: a bug.
pub fn one_hot(layer: &Layer, routes: &Routes, slots: usize) -> Result<Sketch> {
    let mut d = Dense::new(layer)?;
    let (t, e, routing) = (d.tokens, d.experts, layer.routing);
    let k = routes.expert[0].len();
    let mut choices = Vec::new();
    let mut places = Vec::new();
    for j in 0..k {
        let (mut choice, mut place) = (vec![0.0; t * e], vec![0.0; t * e * slots]);
        for n in 0..t {
            let expert = routes.expert[n][j];
            choice[n * e + expert] = 1.0;
            if let Some(at) = routes.place[n][j] {
                place[(n * e + expert) * slots + at] = 1.0;
            }
        }
        choices.push(d.feed_mask(format!("choice {j}"), [t, e], choice)?);
        places.push(d.feed_mask(format!("place {j}"), [t, e * slots], place)?);
        if routing.score == Score::SparseMixer {
            let near = (0..t).flat_map(|n| routes.near[n][j].iter().map(|&b| f64::from(u8::from(b))));
            let near = near.collect();
            d.feed_mask(format!("near {j}"), [t, e], near)?;
        }
    }
    let scores = d.scores()?;
    let mut gates = Vec::new();
    for (j, &choice) in choices.iter().enumerate() {
        let gate = if routing.score == Score::SparseMixer {
            let near = d.mask(&format!("near {j}"))?;
            let exp = d.s.graph.exp(d.logits)?;
            let (chosen, near) = (d.s.graph.mul(exp, choice)?, d.s.graph.mul(exp, near)?);
            let (chosen, sum) = (d.row_sums(chosen)?, d.row_sums(near)?);
            d.s.graph.div(chosen, sum)?
        } else {
            let chosen = d.s.graph.mul(scores, choice)?;
            d.row_sums(chosen)?
        };
        gates.push(gate);
    }
    let mut all = d.s.graph.concat(&gates, 1)?;
    match routing.normalise {
        Normalise::None => {}
        Normalise::Softmax => all = d.s.graph.softmax(all)?,
        Normalise::BeforeDropping | Normalise::AfterDropping => {
            let mut least = 1e-20;
            if routing.normalise == Normalise::AfterDropping {
                let mut kept = Vec::new();
                for &place in &places {
                    kept.push(d.row_sums(place)?);
                }
                let kept = d.s.graph.concat(&kept, 1)?;
                all = d.s.graph.mul(all, kept)?;
                least = f64::from(f32::EPSILON);
            }
            let sum = d.row_sums(all)?;
            let least = d.s.graph.scalar(least)?;
            let sum = d.s.graph.maximum(sum, least)?;
            all = d.s.graph.div(all, sum)?;
        }
    }
    all = d.s.graph.mul_scalar(all, routing.scale)?;
    let (mut bare, mut weighted) = (None, None);
    for (j, &place) in places.iter().enumerate() {
        let g = &mut d.s.graph;
        let gate = g.slice(all, 1, j, 1)?;
        let weight = g.mul(place, gate)?;
        bare = Some(sum(g, bare, place)?);
        weighted = Some(sum(g, weighted, weight)?);
    }
    let (Some(bare), Some(weighted)) = (bare, weighted) else { unreachable!("k is at least 1") };
    let (into, back) = match routing.apply_to {
        ApplyTo::Output => (bare, weighted),
        ApplyTo::Input => (weighted, bare),
    };
    let width = d.s.graph.shape(d.x)[1];
    let rows = d.s.graph.matmul_with(into, d.x, None, true, false)?;
    let rows = d.s.graph.reshape(rows, [e, slots, width])?;
    let rows = d.experts_on(rows)?;
    let y = d.s.graph.matmul(back, rows)?;
    let counted = match routing.balance {
        BalanceOf::First => choices[0],
        BalanceOf::All => {
            let mut all = choices[0];
            for &choice in &choices[1..] {
                all = d.s.graph.add(all, choice)?;
            }
            d.s.graph.mul_scalar(all, 1.0 / k as f64)?
        }
    };
    let losses = d.losses(scores, counted)?;
    d.finish(y, Some(losses), true)
}

fn sum(g: &mut Graph, sum: Option<Value>, value: Value) -> Result<Value> {
    match sum {
        Some(sum) => g.add(sum, value),
        None => Ok(value),
    }
}

/// The mixture of all experts on all tokens, for a layer with k = E that drops nothing: no choice is made, so nothing depends on
/// one. `None` for a mixer, whose gates depend on the order of its choices. Outputs `y` and `d.NAME` without the losses.
///
/// # Errors
/// Those of the ops: a bug.
pub fn mixture(layer: &Layer) -> Result<Option<Sketch>> {
    let routing = layer.routing;
    if routing.score == Score::SparseMixer {
        return Ok(None);
    }
    let mut d = Dense::new(layer)?;
    let (t, e, width) = (d.tokens, d.experts, d.s.graph.shape(d.x)[1]);
    let mut weights = d.scores()?;
    weights = match routing.normalise {
        Normalise::None => weights,
        Normalise::Softmax => d.s.graph.softmax(weights)?,
        Normalise::BeforeDropping | Normalise::AfterDropping => {
            let sum = d.row_sums(weights)?;
            d.s.graph.div(weights, sum)?
        }
    };
    weights = d.s.graph.mul_scalar(weights, routing.scale)?;
    let g = &mut d.s.graph;
    // [E,T,1]
    let weights = g.transpose(weights, &[1, 0])?;
    let weights = g.reshape(weights, [e, t, 1])?;
    let rows = g.reshape(d.x, [1, t, width])?;
    let rows = match routing.apply_to {
        ApplyTo::Output => g.broadcast(rows, [e, t, width])?,
        ApplyTo::Input => g.mul(rows, weights)?,
    };
    let y = d.experts_on(rows)?;
    let g = &mut d.s.graph;
    let mut y = g.reshape(y, [e, t, width])?;
    if routing.apply_to == ApplyTo::Output {
        y = g.mul(y, weights)?;
    }
    let y = g.reduce(ReduceFn::Sum, y, &[0])?;
    d.finish(y, None, false).map(Some)
}

/// The dense network of a residual layer alone. Outputs `y` and `d.NAME`; nothing else of the layer has a gradient.
///
/// # Errors
/// Those of the ops: a bug.
pub fn network_alone(layer: &Layer) -> Result<Sketch> {
    let mut d = Dense::new(layer)?;
    let y = d.network()?;
    let shape = layer.s.graph.shape(layer.x).to_vec();
    let y = d.s.graph.reshape(y, shape)?;
    outputs(&mut d.s, y, &[], false)?;
    Ok(d.s)
}
