//! Distillation as a whole: students by real processes, killed too, and by the library; caches that are not what they should be.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use moebius::Engine;
use moebius_models::config::Config;
use moebius_models::data::{Corpus, CorpusSpec, Source, Validation};
use moebius_models::distill::{CacheSettings, Course, Settings, Stop, Teacher, cut};
use moebius_models::gpt::{Distilling, Lesson};
use moebius_models::tokenizer::Tokenizer;
use moebius_models::training::{self, Ending, Event, Run};

use crate::place::{Place, checkpoint, kill_until_it_ends, metrics, stderr, stdout, succeeds};

/// A place with a trained teacher of two layers.
fn place() -> Place {
    let place = Place::new();
    succeeds(place.train("teacher", &["--seed", "1"]));
    place
}

const STUDENT: [&str; 8] =
    ["--teacher", "teacher", "--layers", "2", "--data", "text.txt", "--set", "train.log_every=4"];

fn distil(place: &Place, out: &str, more: &[&str]) -> std::process::Output {
    place.run(&[&["distill", "--out", out][..], &STUDENT, more].concat())
}

#[test]
fn a_student_follows_its_teacher_until_the_stop() {
    let place = place();
    for (out, more) in [("live", &[][..]), ("cached", &["--teacher-cache", "cache/teacher", "--cache-top", "20"])] {
        let output = succeeds(distil(&place, out, &[&["--kd-stop", "10steps"], more].concat()));
        let said = stderr(&output);
        assert!(said.contains("step 10: the teacher has left; memory of the run"), "{said}");
        assert_eq!(said.contains("teacher's cache"), out == "cached", "{said}");
        let lines = metrics(&place.path(out));
        let train: Vec<_> = lines.iter().filter(|l| l["kind"] == "train").collect();
        assert_eq!(train.len(), 24);
        for line in &train {
            let taught = line["step"].as_u64().unwrap() <= 10;
            assert_eq!(line.get("kd_loss").is_some(), taught, "{line}");
            let [loss, lm, aux] = ["loss", "lm_loss", "aux_loss"].map(|key| line[key].as_f64().unwrap());
            let kd = line.get("kd_loss").map_or(0.0, |kd| kd.as_f64().unwrap());
            assert!((loss - lm - aux - kd).abs() < 1e-5, "{line}");
        }
        let kd = |step: usize| train[step - 1]["kd_loss"].as_f64().unwrap();
        assert!(kd(1) > 0.01 && kd(10) < kd(1), "{out}: {} to {}", kd(1), kd(10));
        let report = fs::read_to_string(place.path(out).join("report.html")).unwrap();
        assert!(report.contains("left after step 10") && report.contains("Distillation"));
        assert!(fs::read_to_string(place.path(out).join("distill.toml")).unwrap().contains("stop_step = 10"));
    }
    let generate = ["generate", "--model", "live", "--prompt", "line", "--tokens", "20"];
    assert!(stdout(&succeeds(place.run(&generate))).starts_with("line"));
}

#[test]
fn never_to_follow_is_plain_training_and_to_the_end_is_to_the_end() {
    let place = place();
    let student = ["--teacher", "teacher", "--config", "small.toml", "--data", "text.txt"];
    let distil = |out: &str, stop: &str| {
        succeeds(place.run(&[&["distill", "--out", out, "--kd-stop", stop][..], &student].concat()))
    };
    distil("never", "0");
    distil("always", "1");
    succeeds(place.train("plain", &[]));
    assert_eq!(checkpoint(&place.path("never"), 24), checkpoint(&place.path("plain"), 24));
    assert_ne!(checkpoint(&place.path("always"), 24), checkpoint(&place.path("plain"), 24));
    assert_eq!(metrics(&place.path("never")), metrics(&place.path("plain")));
    let last = metrics(&place.path("always")).into_iter().rfind(|l| l["kind"] == "train").unwrap();
    assert!(last["kd_loss"].is_number(), "{last}");
}

