//! `cost`: what a loss costs with dense models of several sizes, MoE, PR-MoE and its student: one table.

use crate::study::scale::Zoo;
use crate::study::{Axis, Claim, Condition, Measure, Plot, Study, StudyError};

pub(super) fn describe(zoo: &Zoo) -> Result<Study, StudyError> {
    let (base, large) = ("dense", "dense-large");
    let less = |of, than| Condition::LessTraining { of, than, times: 2.0 };
    Ok(Study {
        name: "cost",
        title: "Cost: what a loss takes to train and to run",
        question: "Parameters, loss, training and generation of dense and sparse models side by side, on equal text. Training to \
                   reach a dense model's final loss is read off the evaluation curve between two evaluations. A curve's middle is \
                   taken with its learning rate still high, so what a sparse model needs is rather over- than understated. FLOPs of a \
                   student include its teacher's forward passes, not the teacher's own training.",
        arms: vec![
            zoo.dense_small(),
            zoo.dense(),
            zoo.dense_large(),
            zoo.moe(),
            zoo.pr_moe(),
            zoo.student()?,
            zoo.distilled("staged-kd", 0.7)?.called("pr-moe+mos"),
        ],
        columns: vec![
            Measure::Parameters,
            Measure::ActiveParameters,
            Measure::ValidationLoss,
            Measure::TestBits,
            Measure::TrainingFlops,
            Measure::TrainingSeconds,
            Measure::FlopsToReach(base),
            Measure::SecondsToReach(base),
            Measure::LessTraining(base),
            Measure::LessTime(base),
            Measure::FlopsToReach(large),
            Measure::SecondsToReach(large),
            Measure::LessTraining(large),
            Measure::LessTime(large),
            Measure::StepMs,
            Measure::DecodeMs,
            Measure::TrainingMemory,
            Measure::WeightBytes,
            Measure::LearningRate,
            Measure::AuxCoef,
        ],
        plots: vec![Plot::Curves(Axis::Flops), Plot::Scatter(Measure::Parameters), Plot::Scatter(Measure::DecodeMs)],
        claims: vec![
            Claim {
                text: "The MoE reaches the loss of the dense model of its width and depth with at most half of its training FLOPs.",
                source: "3.2 and 3.3: 5 times less training",
                conditions: vec![less("moe", base)],
            },
            Claim {
                text: "PR-MoE reaches that loss with at most half of the training FLOPs.",
                source: "4.1.4",
                conditions: vec![less("pr-moe", base)],
            },
            Claim {
                text: "The MoE reaches the loss of a larger dense model with at most half of its training FLOPs.",
                source: "3.2: 350M+MoE-128 has the loss of the 1.3B dense model",
                conditions: vec![less("moe", large)],
            },
            Claim {
                text: "PR-MoE reaches the loss of that larger dense model with at most half of its training FLOPs.",
                source: "4.1.4",
                conditions: vec![less("pr-moe", large)],
            },
        ],
    })
}
