//! The configuration is read strictly, explained well and counted as the paper counts.

use std::collections::BTreeSet;

use super::{edit::KEYS, *};
use crate::gpt::Parameter;

fn preset(name: &str) -> Config {
    let config = Config::preset(name).unwrap();
    config.validate().unwrap();
    assert_eq!(config.model.name, name);
    config
}

fn violations(config: &Config) -> Vec<Violation> {
    match config.validate() {
        Err(ConfigError::Invalid { violations }) => violations,
        Err(other) => panic!("{other}"),
        Ok(()) => Vec::new(),
    }
}

#[test]
fn parameters_are_those_of_the_paper() {
    // Name, total and active in billions, with the digits the specification (3.1) prints.
    for (name, total, active) in [
        ("350m", "0.356", Some("0.356")),
        ("1.3b", "1.316", Some("1.316")),
        ("6.7b", "6.66", Some("6.66")),
        ("125m-moe-64", "1.91", None),
        ("350m-moe-128", "13.15", Some("0.357")),
        ("1.3b-moe-128", "52.47", Some("1.319")),
        ("350m-pr-moe-32-64", "4.12", Some("0.457")),
        ("1.3b-pr-moe-64-128", "31.39", Some("1.72")),
        ("350m-pr-moe-l21", "3.54", Some("0.402")),
        ("1.3b-pr-moe-l21", "26.94", Some("1.50")),
        ("fair-15b", "15", None),
        ("fair-52b", "52", None),
        ("fair-207b", "207", None),
    ] {
        let count = preset(name).parameters();
        let print = |n: u64, like: &str| {
            let digits = like.split_once('.').map_or(0, |(_, d)| d.len());
            format!("{:.digits$}", n as f64 / 1e9)
        };
        assert_eq!(print(count.total, total), total, "{name} {}", count.total);
        if let Some(active) = active {
            assert_eq!(print(count.active, active), active, "{name} active {}", count.active);
        }
    }
}

/// An oracle that lists every parameter tensor's shape and counts elements.
fn shapes(config: &Config) -> Vec<(String, u64, bool)> {
    let m = &config.model;
    let (h, f, k) = (m.width as u64, m.ffn() as u64, (m.kv_heads() * m.head_width()) as u64);
    let mut all =
        vec![("embedding".to_string(), m.vocab as u64 * h, true), ("positions".into(), m.sequence as u64 * h, true)];
    let bias = if m.norm == Norm::Layer { 2 } else { 1 };
    for (i, experts) in m.experts_per_layer().into_iter().enumerate() {
        let mut push = |name: &str, n: u64, active: bool| all.push((format!("{i}.{name}"), n, active));
        for norm in ["norm1", "norm2"] {
            push(norm, bias * h, true);
        }
        for (name, rows, columns) in [("q", h, h), ("k", k, h), ("v", k, h), ("o", h, h)] {
            push(name, rows * columns, true);
            push("bias", rows, true);
        }
        let mut network = |active: bool| {
            push("up", f * h, active);
            push("up.bias", f, active);
            push("down", h * f, active);
            push("down.bias", h, active);
        };
        if experts == 0 || m.mlp == Mlp::Residual {
            network(true);
        }
        for e in 0..experts {
            network(e < m.top_k());
        }
        if experts > 0 {
            push("router", experts as u64 * h, true);
            if m.mlp == Mlp::Residual {
                push("coefficient", 2 * h, true);
                push("coefficient.bias", 2, true);
            }
        }
    }
    all.push(("final".into(), bias * h, true));
    if !m.tied_embeddings {
        all.push(("output".into(), m.vocab as u64 * h, true));
    }
    all
}

