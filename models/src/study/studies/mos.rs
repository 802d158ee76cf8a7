//! `mos`: a shallower student of a PR-MoE, and when its teacher leaves (DeepSpeed-MoE 4.2, table 5).

use crate::study::scale::Zoo;
use crate::study::{Axis, Claim, Condition, Measure, Plot, Study, StudyError};

pub(super) fn describe(zoo: &Zoo) -> Result<Study, StudyError> {
    let (staged, throughout, alone) = ("staged-kd", "kd-throughout", "student");
    Ok(Study {
        name: "mos",
        title: "Mixture of Students: staged distillation",
        question: "A PR-MoE teaches a student with an eighth of its layers less (at least one MoE layer): never, throughout, or for \
                   the first 70 % of the run. Weight and temperature of the distillation are 1. The three students have the same \
                   settings; tuned, they are those found for the student without a teacher.",
        arms: vec![zoo.pr_moe(), zoo.student()?, zoo.distilled(throughout, 1.0)?, zoo.distilled(staged, 0.7)?],
        columns: vec![
            Measure::Parameters,
            Measure::ActiveParameters,
            Measure::ValidationLoss,
            Measure::TestBits,
            Measure::PlainStepMs,
            Measure::StepMs,
            Measure::CachedStepMs,
            Measure::TrainingFlops,
            Measure::LearningRate,
            Measure::AuxCoef,
        ],
        plots: vec![Plot::Seeds, Plot::Curves(Axis::Tokens)],
        claims: vec![
            Claim {
                text: "Staged distillation gives a lower loss than training from scratch.",
                source: "4.2, table 5",
                conditions: vec![Condition::Lower { of: staged, than: alone, margin: 0.0 }],
            },
            Claim {
                text: "Staged distillation gives a lower loss than distillation throughout.",
                source: "4.2, table 5",
                conditions: vec![Condition::Lower { of: staged, than: throughout, margin: 0.0 }],
            },
        ],
    })
}
