//! The presets, built into the program.

/// Name and TOML text of each, the small ones first.
pub(super) const PRESETS: [(&str, &str); 15] = [
    ("tiny-pr-moe", include_str!("../presets/tiny-pr-moe.toml")),
    ("bench-cpu", include_str!("../presets/bench-cpu.toml")),
    ("350m", include_str!("../presets/350m.toml")),
    ("1.3b", include_str!("../presets/1.3b.toml")),
    ("6.7b", include_str!("../presets/6.7b.toml")),
    ("125m-moe-64", include_str!("../presets/125m-moe-64.toml")),
    ("350m-moe-128", include_str!("../presets/350m-moe-128.toml")),
    ("1.3b-moe-128", include_str!("../presets/1.3b-moe-128.toml")),
    ("350m-pr-moe-32-64", include_str!("../presets/350m-pr-moe-32-64.toml")),
    ("1.3b-pr-moe-64-128", include_str!("../presets/1.3b-pr-moe-64-128.toml")),
    ("350m-pr-moe-l21", include_str!("../presets/350m-pr-moe-l21.toml")),
    ("1.3b-pr-moe-l21", include_str!("../presets/1.3b-pr-moe-l21.toml")),
    ("fair-15b", include_str!("../presets/fair-15b.toml")),
    ("fair-52b", include_str!("../presets/fair-52b.toml")),
    ("fair-207b", include_str!("../presets/fair-207b.toml")),
];
