//! The list of a model's parameters, from which graphs, initialisation and checkpoints all take names and shapes.

use std::collections::HashMap;

use moebius_ir::{DType, Graph, Result, Shape, TensorType, Value};

use super::init::Start;
use crate::config::{ComputeDtype, ModelConfig, Norm, Side};

/// One tensor of the model, always f32 on the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name in sessions and checkpoints.
    pub name: String,
    /// Its extents.
    pub shape: Shape,
    /// How it is initialised.
    pub start: Start,
}

impl Parameter {
    /// All parameters of a model, in the order of a forward pass. Matrices are `[in, out]`, those of experts
    /// `[experts, in, out]`, except embeddings, router and coefficient: `[rows, width]`.
    pub fn list(config: &ModelConfig) -> Vec<Parameter> {
        let (d, f) = (config.width, config.ffn());
        let routing = config.routing();
        let kv = config.kv_heads() * config.head_width();
        // Output projections start smaller by sqrt(2 * layers), as every layer adds two of them to the residual stream.
        let (std, out_std) = (config.init_std, config.init_std / (2.0 * config.layers as f64).sqrt());
        let mut list = Vec::new();
        let mut add = |name: String, shape: Shape, start: Start| list.push(Parameter { name, shape, start });
        add("embedding.weight".into(), [config.vocab, d].into(), Start::Normal { std });
        add("position.weight".into(), [config.sequence, d].into(), Start::Normal { std });
        for (layer, experts) in config.experts_per_layer().into_iter().enumerate() {
            let at = |name: &str| format!("layers.{layer}.{name}");
            norm(&mut add, config, &at("attention_norm"));
            add(at("attention.qkv.weight"), [d, d + 2 * kv].into(), Start::Normal { std });
            add(at("attention.qkv.bias"), [d + 2 * kv].into(), Start::Zero);
            add(at("attention.out.weight"), [d, d].into(), Start::Normal { std: out_std });
            add(at("attention.out.bias"), [d].into(), Start::Zero);
            norm(&mut add, config, &at("ffn_norm"));
            if experts == 0 {
                feed_forward(&mut add, &at("ffn"), None, (d, f), (std, out_std), None);
                continue;
            }
            // PyTorch's default for a linear layer, which DeepSpeed leaves to router and coefficient.
            let uniform = Start::Uniform { bound: 1.0 / (d as f64).sqrt() };
            add(at("moe.router.weight"), [experts, d].into(), uniform.clone());
            if routing.bias {
                add(at("moe.router.bias"), [experts].into(), Start::Zero);
            }
            let shared = config.identical_experts.then(|| at("moe.experts"));
            feed_forward(&mut add, &at("moe.experts"), Some(experts), (d, f), (std, out_std), shared.as_deref());
            if routing.side != Side::None {
                // A network of another width cannot begin as a copy of the experts.
                let shared = shared.filter(|_| config.shared_ffn() == f);
                let sizes = (d, config.shared_ffn());
                feed_forward(&mut add, &at("moe.mlp"), None, sizes, (std, out_std), shared.as_deref());
            }
            match routing.side {
                Side::None | Side::Constant => {}
                Side::Sigmoid => add(at("moe.coefficient.weight"), [1, d].into(), uniform),
                Side::Softmax => {
                    add(at("moe.coefficient.weight"), [2, d].into(), uniform.clone());
                    add(at("moe.coefficient.bias"), [2].into(), uniform);
                }
            }
        }
        norm(&mut add, config, "norm");
        if !config.tied_embeddings {
            add("output.weight".into(), [config.vocab, d].into(), Start::Normal { std });
        }
        list
    }

    /// What belongs to the model but is not trained by its gradient: the selection bias of each MoE layer, where the router
    /// has one. It starts at zero, moves in the training step, and is kept in checkpoints beside the parameters.
    pub fn untrained(config: &ModelConfig) -> Vec<Parameter> {
        let biased = config.routing().selection_bias;
        let layers = config.experts_per_layer().into_iter().enumerate();
        let layers = layers.filter(|&(layer, experts)| biased && experts > 0 && !config.routes_by_id(layer));
        let bias = |(layer, experts): (usize, usize)| Parameter {
            name: selection_bias(layer),
            shape: [experts].into(),
            start: Start::Zero,
        };
        layers.map(bias).collect()
    }
}

/// Name of the selection bias of the MoE layer at this index (0-based, over all layers).
pub(super) fn selection_bias(layer: usize) -> String {
    format!("layers.{layer}.moe.router.selection_bias")
}

