//! Cycle statistics of one kernel: exact count, total, extremes, and quantiles from a log-linear histogram.
//!
//! Every power of two is cut into [`SUB_BUCKETS`] equal buckets, so a bucket is at most 1/64 of its value wide and a
//! quantile read from its middle is off by at most 1/128 (0.8 %). Recording is one leading-zero count, one
//! shift and six memory operations, whatever was recorded before.
//!
//! # Source
//! The bucket scheme is that of HdrHistogram (G. Tene): exact below the sub-bucket count, logarithmic above.

use alloc::boxed::Box;
use alloc::vec;

/// Buckets in one power of two.
pub const SUB_BUCKETS: usize = 1 << SUB_BITS;
const SUB_BITS: u32 = 6;
/// Samples of this many bits and more share the last bucket: `2^40` cycles are minutes.
const VALUE_BITS: u32 = 40;
const BUCKETS: usize = (VALUE_BITS - SUB_BITS + 1) as usize * SUB_BUCKETS;

/// Cycle statistics of one kernel. About 9 KB.
#[derive(Clone, Debug)]
pub struct KeyStats {
    count: u64,
    total_cycles: u64,
    min_cycles: u64,
    max_cycles: u64,
    histogram: Box<[u32]>,
}

impl Default for KeyStats {
    fn default() -> Self {
        Self::new()
    }
}

impl KeyStats {
    /// Statistics of no samples.
    pub fn new() -> Self {
        let histogram = vec![0; BUCKETS].into_boxed_slice();
        Self { count: 0, total_cycles: 0, min_cycles: u64::MAX, max_cycles: 0, histogram }
    }

    /// Takes in one call that took `cycles`.
    #[inline]
    pub fn record(&mut self, cycles: u64) {
        self.count += 1;
        self.total_cycles = self.total_cycles.saturating_add(cycles);
        self.min_cycles = self.min_cycles.min(cycles);
        self.max_cycles = self.max_cycles.max(cycles);
        if let Some(bucket) = self.histogram.get_mut(bucket_of(cycles)) {
            *bucket = bucket.saturating_add(1);
        }
    }

    /// Takes in a call that did `rows` of the `m` rows of a batch in `cycles`. The total counts it as it was; as a sample it
    /// is scaled to a full batch, so that calls with different rows can be compared. A kernel may have done more rows than
    /// were wanted, up to the end of a register tile: then the sample is too large by as much.
    #[inline]
    pub(crate) fn record_rows(&mut self, cycles: u64, rows: u32, m: u32) {
        let total_cycles = self.total_cycles.saturating_add(cycles);
        self.record(if rows == m { cycles } else { cycles.saturating_mul(m.into()) / u64::from(rows.max(1)) });
        self.total_cycles = total_cycles;
    }

    /// Calls recorded.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Cycles of all calls.
    pub fn total_cycles(&self) -> u64 {
        self.total_cycles
    }

    /// Fewest cycles of one call; `None` before the first.
    pub fn min_cycles(&self) -> Option<u64> {
        (self.count > 0).then_some(self.min_cycles)
    }

    /// Most cycles of one call; `None` before the first.
    pub fn max_cycles(&self) -> Option<u64> {
        (self.count > 0).then_some(self.max_cycles)
    }

    /// Median cycles of one call, within 0.8 % of the exact lower median; `None` before the first call.
    pub fn median_cycles(&self) -> Option<u64> {
        self.quantile_cycles(1, 2)
    }

    /// The sample of rank `ceil(count * numerator / denominator)`, within 0.8 %; `None` before the first call or when
    /// the fraction is not in `0..=1`.
    fn quantile_cycles(&self, numerator: u32, denominator: u32) -> Option<u64> {
        if self.count == 0 || denominator == 0 || numerator > denominator {
            return None;
        }
        let rank = (u128::from(self.count) * u128::from(numerator)).div_ceil(u128::from(denominator)).max(1);
        let mut seen = 0u128;
        for (bucket, &samples) in self.histogram.iter().enumerate() {
            seen += u128::from(samples);
            if seen >= rank {
                return Some(bucket_middle(bucket).clamp(self.min_cycles, self.max_cycles));
            }
        }
        // Only reached when a bucket saturated: the missing samples are not in the tail, but the largest is a bound.
        Some(self.max_cycles)
    }
}

