//! What the benches share: graphs and ready sessions.

pub mod peaks;

use half::bf16;
use moebius::ir::ops::{Balance, Order};
use moebius::ir::{DType, Graph, Result, TensorType, Value, gradients, philox};
use moebius::{Engine, Optimizer, Program, Session, Trainer};
use moebius_models::config::Config;
use moebius_models::gpt;

/// Numbers below `limit` that look random and are the same in every run.
pub fn ids(n: usize, limit: usize, seed: u32) -> Vec<i32> {
    (0..n as u64).map(|i| (philox::bits([seed, 0], 0, i) as usize % limit) as i32).collect()
}

/// Normal numbers times `scale`.
pub fn normals(n: usize, seed: u32, scale: f32) -> Vec<f32> {
    (0..n as u64).map(|i| philox::normal([seed, 1], 0, i) * scale).collect()
}

/// Values of integer feeds, by name.
pub type Ids = Vec<(&'static str, Vec<i32>)>;

/// A session on the CPU with a graph of few nodes compiled and its feeds filled: integer ones with the values that `build`
/// returns beside the results, all others with normal numbers.
///
/// # Errors
/// Those of the ops and of the engine.
pub fn ready_op(build: impl FnOnce(&mut Graph) -> Result<(Vec<Value>, Ids)>) -> moebius::Result<(Session, Program)> {
    let mut graph = Graph::new();
    let (results, ids) = build(&mut graph)?;
    for (i, &result) in results.iter().enumerate() {
        graph.output(format!("result {i}"), result)?;
    }
    let mut session = Engine::cpu(None)?.session();
    let mut program = session.compile(&graph)?;
    for (i, (name, value)) in graph.inputs().iter().enumerate() {
        let ty = graph.ty(*value);
        let numbers = || normals(ty.elements(), i as u32, 0.5);
        match ty.dtype {
            DType::F32 => program.feed(name, &numbers())?,
            DType::Bf16 => program.feed(name, &numbers().into_iter().map(bf16::from_f32).collect::<Vec<_>>())?,
            DType::F16 | DType::I32 | DType::U32 | DType::Bool => {}
        }
    }
    for (name, values) in &ids {
        program.feed(name, values)?;
    }
    Ok((session, program))
}

/// One top-1, dropless MoE layer with GELU and biases: forward, and the gradients of everything.
///
/// Feeds `x` and `dy`, `[tokens, width]`; parameters `router`, `up`, `up.bias`, `down`, `down.bias`; outputs `y`, `d/x` and
/// `d/NAME` for each parameter.
///
/// # Errors
/// Those of the ops.
pub fn moe_layer(tokens: usize, width: usize, ffn: usize, experts: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let x = g.feed("x", TensorType::f32([tokens, width]))?;
    let dy = g.feed("dy", TensorType::f32([tokens, width]))?;
    let mut parameters: Vec<(&str, Value)> = vec![("x", x)];
    let mut parameter = |g: &mut Graph, name: &'static str, shape: &[usize]| {
        let value = g.parameter(name, TensorType::f32(shape))?;
        parameters.push((name, value));
        Ok::<_, moebius::ir::Error>(value)
    };
    let router = parameter(g, "router", &[experts, width])?;
    let up = parameter(g, "up", &[experts, width, ffn])?;
    let up_bias = parameter(g, "up.bias", &[experts, ffn])?;
    let down = parameter(g, "down", &[experts, ffn, width])?;
    let down_bias = parameter(g, "down.bias", &[experts, width])?;

    let logits = g.matmul_with(x, router, None, false, true)?;
    let [gate, expert_index, balance, ..] = g.route(logits, 1, Balance::AllChoices)?;
    let [slot_choice, choice_slot, offsets, _] = g.assign(expert_index, None, experts, None, Order::TokenMajor)?;
    let rows = g.dispatch(x, slot_choice, choice_slot, None)?;
    let h = g.expert_matmul(rows, up, offsets, Some(up_bias), false)?;
    let h = g.gelu(h)?;
    let rows = g.expert_matmul(h, down, offsets, Some(down_bias), false)?;
    let y = g.combine(rows, slot_choice, choice_slot, Some(gate))?;
    g.output("y", y)?;

    let weighted = g.mul(y, dy)?;
    let sum = g.sum_all(weighted)?;
    let balance = g.mul_scalar(balance, 0.01)?;
    let loss = g.add(sum, balance)?;
    let wrt: Vec<Value> = parameters.iter().map(|&(_, v)| v).collect();
    let grads = gradients(g, loss, &wrt)?;
    for ((name, _), grad) in parameters.iter().zip(grads) {
        g.output(format!("d/{name}"), grad)?;
    }
    Ok(graph)
}

/// A session on the CPU with the layer of [`moe_layer`] compiled, its parameters and feeds filled.
///
/// # Errors
/// Those of the engine.
pub fn ready_layer(tokens: usize, width: usize, ffn: usize, experts: usize) -> moebius::Result<(Session, Program)> {
    let mut session = Engine::cpu(None)?.session();
    let mut program = session.compile(&moe_layer(tokens, width, ffn, experts)?)?;
    let names: Vec<String> = session.names().into_iter().map(str::to_owned).collect();
    for (i, name) in names.iter().enumerate() {
        let n = session.ty(name).map_or(0, TensorType::elements);
        session.write(name, &normals(n, i as u32, 0.05))?;
    }
    program.feed("x", &normals(tokens * width, 100, 1.0))?;
    program.feed("dy", &normals(tokens * width, 101, 1.0))?;
    Ok((session, program))
}

/// A training step of a preset with random weights and text.
///
/// # Errors
/// Those of the engine.
pub fn ready_step(config: &Config) -> moebius::Result<(Session, Trainer)> {
    let mut session = Engine::cpu(None)?.session();
    let training = gpt::training(&config.model, config.train.batch)?;
    let mut trainer = Trainer::new(&mut session, training.graph, training.loss, &Optimizer::default())?;
    gpt::initialise(&config.model, config.train.seed, |p, values| session.write(&p.name, values))?;
    let n = config.train.batch * config.model.sequence;
    let text = ids(n + 1, config.model.vocab, 0);
    trainer.program().feed("tokens", &text[..n])?;
    trainer.program().feed("targets", &text[1..])?;
    Ok((session, trainer))
}
