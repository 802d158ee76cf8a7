//! Studies by real processes at their smallest scale: what they write, what they share, and that kills leave no trace.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::place::{Place, kill_until_it_ends, stderr, stdout, succeeds};

const STUDIES: [&str; 5] = ["pyramid", "residual", "pr-moe", "mos", "cost"];

fn smoke<'a>(name: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["study", name, "--scale", "smoke", "--data", "text.txt", "--device", "cpu", "--out", out][..], more].concat()
}

/// Columns of a CSV file by name, without those that a clock measured.
fn columns(path: &Path) -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let rows: Vec<Vec<String>> = lines.collect();
    let clock = |name: &str| ["_ms", "_s", "_time"].iter().any(|end| name.ends_with(end));
    let column = |(at, name): (usize, &String)| {
        let cells = rows.iter().map(|row| {
            assert_eq!(row.len(), header.len(), "{}: {row:?}", path.display());
            row[at].clone()
        });
        (name.clone(), cells.collect())
    };
    header.iter().enumerate().filter(|(_, name)| !clock(name)).map(column).collect()
}

/// All files of a folder, by name.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let one = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap())
    };
    fs::read_dir(folder).unwrap().map(one).collect()
}

fn folders(runs: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(runs).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn all_studies_run_share_their_runs_and_are_done_only_once() {
    let place = Place::on_one_thread();
    for name in STUDIES {
        let output = succeeds(place.run(&smoke(name, "s", &[])));
        let folder = place.path("s").join(name);
        let table = fs::read_to_string(folder.join("table.md")).unwrap();
        for claim in table.lines().filter(|line| line.starts_with("- **")) {
            let verdict = claim.trim_start_matches("- **").split("**").next().unwrap();
            assert!(["shown", "not shown at this scale", "contradicted"].contains(&verdict), "{claim}");
            assert!(stdout(&output).contains(verdict), "{}", stdout(&output));
        }
        assert!(table.contains("seeds") && !table.contains("NaN"), "{table}");
        let csv = columns(&folder.join("table.csv"));
        assert!(
            csv["validation_loss"].iter().all(|loss| (2.0..6.0).contains(&loss.parse::<f64>().unwrap())),
            "{csv:?}"
        );
        let page = fs::read_to_string(folder.join("report.html")).unwrap();
        let svgs = files(&folder).keys().filter(|name| name.ends_with(".svg")).count();
        assert!(svgs >= 2 && page.matches("<svg").count() == svgs, "{name}");
        assert!(!page.contains("src=") && !page.contains("href="), "{name}: the page needs another file");
        // Steps and tokens were timed for every arm.
        let text = fs::read_to_string(folder.join("table.csv")).unwrap();
        let at = text.lines().next().unwrap().split(',').position(|name| name == "step_ms").unwrap();
        for line in text.lines().skip(1) {
            assert!(line.split(',').nth(at).unwrap().parse::<f64>().unwrap() > 0.0, "{name}: {line}");
        }
    }
    // 4, 2 more, 3, 3 more and 2 more arms, with two seeds each; the checkpoints of all of them are gone.
    let runs = folders(&place.path("s/runs"));
    assert_eq!(runs.len(), 2 * (4 + 2 + 3 + 3 + 2), "{runs:?}");
    for run in &runs {
        let folder = place.path("s/runs").join(run);
        assert!(folder.join("result.json").exists() && folder.join("report.html").exists(), "{run}");
        assert!(!folder.join("checkpoints").exists(), "{run}");
    }

    // A second start trains and times nothing, and leaves all files as they were.
    for name in ["mos", "cost"] {
        let folder = place.path("s").join(name);
        let before = files(&folder);
        let said = stderr(&succeeds(place.run(&smoke(name, "s", &[]))));
        assert!(said.contains("is there") && !said.contains("step ") && !said.contains("timing"), "{said}");
        for (file, bytes) in files(&folder) {
            assert!(before[&file] == bytes, "{name}: {file} is another one");
        }
    }
    assert_eq!(folders(&place.path("s/runs")), runs);

    // Other settings are other runs.
    let said = stderr(&succeeds(place.run(&smoke("residual", "s", &["--set", "train.steps=8", "--seeds", "1"]))));
    assert!(!said.contains("is there"), "{said}");
    assert_eq!(folders(&place.path("s/runs")).len(), runs.len() + 3);
}

/// A student depends on its teacher, whose checkpoint is the first thing a study gives away: killed anywhere, the numbers are those
/// of a study that was left alone, times apart.
#[test]
fn a_study_killed_at_random_moments_ends_with_the_same_table() {
    let place = Place::on_one_thread();
    let more = ["--tune", "--set", "train.steps=24", "--set", "train.checkpoint_every=2"];
    succeeds(place.run(&smoke("mos", "alone", &more)));
    let seed = kill_until_it_ends(&place, "killed", 24, 7, |_| {
        smoke("mos", "killed", &more).into_iter().map(str::to_owned).collect()
    });
    for file in ["table.csv", "runs.csv", "tuning.csv"] {
        let of = |out: &str| columns(&place.path(out).join("mos").join(file));
        let (killed, alone) = (of("killed"), of("alone"));
        assert!(alone.values().all(|cells| cells.len() >= 4), "{file}");
        assert_eq!(killed, alone, "{file}, seed {seed}");
    }
    assert_eq!(folders(&place.path("killed/runs")), folders(&place.path("alone/runs")));
}

#[test]
fn a_study_stops_in_time_and_goes_on() {
    let place = Place::on_one_thread();
    let more = ["--seeds", "1", "--set", "train.steps=4000", "--set", "train.eval_every=0", "--for", "2s"];
    let output = place.run(&smoke("residual", "s", &more));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("the same command goes on"), "{said}");
    let table = fs::read_to_string(place.path("s/residual/table.md")).unwrap();
    assert!(table.contains("open: runs are missing") && table.contains("0 of 3 runs are there"), "{table}");
    let begun = folders(&place.path("s/runs")).remove(0);
    assert!(!folders(&place.path("s/runs").join(&begun).join("checkpoints")).is_empty());
    let said = stderr(&place.run(&smoke("residual", "s", &more)));
    assert!(said.contains("goes on") && said.contains("after step"), "{said}");
}

#[test]
fn wrong_use_is_told() {
    let place = Place::on_one_thread();
    place.fails(2, &["study", "pyramide"]);
    for (more, said) in [
        (["--for", "9 minutes"], "wanted a time as 90s, 9m or 1h"),
        (["--seeds", "0"], "--seeds: wanted 1 to 1000, found 0"),
        (["--set", "train.stepz=3"], "train.stepz"),
        (["--set", "model.heads=3"], "arm first-half"),
    ] {
        let error = place.fails(2, &smoke("pyramid", "s", &more));
        assert!(error.contains(said), "{more:?}: {error}");
    }
    // A result that was damaged is named, not taken.
    let more = ["--seeds", "1", "--set", "train.steps=4"];
    succeeds(place.run(&smoke("residual", "s", &more)));
    let run = folders(&place.path("s/runs")).remove(0);
    let result = place.path("s/runs").join(run).join("result.json");
    fs::write(&result, "{\"key\": 3}").unwrap();
    let error = place.fails(1, &smoke("residual", "s", &more));
    assert!(error.contains("result.json: not a result of a study"), "{error}");
}
