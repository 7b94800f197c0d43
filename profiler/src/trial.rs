//! Is a candidate kernel faster than the incumbent? Decided from paired measurements, on machines whose speed drifts.
//!
//! Memory bandwidth of a shared machine can change by a factor of two or three within minutes, and single samples are hit
//! by spikes. So times are never compared across time: each *pair* measures both kernels back to back, in alternating
//! order ([`Trial::pair`]), and only the ratio of a pair is used. Alternation makes a trend inside a pair, and any
//! advantage of running second, cancel.
//! - The ratio is the Hodges-Lehmann pseudo-median of the paired log ratios: like a median it ignores spikes, but it
//!   wastes less of the data. The constant advantage of running second is estimated and taken out first.
//! - The test is the exact Wilcoxon signed-rank test on the same log ratios, one-sided, ties and all.
//! - A candidate wins when the test is significant *and* the ratio is at most `1 - min_win`. Where a match is enough
//!   (`min_win` below zero), the test is against that ratio instead of against equality.
//!
//! Looks happen at fixed numbers of pairs. A candidate that is clearly not `min_win` faster is dropped at an early look,
//! which cannot make a false win. A win before the last look has to pass a stricter level, so that looking often does not
//! add up to false wins.
//!
//! # Source
//! F. Wilcoxon, "Individual comparisons by ranking methods", 1945; J. Hodges, E. Lehmann, "Estimates of location based on
//! rank tests", 1963; J. Haybittle, "Repeated assessment of results in clinical trials", 1971 (strict early levels).

use alloc::vec;
use alloc::vec::Vec;

/// Fewest and most pairs a trial can be set to.
pub const PAIRS_RANGE: core::ops::RangeInclusive<usize> = 8..=128;
/// Significance a win needs at the last look.
const FINAL_LEVEL: f64 = 0.005;
/// Significance a win needs before the last look.
const EARLY_LEVEL: f64 = 0.0005;
/// Significance at which a candidate is given up.
const GIVE_UP_LEVEL: f64 = 0.005;
/// After four pairs, all of them slower than this, a candidate is given up.
const HOPELESS_RATIO: f64 = 1.10;
const HOPELESS_PAIRS: usize = 4;
/// Pairs after which a trial may end, besides its last.
const LOOKS: [usize; 8] = [8, 12, 16, 24, 32, 48, 64, 96];

/// Limits of a trial.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TrialConfig {
    /// Pairs measured at most; taken into [`PAIRS_RANGE`].
    pub max_pairs: usize,
    /// Smallest win worth a change, as a share of the incumbent's time. Below zero a candidate that is slower by no more
    /// than this wins too.
    pub min_win: f64,
}

impl TrialConfig {
    /// Against an incumbent that a candidate need not beat, only match: 2 % slower is a match.
    pub fn match_is_enough(self) -> Self {
        Self { min_win: -0.02, ..self }
    }

    /// For a candidate whose time counts `weight` times what the incumbent's does.
    pub fn weighing(self, weight: f64) -> Self {
        Self { min_win: 1.0 - (1.0 - self.min_win) / weight, ..self }
    }

    /// Most of the incumbent's time that a candidate may take.
    pub fn most(&self) -> f64 {
        1.0 - self.min_win
    }
}

impl Default for TrialConfig {
    fn default() -> Self {
        Self { max_pairs: 64, min_win: 0.01 }
    }
}

/// A kernel of a trial.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The one in use.
    Incumbent,
    /// The one that may replace it.
    Candidate,
}

/// Outcome of a trial.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Verdict {
    /// Candidate's time / incumbent's time, pseudo-median of the pairs; 1 when there are none.
    pub ratio: f64,
    /// Pairs it rests on.
    pub pairs: usize,
    /// Chance of ratios this low if the two were equally fast (or, where a match is enough, just not a match).
    pub p_value: f64,
    /// The candidate is faster by at least the smallest win, or a match where that is enough, and this is not chance:
    /// install it.
    pub significant: bool,
    /// The candidate looks fast enough, but that may be chance.
    pub undecided: bool,
}

/// A trial under way.
#[derive(Clone, Debug)]
pub struct Trial {
    max_pairs: usize,
    /// `ln(1 - min_win)`.
    win_log: f64,
    /// `ln(candidate / incumbent)`, one per pair.
    logs: Vec<f64>,
}

impl Trial {
    /// A trial without pairs.
    pub fn new(config: TrialConfig) -> Self {
        let max_pairs = config.max_pairs.clamp(*PAIRS_RANGE.start(), *PAIRS_RANGE.end());
        let min_win = if config.min_win.is_finite() { config.min_win.clamp(-0.1, 0.9) } else { 0.9 };
        Self { max_pairs, win_log: libm::log(1.0 - min_win), logs: Vec::with_capacity(max_pairs) }
    }

