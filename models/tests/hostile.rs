//! The program where things go wrong: nonsense as input, damaged files, full disks, closed pipes, signals. Each time one clear
//! error, an exit code that says so, and nothing lost.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::place::{Place, SMALL, checkpoint, metrics, stderr, succeeds};

#[cfg(unix)]
#[test]
fn a_signal_saves_and_says_how_to_go_on() {
    // Ctrl-C; a job that is ended by its queue; a terminal that is closed.
    for signal in ["-INT", "-TERM", "-HUP"] {
        let place = Place::new();
        let args =
            ["train", "--config", "small.toml", "--data", "text.txt", "--out", "run", "--set", "train.steps=100000"];
        let child = place.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let metrics_file = place.path("run/metrics.jsonl");
        for _ in 0..600 {
            if fs::metadata(&metrics_file).is_ok_and(|m| m.len() > 2000) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(130), "{signal}: {error}");
        assert!(error.contains("moebius train --resume --out run"), "{error}");
        let saved = fs::read_dir(place.path("run/checkpoints")).unwrap().flatten();
        let newest = saved.filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()).max();
        let stopped = metrics(&place.path("run")).iter().filter_map(|l| l["step"].as_u64()).max();
        assert_eq!(newest, stopped, "the last step was saved");
        let next = (newest.unwrap() + 2).to_string();
        succeeds(place.run(&["train", "--data", "text.txt", "--resume", "--out", "run", "--steps", &next]));
    }
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_text_after_a_token_with_the_routes_so_far() {
    let place = Place::new();
    succeeds(place.train("run", &["--steps", "2"]));
    let args = ["generate", "--model", "run", "--prompt", "line", "--tokens", "100000000", "--record-routes", "routes"];
    let out = place.path("text");
    let to = fs::File::create(&out).unwrap();
    let child = place.command(&args).stdout(to).stderr(Stdio::piped()).spawn().unwrap();
    for _ in 0..600 {
        if fs::metadata(&out).is_ok_and(|m| m.len() > 100) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(130), "{error}");
    assert!(error.contains("stopping after this token") && !error.contains("moebius:"), "{error}");
    let text = fs::read(&out).unwrap();
    assert!(text.len() > 100 && text.ends_with(b"\n"), "{}", text.len());
    // The file of routes is whole: forced, they give the same text.
    let again = ["generate", "--model", "run", "--prompt", "line", "--tokens", "20", "--replay-routes", "routes"];
    let again = succeeds(place.run(&again)).stdout;
    // But for a character that is not complete after these tokens.
    assert!(text.starts_with(&again[..again.len() - 4]), "{}", String::from_utf8_lossy(&again));
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_ends_no_run_and_is_no_bug() {
    let place = Place::new();
    // Nobody reads standard error any more: training goes on.
    let args = ["train", "--config", "small.toml", "--data", "text.txt", "--out", "run"];
    let mut child = place.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
    checkpoint(&place.path("run"), 24);

    let generate = ["generate", "--model", "run", "--prompt", "line", "--tokens", "40"];
    let all = [&["inspect", "--list"][..], &["inspect", "--preset", "350m"], &["--help"], &["devices"], &generate];
    for args in all {
        let mut child = place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && stderr(&output).is_empty(), "{args:?}: {}", stderr(&output));
    }
    // A full disk is not the same as a reader that has seen enough.
    if cfg!(target_os = "linux") {
        for args in [&["inspect", "--list"][..], &generate] {
            let full = fs::File::options().write(true).open("/dev/full").unwrap();
            let output = place.command(args).stdout(full).output().unwrap();
            let error = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
            assert!(error.contains("standard output") && !error.contains("a bug in moebius"), "{args:?}: {error}");
        }
    }
}

#[test]
fn a_model_that_does_not_fit_memory_is_refused_with_numbers() {
    let place = Place::new();
    // 5.6 TB of parameters and moments for the embedding alone.
    let settings = ["--set", "model.vocab=16777216", "--set", "model.width=28000"];
    let huge = [&["train", "--config", "small.toml", "--data", "text.txt", "--out", "huge"][..], &settings].concat();
    let error = place.fails(1, &huge);
    let number =
        |before: &str| error.split_once(before).and_then(|(_, rest)| rest.split_once(" GB")?.0.parse::<f64>().ok());
    // Weight and two moments of f32 for each number of the table.
    let table = 16_777_216.0 * 28_000.0 * 12.0 / 1e9;
    assert!(number("GB (").is_some_and(|state| state > table && state < 1.1 * table), "{error}");
    assert!(number("needs ").is_some_and(|all| all > table) && number("scratch), ").is_some(), "{error}");
    assert!(!place.path("huge").exists(), "nothing is left behind");
}

/// A tokenizer of whole words that has none for words it does not know.
const WORDS: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"line": 0, "fox": 1}, "unk_token": "[UNK]"}
}"#;