#[test]
fn parameters_equal_a_list_of_tensors() {
    let mut config = preset("bench-cpu");
    for change in [
        "model.heads=8",
        "model.kv_heads=2",
        "model.norm=rms",
        "model.tied_embeddings=false",
        "model.ffn=300",
        "model.experts=[1,5,16]",
        "model.top_k=3",
        "model.mlp=standard",
        "model.expert_interval=3",
        "model.experts=[4]",
    ] {
        let before = config.parameters();
        let sum = |only_active: bool| -> u64 {
            shapes(&config).iter().filter(|(_, _, active)| *active || !only_active).map(|(_, n, _)| n).sum()
        };
        assert_eq!((before.total, before.active), (sum(false), sum(true)), "before {change}");
        let layers: u64 = before.per_layer.iter().map(|l| l.total).sum();
        let rest = before.token_embedding + before.position_embedding + before.final_norm + before.output;
        assert_eq!(layers + rest, before.total);
        config.set(change).unwrap();
        assert_eq!(config.count(), u128::from(config.parameters().total));
    }
    config.validate().unwrap();
}

#[test]
fn operations_and_bytes() {
    // A model small enough to count by hand: H = 4, F = 16, V = 8, T = 3, 2 layers, the second with 3 experts, residual.
    let text = "[model]\nname='t'\nvocab=8\nlayers=2\nwidth=4\nheads=2\nsequence=3\nexperts=[3]\nmlp='residual'\ndtype='bf16'\n\
                [train]\nbatch=2\nsteps=5\nlearning_rate=1e-3\n";
    let config = Config::from_toml(text, "test").unwrap();
    config.validate().unwrap();
    let flops = config.flops_per_token();
    let attention_matrices = 4 * 16;
    let network = 2 * 4 * 16;
    let dense = attention_matrices + network;
    let sparse = attention_matrices + 3 * 4 + network + network + 8;
    assert_eq!(flops.matmul, 6 * (dense + sparse + 8 * 4));
    // Tokens 1, 2 and 3 see as many: 6 pairs, 2 products of 2 * H operations each, three times for training.
    assert_eq!(flops.attention, 2 * 3 * (6 * 2 * 2 * 4) / 3);
    assert_eq!(flops.total, flops.matmul + flops.attention);
    let n = config.parameters().total;
    let bytes = config.training_bytes();
    assert_eq!((bytes.weights, bytes.compute_weights, bytes.optimizer, bytes.gradients), (4 * n, 2 * n, 8 * n, 4 * n));
    let mut narrow = config.clone();
    narrow.set("train.moments=bf16").unwrap();
    assert_eq!(narrow.training_bytes().optimizer, 4 * n);
    // All tensors are small.
    narrow.set("train.moments=8bit").unwrap();
    assert_eq!(narrow.training_bytes().optimizer, 8 * n);
    let mut large = preset("tiny-pr-moe");
    large.set("train.moments=8bit").unwrap();
    let bytes = |n: u64| if n < 4096 { 8 * n } else { 2 * n.div_ceil(4) * 4 + n.div_ceil(256) * 8 };
    let wanted: u64 = Parameter::list(&large.model).iter().map(|p| bytes(p.shape.elements() as u64)).sum();
    assert_eq!(large.training_bytes().optimizer, wanted);
    assert!(wanted < large.parameters().total * 9 / 4, "{wanted}");
    let refused = narrow.set("train.moments=f16").unwrap_err().to_string();
    assert!(Moments::ALL.iter().all(|m| refused.contains(&format!("`{m}`"))), "{refused}");
    assert_eq!((config.tokens_per_step(), config.total_steps()), (6, 5));
    // Only what computes products again costs operations.
    for (text, recompute, recomputed) in
        [("false", Recompute::Nothing, false), ("true", Recompute::Blocks, true), ("light", Recompute::Light, false)]
    {
        let mut again = preset("tiny-pr-moe");
        again.set(&format!("train.recompute={text}")).unwrap();
        assert_eq!((again.train.recompute, text.parse()), (recompute, Ok(recompute)));
        assert_eq!(again.flops_per_token().recomputed > 0, recomputed);
        assert_eq!(Config::from_toml(&again.to_toml().unwrap(), "test").unwrap(), again);
    }
    for wrong in ["train.recompute=lite", "train.recompute=1"] {
        let refused = narrow.set(wrong).unwrap_err().to_string();
        assert!(refused.contains("expected true, false or \"light\""), "{refused}");
    }
    // Experts cost parameters, not operations, apart from the router.
    let mut more = config.clone();
    more.set("model.experts=[30]").unwrap();
    assert_eq!(more.flops_per_token().matmul, flops.matmul + 6 * 27 * 4);
}