    /// Measures a pair by `time`, the cycles of one call, first one side and in the next pair the other, which makes trends
    /// cancel; then as [`Trial::push`].
    ///
    /// # Errors
    /// Those of `time`; the pair then does not count.
    pub fn pair<E>(&mut self, mut time: impl FnMut(Side) -> Result<u64, E>) -> Result<Option<Verdict>, E> {
        let (incumbent, candidate) = if self.logs.len().is_multiple_of(2) {
            let incumbent = time(Side::Incumbent)?;
            (incumbent, time(Side::Candidate)?)
        } else {
            let candidate = time(Side::Candidate)?;
            (time(Side::Incumbent)?, candidate)
        };
        Ok(self.push(incumbent, candidate))
    }

    /// Pairs taken in so far.
    pub fn pairs(&self) -> usize {
        self.logs.len()
    }

    /// Takes in the cycles of one pair; a time of zero counts as one cycle. Returns the verdict as soon as it is clear,
    /// and at the last pair in any case; `None` asks for another pair.
    pub fn push(&mut self, incumbent_cycles: u64, candidate_cycles: u64) -> Option<Verdict> {
        let log = libm::log(candidate_cycles.max(1) as f64 / incumbent_cycles.max(1) as f64);
        self.logs.push(log);
        let pairs = self.logs.len();
        if pairs >= self.max_pairs {
            return Some(self.verdict());
        }
        if pairs == HOPELESS_PAIRS && self.logs.iter().all(|&log| log > libm::log(HOPELESS_RATIO)) {
            return Some(self.verdict());
        }
        if !LOOKS.contains(&pairs) {
            return None;
        }
        let logs = self.balanced();
        if pseudo_median_at_most(&logs, self.win_log) {
            return Some(self.verdict_at(EARLY_LEVEL)).filter(|verdict| verdict.significant);
        }
        let too_slow: Vec<f64> = logs.iter().map(|log| self.win_log - log).collect();
        (signed_rank_p(&too_slow) <= GIVE_UP_LEVEL).then(|| self.verdict_at(EARLY_LEVEL))
    }

    /// The verdict on the pairs so far, which are the last: for a budget that ran out, which does not depend on them. Fewer
    /// than eight pairs are never significant.
    pub fn verdict(&self) -> Verdict {
        self.verdict_at(FINAL_LEVEL)
    }

    /// The log ratios without the advantage of running second: half the distance between the medians of the two orders
    /// is taken from one and given to the other, which leaves their middle where it is.
    fn balanced(&self) -> Vec<f64> {
        let median_of = |first: usize| {
            let mut logs: Vec<f64> = self.logs.iter().copied().skip(first).step_by(2).collect();
            let middle = logs.len() / 2;
            (!logs.is_empty()).then(|| *logs.select_nth_unstable_by(middle, f64::total_cmp).1)
        };
        let (Some(incumbent_first), Some(candidate_first)) = (median_of(0), median_of(1)) else {
            return self.logs.clone();
        };
        let half = 0.5 * (incumbent_first - candidate_first);
        self.logs.iter().enumerate().map(|(i, log)| if i % 2 == 0 { log - half } else { log + half }).collect()
    }

    fn verdict_at(&self, level: f64) -> Verdict {
        let pairs = self.logs.len();
        let logs = self.balanced();
        let log = pseudo_median(&logs).unwrap_or(0.0);
        let against = self.win_log.max(0.0);
        let shifted: Vec<f64> = logs.iter().map(|log| log - against).collect();
        let p_value = signed_rank_p(&shifted);
        let fast = pairs >= *PAIRS_RANGE.start() && log <= self.win_log;
        let significant = fast && p_value <= level;
        Verdict { ratio: libm::exp(log), pairs, p_value, significant, undecided: fast && !significant }
    }
}