fn norm(add: &mut impl FnMut(String, Shape, Start), config: &ModelConfig, name: &str) {
    add(format!("{name}.weight"), [config.width].into(), Start::One);
    if config.norm == Norm::Layer {
        add(format!("{name}.bias"), [config.width].into(), Start::Zero);
    }
}

/// The two linear layers of one feed-forward, or of `experts` stacked ones. With `shared`, every expert starts from one
/// and the same draw, named after `shared`, as DeepSpeed's deep copies do.
fn feed_forward(
    add: &mut impl FnMut(String, Shape, Start),
    name: &str,
    experts: Option<usize>,
    (d, f): (usize, usize),
    (std, out_std): (f64, f64),
    shared: Option<&str>,
) {
    let stacked = |dims: &[usize]| Shape::new(experts.into_iter().chain(dims.iter().copied()));
    let weight = |part: &str, std: f64, of: usize| match shared {
        Some(source) => Start::Shared { source: format!("{source}.{part}"), elements: of, std },
        None => Start::Normal { std },
    };
    add(format!("{name}.up.weight"), stacked(&[d, f]), weight("up", std, d * f));
    add(format!("{name}.up.bias"), stacked(&[f]), Start::Zero);
    add(format!("{name}.down.weight"), stacked(&[f, d]), weight("down", out_std, f * d));
    add(format!("{name}.down.bias"), stacked(&[d]), Start::Zero);
}

/// The dtype the model computes in.
pub(super) fn dtype(config: &ModelConfig) -> DType {
    match config.dtype {
        ComputeDtype::F32 => DType::F32,
        ComputeDtype::Bf16 => DType::Bf16,
    }
}

/// The parameters of one graph: each becomes an input when it is first asked for, in the model's compute dtype.
pub struct Parameters<'c> {
    config: &'c ModelConfig,
    is_teacher: bool,
    shapes: HashMap<String, Shape>,
    master: HashMap<String, Value>,
    compute: HashMap<String, Value>,
}

/// Name in the session of a tensor of the teacher.
pub fn of_teacher(name: &str) -> String {
    format!("teacher/{name}")
}

impl<'c> Parameters<'c> {
    /// Nothing asked for yet.
    pub fn new(config: &'c ModelConfig) -> Self {
        let shapes = Parameter::list(config).into_iter().map(|p| (p.name, p.shape)).collect();
        Parameters { config, is_teacher: false, shapes, master: HashMap::new(), compute: HashMap::new() }
    }

    /// Those of a teacher: states named by [`of_teacher`], which no gradient is taken of, each in the dtype it is used in.
    pub fn teacher(config: &'c ModelConfig) -> Self {
        Parameters { is_teacher: true, ..Parameters::new(config) }
    }

    /// The name in the session of a tensor of this model.
    pub(super) fn stored(&self, name: &str) -> String {
        if self.is_teacher { of_teacher(name) } else { name.to_owned() }
    }

    /// The model's configuration.
    pub fn config(&self) -> &'c ModelConfig {
        self.config
    }

    /// A parameter in f32, as it is trained.
    ///
    /// # Errors
    /// Those of [`Graph::parameter`].
    ///
    /// # Panics
    /// If the model has no such parameter: a bug of the model code.
    pub fn master(&mut self, g: &mut Graph, name: &str) -> Result<Value> {
        if let Some(&value) = self.master.get(name) {
            return Ok(value);
        }
        let ty = TensorType::f32(self.shape(name));
        let value = if self.is_teacher { g.state(of_teacher(name), ty)? } else { g.parameter(name, ty)? };
        self.master.insert(name.into(), value);
        Ok(value)
    }

    fn shape(&self, name: &str) -> Shape {
        self.shapes.get(name).unwrap_or_else(|| unreachable!("the model has no parameter {name:?}")).clone()
    }

    /// The output matrix `[vocab, width]`: the token embedding unless the model has its own.
    ///
    /// # Errors
    /// As [`Parameters::master`].
    pub fn output(&mut self, g: &mut Graph) -> Result<Value> {
        self.get(g, if self.config.tied_embeddings { "embedding.weight" } else { "output.weight" })
    }

    /// A parameter in the dtype the model computes in.
    ///
    /// # Errors
    /// As [`Parameters::master`].
    pub fn get(&mut self, g: &mut Graph, name: &str) -> Result<Value> {
        if let Some(&value) = self.compute.get(name) {
            return Ok(value);
        }
        let value = if self.is_teacher && !self.master.contains_key(name) {
            let ty = TensorType::new(dtype(self.config), self.shape(name));
            g.state(of_teacher(name), ty)?
        } else {
            let master = self.master(g, name)?;
            g.cast(master, dtype(self.config))?
        };
        self.compute.insert(name.into(), value);
        Ok(value)
    }
}
