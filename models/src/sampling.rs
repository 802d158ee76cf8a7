//! Which token comes next: the most likely one, or one drawn from the likely ones.

use moebius::ir::philox;

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 means the most likely token.
    pub temperature: f32,
    /// Only the K most likely tokens; 0 means all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities reach P together; 1 means all.
    pub top_p: f32,
    /// Of the generator: the same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.8, top_k: 0, top_p: 0.95, seed: 0 }
    }
}

impl Sampling {
    /// The token chosen for position `index` of a text.
    pub fn choose(&self, logits: &[f32], index: u64) -> usize {
        let greedy = most_likely(logits);
        if self.temperature <= 0.0 {
            return greedy;
        }
        let top = logits.get(greedy).copied().unwrap_or(0.0);
        let weight = |l: f32| f64::from(((l - top) / self.temperature).exp());
        let mut tokens = Descending::new(logits, top, self.temperature);
        let limited = self.top_k > 0 && self.top_k < logits.len();
        let mut total: f64 = if limited {
            (0..self.top_k).map_while(|nth| tokens.get(nth)).map(|i| weight(logits[i])).sum()
        } else {
            logits.iter().filter(|l| **l > f32::NEG_INFINITY).map(|&l| weight(l)).sum()
        };
        let mut most = if limited { self.top_k } else { usize::MAX };
        if self.top_p < 1.0 {
            let (mut kept, mut count) = (0.0, 0);
            while let Some(i) = tokens.get(count).filter(|_| count < most) {
                kept += weight(logits[i]);
                count += 1;
                if kept / total >= f64::from(self.top_p) {
                    break;
                }
            }
            (total, most) = (kept, count);
        }
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let mut left = f64::from(philox::uniform(key, 0, index)) * total;
        let mut last = greedy;
        for nth in 0..most {
            let Some(i) = tokens.get(nth) else { break };
            left -= weight(logits[i]);
            last = i;
            if left < 0.0 {
                break;
            }
        }
        last
    }
}

/// The first of the most likely tokens.
pub fn most_likely(logits: &[f32]) -> usize {
    // The greatest of every LANES-th, side by side.
    const LANES: usize = 32;
    let (whole, rest) = logits.as_chunks::<LANES>();
    let mut greatest = [f32::NEG_INFINITY; LANES];
    for some in whole {
        for (most, &l) in greatest.iter_mut().zip(some) {
            *most = if l > *most { l } else { *most };
        }
    }
    let greatest = greatest.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &l| most.max(l));
    let is_there = |some: &&[f32; LANES]| some.iter().fold(false, |is, &l| is | (l == greatest));
    let before = whole.iter().take_while(|some| !is_there(some)).count() * LANES;
    logits[before..].iter().position(|&l| l == greatest).map_or(0, |at| before + at)
}

/// Tokens from the most likely one on, those of equal logits in their own order, so that the choice is the same everywhere. They are put in
/// order as they are asked for: mostly few of many are.
struct Descending<'a> {
    logits: &'a [f32],
    order: Vec<usize>,
    /// Those above it are in `order`.
    above: f32,
    /// The greatest logit, and how far below it the next ones that are put in order may be.
    top: f32,
    reach: f32,
}

