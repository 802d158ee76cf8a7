use super::*;
use crate::metrics::{AlarmKind, AlarmRecord, EvalRecord, LayerLoad, MetricsWriter, TrainRecord};

/// A number in -0.5..0.5 that looks random and is the same every time.
fn noise(a: u64, b: u64) -> f64 {
    let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
    (xxhash_rust::xxh3::xxh3_64(&bytes) >> 11) as f64 / (1u64 << 53) as f64 - 0.5
}

/// A run that looks like a real one: every `every` steps a line, loads of `experts` experts in each layer.
fn run(steps: u64, every: u64, layers: &[(usize, usize)]) -> Vec<Record> {
    let mut records = Vec::new();
    for step in (1..=steps).filter(|step| step % every == 0) {
        let done = step as f64 / steps as f64;
        let lm_loss = 1.45 + 4.1 * (-done * 60.0).exp() + 0.9 * (-done * 7.0).exp() + 0.16 * noise(step, 0);
        let load = |&(layer, experts): &(usize, usize)| {
            let weight = |e: usize| {
                let own = noise(e as u64, layer as u64 + 10);
                // Some experts die slowly in the second half.
                let fades = e % 11 == 7 && experts > 8;
                let alive = if fades { (1.0 - 2.4 * (done - 0.2).max(0.0)).max(0.0) } else { 1.0 };
                alive * (3.0 * own * (-done * 4.0).exp() + own + 0.3 * noise(step, (layer * 1000 + e) as u64)).exp()
            };
            let weights: Vec<f64> = (0..experts).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let load = weights.iter().map(|w| (w / sum) as f32).collect();
            let idle: Vec<u32> = weights.iter().map(|w| if *w == 0.0 { 120 } else { 0 }).collect();
            LayerLoad {
                layer,
                load,
                dropped: if experts > 64 { 0.021 } else { 0.0 },
                entropy: Some((experts as f32).ln() * (0.4 + 0.6 * (-3.0 * done).exp()) as f32),
                logit_scale: Some(2.0 + (6.0 * done) as f32 + 0.2 * layer as f32),
                coefficient: (layer % 2 == 1).then_some((0.5 + 0.05 * layer as f32 * done as f32).min(0.95)),
                dead: Some(idle.iter().filter(|&&i| i >= 100).count()),
                idle,
            }
        };
        let warm = (step as f64 / (0.05 * steps as f64)).min(1.0);
        records.push(Record::Train(TrainRecord {
            step,
            tokens: step * 2048,
            loss: lm_loss + 0.01,
            lm_loss,
            aux_loss: 0.01 * (1.05 + 0.8 * (-done * 10.0).exp() + 0.05 * noise(step, 1)),
            kd_loss: None,
            lr: 1e-3 * warm * (0.55 + 0.45 * (done * std::f64::consts::PI).cos()),
            grad_norm: (0.4 + 3.0 * (-done * 30.0).exp()) * (noise(step, 2)).exp(),
            tokens_per_s: 21_500.0 + 1500.0 * noise(step, 3) - if step % 97 == 0 { 6000.0 } else { 0.0 },
            experts: layers.iter().map(load).collect(),
        }));
        if step % (steps / 20).max(1) == 0 {
            let val_loss = lm_loss + 0.02 + 0.1 * done;
            let bits_per_byte = val_loss / std::f64::consts::LN_2;
            records.push(Record::Eval(EvalRecord { step, tokens: step * 2048, val_loss, bits_per_byte }));
        }
    }
    records
}

fn facts() -> RunFacts {
    RunFacts {
        title: "tiny-pr-moe on Tiny Shakespeare".to_owned(),
        command: "moebius train --preset tiny-pr-moe --out runs/first".to_owned(),
        device: "cpu: 2 threads, AVX2".to_owned(),
        total_params: 6_312_448,
        active_params: 2_514_944,
        config: "seed = 1\n[model]\nlayers = 6\nwidth = 192\nexperts = [0, 8, 0, 8, 0, 16]\n".to_owned(),
        more: vec![("Seed".to_owned(), "1".to_owned())],
    }
}

/// Every element is closed in order, every number drawn is one, and nothing is fetched.
fn check(html: &str) {
    let mut open = Vec::new();
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let end = rest.find('>').unwrap();
        let tag = &rest[..end];
        let name = tag.split(|c: char| !c.is_ascii_alphanumeric() && c != '/').next().unwrap();
        rest = &rest[end + 1..];
        if let Some(name) = name.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "in </{name}>");
        } else if !tag.ends_with('/') && !tag.starts_with('!') && name != "meta" {
            open.push(name);
        }
        // The content of these two is no markup.
        if name == "script" || name == "style" {
            rest = &rest[rest.find("</").unwrap()..];
        }
        for bad in ["NaN", "inf", "src=", "href="] {
            assert!(!tag.contains(bad), "{bad} in <{tag}>");
        }
    }
    assert!(open.is_empty(), "{open:?}");
    for bad in ["url(", "@import", "fetch(", "https:"] {
        assert!(!html.contains(bad), "{bad}");
    }
    let json = html.split("application/json").skip(1);
    for text in json {
        let text = &text[text.find('>').unwrap() + 1..text.find("</script>").unwrap()];
        serde_json::from_str::<serde_json::Value>(text).unwrap();
    }
}

