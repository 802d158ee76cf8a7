//! The program as its users meet it: real processes and real files, also killed.
//!
//! These tests live in this package because only here cargo tells where the program is.

use crate::place::{Place, checkpoint, json, kill_until_it_ends, metrics, stderr, stdout, succeeds};

#[test]
fn training_writes_what_it_promises_and_the_other_commands_use_it() {
    let place = Place::new();
    let output = succeeds(place.train("run", &[]));
    assert!(stdout(&output).contains("moebius generate --model run"), "{}", stdout(&output));
    let run = place.path("run");
    for file in ["config.toml", "metrics.jsonl", "report.html", "checkpoints/step-24/state.json"] {
        assert!(run.join(file).exists(), "{file}");
    }
    let lines = metrics(&run);
    let train = lines.iter().find(|l| l["kind"] == "train").unwrap();
    for key in ["step", "tokens", "loss", "lm_loss", "aux_loss", "lr", "grad_norm", "experts"] {
        assert!(!train[key].is_null(), "{key}: {train}");
    }
    let load: f64 = train["experts"][0]["load"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).sum();
    assert!((load - 1.0).abs() < 1e-5, "{load}");
    let first = lines[0]["lm_loss"].as_f64().unwrap();
    let last = lines.iter().rfind(|l| l["kind"] == "eval").unwrap()["val_loss"].as_f64().unwrap();
    assert!(first > 5.0 && last < first - 0.5, "from {first} to {last}");

    let eval = json(&succeeds(place.run(&["eval", "--model", "run", "--data", "text.txt", "--json"])));
    assert!(eval["loss"].as_f64().unwrap() < first && eval["tokens"].as_u64().unwrap() > 1000, "{eval}");
    let bits = eval["loss"].as_f64().unwrap() / std::f64::consts::LN_2;
    assert!((bits - eval["bits_per_byte"].as_f64().unwrap()).abs() < 1e-9, "{eval}");

    let generate = ["generate", "--model", "run/checkpoints/step-24", "--prompt", "line", "--tokens", "60"];
    let text = stdout(&succeeds(place.run(&generate)));
    assert!(text.starts_with("line") && text.len() > 30, "{text}");
    assert_eq!(text, stdout(&succeeds(place.run(&generate))), "the same seed gives the same text");

    let inspect = json(&succeeds(place.run(&["inspect", "--model", "run", "--json"])));
    assert!(inspect["total_params"].as_u64() > inspect["active_params"].as_u64(), "{inspect}");
    let bench = json(&succeeds(place.run(&["bench", "step", "--config", "small.toml", "--steps", "2", "--json"])));
    assert!(bench["tokens_per_s"].as_f64() > Some(0.0) && bench["step_ms"].as_f64() > Some(0.0), "{bench}");
    // Needs no GPU: two products forward, six with the gradients, and the router's.
    if cfg!(feature = "cuda") {
        let explained =
            stdout(&succeeds(place.run(&["bench", "layer", "--case", "B", "--explain", "--device", "cuda"])));
        let [forward, both] = explained.split("layer B, ").skip(1).collect::<Vec<_>>()[..] else {
            panic!("{explained}")
        };
        let products = |text: &str| text.lines().filter(|line| line.starts_with("  expert_matmul")).count();
        assert_eq!((products(forward), products(both)), (2, 6), "{explained}");
        assert!(
            explained.lines().skip(1).all(|line| line.contains("tiles") || line.starts_with("layer B")),
            "{explained}"
        );
        assert!(!place.run(&["bench", "layer", "--explain", "--device", "cpu"]).status.success());
        assert!(!place.run(&["bench", "step", "--explain", "--device", "cuda"]).status.success());
    }
    let bench = json(&succeeds(place.run(&["bench", "decode", "--config", "small.toml", "--steps", "4", "--json"])));
    assert!(bench["decode_ms"].as_f64() > Some(0.0), "{bench}");
    let devices = json(&succeeds(place.run(&["devices", "--json"])));
    assert_eq!(devices["devices"][0]["name"], "cpu");

    // A second run does not overwrite the first.
    let before = checkpoint(&run, 24);
    let error = stderr(&place.train("run", &[]));
    assert!(error.contains("--resume"), "{error}");
    assert_eq!(checkpoint(&run, 24), before);
}