#[test]
fn a_student_begins_with_what_fits_of_its_teacher() {
    let place = place();
    let same =
        ["--kd-stop", "0", "--steps", "1", "--set", "train.learning_rate=1e-30", "--set", "train.min_learning_rate=0"];
    let said = stderr(&succeeds(distil(&place, "same", &[&["--init-from-teacher"][..], &same].concat())));
    let count = said.lines().find(|l| l.contains("tensors from the teacher")).unwrap();
    let numbers: Vec<&str> = count.split(' ').filter(|w| w.parse::<usize>().is_ok()).collect();
    assert_eq!(numbers[0], numbers[1], "{count}");
    // A step that moves nothing leaves the teacher's weights.
    let [mut teacher, mut student] = ["teacher", "same"].map(|run| Teacher::open(&place.path(run)).unwrap());
    for info in training::parameter_infos(student.config()) {
        assert_eq!(teacher.tensor(&info.name).unwrap(), student.tensor(&info.name).unwrap(), "{}", info.name);
    }

    // A dense student of a sparse teacher, as Switch Transformers do it: what is not of experts, and a mixed loss.
    let dense = ["--set", "model.experts=[1]", "--lm-weight", "0.75", "--kd-weight", "0.25", "--init-from-teacher"];
    let said = stderr(&succeeds(distil(&place, "dense", &dense)));
    assert!(said.contains("weight 0.25") && said.contains("weight of the cross entropy 0.75"), "{said}");
    let line = metrics(&place.path("dense")).remove(0);
    let of = |key: &str| line[key].as_f64().unwrap();
    assert!((of("loss") - 0.75 * of("lm_loss") - of("kd_loss") - of("aux_loss")).abs() < 1e-5, "{line}");
}

/// Kills a run again and again, in the building of the cache, before and after the stop, also while it writes checkpoints, and lets
/// it go on: at the end weights, moments and metrics are those of a run that was left alone.
#[test]
fn a_distillation_killed_at_random_moments_ends_with_the_same_bits() {
    let place = place();
    for (number, more) in [&[][..], &["--cache-top", "16", "--teacher-cache"]].into_iter().enumerate() {
        let settings = ["--kd-stop", "0.5", "--steps", "60", "--checkpoint-every", "1"];
        let args = |out: &str| {
            let begin = [&["distill", "--out", out][..], &STUDENT, &settings, more].concat();
            let folder = format!("cache-{out}");
            let mut begin: Vec<String> = begin.into_iter().map(str::to_owned).collect();
            begin.extend((!more.is_empty()).then_some(folder));
            begin
        };
        let (alone, killed) = (format!("alone{number}"), format!("killed{number}"));
        let whole = args(&alone);
        succeeds(place.run(&whole.iter().map(String::as_str).collect::<Vec<_>>()));
        let seed = kill_until_it_ends(&place, &killed, 16, number as u32, |started| {
            let resume = ["distill", "--resume", "--data", "text.txt", "--out", &killed].map(str::to_owned).to_vec();
            if started { resume } else { args(&killed) }
        });
        let [alone, killed] = [alone, killed].map(|out| place.path(&out));
        assert_eq!(checkpoint(&alone, 60), checkpoint(&killed, 60), "seed {seed}");
        assert_eq!(metrics(&alone), metrics(&killed), "seed {seed}");
    }
}

