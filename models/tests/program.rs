//! The program as its users meet it: real processes, real files, killed and fed with nonsense.
//!
//! These tests live in this package because only here cargo tells where the program is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use moebius::ir::philox;
use tempfile::TempDir;

/// A model that trains in a second.
const SMALL: &str = r#"
[model]
name = "small"
vocab = 256
layers = 2
width = 32
heads = 2
ffn = 64
sequence = 32
experts = [4]
expert_interval = 2
mlp = "residual"
top_k = 1
aux_coef = 0.01
init_std = 0.02
identical_experts = false

[train]
batch = 2
steps = 24
learning_rate = 1.0e-3
min_learning_rate = 1.0e-4
warmup_steps = 4
seed = 7
eval_every = 12
eval_windows = 4
checkpoint_every = 6
keep_checkpoints = 3
log_every = 1
"#;

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("small.toml"), SMALL).unwrap();
        let text: String =
            (0..400).map(|i| format!("line {i}: the quick brown fox jumps over the lazy dog\n")).collect();
        fs::write(folder.path().join("text.txt"), text).unwrap();
        Place { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `train` on the small model into `out` with further arguments.
    fn train(&self, out: &str, more: &[&str]) -> Output {
        let mut args = vec!["train", "--config", "small.toml", "--data", "text.txt", "--out", out];
        args.extend(more);
        self.run(&args)
    }

    /// Runs a command that must end with this exit code, and returns what it said on standard error.
    fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(!error.contains("panicked") && !error.contains("a bug in moebius"), "{args:?}: {error}");
        error
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn succeeds(output: Output) -> Output {
    assert!(output.status.success(), "{}\n{}", stdout(&output), stderr(&output));
    output
}

/// The bytes of weights and optimizer after a step.
fn checkpoint(out: &Path, step: u64) -> (Vec<u8>, Vec<u8>) {
    let folder = out.join(format!("checkpoints/step-{step}"));
    let read = |name: &str| fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{}/{name}: {e}", folder.display()));
    (read("model.safetensors"), read("optimizer.safetensors"))
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(output)))
}

/// The metrics without what depends on the clock.
fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let line = |l: &str| {
        let mut value: serde_json::Value = serde_json::from_str(l).unwrap();
        if let Some(map) = value.as_object_mut() {
            map.remove("tokens_per_s");
        }
        value
    };
    text.lines().map(line).collect()
}

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

/// Kills a training run again and again, also while it writes checkpoints (after every step), and lets it resume: at the
/// end weights, moments and metrics are those of a run that was left alone.
#[test]
fn a_run_killed_at_random_moments_ends_with_the_same_bits() {
    let place = Place::new();
    let settings = ["--set", "train.steps=60", "--checkpoint-every", "1"];
    succeeds(place.train("alone", &settings));
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let mut kills = 0;
    for attempt in 0..200u64 {
        let started = place.path("killed/config.toml").exists();
        let mut args = vec!["train", "--data", "text.txt", "--out", "killed"];
        args.extend(if started { vec!["--resume"] } else { [&["--config", "small.toml"][..], &settings].concat() });
        let mut child = place.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // The first dozen attempts are cut short at a random moment; then the run may end.
        if attempt < 12 {
            let wait = philox::uniform([seed, 1], 0, attempt) * 400.0;
            std::thread::sleep(Duration::from_millis(5 + wait as u64));
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            break;
        }
        kills += u32::from(output.status.code().is_none());
        assert!(output.status.code().is_none(), "seed {seed}, attempt {attempt}: {}", stderr(&output));
    }
    assert!(kills > 0, "no run was killed");
    assert_eq!(checkpoint(&place.path("alone"), 60), checkpoint(&place.path("killed"), 60), "seed {seed}");
    assert_eq!(metrics(&place.path("alone")), metrics(&place.path("killed")), "seed {seed}");
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_says_how_to_go_on() {
    let place = Place::new();
    let args = ["train", "--config", "small.toml", "--data", "text.txt", "--out", "run", "--set", "train.steps=100000"];
    let child = place.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let metrics_file = place.path("run/metrics.jsonl");
    for _ in 0..600 {
        if fs::metadata(&metrics_file).is_ok_and(|m| m.len() > 2000) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("moebius train --resume --out run"), "{error}");
    let saved = fs::read_dir(place.path("run/checkpoints")).unwrap().flatten();
    let newest = saved.filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()).max();
    let stopped = metrics(&place.path("run")).iter().filter_map(|l| l["step"].as_u64()).max();
    assert_eq!(newest, stopped, "the last step was saved");
    let next = (newest.unwrap() + 2).to_string();
    succeeds(place.run(&["train", "--data", "text.txt", "--resume", "--out", "run", "--steps", &next]));
}

