use super::*;
use crate::config::Config;

#[test]
fn lists_are_read_and_wrong_ones_are_named() {
    let all = Alarms::parse("dead-experts=100, drop=0.3,entropy=0.1,coefficient=0.05..0.95,logit-scale=20").unwrap();
    let wanted = Alarms {
        dead_experts: Some(100),
        drop: Some(0.3),
        entropy: Some(0.1),
        coefficient: Some([0.05, 0.95]),
        logit_scale: Some(20.0),
    };
    assert_eq!(all, wanted);
    let told = |text: &str| Alarms::parse(text).unwrap_err().to_string();
    assert!(told("dead-expert=3").contains("nearest: dead-experts"), "{}", told("dead-expert=3"));
    assert!(told("zzz=3").contains("there are dead-experts, drop"), "{}", told("zzz=3"));
    assert!(told("drop").contains("key=value") && told("").contains("key=value"));
    assert!(told("drop=0.1,drop=0.2").contains("twice"));
    for wrong in [
        "dead-experts=0",
        "dead-experts=-1",
        "dead-experts=1.5",
        "drop=1",
        "drop=nan",
        "drop=",
        "entropy=0",
        "entropy=inf",
        "coefficient=0.5",
        "coefficient=0.9..0.1",
        "coefficient=0..1.1",
        "logit-scale=x",
    ] {
        assert!(matches!(Alarms::parse(wrong), Err(AlarmError::Value { .. })), "{wrong}");
    }
}

#[test]
fn alarms_that_a_model_cannot_give_are_refused() {
    let model = |sets: &[&str]| {
        let mut config = Config::preset("tiny-pr-moe").unwrap();
        sets.iter().for_each(|set| config.set(set).unwrap());
        config.model
    };
    let check = |text: &str, sets: &[&str]| Alarms::parse(text).unwrap().check(&model(sets));
    assert!(check("dead-experts=9,coefficient=0.1..0.9", &[]).is_ok());
    assert!(matches!(check("drop=0.3", &[]), Err(AlarmError::Never { key: "drop", .. })));
    assert!(check("drop=0.3", &["model.capacity_factor=1"]).is_ok());
    let standard = check("coefficient=0.1..0.9", &["model.mlp=standard"]);
    assert!(matches!(standard, Err(AlarmError::Never { key: "coefficient", .. })));
    let dense = check("dead-experts=9", &["model.experts=[1]"]);
    assert!(matches!(dense, Err(AlarmError::Never { key: "dead-experts", .. })));
}

fn load(dropped: f32, idle: &[u32]) -> LayerLoad {
    LayerLoad { layer: 1, dropped, idle: idle.to_vec(), coefficient: Some(0.5), ..LayerLoad::default() }
}

#[test]
fn an_event_is_told_once_and_again_after_it_was_over() {
    let mut watch = Watch::default();
    watch.set(Alarms::parse("dead-experts=3,drop=0.25,coefficient=0.2..0.4").unwrap());
    let mut told = Vec::new();
    for step in 1..=500u64 {
        // Expert 1 is without a token in steps 2 to 9 and from 21 on; drops are too many in every second step up to 20, then
        // in step 200.
        let idle = match step {
            2..10 => step as u32 - 1,
            21.. => step as u32 - 20,
            _ => 0,
        };
        let dropped = if (step <= 20 && step % 2 == 0) || step == 200 { 0.5 } else { 0.25 };
        // The state goes through its text on the way, as in a checkpoint.
        watch = serde_json::from_str(&serde_json::to_string(&watch).unwrap()).unwrap();
        told.extend(watch.look(step, &[load(dropped, &[0, idle])]));
    }
    let lines: Vec<(u64, AlarmKind, Option<usize>, f64)> =
        told.iter().map(|r| (r.step, r.alarm, r.expert, r.value)).collect();
    let wanted = [
        (1, AlarmKind::Coefficient, None, 0.5),
        (2, AlarmKind::Drop, None, 0.5),
        (4, AlarmKind::DeadExperts, Some(1), 3.0),
        (23, AlarmKind::DeadExperts, Some(1), 3.0),
        (200, AlarmKind::Drop, None, 0.5),
    ];
    assert_eq!(lines, wanted);
    let text = told[2].to_string();
    for part in ["layer 1", "expert 1", "step 4", "3 steps", "limit 3"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(told[0].to_string().contains("at most 0.4") && told[1].to_string().contains("50.0 %"));

    // Another limit tells again, the same one does not.
    watch.set(Alarms::parse("dead-experts=3,drop=0.25,coefficient=0.2..0.3").unwrap());
    let again = watch.look(501, &[load(0.0, &[0, 481])]);
    assert_eq!(again.iter().map(|r| r.alarm).collect::<Vec<_>>(), [AlarmKind::Coefficient]);
    assert!(Watch::default().look(1, &[load(1.0, &[99; 4])]).is_empty());
}