#[test]
fn a_usual_run_is_drawn_with_all_its_parts() {
    let records = run(2000, 1, &[(1, 8), (3, 8), (5, 16)]);
    let html = render(&facts(), &records);
    check(&html);
    for part in
        ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "tokens per second", "Auxiliary loss", "Layer 5"]
    {
        assert!(html.contains(part), "{part}");
    }
    for part in
        ["6,312,448", "2,000 steps", "4.1M tokens", "balanced share 6.25%", "1 idle", "runs/first", "width = 192"]
    {
        assert!(html.contains(part), "{part}");
    }
    for part in ["Router health", "Router entropy", "Logit scale", "Side coefficient", "layer 5</span>"] {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("fraction of the choices"), "a dropless run has no chart of drops");
    assert!(html.contains("prefers-color-scheme"));
    assert!(html.len() < 400_000, "{} bytes", html.len());
}

#[test]
fn dead_experts_are_listed_with_their_last_token() {
    let layer = |layer, idle: &[u32], dead| LayerLoad {
        layer,
        load: vec![1.0 / idle.len() as f32; idle.len()],
        dropped: 0.0,
        entropy: Some(1.0),
        idle: idle.to_vec(),
        dead,
        ..LayerLoad::default()
    };
    let page = |layers: Vec<LayerLoad>| {
        let mut before = layers.clone();
        before.iter_mut().for_each(|l| (l.idle, l.dead) = (vec![0; l.idle.len()], l.dead.map(|_| 0)));
        let records = [(1100, before), (1200, layers)].map(|(step, experts)| {
            Record::Train(TrainRecord { step, loss: 1.0, lm_loss: 1.0, experts, ..TrainRecord::default() })
        });
        let html = render(&facts(), &records);
        check(&html);
        html
    };
    let html = page(vec![
        layer(1, &[0, 150, 99, 1200, 0, 100], Some(3)),
        layer(3, &[0, 40], Some(0)),
        layer(5, &[500; 40], Some(40)),
    ]);
    assert!(html.contains("Layer 1: 3 of 6</th><td>1 (step 1,050), 3 (never), 5 (step 1,100)</td>"), "by number");
    assert!(!html.contains("Layer 3: "), "none of its experts is dead");
    assert!(html.contains("Layer 5: 40 of 40</th>") && html.contains("31 (step 700), and 8 more</td>"), "counted");
    assert!(html.contains("<dt>Dead experts</dt><dd>43 <small>of 48</small>"), "the tile");
    assert!(!page(vec![layer(1, &[0, 150], Some(0))]).contains("Dead experts at the end"));
    // A file that does not tell, or not rightly, has no list; the tile counts experts without a load.
    for dead in [None, Some(3)] {
        let html = page(vec![layer(1, &[0, 150], dead)]);
        assert!(!html.contains("Dead experts at the end") && html.contains("<dt>Idle experts</dt><dd>0 "), "{dead:?}");
    }
}

#[test]
fn alarms_are_listed_and_many_are_counted() {
    let mut records = run(50, 1, &[(1, 4)]);
    assert!(!render(&facts(), &records).contains("class=\"alarm\""));
    let alarm = |step| {
        let (alarm, expert) = (AlarmKind::DeadExperts, Some(3));
        Record::Alarm(AlarmRecord { step, alarm, layer: 1, expert, value: 7.0, limit: 7.0 })
    };
    records.push(alarm(50));
    let html = render(&facts(), &records);
    check(&html);
    assert!(html.contains("1 alarm<") && html.contains("step 50: layer 1, expert 3: no token for 7 steps"));
    records.extend((51..5000).map(alarm));
    let html = render(&facts(), &records);
    check(&html);
    assert!(html.contains("4,950 alarms") && html.contains("and 4,942 more"), "counted");
}