#[test]
fn teachers_and_students_that_do_not_go_together_are_wrong_use() {
    let place = place();
    let base = ["distill", "--teacher", "teacher", "--data", "text.txt", "--out", "x"];
    let fails = |more: &[&str]| place.fails(2, &[&base[..], more].concat());
    assert!(fails(&["--layers", "2", "--set", "model.vocab=300"]).contains("found model.vocab = 256 and 300"));
    assert!(fails(&["--layers", "3"]).contains("--layers: wanted 1 to 2"));
    assert!(fails(&["--layers", "2", "--set", "model.sequence=64"]).contains("at most 32 tokens"));
    assert!(fails(&["--layers", "2", "--kd-stop", "1.5"]).contains("--kd-stop: wanted a fraction"));
    assert!(fails(&["--layers", "2", "--kd-temp", "0"]).contains("--kd-temp: wanted"));
    assert!(fails(&["--layers", "2", "--kd-weight", "-1"]).contains("--kd-weight: wanted"));
    assert!(fails(&[]).contains("wanted a student"));
    let wide = ["--layers", "2", "--set", "model.width=64", "--init-from-teacher"];
    assert!(fails(&wide).contains("model.width: wanted 32, found 64"));
    let nothing = ["distill", "--teacher", "none", "--layers", "2", "--data", "text.txt"];
    assert!(place.fails(1, &nothing).contains("no model here"));
    assert!(!place.path("x").exists(), "nothing is left behind");

    // A student of another width and other experts is none of these.
    let other =
        ["--set", "model.width=48", "--set", "model.heads=3", "--set", "model.experts=[3]", "--set", "model.ffn=40"];
    succeeds(place.run(&[&base[..], &["--layers", "2", "--steps", "3"], &other].concat()));

    // Runs of one kind are not gone on with as the other.
    let error = place.fails(1, &["train", "--resume", "--data", "text.txt", "--out", "x"]);
    assert!(error.contains("moebius distill --resume"), "{error}");
    let error = place.fails(1, &["distill", "--resume", "--data", "text.txt", "--out", "teacher"]);
    assert!(error.contains("moebius train --resume"), "{error}");
}

#[test]
fn a_cache_of_something_else_is_refused_by_name() {
    let place = place();
    let cached = |out: &str, more: &[&str]| {
        let cache = ["--teacher-cache", "c", "--cache-top", "8", "--kd-stop", "6steps"];
        distil(&place, out, &[&cache[..], more].concat())
    };
    succeeds(cached("a", &[]));
    let file = place.path("c/teacher.logits");
    let whole = fs::read(&file).unwrap();
    let refuses = |output: &std::process::Output, why: &str| {
        let error = stderr(output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("a cache for another run") && error.contains(why), "{why}: {error}");
        assert!(!place.path("b").exists() && fs::read(&file).unwrap() == whole);
    };
    let refused = |more: &[&str], why: &str| refuses(&cached("b", more), why);
    refused(&["--seed", "8"], "seed: wanted 8, found 1");
    refused(&["--set", "train.batch=3"], "batch: wanted 3, found 2");
    refused(&["--set", "model.sequence=16"], "sequence: wanted 16, found 32");
    refused(&["--kd-temp", "2"], "temperature: wanted 2.0, found 1.0");
    fs::write(place.path("other.txt"), fs::read_to_string(place.path("text.txt")).unwrap().replace("fox", "cat"))
        .unwrap();
    refused(&["--data", "other.txt"], "data: wanted");
    succeeds(place.train("teacher2", &["--seed", "2"]));
    let other =
        ["distill", "--teacher", "teacher2", "--layers", "2", "--data", "text.txt", "--out", "b", "--seed", "1"];
    let output =
        place.run(&[&other[..], &["--teacher-cache", "c", "--cache-top", "8", "--kd-stop", "6steps"]].concat());
    refuses(&output, "teacher weights: wanted");

    // Another student, other weights of the terms, a stop that comes earlier: the same cache.
    let other = ["--layers", "1", "--kd-weight", "3", "--kd-stop", "4steps"];
    let output = place.run(
        &[
            &[
                "distill",
                "--teacher",
                "teacher",
                "--data",
                "text.txt",
                "--out",
                "b",
                "--teacher-cache",
                "c",
                "--cache-top",
                "8",
            ][..],
            &other,
        ]
        .concat(),
    );
    assert!(!stderr(&succeeds(output)).contains("teacher's cache"));
    // One that comes later makes it longer.
    succeeds(
        place.run(
            &[
                &["distill", "--out", "d", "--teacher-cache", "c", "--cache-top", "8", "--kd-stop", "9steps"][..],
                &STUDENT,
            ]
            .concat(),
        ),
    );
    let longer = fs::read(&file).unwrap();
    assert!(longer.len() > whole.len() && longer.starts_with(&whole));

    // Torn at the end, it is gone on with; damaged within, the batch is named; another file is none.
    fs::write(&file, &longer[..longer.len() - 5]).unwrap();
    succeeds(
        place.run(
            &[
                &["distill", "--out", "e", "--teacher-cache", "c", "--cache-top", "8", "--kd-stop", "9steps"][..],
                &STUDENT,
            ]
            .concat(),
        ),
    );
    assert_eq!(fs::read(&file).unwrap(), longer);
    let mut damaged = longer.clone();
    let block = (longer.len() - whole.len()) / 3;
    damaged[longer.len() - 8 * block + 3] ^= 1;
    fs::write(&file, &damaged).unwrap();
    let error = stderr(&cached("f", &[]));
    assert!(error.contains("damaged (batch 1)") && error.contains("No checkpoint was written before"), "{error}");
    fs::write(&file, "something else, and long enough to be a header").unwrap();
    assert!(stderr(&cached("g", &[])).contains("not a cache of a teacher"));
}