#[test]
fn a_model_whose_experts_choose_is_trained_but_not_sampled() {
    let place = Place::new();
    let experts_choose = ["--set", "model.router=expert-choice", "--set", "model.capacity_factor=2"];
    let output = succeeds(place.train("run", &experts_choose));
    assert!(stdout(&output).contains("No sample: cannot generate"), "{}", stdout(&output));
    let refused = place.run(&["generate", "--model", "run", "--prompt", "line"]);
    assert!(!refused.status.success() && stderr(&refused).contains("allow_expert_choice_decoding"), "{refused:?}");
}

#[test]
fn the_sizes_of_the_paper_need_no_memory() {
    let place = Place::new();
    for (preset, total, active) in [("1.3b-pr-moe-64-128", 31.39e9, 1.72e9), ("350m-pr-moe-32-64", 4.12e9, 0.457e9)] {
        let inspect = json(&succeeds(place.run(&["inspect", "--preset", preset, "--json"])));
        let close = |key: &str, wanted: f64| (inspect[key].as_f64().unwrap() / wanted - 1.0).abs() < 3e-3;
        assert!(close("total_params", total) && close("active_params", active), "{inspect}");
    }
}

#[test]
fn one_seed_gives_the_same_bits_and_another_does_not() {
    let place = Place::new();
    for (out, seed) in [("a", "3"), ("b", "3"), ("c", "4")] {
        succeeds(place.train(out, &["--steps", "12", "--seed", seed]));
    }
    let [a, b, c] = ["a", "b", "c"].map(|out| checkpoint(&place.path(out), 12));
    assert_eq!(a, b);
    assert_ne!(a.0, c.0);
    assert_eq!(metrics(&place.path("a")), metrics(&place.path("b")));
}

/// As many threads as the environment says, with the same bits, and a clear error where that is no number of threads.
#[test]
fn the_number_of_threads_is_that_asked_for_and_changes_no_bit() {
    let place = Place::new();
    for threads in ["1", "3"] {
        let args = ["train", "--config", "small.toml", "--data", "text.txt", "--out", threads, "--steps", "6"];
        succeeds(place.command(&args).env("MOEBIUS_THREADS", threads).output().unwrap());
        let devices = succeeds(place.command(&["devices"]).env("MOEBIUS_THREADS", threads).output().unwrap());
        assert!(stdout(&devices).contains(&format!("{threads} threads,")), "{}", stdout(&devices));
    }
    assert_eq!(checkpoint(&place.path("1"), 6), checkpoint(&place.path("3"), 6));
    for found in ["0", "many", "-1", "5000"] {
        let output = place.command(&["devices"]).env("MOEBIUS_THREADS", found).output().unwrap();
        let told = format!("MOEBIUS_THREADS: wanted a number of threads from 1 to 4096, found {found:?}");
        assert!([stdout(&output), stderr(&output)].iter().any(|text| text.contains(&told)), "{}", stdout(&output));
    }
}

