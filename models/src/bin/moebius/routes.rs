//! `moebius routes`: what a route file holds, and what other capacities would have dropped.

use moebius::Engine;
use moebius_models::routes::{LayerWhatIf, RouteHeader, RouteReader, WhatIf, what_if};
use serde_json::{Value, json};

use crate::cli::{RoutesArgs, RoutesCommand, RoutesShowArgs, WhatIfArgs};
use crate::failure::Failure;

pub(crate) fn run(args: &RoutesArgs) -> Result<(), Failure> {
    match &args.command {
        RoutesCommand::Show(args) => show(args),
        RoutesCommand::WhatIf(args) => ask(args),
    }
}

/// What the first lines say of a file.
fn heading(reader: &RouteReader) -> String {
    let header = reader.header();
    let factor = match header.capacity_factor {
        Some(factor) => format!("capacity factor {factor}"),
        None => "dropless".into(),
    };
    let (tokens, passes) = (reader.tokens(), reader.passes());
    format!("{tokens} tokens in {passes} passes of {}, top-{}, recorded with {factor}", header.model, header.top_k)
}

fn facts(reader: &RouteReader) -> Value {
    let RouteHeader { model, model_hash, top_k, capacity_factor, .. } = reader.header();
    json!({
        "model": model, "model_hash": model_hash, "top_k": top_k, "capacity_factor": capacity_factor,
        "tokens": reader.tokens(), "passes": reader.passes(),
    })
}

/// Prints a table whose first row is its heading; all columns are right-aligned.
fn table(rows: &[Vec<String>]) {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max();
    for row in rows {
        let cell = |(column, text): (usize, &String)| format!("{text:>0$}", width(column).unwrap_or(0));
        println!("{}", row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  "));
    }
}

/// Load and drops of a layer as they were.
struct Seen {
    choices: u64,
    dropped: u64,
    load: Vec<u64>,
}

fn show(args: &RoutesShowArgs) -> Result<(), Failure> {
    let mut reader = RouteReader::open(&args.file)?;
    let header = reader.header().clone();
    let none = |experts: usize| Seen { choices: 0, dropped: 0, load: vec![0; experts] };
    let mut seen: Vec<Seen> = header.layers.iter().map(|layer| none(layer.experts)).collect();
    // Position and id of the first tokens, and their experts in each layer.
    let mut first: Vec<(u64, i32, Vec<Vec<i32>>)> = Vec::new();
    let mut position = 0;
    while let Some(pass) = reader.next_pass()? {
        for (seen, routes) in seen.iter_mut().zip(&pass.layers) {
            seen.dropped += u64::from(routes.dropped);
            for expert in routes.expert_index.iter().filter_map(|&e| usize::try_from(e).ok()) {
                seen.choices += 1;
                seen.load[expert] += 1;
            }
        }
        for (i, &id) in pass.ids.iter().enumerate() {
            if position < args.tokens {
                let of = |expert_index: &[i32]| expert_index[i * header.top_k..][..header.top_k].to_vec();
                first.push((position, id, pass.layers.iter().map(|l| of(&l.expert_index)).collect()));
            }
            position += 1;
        }
    }
    if args.json {
        let layer = |(of, seen): (&moebius_models::routes::RouteLayer, &Seen)| {
            let (choices, dropped) = (seen.choices, seen.dropped);
            json!({"layer": of.layer, "experts": of.experts, "choices": choices, "dropped": dropped, "load": seen.load})
        };
        let token = |(position, id, experts): &(u64, i32, Vec<Vec<i32>>)| json!({"position": position, "id": id, "experts": experts});
        let mut value = facts(&reader);
        value["layers"] = header.layers.iter().zip(&seen).map(layer).collect();
        value["first_tokens"] = first.iter().map(token).collect();
        println!("{value}");
        return Ok(());
    }
    println!("{}\n", heading(&reader));
    let mut rows = vec![["layer", "experts", "dropped", "busiest", "idlest", "dead"].map(String::from).to_vec()];
    for (of, seen) in header.layers.iter().zip(&seen) {
        let by = |best: Option<(usize, &u64)>| {
            let share = |load: u64| 100.0 * load as f64 / seen.choices.max(1) as f64;
            best.map_or_else(String::new, |(expert, &load)| format!("{expert} ({:.1} %)", share(load)))
        };
        // Ties go to the lowest expert.
        let busiest = seen.load.iter().enumerate().max_by_key(|(e, load)| (**load, std::cmp::Reverse(*e)));
        let idlest = seen.load.iter().enumerate().min_by_key(|(_, load)| **load);
        rows.push(vec![
            of.layer.to_string(),
            of.experts.to_string(),
            format!("{:.2} %", 100.0 * seen.dropped as f64 / seen.choices.max(1) as f64),
            by(busiest),
            by(idlest),
            seen.load.iter().filter(|&&load| load == 0).count().to_string(),
        ]);
    }
    table(&rows);
    if !first.is_empty() {
        let layers = header.layers.iter().map(|l| format!("layer {}", l.layer));
        let mut rows = vec![["token".into(), "id".into()].into_iter().chain(layers).collect::<Vec<String>>()];
        for (position, id, experts) in &first {
            let list = |experts: &Vec<i32>| experts.iter().map(i32::to_string).collect::<Vec<_>>().join(" ");
            rows.push([position.to_string(), id.to_string()].into_iter().chain(experts.iter().map(list)).collect());
        }
        println!();
        table(&rows);
    }
    Ok(())
}

fn ask(args: &WhatIfArgs) -> Result<(), Failure> {
    if let Some(factor) = args.capacity_factor.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
        return Err(Failure::Usage(format!("--capacity-factor: wanted numbers above 0, found {factor}")));
    }
    let mut reader = RouteReader::open(&args.file)?;
    let found = what_if(&Engine::open("cpu")?, &mut reader, &args.capacity_factor, args.min_capacity)?;
    if args.json {
        let layer = |l: &LayerWhatIf| {
            json!({
                "layer": l.layer, "experts": l.load.len(), "capacity": l.capacity, "choices": l.choices,
                "dropped": l.dropped, "drop_rate": l.drop_rate(), "tokens": l.tokens,
                "without_expert": l.without_expert, "imbalance": l.imbalance(), "dead": l.dead(), "load": l.load,
            })
        };
        let one = |w: &WhatIf| json!({"capacity_factor": w.capacity_factor, "layers": w.layers.iter().map(layer).collect::<Vec<_>>()});
        let mut value = facts(&reader);
        value["what_if"] = found.iter().map(one).collect();
        println!("{value}");
        return Ok(());
    }
    println!("{}\n", heading(&reader));
    let heads = ["factor", "layer", "experts", "capacity", "dropped", "no expert", "max/mean load", "dead"];
    let mut rows = vec![heads.map(String::from).to_vec()];
    for WhatIf { capacity_factor, layers } in &found {
        for l in layers {
            let [least, most] = l.capacity;
            rows.push(vec![
                capacity_factor.to_string(),
                l.layer.to_string(),
                l.load.len().to_string(),
                if least == most { least.to_string() } else { format!("{least}-{most}") },
                format!("{:.2} %", 100.0 * l.drop_rate()),
                format!("{:.2} %", 100.0 * l.without_expert as f64 / l.tokens.max(1) as f64),
                format!("{:.2}", l.imbalance()),
                l.dead().to_string(),
            ]);
        }
    }
    table(&rows);
    println!("\n(choices as recorded: in the model, what one layer drops changes what later layers see and choose)");
    Ok(())
}
