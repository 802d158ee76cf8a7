//! What the tests of the program share: a place to run it in, and ways to look at what it left there.
// Each suite uses a part.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moebius::ir::philox;
use tempfile::TempDir;

/// A model that trains in a second.
pub const SMALL: &str = r#"
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

/// Runs the program again and again with the arguments that `args` gives for a fresh or a begun run, kills the first attempts at random
/// moments, then lets it end. At least one must have been killed; `stream` makes the moments of one use those of no other. Gives the
/// seed of the moments.
pub fn kill_until_it_ends(
    place: &Place,
    out: &str,
    attempts: u64,
    stream: u32,
    args: impl Fn(bool) -> Vec<String>,
) -> u32 {
    kill_until_it_ends_with(place, out, (attempts, 400.0), stream, |begun| {
        let args = args(begun);
        place.command(&args.iter().map(String::as_str).collect::<Vec<_>>())
    })
}

/// [`kill_until_it_ends`] with a whole command instead of its arguments, and moments of up to so many milliseconds.
pub fn kill_until_it_ends_with(
    place: &Place,
    out: &str,
    (attempts, longest): (u64, f32),
    stream: u32,
    command: impl Fn(bool) -> Command,
) -> u32 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    let mut kills = 0;
    for attempt in 0..200u64 {
        let mut command = command(place.path(out).join("config.toml").exists());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        if attempt < attempts {
            // The first moment is early: a quick machine would end the run before a later one.
            let longest = if attempt == 0 { longest / 8.0 } else { longest };
            let wait = philox::uniform([seed, stream], 0, attempt) * longest;
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
    seed
}

/// A folder with a configuration, a text and what the program writes there.
pub struct Place {
    pub folder: TempDir,
    threads: Option<&'static str>,
}

impl Place {
    pub fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("small.toml"), SMALL).unwrap();
        let text: String =
            (0..400).map(|i| format!("line {i}: the quick brown fox jumps over the lazy dog\n")).collect();
        fs::write(folder.path().join("text.txt"), text).unwrap();
        Place { folder, threads: None }
    }

    /// A place whose programs run on one thread. Several at a time that each take all cores wait for each other most of the time.
    pub fn on_one_thread() -> Place {
        Place { threads: Some("1"), ..Place::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("XDG_CACHE_HOME", self.path("cache"));
        command.envs(self.threads.map(|number| ("MOEBIUS_THREADS", number)));
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `train` on the small model into `out` with further arguments.
    pub fn train(&self, out: &str, more: &[&str]) -> Output {
        let mut args = vec!["train", "--config", "small.toml", "--data", "text.txt", "--out", out];
        args.extend(more);
        self.run(&args)
    }

    /// Runs a command that must end with this exit code, and returns what it said on standard error.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(!error.contains("panicked") && !error.contains("a bug in moebius"), "{args:?}: {error}");
        error
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn succeeds(output: Output) -> Output {
    assert!(output.status.success(), "{}\n{}", stdout(&output), stderr(&output));
    output
}

/// The bytes of weights and optimizer after a step.
pub fn checkpoint(out: &Path, step: u64) -> (Vec<u8>, Vec<u8>) {
    let folder = out.join(format!("checkpoints/step-{step}"));
    let read = |name: &str| fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{}/{name}: {e}", folder.display()));
    (read("model.safetensors"), read("optimizer.safetensors"))
}

pub fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(output)))
}

/// The metrics without what depends on the clock.
pub fn metrics(out: &Path) -> Vec<serde_json::Value> {
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