#[test]
fn odd_runs_give_a_page_too() {
    let mut records = run(50, 1, &[(0, 1), (1, 2)]);
    let one = records[..1].to_vec();
    let evals: Vec<Record> = records.iter().filter(|r| matches!(r, Record::Eval(_))).cloned().collect();
    for (from, to) in [(0, 0), (0, 1), (0, records.len())] {
        check(&render(&RunFacts::default(), &records[from..to]));
    }
    check(&render(&facts(), &one));
    check(&render(&facts(), &evals));
    assert!(render(&facts(), &[]).contains("No measurements yet"));

    let bad =
        TrainRecord { step: 51, loss: f64::NAN, lm_loss: f64::NAN, grad_norm: f64::INFINITY, ..TrainRecord::default() };
    records.push(Record::Train(bad.clone()));
    let nan_load = LayerLoad { layer: 1, load: vec![f32::NAN, 0.0], dropped: f32::NAN, ..LayerLoad::default() };
    records.push(Record::Train(TrainRecord { step: 52, experts: vec![nan_load], ..bad }));
    let html = render(&facts(), &records);
    check(&html);
    assert!(html.contains("not finite at step 51"));
}

#[test]
fn the_size_is_bounded_for_long_runs_and_many_experts() {
    let layers: Vec<(usize, usize)> = (0..4).map(|i| (2 * i + 1, 512)).collect();
    let html = render(&facts(), &run(1_000_000, 5000, &layers));
    check(&html);
    assert!(html.len() < 3_000_000, "{} bytes", html.len());
    let long = render(&facts(), &run(1_000_000, 50, &[(1, 8)]));
    check(&long);
    assert!(long.len() < 400_000, "{} bytes", long.len());
}

#[test]
fn text_cannot_break_out() {
    let nasty = "</pre><script>alert('x')</script>&\"";
    let facts = RunFacts {
        title: nasty.to_owned(),
        command: nasty.to_owned(),
        config: nasty.to_owned(),
        device: nasty.to_owned(),
        more: vec![(nasty.to_owned(), nasty.to_owned())],
        ..RunFacts::default()
    };
    let html = render(&facts, &run(20, 1, &[]));
    check(&html);
    assert!(!html.contains("alert('x')"));
}

#[test]
fn the_page_is_written_from_the_file_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (metrics, page) = (dir.path().join("metrics.jsonl"), dir.path().join("report.html"));
    assert!(matches!(write_report(&page, &facts(), &metrics), Err(ReportError::Metrics(_))));
    let records = run(100, 1, &[(1, 4)]);
    let mut writer = MetricsWriter::create(&metrics).unwrap();
    records.iter().for_each(|record| writer.write(record).unwrap());
    write_report(&page, &facts(), &metrics).unwrap();
    assert_eq!(std::fs::read_to_string(&page).unwrap(), render(&facts(), &records));

    // A bad line: no page is made and the one that is there stays.
    std::fs::write(&metrics, "nonsense\n").unwrap();
    assert!(matches!(write_report(&page, &facts(), &metrics), Err(ReportError::Metrics(_))));
    assert!(std::fs::read_to_string(&page).unwrap().contains("tiny-pr-moe"));
    let nowhere = dir.path().join("none/report.html");
    std::fs::write(&metrics, "").unwrap();
    assert!(matches!(write_report(&nowhere, &facts(), &metrics), Err(ReportError::Write { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file stays");
}

/// Runs of every length make a page of bounded size. `MOEBIUS_REPORT_SAMPLES=folder` keeps the pages, to be looked at.
#[test]
fn pages_stay_small_however_long_the_run() {
    let folder = std::env::var_os("MOEBIUS_REPORT_SAMPLES").map(PathBuf::from);
    let mut pages = vec![("usual", run(2000, 1, &[(1, 8), (3, 8), (5, 16)]))];
    pages.push(("many", run(300_000, 1000, &[(1, 32), (3, 64), (5, 128), (7, 512)])));
    let deep: Vec<(usize, usize)> = (0..40).map(|i| (2 * i + 1, 16)).collect();
    pages.push(("deep", run(20_000, 10, &deep)));
    pages.push(("short", run(6, 1, &[(1, 1), (3, 2)])));
    for (name, records) in pages {
        let page = render(&facts(), &records);
        assert!(page.len() < 2 << 20, "{name}: {} bytes", page.len());
        if let Some(folder) = &folder {
            std::fs::write(folder.join(name).with_extension("html"), page).unwrap();
        }
    }
}

#[test]
fn a_distilled_run_shows_its_term_and_where_the_teacher_left() {
    let taught = |until: u64| {
        let mut records = run(1000, 10, &[]);
        for record in &mut records {
            if let Record::Train(train) = record
                && train.step <= until
            {
                train.kd_loss = Some(0.5 + 0.1 * noise(train.step, 9));
            }
        }
        render(&facts(), &records)
    };
    let html = taught(700);
    check(&html);
    assert!(html.contains("Distillation") && html.contains("class=\"mark\""), "{html}");
    assert!(html.contains("<th scope=\"row\">Teacher</th><td>left after step 700</td>"), "{html}");
    let html = taught(1000);
    assert!(html.contains("<td>followed to the end</td>") && !html.contains("class=\"mark\""));
    let html = taught(0);
    assert!(!html.contains("Distillation") && !html.contains("Teacher"));
}
