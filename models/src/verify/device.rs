//! One graph on one device, and what it should give.

use std::collections::HashMap;

use moebius::Engine;
use moebius_ir::reference::{self, Precision};
use moebius_ir::{Error, Graph, Result, Role, Tensor};

use super::sketch::Inputs;

/// Outputs by name, and stored tensors after the run as `state.NAME`.
pub type Values = HashMap<String, Tensor>;

/// Compiles `graph`, sets all its inputs, runs it once, and gives all outputs and stored tensors.
///
/// # Errors
/// [`moebius::Error::Graph`] for an input without a value; whatever the device refuses.
pub fn run(engine: &Engine, graph: &Graph, inputs: &Inputs) -> Result<Values, moebius::Error> {
    let mut session = engine.session();
    let mut program = session.compile(graph)?;
    let role = |value| graph.input_of(value).map_or(Role::Feed, |i| i.role);
    for (name, value) in graph.inputs() {
        let ty = graph.ty(*value);
        let Some(tensor) = inputs.get(name).filter(|t| t.ty == *ty) else {
            let found = inputs.get(name).map_or_else(|| "nothing".into(), |t| t.ty.to_string());
            return Err(Error::Feed { name: name.clone(), wanted: ty.to_string(), found }.into());
        };
        match role(*value) {
            Role::Feed => program.feed_bytes(name, &tensor.to_bytes())?,
            Role::Parameter | Role::State => session.write_bytes(name, &tensor.to_bytes())?,
        }
    }
    session.run(&mut program)?;
    let mut values = Values::new();
    for (name, value) in graph.outputs() {
        let bytes = program.output_bytes(name)?;
        values.insert(name.clone(), Tensor::from_bytes(graph.ty(*value).clone(), &bytes));
    }
    for (name, value) in graph.inputs().iter().filter(|(_, v)| role(*v) != Role::Feed) {
        let tensor = Tensor::from_bytes(graph.ty(*value).clone(), &session.bytes(name)?);
        values.insert(format!("state.{name}"), tensor);
    }
    Ok(values)
}

/// What [`run`] should give, by the reference on the graph as it was built.
///
/// # Errors
/// [`Error::Feed`] for an input without a value.
pub fn expected(graph: &Graph, inputs: &Inputs, precision: Precision) -> Result<Values> {
    let run = reference::run(graph, inputs, precision)?;
    let mut values: Values = graph.outputs().iter().map(|(n, v)| (n.clone(), run.value(*v).clone())).collect();
    for (name, value) in graph.inputs() {
        if graph.input_of(*value).is_some_and(|i| i.role != Role::Feed) {
            let new = graph.updates().iter().find(|u| u.state == *value).map_or(*value, |u| u.new);
            values.insert(format!("state.{name}"), run.value(new).clone());
        }
    }
    Ok(values)
}

/// Whether two tensors have the same type and bits; the sign and payload of a NaN mean nothing.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    let equal = |x: &f64, y: &f64| x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan());
    // The bytes first: few tensors have a NaN, and fewer differ.
    let bytes = bytemuck::cast_slice::<f64, u8>;
    a.ty == b.ty && (bytes(&a.data) == bytes(&b.data) || a.data.iter().zip(&b.data).all(|(x, y)| equal(x, y)))
}

/// Whether two sets of values are the [`same`].
pub fn same_bits(a: &Values, b: &Values) -> bool {
    a.len() == b.len() && a.iter().all(|(name, t)| b.get(name).is_some_and(|u| same(t, u)))
}
