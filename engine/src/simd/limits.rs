//! What the machine can do at best: read bandwidth and multiply-add rates, measured where the model runs.
//!
//! These are the roofs that kernels are compared with, so each probe is the fastest loop known for its one resource
//! and does nothing else. Results are in units per TSC tick, which is what kernels are timed in.

use super::{Level, cycles};
use crate::forward::Engine;
use crate::workers::Workers;
use core::sync::atomic::{AtomicU64, Ordering};
use model::Isa;

/// Measured limits of some cores together.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Limits {
    /// Bytes read from memory per tick, in the best of several passes.
    pub read_bytes_per_cycle: f64,
    /// The same over all passes of one kind: what a program gets that does nothing but read.
    pub sustained_read_bytes_per_cycle: f64,
    /// f32 operations per tick, a fused multiply-add counted as two.
    pub fma_flops_per_cycle: f64,
    /// Operations of exact int8 dot products per tick (`vpmaddubsw` and `vpmaddwd`), a multiply-add counted as two.
    pub int8_ops_per_cycle: f64,
    /// Share of its time in which the core that was interrupted most did not run: host, hypervisor, interrupts of a system.
    pub interrupted: f64,
}

/// Passes over the memory of [`read_bandwidth`] for each access pattern; the best counts.
const READ_PASSES: usize = 3;
/// Bytes of each measured pass at most.
const READ_BYTES: usize = 64 << 20;
/// Repetitions of each arithmetic probe; the best counts.
const ARITHMETIC_PASSES: usize = 5;
const ARITHMETIC_ITERATIONS: u64 = 4000;
/// Ticks for which cores watch the clock: some milliseconds, several timer interrupts of a host.
const WATCH_TICKS: u64 = 60_000_000;
/// Two readings of the clock that are so many ticks apart had something between them: a reading takes some tens, the shortest
/// interrupt a thousand.
const GAP_TICKS: u64 = 1000;

/// Measures all limits of the first `cores` workers. `memory` should be larger than the last-level cache, best the
/// weights themselves.
///
/// Arithmetic is measured with the best instructions of `isa` that this CPU has: a compiled kernel may use them.
pub fn measure(memory: &[u8], level: Level, isa: Isa, workers: &dyn Workers, cores: usize) -> Limits {
    let cores = cores.clamp(1, workers.count());
    let wide = Wide::new(isa);
    let (read_bytes_per_cycle, sustained_read_bytes_per_cycle) = read_bandwidth(memory, level, workers, cores);
    Limits {
        read_bytes_per_cycle,
        sustained_read_bytes_per_cycle,
        fma_flops_per_cycle: best_rate(workers, cores, || fma_probe(level, ARITHMETIC_ITERATIONS)).max(best_rate(
            workers,
            cores,
            || wide.fma(ARITHMETIC_ITERATIONS),
        )),
        int8_ops_per_cycle: best_rate(workers, cores, || int8_probe(level, ARITHMETIC_ITERATIONS)).max(best_rate(
            workers,
            cores,
            || wide.int8(ARITHMETIC_ITERATIONS),
        )),
        interrupted: interrupted(workers, cores),
    }
}

/// Which probes beyond AVX2 may run: allowed by the caller and there.
#[derive(Clone, Copy)]
struct Wide {
    avx512: bool,
    avx512_vnni: bool,
    avx_vnni: bool,
}

impl Wide {
    fn new(isa: Isa) -> Self {
        let here = crate::isa::detect();
        Self {
            avx512: isa.avx512 && here.avx512,
            avx512_vnni: isa.avx512_vnni && here.avx512_vnni,
            avx_vnni: isa.avx_vnni && here.avx_vnni,
        }
    }

    /// Operations done; 0 where the instructions are missing.
    fn fma(self, iterations: u64) -> u64 {
        // SAFETY: `new` saw AVX-512 F with its register state enabled.
        if self.avx512 { unsafe { avx512::fma(iterations) } } else { 0 }
    }

    /// Operations done; 0 where the instructions are missing.
    fn int8(self, iterations: u64) -> u64 {
        match (self.avx512_vnni, self.avx_vnni) {
            // SAFETY: `new` saw AVX-512 VNNI with its register state enabled.
            (true, _) => unsafe { avx512::int8(iterations) },
            // SAFETY: `new` saw AVX-VNNI with its register state enabled.
            (_, true) => unsafe { avx_vnni::int8(iterations) },
            _ => 0,
        }
    }
}

impl Engine<'_> {
    /// The packed weights.
    pub fn weights(&self) -> &[u8] {
        self.weights
    }

    /// Reads `len_bytes` of the weights once, another stretch for each `turn`: a fixed piece of work whose time tells how
    /// fast the machine's memory is at this moment.
    pub fn read_weights(&self, len_bytes: usize, turn: usize) {
        let windows = (self.weights.len() / len_bytes.max(1)).max(1);
        let start = (turn % windows) * len_bytes;
        let window = &self.weights[start.min(self.weights.len())..(start + len_bytes).min(self.weights.len())];
        core::hint::black_box(read_once(window, true, self.table().level()));
    }
}

