//! `residual`: a dense network beside one expert, against two experts (DeepSpeed-MoE 4.1, phenomenon II).

use super::EQUAL;
use crate::study::scale::Zoo;
use crate::study::{Axis, Claim, Condition, Measure, Plot, Study, StudyError};

pub(super) fn describe(zoo: &Zoo) -> Result<Study, StudyError> {
    let (top2, residual) = ("top-2", "residual-top-1");
    Ok(Study {
        name: "residual",
        title: "Residual: one expert and a dense network, or two experts",
        question: "Equal experts in every MoE layer. Top-2 and residual top-1 multiply a token with as many weights; top-1 with \
                   one network less. Dropless.",
        arms: vec![zoo.uniform().called("top-1"), zoo.top2(), zoo.residual()],
        columns: vec![
            Measure::Parameters,
            Measure::ActiveParameters,
            Measure::ValidationLoss,
            Measure::TestBits,
            Measure::DispatchBytes,
            Measure::StepMs,
            Measure::LearningRate,
            Measure::AuxCoef,
        ],
        plots: vec![Plot::Seeds, Plot::Curves(Axis::Tokens)],
        claims: vec![
            Claim {
                text: "Residual top-1 has the loss of top-2 (within 0.01 nats) with half of its dispatch.",
                source: "4.1.1, phenomenon II",
                conditions: vec![
                    Condition::Lower { of: residual, than: top2, margin: EQUAL },
                    Condition::AtMost { what: Measure::DispatchBytes, of: residual, than: top2, share: 0.5 },
                ],
            },
            Claim {
                text: "A step of residual top-1 takes at least a tenth less time than one of top-2.",
                source: "4.1.1: more than 10 % faster, on many GPUs",
                conditions: vec![Condition::AtMost { what: Measure::StepMs, of: residual, than: top2, share: 0.9 }],
            },
            Claim {
                text: "Residual top-1 has a lower loss than top-1.",
                source: "4.1.1, phenomenon II",
                conditions: vec![Condition::Lower { of: residual, than: "top-1", margin: 0.0 }],
            },
        ],
    })
}
