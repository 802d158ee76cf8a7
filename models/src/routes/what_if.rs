//! What other capacities would have dropped of recorded choices.

use std::collections::HashMap;

use moebius::ir::{Graph, TensorType};
use moebius::{Engine, Program, Session};
use serde::Serialize;

use super::{Pass, RouteError, RouteHeader, RouteLayer, RouteReader};
use crate::gpt::router::{self, CapacityOf, Source};

/// What a capacity factor does to recorded choices.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WhatIf {
    /// The factor.
    pub capacity_factor: f64,
    /// Layer by layer, lowest first.
    pub layers: Vec<LayerWhatIf>,
}

/// What it does in one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerWhatIf {
    /// Number of the layer in the model, from 0.
    pub layer: usize,
    /// Slots of an expert: the least and the most of all passes, which may have different numbers of tokens.
    pub capacity: [usize; 2],
    /// Choices that wanted a slot, and those that found none.
    pub choices: u64,
    /// See `choices`.
    pub dropped: u64,
    /// Tokens, and those that no expert took.
    pub tokens: u64,
    /// See `tokens`.
    pub without_expert: u64,
    /// Choices of each expert that found a slot.
    pub load: Vec<u64>,
}

impl LayerWhatIf {
    /// Fraction of the choices that were dropped, 0 without any.
    pub fn drop_rate(&self) -> f64 {
        self.dropped as f64 / self.choices.max(1) as f64
    }

    /// Load of the busiest expert as a multiple of the mean, 0 without any.
    pub fn imbalance(&self) -> f64 {
        let (most, all) = (self.load.iter().max().copied().unwrap_or(0), self.load.iter().sum::<u64>());
        most as f64 * self.load.len() as f64 / all.max(1) as f64
    }

    /// Experts without any token.
    pub fn dead(&self) -> usize {
        self.load.iter().filter(|&&load| load == 0).count()
    }
}

/// Compiled programs that are kept: a recording has passes of few different lengths.
const MOST_PROGRAMS: usize = 8;

/// Gives the recorded choices slots again, with each of these capacity factors (above 0) and a least capacity (absent: that of
/// the model), by the graph nodes that the model itself has for it, on the device of `engine`.
///
/// The choices stay as they are. In a model that really has this capacity, a choice dropped in one layer changes what later layers
/// see, and so may change their choices; the first MoE layer's numbers are exact.
///
/// # Errors
/// Whatever is wrong with the file; [`RouteError::Engine`].
pub fn what_if(
    engine: &Engine,
    reader: &mut RouteReader,
    factors: &[f64],
    min_capacity: Option<usize>,
) -> Result<Vec<WhatIf>, RouteError> {
    let header = reader.header().clone();
    let mut of = header.capacity_of();
    of.min = min_capacity.unwrap_or(of.min);
    let layer = |l: &RouteLayer| LayerWhatIf {
        layer: l.layer,
        capacity: [usize::MAX, 0],
        choices: 0,
        dropped: 0,
        tokens: 0,
        without_expert: 0,
        load: vec![0; l.experts],
    };
    let found = |&capacity_factor| WhatIf { capacity_factor, layers: header.layers.iter().map(layer).collect() };
    let mut found: Vec<WhatIf> = factors.iter().map(found).collect();
    let mut session = engine.session();
    let mut programs: HashMap<usize, Program> = HashMap::new();
    reader.rewind()?;
    while let Some(pass) = reader.next_pass()? {
        let n = pass.ids.len();
        if !programs.contains_key(&n) {
            if programs.len() == MOST_PROGRAMS {
                programs.clear();
            }
            programs.insert(n, session.compile(&graph(&header, of, factors, n).map_err(moebius::Error::from)?)?);
        }
        if let Some(program) = programs.get_mut(&n) {
            run(&mut session, program, &pass, &header, of, &mut found)?;
        }
    }
    found.iter_mut().flat_map(|f| &mut f.layers).for_each(|l| l.capacity[0] = l.capacity[0].min(l.capacity[1]));
    Ok(found)
}

fn name(what: &str, layer: usize, factor: usize) -> String {
    format!("{what}/{layer}/{factor}")
}

/// The slots of n tokens in every layer for every factor.
fn graph(header: &RouteHeader, of: CapacityOf, factors: &[f64], n: usize) -> moebius::ir::Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    for &RouteLayer { layer, experts } in &header.layers {
        let shape = [n, header.top_k];
        let expert_index = g.feed(name("expert_index", layer, 0), TensorType::i32(shape))?;
        let score = g.feed(name("score", layer, 0), TensorType::f32(shape))?;
        for (i, &factor) in factors.iter().enumerate() {
            let capacity = Some(of.slots(factor, n, experts));
            let slots = router::slots(g, header.order, experts, capacity, score, expert_index, Source::Off)?;
            let [_, choice_slot, offsets, dropped] = slots;
            g.output(name("choice_slot", layer, i), choice_slot)?;
            g.output(name("offsets", layer, i), offsets)?;
            g.output(name("dropped", layer, i), dropped)?;
        }
    }
    Ok(graph)
}

/// Adds what a pass gives.
fn run(
    session: &mut Session,
    program: &mut Program,
    pass: &Pass,
    header: &RouteHeader,
    of: CapacityOf,
    found: &mut [WhatIf],
) -> Result<(), RouteError> {
    let n = pass.ids.len();
    for (of_layer, routes) in header.layers.iter().zip(&pass.layers) {
        program.feed(&name("expert_index", of_layer.layer, 0), &routes.expert_index)?;
        // Only an order by score reads the scores, so that the graph may have no use for them.
        let score = name("score", of_layer.layer, 0);
        if program.plan().graph().input_named(&score).is_some() {
            program.feed(&score, &routes.score)?;
        }
    }
    session.run(program)?;
    for (i, found) in found.iter_mut().enumerate() {
        for (layer, routes) in found.layers.iter_mut().zip(&pass.layers) {
            let slots: Vec<i32> = program.output(&name("choice_slot", layer.layer, i))?;
            let offsets: Vec<i32> = program.output(&name("offsets", layer.layer, i))?;
            let dropped: Vec<i32> = program.output(&name("dropped", layer.layer, i))?;
            let capacity = of.slots(found.capacity_factor, n, layer.load.len());
            layer.capacity = [layer.capacity[0].min(capacity), layer.capacity[1].max(capacity)];
            layer.choices += routes.expert_index.iter().filter(|&&expert| expert >= 0).count() as u64;
            layer.dropped += dropped.iter().map(|&d| u64::from(d.unsigned_abs())).sum::<u64>();
            layer.tokens += n as u64;
            let alone = slots.chunks(header.top_k).filter(|slots| slots.iter().all(|&slot| slot < 0));
            layer.without_expert += alone.count() as u64;
            for (load, ends) in layer.load.iter_mut().zip(offsets.windows(2)) {
                *load += u64::from(ends[1].abs_diff(ends[0]));
            }
        }
    }
    Ok(())
}