/// Kills a training run again and again, also while it writes checkpoints (after every step), and lets it resume: at the
/// end weights, moments and metrics are those of a run that was left alone.
#[test]
fn a_run_killed_at_random_moments_ends_with_the_same_bits() {
    let place = Place::new();
    let settings = ["--set", "train.steps=60", "--checkpoint-every", "1"];
    succeeds(place.train("alone", &settings));
    let seed = kill_until_it_ends(&place, "killed", 12, 1, |started| {
        let begin = [&["--config", "small.toml"][..], &settings].concat();
        let more = if started { &["--resume"][..] } else { &begin };
        [&["train", "--data", "text.txt", "--out", "killed"][..], more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect()
    });
    assert_eq!(checkpoint(&place.path("alone"), 60), checkpoint(&place.path("killed"), 60), "seed {seed}");
    assert_eq!(metrics(&place.path("alone")), metrics(&place.path("killed")), "seed {seed}");
}

/// Three micro-batches a step, blocks computed again, and a look of the host every fifth step only.
#[test]
fn accumulated_steps_are_told_one_by_one_and_resume_to_the_same_bits() {
    let place = Place::new();
    let settings = ["--accumulate", "3", "--set", "train.log_every=5"];
    for (out, more) in [("alone", &[][..]), ("late", &["--recompute"]), ("cut", &[])] {
        succeeds(place.train(out, &[&settings, more].concat()));
    }
    let alone = place.path("alone");
    let lines = metrics(&alone);
    let train: Vec<_> = lines.iter().filter(|l| l["kind"] == "train").collect();
    let steps: Vec<u64> = train.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=24).collect::<Vec<_>>());
    for line in &train {
        let step = line["step"].as_u64().unwrap();
        assert_eq!(line["tokens"], step * 3 * 2 * 32, "{line}");
        assert!(line["lm_loss"].is_number() && line["grad_norm"].is_number(), "{line}");
        assert_eq!(line["experts"].is_array(), step == 1 || step == 24 || step.is_multiple_of(5), "{line}");
    }
    // Recomputing changes no bit. The setting itself is in the header of the weights.
    let numbers = |out: &std::path::Path| {
        let (model, optimizer) = checkpoint(out, 24);
        let header = u64::from_le_bytes(model[..8].try_into().unwrap()) as usize;
        (model[8 + header..].to_vec(), optimizer)
    };
    assert!(numbers(&alone) == numbers(&place.path("late")));
    assert_eq!(lines, metrics(&place.path("late")));
    // As if it had been killed after step 12, between two looks.
    let cut = place.path("cut");
    for step in [18, 24] {
        std::fs::remove_dir_all(cut.join(format!("checkpoints/step-{step}"))).unwrap();
    }
    succeeds(place.run(&["train", "--data", "text.txt", "--resume", "--out", "cut"]));
    assert_eq!(checkpoint(&alone, 24), checkpoint(&cut, 24));
    assert_eq!(lines, metrics(&cut));

    let inspect = |more: &[&str]| {
        let args = [&["inspect", "--config", "small.toml", "--json", "--set", "train.accumulate=3"][..], more].concat();
        json(&succeeds(place.run(&args)))
    };
    let (plain, late) = (inspect(&[]), inspect(&["--set", "train.recompute=true"]));
    let number = |value: &serde_json::Value, key: &str| value[key].as_u64().unwrap();
    assert_eq!(number(&plain, "accumulator_bytes"), number(&plain, "gradient_bytes"));
    assert_eq!(number(&late, "activation_bytes_without_recomputation"), number(&plain, "activation_bytes"));
    assert!(number(&late, "recomputed_flops_per_token") > 0 && number(&plain, "recomputed_flops_per_token") == 0);
    let light = inspect(&["--set", "train.recompute=light"]);
    assert_eq!(number(&light, "activation_bytes_without_recomputation"), number(&plain, "activation_bytes"));
    assert_eq!(number(&light, "recomputed_flops_per_token"), 0);
    let kept = [&late, &light, &plain].map(|told| number(told, "kept_bytes"));
    assert!(kept.is_sorted() && kept[0] < kept[1] && kept[1] < kept[2], "{kept:?}");
}

