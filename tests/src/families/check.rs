//! A layer on a backend against its dense equivalent.

use std::collections::HashMap;

use moebius_backends::Backend;
use moebius_ir::Tensor;
use moebius_ir::reference::Precision;
use moebius_models::config::Routing;
use moebius_models::gpt::router;

use super::oracle::{self, Given, Routes};
use super::{Draw, Layer, dense};
use crate::Sketch;
use crate::device::{self, Live};
use crate::tolerance::{Tolerance, difference};

/// Outputs by name.
pub type Results = HashMap<String, Tensor>;

/// A computation in f32 of some dozens of roundings against one in f64; terms are near 1, and of a router's gradient, a difference
/// of them, little may be left.
pub const CLOSE: Tolerance = Tolerance { relative: 1e-4, of_rms: 2e-4, least: 0.1, most: f64::INFINITY };

/// [`CLOSE`] where gates are scaled, which makes the terms of a router's gradient larger by as much.
pub fn close(routing: &Routing) -> Tolerance {
    CLOSE.of_terms(CLOSE.least * routing.scale.max(1.0))
}

/// What a draw tells where nothing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Both ways agree.
    Agrees,
    /// Two numbers that a choice compares are so close that a rounding may change it.
    TooClose,
}

/// The outputs of a sketch on a backend.
///
/// # Panics
/// If the backend refuses it.
pub fn run(backend: &dyn Backend, s: &Sketch) -> Results {
    let results = Live::new(backend, &s.graph).and_then(|mut live| live.run(&s.inputs));
    results.unwrap_or_else(|e| panic!("{e}"))
}

/// Compares every output of the dense equivalent, in f64, with that of the layer.
///
/// # Errors
/// In words, the first that differs.
pub fn agree(got: &Results, wanted: &Sketch, tolerance: Tolerance) -> Result<(), String> {
    let wanted = device::reference(&wanted.graph, &wanted.inputs, Precision::Exact);
    let mut names: Vec<&String> = wanted.keys().filter(|n| !n.starts_with("state.")).collect();
    names.sort_unstable();
    assert!(names.len() > 2, "outputs to compare");
    for name in names {
        if let Some(found) = difference(&got[name], &wanted[name], tolerance) {
            return Err(format!("{name}: {found}"));
        }
    }
    Ok(())
}

/// The slots of an expert, `None` for dropless.
fn capacity(draw: &Draw, layer: &Layer) -> Option<usize> {
    router::capacity(&layer.config, true, draw.tokens, draw.experts)
}

/// The routes by the rules; `chosen` is what a layer that routes by id chose.
///
/// # Panics
/// If the layer has no logits: a bug.
pub fn routes(draw: &Draw, layer: &Layer, chosen: Option<&Tensor>) -> Routes {
    let logits = dense::logits(layer).unwrap_or_else(|e| panic!("{e}"));
    let input = |name: &str| layer.s.inputs.get(name).map(|t| t.data.as_slice());
    oracle::route(&Given {
        routing: layer.routing,
        k: draw.k,
        capacity: capacity(draw, layer),
        logits: &logits.data,
        experts: draw.experts,
        selection_bias: input("layers.0.moe.router.selection_bias"),
        choice: input("choice"),
        priority: input("priority"),
        chosen: chosen.map(|t| t.data.as_slice()),
    })
}

/// One token id has the same experts wherever it stands, and different ones.
fn by_id(draw: &Draw, layer: &Layer, index: &Tensor) -> Result<(), String> {
    let mut of_id: HashMap<u64, &[f64]> = HashMap::new();
    for (id, experts) in layer.s.inputs["ids"].data.iter().zip(index.data.chunks(draw.k)) {
        let before = *of_id.entry(id.to_bits()).or_insert(experts);
        let mut sorted = experts.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted.dedup();
        let valid = sorted.len() == draw.k && sorted.iter().all(|&x| (0.0..draw.experts as f64).contains(&x));
        if before != experts || !valid {
            return Err(format!("token id {id} has the experts {before:?} and {experts:?}"));
        }
    }
    Ok(())
}

/// Runs the layer of a draw on `backend` and compares choices, drops, values, losses and gradients with its one-hot form.
///
/// # Errors
/// In words, what differs.
///
/// # Panics
/// If the backend refuses the layer.
pub fn one_hot_form(backend: &dyn Backend, draw: &Draw) -> Result<Found, String> {
    let wrong = |e: moebius_ir::Error| e.to_string();
    let mut layer = Layer::new(draw, &|_, _| {}).map_err(wrong)?;
    layer.outputs(true).map_err(wrong)?;
    let got = run(backend, &layer.s);
    let index = &got["expert_index"];
    let is_by_id = layer.config.routes_by_id(0);
    if is_by_id {
        by_id(draw, &layer, index)?;
    }
    let routes = routes(draw, &layer, is_by_id.then_some(index));
    if !routes.clear {
        return Ok(Found::TooClose);
    }
    if !layer.routing.expert_choice {
        let mut dropped = 0.0;
        for c in 0..draw.tokens * draw.k {
            let (expert, place) = (routes.expert[c / draw.k][c % draw.k], routes.place[c / draw.k][c % draw.k]);
            let found = index.data[c];
            // A second choice that was dropped at random goes nowhere.
            if found != expert as f64 && (found != -1.0 || place.is_some()) {
                return Err(format!("choice {c} is expert {found}, not {expert}"));
            }
            dropped += f64::from(u8::from(found >= 0.0 && place.is_none()));
        }
        if got["dropped"].data != [dropped] {
            return Err(format!("{:?} choices dropped, not {dropped}", got["dropped"].data));
        }
    }
    let slots = capacity(draw, &layer).unwrap_or(draw.tokens).min(draw.tokens);
    agree(&got, &dense::one_hot(&layer, &routes, slots).map_err(wrong)?, close(&layer.routing))?;
    Ok(Found::Agrees)
}

/// A few draws of every family for a test that has no others: sizes, kinds and capacities in turn.
pub fn some_draws() -> Vec<Draw> {
    let families = moebius_models::config::Family::ALL;
    let draw = |i: usize| {
        let experts = 2 + i % 7;
        Draw {
            family: families[i % families.len()],
            experts,
            k: 1 + i / 3 % experts,
            tokens: 4 + i % 6,
            width: 3,
            hidden: 4,
            capacity: [None, Some(0.5), Some(1.0)][i / families.len() % 3],
            least: 0,
            residual: i % 4 == 1,
            noisy: i % 3 != 1,
            by_id: i % 2 == 1,
            kind: super::Kind::ALL[i % 5],
            seed: 100 + i as u32,
        }
        .fitted()
    };
    (0..4 * families.len()).map(draw).collect()
}
