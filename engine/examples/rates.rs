//! Rates of packing and of the hand-written ops on this machine: `cargo run --release -p engine --example rates`.
//!
//! Each line is the median of 15 runs, in CPU time of the thread: on a shared machine wall time measures the neighbours.
//! The operands of the ops are larger than the caches for one row (so GB/s is
//! memory) and the shapes are those of SmolLM2-135M. Reading the buffer is the limit that packing and one-row ops have.

use engine::SplitMix64;
use engine::dispatch::ColumnsMut;
use engine::operands::{AlignedBytes, random_activations, random_weights};
use engine::ops::{run_baseline, run_reference};
use engine::pack::{ColumnMap, RowFormat, pack_rows};
use engine::simd::Level;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{PANEL, k_multiple, packed_len_bytes, padded};
use std::hint::black_box;
use std::time::Duration;

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn median_seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<f64> = (0..15)
        .map(|_| {
            let start = cpu_time();
            run();
            (cpu_time() - start).as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let level = Level::detect();
    let file: Vec<u8> = {
        let mut rng = SplitMix64::new(1);
        (0..8 << 20).flat_map(|_| rng.next_u64().to_le_bytes()).collect()
    };
    let sum =
        || black_box(file.as_chunks::<8>().0.iter().fold(0u64, |sum, x| sum.wrapping_add(u64::from_le_bytes(*x))));
    println!(
        "read 64 MiB: {:.2} GB/s",
        file.len() as f64
            / 1e9
            / median_seconds(|| {
                black_box(sum());
            })
    );
    let mut copy = vec![0u8; file.len()];
    println!("copy 64 MiB: {:.2} GB/s", file.len() as f64 / 1e9 / median_seconds(|| copy.copy_from_slice(&file)));

    let formats: Vec<RowFormat> = model::TensorType::ALL.iter().filter_map(|&ty| RowFormat::of(ty)).collect();
    for format in formats {
        for k in [576usize, 1536] {
            let k = k.next_multiple_of(format.block_elements());
            let n = (32 << 20) / format.row_bytes(k) / 32 * 32;
            let rows = &file[..n * format.row_bytes(k)];
            let mut packed = AlignedBytes::zeroed(packed_len_bytes(format.dtype(), n, k));
            let rate = |level: Level, packed: &mut [u8]| {
                // As the loader does it: whole panels of about a disk request.
                let chunk_rows = ((1 << 20) / format.row_bytes(k)).next_multiple_of(PANEL);
                let seconds = median_seconds(|| {
                    let mut column = 0;
                    for rows in rows.chunks(chunk_rows * format.row_bytes(k)) {
                        pack_rows(level, format, k, ColumnMap::WHOLE, column, rows, packed);
                        column += rows.len() / format.row_bytes(k);
                    }
                });
                rows.len() as f64 / 1e9 / seconds
            };
            let (fast, portable) = (rate(level, &mut packed), rate(Level::Portable, &mut packed));
            println!("pack {format:?} k={k}: {fast:.2} GB/s of file bytes, portable {portable:.2}");
        }
    }

    for dtype in DType::ALL {
        for (m, n, k) in
            [(1, 49152, 576), (1, 1536, 576), (4, 1536, 576), (16, 1536, 576), (64, 1536, 576), (64, 576, 1536)]
        {
            // The next depth that K types can have.
            let key = KernelKey { op: Op::Matmul, dtype, m, n, k: u32::next_multiple_of(k, k_multiple(dtype) as u32) };
            let mut rng = SplitMix64::new(2);
            let (x, w) = (random_activations(&key, &mut rng), random_weights(&key, &mut rng));
            let ldy = padded(n as usize);
            let mut y = vec![0.0f32; m as usize * ldy];
            let mut rate = |f: fn(Level, &KernelKey, &[u8], &[u8], ColumnsMut<'_>)| {
                median_seconds(|| f(level, &key, &x, &w, ColumnsMut::new(&mut y, m as usize, ldy, ldy)))
            };
            let fast = rate(run_baseline);
            let reference = if key.flops() < 1 << 28 { rate(run_reference) / fast } else { f64::NAN };
            println!(
                "{key}: {:.2} GB/s of weights, {:.1} GFLOP/s, reference takes {reference:.1} times as long",
                w.len() as f64 / 1e9 / fast,
                key.flops() as f64 / 1e9 / fast
            );
        }
    }
}