#[test]
fn bad_input_gets_one_clear_error() {
    let place = Place::new();
    fs::write(place.path("empty.txt"), "").unwrap();
    fs::write(place.path("short.txt"), "too short").unwrap();
    fs::write(place.path("latin1.txt"), b"caf\xe9 ".repeat(200)).unwrap();
    fs::write(place.path("tokenizer.json"), "{}").unwrap();
    fs::write(place.path("words.json"), WORDS).unwrap();
    fs::write(place.path("file"), "not a folder").unwrap();
    fs::write(place.path("typo.toml"), SMALL.replace("width = 32", "wdith = 32")).unwrap();
    let train = |more: &[&'static str]| [&["train", "--out", "out", "--config", "small.toml"][..], more].concat();
    let set = |setting: &'static str| train(&["--data", "text.txt", "--set", setting]);
    let table: Vec<(i32, Vec<&str>, Vec<&str>)> = vec![
        (1, train(&["--data", "missing.txt"]), vec!["missing.txt"]),
        (2, train(&["--moments", "f16"]), vec!["f32, bf16, 8bit", "`f16`"]),
        (2, set("train.moments=4bit"), vec!["train.moments", "`f32`", "`bf16`", "`8bit`"]),
        (1, train(&["--data", "empty.txt"]), vec!["empty.txt", "empty"]),
        (1, train(&["--data", "short.txt"]), vec!["33", "found"]),
        (1, train(&["--data", "."]), vec!["a folder"]),
        (1, train(&["--data", "latin1.txt", "--tokenizer", "words.json"]), vec!["latin1.txt", "UTF-8", "byte 3"]),
        (1, train(&["--data", "text.txt", "--tokenizer", "words.json"]), vec!["text.txt", "words.json", "[UNK]"]),
        (1, train(&["--data", "text.txt", "--tokenizer", "tokenizer.json"]), vec!["tokenizer.json"]),
        (1, train(&["--data", "text.txt", "--tokenizer", "none.json"]), vec!["none.json"]),
        (2, vec!["train", "--preset", "tiny-pr-mo"], vec!["tiny-pr-moe"]),
        (2, vec!["train", "--config", "typo.toml"], vec!["wdith", "width"]),
        (2, vec!["train", "--config", "none.toml"], vec!["none.toml"]),
        (2, set("model.top_k=9"), vec!["top_k", "9", "4"]),
        (2, set("model.experts=[4,4,4]"), vec!["experts", "3"]),
        (2, set("model.heads=5"), vec!["heads", "32", "5"]),
        (2, set("model.wdith=5"), vec!["model.wdith", "width"]),
        (2, set("train.batch=many"), vec!["train.batch", "many"]),
        (2, set("train.batch=99999999999999999999"), vec!["train.batch", "99999999999999999999", "at most"]),
        (2, set("model.width=99999999999"), vec!["model.width", "99999999999"]),
        (2, set("train.learning_rate=nan"), vec!["train.learning_rate", "finite"]),
        (2, set("train.batch"), vec!["key=value"]),
        (2, set("train.accumulate=0"), vec!["train.accumulate", "1 to"]),
        (2, train(&["--accumulate", "-1"]), vec!["--accumulate", "-1"]),
        (2, train(&["--steps", "-3"]), vec!["--steps", "-3"]),
        (2, train(&["--steps", "0", "--data", "text.txt"]), vec!["train.steps"]),
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
        assert!(!error.trim_end().contains("\n\n") || code == 2, "{args:?}: one error, not several: {error}");
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
    assert!(error.contains("The last good checkpoint is of step 1"), "{error}");
    // Also if the host was not going to look at that step: its number is exact, and those before it have their lines.
    let wild = ["--set", "train.learning_rate=1e30", "--set", "train.clip=0", "--set", "train.log_every=20"];
    let single = place.train("single", &[&wild[..4], &["--accumulate", "2"]].concat());
    let together = place.train("together", &[&wild[..], &["--accumulate", "2"]].concat());
    let line = |output| stderr(&output).lines().find(|l| l.contains("the first tensor")).unwrap().to_owned();
    assert_eq!(line(single), line(together));
    let steps = |out: &str| metrics(&place.path(out)).iter().filter(|l| l["kind"] == "train").count();
    assert_eq!(steps("single"), steps("together"));
    // Where there is none, none is promised.
    let output = place.train("none", &["--set", "train.learning_rate=1e30", "--set", "train.clip=0"]);
    let error = stderr(&output);
    assert!(error.contains("No checkpoint was written") && !error.contains("--resume"), "{error}");
}

#[test]
fn damaged_and_foreign_checkpoints_are_named_and_older_ones_used() {
    let place = Place::new();
    succeeds(place.train("run", &[]));
    let weights = place.path("run/checkpoints/step-24/model.safetensors");
    let good = fs::read(&weights).unwrap();

    let flip = |path: &std::path::Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() * 2 / 3;
        bytes[middle] ^= 4;
        fs::write(path, bytes).unwrap();
    };
    for file in ["optimizer.safetensors", "state.json"] {
        let other = Place::new();
        succeeds(other.train("run", &["--steps", "12"]));
        flip(&other.path("run/checkpoints/step-12").join(file));
        let resume = ["train", "--data", "text.txt", "--resume", "--out", "run", "--steps", "13"];
        let error = stderr(&succeeds(other.run(&resume)));
        assert!(error.contains(file) && error.contains("resuming after step 6"), "{error}");
    }
    flip(&weights);
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
    assert!(error.contains("model.ffn: wanted 128, found 64"), "{error}");
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
    assert!(error.contains("The last good checkpoint is of step 6"), "{error}");
    assert!(!error.contains("a bug in moebius"), "{error}");
    assert_eq!(checkpoint(&place.path("run"), 6), before);
    succeeds(place.run(&["train", "--data", "text.txt", "--resume", "--out", "run", "--steps", "12"]));
}
