//! Routes that were taken, and a router that takes them again.

use std::collections::HashMap;

use moebius_ir::{Tensor, Value};
use moebius_models::config::{ModelConfig, Order};
use moebius_models::gpt::router::Source;

use super::machine::{Sheet, output};
use super::set::Problem;

/// Where the choices of a rank's tokens went.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Routes {
    /// The expert of every choice, `[N,k]`.
    pub(super) expert: Vec<f64>,
    /// Whether it found a slot, `[N,k]`.
    pub(super) kept: Vec<bool>,
}

impl Routes {
    /// Choices that went to another expert, or found a slot in one of the two only.
    pub(super) fn differing(&self, other: &Routes) -> usize {
        let pairs = self.expert.iter().zip(&other.expert).zip(self.kept.iter().zip(&other.kept));
        pairs.filter(|((a, b), (c, d))| a != b || c != d).count()
    }

    /// The choices of a graph that tells them as `expert_index` and `choice_slot`.
    ///
    /// # Errors
    /// [`Problem::Tensor`] if it does not.
    pub(super) fn taken(outputs: &HashMap<String, Vec<f64>>) -> Result<Routes, Problem> {
        Ok(Routes {
            expert: output(outputs, "expert_index")?.to_vec(),
            kept: output(outputs, "choice_slot")?.iter().map(|&slot| slot >= 0.0).collect(),
        })
    }

    /// Makes a router of `config` take these routes instead of its own: the choices i32 `[N,k]` and who is kept.
    ///
    /// # Errors
    /// Those of [`Sheet::input`].
    pub(super) fn forced(
        &self,
        sheet: &mut Sheet,
        config: &mut ModelConfig,
        tokens: usize,
        experts: usize,
    ) -> Result<(Value, Source), Problem> {
        let choices: Vec<i32> = self.expert.iter().map(|&e| e as i32).collect();
        let choices = sheet.input("choices", Tensor::i32([tokens, choices.len() / tokens.max(1)], &choices))?;
        // Whoever was kept comes first, whatever decided that.
        let kept = sheet.input("kept", self.priority(tokens, experts))?;
        config.router.get_or_insert_default().order = Some(Order::Random);
        Ok((choices, Source::Given(kept)))
    }

    /// f32 `[N,E]`: 1 for the expert of a choice that was kept, else 0.
    fn priority(&self, tokens: usize, experts: usize) -> Tensor {
        let mut data = vec![0.0; tokens * experts];
        let k = self.expert.len() / tokens.max(1);
        for (c, (expert, _)) in self.expert.iter().zip(&self.kept).enumerate().filter(|(_, (_, kept))| **kept) {
            data[c / k * experts + *expert as usize] = 1.0;
        }
        Tensor::f32([tokens, experts], data)
    }
}
