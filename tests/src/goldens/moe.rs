//! DeepSpeed's MoE layer in ops, standard and residual (spec 2.1), with weights as DeepSpeed stores them, `[out, in]`.

use moebius_ir::{DType, Graph, Result, Tensor, TensorType, Value};

use super::machine::Sheet;
use super::rules::{Function, Gated, Given, gate};
use super::set::Problem;

/// Weights of a dense network or of all experts, `[.., F, H]`, `[.., F]`, `[.., H, F]`, `[.., H]`.
#[derive(Clone, Copy)]
pub(super) struct Network {
    /// The first product and its bias.
    pub(super) up: (Value, Value),
    /// The second product and its bias.
    pub(super) down: (Value, Value),
}

/// Weights of a layer.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    /// `[E,H]`.
    pub(super) router: Value,
    /// Of all experts.
    pub(super) experts: Network,
    /// The dense network beside them and the coefficients `[2,H]`, `[2]`.
    pub(super) residual: Option<(Network, (Value, Value))>,
}

/// How a layer routes.
#[derive(Clone, Copy)]
pub(super) struct Options {
    /// The gate.
    pub(super) function: Function,
    /// Slots of an expert; `None` drops nothing.
    pub(super) capacity: Option<usize>,
    /// Random numbers of the gate.
    pub(super) given: Given,
    /// f32 `[N,H]`: what the router's copy of the tokens is multiplied by.
    pub(super) jitter: Option<Value>,
}

/// The names and inputs of the weights that a layer was made from, by the name in a case and its place in the input.
pub(super) struct Inputs {
    /// Values for [`layer`].
    pub(super) weights: Weights,
    /// Differentiated inputs: the value and the names of the tensors that it stacks.
    pub(super) parts: Vec<(Value, Vec<String>)>,
}

/// The names of a network's tensors after `prefix`, in the order of [`Network`].
pub(super) type Names = [&'static str; 4];

/// Makes the inputs of a layer of `experts` from tensors by name, in `dtype`.
pub(super) fn inputs(
    sheet: &mut Sheet,
    dtype: DType,
    experts: usize,
    residual: bool,
    [router, expert, mlp, coefficient]: [&str; 4],
    names: Names,
    tensor: &dyn Fn(&str) -> std::result::Result<Tensor, Problem>,
) -> std::result::Result<Inputs, Problem> {
    let mut parts = Vec::new();
    let mut input = |sheet: &mut Sheet, name: &str, members: Vec<String>, stack: bool| {
        let mut shape: Vec<usize> = Vec::new();
        let mut data = Vec::new();
        for member in &members {
            let tensor = tensor(member)?;
            if !data.is_empty() && tensor.ty.shape.to_vec() != shape {
                return Err(Problem::Size {
                    what: member.clone(),
                    wanted: format!("{shape:?}, as the other experts"),
                    found: tensor.ty.to_string(),
                });
            }
            shape = tensor.ty.shape.to_vec();
            data.extend(tensor.data);
        }
        if stack {
            shape.insert(0, members.len());
        }
        let value = sheet.input(name, Tensor::new(TensorType::new(dtype, shape), data))?;
        parts.push((value, members));
        Ok(value)
    };
    let weights = {
        let mut network = |sheet: &mut Sheet, name: &str, members: &dyn Fn(&str) -> Vec<String>, stack: bool| {
            let mut part =
                |sheet: &mut Sheet, i: usize| input(sheet, &format!("{name}.{}", names[i]), members(names[i]), stack);
            let up = (part(sheet, 0)?, part(sheet, 1)?);
            Ok::<_, Problem>(Network { up, down: (part(sheet, 2)?, part(sheet, 3)?) })
        };
        let of_experts = |name: &str| {
            (0..experts).map(|e| format!("{}{name}", expert.replace("{}", &e.to_string()))).collect::<Vec<_>>()
        };
        let of_experts = network(sheet, "experts", &of_experts, true)?;
        let dense = if residual {
            Some(network(sheet, "mlp", &|name: &str| vec![format!("{mlp}{name}")], false)?)
        } else {
            None
        };
        let router = input(sheet, "router", vec![router.to_owned()], false)?;
        let residual = match dense {
            Some(dense) => {
                let weight = input(sheet, "coefficient", vec![format!("{coefficient}weight")], false)?;
                let bias = input(sheet, "coefficient.bias", vec![format!("{coefficient}bias")], false)?;
                Some((dense, (weight, bias)))
            }
            None => None,
        };
        Weights { router, experts: of_experts, residual }
    };
    Ok(Inputs { weights, parts })
}

/// The layer on tokens `x [N,H]`: its result `[N,H]` and its gate.
pub(super) fn layer(g: &mut Graph, x: Value, weights: &Weights, options: Options) -> Result<(Value, Gated)> {
    let mut of_router = g.cast(x, DType::F32)?;
    if let Some(jitter) = options.jitter {
        of_router = g.mul(of_router, jitter)?;
    }
    let router = g.cast(weights.router, DType::F32)?;
    let logits = g.matmul_with(of_router, router, None, false, true)?;
    let gated = gate(g, options.function, options.capacity, logits, options.given)?;
    let rows = g.dispatch(x, gated.slot_choice, gated.choice_slot, None)?;
    let Network { up, down } = weights.experts;
    let rows = g.expert_matmul(rows, up.0, gated.offsets, Some(up.1), true)?;
    let rows = g.gelu(rows)?;
    let rows = g.expert_matmul(rows, down.0, gated.offsets, Some(down.1), true)?;
    let mut y = g.combine(rows, gated.slot_choice, gated.choice_slot, Some(gated.gate))?;
    if let Some((Network { up, down }, (weight, bias))) = weights.residual {
        let coefficient = g.matmul_with(x, weight, Some(bias), false, true)?;
        let coefficient = g.softmax(coefficient)?;
        let dense = g.matmul_with(x, up.0, Some(up.1), false, true)?;
        let dense = g.gelu(dense)?;
        let dense = g.matmul_with(dense, down.0, Some(down.1), false, true)?;
        let (of_experts, of_dense) = (g.slice(coefficient, 1, 0, 1)?, g.slice(coefficient, 1, 1, 1)?);
        let (sparse, dense) = (g.mul(y, of_experts)?, g.mul(dense, of_dense)?);
        y = g.add(sparse, dense)?;
    }
    Ok((y, gated))
}
