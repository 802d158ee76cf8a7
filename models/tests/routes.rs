//! Routes that the program records, forces and asks about, and what routes depend on.

use std::fs;
use std::path::Path;

use moebius::ir::{Graph, philox};
use moebius::{Engine, Program, Session};
use moebius_models::config::{Config, Family, ModelConfig};
use moebius_models::gpt::{self, Routes};
use moebius_models::routes::{LayerRoutes, Pass, RouteHeader, RouteReader, RouteWriter, what_if};

use crate::place::{Place, SMALL, json, stderr, stdout, succeeds};

#[test]
fn recorded_routes_give_the_same_bits_again() {
    let place = Place::new();
    // Two MoE layers, two choices each, and drops.
    let sparse = ["--set", "model.layers=4", "--set", "model.top_k=2", "--set", "model.capacity_factor=1"];
    succeeds(place.train("run", &sparse));
    let eval = ["eval", "--model", "run", "--data", "text.txt", "--json"];
    let eval = |more: &[&str]| json(&succeeds(place.run(&[&eval[..], more].concat())));
    let plain = eval(&[]);
    assert_eq!(plain, eval(&["--record-routes", "a.routes"]), "recording changes nothing");
    let again = eval(&["--replay-routes", "a.routes", "--record-routes", "b.routes"]);
    assert_eq!(plain, again, "own routes give the same loss, bit by bit");
    assert_eq!(fs::read(place.path("a.routes")).unwrap(), fs::read(place.path("b.routes")).unwrap());
    // Cut into other passes (83 sequences 8 times instead of 8 83 times): other tokens compete for slots, the routes are found.
    eval(&["--replay-routes", "a.routes", "--batch", "83"]);

    let show = json(&succeeds(place.run(&["routes", "show", "a.routes", "--tokens", "5", "--json"])));
    assert_eq!((&show["tokens"], &show["top_k"]), (&plain["tokens"], &2.into()), "{show}");
    assert_eq!(show["first_tokens"].as_array().unwrap().len(), 5);
    assert_eq!(show["first_tokens"][0]["id"], i32::from(b'l'), "the text begins with \"line\"");
    // Asked about its own capacity, a file tells what was really dropped.
    let ask = |file: &str, factor: &str| {
        json(&succeeds(place.run(&["routes", "what-if", file, "--capacity-factor", factor, "--json"])))
    };
    let own = ask("a.routes", "1");
    for (i, layer) in show["layers"].as_array().unwrap().iter().enumerate() {
        let asked = &own["what_if"][0]["layers"][i];
        assert_eq!((&asked["dropped"], &asked["choices"]), (&layer["dropped"], &layer["choices"]), "{own}");
        assert!(asked["dropped"].as_u64().unwrap() > 0, "{own}");
    }
    let table = stdout(&succeeds(place.run(&["routes", "what-if", "a.routes", "--capacity-factor", "1,1.25,64"])));
    assert_eq!(table.lines().filter(|line| line.contains(" %")).count(), 6, "three factors, two layers:\n{table}");
    assert!(table.contains("0.00 %"), "{table}");
    succeeds(place.run(&["routes", "show", "a.routes", "--tokens", "3"]));

    // Generation goes beyond the sequence of 32, so that tokens are run again.
    let generate = ["generate", "--model", "run", "--prompt", "line 1: the quick brown fox jumps over the"];
    let generate = |more: &[&str]| place.run(&[&generate[..], more].concat());
    let text = stdout(&succeeds(generate(&["--tokens", "50"])));
    assert_eq!(text, stdout(&succeeds(generate(&["--tokens", "50", "--record-routes", "g.routes"]))));
    let again = generate(&["--tokens", "50", "--replay-routes", "g.routes", "--record-routes", "h.routes"]);
    assert_eq!(text, stdout(&succeeds(again)));
    assert_eq!(fs::read(place.path("g.routes")).unwrap(), fs::read(place.path("h.routes")).unwrap());
    succeeds(generate(&["--tokens", "20", "--replay-routes", "g.routes"]));
    let longer = generate(&["--tokens", "51", "--replay-routes", "g.routes"]);
    let error = stderr(&longer);
    assert!(longer.status.code() == Some(1) && longer.stdout.is_empty(), "{error}");
    assert!(error.contains("too few recorded routes") && error.contains("g.routes"), "{error}");
}

