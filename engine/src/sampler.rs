//! From logits to a token: greedy, or by temperature with a seed. The same logits and seed give the same token on
//! every machine and at every level.

use crate::math::softmax_numerators;
use crate::random::SplitMix64;
use crate::simd::Level;
use alloc::vec::Vec;
use model::numerics::REDUCE_LANES;

/// Picks tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    level: Level,
    temperature: f32,
    rng: SplitMix64,
    /// Probabilities before division by their sum, padded; kept between tokens.
    numerators: Vec<f32>,
}

impl Sampler {
    /// Greedy when `temperature` is not above 0 (NaN included), else drawn from `softmax(logits / temperature)`.
    pub fn new(level: Level, temperature: f32, seed: u64) -> Self {
        Self { level, temperature, rng: SplitMix64::new(seed), numerators: Vec::new() }
    }

    /// The next token.
    ///
    /// # Panics
    /// When `logits` is empty or longer than a token id can count.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.temperature > 0.0 { self.draw(logits) } else { greedy(logits) }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let len = logits.len();
        self.numerators.clear();
        self.numerators.extend(logits.iter().map(|logit| logit / self.temperature));
        self.numerators.resize(len.next_multiple_of(REDUCE_LANES), 0.0);
        softmax_numerators(self.level, &mut self.numerators, len);
        let weights = &self.numerators[..len];
        // Summed in f64 in token order, so that the walk below meets exactly this sum at its end.
        let sum = weights.iter().fold(0.0f64, |sum, &weight| sum + f64::from(weight));
        let target = sum * f64::from(self.rng.next_unit());
        let mut walked = 0.0f64;
        for (token, &weight) in weights.iter().enumerate() {
            walked += f64::from(weight);
            if walked > target {
                return id(token);
            }
        }
        greedy(logits)
    }
}

/// The token with the largest logit, the first of equals; NaN never wins.
///
/// # Panics
/// When `logits` is empty or longer than a token id can count.
pub fn greedy(logits: &[f32]) -> u32 {
    assert!(!logits.is_empty(), "no logits to choose from");
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || logits[best].is_nan() {
            best = token;
        }
    }
    id(best)
}

fn id(token: usize) -> u32 {
    u32::try_from(token).expect("a vocabulary has at most 2^32 tokens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals_and_no_nan() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(greedy(&[f32::NAN, -5.0, f32::NAN, -4.0]), 3);
        assert_eq!(greedy(&[f32::NEG_INFINITY; 3]), 0);
        assert_eq!(Sampler::new(Level::Portable, 0.0, 1).sample(&[0.0, 1.0]), 1);
        assert_eq!(Sampler::new(Level::Portable, f32::NAN, 1).sample(&[0.0, 1.0]), 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_repeat_with_the_seed() {
        // Weights 1 : 2 : 5 at temperature 2.
        let logits = [0.0, 2.0 * 2f32.ln(), 2.0 * 5f32.ln()];
        let mut counts = [0u32; 3];
        let mut sampler = Sampler::new(Level::detect(), 2.0, 42);
        let mut portable = Sampler::new(Level::Portable, 2.0, 42);
        for _ in 0..16_000 {
            let token = sampler.sample(&logits);
            assert_eq!(token, portable.sample(&logits));
            counts[token as usize] += 1;
        }
        for (count, want) in counts.into_iter().zip([2_000u32, 4_000, 10_000]) {
            assert!(count.abs_diff(want) < 250, "{counts:?}");
        }
        let other: [u32; 40] = core::array::from_fn(|_| Sampler::new(Level::Portable, 2.0, 42).sample(&logits));
        assert!(other.iter().all(|&token| token == other[0]), "a fresh sampler repeats its first draw");
    }
}