/// Reads all of `memory` once, as fast as one core can.
pub fn read(memory: &[u8], level: Level) {
    core::hint::black_box(read_once(memory, true, level));
}

/// Bytes per tick over the first `cores` workers, each reading its own part of `memory`, in one stream or in four with software
/// prefetch: in the best pass, and in all passes of the better kind.
fn read_bandwidth(memory: &[u8], level: Level, workers: &dyn Workers, cores: usize) -> (f64, f64) {
    let mut best = 0.0f64;
    // Bytes and ticks of each kind.
    let mut read = [(0, 0); 2];
    for pass in 0..2 * READ_PASSES {
        // Each pass reads another stretch, so that a small last-level cache cannot serve it.
        let windows = (memory.len() / READ_BYTES).max(1);
        let start = (pass % windows) * READ_BYTES;
        let window = &memory[start.min(memory.len())..(start + READ_BYTES).min(memory.len())];
        let part_bytes = window.len() / cores / 4096 * 4096;
        if part_bytes == 0 {
            break;
        }
        let checksum = AtomicU64::new(0);
        let before = cycles();
        workers.run(&|i| {
            if i >= cores {
                return;
            }
            let part = &window[i * part_bytes..(i + 1) * part_bytes];
            checksum.fetch_xor(read_once(part, pass % 2 == 1, level), Ordering::Relaxed);
        });
        let ticks = cycles().wrapping_sub(before).max(1);
        core::hint::black_box(checksum.load(Ordering::Relaxed));
        best = best.max((part_bytes * cores) as f64 / ticks as f64);
        let (bytes, all_ticks) = &mut read[pass % 2];
        *bytes += part_bytes * cores;
        *all_ticks += ticks;
    }
    (best, read.iter().fold(0.0, |max, (bytes, ticks)| f64::max(max, *bytes as f64 / (*ticks).max(1) as f64)))
}

fn read_once(part: &[u8], streams: bool, level: Level) -> u64 {
    match level.avx2() {
        // SAFETY: the level proves AVX2.
        Some(_) => unsafe { if streams { avx2::read_four_streams(part) } else { avx2::read_one_stream(part) } },
        None => part.as_chunks::<8>().0.iter().fold(0, |x, chunk| x ^ u64::from_le_bytes(*chunk)),
    }
}

fn best_rate(workers: &dyn Workers, cores: usize, probe: impl Fn() -> u64 + Sync) -> f64 {
    let mut best = 0.0f64;
    for _ in 0..ARITHMETIC_PASSES {
        let operations = AtomicU64::new(0);
        let before = cycles();
        workers.run(&|i| {
            if i < cores {
                operations.fetch_add(probe(), Ordering::Relaxed);
            }
        });
        let ticks = cycles().wrapping_sub(before).max(1);
        best = best.max(operations.load(Ordering::Relaxed) as f64 / ticks as f64);
    }
    best
}

/// Share of time that the first `cores` workers do not see pass, of the one that loses most.
fn interrupted(workers: &dyn Workers, cores: usize) -> f64 {
    let most = AtomicU64::new(0);
    workers.run(&|i| {
        if i >= cores {
            return;
        }
        let start = cycles();
        let (mut now, mut lost) = (start, 0);
        while now.wrapping_sub(start) < WATCH_TICKS {
            let next = cycles();
            let gap = next.wrapping_sub(now);
            lost += if gap >= GAP_TICKS { gap } else { 0 };
            now = next;
        }
        most.fetch_max(lost, Ordering::Relaxed);
    });
    (most.load(Ordering::Relaxed) as f64 / WATCH_TICKS as f64).min(1.0)
}

/// Runs independent f32 multiply-adds and returns their operations.
fn fma_probe(level: Level, iterations: u64) -> u64 {
    match level.avx2() {
        // SAFETY: the level proves AVX2 and FMA.
        Some(_) => unsafe { avx2::fma(iterations) },
        None => {
            let mut lanes = core::hint::black_box([1.0f32; 16]);
            for _ in 0..iterations {
                for lane in &mut lanes {
                    *lane = *lane * 0.999 + 0.001;
                }
            }
            core::hint::black_box(lanes);
            iterations * 16 * 2
        }
    }
}

/// Runs independent int8 dot products and returns their operations.
fn int8_probe(level: Level, iterations: u64) -> u64 {
    match level.avx2() {
        // SAFETY: the level proves AVX2.
        Some(_) => unsafe { avx2::int8(iterations) },
        None => {
            let mut lanes = core::hint::black_box([1i32; 16]);
            for i in 0..iterations {
                for lane in &mut lanes {
                    *lane = lane.wrapping_add(i32::from(*lane as i8) * i32::from(i as i8));
                }
            }
            core::hint::black_box(lanes);
            iterations * 16 * 2
        }
    }
}