#[test]
fn other_models_texts_and_damaged_files_are_told_and_leave_nothing() {
    let place = Place::new();
    succeeds(place.train("run", &["--steps", "2"]));
    succeeds(place.train("other", &["--steps", "2", "--set", "model.experts=[8]"]));
    succeeds(place.train("dense", &["--steps", "2", "--set", "model.experts=[1]", "--set", "model.mlp=standard"]));
    let chooses = ["--steps", "2", "--set", "model.router=expert-choice", "--set", "model.capacity_factor=2"];
    succeeds(place.train("chooses", &chooses));
    let text = fs::read_to_string(place.path("text.txt")).unwrap();
    fs::write(place.path("short.txt"), &text[..3000]).unwrap();
    fs::write(place.path("changed.txt"), text.replacen("line 7:", "line 8:", 1)).unwrap();
    let eval = |model: &'static str, text: &'static str, more: [&'static str; 2]| {
        [&["eval", "--model", model, "--data", text][..], &more].concat()
    };
    succeeds(place.run(&eval("run", "short.txt", ["--record-routes", "a.routes"])));
    let whole = fs::read(place.path("a.routes")).unwrap();

    let replay = ["--replay-routes", "a.routes"];
    for (code, args, parts) in [
        (1, eval("other", "short.txt", replay), ["MoE layers 1 (of 8 experts)", "found 1 (of 4 experts)"]),
        (1, eval("run", "text.txt", replay), ["too few recorded routes", "a.routes"]),
        (2, eval("dense", "short.txt", replay), ["MoE layers", "found none"]),
        (2, eval("chooses", "short.txt", ["--record-routes", "c.routes"]), ["expert_choice", "tokens choose"]),
        (1, eval("run", "short.txt", ["--record-routes", "none/c.routes"]), ["none/c.routes", "create"]),
        (1, eval("run", "short.txt", ["--replay-routes", "text.txt"]), ["not a route file", "line 0"]),
        (1, vec!["routes", "show", "none.routes"], ["none.routes", "open"]),
        (2, vec!["routes", "what-if", "a.routes", "--capacity-factor", "0"], ["--capacity-factor", "above 0"]),
        (2, vec!["routes", "what-if", "a.routes", "--capacity-factor", "1,nan"], ["--capacity-factor", "NaN"]),
    ] {
        let error = place.fails(code, &args);
        assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
    }
    // The token that differs is named by its place: the text says where.
    fs::write(place.path("other.txt"), text[..3000].replacen("line 7:", "line 8:", 1)).unwrap();
    let error = place.fails(1, &eval("run", "other.txt", replay));
    let position = text.find("line 7:").unwrap() + 5;
    assert!(error.contains(&format!("token {position} is 56 here, the routes are those of 55")), "{error}");

    // Cut anywhere, lengthened, or with any byte changed: told as damage, and no other way.
    let show = ["routes", "show", "bad.routes"];
    let every = whole.len() / 60;
    for at in (0..whole.len()).step_by(every) {
        fs::write(place.path("bad.routes"), &whole[..at]).unwrap();
        let error = place.fails(1, &show);
        assert!(error.contains("damaged") || (at < 8 && error.contains("not a route file")), "cut at {at}: {error}");
    }
    for at in (0..100).chain((100..whole.len()).step_by(every)) {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        fs::write(place.path("bad.routes"), &bad).unwrap();
        let error = RouteReader::open(&place.path("bad.routes")).and_then(|mut r| r.verify()).unwrap_err().to_string();
        let expected = ["damaged", "not a route file", "version"];
        assert!(expected.iter().any(|word| error.contains(word)), "byte {at}: {error}");
    }
    fs::write(place.path("bad.routes"), [&whole[..], b"x"].concat()).unwrap();
    assert!(place.fails(1, &show).contains("length"));

    // What was recorded before is untouched by a recording that fails, and no temporary file is left.
    let mut both = eval("run", "other.txt", replay);
    both.extend(["--record-routes", "a.routes"]);
    place.fails(1, &both);
    assert_eq!(fs::read(place.path("a.routes")).unwrap(), whole);
    let left = fs::read_dir(place.folder.path()).unwrap().flatten();
    assert!(left.into_iter().all(|e| !e.file_name().to_string_lossy().contains(".tmp")));
}

