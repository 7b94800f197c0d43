//! One square f32 matrix product: compiled kernels beside the hand-written AVX2 op, the `matrixmultiply` crate, and the
//! machine's multiply-add peak, measured interleaved on one core.
//!
//! `cargo run --release -p jit --example gemm -- [--size N] [--rounds N] [--json]`
//!
//! Ours do it as the engine does a long prompt: in batches of the largest bucket, with the right-hand matrix packed in panels
//! beforehand, as weights are; `matrixmultiply` packs both operands in every call, which is its interface. Results are
//! checked before anything is timed: ours bit for bit against each other, the crate's to rounding.
//!
//! Each share of the peak is one of the peak measured just before. Beside a compiled kernel stands what its register tile
//! reaches where all operands are in the first-level cache: what is missing there, no blocking can bring back. Where
//! somebody else runs on the core's other hardware thread, loads and multiply-adds no longer overlap as well as
//! multiply-adds alone, and this share falls while the peak does not.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Mapping, Random, Runnable, cpu_seconds, host_isa};
use engine::dispatch::ColumnsMut;
use engine::simd::{Level, limits};
use jit::{Compiler, space};
use model::kernel::{DType, KernelKey, M_BUCKETS, Op, Variant, Width};
use model::layout::PANEL;
use serde_json::json;

/// Something that computes `y = x w`.
enum Candidate {
    Crate,
    HandWritten,
    Compiled(Runnable),
}

struct Measured {
    name: String,
    isa: &'static str,
    candidate: Candidate,
    /// The same register tile on operands that fit the first-level cache.
    tile: Option<Runnable>,
    /// Of each round.
    seconds: Vec<f64>,
    /// Shares of the peak, of each round: of the product, and of the tile alone.
    of_peak: Vec<f64>,
    tile_of_peak: Vec<f64>,
}

/// Depth and columns of the product that a tile runs alone: with the rows of the largest bucket 26 KiB.
const TILE_K: u32 = 48;
const TILE_N: u32 = PANEL as u32;
/// Calls of it in a row.
const TILE_CALLS: u32 = 200;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2] + values[(values.len() - 1) / 2]) / 2.0
}

