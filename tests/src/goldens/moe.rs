//! A layer of DeepSpeed as the layer of the models ([`moe_layer`]), with its tensors under the models' names: DeepSpeed stores
//! matrices `[out, in]` and each expert by itself, the models `[in, out]` and all experts of a layer together.

use moebius_ir::{Graph, Op, Role, Tensor, TensorType, Value};
use moebius_models::config::ModelConfig;
use moebius_models::gpt::{MoeStatistics, Parameters, Pass, moe_layer};

use super::machine::Sheet;
use super::set::Problem;

/// Names of a layer's tensors in DeepSpeed.
#[derive(Clone, Copy)]
pub(super) struct Names<'a> {
    /// Of the router's matrix.
    pub(super) router: &'a str,
    /// What the names of an expert's tensors begin with, with `{}` for its number.
    pub(super) expert: &'a str,
    /// What those of the dense network begin with.
    pub(super) mlp: &'a str,
    /// What those of the coefficients begin with.
    pub(super) coefficient: &'a str,
    /// How those of a network end: first matrix and bias, second matrix and bias.
    pub(super) network: [&'static str; 4],
}

/// The tensors of DeepSpeed that a parameter of the models is made of.
struct Source {
    members: Vec<String>,
    transposed: bool,
    stacked: bool,
}

impl Names<'_> {
    /// Those of the parameter with this name after `layers.N.moe.`; `None` if DeepSpeed has nothing like it.
    fn source(&self, parameter: &str, experts: usize) -> Option<Source> {
        let one = |name: String, transposed| Source { members: vec![name], transposed, stacked: false };
        let of_network = |part: &str| {
            let i = ["up.weight", "up.bias", "down.weight", "down.bias"].iter().position(|p| *p == part)?;
            Some((self.network[i], part.ends_with("weight")))
        };
        if parameter == "router.weight" {
            return Some(one(self.router.into(), false));
        }
        if let Some(part) = parameter.strip_prefix("experts.") {
            let (name, transposed) = of_network(part)?;
            let members = (0..experts).map(|e| format!("{}{name}", self.expert.replace("{}", &e.to_string())));
            return Some(Source { members: members.collect(), transposed, stacked: true });
        }
        if let Some(part) = parameter.strip_prefix("mlp.") {
            let (name, transposed) = of_network(part)?;
            return Some(one(format!("{}{name}", self.mlp), transposed));
        }
        parameter.strip_prefix("coefficient.").map(|part| one(format!("{}{part}", self.coefficient), false))
    }
}

/// A parameter of a layer, and the tensors of DeepSpeed that it is made of.
pub(super) struct Part {
    /// The parameter, f32.
    pub(super) value: Value,
    members: Vec<String>,
    /// Extents of a member as the models have it, where that is its transpose.
    transposed: Option<[usize; 2]>,
}

impl Part {
    /// The members' parts, under their names, of a tensor of the parameter's shape such as its gradient.
    pub(super) fn split(&self, data: &[f64]) -> Vec<(String, Vec<f64>)> {
        let size = data.len() / self.members.len().max(1);
        let parts = self.members.iter().zip(data.chunks(size.max(1)));
        let back = |part: &[f64]| match self.transposed {
            Some([rows, columns]) => transposed(part, rows, columns),
            None => part.to_vec(),
        };
        parts.map(|(name, part)| (name.clone(), back(part))).collect()
    }
}

/// A matrix `[rows, columns]` the other way round.
fn transposed(data: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns).map(|i| data[i % rows * columns + i / rows]).collect()
}

/// The width between the two products of a network whose first bias is this tensor.
pub(super) fn inner_width(bias: &Tensor) -> usize {
    bias.ty.shape.last()
}

/// What [`layer`] adds.
pub(super) struct Layer {
    /// The result, of the shape of `x`.
    pub(super) y: Value,
    /// Losses and counts.
    pub(super) statistics: MoeStatistics,
    /// The slot of every choice, i32 `[N,k]`, -1 for dropped ones.
    pub(super) choice_slot: Value,
    /// The parameters, all differentiable.
    pub(super) parts: Vec<Part>,
}

/// Layer `number` of a model on tokens `x [N,H]` in the model's dtype, with its parameters from `tensor`.
pub(super) fn layer(
    sheet: &mut Sheet,
    config: &ModelConfig,
    number: usize,
    x: Value,
    pass: &Pass,
    names: Names<'_>,
    tensor: &dyn Fn(&str) -> Result<Tensor, Problem>,
) -> Result<Layer, Problem> {
    let Some(&experts) = config.experts_per_layer().get(number).filter(|&&e| e > 1) else {
        let (wanted, found) = ("at least 2".into(), format!("{:?}", config.experts));
        return Err(Problem::Size { what: format!("experts of layer {number}"), wanted, found });
    };
    let g: &mut Graph = &mut sheet.graph;
    let ty = g.ty(x).clone();
    let rows = g.reshape(x, [1, ty.shape.rows(), ty.shape.last()])?;
    let mut parameters = Parameters::new(config);
    let before = g.nodes().len();
    let (y, statistics) = moe_layer(g, &mut parameters, number, experts, rows, pass)?;
    // The layer tells how many choices found no slot, the node that gives the slots which.
    let assign = g.nodes()[before..].iter().find(|node| matches!(node.op, Op::Assign(_)));
    let Some(choice_slot) = assign.and_then(|node| node.results.get(1).copied()) else {
        let (wanted, found) = ("one".into(), "none".into());
        return Err(Problem::Size { what: format!("nodes `assign` of layer {number}"), wanted, found });
    };
    let y = g.reshape(y, ty.shape.clone())?;

    let prefix = format!("layers.{number}.moe.");
    let mut parts = Vec::new();
    for (name, value) in sheet.graph.inputs().to_vec() {
        let Some(parameter) = name.strip_prefix(&prefix) else { continue };
        if sheet.graph.input_of(value).is_none_or(|i| i.role != Role::Parameter) {
            continue;
        }
        let Some(source) = names.source(parameter, experts) else { return Err(Problem::Tensor { tensor: name }) };
        let shape = sheet.graph.shape(value).to_vec();
        let member = if source.stacked { &shape[1..] } else { &shape[..] };
        let turned = match *member {
            [rows, columns] if source.transposed => Some([rows, columns]),
            _ => None,
        };
        let stored: Vec<usize> = turned.map_or_else(|| member.to_vec(), |[rows, columns]| vec![columns, rows]);
        let mut data = Vec::new();
        for name in &source.members {
            let tensor = tensor(name)?;
            if tensor.ty.shape.to_vec() != stored {
                let (wanted, found) = (format!("{stored:?}"), tensor.ty.to_string());
                return Err(Problem::Size { what: name.clone(), wanted, found });
            }
            match turned {
                Some([rows, columns]) => data.extend(transposed(&tensor.data, columns, rows)),
                None => data.extend(tensor.data),
            }
        }
        sheet.inputs.push((name, Tensor::new(TensorType::f32(shape), data).rounded()));
        parts.push(Part { value, members: source.members, transposed: turned });
    }
    Ok(Layer { y, statistics, choice_slot, parts })
}
