//! The studies, one a file.

mod cost;
mod mos;
mod pr_moe;
mod pyramid;
mod residual;

use super::scale::Zoo;
use super::{Scale, Study, StudyError};

/// How far, in nats per token, two losses may lie apart that count as equal: what DeepSpeed-MoE states of PR-MoE and MoE.
const EQUAL: f64 = 0.01;

type Describe = fn(&Zoo) -> Result<Study, StudyError>;

const STUDIES: [(&str, Describe); 5] = [
    ("pyramid", pyramid::describe),
    ("residual", residual::describe),
    ("pr-moe", pr_moe::describe),
    ("mos", mos::describe),
    ("cost", cost::describe),
];

/// The names of all studies.
pub const NAMES: [&str; 5] = {
    let mut names = [""; 5];
    let mut i = 0;
    while i < names.len() {
        names[i] = STUDIES[i].0;
        i += 1;
    }
    names
};

/// The study of that name at a scale.
///
/// # Errors
/// [`StudyError::Unknown`] with all names.
pub fn study(name: &str, scale: Scale) -> Result<Study, StudyError> {
    match STUDIES.iter().find(|(known, _)| *known == name) {
        Some((_, describe)) => describe(&Zoo::new(scale)?),
        None => Err(StudyError::Unknown { found: name.to_owned(), known: &NAMES }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Condition, Training};
    use super::*;

    #[test]
    fn studies_name_only_arms_they_have() {
        for scale in [Scale::Smoke, Scale::Cpu, Scale::Gpu] {
            for name in NAMES {
                let study = study(name, scale).unwrap();
                assert_eq!(study.name, name);
                for (i, arm) in study.arms.iter().enumerate() {
                    arm.config.validate().unwrap();
                    assert_eq!(study.arm(arm.name), Some(i), "{name}: {} twice", arm.name);
                    if let Training::Distilled { teacher, .. } = arm.training {
                        assert!(study.arm(teacher).unwrap() < i, "{name}: a teacher comes first");
                    }
                    if let Some(other) = arm.tuned_as {
                        let other = &study.arms[study.arm(other).unwrap()];
                        assert!(other.tuned_as.is_none() && other.config == arm.config, "{name}");
                    }
                }
                let mut named = Vec::new();
                for condition in study.claims.iter().flat_map(|claim| &claim.conditions) {
                    match condition {
                        Condition::Lower { of, than, .. }
                        | Condition::AtMost { of, than, .. }
                        | Condition::LessTraining { of, than, .. } => named.extend([*of, *than]),
                    }
                }
                named.extend(study.columns.iter().filter_map(|column| column.reference()));
                for other in named {
                    assert!(study.arm(other).is_some(), "{name}: no arm {other}");
                }
                assert!(!study.claims.is_empty() && !study.plots.is_empty());
            }
        }
        assert!(matches!(study("nothing", Scale::Cpu), Err(StudyError::Unknown { .. })));
    }
}