/// A run whose moments are kept in fewer bits goes on after it was cut, and refuses to do so with others.
#[test]
fn moments_in_fewer_bits_resume_to_the_same_bits() {
    let place = Place::new();
    for (moments, other) in [("bf16", "8bit"), ("8bit", "f32")] {
        let [alone, cut] = ["alone", "cut"].map(|name| format!("{name}-{moments}"));
        for out in [&alone, &cut] {
            succeeds(place.train(out, &["--moments", moments]));
        }
        for step in [18, 24] {
            std::fs::remove_dir_all(place.path(&cut).join(format!("checkpoints/step-{step}"))).unwrap();
        }
        let resume = ["train", "--data", "text.txt", "--resume", "--out", &cut];
        let refused = place.fails(2, &[&resume[..], &["--moments", other]].concat());
        for part in [&format!("train.moments = {moments}"), &format!("this run {other}"), "--moments", "step-12"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        succeeds(place.run(&resume));
        assert!(checkpoint(&place.path(&alone), 24) == checkpoint(&place.path(&cut), 24), "{moments}");
        assert_eq!(metrics(&place.path(&alone)), metrics(&place.path(&cut)));

        let setting = format!("train.moments={moments}");
        let inspect = |more: &[&str]| {
            let args = [&["inspect", "--config", "small.toml", "--json", "--device", "cpu"][..], more].concat();
            json(&succeeds(place.run(&args)))
        };
        let (plain, narrow) = (inspect(&[]), inspect(&["--set", &setting]));
        let bytes = |value: &serde_json::Value, key: &str| value[key].as_u64().unwrap();
        // All that changes is what the moments take; memory is taken in steps.
        let saved = bytes(&plain, "optimizer_bytes") - bytes(&narrow, "optimizer_bytes");
        let peak = bytes(&plain, "peak_bytes") - bytes(&narrow, "peak_bytes");
        assert!(saved > 0 && peak.abs_diff(saved) <= saved / 4, "{moments}: {peak} for {saved}");
        assert_eq!(narrow["moments"], moments);
    }
}

#[test]
fn a_machine_is_verified_op_by_op_and_a_wrong_name_is_wrong_use() {
    let place = Place::new();
    let report =
        json(&succeeds(place.run(&["verify", "--json", "--op", "softmax", "--op", "moe_layer", "--seed", "5"])));
    assert_eq!(
        (&report["passed"], &report["device"], &report["seed"]),
        (&true.into(), &"cpu".into(), &5.into()),
        "{report}"
    );
    assert_eq!((&report["ops"], &report["layers"]), (&1.into(), &1.into()), "{report}");
    let rows = report["rows"].as_array().unwrap();
    let passes: Vec<_> = rows.iter().map(|r| (r["op"].as_str().unwrap(), r["pass"].as_str().unwrap())).collect();
    let layer = ["forward", "backward", "gradient check"].map(|pass| ("moe_layer", pass));
    assert_eq!(passes, [&[("softmax", "forward"), ("softmax", "backward")][..], &layer].concat());
    for row in rows {
        assert!(row["verdict"] == "passed" && row["worst"]["f32"]["relative"].as_f64() > Some(0.0), "{row}");
        assert!(row["by_dtype"]["bf16"]["passed"].as_u64() > Some(0), "{row}");
    }
    let sum: u64 = ["passed", "refused", "failed"].map(|k| report[format!("cases_{k}")].as_u64().unwrap()).iter().sum();
    assert_eq!(Some(sum), report["cases"].as_u64(), "{report}");

    let table = stdout(&succeeds(place.run(&["verify", "--op", "linear_cross_entropy_grad", "--op", "decoder"])));
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let last = table.lines().last().unwrap();
    assert!(last.starts_with("1 op, 1 kind of layers, 18 cases: all passed on cpu ("), "{table}");

    let error = place.fails(2, &["verify", "--op", "expert_matmull"]);
    assert!(error.contains("nearest: expert_matmul"), "{error}");
    let error = place.fails(2, &["verify", "--device", "abacus"]);
    assert!(error.contains("abacus"), "{error}");
}

#[test]
fn help_is_there_for_every_command() {
    let place = Place::new();
    for args in [&["--help"][..], &["train", "--help"], &["generate", "--help"], &["bench", "--help"], &["--version"]] {
        let output = succeeds(place.run(args));
        assert!(stdout(&output).contains("moebius"), "{args:?}");
    }
}
