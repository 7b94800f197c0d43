//! The profile of one boot: statistics per dispatch slot, and what is hot.

use crate::stats::KeyStats;
use alloc::vec::Vec;
use model::kernel::{DType, KernelKey, Op};
use model::order::sorted_by_key;

/// Statistics by slot of the kernel table. Recorded by one core, for each call the time of the core that took longest.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    slots: Vec<(KernelKey, KeyStats)>,
}

/// One key of the hot list.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct HotKey {
    /// Slot of the kernel table.
    pub slot: usize,
    /// The key in that slot.
    pub key: KernelKey,
    /// Cycles spent in it.
    pub total_cycles: u64,
    /// Its share of the cycles of all keys, 0..=1.
    pub share: f64,
}

impl Profile {
    /// An empty profile for `keys`, slot 0 first.
    pub fn new(keys: impl IntoIterator<Item = KernelKey>) -> Self {
        Self { slots: keys.into_iter().map(|key| (key, KeyStats::new())).collect() }
    }

    /// Adds a slot for `key` and returns its index.
    pub fn add(&mut self, key: KernelKey) -> usize {
        self.slots.push((key, KeyStats::new()));
        self.slots.len() - 1
    }

    /// Takes in one call of the kernel in `slot` that did `rows` rows (at most its key's `m`) in `cycles`.
    ///
    /// # Panics
    /// When there is no such slot.
    #[inline]
    pub fn record(&mut self, slot: usize, rows: u32, cycles: u64) {
        let (key, stats) = &mut self.slots[slot];
        stats.record_rows(cycles, rows, key.m);
    }

    /// Statistics of `slot`.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn stats(&self, slot: usize) -> &KeyStats {
        &self.slots[slot].1
    }

    /// Every slot with its key and statistics, slot 0 first.
    fn iter(&self) -> impl ExactSizeIterator<Item = (usize, KernelKey, &KeyStats)> {
        self.slots.iter().enumerate().map(|(slot, (key, stats))| (slot, *key, stats))
    }

    /// Cycles in all keys.
    pub fn total_cycles(&self) -> u64 {
        self.slots.iter().fold(0, |sum: u64, (_, stats)| sum.saturating_add(stats.total_cycles()))
    }

    /// Keys that were called, most cycles first; ties in slot order.
    pub fn hot_list(&self) -> Vec<HotKey> {
        let total = self.total_cycles();
        let hot: Vec<HotKey> = self
            .iter()
            .filter(|(_, _, stats)| stats.count() > 0)
            .map(|(slot, key, stats)| HotKey {
                slot,
                key,
                total_cycles: stats.total_cycles(),
                share: share(stats.total_cycles(), total),
            })
            .collect();
        sorted_by_key(&hot, |hot| (core::cmp::Reverse(hot.total_cycles), hot.slot))
    }

    /// Share of the recorded cycles that recording them cost, when one record costs `record_cycles`
    /// (see [`Profile::measure_record_cycles`]); `None` before anything was recorded.
    pub fn overhead(&self, record_cycles: f64) -> Option<f64> {
        let calls = self.iter().fold(0, |sum: u64, (_, _, stats)| sum.saturating_add(stats.count()));
        let total = self.total_cycles();
        (total > 0).then(|| calls as f64 * record_cycles / total as f64)
    }

    /// Measures what one record costs, in the unit of the clock `now`: two clock reads and [`Profile::record`], in a
    /// profile of its own. The fastest of several rounds, so that an interruption does not count.
    pub fn measure_record_cycles(mut now: impl FnMut() -> u64) -> f64 {
        const ROUNDS: usize = 16;
        const RECORDS: u64 = 256;
        let key = KernelKey { op: Op::Matmul, dtype: DType::F32, m: 1, n: 1, k: 1 };
        let mut profile = Profile::new([key]);
        let mut fastest = u64::MAX;
        for _ in 0..ROUNDS {
            let start = now();
            for _ in 0..RECORDS {
                let before = now();
                let after = now();
                core::hint::black_box(&mut profile).record(0, 1, after.wrapping_sub(before));
            }
            fastest = fastest.min(now().wrapping_sub(start));
        }
        fastest as f64 / RECORDS as f64
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::kernel::{DType, Op};

    #[test]
    fn overhead_is_measured_with_the_callers_clock() {
        // A clock that advances by 10 each time it is read: two reads inside a record, and two around a round.
        let mut time = 0;
        let cost = Profile::measure_record_cycles(|| {
            time += 10;
            time
        });
        assert_eq!(cost, (2.0 * 256.0 + 1.0) * 10.0 / 256.0);
        let mut profile = Profile::new([key(32)]);
        assert_eq!(profile.overhead(cost), None);
        (0..4).for_each(|_| profile.record(0, 1, 1000));
        assert_eq!(profile.overhead(10.0), Some(0.01));
    }

    fn key(n: u32) -> KernelKey {
        KernelKey { op: Op::Matmul, dtype: DType::Q4_1, m: 1, n, k: 576 }
    }

    #[test]
    fn the_hot_list_is_sorted_and_leaves_out_what_never_ran() {
        let mut profile = Profile::new([key(32), key(64), key(96)]);
        let last = profile.add(key(128));
        for (slot, cycles) in [(0, 100), (last, 100), (2, 500), (2, 300)] {
            profile.record(slot, 1, cycles);
        }
        let hot = profile.hot_list();
        assert_eq!(hot.iter().map(|h| h.slot).collect::<Vec<_>>(), [2, 0, 3]);
        assert_eq!(hot[0], HotKey { slot: 2, key: key(96), total_cycles: 800, share: 0.8 });
        assert_eq!(profile.total_cycles(), 1000);
        assert_eq!(profile.stats(2).count(), 2);
    }

    #[test]
    fn an_empty_profile_has_no_shares() {
        let mut profile = Profile::new([key(32)]);
        assert!(profile.hot_list().is_empty());
        profile.record(0, 1, 0);
        assert_eq!(profile.hot_list()[0].share, 0.0);
    }
}
