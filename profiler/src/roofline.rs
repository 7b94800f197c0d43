//! How close a kernel is to what the machine can do, and when that ends the search.
//!
//! A call of a kernel reads its weights and does its multiply-adds; the larger of the two times, at the rates measured on
//! this machine, is the least it can take. The share of the measured time that this explains is the limit fraction.
//!
//! # Source
//! S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", 2009.

use model::kernel::KernelKey;

/// A key within this distance of its limit is settled.
pub const SETTLE_DISTANCE: f64 = 0.05;

/// Rates one core reaches while all cores that compute are busy, for one class of keys: for quantised weights
/// `flops_per_cycle` is the integer dot-product rate, counted like [`KernelKey::flops`], not that of f32.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Roofline {
    /// Bytes read from memory per cycle.
    pub read_bytes_per_cycle: f64,
    /// Operations per cycle, a multiply-add counted as two.
    pub flops_per_cycle: f64,
}

impl Roofline {
    /// Fewest cycles for `bytes` read and `flops` done; `None` when a rate is not a positive number.
    pub fn limit_cycles(&self, bytes: u64, flops: u64) -> Option<f64> {
        let usable = |rate: f64| rate.is_finite() && rate > 0.0;
        if !usable(self.read_bytes_per_cycle) || !usable(self.flops_per_cycle) {
            return None;
        }
        Some((bytes as f64 / self.read_bytes_per_cycle).max(flops as f64 / self.flops_per_cycle))
    }

    /// Time the roofline needs for one call of `key`, as a share of `measured_cycles`: 1 is the limit, and slightly above
    /// it is noise. `None` when a rate is unusable or nothing was measured.
    pub fn limit_fraction(&self, key: &KernelKey, measured_cycles: u64) -> Option<f64> {
        let limit = self.limit_cycles(key.weight_bytes(), key.flops())?;
        (measured_cycles > 0).then(|| limit / measured_cycles as f64)
    }
}

/// Whether a key needs more trials.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Settled {
    /// Every variant worth trying was tried.
    SpaceExhausted,
    /// Within [`SETTLE_DISTANCE`] of the machine's limit.
    AtLimit {
        /// The limit fraction.
        fraction: f64,
    },
    /// Variants are left and there is room to gain.
    Open,
}

impl Settled {
    /// Applies the rule. A fraction further *above* 1 than [`SETTLE_DISTANCE`] does not settle a key: the weights came
    /// from a cache or the machine changed speed between the two measurements, so the limit is not this key's.
    pub fn of(space_exhausted: bool, limit_fraction: Option<f64>) -> Self {
        match limit_fraction {
            _ if space_exhausted => Settled::SpaceExhausted,
            Some(fraction) if (fraction - 1.0).abs() <= SETTLE_DISTANCE => Settled::AtLimit { fraction },
            _ => Settled::Open,
        }
    }

    /// True unless [`Settled::Open`].
    pub fn is_settled(&self) -> bool {
        *self != Settled::Open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::kernel::{DType, Op};

    #[test]
    fn decode_is_limited_by_bytes_and_prefill_by_flops() {
        let key = |m| KernelKey { op: Op::Matmul, dtype: DType::F32, m, n: 64, k: 100 };
        // 64 columns x 100 x 4 bytes = 25600 bytes; 12800 flops a row.
        let roofline = Roofline { read_bytes_per_cycle: 8.0, flops_per_cycle: 64.0 };
        assert_eq!(roofline.limit_cycles(25_600, 12_800), Some(3200.0));
        assert_eq!(roofline.limit_fraction(&key(1), 6400), Some(0.5));
        assert_eq!(roofline.limit_fraction(&key(64), 12_800), Some(1.0));
        assert_eq!(roofline.limit_fraction(&key(1), 0), None);
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let bad = Roofline { read_bytes_per_cycle: rate, ..roofline };
            assert_eq!(bad.limit_fraction(&key(1), 10), None, "{rate}");
            let bad = Roofline { flops_per_cycle: rate, ..roofline };
            assert_eq!(bad.limit_fraction(&key(1), 10), None, "{rate}");
        }
    }

    #[test]
    fn a_key_settles_by_exhaustion_or_at_the_limit() {
        assert_eq!(Settled::of(true, None), Settled::SpaceExhausted);
        assert_eq!(Settled::of(true, Some(0.1)), Settled::SpaceExhausted);
        assert_eq!(Settled::of(false, Some(0.96)), Settled::AtLimit { fraction: 0.96 });
        assert_eq!(Settled::of(false, Some(1.04)), Settled::AtLimit { fraction: 1.04 });
        for fraction in [None, Some(0.94), Some(1.06), Some(3.0), Some(f64::NAN)] {
            assert!(!Settled::of(false, fraction).is_settled(), "{fraction:?}");
        }
    }
}