#[test]
fn experts_per_layer_is_megatrons() {
    let mut config = preset("bench-cpu");
    // From Megatron-DeepSpeed's own function, with its 1 for a dense layer.
    let cases: [(&[usize], usize, usize, &[usize]); 8] = [
        (&[128], 6, 2, &[1, 128, 1, 128, 1, 128]),
        (&[64, 64, 128], 7, 2, &[1, 64, 1, 64, 1, 128, 1]),
        (&[8], 6, 1, &[8, 8, 8, 8, 8, 8]),
        (&[4, 8], 6, 3, &[1, 1, 4, 1, 1, 8]),
        (&[1], 4, 2, &[1, 1, 1, 1]),
        (&[16], 7, 3, &[1, 1, 16, 1, 1, 16, 1]),
        (&[1, 8], 4, 2, &[1, 1, 1, 8]),
        (&[9], 2, 3, &[1, 1]),
    ];
    for (experts, layers, interval, wanted) in cases {
        config.model.experts = experts.to_vec();
        config.model.layers = layers;
        config.model.expert_interval = interval;
        config.validate().unwrap();
        let found: Vec<usize> = config.model.experts_per_layer().into_iter().map(|e| e.max(1)).collect();
        assert_eq!(found, wanted, "{experts:?} {layers} {interval}");
    }
    let wide = preset("1.3b-pr-moe-l21").model.experts_per_layer();
    assert_eq!(wide, [0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 128, 0, 128, 0]);
}

#[test]
fn the_learning_rate_is_megatrons() {
    let rate =
        |peak, floor, decay| LearningRate { peak, floor, warmup: 375_000_000, decay, schedule: Schedule::Cosine };
    let long = rate(0.00012, 1e-6, 300_000_000_000);
    let short = rate(0.0002, 2e-5, 260_000_000_000);
    // Samples of the real scheduler: tokens in millions, learning rate.
    let samples = [
        (long, 0, 0.0),
        (long, 100, 3.2e-05),
        (long, 375, 0.00012),
        (long, 1_000, 0.00011999872241706597),
        (long, 10_000, 0.00011969726441536504),
        (long, 100_000, 9.038496780380061e-05),
        (long, 260_000, 6.156740123667774e-06),
        (long, 300_000, 1e-06),
        (long, 330_000, 1e-06),
        (short, 100, 5.333333333333333e-05),
        (short, 1_000, 0.00019999742618572787),
        (short, 100_000, 0.00014214930160956601),
        (short, 200_000, 4.269656511146267e-05),
        (short, 260_000, 2e-05),
        (short, 300_000, 2e-05),
    ];
    for (rate, millions, wanted) in samples {
        let found = rate.at(millions * 1_000_000);
        assert!((found - wanted).abs() <= 1e-15, "{millions}M: {found} for {wanted}");
    }
    assert_eq!(preset("1.3b-moe-128").learning_rate(), long);
    assert_eq!(preset("1.3b").learning_rate(), short);

    let mut config = preset("bench-cpu");
    assert_eq!(config.learning_rate_of_step(5), 1.5e-4);
    assert_eq!(config.learning_rate_of_step(10), 3e-4);
    assert!((config.learning_rate_of_step(55) - 1.5e-4).abs() < 1e-18);
    assert_eq!(config.learning_rate_of_step(100), 0.0);
    config.set("train.schedule=constant").unwrap();
    assert_eq!(config.learning_rate_of_step(1000), 3e-4);
    config.set("train.warmup_steps=0").unwrap();
    assert_eq!(config.learning_rate_of_step(0), 3e-4);
    config.set("train.tokens=4097").unwrap();
    assert_eq!((config.train.steps, config.total_steps()), (None, 3));
}

