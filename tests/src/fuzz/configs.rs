//! Configurations: TOML text, then a line `---`, then one assignment a line as on the command line.

use moebius_models::config::Config;

use super::{Target, Then};

pub(super) fn target() -> Target {
    let assignments = [
        "train.steps=10",
        "train.tokens=5000",
        "model.experts=[4,8]",
        "model.top_k=2",
        "model.router=top2",
        "model.name=7",
        "model.capacity_factor=none",
        "train.betas=[0.9,0.99]",
        "model.width=64",
        "train.decay_steps=5",
        "model.dtype=bf16",
    ];
    let presets: Vec<Vec<u8>> = Config::presets()
        .filter_map(|name| Config::preset(name).ok()?.to_toml().ok())
        // All assignments together make no valid configuration; the preset alone, and with some of them, does.
        .flat_map(|toml| {
            let one = assignments.iter().map(|a| format!("{toml}---\n{a}\n")).collect::<Vec<_>>();
            let all = format!("{toml}---\n{}\n", assignments.join("\n"));
            [toml, all].into_iter().chain(one).map(String::into_bytes)
        })
        .collect();
    // Texts of the shortest names and values, of which a parser makes the most, about as long as they may be.
    let dense = |count: usize, from: &str, part: &str, to: &str| {
        let parts = (0..count).map(|i| part.replace('#', &i.to_string())).collect::<String>();
        format!("{from}{parts}{to}").into_bytes()
    };
    let dense = [
        dense(250, "", "a#=1\n", ""),
        dense(58, "", "a#.a=1\n", ""),
        dense(67, "", "[a#]\n", ""),
        dense(52, "", "[a#]\na=1\n", ""),
        dense(36, "", "[[a]]\na=1\n", ""),
        dense(52, "", "a#={a=1}\n", ""),
        dense(500, "a=[", "1,", "]"),
        dense(71, "a=[", "[],", "]"),
        dense(61, "a=[", "{a=1},", "]"),
        dense(40, "a=[", "{a={a=1}},", "]"),
        dense(40, "a=[", "{a.a=1},", "]"),
        dense(45, "", "a=[{", ""),
        dense(90, "a=", "[", ""),
        dense(80, "", "a.", "a=1"),
        dense(1010, "", "\n", ""),
    ];
    let words = [
        "[model]\n",
        "[train]\n",
        "---\n",
        "=",
        "none",
        "\"",
        "[",
        "]",
        "{",
        "}",
        "[[",
        "]]",
        "\n",
        ".",
        "'",
        "\"\"\"",
        "true",
        "inf",
        "nan",
        "1979-05-27",
        "0x",
        "model.",
        "train.",
        "top1",
        "residual",
        "#",
        "\\u",
        "é",
    ];
    let keys = presets
        .iter()
        .flat_map(|p| String::from_utf8_lossy(p).into_owned().lines().map(str::to_owned).collect::<Vec<_>>());
    let mut keys: Vec<String> = keys.filter_map(|l| l.split_once('=').map(|(k, _)| k.trim().to_owned())).collect();
    keys.sort();
    keys.dedup();
    Target {
        name: "config",
        seeds: presets.into_iter().chain(dense).collect(),
        words: words.iter().map(ToString::to_string).chain(keys).collect(),
        repair: Box::new(|input, _| input),
        parse: Box::new(|input| {
            let text = String::from_utf8_lossy(input);
            let (toml, assignments) = text.split_once("---\n").unwrap_or((&text, ""));
            let mut config = Config::from_toml(toml, "fuzz").map_err(|e| e.to_string()).ok()?;
            for line in assignments.lines() {
                drop(config.set(line).map_err(|e| e.to_string()));
            }
            let valid = config.validate().map_err(|e| e.to_string()).is_ok();
            valid.then(|| Box::new(move || holds(&config)) as Then)
        }),
    }
}

/// A valid configuration can be counted, scheduled, hashed, and written so that it reads back as it was.
fn holds(config: &Config) -> Result<(), String> {
    drop((config.parameters(), config.flops_per_token(), config.training_bytes(), config.hash(), config.model_hash()));
    let rate = config.learning_rate();
    for step in [0, 1, config.total_steps(), u64::MAX] {
        let at = rate.at(step);
        if !at.is_finite() {
            return Err(format!("a learning rate of {at} at step {step}"));
        }
    }
    let text = config.to_toml().map_err(|e| format!("a valid configuration is not written: {e}"))?;
    let back = Config::from_toml(&text, "written").map_err(|e| format!("what was written is not read: {e}"))?;
    if back == *config { Ok(()) } else { Err("another configuration is read back".into()) }
}
