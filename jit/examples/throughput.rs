//! How fast compiled kernels are here, against the engine's hand-written AVX2 and plain reading, measured interleaved.
//!
//! `cargo run --release -p jit --example throughput -- [KEY ...] [--all] [--compile] [--avx2] [--rounds N] [--variant VARIANT ...]`, where KEY is a kernel name such as
//! `matmul_f32_m1_n576_k576`; without one, the shapes of a 135M-parameter llama. `--all` tries every legal variant of a
//! wide grid in place of the variant space, `--variant` the named ones, `--avx2` leaves AVX-512 out, `--compile`
//! only measures compilation.
//!
//! Weights take 256 MiB of different matrices in rotation, so a decode kernel (m = 1) reads from memory. Every round runs
//! every candidate once on the same matrices in a new order; the table gives medians over rounds, and the ratios are
//! medians of per-round ratios. Results are compared bit for bit with the baseline before anything is timed.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Random, Runnable, cpu_seconds, fill_w, fill_x, host_isa};
use engine::dispatch::ColumnsMut;
use engine::ops::run_baseline;
use engine::simd::Level;
use jit::{Compiler, space};
use model::Isa;
use model::kernel::{DType, Dot, KernelKey, Op, Variant, Width};
use model::layout::{k_multiple, padded, x_row_bytes};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

const ROTATION_BYTES: usize = 256 << 20;

/// Keys of SmolLM2-135M: qkv, attention output, gate and up, down, head.
fn default_keys() -> Vec<KernelKey> {
    let mut keys = Vec::new();
    for m in [1, 64] {
        for dtype in DType::ALL {
            for (op, n, k) in [
                (Op::Qkv, 960, 576_u32),
                (Op::MatmulResidual, 576, 576),
                (Op::GateUpSilu, 1536, 576),
                (Op::MatmulResidual, 576, 1536),
            ] {
                // The next depth that K types can have.
                keys.push(KernelKey { op, dtype, m, n, k: k.next_multiple_of(k_multiple(dtype) as u32) });
            }
        }
    }
    keys.push(KernelKey { op: Op::LmHead, dtype: DType::Q8_0, m: 1, n: 49152, k: 576 });
    keys
}

