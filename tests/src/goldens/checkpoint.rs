//! `ckpt/`: a checkpoint written by DeepSpeed, whose layers must turn the stored input into the stored output.
//!
//! The model is a chain `x -> x + MoE(x)` of residual layers with one choice, without dropping (spec 8, 5).

use std::collections::HashMap;
use std::path::Path;

use moebius_ir::{Tensor, TensorType};
use moebius_models::gpt::Pass;

use super::compare::Case;
use super::machine::{Machine, Sheet, output};
use super::moe::{Names, inner_width, layer};
use super::rules::{Function, Given, model};
use super::set::{Problem, bytes};
use super::torch::{Item, read};

const TOLERANCE: f64 = 2e-5;
const NETWORK: [&str; 4] = ["dense_h_to_4h.weight", "dense_h_to_4h.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias"];

/// Runs the model of the checkpoint on the stored input.
pub(super) fn check(case: &mut Case<'_>, directory: &Path, machine: &Machine) -> Result<(), Problem> {
    let directory = directory.join("ckpt");
    let latest = directory.join("latest");
    let tag = String::from_utf8_lossy(&bytes(&latest)?).trim().to_owned();
    let directory = directory.join(tag);
    let dense = directory.join("mp_rank_00_model_states.pt");
    let state = read(&dense)?;
    let wrong = |wanted, found: &str| Problem::Format { path: dense.clone(), wanted, found: found.into() };
    let module = state.entry("module").ok_or_else(|| wrong("an entry `module`", "none"))?;
    let mut tensors: HashMap<String, Tensor> =
        module.tensors().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let Some(Item::List(experts)) = state.entry("num_experts") else {
        return Err(wrong("a list `num_experts`", "none"));
    };
    let experts: Vec<usize> = experts.iter().map(|e| if let Item::Number(n) = e { *n as usize } else { 0 }).collect();
    for (layer, &experts) in experts.iter().enumerate() {
        for expert in 0..experts {
            let path = directory.join(format!("layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"));
            tensors.extend(read(&path)?.tensors().map(|(name, tensor)| (name.to_owned(), tensor.clone())));
        }
    }

    let stored = case.tensor("x")?;
    let (tokens, width) = (stored.ty.shape.rows(), stored.ty.shape.last());
    let mut sheet = Sheet::default();
    let mut x = sheet.input("x", Tensor::new(TensorType::f32([tokens, width]), stored.data.clone()))?;
    let mut losses = Vec::new();
    let tensor = |name: &str| tensors.get(name).cloned().ok_or_else(|| Problem::Tensor { tensor: name.into() });
    let mut config = model(Function::Top1, &experts, true, None, Given::default())?;
    config.width = width;
    config.ffn = Some(inner_width(&tensor(&format!("layers.0.mlp.{}", NETWORK[1]))?));
    for number in 0..experts.len() {
        let at = |name: &str| format!("layers.{number}.{name}");
        let router = at("deepspeed_moe.gate.wg.weight");
        let expert = at("deepspeed_moe.experts.deepspeed_experts.{}.");
        let (mlp, coefficient) = (at("mlp."), at("coefficient."));
        let names = Names { router: &router, expert: &expert, mlp: &mlp, coefficient: &coefficient, network: NETWORK };
        let made = layer(&mut sheet, &config, number, x, &Pass::default(), names, &tensor)?;
        x = sheet.graph.add(x, made.y)?;
        losses.push(made.statistics.load_balancing_loss);
    }
    sheet.output("y", x)?;
    for (number, loss) in losses.iter().enumerate() {
        sheet.output(&format!("l_aux {number}"), *loss)?;
    }
    let got = machine.run(&sheet)?;
    case.close("y", output(&got, "y")?, TOLERANCE)?;
    let mut l_aux = Vec::new();
    for number in 0..losses.len() {
        l_aux.extend(output(&got, &format!("l_aux {number}"))?);
    }
    case.close("l_aux_per_layer", &l_aux, TOLERANCE)
}