/// Hodges-Lehmann estimate: the median of the means of all pairs of values, each with itself included; of an even number
/// the upper middle. `None` of no values.
fn pseudo_median(values: &[f64]) -> Option<f64> {
    let mut means: Vec<f64> =
        values.iter().enumerate().flat_map(|(i, a)| values[i..].iter().map(move |b| (a + b) * 0.5)).collect();
    let middle = means.len() / 2;
    (!means.is_empty()).then(|| *means.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// `pseudo_median(values) <= Some(limit)`, without sorting.
fn pseudo_median_at_most(values: &[f64], limit: f64) -> bool {
    let means = values.len() * (values.len() + 1) / 2;
    let at_most = |(i, a): (usize, &f64)| values[i..].iter().filter(|b| (a + *b) * 0.5 <= limit).count();
    values.iter().enumerate().map(at_most).sum::<usize>() > means / 2
}

/// Chance that the ranks of positive values sum to this little or less if each sign were a coin toss: small when the
/// values are mostly negative. Exact for the ranks at hand; zeros are left out; 1 when nothing is left.
fn signed_rank_p(values: &[f64]) -> f64 {
    let mut values: Vec<f64> = values.iter().copied().filter(|&value| value != 0.0).collect();
    values.sort_unstable_by(|a, b| a.abs().total_cmp(&b.abs()));
    // Twice the rank, so that the mean rank of a group of ties is a whole number.
    let mut ranks = Vec::with_capacity(values.len());
    let mut positive = 0;
    for group in values.chunk_by(|a, b| a.abs() == b.abs()) {
        let twice_mean_rank = 2 * ranks.len() + 1 + group.len();
        positive += twice_mean_rank * group.iter().filter(|&&value| value > 0.0).count();
        ranks.extend(core::iter::repeat_n(twice_mean_rank, group.len()));
    }
    // The sum is distributed symmetrically: the larger half follows from the smaller.
    let total: usize = ranks.iter().sum();
    if 2 * positive > total {
        return 1.0 - at_most(&ranks, total - positive).1;
    }
    at_most(&ranks, positive).0
}

/// Chance that the sum of the ranks whose coin shows heads is at most `limit`, and that it is less.
fn at_most(ranks: &[usize], limit: usize) -> (f64, f64) {
    // ways[s] = number of sets of ranks that sum to s, one rank taken in at a time; at most 2^128, so f64 holds it.
    let mut ways = vec![0.0; limit + 1];
    ways[0] = 1.0;
    for &rank in ranks {
        for sum in (rank..=limit).rev() {
            ways[sum] += ways[sum - rank];
        }
    }
    let all = libm::exp2(ranks.len() as f64);
    let less: f64 = ways[..limit].iter().sum();
    ((less + ways[limit]) / all, less / all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_rank_matches_the_published_table() {
        // Critical values of W for n = 8, 10, 20 at one-sided levels (Wilcoxon & Wilcox, 1964): P(W <= w).
        let table = [(8usize, 5usize, 0.0391), (8, 1, 0.0078), (10, 10, 0.0420), (10, 5, 0.0098), (20, 60, 0.0487)];
        for (n, w, p) in table {
            // Positive signs on ranks that sum to w, the rest negative.
            let mut left = w;
            let values: Vec<f64> = (1..=n)
                .rev()
                .map(|rank| {
                    let positive = rank <= left;
                    left -= if positive { rank } else { 0 };
                    if positive { rank as f64 } else { -(rank as f64) }
                })
                .collect();
            assert_eq!(left, 0);
            let got = signed_rank_p(&values);
            assert!((got - p).abs() < 0.0001, "n {n}, W {w}: {got}, table {p}");
        }
    }

    #[test]
    fn signed_rank_of_ties_zeros_and_nothing() {
        assert_eq!(signed_rank_p(&[]), 1.0);
        assert_eq!(signed_rank_p(&[0.0; 9]), 1.0);
        assert_eq!(signed_rank_p(&[-1.0; 3]), 0.125);
        assert_eq!(signed_rank_p(&[1.0; 3]), 1.0);
        // Two ties, one of each sign: both orders are equally likely to be this low or lower.
        assert_eq!(signed_rank_p(&[-1.0, 1.0]), 0.75);
        assert_eq!(signed_rank_p(&[-1.0, 0.0, 1.0]), 0.75);
    }

    #[test]
    fn pseudo_median_ignores_spikes_and_sits_between_two_groups() {
        let mut state = 1u64;
        for n in 1..40 {
            let values: Vec<f64> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 60) as f64
                })
                .collect();
            for limit in (0..32).map(|twice| f64::from(twice) * 0.5) {
                let expected = pseudo_median(&values).unwrap() <= limit;
                assert_eq!(pseudo_median_at_most(&values, limit), expected, "{values:?} at {limit}");
            }
        }
        assert_eq!(pseudo_median(&[]), None);
        assert_eq!(pseudo_median(&[3.0]), Some(3.0));
        assert_eq!(pseudo_median(&[1.0, 1.0, 1.0, 1.0, 1000.0]), Some(1.0));
        let groups: Vec<f64> = (0..32).map(|i| if i % 2 == 0 { -1.25 } else { 0.75 }).collect();
        assert_eq!(pseudo_median(&groups), Some(-0.25));
    }

    #[test]
    fn clear_cases_end_early() {
        let mut slow = Trial::new(TrialConfig::default());
        let verdict = (0..64).find_map(|i| slow.push(1000, 1500 + i)).unwrap();
        assert_eq!((verdict.pairs, verdict.significant), (HOPELESS_PAIRS, false));
        let mut slower = Trial::new(TrialConfig::default());
        let verdict = (0..64).find_map(|i| slower.push(1000, 1030 + i % 3)).unwrap();
        assert_eq!((verdict.pairs, verdict.significant), (8, false));
        let mut fast = Trial::new(TrialConfig::default());
        let verdict = (0..64).find_map(|i| fast.push(1000, 700 + i)).unwrap();
        assert_eq!((verdict.pairs, verdict.significant), (12, true));
        assert!((0.70..0.72).contains(&verdict.ratio), "{}", verdict.ratio);
    }

    #[test]
    fn a_win_below_the_smallest_worth_having_is_not_taken() {
        let mut trial = Trial::new(TrialConfig::default());
        let verdict = (0..64).find_map(|i| trial.push(100_000, 99_500 + i)).unwrap();
        assert!(verdict.p_value < 0.01 && !verdict.significant, "{verdict:?}");
        // More pairs make it certain, not worth more.
        (0..24).for_each(|i| {
            trial.push(100_000, 99_500 + i);
        });
        let verdict = trial.verdict();
        assert!(verdict.p_value < 1e-6 && !verdict.significant, "{verdict:?}");
    }

    #[test]
    fn a_budget_that_runs_out_leaves_a_cautious_verdict() {
        let mut trial = Trial::new(TrialConfig::default());
        assert_eq!(
            trial.verdict(),
            Verdict { ratio: 1.0, pairs: 0, p_value: 1.0, significant: false, undecided: false }
        );
        for _ in 0..7 {
            assert_eq!(trial.push(1000, 900), None);
        }
        assert!(!trial.verdict().significant, "seven pairs are too few");
    }

    #[test]
    fn each_side_is_first_in_every_other_pair() {
        let mut trial = Trial::new(TrialConfig::default());
        let mut sides = Vec::new();
        for _ in 0..2 {
            let verdict = trial.pair(|side| {
                sides.push(side);
                Ok::<_, ()>(if side == Side::Incumbent { 1000 } else { 500 })
            });
            assert_eq!(verdict, Ok(None));
        }
        assert_eq!(sides, [Side::Incumbent, Side::Candidate, Side::Candidate, Side::Incumbent]);
        assert!((trial.verdict().ratio - 0.5).abs() < 1e-9, "a pair is incumbent and candidate, whichever was first");
        assert_eq!(trial.pair(|_| Err(())), Err(()));
        assert_eq!(trial.pairs(), 2);
    }

    #[test]
    fn odd_inputs_are_numbers_too() {
        let mut trial = Trial::new(TrialConfig { max_pairs: 0, min_win: f64::NAN });
        let verdict = (0..64).find_map(|_| trial.push(0, 0)).unwrap();
        assert_eq!(verdict, Verdict { ratio: 1.0, pairs: 8, p_value: 1.0, significant: false, undecided: false });
        let mut trial = Trial::new(TrialConfig { max_pairs: usize::MAX, min_win: -1.0 });
        let verdict = (0..200).find_map(|i| trial.push(u64::MAX - i % 2, u64::MAX)).unwrap();
        assert!(verdict.ratio.is_finite() && verdict.pairs <= 128, "{verdict:?}");
    }

    #[test]
    fn a_candidate_that_counts_more_has_to_win_by_more() {
        let config = TrialConfig { min_win: 0.01, ..TrialConfig::default() };
        assert!((config.weighing(1.1).most() - 0.9).abs() < 1e-9);
        assert!((config.weighing(1.0 / 1.1).most() - 1.089).abs() < 1e-9);
        for (weight, cycles, wins) in
            [(1.08, 93_000, false), (1.08, 90_000, true), (1.0 / 1.08, 105_000, true), (1.0 / 1.08, 108_000, false)]
        {
            let mut trial = Trial::new(config.weighing(weight));
            let verdict = (0..64).find_map(|i| trial.push(100_000, cycles + i % 5 * 100)).unwrap();
            assert_eq!(verdict.significant, wins, "{weight} {cycles}: {verdict:?}");
        }
    }

    #[test]
    fn where_a_match_is_enough_a_little_slower_wins_and_more_does_not() {
        let decide = |cycles: u64| {
            let mut trial = Trial::new(TrialConfig::default().match_is_enough());
            (0..64).find_map(|i| trial.push(100_000, cycles + i % 5 * 100)).unwrap()
        };
        for (cycles, wins) in [(90_000, true), (100_000, true), (101_000, true), (103_000, false), (120_000, false)] {
            let verdict = decide(cycles);
            assert_eq!(verdict.significant, wins, "{cycles}: {verdict:?}");
        }
    }
}
