//! What recording costs on this machine. Run with
//! `cargo test -p profiler --release --test record_cost -- --ignored --nocapture`.

use model::kernel::{DType, KernelKey, Op};
use profiler::{KeyStats, Profile};
use std::hint::black_box;
use std::time::Instant;

fn keys() -> impl Iterator<Item = KernelKey> {
    (0..8).map(|n| KernelKey { op: Op::Matmul, dtype: DType::Q4_1, m: 1, n: 32 * (n + 1), k: 576 })
}

/// Nanoseconds a call, the best of several rounds.
fn best(mut round: impl FnMut(&[u64])) -> f64 {
    let mut state = 1u64;
    let samples: Vec<u64> = (0..1 << 16)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            100_000 + (state >> 48)
        })
        .collect();
    let time = |_| {
        let start = Instant::now();
        round(&samples);
        start.elapsed().as_nanos() as f64 / samples.len() as f64
    };
    (0..20).map(time).fold(f64::MAX, f64::min)
}

#[test]
#[ignore = "a measurement; see the module docs"]
fn record_costs_a_few_nanoseconds() {
    let mut stats = KeyStats::new();
    let alone = best(|samples| samples.iter().for_each(|&cycles| black_box(&mut stats).record(cycles)));
    let mut profile = Profile::new(keys());
    let in_slots = best(|samples| {
        samples.iter().enumerate().for_each(|(i, &cycles)| black_box(&mut profile).record(i % 8, 1, cycles));
    });
    println!("KeyStats::record {alone:.2} ns, Profile::record over 8 slots {in_slots:.2} ns");
    assert!(alone < 20.0 && in_slots < 20.0, "{alone} ns, {in_slots} ns");
}