#[test]
fn bad_input_gets_one_clear_error() {
    let place = Place::new();
    fs::write(place.path("empty.txt"), "").unwrap();
    fs::write(place.path("short.txt"), "too short").unwrap();
    fs::write(place.path("latin1.txt"), b"caf\xe9 ".repeat(200)).unwrap();
    fs::write(place.path("tokenizer.json"), "{}").unwrap();
    fs::write(place.path("file"), "not a folder").unwrap();
    fs::write(place.path("typo.toml"), SMALL.replace("width = 32", "wdith = 32")).unwrap();
    let train = |more: &[&'static str]| [&["train", "--out", "out", "--config", "small.toml"][..], more].concat();
    let set = |setting: &'static str| train(&["--data", "text.txt", "--set", setting]);
    let table: Vec<(i32, Vec<&str>, Vec<&str>)> = vec![
        (1, train(&["--data", "missing.txt"]), vec!["missing.txt"]),
        (1, train(&["--data", "empty.txt"]), vec!["empty.txt", "empty"]),
        (1, train(&["--data", "short.txt"]), vec!["33", "found"]),
        (1, train(&["--data", "text.txt", "--tokenizer", "tokenizer.json"]), vec!["tokenizer.json"]),
        (1, train(&["--data", "text.txt", "--tokenizer", "none.json"]), vec!["none.json"]),
        (2, vec!["train", "--preset", "tiny-pr-mo"], vec!["tiny-pr-moe"]),
        (2, vec!["train", "--config", "typo.toml"], vec!["wdith", "width"]),
        (2, vec!["train", "--config", "none.toml"], vec!["none.toml"]),
        (2, set("model.top_k=9"), vec!["top_k", "9", "4"]),
        (2, set("model.experts=[4,4,4]"), vec!["experts", "3"]),
        (2, set("model.heads=5"), vec!["heads", "32", "5"]),
        (2, set("model.wdith=5"), vec!["model.wdith", "width"]),
        (2, set("train.batch=many"), vec!["train.batch"]),
        (2, train(&["--device", "abacus", "--data", "text.txt"]), vec!["abacus", "cpu"]),
        (2, vec!["train", "--no-such-flag"], vec!["--no-such-flag"]),
        (2, vec![], vec!["Usage"]),
        (1, vec!["train", "--resume", "--out", "nowhere"], vec!["nowhere", "nothing to resume"]),
        (1, vec!["train", "--data", "text.txt", "--config", "small.toml", "--out", "file/run"], vec!["file/run"]),
        (1, vec!["eval", "--model", "nowhere", "--data", "text.txt"], vec!["nowhere"]),
        (1, vec!["generate", "--model", "file", "--prompt", "x"], vec!["file"]),
        (2, vec!["inspect", "--preset", "350M"], vec!["350m"]),
        (2, vec!["inspect"], vec!["--preset"]),
    ];
    for (code, args, wanted) in table {
        let error = place.fails(code, &args);
        for word in wanted {
            assert!(error.contains(word), "{args:?}: wanted {word:?} in: {error}");
        }
        assert!(!place.path("out/config.toml").exists(), "{args:?} left a run behind");
    }
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_tensor_and_keeps_the_checkpoint() {
    let place = Place::new();
    let output =
        place.train("run", &["--set", "train.learning_rate=1e30", "--set", "train.clip=0", "--checkpoint-every", "1"]);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("the first tensor that is not finite is") && error.contains("step "), "{error}");
    let saved = fs::read_dir(place.path("run/checkpoints")).unwrap().flatten();
    assert!(saved.map(|e| e.file_name()).any(|n| n.to_string_lossy().starts_with("step-")), "{error}");
}

#[test]
fn damaged_and_foreign_checkpoints_are_named_and_older_ones_used() {
    let place = Place::new();
    succeeds(place.train("run", &[]));
    let weights = place.path("run/checkpoints/step-24/model.safetensors");
    let good = fs::read(&weights).unwrap();

    let mut flipped = good.clone();
    flipped[good.len() * 2 / 3] ^= 4;
    fs::write(&weights, &flipped).unwrap();
    let error = place.fails(1, &["generate", "--model", "run/checkpoints/step-24", "--prompt", "x"]);
    assert!(error.contains("model.safetensors"), "{error}");
    let resume = ["train", "--data", "text.txt", "--resume", "--out", "run", "--steps", "26"];
    let output = succeeds(place.run(&resume));
    let error = stderr(&output);
    assert!(error.contains("step-24") && error.contains("model.safetensors"), "{error}");
    assert!(error.contains("resuming after step 18"), "{error}");

    fs::write(&weights, &good[..good.len() / 2]).unwrap();
    let error = place.fails(1, &["eval", "--model", "run/checkpoints/step-24", "--data", "text.txt"]);
    assert!(error.contains("model.safetensors"), "{error}");

    // The configuration of the folder no longer fits the checkpoints.
    let config = fs::read_to_string(place.path("run/config.toml")).unwrap();
    fs::write(place.path("run/config.toml"), config.replace("ffn = 64", "ffn = 128")).unwrap();
    let error = place.fails(1, &resume);
    assert!(error.contains("config"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_disk_that_takes_no_more_leaves_the_old_checkpoints() {
    let place = Place::new();
    succeeds(place.train("run", &["--steps", "6"]));
    let before = checkpoint(&place.path("run"), 6);
    // A limit on the size of files, with its signal ignored, makes every larger write fail as a full disk does.
    let program = env!("CARGO_BIN_EXE_moebius");
    let script =
        format!("trap '' XFSZ; ulimit -f 40; exec '{program}' train --data text.txt --resume --out run --steps 12");
    let output = Command::new("sh").args(["-c", &script]).current_dir(place.folder.path()).output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("model.safetensors") || error.contains("optimizer.safetensors"), "{error}");
    assert!(!error.contains("a bug in moebius"), "{error}");
    assert_eq!(checkpoint(&place.path("run"), 6), before);
    succeeds(place.run(&["train", "--data", "text.txt", "--resume", "--out", "run", "--steps", "12"]));
}

#[test]
fn help_is_there_for_every_command() {
    let place = Place::new();
    for args in [&["--help"][..], &["train", "--help"], &["generate", "--help"], &["bench", "--help"], &["--version"]] {
        let output = succeeds(place.run(args));
        assert!(stdout(&output).contains("moebius"), "{args:?}");
    }
}
