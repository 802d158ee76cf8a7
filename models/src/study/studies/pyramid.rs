//! `pyramid`: which layers need the experts (DeepSpeed-MoE 4.1, phenomenon I).

use crate::study::scale::Zoo;
use crate::study::{Axis, Claim, Condition, Measure, Plot, Study, StudyError};

pub(super) fn describe(zoo: &Zoo) -> Result<Study, StudyError> {
    Ok(Study {
        name: "pyramid",
        title: "Pyramid: which layers need the experts",
        question: "The same number of feed-forward networks in all arms: all experts in the first half of the layers, all in the \
                   second half, spread evenly, or more and more of them towards the output. Top-1, dropless.",
        arms: vec![zoo.first_half(), zoo.second_half(), zoo.uniform(), zoo.pyramid()],
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
        plots: vec![Plot::Seeds, Plot::Curves(Axis::Tokens)],
        claims: vec![
            Claim {
                text: "Experts in the second half of the layers give a lower loss than in the first half.",
                source: "4.1.1, phenomenon I",
                conditions: vec![Condition::Lower { of: "second-half", than: "first-half", margin: 0.0 }],
            },
            Claim {
                text: "A pyramid gives a lower loss than as many experts spread evenly.",
                source: "4.1.2, of which the paper shows the combination with residual experts",
                conditions: vec![Condition::Lower { of: "pyramid", than: "uniform", margin: 0.0 }],
            },
        ],
    })
}