fn main() {
    assert!(host_isa().avx2, "needs AVX2, FMA and F16C");
    let (mut size, mut rounds, mut as_json) = (512u32, 15, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = |flag| args.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{flag} N"));
        match arg.as_str() {
            "--size" => size = number("--size"),
            "--rounds" => rounds = number("--rounds"),
            "--json" => as_json = true,
            other => panic!("unknown argument {other}"),
        }
    }
    let n = size as usize;
    let rows = M_BUCKETS[M_BUCKETS.len() - 1] as usize;
    assert!(size > 0 && n.is_multiple_of(PANEL) && n.is_multiple_of(rows), "--size: a multiple of {PANEL} and {rows}");
    let key = KernelKey { op: Op::Matmul, dtype: DType::F32, m: rows as u32, n: size, k: size };
    let flops = 2.0 * (n * n * n) as f64;

    let mut random = Random(3);
    let mut floats =
        |len| (0..len).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect::<Vec<f32>>();
    let (x, w) = (floats(n * n), floats(n * n));
    // Panels of PANEL columns, k after k.
    let mut packed = Mapping::new(4 * n * n, 64);
    for (i, value) in packed.floats_mut().iter_mut().enumerate() {
        let (panel, k, column) = (i / (n * PANEL), i / PANEL % n, i % PANEL);
        *value = w[k * n + panel * PANEL + column];
    }
    let mut x_bytes = Mapping::new(4 * n * n, 64);
    x_bytes.floats_mut().copy_from_slice(&x);

    let mut compiler = Compiler::new(host_isa()).expect("cranelift");
    let entry = |name: String, isa, candidate, tile| Measured {
        name,
        isa,
        candidate,
        tile,
        seconds: Vec::new(),
        of_peak: Vec::new(),
        tile_of_peak: Vec::new(),
    };
    let mut all = vec![
        entry("matrixmultiply 0.3".into(), "avx2", Candidate::Crate, None),
        entry("hand-written".into(), "avx2", Candidate::HandWritten, None),
    ];
    let tile_key = KernelKey { n: TILE_N, k: TILE_K, ..key };
    for variant in space::variants(&key, host_isa()) {
        if let Ok(kernel) = compiler.compile(&key, &variant) {
            let isa = if variant.width == Width::Z512 { "avx512" } else { "avx2" };
            let tile = compiler.compile(&tile_key, &Variant { k_block: 0, prefetch_bytes: 0, ..variant }).ok();
            let code = Candidate::Compiled(Runnable::new(&kernel));
            all.push(entry(variant.to_string(), isa, code, tile.as_ref().map(Runnable::new)));
        }
    }
    assert!(all.len() > 2, "no variant of {key} compiles for this machine");
    let level = Level::detect();
    let run = |candidate: &Candidate, y: &mut [f32]| match candidate {
        Candidate::Crate => {
            // SAFETY: three row-major matrices of n rows and columns, which the slices hold.
            unsafe {
                let (ld, one) = (n as isize, 1);
                matrixmultiply::sgemm(
                    n,
                    n,
                    n,
                    1.0,
                    x.as_ptr(),
                    ld,
                    one,
                    w.as_ptr(),
                    ld,
                    one,
                    0.0,
                    y.as_mut_ptr(),
                    ld,
                    one,
                )
            }
        }
        Candidate::HandWritten => {
            for (x, y) in x_bytes.bytes().chunks_exact(4 * n * rows).zip(y.chunks_exact_mut(n * rows)) {
                engine::ops::run_baseline(level, &key, x, packed.bytes(), ColumnsMut::new(y, rows, n, n));
            }
        }
        Candidate::Compiled(code) => {
            for (x, y) in x_bytes.bytes().chunks_exact(4 * n * rows).zip(y.chunks_exact_mut(n * rows)) {
                // SAFETY: the operands are as large as the key says, and the kernel was compiled for this machine.
                unsafe { code.call(x.as_ptr(), packed.bytes().as_ptr(), y.as_mut_ptr(), 4 * n, rows) };
            }
        }
    };

    let mut want = vec![0.0f32; n * n];
    run(&all[1].candidate, &mut want);
    for measured in &all {
        let mut got = vec![0.5f32; n * n];
        run(&measured.candidate, &mut got);
        for (got, want) in got.iter().zip(&want) {
            let same = match measured.candidate {
                Candidate::Crate => (got - want).abs() < 1e-3,
                _ => got.to_bits() == want.to_bits(),
            };
            assert!(same, "{}: {got} is not {want}", measured.name);
        }
    }

    let mut y = vec![0.0f32; n * n];
    let count = all.len();
    let avx2_only = model::Isa { avx512: false, avx512_vnni: false, ..engine::isa::detect() };
    let hz = tsc_hz();
    let peak = |isa: &str| {
        let isa = if isa == "avx512" { engine::isa::detect() } else { avx2_only };
        limits::measure(&[], level, isa, &engine::workers::Single, 1).fma_flops_per_cycle * hz
    };
    let mut peaks = [Vec::new(), Vec::new()];
    let tile_flops = 2.0 * (rows as u32 * TILE_N * TILE_K * TILE_CALLS) as f64;
    for round in 0..rounds {
        for i in 0..count {
            let measured = &mut all[(i + round as usize) % count];
            let peak_flop_s = peak(measured.isa);
            peaks[usize::from(measured.isa == "avx512")].push(peak_flop_s / 1e9);
            let begin = cpu_seconds();
            run(&measured.candidate, &mut y);
            let seconds = cpu_seconds() - begin;
            measured.seconds.push(seconds);
            measured.of_peak.push(flops / seconds / peak_flop_s);
            if let Some(tile) = &measured.tile {
                let begin = cpu_seconds();
                for _ in 0..TILE_CALLS {
                    // SAFETY: the operands are larger than the tile's key says, and it was compiled for this machine.
                    unsafe {
                        tile.call(x.as_ptr().cast(), packed.bytes().as_ptr(), y.as_mut_ptr(), 4 * PANEL, rows);
                    }
                }
                measured.tile_of_peak.push(tile_flops / (cpu_seconds() - begin) / peak_flop_s);
            }
        }
    }
    let [avx2_peak, best_peak] = peaks.map(|peak| if peak.is_empty() { f64::NAN } else { median(peak) });
    let gflop_s = |m: &Measured| flops / median(m.seconds.clone()) / 1e9;
    let to_crate = |m: &Measured| {
        median(m.seconds.iter().zip(&all[0].seconds).map(|(own, other)| other / own).collect::<Vec<_>>())
    };
    let best = |isa: &str| {
        let own = all.iter().skip(2).filter(|m| m.isa == isa);
        own.max_by(|a, b| gflop_s(a).total_cmp(&gflop_s(b)))
    };
    let shown = [Some(&all[0]), Some(&all[1]), best("avx2"), best("avx512")];
    let lines: Vec<_> = shown
        .into_iter()
        .flatten()
        .map(|m| {
            let tile = m.tile.is_some().then(|| median(m.tile_of_peak.clone()));
            json!({"name": m.name, "isa": m.isa, "gflop_s": gflop_s(m), "fraction_of_peak": median(m.of_peak.clone()),
                "tile_fraction_of_peak": tile, "over_crate": to_crate(m)})
        })
        .collect();
    if as_json {
        let value = json!({"size": size, "rounds": rounds, "avx2_peak_gflop_s": avx2_peak, "best_peak_gflop_s": best_peak, "rows": lines});
        println!("{value:#}");
        return;
    }
    let avx512_peak = if best_peak.is_nan() { String::new() } else { format!(", {best_peak:.1} (AVX-512)") };
    println!("n = m = k = {size}, f32, one core: FMA peak {avx2_peak:.1} GFLOP/s (AVX2){avx512_peak}");
    for row in &lines {
        let number = |field: &str| row[field].as_f64().unwrap_or(f64::NAN);
        let tile = row["tile_fraction_of_peak"]
            .as_f64()
            .map_or_else(String::new, |tile| format!("  its tile alone {tile:.2}"));
        println!(
            "  {:<28} {:>7.1} GFLOP/s  {:>5.2} of matrixmultiply  {:>5.2} of peak{tile}",
            row["name"].as_str().unwrap_or_default(),
            number("gflop_s"),
            number("over_crate"),
            number("fraction_of_peak"),
        );
    }
}

/// Ticks of the time-stamp counter per second of the wall clock.
fn tsc_hz() -> f64 {
    let (begin, ticks) = (std::time::Instant::now(), engine::cycles());
    std::thread::sleep(std::time::Duration::from_millis(50));
    (engine::cycles() - ticks) as f64 / begin.elapsed().as_secs_f64()
}