#[test]
fn presets_have_the_tables_hyper_parameters() {
    assert_eq!(Config::presets().collect::<BTreeSet<_>>().len(), 15);
    for (name, batch, rate, floor, decay, std) in [
        ("350m", 256, 3.0e-4, 3.0e-5, 260, 0.014),
        ("6.7b", 1024, 1.2e-4, 1.2e-5, 260, 0.01),
        ("125m-moe-64", 256, 4.5e-4, 4.5e-6, 300, 0.014),
        ("350m-pr-moe-32-64", 256, 3.0e-4, 1.0e-6, 300, 0.014),
        ("1.3b-pr-moe-l21", 512, 1.2e-4, 1.0e-6, 300, 0.014),
    ] {
        let Config { model, train } = preset(name);
        assert_eq!((train.batch, train.learning_rate, train.min_learning_rate), (batch, rate, floor), "{name}");
        assert_eq!(train.decay_tokens, Some(decay * 1_000_000_000), "{name}");
        assert_eq!((model.init_std, model.sequence, model.ffn()), (std, 2048, 4 * model.width), "{name}");
    }
    for name in Config::presets() {
        let config = preset(name);
        let dense = config.model.experts_per_layer().iter().all(|&e| e == 0);
        assert_eq!(dense, ["350m", "1.3b", "6.7b"].contains(&name), "{name}");
        let residual = name.contains("pr-moe") || name == "bench-cpu";
        assert_eq!(config.model.mlp == Mlp::Residual, residual, "{name}");
    }
    let fair = preset("fair-52b").model;
    assert_eq!((fair.family(), fair.routing().normalise), (Family::Top2, Normalise::AfterDropping));
    let tiny = preset("tiny-pr-moe").model;
    assert_eq!(
        (tiny.family(), tiny.routing().normalise, tiny.capacity_factor(true)),
        (Family::Top1, Normalise::None, None)
    );
    assert_eq!(preset("bench-cpu").model.experts_per_layer(), [0, 8, 0, 8, 0, 16]);
}

#[test]
fn text_and_hash_go_round() {
    let mut hashes = BTreeSet::new();
    for name in Config::presets() {
        let config = preset(name);
        let again = Config::from_toml(&config.to_toml().unwrap(), "again").unwrap();
        assert_eq!(again, config);
        assert_eq!(again.hash(), config.hash());
        assert!(hashes.insert(config.hash()));
    }
    let config = preset("bench-cpu");
    let mut other = config.clone();
    other.train.seed += 1;
    assert_ne!(other.hash(), config.hash());
    assert_eq!(other.model_hash(), config.model_hash());
    other.train.seed = u64::MAX;
    assert!(matches!(violations(&other)[..], [Violation::OutOfRange { key: "train.seed", .. }]));
    // Every value counts: a default made explicit is the same configuration only when it is the same value.
    other = config.clone();
    other.set("model.top_k=1").unwrap();
    assert_eq!(other, config);
}

fn every_field() -> RouterTable {
    RouterTable {
        preset: Some(Family::Mixtral),
        score: Some(Score::Sigmoid),
        normalise: Some(Normalise::None),
        scale: Some(1.0),
        apply_to: Some(ApplyTo::Input),
        bias: Some(true),
        selection_bias: Some(true),
        bias_rate: Some(0.1),
        groups: Some(2),
        group_keep: Some(1),
        group_score: Some(GroupScore::Top2Sum),
        jitter: Some(0.1),
        noise: Some(Noise::Sample),
        mixer_eps: Some(0.1),
        order: Some(Order::Batch),
        capacity: Some(CapacityRule::Tutel),
        balance: Some(BalanceOf::First),
        side: Some(Side::Sigmoid),
        shared_ffn: Some(8),
        hash_layers: Some(1),
        expert_choice: Some(true),
        allow_expert_choice_decoding: Some(true),
    }
}

