//! From logits to a token, by a chain of filters: bans and penalties for what was said, then top-k, top-p and min-p, then
//! a draw at a temperature, or the best. The same logits, history and seed give the same token on every machine and at
//! every level: all sums are in f64 in a stated order, and equals go by token id.
//!
//! Input: logits and the tokens so far -> [`Sampler::sample`] -> a token. Not here: stop strings, which are about text
//! (`model::tokenizer::StopStrings`), and the end-of-generation set (`model::Tokenizer`).
//!
//! # Source
//! Top-k: A. Fan et al., 2018. Top-p: A. Holtzman et al., 2020. Min-p: N. N. Minh et al., 2024. Repetition penalty:
//! N. S. Keskar et al., "CTRL", 2019. No-repeat n-grams: R. Paulus et al., 2017. Their order is that of llama.cpp.

use crate::math::softmax_numerators;
use crate::random::SplitMix64;
use crate::simd::{self, Level};
use alloc::vec::Vec;
use model::numerics::REDUCE_LANES;
use model::order::order;

/// Settings of the chain; each filter has a value that switches it off, which is its default.
#[derive(Clone, PartialEq, Debug)]
pub struct Sampling {
    /// Greedy when not above 0 (NaN included), else logits are divided by it before the draw.
    pub temperature: f32,
    /// Draw from this many best tokens only; 0 is off.
    pub top_k: u32,
    /// Draw from the fewest best tokens whose probabilities reach this sum; 1 is off.
    pub top_p: f32,
    /// Draw from tokens at least this probable relative to the best; 0 is off.
    pub min_p: f32,
    /// Logits of tokens in the window are divided by it (multiplied when negative); 1 is off.
    pub repeat_penalty: f32,
    /// Last tokens that the penalty looks at; 0 is all.
    pub repeat_window: u32,
    /// No sequence of this many tokens occurs twice; 0 is off.
    pub no_repeat_ngram: u32,
    /// A token that would end the text in this many equal stretches is banned once, and another is picked; 0 is off.
    pub loop_escape: u32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_window: 64,
            no_repeat_ngram: 0,
            loop_escape: 0,
            seed: 1,
        }
    }
}

/// Longest stretch that loop escape recognises, in tokens.
pub const MAX_LOOP: usize = 128;

