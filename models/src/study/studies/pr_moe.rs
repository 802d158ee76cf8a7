//! `pr-moe`: loss against parameters (DeepSpeed-MoE 4.1.4).

use super::EQUAL;
use crate::study::scale::Zoo;
use crate::study::{Axis, Claim, Condition, Measure, Plot, Study, StudyError};

pub(super) fn describe(zoo: &Zoo) -> Result<Study, StudyError> {
    Ok(Study {
        name: "pr-moe",
        title: "PR-MoE: the loss of a MoE with a third of its parameters",
        question: "A dense model; one of the same width and depth with many experts in every MoE layer; and one with a pyramid of \
                   residual experts. Top-1, dropless.",
        arms: vec![zoo.dense(), zoo.moe(), zoo.pr_moe()],
        columns: vec![
            Measure::Experts,
            Measure::Parameters,
            Measure::ActiveParameters,
            Measure::ValidationLoss,
            Measure::TestBits,
            Measure::StepMs,
            Measure::LearningRate,
            Measure::AuxCoef,
        ],
        plots: vec![Plot::Scatter(Measure::Parameters), Plot::Curves(Axis::Tokens)],
        claims: vec![
            Claim {
                text: "PR-MoE has the loss of the MoE (within 0.01 nats) with about a third of its parameters (at most 0.4).",
                source: "4.1.4, table 2: 4 B against 13 B",
                conditions: vec![
                    Condition::Lower { of: "pr-moe", than: "moe", margin: EQUAL },
                    Condition::AtMost { what: Measure::Parameters, of: "pr-moe", than: "moe", share: 0.4 },
                ],
            },
            Claim {
                text: "The MoE has a lower loss than the dense model of its width and depth.",
                source: "3.2",
                conditions: vec![Condition::Lower { of: "moe", than: "dense", margin: 0.0 }],
            },
        ],
    })
}