#[test]
fn the_list_of_keys_is_that_of_the_structs() {
    let mut config = preset("bench-cpu");
    let optional = KEYS.iter().filter(|(_, optional)| *optional).map(|(key, _)| *key).collect::<Vec<_>>();
    let given = |config: &Config| -> BTreeSet<String> {
        let table: toml::Table = config.to_toml().unwrap().parse().unwrap();
        let keys = |(section, value): (&String, &toml::Value)| {
            let mut keys = Vec::new();
            for (key, value) in value.as_table().unwrap() {
                keys.push(format!("{section}.{key}"));
                keys.extend(value.as_table().into_iter().flatten().map(|(k, _)| format!("{section}.{key}.{k}")));
            }
            keys
        };
        table.iter().flat_map(keys).collect()
    };
    config.model = ModelConfig {
        kv_heads: Some(2),
        ffn: Some(8),
        top_k: Some(1),
        router: Some(every_field()),
        capacity_factor: Some(1.0),
        eval_capacity_factor: Some(1.0),
        renormalise: Some(Renormalise::Never),
        ..config.model
    };
    let lengths = Some(1);
    config.train = TrainConfig {
        steps: lengths,
        tokens: lengths,
        warmup_steps: lengths,
        warmup_tokens: lengths,
        decay_steps: lengths,
        decay_tokens: lengths,
        alarm: Some("drop=0.3".into()),
        alarm_exit: Some(true),
        ..config.train
    };
    assert_eq!(given(&config), KEYS.iter().map(|(key, _)| key.to_string()).collect());
    for key in &optional {
        config.set(&format!("{key}=none")).unwrap();
    }
    let required = KEYS.iter().filter(|(_, optional)| !optional).map(|(key, _)| key.to_string()).collect();
    assert_eq!(given(&config), required);
    assert!(violations(&config).contains(&Violation::NoLength));
}

#[test]
fn changes_by_key() {
    let mut config = preset("bench-cpu");
    for change in [
        "train.steps=7",
        "model.experts = [4, 8, 8]",
        "model.router=topk",
        "model.top_k=2",
        "model.name=350",
        "train.learning_rate=1",
        "model.capacity_factor=1.25",
        "model.dtype=bf16",
        "model.tied_embeddings=false",
        "train.betas=[0.8, 0.9]",
        "train.warmup_tokens=2048",
        "model.renormalise=never",
    ] {
        config.set(change).unwrap_or_else(|e| panic!("{change}: {e}"));
    }
    config.validate().unwrap();
    assert_eq!((config.train.steps, config.model.experts.as_slice()), (Some(7), [4, 8, 8].as_slice()));
    assert_eq!(
        (config.model.router.clone(), config.model.name.as_str()),
        (Some(RouterTable { preset: Some(Family::TopK), ..RouterTable::default() }), "350")
    );
    assert_eq!((config.train.learning_rate, config.train.betas), (1.0, [0.8, 0.9]));
    assert_eq!((config.train.warmup_steps, config.train.warmup_tokens), (None, Some(2048)));
    assert_eq!(config.model.capacity_factor(false), Some(1.25));

    let before = config.clone();
    for (change, parts) in [
        ("train.step=7", vec!["`train.step`", "train.steps"]),
        ("steps=7", vec!["`steps`", "train.steps"]),
        ("model.expert=[4]", vec!["`model.expert`", "model.experts"]),
        ("model.lr=1", vec!["unknown key `model.lr`"]),
        ("learning-rate=1", vec!["train.learning_rate"]),
        ("train.steps", vec!["key=value", "`train.steps`"]),
        ("train.steps=many", vec!["train.steps", "`many`", "u64"]),
        ("train.steps=-1", vec!["train.steps", "`-1`"]),
        ("train.steps=1\nfoo=2", vec!["train.steps"]),
        ("model.router=top9", vec!["model.router", "top9", "top1"]),
        ("model.vocab=none", vec!["model.vocab", "none"]),
        ("=", vec!["unknown key ``"]),
    ] {
        let error = config.set(change).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{change}: {part} not in {error}");
        }
    }
    assert_eq!(config, before);
}

