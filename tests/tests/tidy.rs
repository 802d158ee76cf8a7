//! The rules of the house that can be held by reading the source.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moebius_ir::Op;
use moebius_tests::source::{code_lines, files, read};

const CRATES: [&str; 6] = ["ir", "backends", "engine", "models", "tests", "benches"];

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

/// Every Rust file of the workspace.
fn sources() -> Vec<PathBuf> {
    CRATES.iter().flat_map(|c| files(c, "rs")).collect()
}

fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

/// Lines of code (no comments, no text) of these files that contain a word for which `bad` holds.
fn lines_with(paths: impl IntoIterator<Item = PathBuf>, bad: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for path in paths {
        for (number, line) in code_lines(&read(&path)) {
            if bad(&line) {
                found.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    found
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

#[test]
fn an_op_is_a_file_of_its_name() {
    let mut ops: BTreeSet<String> = BTreeSet::new();
    for path in files("ir/src/ops", "rs") {
        let text = read(&path);
        let rules = text.matches("\nimpl Rule for ").count();
        if rules == 0 {
            assert!(["mod", "check"].contains(&stem(&path).as_str()), "{} has no op", path.display());
            continue;
        }
        assert_eq!(rules, 1, "{}: one file, one op", path.display());
        let name = stem(&path);
        assert!(text.contains(&format!("const NAME: &'static str = \"{name}\";")), "{}: another name", path.display());
        assert!(text.starts_with(&format!("//! `{name}`: ")), "{}: the doc starts with the name", path.display());
        let order = ["pub struct ", "\nimpl Rule for ", "fn infer(", "fn vjp(", "fn reference(", "\nimpl Graph {"];
        let places: Vec<Option<usize>> = order.iter().map(|part| text.rfind(part)).collect();
        assert!(
            places.iter().all(Option::is_some) && places.is_sorted(),
            "{}: {order:?} in this order",
            path.display()
        );
        assert!(text.contains("#[track_caller]") || name == "elementwise", "{}: the caller's line", path.display());
        ops.insert(name);
    }
    assert_eq!(ops, Op::NAMES.iter().map(|n| (*n).to_owned()).collect());
    assert_eq!(ops.len(), Op::NAMES.len(), "a name twice");
}

#[test]
fn unsafe_code_lies_in_backends() {
    let others = sources().into_iter().filter(|p| !p.starts_with("backends"));
    none("unsafe", lines_with(others, |l| has_word(l, "unsafe")));
    // Nor does any other crate take back the lint.
    assert!(read("Cargo.toml").contains("unsafe_code = \"deny\""));
    for name in CRATES.iter().filter(|name| **name != "backends") {
        assert!(
            read(format!("{name}/Cargo.toml")).contains("[lints]\nworkspace = true"),
            "{name} has lints of its own"
        );
    }
    // There, clippy wants a reason for each use.
    let manifest = read("backends/Cargo.toml");
    assert!(
        manifest.contains("undocumented_unsafe_blocks = \"warn\"")
            && manifest.contains("missing_safety_doc = \"warn\"")
    );
}

#[test]
fn crates_depend_one_way() {
    for (name, allowed) in [
        ("ir", &[][..]),
        ("backends", &["moebius-ir"]),
        ("engine", &["moebius-ir", "moebius-backends"]),
        // The program is part of this crate and runs the engine; no backend is named.
        ("models", &["moebius-ir", "moebius"]),
    ] {
        let manifest = read(format!("{name}/Cargo.toml"));
        let mut section = "";
        for line in manifest.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            }
            let key = line.split(['=', '.', ' ']).next().unwrap_or_default();
            if section.ends_with("dependencies]") && key.starts_with("moebius") {
                assert!(allowed.contains(&key), "{name} depends on {key}");
            }
        }
    }
    // The IR does no input or output and starts no thread.
    let outside = ["std::fs", "std::net", "std::thread", "std::io", "std::process", "std::env", "rayon"];
    none("outside of the language", lines_with(files("ir/src", "rs"), |l| outside.iter().any(|o| l.contains(o))));
}

#[test]
fn files_can_be_read_in_one_go() {
    let long = |p: &PathBuf| read(p).lines().count() > 700;
    let long: Vec<PathBuf> = sources().into_iter().filter(long).collect();
    none("more than 700 lines", long.iter().map(|p| p.display().to_string()).collect());
    // A line beyond what rustfmt keeps is one it could not reach.
    let wide = lines_with(sources(), |l| l.chars().count() > 130);
    none("wide lines", wide);
}

#[test]
fn nothing_is_left_open() {
    let open = ["todo!", "unimplemented!", "dbg!"];
    none("open ends", lines_with(sources(), |l| open.iter().any(|o| l.contains(o))));
    none("a test left out without a reason", lines_with(sources(), |l| l.contains("#[ignore]")));
    let words = ["TODO", "FIXME", "XXX", "HACK"];
    let mut marked = Vec::new();
    for path in sources().into_iter().filter(|p| !p.ends_with("tidy.rs")) {
        for (number, line) in read(&path).lines().enumerate() {
            if words.iter().any(|w| has_word(line, w)) {
                marked.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    none("marks", marked);
}

#[test]
fn every_kernel_is_launched() {
    let lowering: String = files("backends/src/cpu/lower", "rs").iter().map(read).collect();
    let mut idle = Vec::new();
    for path in files("backends/src/cpu/kernels", "rs") {
        let name = stem(&path);
        let top = path.parent().is_some_and(|p| p.ends_with("kernels"));
        // What kernels share, and their tests.
        let shared = ["mod", "par", "rows", "tile", "random"].contains(&name.as_str()) || name.ends_with("tests");
        let used_by_kernels = || {
            files("backends/src/cpu/kernels", "rs").iter().any(|p| *p != path && read(p).contains(&format!("{name}::")))
        };
        if top && !shared && !lowering.contains(&format!("kernels::{name}::")) && !used_by_kernels() {
            idle.push(path.display().to_string());
        }
    }
    none("kernels without a launch", idle);
    // And each op with work to do is named there.
    for backend in ["cpu", "cuda"] {
        let lower = read(format!("backends/src/{backend}/lower/mod.rs"));
        for name in Op::NAMES {
            let variant: String = name.split('_').map(|w| w[..1].to_uppercase() + &w[1..]).collect();
            assert!(lower.contains(&format!("Op::{variant}(")), "{variant} is not lowered by name for {backend}");
        }
    }
    // Each CUDA file is read by the lowering, each header by the sources, and each kernel in a file is launched.
    let lowering: String = files("backends/src/cuda/lower", "rs").iter().map(read).collect();
    let sources = read("backends/src/cuda/source.rs");
    for path in files("backends/src/cuda/kernels", "cuh") {
        let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let is_header = sources.contains(&format!("\"{name}\"")) || lowering.contains(&format!("../kernels/{name}\""));
        assert!(is_header, "{name} is no header of any source");
    }
    for path in files("backends/src/cuda/kernels", "cu") {
        let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        assert!(lowering.contains(&format!("../kernels/{name}\"")), "{name} is not read");
        let begins =
            |line: &str| ["KERNEL ", "HOPPER_KERNEL "].iter().find_map(|k| line.strip_prefix(k).map(str::to_owned));
        for kernel in read(&path).lines().filter_map(begins) {
            // The name is before the operands, which may come after the launch's bounds.
            let bounds = kernel.strip_prefix("__launch_bounds__(").and_then(|k| k.split_once(") "));
            let kernel = bounds.map_or(kernel.as_str(), |(_, k)| k).split('(').next().unwrap_or_default();
            assert!(lowering.contains(&format!("\"{kernel}\"")), "{kernel} of {name} is not launched");
        }
    }
}

#[test]
fn ops_are_matched_without_a_wildcard() {
    let matching: Vec<PathBuf> = files("backends/src", "rs")
        .into_iter()
        .chain(files("ir/src", "rs"))
        .filter(|p| read(p).contains("Op::Matmul(") || p.ends_with("cpu/lower/mod.rs"))
        .collect();
    assert!(!matching.is_empty());
    none("a wildcard over ops", lines_with(matching, |l| l.trim_start().starts_with("_ =>")));
    let workspace = read("Cargo.toml");
    for lint in
        ["wildcard_enum_match_arm = \"deny\"", "match_wildcard_for_single_variants = \"deny\"", "todo = \"deny\""]
    {
        assert!(workspace.contains(lint), "{lint}");
    }
}