/// Picks tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    level: Level,
    settings: Sampling,
    rng: SplitMix64,
    /// Logits after bans and penalties.
    logits: Vec<f32>,
    /// One bit for each token: its penalty was paid.
    said: Vec<u64>,
    /// Tokens still in the draw.
    candidates: Vec<u32>,
    /// Their probabilities before division by the sum, padded.
    numerators: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    pub fn new(level: Level, settings: Sampling) -> Self {
        let rng = SplitMix64::new(settings.seed);
        Self {
            level,
            settings,
            rng,
            logits: Vec::new(),
            said: Vec::new(),
            candidates: Vec::new(),
            numerators: Vec::new(),
        }
    }

    /// The next token after `history` (prompt included).
    ///
    /// # Panics
    /// When `logits` is empty or longer than a token id can count.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.penalise(history);
        self.ban_ngrams(history);
        let token = self.pick();
        let repeats = self.settings.loop_escape as usize;
        if repeats > 1 && ends_in_loop(history, token, repeats) {
            self.logits[token as usize] = f32::NEG_INFINITY;
            return self.pick();
        }
        token
    }

    fn penalise(&mut self, history: &[u32]) {
        let Sampling { repeat_penalty: penalty, repeat_window, .. } = self.settings;
        if penalty == 1.0 {
            return;
        }
        let seen = match repeat_window as usize {
            0 => history,
            window => &history[history.len().saturating_sub(window)..],
        };
        self.said.clear();
        self.said.resize(self.logits.len().div_ceil(64), 0);
        for &token in seen {
            let (word, bit) = (token as usize / 64, 1u64 << (token % 64));
            let (Some(logit), Some(said)) = (self.logits.get_mut(token as usize), self.said.get_mut(word)) else {
                continue;
            };
            // Once a token, however often it occurred.
            if *said & bit == 0 {
                *said |= bit;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    fn ban_ngrams(&mut self, history: &[u32]) {
        let Some(prefix_len) = (self.settings.no_repeat_ngram as usize).checked_sub(1) else { return };
        let Some(start) = history.len().checked_sub(prefix_len) else { return };
        let prefix = &history[start..];
        for (before, &after) in history.windows(prefix_len.max(1)).zip(&history[prefix_len.min(history.len())..]) {
            if (prefix_len == 0 || before == prefix)
                && let Some(logit) = self.logits.get_mut(after as usize)
            {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// The best, or a draw from what the filters leave.
    fn pick(&mut self) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.settings;
        let is_warm = temperature > 0.0;
        if !is_warm {
            return greedy_at(self.level, &self.logits);
        }
        self.candidates.clear();
        if top_k > 0 {
            best(&self.logits, top_k as usize, &mut self.candidates);
        } else {
            self.candidates.extend(0..id(self.logits.len()));
        }
        if top_p < 1.0 {
            self.keep_nucleus(top_p, top_k > 0);
        }
        if min_p > 0.0 {
            self.weigh(1.0);
            let mut weights = self.numerators.iter();
            // The best token's numerator is exp(0) = 1.
            self.candidates.retain(|_| weights.next().is_some_and(|&weight| weight >= min_p));
        }
        let sum = self.weigh(temperature);
        let target = sum * f64::from(self.rng.next_unit());
        let mut walked = 0.0f64;
        for (&token, &weight) in self.candidates.iter().zip(&self.numerators) {
            walked += f64::from(weight);
            if walked > target {
                return token;
            }
        }
        greedy_at(self.level, &self.logits)
    }

    /// Keeps the fewest best candidates whose probabilities reach `top_p` together; at least one.
    fn keep_nucleus(&mut self, top_p: f32, is_sorted: bool) {
        let reach = self.weigh(1.0) * f64::from(top_p);
        if !is_sorted {
            // All tokens that are this improbable together hold less than what may be left out: they need no sorting.
            let least = (self.numerators_sum() - reach) / self.candidates.len() as f64;
            let mut weights = self.numerators.iter();
            self.candidates.retain(|_| weights.next().is_some_and(|&weight| f64::from(weight) >= least));
            let (logits, candidates) = (&self.logits, &self.candidates);
            let logit = |i: usize| logits[candidates[i] as usize];
            let sorted = order(candidates.len(), &|a, b| logit(b).total_cmp(&logit(a)));
            self.candidates = sorted.into_iter().map(|i| candidates[i]).collect();
            self.weigh(1.0);
        }
        let mut walked = 0.0f64;
        let outside = self.numerators.iter().take(self.candidates.len()).position(|&weight| {
            walked += f64::from(weight);
            walked >= reach
        });
        if let Some(last) = outside {
            self.candidates.truncate(last + 1);
        }
    }

    /// Makes the candidates' numerators at `temperature` and returns their sum, in candidate order: a walk over them
    /// meets exactly this sum at its end.
    fn weigh(&mut self, temperature: f32) -> f64 {
        let len = self.candidates.len();
        self.numerators.clear();
        let logit = |token: &u32| self.logits[*token as usize];
        let max = self.candidates.iter().map(logit).fold(f32::NEG_INFINITY, f32::max);
        // Differences first: a logit over a tiny temperature would be infinite, and infinities have no difference.
        let below = |token: &u32| if max.is_finite() { logit(token) - max } else { logit(token) };
        self.numerators.extend(self.candidates.iter().map(|token| below(token) / temperature));
        self.numerators.resize(len.next_multiple_of(REDUCE_LANES), 0.0);
        softmax_numerators(self.level, &mut self.numerators, len);
        // Clamped exponentials of banned tokens are small, not zero.
        for (weight, &token) in self.numerators.iter_mut().zip(&self.candidates) {
            if self.logits[token as usize] == f32::NEG_INFINITY {
                *weight = 0.0;
            }
        }
        self.numerators_sum()
    }

    fn numerators_sum(&self) -> f64 {
        self.numerators.iter().take(self.candidates.len()).fold(0.0, |sum, &weight| sum + f64::from(weight))
    }
}

/// The `count` best tokens, best first, into `out`: equal logits by ascending id, NaN never.
fn best(logits: &[f32], count: usize, out: &mut Vec<u32>) {
    for (token, &logit) in logits.iter().enumerate() {
        let is_full = out.len() == count;
        if logit.is_nan() || is_full && out.last().is_some_and(|&last| logits[last as usize] >= logit) {
            continue;
        }
        let at = out.partition_point(|&other| logits[other as usize] >= logit);
        if is_full {
            out.pop();
        }
        out.insert(at, id(token));
    }
    if out.is_empty() {
        out.push(greedy(logits));
    }
}

/// True when `history` and `token` end in `repeats` equal stretches of up to [`MAX_LOOP`] tokens.
fn ends_in_loop(history: &[u32], token: u32, repeats: usize) -> bool {
    let len = history.len() + 1;
    let at = |i: usize| history.get(i).copied().unwrap_or(token);
    (1..=MAX_LOOP).take_while(|period| period * repeats <= len).any(|period| {
        let start = len - period * repeats;
        (start..len - period).all(|i| at(i) == at(i + period))
    })
}

/// The token with the largest logit, the first of equals; NaN never wins.
///
/// # Panics
/// When `logits` is empty or longer than a token id can count.
pub fn greedy(logits: &[f32]) -> u32 {
    greedy_at(Level::detect(), logits)
}

fn greedy_at(level: Level, logits: &[f32]) -> u32 {
    assert!(!logits.is_empty(), "no logits to choose from");
    if let Some(avx2) = level.avx2()
        && let Some(token) = simd::math::first_of_largest(avx2, logits)
    {
        return id(token);
    }
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
    use alloc::vec;

    fn warm(temperature: f32, seed: u64) -> Sampling {
        Sampling { temperature, seed, ..Sampling::default() }
    }

    /// Which of `logits` come up in many draws, ascending.
    fn support(settings: Sampling, logits: &[f32], history: &[u32]) -> Vec<u32> {
        let mut sampler = Sampler::new(Level::detect(), settings.clone());
        let mut portable = Sampler::new(Level::Portable, settings);
        let mut seen = vec![];
        for _ in 0..3000 {
            let token = sampler.sample(logits, history);
            assert_eq!(token, portable.sample(logits, history), "every level draws the same");
            if !seen.contains(&token) {
                seen.push(token);
            }
        }
        seen.sort_unstable();
        seen
    }

    #[test]
    fn a_tiny_temperature_is_nearly_greedy() {
        let logits = [-7.0, 12.5, 12.25, f32::NEG_INFINITY, 3.0, -0.5, 11.0];
        for temperature in [1e-3, 1e-30, 1e-38, 1e-44] {
            assert_eq!(support(warm(temperature, 3), &logits, &[]), [1], "{temperature:e}");
            assert_eq!(support(Sampling { top_k: 3, ..warm(temperature, 3) }, &logits, &[]), [1], "{temperature:e}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_no_nan() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(greedy(&[f32::NAN, -5.0, f32::NAN, -4.0]), 3);
        assert_eq!(greedy(&[f32::NEG_INFINITY; 3]), 0);
        assert_eq!(Sampler::new(Level::Portable, warm(0.0, 1)).sample(&[0.0, 1.0], &[]), 1);
        assert_eq!(Sampler::new(Level::Portable, warm(f32::NAN, 1)).sample(&[0.0, 1.0], &[]), 1);
        let mut rng = SplitMix64::new(9);
        for len in [1, 7, 8, 31, 32, 33, 100, 1000] {
            for round in 0..50 {
                // Few different values, so that there are equals.
                let mut logits: Vec<f32> = (0..len).map(|_| (rng.next_bell() * 3.0).round()).collect();
                if round % 3 == 0 {
                    logits[rng.next_u64() as usize % len] = f32::NAN;
                }
                if round % 7 == 0 {
                    logits.iter_mut().for_each(|x| *x = if *x > 0.0 { -0.0 } else { 0.0 });
                }
                let want = greedy_at(Level::Portable, &logits);
                assert_eq!(greedy(&logits), want, "{logits:?}");
            }
        }
        assert_eq!(greedy(&[f32::NAN; 40]), greedy_at(Level::Portable, &[f32::NAN; 40]));
    }

    #[test]
    fn draws_follow_the_distribution_and_repeat_with_the_seed() {
        // Weights 1 : 2 : 5 at temperature 2.
        let logits = [0.0, 2.0 * 2f32.ln(), 2.0 * 5f32.ln()];
        let mut counts = [0u32; 3];
        let mut sampler = Sampler::new(Level::detect(), warm(2.0, 42));
        let mut portable = Sampler::new(Level::Portable, warm(2.0, 42));
        for _ in 0..16_000 {
            let token = sampler.sample(&logits, &[]);
            assert_eq!(token, portable.sample(&logits, &[]));
            counts[token as usize] += 1;
        }
        for (count, want) in counts.into_iter().zip([2_000u32, 4_000, 10_000]) {
            assert!(count.abs_diff(want) < 250, "{counts:?}");
        }
        let other: [u32; 40] =
            core::array::from_fn(|_| Sampler::new(Level::Portable, warm(2.0, 42)).sample(&logits, &[]));
        assert!(other.iter().all(|&token| token == other[0]), "a fresh sampler repeats its first draw");
    }

    #[test]
    fn filters_leave_what_their_papers_say() {
        // Probabilities 0.05, 0.4, 0.25, 0.2, 0.1.
        let logits = [0.05f32, 0.4, 0.25, 0.2, 0.1].map(f32::ln);
        let base = warm(1.0, 7);
        let all = [0, 1, 2, 3, 4];
        assert_eq!(support(base.clone(), &logits, &[]), all);
        assert_eq!(support(Sampling { top_k: 2, ..base.clone() }, &logits, &[]), [1, 2]);
        assert_eq!(support(Sampling { top_k: 1, ..base.clone() }, &logits, &[]), [1]);
        assert_eq!(support(Sampling { top_k: 99, ..base.clone() }, &logits, &[]), all);
        assert_eq!(support(Sampling { top_p: 0.6, ..base.clone() }, &logits, &[]), [1, 2]);
        assert_eq!(support(Sampling { top_p: 0.7, ..base.clone() }, &logits, &[]), [1, 2, 3]);
        assert_eq!(support(Sampling { top_p: 0.0, ..base.clone() }, &logits, &[]), [1]);
        assert_eq!(support(Sampling { min_p: 0.45, ..base.clone() }, &logits, &[]), [1, 2, 3]);
        assert_eq!(support(Sampling { min_p: 1.0, ..base.clone() }, &logits, &[]), [1]);
        // Of the best three, renormalised to 0.47, 0.29 and 0.24, two reach 0.7.
        assert_eq!(support(Sampling { top_k: 3, top_p: 0.7, ..base.clone() }, &logits, &[]), [1, 2]);
        // Equals go by id, and a filter never leaves nothing.
        assert_eq!(support(Sampling { top_k: 2, ..base.clone() }, &[1.0; 5], &[]), [0, 1]);
        assert_eq!(support(Sampling { top_k: 2, ..base }, &[f32::NAN; 5], &[]).len(), 1);
    }

    /// Top-p with and without a sorted list of all tokens in front of it is the same set, on distributions of any shape.
    #[test]
    fn the_nucleus_does_not_depend_on_how_it_is_found() {
        let mut rng = SplitMix64::new(3);
        for case in 0..200 {
            let spread = 0.5 + (case % 10) as f32;
            let logits: Vec<f32> = (0..500).map(|_| spread * rng.next_bell()).collect();
            let top_p = rng.next_unit();
            let nucleus = |top_k: u32| {
                let mut sampler = Sampler::new(Level::detect(), warm(1.0, 1));
                sampler.logits.extend_from_slice(&logits);
                match top_k {
                    0 => sampler.candidates.extend(0..500),
                    k => best(&logits, k as usize, &mut sampler.candidates),
                }
                sampler.keep_nucleus(top_p, top_k > 0);
                sampler.candidates
            };
            assert_eq!(nucleus(0), nucleus(500), "p {top_p}, spread {spread}");
        }
    }

    #[test]
    fn what_was_said_is_penalised_or_banned() {
        let greedy_of = |settings: Sampling, logits: &[f32], history: &[u32]| {
            Sampler::new(Level::Portable, settings).sample(logits, history)
        };
        let logits = [2.0, 1.5, -1.0];
        let penalty = |repeat_penalty, repeat_window| Sampling { repeat_penalty, repeat_window, ..Sampling::default() };
        assert_eq!(greedy_of(penalty(1.0, 64), &logits, &[0]), 0);
        assert_eq!(greedy_of(penalty(1.5, 64), &logits, &[0, 0, 2]), 1);
        assert_eq!(greedy_of(penalty(1.5, 1), &logits, &[0, 2]), 0, "outside the window");
        assert_eq!(greedy_of(penalty(1.5, 0), &logits, &[0, 2, 2, 2]), 1, "a window of 0 is everything");
        assert_eq!(greedy_of(penalty(3.0, 64), &[-1.0, -2.0], &[0]), 1, "negative logits fall, too");
        // Once a token, not once an occurrence: 2.0 / 1.2 is still above 1.5.
        assert_eq!(greedy_of(penalty(1.2, 64), &logits, &[0, 0, 0]), 0);

        let ngram = |no_repeat_ngram| Sampling { no_repeat_ngram, ..Sampling::default() };
        assert_eq!(greedy_of(ngram(2), &logits, &[1, 0, 2, 1]), 1, "1 0 was said");
        assert_eq!(greedy_of(ngram(3), &logits, &[1, 0, 2, 1]), 0, "2 1 0 was not");
        assert_eq!(greedy_of(ngram(3), &logits, &[2, 1, 0, 2, 1]), 1);
        assert_eq!(greedy_of(ngram(1), &logits, &[0]), 1);
        assert_eq!(greedy_of(ngram(4), &logits, &[0]), 0, "shorter than the n-gram");
        // Banned tokens are never drawn.
        let warm = Sampling { no_repeat_ngram: 1, ..warm(5.0, 1) };
        assert_eq!(support(warm, &logits, &[0, 2]), [1]);
    }

    #[test]
    fn loops_are_left_after_the_stated_number_of_rounds() {
        assert!(ends_in_loop(&[5, 5], 5, 3));
        assert!(!ends_in_loop(&[5, 5], 5, 4));
        assert!(ends_in_loop(&[9, 1, 2, 3, 1, 2], 3, 2));
        assert!(!ends_in_loop(&[9, 1, 2, 3, 1, 2], 4, 2));
        assert!(!ends_in_loop(&[], 1, 2));
        let long: Vec<u32> = (0..2 * MAX_LOOP as u32).map(|i| i % MAX_LOOP as u32).collect();
        assert!(ends_in_loop(&long[..2 * MAX_LOOP - 1], MAX_LOOP as u32 - 1, 2));
        let settings = Sampling { loop_escape: 3, ..Sampling::default() };
        let mut sampler = Sampler::new(Level::Portable, settings);
        let mut history = vec![];
        for _ in 0..9 {
            history.push(sampler.sample(&[2.0, 1.0, 0.0], &history));
        }
        assert_eq!(history, [0, 0, 1, 0, 0, 1, 0, 0, 1], "0 0 0 is left by 1; the second choice is taken as it is");
    }
}