impl Descending<'_> {
    fn new(logits: &[f32], top: f32, temperature: f32) -> Descending<'_> {
        Descending { logits, order: Vec::new(), above: f32::INFINITY, top, reach: 2.0 * temperature }
    }

    /// The token at this place.
    fn get(&mut self, nth: usize) -> Option<usize> {
        while self.order.len() <= nth && self.above > f32::NEG_INFINITY {
            // Where the next border is no lower in f32, or there is no end of borders, all that are left come at once.
            let next = self.top - self.reach;
            let next = if next < self.above && self.reach < 1e30 { next } else { f32::NEG_INFINITY };
            let (above, from) = (self.above, self.order.len());
            let those = |l: f32| l > next && l <= above;
            self.order.extend((0..self.logits.len()).filter(|&i| those(self.logits[i])));
            let logits = self.logits;
            self.order[from..].sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            self.above = next;
            self.reach *= 2.0;
        }
        self.order.get(nth).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`Sampling::choose`] is, by sorting all tokens.
    fn by_sorting(s: &Sampling, logits: &[f32], index: u64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f32::NEG_INFINITY).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k);
        }
        let weight = |i: usize| f64::from((logits[i] - logits[order[0]]) / s.temperature).exp();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut kept = 0.0;
        let enough = order.iter().position(|&i| {
            kept += weight(i);
            kept / total >= f64::from(s.top_p)
        });
        let order = &order[..enough.map_or(order.len(), |last| last + 1)];
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut left = f64::from(philox::uniform([s.seed as u32, 0], 0, index)) * total;
        let drawn = order.iter().find(|&&i| {
            left -= weight(i);
            left < 0.0
        });
        *drawn.unwrap_or(&order[order.len() - 1])
    }

    #[test]
    fn tokens_are_drawn_as_if_all_were_sorted() {
        let mut differ = 0;
        for case in 0..300u64 {
            let n = 1 + (case as usize * 37) % 700;
            let spread = [0.0, 0.3, 3.0, 40.0][case as usize % 4];
            let number = |i: usize| philox::uniform([case as u32, 7], 1, i as u64);
            // Some are alike, some are ruled out.
            let logit = |i: usize| match i % 11 {
                3 => f32::NEG_INFINITY,
                5 => spread * 0.25,
                _ => spread * (number(i) - 0.5),
            };
            let logits: Vec<f32> = (0..n).map(logit).collect();
            let (top_k, top_p) = ([0, 1, 5, 10_000][case as usize % 4], [1.0, 0.5, 0.95, 0.999][case as usize / 4 % 4]);
            let s = Sampling { temperature: [0.8, 0.1, 5.0][case as usize % 3], top_k, top_p, seed: case };
            differ += (0..20).filter(|&i| s.choose(&logits, i) != by_sorting(&s, &logits, i)).count();
        }
        // Weights here are f32, there f64: one draw of many may fall on the other side of a border.
        assert!(differ <= 3, "{differ} of 6000");
    }

    #[test]
    fn the_most_likely_is_the_first_of_the_greatest() {
        for n in [1, 2, 31, 32, 33, 100, 1000] {
            for at in [0, n / 2, n - 1] {
                let mut logits: Vec<f32> = (0..n).map(|i| -1.0 - (i * 7 % 5) as f32).collect();
                logits[at] = 2.5;
                logits[n - 1] = 2.5;
                assert_eq!(most_likely(&logits), at, "{n} {at}");
            }
        }
        assert_eq!(most_likely(&[f32::NEG_INFINITY; 40]), 0);
        assert_eq!(most_likely(&[f32::NAN, 1.0, f32::NAN]), 1);
        assert_eq!(most_likely(&[]), 0);
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_most_likely() {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(sampling.choose(&[0.0, 3.0, 3.0, 1.0], 0), 1);
    }

    #[test]
    fn top_k_and_top_p_leave_only_likely_tokens() {
        let logits = [0.0, 2.0, 1.0, -1.0];
        let k = Sampling { temperature: 1.0, top_k: 2, top_p: 1.0, seed: 7 };
        let p = Sampling { temperature: 1.0, top_k: 0, top_p: 0.5, seed: 7 };
        let all = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 7 };
        let chosen = |s: &Sampling| (0..400).map(|i| s.choose(&logits, i)).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(chosen(&k), [1, 2].into());
        assert_eq!(chosen(&p), [1].into());
        assert_eq!(chosen(&all), [0, 1, 2, 3].into());
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };
        let n = 20_000;
        let hits = (0..n).filter(|&i| sampling.choose(&[0.0, 1.0], i) == 1).count();
        let share = hits as f64 / n as f64;
        let wanted = 1.0 / (1.0 + (-1.0f64).exp());
        assert!((share - wanted).abs() < 0.015, "{share} for {wanted}");
    }
}