/// Histogram bucket of a sample.
#[inline]
fn bucket_of(cycles: u64) -> usize {
    let cycles = cycles.min((1 << VALUE_BITS) - 1);
    // Bits above the sub-bucket index; 0 where every value has its own bucket.
    let shift = (u64::BITS - SUB_BITS).saturating_sub((cycles | 1).leading_zeros());
    if shift == 0 {
        return cycles as usize;
    }
    // The value's leading bit is worth one octave, so the sum below is contiguous across octaves.
    ((shift as usize - 1) << SUB_BITS) + (cycles >> (shift - 1)) as usize
}

/// Middle of a bucket's values.
fn bucket_middle(bucket: usize) -> u64 {
    let octave = bucket >> SUB_BITS;
    if octave == 0 {
        return bucket as u64;
    }
    let shift = octave as u32 - 1;
    let low = ((bucket & (SUB_BUCKETS - 1)) | SUB_BUCKETS) as u64;
    (low << shift) + ((1u64 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn a_partly_filled_batch_is_a_sample_of_a_full_one() {
        let mut stats = KeyStats::new();
        stats.record_rows(640, 64, 64);
        stats.record_rows(100, 10, 64);
        stats.record_rows(20, 1, 64);
        assert_eq!((stats.count(), stats.total_cycles()), (3, 760));
        assert_eq!((stats.min_cycles(), stats.max_cycles()), (Some(640), Some(1280)));
        stats.record_rows(u64::MAX, 1, 64);
        assert_eq!((stats.total_cycles(), stats.max_cycles()), (u64::MAX, Some(u64::MAX)));
    }

    #[test]
    fn buckets_are_contiguous_and_their_middles_fall_in_them() {
        let mut last = 0;
        for cycles in 0..1u64 << 14 {
            let bucket = bucket_of(cycles);
            assert!(bucket == last || bucket == last + 1, "{cycles}: {last} -> {bucket}");
            last = bucket;
        }
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(bucket_middle(bucket)), bucket);
        }
        assert_eq!(bucket_of((1 << VALUE_BITS) - 1), BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_bucket_middle_is_within_one_percent_of_every_value_in_it() {
        for exponent in 0..VALUE_BITS {
            for step in 0..1000u64 {
                let cycles = (1u64 << exponent) + ((1u64 << exponent) * step / 1000);
                let error = bucket_middle(bucket_of(cycles)).abs_diff(cycles);
                assert!(error * 128 <= cycles, "{cycles} off by {error}");
            }
        }
    }

    #[test]
    fn statistics_of_known_samples() {
        let mut stats = KeyStats::new();
        assert_eq!((stats.min_cycles(), stats.max_cycles(), stats.median_cycles()), (None, None, None));
        assert_eq!(stats.quantile_cycles(1, 1), None);
        for cycles in [10, 20, 30, 40, 1_000_000] {
            stats.record(cycles);
        }
        assert_eq!(stats.count(), 5);
        assert_eq!(stats.total_cycles(), 1_000_100);
        assert_eq!((stats.min_cycles(), stats.max_cycles()), (Some(10), Some(1_000_000)));
        assert_eq!(stats.median_cycles(), Some(30));
        assert_eq!((stats.quantile_cycles(0, 1), stats.quantile_cycles(4, 5)), (Some(10), Some(40)));
        assert_eq!((stats.quantile_cycles(1, 0), stats.quantile_cycles(3, 2)), (None, None));
    }

    #[test]
    fn quantiles_are_within_one_percent_of_the_exact_ones() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut samples = Vec::new();
        let mut stats = KeyStats::new();
        for _ in 0..20_001 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Log-uniform over 2^8..2^24 with a random mantissa: every octave is used.
            let exponent = 8 + (state >> 60);
            let cycles = (1 << exponent) + ((state >> 20) & ((1 << exponent) - 1));
            samples.push(cycles);
            stats.record(cycles);
        }
        samples.sort_unstable();
        for percent in [1u32, 10, 25, 50, 75, 90, 99, 100] {
            let rank = (samples.len() * percent as usize).div_ceil(100).max(1);
            let exact = samples[rank - 1];
            let got = stats.quantile_cycles(percent, 100).unwrap();
            assert!(got.abs_diff(exact) * 100 <= exact, "p{percent}: {got} for {exact}");
        }
    }
}
