//! The kernel table of the report: statistics of this boot beside what the snapshot remembers.

use crate::boot::Remembered;
use crate::kernels::RunningKernels;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use engine::Engine;
use engine::simd::limits::Limits;
use model::kernel::KernelKey;
use profiler::{Roofline, Settled};
use report::KernelRow;

/// The roofline of one core's slice of `key`, from limits of `threads` cores together.
pub fn roofline(limits: &Limits, key: &KernelKey, threads: usize) -> Roofline {
    let flops = if key.dtype.is_quantised() { limits.int8_ops_per_cycle } else { limits.fma_flops_per_cycle };
    let cores = threads.max(1) as f64;
    Roofline { read_bytes_per_cycle: limits.read_bytes_per_cycle / cores, flops_per_cycle: flops / cores }
}

/// How close the kernel in `slot` was to the machine's limit in this boot, on the median.
pub fn limit_fraction(engine: &Engine<'_>, limits: &Limits, slot: usize) -> Option<f64> {
    let key = engine.table().key(slot)?;
    let median = engine.table().profile().stats(slot).median_cycles()?;
    roofline(limits, &key, engine.plan().threads()).limit_fraction(&key, median)
}

/// One row per key that ran, hottest first. `tsc_hz` is `None` where the clock cannot be trusted.
pub fn kernel_rows(
    engine: &Engine<'_>,
    limits: &Limits,
    running: &RunningKernels,
    tsc_hz: Option<u64>,
    remembered: &dyn Fn(&KernelKey) -> Remembered,
) -> Vec<KernelRow> {
    let profile = engine.table().profile();
    let row = |hot: profiler::HotKey| {
        let stats = profile.stats(hot.slot);
        let known = remembered(&hot.key);
        let median = stats.median_cycles().unwrap_or(0);
        let slices = engine.table().slices(hot.slot) as u64;
        // Cycles of an untrusted clock say nothing, and settle nothing.
        let fraction = tsc_hz.and(limit_fraction(engine, limits, hot.slot));
        // Work per second: of all slices, since they run side by side.
        let rate = |work: u64| tsc_hz.map(|hz| (work * slices) as f64 * hz as f64 / median.max(1) as f64 / 1e9);
        KernelRow {
            key: hot.key.to_string(),
            variant: running
                .variant(hot.slot)
                .map_or_else(|| String::from(engine.table().own_name()), |v| v.to_string()),
            calls: stats.count(),
            time_share: hot.share,
            total_cycles: stats.total_cycles(),
            min_cycles: stats.min_cycles().unwrap_or(0),
            max_cycles: stats.max_cycles().unwrap_or(0),
            median_cycles: median,
            baseline_cycles: known.baseline_cycles,
            bytes_per_call: hot.key.weight_bytes() * slices,
            gb_s: rate(hot.key.weight_bytes()),
            gflop_s: rate(hot.key.flops()),
            limit_fraction: fraction,
            variants_tried: known.tried,
            variants_total: known.variants,
            settled: Settled::of(known.exhausted, fraction).is_settled(),
        }
    };
    profile.hot_list().into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec;
    use engine::operands::AlignedBytes;
    use engine::simd::Level;
    use engine::workers::Workers;
    use engine::{Loader, Plan, Session};
    use model::{gguf, synthetic};

    struct One;

    impl Workers for One {
        fn count(&self) -> usize {
            1
        }

        fn run(&self, job: &(dyn Fn(usize) + Sync)) {
            job(0);
        }
    }

    #[test]
    fn cycles_of_an_untrusted_clock_settle_no_kernel() {
        let file = synthetic::gguf(&synthetic::Spec::default()).unwrap();
        let model = gguf::read(&file, file.len() as u64).unwrap();
        let plan = Plan::new(&model, 1).unwrap();
        let arena = Box::leak(Box::new(AlignedBytes::zeroed(plan.arena_bytes())));
        let isa = engine::isa::detect();
        let mut loader = Loader::new(plan, Level::new(isa), arena).unwrap();
        loader.feed(0, &file, &One).unwrap();
        let loaded = loader.finish().unwrap();
        let mut engine = Engine::new(loaded, arena, isa, engine::Tier::Reference).unwrap();
        let kv = engine::attention::KvType::F32;
        let mut memory = Session::memory_bytes(&model.config, 16, 1, kv).map(|len| vec![0; len]);
        let mut session = Session::new(&engine, 16, kv, memory.lend()).unwrap();
        session.prefill(&mut engine, &One, &[5]).unwrap();

        // A machine whose limit is what the hottest kernel took.
        let hot = engine.table().profile().hot_list()[0];
        let median = engine.table().profile().stats(hot.slot).median_cycles().unwrap();
        let rate = hot.key.flops() as f64 / median as f64;
        let limits = Limits {
            read_bytes_per_cycle: 1e30,
            sustained_read_bytes_per_cycle: 1e30,
            fma_flops_per_cycle: rate,
            int8_ops_per_cycle: rate,
            interrupted: 0.0,
        };
        let running = RunningKernels::none(engine.table().len());
        let rows = |hz| kernel_rows(&engine, &limits, &running, hz, &|_| Remembered::default());
        let trusted = &rows(Some(1_000_000_000))[0];
        let at_the_limit = trusted.limit_fraction.is_some_and(|fraction| (fraction - 1.0).abs() < 1e-9);
        assert!(trusted.settled && at_the_limit, "{trusted:?}");
        let untrusted = &rows(None)[0];
        assert!(!untrusted.settled && untrusted.limit_fraction.is_none(), "{untrusted:?}");
    }
}
