//! Graphs as text. What is read must verify or be refused, print, be read back as the same, and be planned or refused.

use moebius_ir::{DType, Fences, Graph, Op, Plan, Stage, passes, verify};

use super::{Target, Then, Words};
use crate::cases;

/// Longer seeds are mostly literals.
const MOST_SEED: usize = 6 << 10;

pub(super) fn target() -> Target {
    let words = [
        "input",
        "output ",
        "update ",
        "%0",
        "%1",
        "%2",
        "%3",
        " = ",
        " <- ",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ", ",
        ":",
        "@",
        "\"",
        "\n",
        "\\u0000",
        "f32[2,3]",
        "bf16[4]",
        "i32[]",
        "bool[2]",
        "null",
        "true",
        "false",
        "[0,4294967296,4294967296]",
        "é",
    ];
    let dtypes = DType::ALL.iter().map(ToString::to_string);
    Target {
        name: "graph",
        seeds: seeds(),
        words: words.iter().chain(Op::NAMES).map(ToString::to_string).chain(dtypes).collect(),
        repair: Box::new(renumber),
        parse: Box::new(|input| {
            let graph = Graph::from_text(&String::from_utf8_lossy(input)).ok()?;
            Some(Box::new(move || holds(&graph)) as Then)
        }),
    }
}

/// Every op case: as it is, with its gradients, and after the passes.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for case in cases::groups().into_iter().flat_map(|(_, cases)| cases) {
        let Ok(mut sketch) = case.sketch(case.dtypes[0]) else { continue };
        seeds.push(sketch.graph.to_text());
        if sketch.differentiable() && case.smooth && sketch.differentiate().is_ok() {
            seeds.push(sketch.graph.to_text());
        }
        seeds.extend(passes::optimise(&sketch.graph).map(|g| g.to_text()));
    }
    seeds.retain(|text| text.len() < MOST_SEED);
    seeds.into_iter().map(String::into_bytes).collect()
}

/// Mostly numbers the results again, as a line that was moved would else end the reading.
fn renumber(input: Vec<u8>, words: &mut Words) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(&input) else { return input };
    if words.once_in(4) {
        return input;
    }
    let (mut out, mut next) = (String::new(), 0);
    for line in text.lines() {
        match line.split_once(" = ") {
            Some((results, rest)) if line.starts_with('%') => {
                let results = results.split(',').count();
                let numbers: Vec<String> = (next..next + results).map(|n| format!("%{n}")).collect();
                next += results;
                out.push_str(&format!("{} = {rest}\n", numbers.join(", ")));
            }
            Some(_) | None => out.push_str(&format!("{line}\n")),
        }
    }
    out.into_bytes()
}

fn holds(graph: &Graph) -> Result<(), String> {
    let text = graph.to_text();
    let back = Graph::from_text(&text).map_err(|e| format!("what was printed is not read back: {e}"))?;
    // A constant NaN is equal to nothing, itself included.
    if back.to_text() != text || (back != *graph && !text.contains("\"nan\"")) {
        return Err("another graph is read back".into());
    }
    drop(verify(graph, Stage::Optimised));
    planned(graph.clone())?;
    if verify(graph, Stage::Built).is_ok() {
        let optimised = passes::optimise(graph).map_err(|e| format!("the passes broke a verified graph: {e}"))?;
        planned(optimised)?;
    }
    Ok(())
}

/// A graph may be refused, but a plan must be right.
fn planned(graph: Graph) -> Result<(), String> {
    match Plan::new(graph, &|_, _| 64, Fences::On) {
        Ok(plan) => {
            drop(plan.to_text());
            plan.overlap().map_or(Ok(()), |both| Err(format!("overlapping buffers: {both:?}")))
        }
        Err(_refused) => Ok(()),
    }
}
