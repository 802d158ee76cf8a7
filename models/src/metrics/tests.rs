use super::*;

fn train(step: u64) -> Record {
    let load = LayerLoad {
        layer: 1,
        load: vec![0.25, 0.7500001, 0.0],
        dropped: 0.125,
        entropy: Some(1.0 / 3.0),
        logit_scale: Some(7.5),
        coefficient: (step > 2).then_some(0.1),
        idle: vec![0, 0, step as u32],
        dead: Some(1),
    };
    Record::Train(TrainRecord {
        step,
        tokens: step * 2048,
        loss: 2.5 / step as f64,
        lm_loss: 2.4 / step as f64,
        aux_loss: 0.01,
        kd_loss: (step < 3).then_some(0.7 / step as f64),
        lr: 3e-4,
        grad_norm: 1.0 / 3.0,
        tokens_per_s: 51234.5,
        experts: if step.is_multiple_of(2) { vec![load] } else { Vec::new() },
    })
}

fn eval(step: u64) -> Record {
    Record::Eval(EvalRecord { step, tokens: step * 2048, val_loss: 1.75, bits_per_byte: 2.5 })
}

fn read(path: &Path) -> Vec<Record> {
    MetricsReader::open(path).unwrap().collect::<Result<_, _>>().unwrap()
}

fn written(path: &Path, steps: std::ops::RangeInclusive<u64>) -> Vec<Record> {
    let mut writer = MetricsWriter::create(path).unwrap();
    let records: Vec<Record> = steps.flat_map(|step| [train(step), eval(step)]).collect();
    records.iter().for_each(|record| writer.write(record).unwrap());
    records
}

#[test]
fn lines_have_the_documented_keys_and_come_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let records = written(&path, 1..=4);
    // Read while the writer may still live: every line is out as soon as `write` returned.
    assert_eq!(read(&path), records);
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for key in ["step", "tokens", "loss", "lm_loss", "aux_loss", "lr", "grad_norm", "tokens_per_s"] {
        assert!(lines[2][key].is_number(), "{key}");
    }
    assert!(lines[0]["kd_loss"].is_number() && lines[4].get("kd_loss").is_none(), "{lines:?}");
    assert_eq!(lines[2]["experts"][0]["load"][0], 0.25);
    for key in ["entropy", "logit_scale"] {
        assert!(lines[2]["experts"][0][key].is_number(), "{key}");
    }
    assert!(lines[2]["experts"][0]["coefficient"].is_null() && lines[2]["experts"][0]["idle"][2] == 2);
    assert_eq!(
        (&lines[1]["kind"], &lines[1]["val_loss"], &lines[1]["bits_per_byte"]),
        (&"eval".into(), &1.75.into(), &2.5.into())
    );
}

#[test]
fn an_alarm_is_a_line_of_its_own_and_older_loads_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let alarm =
        AlarmRecord { step: 9, alarm: AlarmKind::DeadExperts, layer: 3, expert: Some(5), value: 7.0, limit: 7.0 };
    MetricsWriter::create(&path).unwrap().write(&Record::Alarm(alarm.clone())).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let wanted = r#"{"kind":"alarm","step":9,"alarm":"dead-experts","layer":3,"expert":5,"value":7.0,"limit":7.0}"#;
    assert_eq!(text.trim_end(), wanted);
    assert_eq!(read(&path), [Record::Alarm(alarm)]);
    let older: LayerLoad = serde_json::from_str(r#"{"layer":1,"load":[1.0,0.0],"dropped":0.5}"#).unwrap();
    let wanted = LayerLoad { layer: 1, load: vec![1.0, 0.0], dropped: 0.5, ..LayerLoad::default() };
    assert_eq!(older, wanted);
}

#[test]
fn a_file_cut_at_any_byte_reads_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let records = written(&path, 1..=3);
    let whole = std::fs::read(&path).unwrap();
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        // A line counts once all of it but its line break is there.
        let lines = whole[..cut].iter().filter(|&&b| b == b'\n').count();
        let lines = lines + usize::from(whole.get(cut) == Some(&b'\n'));
        assert_eq!(read(&path), records[..lines]);
        MetricsWriter::resume(&path, 3).unwrap().write(&train(9)).unwrap();
        assert_eq!(read(&path), [&records[..lines], &[train(9)]].concat(), "cut at {cut}");
    }
}

#[test]
fn resume_drops_what_is_beyond_its_step_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    for step in 0..=6 {
        let records = written(&path, 1..=5);
        let mut writer = MetricsWriter::resume(&path, step).unwrap();
        let mut want: Vec<Record> = records.into_iter().filter(|record| record.step() <= step).collect();
        assert_eq!(read(&path), want);
        writer.write(&train(step + 1)).unwrap();
        want.push(train(step + 1));
        assert_eq!(read(&path), want);
    }
    let fresh = dir.path().join("fresh.jsonl");
    MetricsWriter::resume(&fresh, 3).unwrap().write(&eval(4)).unwrap();
    assert_eq!(read(&fresh), [eval(4)]);
}

#[test]
fn a_bad_line_is_named_and_the_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    written(&path, 1..=2);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice(b"{\"kind\":\"train\",\"step\":\"three\"}\n{}");
    std::fs::write(&path, &bytes).unwrap();
    let error = MetricsReader::open(&path).unwrap().find_map(Result::err).unwrap();
    assert!(matches!(&error, MetricsError::Line { line: 5, .. }));
    assert!(error.to_string().contains("metrics.jsonl:5"), "{error}");
    assert!(matches!(MetricsWriter::resume(&path, 9), Err(MetricsError::Line { line: 5, .. })));
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    // A line beyond the resumed step ends the part that is kept, so what comes after it does not matter.
    assert!(MetricsWriter::resume(&path, 1).is_ok());
}

#[test]
fn unknown_fields_are_ignored_and_non_finite_numbers_survive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    std::fs::write(
        &path,
        "{\"later\":[1],\"kind\":\"eval\",\"step\":7,\"tokens\":1,\"val_loss\":2.0,\"bits_per_byte\":3.0}\n\n",
    )
    .unwrap();
    assert_eq!(read(&path), [Record::Eval(EvalRecord { step: 7, tokens: 1, val_loss: 2.0, bits_per_byte: 3.0 })]);
    let mut writer = MetricsWriter::create(&path).unwrap();
    writer.write(&Record::Eval(EvalRecord { val_loss: f64::INFINITY, ..EvalRecord::default() })).unwrap();
    match &read(&path)[0] {
        Record::Eval(record) => assert!(record.val_loss.is_nan()),
        Record::Train(_) | Record::Alarm(_) => panic!("an evaluation was written"),
    }
    assert!(matches!(MetricsWriter::create(dir.path()), Err(MetricsError::Io { action: "create", .. })));
}