#[test]
fn all_violations_are_told_at_once() {
    let mut config = preset("bench-cpu");
    config.model.heads = 6;
    config.model.kv_heads = Some(4);
    config.model.experts = vec![8, 8];
    config.model.vocab = 0;
    config.model.init_std = f64::NAN;
    config.set("model.router=top2").unwrap();
    config.train.batch = 0;
    config.train.tokens = Some(5);
    config.train.min_learning_rate = 1.0;
    config.train.betas = [0.9, 1.0];
    let found = violations(&config);
    assert_eq!(found.len(), 10, "{found:#?}");
    let text = config.validate().unwrap_err().to_string();
    for part in [
        "model.width: wanted a multiple of model.heads = 6, found 256",
        "model.heads: wanted a multiple of model.kv_heads = 4, found 6",
        "model.experts: wanted 1 entry or 3 (model.layers = 6 / model.expert_interval = 2), found 2",
        "model.vocab: wanted 1 to 16777216, found 0",
        "model.init_std",
        "router top2 wants 2, found 1",
        "train.batch: wanted 1 to",
        "train.steps and train.tokens: wanted one of the two, found both",
        "train.min_learning_rate: wanted at most train.learning_rate = 0.0003, found 1",
        "train.betas",
    ] {
        assert!(text.contains(part), "{part} not in {text}");
    }

    let one = |changes: &[&str]| {
        let mut config = preset("bench-cpu");
        for change in changes {
            config.set(change).unwrap();
        }
        violations(&config)
    };
    assert_eq!(one(&["model.top_k=9"]), [Violation::TopK { layer: 2, experts: 8, top_k: 9 }]);
    assert!(matches!(
        one(&["train.decay_steps=5"])[..],
        [Violation::DecayBeforeWarmup { warmup: 20480, decay: 10240 }]
    ));
    assert_eq!(one(&["train.steps=5"]), []);
    assert_eq!(one(&["train.steps=none"]), [Violation::NoLength]);
    assert!(matches!(one(&["model.layers=4000000000000"])[..], [Violation::OutOfRange { .. }, ..]));
    assert!(matches!(
        one(&["model.experts=[65536]", "model.layers=4096", "model.width=1048576"])[..],
        [Violation::TooLarge { .. }]
    ));
    for key in ["layers", "width", "heads", "kv_heads", "ffn", "sequence", "top_k", "expert_interval", "min_capacity"] {
        let text = format!("{:?}", one(&[&format!("model.{key}=0")]));
        assert!(text.contains(&format!("model.{key}")), "{key}: {text}");
    }
}