#[test]
fn passes_cannot_change_places() {
    let place = Place::new();
    let mut config = Config::from_toml(SMALL, "small").unwrap();
    config.set("model.experts=[3]").unwrap();
    let header = RouteHeader::of(&config).unwrap();
    let path = place.path("p.routes");
    let pass = |id: i32| Pass {
        ids: vec![id, 1],
        layers: vec![LayerRoutes { dropped: 0, expert_index: vec![id, -1], score: vec![0.5, f32::NAN] }],
    };
    let mut writer = RouteWriter::create(&path, &header).unwrap();
    (0..3).for_each(|id| writer.pass(&pass(id)).unwrap());
    assert!(!path.exists(), "not there before it is whole");
    writer.finish().unwrap();
    let mut reader = RouteReader::open(&path).unwrap();
    assert_eq!((reader.header(), reader.tokens(), reader.passes()), (&header, 6, 3));
    for id in 0..3 {
        let read = reader.next_pass().unwrap().unwrap();
        assert_eq!((&read.ids, &read.layers[0].expert_index), (&pass(id).ids, &vec![id, -1]));
        assert!(read.layers[0].score[0] == 0.5 && read.layers[0].score[1].is_nan());
    }
    assert!(reader.next_pass().unwrap().is_none());
    let whole = fs::read(&path).unwrap();
    let bytes = 4 + 2 * 4 + 4 + 2 * 8 + 8;
    let (head, passes) = whole.split_at(whole.len() - 3 * bytes);
    let swapped = [head, &passes[bytes..2 * bytes], &passes[..bytes], &passes[2 * bytes..]].concat();
    fs::write(&path, swapped).unwrap();
    let error = RouteReader::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(error.contains("pass 1") && error.contains("hash"), "{error}");
}

/// A small model; start values of the router that give clear choices.
fn model(changes: &[&str]) -> Config {
    let mut config = Config::from_toml(SMALL, "small").unwrap();
    for change in changes {
        config.set(change).unwrap();
    }
    config.validate().unwrap();
    config
}

fn session(config: &Config) -> Session {
    let device = std::env::var("MOEBIUS_DEVICE").unwrap_or_else(|_| "cpu".into());
    let mut session = Engine::open(&device).unwrap().session();
    gpt::initialise(&config.model, 11, |p, values| {
        session.insert(&p.name, &moebius::ir::TensorType::f32(p.shape.clone()))?;
        session.write(&p.name, values)
    })
    .unwrap();
    session
}

/// Text of bytes that look random.
fn text(n: usize, seed: u32) -> Vec<i32> {
    (0..n as u64).map(|i| (philox::bits([seed, 3], 0, i) % 256) as i32).collect()
}

const RECORDED: Routes = Routes { recorded: true, given: false };

/// Runs a program on tokens; targets are the tokens themselves.
fn run(session: &mut Session, program: &mut Program, tokens: &[i32]) {
    program.feed("tokens", tokens).unwrap();
    program.feed("targets", tokens).unwrap();
    session.run(program).unwrap();
}

fn layers(config: &ModelConfig) -> Vec<usize> {
    let experts = config.experts_per_layer();
    experts.iter().enumerate().filter(|(_, e)| **e > 0).map(|(layer, _)| layer).collect()
}

/// Experts and the bits of their scores, layer by layer.
fn taken(program: &Program, config: &ModelConfig) -> Vec<(Vec<i32>, Vec<u32>)> {
    let one = |layer: usize| {
        let score: Vec<f32> = program.output(&gpt::score_output(layer)).unwrap();
        (program.output(&gpt::expert_index_output(layer)).unwrap(), score.iter().map(|s| s.to_bits()).collect())
    };
    layers(config).into_iter().map(one).collect()
}

fn compile(session: &mut Session, graph: &Graph) -> Program {
    session.compile(graph).unwrap()
}

#[test]
fn training_evaluation_and_decoding_agree_on_every_route_of_a_text() {
    // Every router without noise; experts that choose have no routes of tokens.
    let quiet = |f: &Family| *f != Family::ExpertChoice && !f.routing(2).is_noisy();
    let families: Vec<Family> = Family::ALL.into_iter().filter(quiet).collect();
    assert!(families.len() > 20, "{families:?}");
    for router in families {
        let k = router.fixed_top_k().unwrap_or(router.top_k().min(3));
        let preset = format!("model.router.preset={router}");
        let top_k = format!("model.top_k={k}");
        let mut changes = vec!["model.layers=4", "model.experts=[8]", "model.mlp=standard", &preset, &top_k];
        if router.routing(k).groups > 1 {
            changes.extend(["model.router.groups=4", "model.router.group_keep=2"]);
        }
        if router.routing(k).hash_layers > 0 {
            changes.push("model.router.hash_layers=2");
        }
        let config = model(&changes);
        let m = &config.model;
        let mut session = session(&config);
        let tokens = text(2 * m.sequence, 5);
        let mut evaluation = compile(&mut session, &gpt::evaluation_with(m, 2, RECORDED).unwrap());
        run(&mut session, &mut evaluation, &tokens);
        let routes = taken(&evaluation, m);

        for chunk in [1, 8] {
            let mut decoding = compile(&mut session, &gpt::decoding_with(m, chunk, RECORDED).unwrap());
            for (row, text) in tokens.chunks(m.sequence).enumerate() {
                for (i, now) in text.chunks(chunk).enumerate() {
                    let start = (i * chunk) as i32;
                    decoding.feed("tokens", now).unwrap();
                    let positions: Vec<i32> = (start..start + chunk as i32).collect();
                    decoding.feed("positions", &positions).unwrap();
                    decoding.feed("start", &[start]).unwrap();
                    session.run(&mut decoding).unwrap();
                    let at = (row * m.sequence + i * chunk) * k;
                    for ((index, _), (wanted, _)) in taken(&decoding, m).iter().zip(&routes) {
                        assert_eq!(index, &wanted[at..at + chunk * k], "{router}: row {row}, token {start}");
                    }
                }
            }
        }
        // Last, as it moves the selection bias of routers that have one.
        let graph = gpt::training_with(m, 2, RECORDED).unwrap().graph;
        let mut training = compile(&mut session, &graph);
        run(&mut session, &mut training, &tokens);
        assert!(routes == taken(&training, m), "{router}: training and evaluation");
    }
}

