//! Router health and alarms of the program: what is written, when it warns, how it ends, and that nothing depends on where a run
//! was stopped.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::place::{Place, checkpoint, json, metrics, stderr, succeeds};

/// Many experts for few tokens, with a capacity: some are idle, some overfull.
const CROWDED: [&str; 6] =
    ["--set", "model.experts=[32]", "--set", "model.capacity_factor=1", "--set", "model.min_capacity=1"];

fn layers(line: &Value) -> &[Value] {
    line["experts"].as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn every_line_has_the_health_of_each_router_and_idle_steps_are_exact() {
    let place = Place::new();
    succeeds(place.train("run", &CROWDED));
    let lines = metrics(&place.path("run"));
    // Counted here from the loads of every step, without the program's own count.
    let mut idle = vec![0u64; 32];
    let mut longest = 0;
    for line in lines.iter().filter(|l| l["kind"] == "train") {
        let [layer] = layers(line) else { panic!("one MoE layer: {line}") };
        let load: Vec<f64> = layer["load"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        for (idle, load) in idle.iter_mut().zip(&load) {
            *idle = if *load > 0.0 { 0 } else { *idle + 1 };
        }
        let told: Vec<u64> = layer["idle"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
        assert_eq!(told, idle, "{line}");
        longest = longest.max(*idle.iter().max().unwrap());
        assert_eq!(layer["dead"], 0, "no expert is idle for a hundred steps of 24");
        let number = |key: &str| layer[key].as_f64().unwrap_or_else(|| panic!("{key}: {layer}"));
        let entropy = number("entropy");
        assert!(entropy > 0.0 && entropy <= 32f64.ln() + 1e-3, "{entropy}");
        assert!((0.0..=1.0).contains(&number("coefficient")));
        // logsumexp is at least the mean of the logits plus ln E; they are near 0 here.
        assert!(number("logit_scale") > 2.0, "{layer}");
        // Each expert has two slots for 64 tokens.
        let dropped: f64 = load.iter().map(|l| (l * 64.0 - 2.0).max(0.0)).sum::<f64>() / 64.0;
        assert!((number("dropped") - dropped).abs() < 1e-5 && dropped > 0.0, "{dropped}: {layer}");
    }
    assert!(longest > 3, "an expert was idle for a while: {longest}");

    // A plain model has no coefficient.
    succeeds(place.train("plain", &["--set", "model.mlp=standard", "--steps", "2"]));
    let lines = metrics(&place.path("plain"));
    let layer = &layers(&lines[0])[0];
    assert!(layer["coefficient"].is_null() && layer["entropy"].is_number() && layer["dropped"] == 0.0, "{layer}");
}

#[test]
fn alarms_warn_once_and_end_a_run_with_code_3_from_where_it_goes_on_to_the_same_bits() {
    let place = Place::new();
    let alarm = ["--alarm", "dead-experts=3,drop=0.05,coefficient=0.0..0.99"];
    let warned = succeeds(place.train("warned", &[&CROWDED[..], &alarm].concat()));
    let lines = metrics(&place.path("warned"));
    let alarms: Vec<&Value> = lines.iter().filter(|l| l["kind"] == "alarm").collect();
    let told = stderr(&warned);
    assert_eq!(told.matches("alarm: step").count(), alarms.len(), "{told}");
    let dropped: Vec<&&Value> = alarms.iter().filter(|l| l["alarm"] == "drop").collect();
    assert_eq!((dropped.len(), &dropped[0]["step"], &dropped[0]["layer"]), (1, &1.into(), &1.into()), "{dropped:?}");
    assert!(told.contains("layer 1:") && told.contains("limit 5.0 %"), "{told}");

    // The dead ones, from the idle steps: told in the step in which the third idle one is done.
    let mut wanted = Vec::new();
    for line in lines.iter().filter(|l| l["kind"] == "train") {
        for (expert, idle) in layers(line)[0]["idle"].as_array().unwrap().iter().enumerate() {
            if *idle == 3 {
                wanted.push((line["step"].as_u64().unwrap(), expert as u64));
            }
        }
    }
    let dead = alarms.iter().filter(|l| l["alarm"] == "dead-experts");
    let dead: Vec<(u64, u64)> = dead.map(|l| (l["step"].as_u64().unwrap(), l["expert"].as_u64().unwrap())).collect();
    assert_eq!(dead, wanted);
    assert!(dead.len() > 2, "{dead:?}");
    let page = std::fs::read_to_string(place.path("warned/report.html")).unwrap();
    assert!(page.contains("no token for 3 steps"), "the report tells of alarms");

    // The same with an end at each alarm: every time a checkpoint, the command that goes on, and at last the same bits.
    let ends = [&CROWDED[..], &alarm, &["--alarm-exit"]].concat();
    let mut output = place.train("ended", &ends);
    let mut ended = 0;
    let mut steps = BTreeSet::new();
    while output.status.code() == Some(3) {
        ended += 1;
        let error = stderr(&output);
        assert!(error.contains("moebius train --resume --out ended --alarm"), "{error}");
        // An evaluation of the same step may come after it.
        let last = metrics(&place.path("ended")).into_iter().rfind(|l| l["kind"] != "eval").unwrap();
        let step = last["step"].as_u64().unwrap();
        checkpoint(&place.path("ended"), step);
        assert_eq!(last["kind"], "alarm");
        assert!(steps.insert(step), "step {step} ended the run twice");
        let resume = ["train", "--data", "text.txt", "--resume", "--out", "ended", "--alarm-exit"];
        output = place.run(&[&resume[..], &alarm].concat());
    }
    succeeds(output);
    let different: BTreeSet<u64> = alarms.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    // The alarms of the last step end a run that is done: it ends with code 3, and goes on to nothing.
    assert_eq!(ended, different.len());
    assert_eq!(checkpoint(&place.path("warned"), 24), checkpoint(&place.path("ended"), 24));
    assert_eq!(metrics(&place.path("warned")), metrics(&place.path("ended")));
}

#[test]
fn alarms_of_the_configuration_are_those_of_the_command_line_and_outlast_a_run() {
    let place = Place::new();
    let limits = "dead-experts=3,drop=0.05,coefficient=0.0..0.99";
    let setting = format!("train.alarm={limits}");
    succeeds(place.train("option", &[&CROWDED[..], &["--alarm", limits]].concat()));
    succeeds(place.train("setting", &[&CROWDED[..], &["--set", &setting]].concat()));
    assert_eq!(metrics(&place.path("option")), metrics(&place.path("setting")));
    assert!(metrics(&place.path("setting")).iter().any(|l| l["kind"] == "alarm"));
    // The run's folder has them, so that it goes on with them; the command line has the last word.
    let ends = [&CROWDED[..], &["--set", &setting, "--set", "train.alarm_exit=true"]].concat();
    let output = place.train("ended", &ends);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("moebius train --resume --out ended\n"), "{}", stderr(&output));
    let resume = ["train", "--data", "text.txt", "--resume", "--out", "ended"];
    assert_eq!(place.run(&resume).status.code(), Some(3), "the next alarm ends it too");
    succeeds(place.run(&[&resume[..], &["--alarm", "entropy=1e-9"]].concat()));
}

#[test]
fn wrong_alarms_are_wrong_use() {
    let place = Place::new();
    let train = |alarm: &[&'static str]| {
        [&["train", "--config", "small.toml", "--data", "text.txt", "--out", "out"][..], alarm].concat()
    };
    for (alarm, parts) in [
        (&["--alarm", "dead-expert=3"][..], ["dead-expert", "nearest: dead-experts"]),
        (&["--alarm", "drop=1.5"], ["drop", "below 1"]),
        (&["--alarm", "drop=0.5"], ["drop", "dropless"]),
        (&["--alarm", "nothing"], ["key=value", "nothing"]),
        (&["--alarm-exit"], ["--alarm-exit", "found none"]),
        (&["--set", "train.alarm=drop=1.5"], ["train.alarm", "below 1"]),
        (&["--set", "train.alarm=drop=0.5"], ["train.alarm", "dropless"]),
        (&["--set", "train.alarm_exit=true"], ["train.alarm_exit", "no train.alarm"]),
    ] {
        let error = place.fails(2, &train(alarm));
        assert!(parts.iter().all(|part| error.contains(part)), "{alarm:?}: {error}");
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_checkpoint_keeps_idle_steps() {
    let place = Place::new();
    succeeds(place.train("run", &CROWDED));
    let state = place.path("run/checkpoints/step-24/state.json");
    let state: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    let last = metrics(&place.path("run")).into_iter().rfind(|l| l["kind"] == "train").unwrap();
    assert_eq!(state["state"]["extra"]["routers"]["idle"]["1"], layers(&last)[0]["idle"], "{state}");
    // Evaluation and generation do not care for it.
    let eval = json(&succeeds(place.run(&["eval", "--model", "run", "--data", "text.txt", "--json"])));
    assert!(eval["loss"].is_number());
}
