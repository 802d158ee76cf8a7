//! When the teacher leaves.

use std::fmt;
use std::str::FromStr;

/// Until when a student follows its teacher: a fraction of the run, or a number of steps or tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stop {
    /// 0 (never) to 1 (to the end) of the run's steps, rounded to a whole step.
    Fraction(f64),
    /// After so many steps.
    Steps(u64),
    /// After so many tokens, rounded up to whole steps.
    Tokens(u64),
}

/// What is no [`Stop`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "wanted a fraction of the run from 0 to 1, as 0.7, or a number of steps or tokens, as 400steps or 1000000tokens, found `{found}`"
)]
pub struct StopError {
    /// The text.
    pub found: String,
}

impl Default for Stop {
    /// 70 % of the run: the 400 thousand of 572 thousand steps of DeepSpeed-MoE's 350M student.
    fn default() -> Self {
        Stop::Fraction(0.7)
    }
}

impl Stop {
    /// The last step that follows the teacher, of `total` steps of `tokens_per_step` tokens; 0 if none does.
    pub fn step(self, total: u64, tokens_per_step: u64) -> u64 {
        let step = match self {
            // At most `total`, which the cast keeps: a fraction is at most 1.
            Stop::Fraction(fraction) => (fraction * total as f64).round() as u64,
            Stop::Steps(steps) => steps,
            Stop::Tokens(tokens) => tokens.div_ceil(tokens_per_step.max(1)),
        };
        step.min(total)
    }
}

impl FromStr for Stop {
    type Err = StopError;

    fn from_str(text: &str) -> Result<Self, StopError> {
        let wrong = || StopError { found: text.to_owned() };
        let number = |digits: &str| digits.trim().replace('_', "").parse::<u64>().map_err(|_| wrong());
        if let Some(digits) = text.strip_suffix("steps") {
            return Ok(Stop::Steps(number(digits)?));
        }
        if let Some(digits) = text.strip_suffix("tokens") {
            return Ok(Stop::Tokens(number(digits)?));
        }
        let fraction: f64 = text.trim().parse().map_err(|_| wrong())?;
        if (0.0..=1.0).contains(&fraction) { Ok(Stop::Fraction(fraction)) } else { Err(wrong()) }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Fraction(fraction) => write!(f, "{fraction}"),
            Stop::Steps(steps) => write!(f, "{steps}steps"),
            Stop::Tokens(tokens) => write!(f, "{tokens}tokens"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_read_and_become_steps() {
        let at = |text: &str| text.parse::<Stop>().map(|stop| stop.step(1000, 64));
        assert_eq!([at("0"), at("0.7"), at("1"), at("1.0")], [Ok(0), Ok(700), Ok(1000), Ok(1000)]);
        assert_eq!([at("12steps"), at("5000steps"), at("12 steps")], [Ok(12), Ok(1000), Ok(12)]);
        assert_eq!([at("64tokens"), at("65tokens"), at("1_000tokens"), at("0tokens")], [Ok(1), Ok(2), Ok(16), Ok(0)]);
        for wrong in ["", "2", "-0.1", "NaN", "400", "1e3steps", "tokens", "0.5x"] {
            assert!(at(wrong).is_err(), "{wrong}");
            assert!(at(wrong).unwrap_err().to_string().contains(&format!("`{wrong}`")));
        }
        for stop in [Stop::default(), Stop::Steps(7), Stop::Tokens(9)] {
            assert_eq!(stop.to_string().parse(), Ok(stop));
        }
    }
}