#[test]
fn a_dropless_token_has_the_same_bits_alone_in_a_batch_and_shuffled() {
    let config = model(&["model.layers=4", "model.experts=[8]", "model.top_k=2"]);
    let m = &config.model;
    let mut session = session(&config);
    let batch = 64;
    let tokens = text(batch * m.sequence, 6);
    let k = 2;
    // Losses and routes of each sequence, in the order of `rows`.
    let mut of = |rows: &[usize]| {
        let mut program = compile(&mut session, &gpt::evaluation_with(m, rows.len(), RECORDED).unwrap());
        let mixed: Vec<i32> = rows.iter().flat_map(|&r| tokens[r * m.sequence..][..m.sequence].to_vec()).collect();
        run(&mut session, &mut program, &mixed);
        let loss: Vec<f32> = program.output("loss").unwrap();
        let routes = taken(&program, m);
        let one = |i: usize| {
            let s = m.sequence;
            let bits: Vec<u32> = loss[i * s..][..s].iter().map(|l| l.to_bits()).collect();
            let cut = |(index, score): &(Vec<i32>, Vec<u32>)| {
                (index[i * s * k..][..s * k].to_vec(), score[i * s * k..][..s * k].to_vec())
            };
            (bits, routes.iter().map(cut).collect::<Vec<_>>())
        };
        (0..rows.len()).map(one).collect::<Vec<_>>()
    };
    let all: Vec<usize> = (0..batch).collect();
    let together = of(&all);
    // 37 and 64 have no common factor: every row has another place.
    let shuffled: Vec<usize> = all.iter().map(|i| (i * 37 + 11) % batch).collect();
    for (place, found) in of(&shuffled).into_iter().enumerate() {
        assert_eq!(found, together[shuffled[place]], "row {} at place {place}", shuffled[place]);
    }
    for row in [0, 17, 63] {
        assert_eq!(of(&[row])[0], together[row], "row {row} alone");
    }
    assert!(together[0] != together[1], "rows differ");
}

/// Drops of each layer in a model that really has a capacity, over the same passes.
fn really_dropped(config: &Config, tokens: &[i32], batch: usize, given: Option<&[Pass]>) -> Vec<u64> {
    let m = &config.model;
    let mut session = session(config);
    let routes = Routes { recorded: true, given: given.is_some() };
    let mut program = compile(&mut session, &gpt::evaluation_with(m, batch, routes).unwrap());
    let mut sum = vec![0; layers(m).len()];
    for (i, pass) in tokens.chunks(batch * m.sequence).enumerate() {
        if let Some(given) = given {
            for (layer, routes) in layers(m).iter().zip(&given[i].layers) {
                program.feed(&gpt::choices_feed(*layer), &routes.expert_index).unwrap();
            }
        }
        run(&mut session, &mut program, pass);
        for (sum, layer) in sum.iter_mut().zip(layers(m)) {
            let dropped: Vec<i32> = program.output(&gpt::dropped_output(layer)).unwrap();
            *sum += dropped[0] as u64;
        }
    }
    sum
}