mod avx2 {
    use core::arch::x86_64::*;

    #[target_feature(enable = "avx2")]
    pub(super) fn read_one_stream(part: &[u8]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 4];
        for chunk in part.as_chunks::<128>().0 {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `32 i + 32 <= 128` bytes lie in the chunk.
                let value = unsafe { _mm256_loadu_si256(chunk.as_ptr().add(32 * i).cast()) };
                *sum = _mm256_xor_si256(*sum, value);
            }
        }
        fold(sums)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn read_four_streams(part: &[u8]) -> u64 {
        let quarter = part.len() / 4 / 64 * 64;
        let mut sums = [_mm256_setzero_si256(); 4];
        for at in (0..quarter).step_by(64) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `i * quarter + at + 64 <= part.len()`.
                let (low, high) = unsafe {
                    let line = part.as_ptr().add(i * quarter + at);
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(2048).cast());
                    (_mm256_loadu_si256(line.cast()), _mm256_loadu_si256(line.add(32).cast()))
                };
                *sum = _mm256_xor_si256(*sum, _mm256_xor_si256(low, high));
            }
        }
        fold(sums)
    }

    #[target_feature(enable = "avx2")]
    fn fold(sums: [__m256i; 4]) -> u64 {
        let sum = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
        let half = _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        (_mm_extract_epi64::<0>(half) ^ _mm_extract_epi64::<1>(half)) as u64
    }

    /// Independent chains: latency 4 or 5 at two per tick needs at least ten.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma(iterations: u64) -> u64 {
        let (a, b) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
        // Opaque, or the equal chains would be computed once.
        let mut sums = core::hint::black_box([_mm256_set1_ps(1.0); CHAINS]);
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        core::hint::black_box(sums);
        iterations * CHAINS as u64 * 8 * 2
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn int8(iterations: u64) -> u64 {
        let ones = _mm256_set1_epi16(1);
        let mut sums = core::hint::black_box([_mm256_setzero_si256(); 8]);
        let mut weights = _mm256_set1_epi8(3);
        for _ in 0..iterations {
            for sum in &mut sums {
                let pairs = _mm256_maddubs_epi16(weights, *sum);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
            // Keeps the loop from being computed once.
            weights = _mm256_xor_si256(weights, ones);
        }
        core::hint::black_box(sums);
        iterations * sums.len() as u64 * 32 * 2
    }
}

mod avx_vnni {
    use core::arch::x86_64::*;

    const CHAINS: usize = 12;

    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) fn int8(iterations: u64) -> u64 {
        let (a, b) = (_mm256_set1_epi8(3), core::hint::black_box(_mm256_set1_epi8(5)));
        let mut sums = core::hint::black_box([_mm256_setzero_si256(); CHAINS]);
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
            }
        }
        core::hint::black_box(sums);
        iterations * CHAINS as u64 * 32 * 2
    }
}

mod avx512 {
    use core::arch::x86_64::*;

    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma(iterations: u64) -> u64 {
        let (a, b) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
        let mut sums = core::hint::black_box([_mm512_set1_ps(1.0); CHAINS]);
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        core::hint::black_box(sums);
        iterations * CHAINS as u64 * 16 * 2
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8(iterations: u64) -> u64 {
        let (a, b) = (_mm512_set1_epi8(3), core::hint::black_box(_mm512_set1_epi8(5)));
        let mut sums = core::hint::black_box([_mm512_setzero_si512(); CHAINS]);
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        core::hint::black_box(sums);
        iterations * CHAINS as u64 * 64 * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::Single;
    use alloc::vec;

    #[test]
    fn every_probe_measures_something() {
        let memory = vec![7u8; 1 << 20];
        for level in [Level::Portable, Level::detect()] {
            let limits = measure(&memory, level, crate::isa::detect(), &Single, 1);
            assert!(limits.read_bytes_per_cycle > 0.0 && limits.read_bytes_per_cycle.is_finite());
            let sustained = limits.sustained_read_bytes_per_cycle;
            assert!(sustained > 0.0 && sustained <= limits.read_bytes_per_cycle, "{sustained} of {limits:?}");
            assert!((0.0..=1.0).contains(&limits.interrupted));
            // More than a core can do means that the probe was optimised away: 2 x 16 lanes x 2 ports, and 4 times that.
            assert!(limits.fma_flops_per_cycle > 0.0 && limits.fma_flops_per_cycle < 128.0);
            assert!(limits.int8_ops_per_cycle > 0.0 && limits.int8_ops_per_cycle < 512.0);
        }
    }

    #[test]
    fn reading_covers_every_byte() {
        let mut memory = vec![0u8; 4096];
        for at in [0, 1023, 1024, 2047, 4095] {
            memory[at] = 1 << (at % 8);
            for streams in [false, true] {
                assert_ne!(read_once(&memory, streams, Level::detect()), 0, "byte {at}");
            }
            memory[at] = 0;
        }
    }
}