#[test]
fn files_are_read_strictly() {
    let good = preset("tiny-pr-moe").to_toml().unwrap();
    let fail = |text: &str| Config::from_toml(text, "run.toml").unwrap_err().to_string();
    let unknown = fail(&good.replace("layers =", "layer =").replace("batch =", "batches ="));
    for part in ["run.toml", "`model.layer` (nearest: model.layers", "`train.batches` (nearest: train.batch"] {
        assert!(unknown.contains(part), "{part} not in {unknown}");
    }
    assert!(fail(&format!("{good}\n[trian]\n")).contains("`trian` (nearest: train)"));
    assert!(fail(&format!("steps = 3\n{good}")).contains("`steps` (nearest: train.steps"));
    let kind = fail(&good.replace("layers = 4", "layers = \"four\""));
    assert!(kind.contains("line 4") && kind.contains("four"), "{kind}");
    assert!(fail(&good.replace("layers = 4\n", "")).contains("missing field `layers`"));
    assert!(fail("model = 3").contains("run.toml"));
    assert!(fail("[model").contains("line 1"));
    assert!(fail("").contains("missing field `model`"));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let missing = Config::from_file(&path).unwrap_err();
    assert!(missing.to_string().contains("config.toml"), "{missing}");
    std::fs::write(&path, &good).unwrap();
    assert_eq!(Config::from_file(&path).unwrap(), preset("tiny-pr-moe"));

    let preset = Config::preset("350m-pr-moe").unwrap_err();
    let ConfigError::UnknownPreset { nearest, known, .. } = &preset else { panic!("{preset}") };
    assert!(nearest.iter().any(|n| n == "350m-pr-moe-l21"), "{preset}");
    assert_eq!(known.len(), 15);
    let typo = Config::preset("tiny-prmoe").unwrap_err().to_string();
    assert!(typo.contains("(nearest: tiny-pr-moe"), "{typo}");
    assert!(Config::preset("zzz").unwrap_err().to_string().contains("there are tiny-pr-moe"));
}

#[test]
fn a_very_long_key_is_refused_without_being_compared() {
    let key = "x".repeat(60 << 10);
    let refused = Config::from_toml(&format!("{key} = 1"), "long").unwrap_err();
    let ConfigError::UnknownKeys { keys, .. } = refused else { panic!("{refused}") };
    assert!(keys[0].nearest.is_empty());
}

#[test]
fn a_text_longer_than_a_configuration_is_refused() {
    let text = format!("# {}", "x".repeat(64 << 10));
    let refused = Config::from_toml(&text, "long").unwrap_err().to_string();
    assert_eq!(refused, "long: wanted a configuration of at most 65536 bytes, found 65538");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &text).unwrap();
    assert!(matches!(Config::from_file(file.path()), Err(ConfigError::TooLong { found: 65538, .. })));
}

#[test]
fn a_text_of_more_parts_than_a_configuration_has_is_refused() {
    let list = |entries: usize| format!("[model]\nexperts = [{}]\n", "8,".repeat(entries));
    let refused = Config::from_toml(&list(600), "dense").unwrap_err().to_string();
    assert!(refused.starts_with("dense: wanted at most 1024 parts"), "{refused}");
    // A bracket counts as 12: two of them, three more tokens of the first line, four before the list, two for each entry,
    // three after.
    assert!(refused.ends_with("found 1234"), "{refused}");
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    let before = config.clone();
    let set = config.set(&format!("model.experts=[{}]", "8,".repeat(600)));
    assert!(matches!(set, Err(ConfigError::TooManyParts { most: 1024, .. })));
    assert_eq!(config, before);
}

#[test]
fn the_longest_list_of_experts_is_read_as_it_is_written() {
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    (config.model.layers, config.model.expert_interval) = (128, 1);
    // Every key that can be absent is there, but for the other form of a length.
    for set in [
        "model.router=deepseek-v3",
        "model.kv_heads=4",
        "model.ffn=64",
        "model.top_k=2",
        "model.capacity_factor=1.25",
        "model.eval_capacity_factor=1.5",
        "train.warmup_steps=10",
        "train.decay_steps=100",
        "train.alarm=drop=0.3",
        "train.alarm_exit=true",
        "model.router.shared_ffn=64",
    ] {
        config.set(set).unwrap();
    }
    config.model.experts = vec![65536; 128];
    let text = config.to_toml().unwrap();
    assert_eq!(Config::from_toml(&text, "written").unwrap(), config);
    config.model.layers = 129;
    config.model.experts = vec![64; 129];
    let refused = config.validate().unwrap_err().to_string();
    assert!(refused.contains("model.experts: wanted at most 128 entries, found 129"), "{refused}");
}