/// Writes the dropless routes of a text and gives them back.
fn recorded(config: &Config, tokens: &[i32], batch: usize, path: &Path) -> Vec<Pass> {
    let m = &config.model;
    let mut session = session(config);
    let mut program = compile(&mut session, &gpt::evaluation_with(m, batch, RECORDED).unwrap());
    let mut writer = RouteWriter::create(path, &RouteHeader::of(config).unwrap()).unwrap();
    let mut passes = Vec::new();
    for ids in tokens.chunks(batch * m.sequence) {
        run(&mut session, &mut program, ids);
        let layer = |layer: usize| LayerRoutes {
            dropped: 0,
            expert_index: program.output(&gpt::expert_index_output(layer)).unwrap(),
            score: program.output(&gpt::score_output(layer)).unwrap(),
        };
        let pass = Pass { ids: ids.to_vec(), layers: layers(m).into_iter().map(layer).collect() };
        writer.pass(&pass).unwrap();
        passes.push(pass);
    }
    writer.finish().unwrap();
    passes
}

#[test]
fn what_if_says_what_a_model_with_that_capacity_really_drops() {
    let place = Place::new();
    let engine = Engine::cpu(None).unwrap();
    let mut dropped_somewhere = 0;
    // All rules of capacity and all orders in which choices are turned away.
    for (router, k, more) in [
        ("top1", 1, None),
        ("top2", 2, None),
        ("topk", 3, None),
        ("gshard", 2, None),
        ("fair", 2, None),
        ("tutel", 2, Some("model.router.order=batch")),
        ("deepspeed-top1", 1, None),
        ("deepseek-v3", 2, Some("model.router.groups=1")),
    ] {
        let (preset, top_k) = (format!("model.router.preset={router}"), format!("model.top_k={k}"));
        let mut changes =
            vec!["model.layers=4", "model.experts=[8]", "model.mlp=standard", "model.min_capacity=3", &preset, &top_k];
        changes.extend(more);
        if router == "deepseek-v3" {
            changes.push("model.router.group_keep=1");
        }
        let config = model(&changes);
        let (batch, path) = (2, place.path("w.routes"));
        let tokens = text(6 * config.model.sequence, 9);
        let passes = recorded(&config, &tokens, batch, &path);
        let factors = [0.3, 0.75, 1.0, 1.25, 8.0];
        let mut reader = RouteReader::open(&path).unwrap();
        let asked = what_if(&engine, &mut reader, &factors, None).unwrap();
        assert_eq!(asked.len(), factors.len());
        for asked in asked {
            let factor = format!("model.capacity_factor={}", asked.capacity_factor);
            let mut changes = changes.clone();
            changes.push(&factor);
            let capped = model(&changes);
            let told: Vec<u64> = asked.layers.iter().map(|l| l.dropped).collect();
            // The first MoE layer sees what it saw without drops. With the recorded choices forced, so do all.
            let free = really_dropped(&capped, &tokens, batch, None);
            assert_eq!(told[0], free[0], "{router} {factor}");
            assert_eq!(told, really_dropped(&capped, &tokens, batch, Some(&passes)), "{router} {factor}, forced");
            dropped_somewhere += told.iter().filter(|&&d| d > 0).count();
            for layer in &asked.layers {
                assert_eq!(layer.load.iter().sum::<u64>() + layer.dropped, layer.choices);
                assert_eq!(layer.choices, tokens.len() as u64 * k);
                assert!(layer.without_expert * k <= layer.dropped && layer.capacity[0] == layer.capacity[1]);
            }
            if asked.capacity_factor == 8.0 {
                assert!(told.iter().all(|&d| d == 0), "{router}");
            }
        }
    }
    assert!(dropped_somewhere > 20, "{dropped_somewhere}");
}

#[test]
fn a_forced_route_is_taken() {
    let config = model(&["model.experts=[4]", "model.top_k=2"]);
    let m = &config.model;
    let mut session = session(&config);
    let tokens = text(m.sequence, 4);
    let routes = Routes { recorded: true, given: true };
    let mut program = compile(&mut session, &gpt::evaluation_with(m, 1, routes).unwrap());
    let mut losses = Vec::new();
    for (a, b) in [(0, 1), (3, 2), (2, -1)] {
        let choices: Vec<i32> = (0..m.sequence).flat_map(|_| [a, b]).collect();
        program.feed(&gpt::choices_feed(1), &choices).unwrap();
        run(&mut session, &mut program, &tokens);
        let (index, score) = taken(&program, m).remove(0);
        assert_eq!(index, choices);
        assert!(score.chunks(2).all(|s| f32::from_bits(s[0]) > 0.0 && (f32::from_bits(s[1]) == 0.0) == (b < 0)));
        losses.push(program.output::<f32>("loss").unwrap());
    }
    assert!(losses[0] != losses[1] && losses[1] != losses[2], "the experts make a difference");
}