#[test]
fn the_teacher_may_move_but_not_change_and_may_be_gone_after_the_stop() {
    let place = place();
    let stopped = |out: &str, stop: &str| {
        succeeds(distil(&place, out, &["--kd-stop", stop, "--steps", "12", "--checkpoint-every", "6"]));
        // As if it had been interrupted after step 6.
        fs::remove_dir_all(place.path(out).join("checkpoints/step-12")).unwrap();
    };
    stopped("following", "10steps");
    stopped("left", "3steps");
    let ends: Vec<_> = ["following", "left"].map(|out| metrics(&place.path(out))).into();
    fs::rename(place.path("teacher"), place.path("moved")).unwrap();
    let resume = |out: &str, more: &[&str]| {
        place.run(&[&["distill", "--resume", "--data", "text.txt", "--out", out][..], more].concat())
    };
    assert!(stderr(&resume("following", &[])).contains("no model here"));
    succeeds(place.train("another", &["--seed", "5"]));
    let error = stderr(&resume("following", &["--teacher", "another"]));
    assert!(error.contains("the teacher is not the one of this run: wanted weights with hash"), "{error}");
    succeeds(resume("following", &["--teacher", "moved"]));
    succeeds(resume("left", &[]));
    assert_eq!(ends, ["following", "left"].map(|out| metrics(&place.path(out))));
}

/// What a library test trains with.
struct Lab {
    place: Place,
    engine: Engine,
    corpus: Corpus,
}

impl Lab {
    fn new() -> Lab {
        let place = place();
        let text = [Source::File(place.path("text.txt"))];
        let spec = CorpusSpec {
            train: &text,
            validation: Validation::Fraction(0.1),
            tokenizer: &Tokenizer::Bytes,
            vocab: Some(256),
            cache_dir: place.folder.path(),
        };
        let corpus = Corpus::open(&spec, &mut |_, _, _| ()).unwrap();
        Lab { engine: Engine::cpu(Some(2)).unwrap(), corpus, place }
    }

    fn student(&self) -> (Teacher, Config) {
        let teacher = Teacher::open(&self.place.path("teacher")).unwrap();
        let mut config = cut(teacher.config(), 2).unwrap();
        config.set("train.steps=16").unwrap();
        config.set("train.checkpoint_every=0").unwrap();
        (teacher, config)
    }

    fn course(&self, stop: Stop, cache: Option<usize>) -> (Course, Config) {
        let (teacher, config) = self.student();
        let folder = self.place.path("kept");
        let settings = Settings {
            kd_temperature: 2.0,
            cache: cache.map(|top| CacheSettings { folder: folder.join(top.to_string()), top }),
            ..Settings::default()
        };
        (Course::new(teacher, &config, &Tokenizer::Bytes, stop, settings).unwrap(), config)
    }

