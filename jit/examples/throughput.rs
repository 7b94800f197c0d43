//! How fast compiled kernels are here, against hand-written AVX2 and plain reading, measured interleaved.
//!
//! `cargo run --release -p jit --example throughput -- [KEY ...] [--all] [--compile] [--avx2] [--rounds N]`, where KEY is a kernel name such as
//! `matmul_f32_m1_n576_k576`; without one, the shapes of a 135M-parameter llama. `--all` tries every legal variant of a
//! wide grid in place of the variant space, `--avx2` leaves AVX-512 out, `--compile`
//! only measures compilation.
//!
//! Weights take 256 MiB of different matrices in rotation, so a decode kernel (m = 1) reads from memory. Every round runs
//! every candidate once on the same matrices in a new order; the table gives medians over rounds, and the ratios are
//! medians of per-round ratios. Results are compared bit for bit with the baseline before anything is timed.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Random, Runnable, fill_w, fill_x, host_isa};
use jit::{Compiler, space};
use model::kernel::{DType, KernelKey, Op, Variant, Width};
use model::layout::{padded, x_row_bytes};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

const ROTATION_BYTES: usize = 256 << 20;

/// Keys of SmolLM2-135M: qkv, attention output, gate and up, down, head.
fn default_keys() -> Vec<KernelKey> {
    let mut keys = Vec::new();
    for m in [1, 64] {
        for dtype in DType::ALL {
            for (op, n, k) in [
                (Op::Qkv, 960, 576),
                (Op::MatmulResidual, 576, 576),
                (Op::GateUpSilu, 1536, 576),
                (Op::MatmulResidual, 576, 1536),
            ] {
                keys.push(KernelKey { op, dtype, m, n, k });
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
        for vnni in [false, true] {
            for rows in rows {
                for columns in [8, 16, 32] {
                    for streams in [1, 2, 3, 4, 6, 8] {
                        for unroll in [1, 2, 4, 8] {
                            for prefetch_bytes in [0, 512, 1024, 2048, 4096] {
                                let deep = key.m > 1 && (streams > 2 || !matches!(prefetch_bytes, 0 | 1024));
                                if !deep {
                                    all.push(Variant {
                                        width,
                                        vnni,
                                        rows: *rows,
                                        columns,
                                        streams,
                                        unroll,
                                        prefetch_bytes,
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
                std::hint::black_box(unsafe { baseline::read(w) });
            }
            // SAFETY: `main` requires AVX2, FMA and F16C, and `measure` sizes the operands by the key.
            Candidate::Intrinsics => unsafe { baseline::run(&o.key, o.x, w, y, o.ldy) },
            // SAFETY: as above; candidates are compiled for this machine.
            Candidate::Compiled(_, code) => unsafe { code.call(o.x.as_ptr(), w.as_ptr(), y.as_mut_ptr(), 4 * o.ldy) },
        }
    }
}

/// CPU time of this thread: other processes on the machine cost a kernel cache and bandwidth, but no time on the clock.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(done, 0, "clock_gettime");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
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
fn measure(compiler: &mut Compiler, key: KernelKey, all: bool, rounds: usize, rotation: &mut [u8]) {
    let shown = if all { 24 } else { 6 };
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

    let variants = if all { grid(&key) } else { space::variants(&key, compiler.isa()) };
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
    let (mut all, mut rounds, mut compile_only) = (false, 21, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--all" => all = true,
            "--compile" => compile_only = true,
            "--avx2" => isa = jit::TargetIsa { avx512: false, avx512_vnni: false, ..isa },
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
        measure(&mut compiler, key, all, rounds, rotation.bytes_mut());
    }
}

/// Hand-written AVX2: one stream of weights; float tiles of 6 x 16 when there are rows, quantised types one row at a time
/// (a lenient baseline for m > 1: the engine's own SIMD operations are the ones to beat there).
mod baseline {
    use model::kernel::{DType, KernelKey, Op};
    use model::layout::{
        MINS_OFFSET, PANEL, XBLOCK_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_QS, XBLOCK_SUM, panel_bytes, panels,
        scales_offset, step_bytes, x_row_bytes,
    };
    use std::arch::x86_64::*;

    type Sums = [__m256; 4];

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

    /// Computes `key`.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C, and the operands are as large as the key says.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run(key: &KernelKey, x: &[u8], w: &[u8], y: &mut [f32], ldy: usize) {
        let (m, k) = (key.m as usize, key.k as usize);
        let row_bytes = x_row_bytes(key.dtype, k);
        let panel_len = panel_bytes(key.dtype, k);
        let parts = key.op.columns_per_output();
        for panel in 0..panels(key.n as usize) {
            let mut row = 0;
            while row < m {
                let rows = if key.dtype.is_quantised() { 1 } else { 6.min(m - row) };
                // SAFETY: rows and panels are in range, by the caller's promise.
                unsafe {
                    let xp = x.as_ptr().add(row * row_bytes);
                    let wp = w.as_ptr().add(panel * parts * panel_len);
                    let mut gate = [[_mm256_setzero_ps(); 4]; 6];
                    sums(key.dtype, k, xp, row_bytes, rows, wp, &mut gate);
                    let mut up = [[_mm256_setzero_ps(); 4]; 6];
                    if parts == 2 {
                        sums(key.dtype, k, xp, row_bytes, rows, wp.add(panel_len), &mut up);
                    }
                    for r in 0..rows {
                        for v in 0..4 {
                            let out = y.as_mut_ptr().add((row + r) * ldy + panel * PANEL + 8 * v);
                            let value = match key.op {
                                Op::GateUpSilu => _mm256_mul_ps(silu(gate[r][v]), up[r][v]),
                                Op::MatmulResidual => _mm256_add_ps(_mm256_loadu_ps(out), gate[r][v]),
                                _ => gate[r][v],
                            };
                            _mm256_storeu_ps(out, value);
                        }
                    }
                }
                row += rows;
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn silu(x: __m256) -> __m256 {
        use model::numerics::*;
        let c = |v: f32| _mm256_set1_ps(v);
        let z = _mm256_min_ps(_mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), x), c(EXP_LO)), c(EXP_HI));
        let t = _mm256_fmadd_ps(z, c(LOG2E), c(ROUND_MAGIC));
        let n = _mm256_sub_ps(t, c(ROUND_MAGIC));
        let r = _mm256_fmadd_ps(n, c(-LN2_LO), _mm256_fmadd_ps(n, c(-LN2_HI), z));
        let mut p = c(EXP_POLY[0]);
        for coefficient in &EXP_POLY[1..] {
            p = _mm256_fmadd_ps(p, r, c(*coefficient));
        }
        let e = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, c(1.0)));
        let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        let e = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e), power));
        _mm256_div_ps(x, _mm256_add_ps(c(1.0), e))
    }

    /// Sums of one panel for up to six rows: tiles of 6 x 16, or one row of 32 columns.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sums(
        dtype: DType,
        k: usize,
        x: *const u8,
        row_bytes: usize,
        rows: usize,
        w: *const u8,
        out: &mut [Sums; 6],
    ) {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            match (dtype, rows) {
                (DType::F32, 1) => float::<1, 4, false>(k, x, row_bytes, w, 0, out),
                (DType::F16, 1) => float::<1, 4, true>(k, x, row_bytes, w, 0, out),
                (DType::F32 | DType::F16, _) => {
                    for first in [0, 2] {
                        match (dtype, rows) {
                            (DType::F32, 6) => float::<6, 2, false>(k, x, row_bytes, w, first, out),
                            (DType::F32, 4) => float::<4, 2, false>(k, x, row_bytes, w, first, out),
                            (DType::F16, 6) => float::<6, 2, true>(k, x, row_bytes, w, first, out),
                            (DType::F16, 4) => float::<4, 2, true>(k, x, row_bytes, w, first, out),
                            _ => unreachable!("batch buckets leave 6 or 4 rows"),
                        }
                    }
                }
                (DType::Q8_0, _) => q8(k, x, w, &mut out[0]),
                (DType::Q4_0, _) => q4::<false>(k, x, w, &mut out[0]),
                (DType::Q4_1, _) => q4::<true>(k, x, w, &mut out[0]),
            }
        }
    }

    /// `R` rows times `V` vectors of columns from vector `first` on.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn float<const R: usize, const V: usize, const HALF: bool>(
        k: usize,
        x: *const u8,
        row_bytes: usize,
        w: *const u8,
        first: usize,
        out: &mut [Sums; 6],
    ) {
        let mut sums = [[_mm256_setzero_ps(); V]; R];
        for step in 0..k {
            let mut weights = [_mm256_setzero_ps(); V];
            for (v, weight) in weights.iter_mut().enumerate() {
                // SAFETY: step `step` of a panel of depth `k`.
                *weight = unsafe {
                    if HALF {
                        _mm256_cvtph_ps(_mm_loadu_si128(w.add(step * 64 + 16 * (first + v)).cast()))
                    } else {
                        _mm256_loadu_ps(w.add(step * 128 + 32 * (first + v)).cast())
                    }
                };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: element `step` of row `r`.
                let xv = unsafe { _mm256_broadcast_ss(&*x.add(r * row_bytes + 4 * step).cast()) };
                for v in 0..V {
                    sums[v] = _mm256_fmadd_ps(weights[v], xv, sums[v]);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(&sums) {
            out[first..first + V].copy_from_slice(sums);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn word(p: *const u8) -> __m256i {
        // SAFETY: the caller points into an activation block.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn q8(k: usize, x: *const u8, w: *const u8, out: &mut Sums) {
        let ones = _mm256_set1_epi16(1);
        for block in 0..k / 32 {
            // SAFETY: block `block` of a row and of a panel of depth `k`.
            unsafe {
                let (xb, wb) = (x.add(block * XBLOCK_BYTES), w.add(block * step_bytes(DType::Q8_0)));
                let mut dots = [_mm256_setzero_si256(); 4];
                for g in 0..8 {
                    let xv = word(xb.add(XBLOCK_QS + 4 * g));
                    for (v, dot) in dots.iter_mut().enumerate() {
                        let q = _mm256_loadu_si256(wb.add(g * 128 + 32 * v).cast());
                        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(xv, q));
                        *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, ones));
                    }
                }
                let dx = _mm256_broadcast_ss(&*xb.add(XBLOCK_D).cast());
                for v in 0..4 {
                    let dw = _mm256_cvtph_ps(_mm_loadu_si128(wb.add(scales_offset(DType::Q8_0) + 16 * v).cast()));
                    out[v] = _mm256_fmadd_ps(_mm256_mul_ps(dw, dx), _mm256_cvtepi32_ps(dots[v]), out[v]);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn q4<const MINS: bool>(k: usize, x: *const u8, w: *const u8, out: &mut Sums) {
        let dtype = if MINS { DType::Q4_1 } else { DType::Q4_0 };
        let (ones, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));
        for block in 0..k / 32 {
            // SAFETY: block `block` of a row and of a panel of depth `k`.
            unsafe {
                let (xb, wb) = (x.add(block * XBLOCK_BYTES), w.add(block * step_bytes(dtype)));
                let mut dots = [_mm256_setzero_si256(); 4];
                for g in 0..4 {
                    let (xl, xh) = (word(xb.add(XBLOCK_QS + 4 * g)), word(xb.add(XBLOCK_QS + 16 + 4 * g)));
                    for (v, dot) in dots.iter_mut().enumerate() {
                        let q = _mm256_loadu_si256(wb.add(g * 128 + 32 * v).cast());
                        let low = _mm256_maddubs_epi16(_mm256_and_si256(q, mask), xl);
                        let high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(q), mask), xh);
                        *dot = _mm256_add_epi16(*dot, _mm256_add_epi16(low, high));
                    }
                }
                let dx = _mm256_broadcast_ss(&*xb.add(XBLOCK_D).cast());
                let excess = _mm256_slli_epi32::<3>(word(xb.add(XBLOCK_SUM)));
                let dsum = _mm256_broadcast_ss(&*xb.add(XBLOCK_DSUM).cast());
                for v in 0..4 {
                    let mut dot = _mm256_madd_epi16(dots[v], ones);
                    if !MINS {
                        dot = _mm256_sub_epi32(dot, excess);
                    }
                    let dw = _mm256_cvtph_ps(_mm_loadu_si128(wb.add(scales_offset(dtype) + 16 * v).cast()));
                    out[v] = _mm256_fmadd_ps(_mm256_mul_ps(dw, dx), _mm256_cvtepi32_ps(dot), out[v]);
                    if MINS {
                        let mw = _mm256_cvtph_ps(_mm_loadu_si128(wb.add(MINS_OFFSET + 16 * v).cast()));
                        out[v] = _mm256_fmadd_ps(mw, dsum, out[v]);
                    }
                }
            }
        }
    }
}