/// Every legal combination of a wide grid.
fn grid(key: &KernelKey) -> Vec<Variant> {
    let mut all = Vec::new();
    let rows: &[u8] = if key.m == 1 { &[1] } else { &[2, 3, 4, 6, 8, 12, 14] };
    for width in [Width::X128, Width::Y256, Width::Z512] {
        for dot in Dot::ALL {
            for rows in rows {
                for columns in [8, 16, 32] {
                    for streams in [1, 2, 3, 4, 6, 8] {
                        for unroll in [1, 2, 4, 8] {
                            for prefetch_bytes in [0, 512, 1024, 2048, 4096] {
                                let deep = key.m > 1 && (streams > 2 || !matches!(prefetch_bytes, 0 | 1024));
                                if !deep {
                                    all.push(Variant {
                                        width,
                                        dot,
                                        rows: *rows,
                                        columns,
                                        streams,
                                        unroll,
                                        prefetch_bytes,
                                        k_block: 0,
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

/// Which variants to measure.
enum Search {
    Space,
    Grid,
    These(Vec<Variant>),
}

/// Something that computes a key on operands.
enum Candidate {
    Read,
    Intrinsics,
    Compiled(Box<jit::CompiledKernel>, Runnable),
}

struct Operands<'a> {
    key: KernelKey,
    x: &'a [u8],
    ldy: usize,
}

impl Candidate {
    fn name(&self) -> String {
        match self {
            Candidate::Read => "read".into(),
            Candidate::Intrinsics => "intrinsics".into(),
            Candidate::Compiled(kernel, _) => kernel.variant.to_string(),
        }
    }

    fn run(&self, o: &Operands<'_>, w: &[u8], y: &mut [f32]) {
        match self {
            Candidate::Read => {
                // SAFETY: `main` requires AVX2, and the slice says how much there is to read.
                std::hint::black_box(unsafe { memory::read(w) });
            }
            Candidate::Intrinsics => {
                let (m, columns) = (o.key.m as usize, padded(o.key.n as usize));
                run_baseline(Level::detect(), &o.key, o.x, w, ColumnsMut::new(y, m, columns, o.ldy));
            }
            // SAFETY: as above; candidates are compiled for this machine.
            Candidate::Compiled(_, code) => unsafe {
                code.call(o.x.as_ptr(), w.as_ptr(), y.as_mut_ptr(), 4 * o.ldy, o.key.m as usize)
            },
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The system's allocator, with a count of the bytes in use and their peak.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(data, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Compiles the space of `key` five times over and prints what it takes: time, bytes, instructions.
fn compile_times(compiler: &mut Compiler, key: KernelKey) {
    let (mut us, mut audit_us, mut bytes, mut instructions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut heap = 0;
    for _ in 0..5 {
        for variant in space::variants(&key, compiler.isa()) {
            let before = IN_USE.load(Ordering::Relaxed);
            PEAK.store(before, Ordering::Relaxed);
            let begin = cpu_seconds();
            let kernel = compiler.compile(&key, &variant).unwrap_or_else(|e| panic!("{e}"));
            heap = heap.max(PEAK.load(Ordering::Relaxed) - before);
            us.push((cpu_seconds() - begin) * 1e6);
            let begin = cpu_seconds();
            jit::audit::audit(&kernel.code, variant.width).unwrap_or_else(|e| panic!("{e}"));
            audit_us.push((cpu_seconds() - begin) * 1e6);
            bytes.push(kernel.code.len() as f64);
            instructions.push(f64::from(kernel.stats.widen.instructions));
        }
    }
    println!(
        "{key}: compile us median {:.0} max {:.0} (audit {:.0}), bytes median {:.0} max {:.0}, instructions {:.0}, {:.0}, \
         heap peak {} KiB",
        median(&mut us),
        us[us.len() - 1],
        median(&mut audit_us),
        median(&mut bytes),
        bytes[bytes.len() - 1],
        median(&mut instructions),
        instructions[instructions.len() - 1],
        heap / 1024,
    );
}

/// Measures all candidates of `key` and prints the best.
fn measure(compiler: &mut Compiler, key: KernelKey, search: &Search, rounds: usize, rotation: &mut [u8]) {
    let shown = if matches!(search, Search::Space) { 6 } else { 24 };
    let matrix_bytes = key.weight_bytes() as usize;
    let matrices = rotation.len() / matrix_bytes;
    let mut random = Random(7);
    fill_w(&key, &mut rotation[..matrix_bytes], &mut random);
    // The same bytes in every matrix: they lie at different addresses, and no kernel's time depends on values.
    let (first, rest) = rotation.split_at_mut(matrix_bytes);
    for copy in rest.chunks_exact_mut(matrix_bytes) {
        copy.copy_from_slice(first);
    }
    let mut x = vec![0; key.m as usize * x_row_bytes(key.dtype, key.k as usize)];
    fill_x(key.dtype, &mut x, &mut random);
    let ldy = padded(key.n as usize);
    let operands = Operands { key, x: &x, ldy };

    let variants = match search {
        Search::Space => space::variants(&key, compiler.isa()),
        Search::Grid => grid(&key),
        Search::These(variants) => variants.clone(),
    };
    let mut candidates = vec![Candidate::Read, Candidate::Intrinsics];
    let mut compile_us = Vec::new();
    for variant in &variants {
        let begin = cpu_seconds();
        if let Ok(kernel) = compiler.compile(&key, variant) {
            compile_us.push((cpu_seconds() - begin) * 1e6);
            let code = Runnable::new(&kernel);
            candidates.push(Candidate::Compiled(Box::new(kernel), code));
        }
    }

    let run_once = |candidate: &Candidate, w: &[u8]| {
        let mut y = vec![0.5f32; key.m as usize * ldy];
        candidate.run(&operands, w, &mut y);
        y
    };
    let want = run_once(&candidates[1], &rotation[..matrix_bytes]);
    for candidate in &candidates[2..] {
        let got = run_once(candidate, &rotation[..matrix_bytes]);
        let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{key} as {} differs from the baseline", candidate.name());
    }

    // A sample is long enough to hide the clock and short enough that drift hits all candidates alike.
    let work = key.flops() as f64 * 1e-11 + matrix_bytes as f64 * 1e-10;
    let calls = ((2e-3 / work) as usize).clamp(1, matrices);
    let mut y = vec![0.0f32; key.m as usize * ldy];
    let mut times: Vec<Vec<f64>> = candidates.iter().map(|_| Vec::new()).collect();
    let mut at = 0;
    for round in 0..rounds {
        for i in 0..candidates.len() {
            let c = (i * 7919 + round * 31) % candidates.len();
            let begin = cpu_seconds();
            for _ in 0..calls {
                at = (at + 1) % matrices;
                candidates[c].run(&operands, &rotation[at * matrix_bytes..][..matrix_bytes], &mut y);
            }
            times[c].push((cpu_seconds() - begin) / calls as f64);
        }
    }

    let mut rows: Vec<(f64, f64, f64, String)> = Vec::new();
    for (c, candidate) in candidates.iter().enumerate() {
        let mut to_read: Vec<f64> = times[c].iter().zip(&times[0]).map(|(t, r)| r / t).collect();
        let mut to_intrinsics: Vec<f64> = times[c].iter().zip(&times[1]).map(|(t, r)| r / t).collect();
        let ratios = (median(&mut to_read), median(&mut to_intrinsics));
        rows.push((median(&mut times[c].clone()), ratios.0, ratios.1, candidate.name()));
    }
    let first_guess = rows.get(2).map(|r| r.0);
    let (baselines, compiled) = rows.split_at_mut(2);
    compiled.sort_by(|a, b| a.0.total_cmp(&b.0));
    let best = compiled.first().map_or(f64::NAN, |r| r.0);
    println!(
        "{key}: {} kernels, compile us median {:.0} max {:.0}; first guess at {:.2} of the best",
        compiled.len(),
        median(&mut compile_us.clone()),
        compile_us.iter().copied().fold(0.0, f64::max),
        best / first_guess.unwrap_or(f64::NAN),
    );
    for (seconds, to_read, to_intrinsics, name) in baselines.iter().chain(compiled.iter().take(shown)) {
        let flops = if name == "read" { 0.0 } else { key.flops() as f64 / seconds / 1e9 };
        println!(
            "  {name:<28} {:7.2} GB/s {flops:8.1} GFLOP/s  {to_read:5.2} of read  {to_intrinsics:5.2} of intrinsics",
            matrix_bytes as f64 / seconds / 1e9
        );
    }
}

fn main() {
    assert!(host_isa().avx2, "needs AVX2, FMA and F16C");
    let mut keys = Vec::new();
    let mut isa = host_isa();
    let (mut search, mut rounds, mut compile_only) = (Search::Space, 21, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--all" => search = Search::Grid,
            "--variant" => {
                let variant = args.next().and_then(|v| v.parse().ok()).expect("--variant w256_r6_c16_s1_u4_pf0");
                match &mut search {
                    Search::These(variants) => variants.push(variant),
                    other => *other = Search::These(vec![variant]),
                }
            }
            "--compile" => compile_only = true,
            "--avx2" => isa = Isa { avx512: false, avx512_vnni: false, ..isa },
            "--rounds" => rounds = args.next().and_then(|n| n.parse().ok()).expect("--rounds N"),
            name => keys.push(name.parse().unwrap_or_else(|e| panic!("{name}: {e}"))),
        }
    }
    if keys.is_empty() {
        keys = default_keys();
    }
    let mut compiler = Compiler::new(isa).expect("cranelift");
    if compile_only {
        keys.iter().for_each(|key| compile_times(&mut compiler, *key));
        return;
    }
    let mut rotation = common::Mapping::new(ROTATION_BYTES, 64);
    rotation.huge_pages();
    for key in keys {
        measure(&mut compiler, key, &search, rounds, rotation.bytes_mut());
    }
}

/// Plain reading.
mod memory {
    use std::arch::x86_64::*;

    /// Reads all of `w` as four streams and returns something that depends on it.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn read(w: &[u8]) -> u64 {
        let quarter = w.len() / 4 / 128 * 128;
        let mut sums = [_mm256_setzero_si256(); 4];
        for at in (0..quarter).step_by(128) {
            for (s, sum) in sums.iter_mut().enumerate() {
                for v in 0..4 {
                    // SAFETY: `at + 128 <= quarter`, so this is inside quarter `s` of the slice.
                    let data = unsafe { _mm256_loadu_si256(w.as_ptr().add(s * quarter + at + 32 * v).cast()) };
                    *sum = _mm256_xor_si256(*sum, data);
                }
            }
        }
        let all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
        _mm256_extract_epi64::<0>(all) as u64
    }
}