    /// Trains into `out`, interrupted after each of these steps; the memory of the run before and after the teacher has left.
    fn run(&self, out: &str, stop: Stop, cache: Option<usize>, interrupted: &[u64]) -> Vec<[(usize, usize); 2]> {
        let mut left = Vec::new();
        let (mut course, config) = self.course(stop, cache);
        let stop_step = course.settings().stop_step;
        let out = self.place.path(out);
        for resume in 0..=interrupted.len() {
            let stop = AtomicBool::new(false);
            let text = (&Tokenizer::Bytes, &self.corpus);
            let mut course_again = Course::of_run(&out).unwrap();
            let course = course_again.as_mut().unwrap_or(&mut course);
            let followed = (course, &stop);
            let mut run =
                Run::distil(&self.engine, config.clone(), text, &out, resume > 0, followed, &mut |_| ()).unwrap();
            assert!(cache.is_none() || run.session().names().iter().all(|name| !name.starts_with("teacher/")));
            let ending = run.train(&stop, &mut |event| match event {
                Event::Step(record) => {
                    if interrupted.get(resume) == Some(&record.step) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
                Event::TeacherLeft { before, after, .. } => left.push([before, after]),
                Event::Damaged(..)
                | Event::Resumed(_)
                | Event::Evaluated(_)
                | Event::Alarm(_)
                | Event::Saved(_)
                | Event::Caching(_) => {}
            });
            let wanted = if resume < interrupted.len() { Ending::Stopped } else { Ending::Done };
            assert_eq!(ending.unwrap(), wanted);
            let teaches = run.session().names().iter().any(|name| name.starts_with("teacher/"));
            let follows = cache.is_none() && interrupted.get(resume).is_some_and(|&step| step < stop_step);
            assert_eq!(teaches, follows, "a teacher is there as long as it is followed");
        }
        left
    }
}

fn same(a: &Path, b: &Path) {
    assert_eq!(checkpoint(a, 16), checkpoint(b, 16));
    assert_eq!(metrics(a), metrics(b));
}

#[test]
fn interruptions_around_the_stop_change_no_bit_and_the_memory_falls() {
    let lab = Lab::new();
    for cache in [None, Some(12)] {
        let out = |what: &str| format!("{what}-{}", cache.unwrap_or(0));
        let left = lab.run(&out("alone"), Stop::Steps(8), cache, &[]);
        let [(before_arena, before_state), (after_arena, after_state)] = left[0];
        let (before, after) = (before_arena + before_state, after_arena + after_state);
        assert!(if cache.is_none() { before > after } else { before >= after }, "{left:?}");
        for (i, steps) in [&[7][..], &[8], &[9], &[3, 8, 12]].into_iter().enumerate() {
            let again = out(&format!("again{i}"));
            lab.run(&again, Stop::Steps(8), cache, steps);
            same(&lab.place.path(&out("alone")), &lab.place.path(&again));
        }
    }
}

/// What a device would have to hold, from the plans alone: with a whole teacher its weights more than plainly, with a cache next to
/// nothing more.
#[test]
fn the_memory_of_each_phase_is_known_before() {
    let lab = Lab::new();
    let (mut course, config) = lab.course(Stop::Fraction(0.5), None);
    let options = course.options();
    let teacher = course.teacher().unwrap();
    let memory = |lesson: Option<Lesson<'_>>| {
        let lesson = lesson.map(|lesson| Distilling { lesson, options, lm_weight: 1.0 });
        training::memory_of(&lab.engine, &config, lesson.as_ref()).unwrap()
    };
    let plain = memory(None);
    let live = memory(Some(Lesson::Live(&teacher.config().model)));
    let weights = 4 * teacher.config().parameters().total;
    assert!(live.state >= plain.state + weights && live.arena >= plain.arena, "{live:?} {plain:?} {weights}");
    let cached = memory(Some(Lesson::Cached(32)));
    assert!(cached.total() <= plain.total() + plain.total() / 10, "{cached:?} {plain:?}");
}

#[test]
fn a_cache_of_all_tokens_teaches_as_the_teacher_does() {
    let lab = Lab::new();
    lab.run("live", Stop::Steps(6), None, &[]);
    lab.run("cached", Stop::Steps(6), Some(256), &[]);
    let [live, cached] = ["live", "cached"].map(|out| metrics(&lab.place.path(out)));
    for (live, cached) in live.iter().zip(&cached).filter(|(l, _)| l.get("kd_loss").is_some()) {
        for key in ["loss", "lm_loss", "kd_loss", "grad_norm"] {
            let [live, cached] = [live, cached].map(|line| line[key].as_f64().unwrap());
            assert!((live - cached).abs() <= 5e-3 * live.abs(), "{key}: {live} live, {cached} cached");
        }
    }
}
