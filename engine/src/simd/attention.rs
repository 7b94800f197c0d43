//! One block of the KV cache for up to twelve queries, 8 lanes (AVX2) or 16 (AVX-512) at a time: the operations of
//! `attention::portable_pass`, lane by lane.
//!
//! A key or value vector is loaded and widened once for `R` queries, each of which has `V` vectors of sums: enough
//! independent chains to hide the latency of the multiply-add. `R` up to 4 is one position's heads while decoding, 12 are the
//! rows and heads of a prompt.

use super::fma::Hardware;
use super::math::exp8;
use super::{Avx2, Avx512};
use crate::attention::{self, Block, KvType, MAX_TILE, Running, Seen, Tile};
use crate::reference::ScalarArithmetic;
use core::arch::x86_64::*;
use core::ops::Range;
use model::layout::{KV_BLOCK, KV_PANEL};
use model::numerics::{EXP_HI, EXP_LO, EXP_POLY, LN2_HI, LN2_LO, LOG2E, ROUND_MAGIC};

/// Every element type has forms for every number of queries and vector width; else only f16 does (see `Cargo.toml`).
const EVERY_FORM: bool = crate::ops::HAS_BASELINE;

/// Asks for the `len_bytes` behind the first `so_far` of what is read `later`. The hardware's own prefetch does not reach far enough
/// ahead of loops with this much arithmetic. Half a block ahead it is: while keys are used, values are asked for, and while these
/// are, the next block's keys. Passes that take a part of each row go over the rows several times, so what counts is how much they
/// have used, not where. Until then lines wait in the second level.
#[inline(always)]
fn prefetch(later: *const u8, so_far: usize, len_bytes: usize) {
    for line in (0..len_bytes).step_by(64) {
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(later.wrapping_add(so_far + line).cast()) };
    }
}

/// A vector of f32.
///
/// # Safety
/// Every method needs the vector's instruction set; pointers must be good for [`Lanes::N`] elements.
trait Lanes: Copy {
    /// Lanes.
    const N: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn widen_f16(from: *const u8) -> Self;
    unsafe fn widen_i8(from: *const u8) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    /// The larger one, `b` when either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    unsafe fn exp(self) -> Self;
    /// `max` over the lanes.
    unsafe fn max_of(self) -> f32;
    /// Folds the 32 lanes of a reduction, `32 / N` vectors of `sums`, by halves.
    unsafe fn fold(sums: [Self; 4]) -> f32;
}

#[derive(Clone, Copy)]
struct Ymm(__m256);

// SAFETY (of every body): the caller has AVX2, FMA and F16C and passes good pointers.
impl Lanes for Ymm {
    const N: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn widen_f16(from: *const u8) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn widen_i8(from: *const u8) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: see above.
        unsafe { Self(exp8(self.0)) }
    }
    #[inline(always)]
    unsafe fn max_of(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let max = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
            _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)))
        }
    }
    #[inline(always)]
    unsafe fn fold(sums: [Self; 4]) -> f32 {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (sums[0].add(sums[2]), sums[1].add(sums[3]));
            let sum = low.add(high).0;
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
        }
    }
}

#[derive(Clone, Copy)]
struct Zmm(__m512);

// SAFETY (of every body): the caller has AVX-512 F, BW, DQ and VL and passes good pointers.
impl Lanes for Zmm {
    const N: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn widen_f16(from: *const u8) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn widen_i8(from: *const u8) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: see above. The steps of `math::exp_with`.
        unsafe {
            let x = _mm512_max_ps(self.0, _mm512_set1_ps(EXP_LO));
            let x = _mm512_min_ps(x, _mm512_set1_ps(EXP_HI));
            let t = _mm512_fmadd_ps(x, _mm512_set1_ps(LOG2E), _mm512_set1_ps(ROUND_MAGIC));
            let n = _mm512_sub_ps(t, _mm512_set1_ps(ROUND_MAGIC));
            let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_HI), x);
            let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_LO), r);
            let mut p = _mm512_set1_ps(EXP_POLY[0]);
            for c in &EXP_POLY[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
            }
            let e = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0)));
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(e), exponent)))
        }
    }
    #[inline(always)]
    unsafe fn max_of(self) -> f32 {
        // SAFETY: see above.
        unsafe { Ymm(_mm512_castps512_ps256(self.0)).max(Ymm(_mm512_extractf32x8_ps::<1>(self.0))).max_of() }
    }
    #[inline(always)]
    unsafe fn fold(sums: [Self; 4]) -> f32 {
        // SAFETY: see above.
        unsafe {
            let sum = sums[0].add(sums[1]).0;
            let sum = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
        }
    }
}

/// An element type of the cache.
trait Element {
    const BYTES: usize;
    /// Keys and values have a scale by position.
    const SCALED: bool;
    /// Widens the elements from `index` on.
    ///
    /// # Safety
    /// As [`Lanes`].
    unsafe fn widen<L: Lanes>(base: *const u8, index: usize) -> L;
}

struct F32;
struct F16;
struct Int8;

impl Element for F32 {
    const BYTES: usize = 4;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn widen<L: Lanes>(base: *const u8, index: usize) -> L {
        // SAFETY: by the caller.
        unsafe { L::load(base.add(4 * index).cast()) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn widen<L: Lanes>(base: *const u8, index: usize) -> L {
        // SAFETY: by the caller.
        unsafe { L::widen_f16(base.add(2 * index)) }
    }
}

impl Element for Int8 {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn widen<L: Lanes>(base: *const u8, index: usize) -> L {
        // SAFETY: by the caller.
        unsafe { L::widen_i8(base.add(index)) }
    }
}

/// `attention::pass` for head dimensions that are multiples of 8.
///
/// # Panics
/// When an operand is too short.
pub(crate) fn pass(
    avx2: Avx2,
    block: &Block<'_>,
    seen: &Seen,
    tile: &Tile<'_>,
    which: Range<usize>,
    running: &mut [Running; MAX_TILE],
    out: &mut [f32],
) {
    let (head_dim, bytes) = (
        block.head_dim,
        match block.ty {
            KvType::F32 => F32::BYTES,
            KvType::F16 => F16::BYTES,
            KvType::Q8_0 => Int8::BYTES,
        },
    );
    assert!(head_dim.is_multiple_of(8));
    assert!(block.keys.len() == KV_BLOCK * head_dim * bytes && block.values.len() == block.keys.len());
    let scales = if block.ty == KvType::Q8_0 { KV_BLOCK * 4 } else { 0 };
    assert!(block.key_scales.len() == scales && block.value_scales.len() == scales);
    for i in which.clone() {
        assert!(seen.start < seen.ends[i] && seen.ends[i] <= KV_BLOCK);
        assert!(tile.q_at[i] + head_dim <= tile.q.len() && tile.out_at[i] + head_dim <= out.len());
    }
    let every_form = EVERY_FORM || block.ty == KvType::F16;
    let wide = avx2.avx512.filter(|_| every_form && head_dim.is_multiple_of(16));
    let mut from = which.start;
    while from < which.end {
        let left = which.end - from;
        let call = Call { block, seen, tile, from };
        from += match (wide, left) {
            (Some(avx512), 12..) => call.wide::<12, 2>(avx512, running, out),
            (Some(avx512), 4..) => call.wide::<4, 4>(avx512, running, out),
            (Some(avx512), 3) => call.wide::<3, 4>(avx512, running, out),
            (Some(avx512), 2) => call.wide::<2, 4>(avx512, running, out),
            (Some(avx512), _) => call.wide::<1, 4>(avx512, running, out),
            // Four vectors of sums for three queries leave LLVM no register to overlap conversions with.
            (None, 6..) if every_form => call.narrow::<6, 2>(avx2, running, out),
            (None, 3..) if every_form => call.narrow::<3, 2>(avx2, running, out),
            (None, 2) if every_form => call.narrow::<2, 4>(avx2, running, out),
            (None, _) => call.narrow::<1, 4>(avx2, running, out),
        };
    }
}

/// Operands of one pass, checked.
struct Call<'a> {
    block: &'a Block<'a>,
    seen: &'a Seen,
    tile: &'a Tile<'a>,
    /// First query of the tile.
    from: usize,
}

#[allow(clippy::needless_range_loop)] // several arrays are walked by one lane or query number
impl Call<'_> {
    fn narrow<const R: usize, const V: usize>(
        &self,
        _: Avx2,
        running: &mut [Running; MAX_TILE],
        out: &mut [f32],
    ) -> usize {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn run<E: Element, const R: usize, const V: usize>(
            call: &Call<'_>,
            running: &mut [Running; MAX_TILE],
            out: &mut [f32],
        ) {
            // SAFETY: by the caller.
            unsafe { call.run::<Ymm, E, R, V>(running, out) }
        }
        // SAFETY: `Avx2` proves the features, and `pass` checked the operands.
        unsafe {
            match self.block.ty {
                KvType::F16 => run::<F16, R, V>(self, running, out),
                KvType::F32 if EVERY_FORM || R == 1 => run::<F32, R, V>(self, running, out),
                KvType::Q8_0 if EVERY_FORM || R == 1 => run::<Int8, R, V>(self, running, out),
                KvType::F32 | KvType::Q8_0 => unreachable!("not chosen without every form"),
            }
        }
        R
    }

    fn wide<const R: usize, const V: usize>(
        &self,
        _: Avx512,
        running: &mut [Running; MAX_TILE],
        out: &mut [f32],
    ) -> usize {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn run<E: Element, const R: usize, const V: usize>(
            call: &Call<'_>,
            running: &mut [Running; MAX_TILE],
            out: &mut [f32],
        ) {
            // SAFETY: by the caller.
            unsafe { call.run::<Zmm, E, R, V>(running, out) }
        }
        // SAFETY: `Avx512` proves the features, and `pass` checked the operands.
        unsafe {
            match self.block.ty {
                KvType::F16 => run::<F16, R, V>(self, running, out),
                KvType::F32 if EVERY_FORM => run::<F32, R, V>(self, running, out),
                KvType::Q8_0 if EVERY_FORM => run::<Int8, R, V>(self, running, out),
                KvType::F32 | KvType::Q8_0 => unreachable!("not chosen without every form"),
            }
        }
        R
    }

    /// Positions that at least one of the `R` queries sees.
    #[inline(always)]
    fn seen_by_any<const R: usize>(&self) -> Range<usize> {
        let ends = &self.seen.ends[self.from..self.from + R];
        self.seen.start..ends.iter().fold(0, |max, end| max.max(*end))
    }

    /// # Safety
    /// The vectors' instruction set; operands as `pass` checks them.
    #[inline(always)]
    unsafe fn run<L: Lanes, E: Element, const R: usize, const V: usize>(
        &self,
        running: &mut [Running; MAX_TILE],
        out: &mut [f32],
    ) {
        let mut weights = [[0.0f32; KV_BLOCK]; R];
        // SAFETY: by the caller.
        unsafe { self.scores::<L, E, R, V>(&mut weights) };
        // SAFETY: by the caller.
        let factors = unsafe { self.numerators::<L, E, R>(&mut weights, running) };
        let head_dim = self.block.head_dim;
        let mut d = 0;
        // SAFETY: by the caller; each call covers `V * N` or `N` elements below `head_dim`.
        unsafe {
            while d + V * L::N <= head_dim {
                self.values::<L, E, R, V>(&weights, &factors, d, out);
                d += V * L::N;
            }
            while d < head_dim {
                self.values::<L, E, R, 1>(&weights, &factors, d, out);
                d += L::N;
            }
        }
    }

    /// Turns scores into the weights of the values and joins the block to `running`; returns by what to multiply the
    /// values' sum so far and the block's, `None` for a query's first block.
    ///
    /// Each step is done for all queries before the next: one query's steps wait for each other.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn numerators<L: Lanes, E: Element, const R: usize>(
        &self,
        weights: &mut [[f32; KV_BLOCK]; R],
        running: &mut [Running; MAX_TILE],
    ) -> [Option<(f32, f32)>; R] {
        let Range { start, end } = self.seen_by_any::<R>();
        // Whole reductions' worth of lanes; those of positions that are not seen must not win or count.
        let (first, last) = (start / 32 * 32, end.next_multiple_of(32));
        let hide = |weights: &mut [[f32; KV_BLOCK]; R], value| {
            for (row, end) in weights.iter_mut().zip(&self.seen.ends[self.from..]) {
                row[first..start].fill(value);
                row[*end..last].fill(value);
            }
        };
        hide(weights, f32::NEG_INFINITY);
        let (mut max, mut sum) = ([0.0f32; R], [0.0f32; R]);
        // SAFETY: by the caller; `first..last` is inside the rows and a multiple of 32 long.
        unsafe {
            let mut maxima = [L::splat(f32::NEG_INFINITY); R];
            for i in (first..last).step_by(L::N) {
                for r in 0..R {
                    maxima[r] = L::load(weights[r].as_ptr().add(i)).max(maxima[r]);
                }
            }
            for r in 0..R {
                max[r] = maxima[r].max_of();
                maxima[r] = L::splat(max[r]);
            }
            for i in (first..last).step_by(L::N) {
                for r in 0..R {
                    let at = weights[r].as_mut_ptr().add(i);
                    L::load(at).sub(maxima[r]).exp().store(at);
                }
            }
            hide(weights, 0.0);
            for r in 0..R {
                let mut sums = [L::splat(0.0); 4];
                for i in (first..last).step_by(32) {
                    for j in 0..32 / L::N {
                        sums[j] = sums[j].add(L::load(weights[r].as_ptr().add(i + j * L::N)));
                    }
                }
                sum[r] = L::fold(sums);
            }
            if E::SCALED {
                for i in (first..last).step_by(L::N) {
                    let scale = L::load(self.block.value_scales.as_ptr().cast::<f32>().add(i));
                    for r in 0..R {
                        let at = weights[r].as_mut_ptr().add(i);
                        L::load(at).mul(scale).store(at);
                    }
                }
            }
        }
        // `Running::join` for all queries at once.
        let (mut old, mut new) = ([0.0f32; 16], [0.0f32; 16]);
        const { assert!(MAX_TILE <= 16) };
        let running = &mut running[self.from..self.from + R];
        for r in 0..R {
            let top = if running[r].empty || max[r] > running[r].max { max[r] } else { running[r].max };
            (old[r], new[r]) = (running[r].max - top, max[r] - top);
            max[r] = top;
        }
        // SAFETY: by the caller; both arrays are whole vectors.
        unsafe {
            for i in (0..R).step_by(L::N) {
                L::load(old.as_ptr().add(i)).exp().store(old.as_mut_ptr().add(i));
                L::load(new.as_ptr().add(i)).exp().store(new.as_mut_ptr().add(i));
            }
        }
        let mut factors = [None; R];
        for r in 0..R {
            if running[r].empty {
                running[r] = Running { max: max[r], sum: sum[r], empty: false };
            } else {
                let sum = Hardware::fma(new[r], sum[r], old[r] * running[r].sum);
                running[r] = Running { max: max[r], sum, empty: false };
                factors[r] = Some((old[r], new[r]));
            }
        }
        factors
    }

    /// Scaled products of `R` queries with the keys; positions around the visible ones may get any value.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn scores<L: Lanes, E: Element, const R: usize, const V: usize>(&self, scores: &mut [[f32; KV_BLOCK]; R]) {
        let head_dim = self.block.head_dim;
        let Range { start, end } = self.seen_by_any::<R>();
        let mut q = [self.tile.q.as_ptr(); R];
        for r in 0..R {
            q[r] = q[r].wrapping_add(self.tile.q_at[self.from + r]);
        }
        let later = self.block.values.as_ptr();
        for at in (start / (V * L::N) * (V * L::N)..end).step_by(V * L::N) {
            // SAFETY: by the caller; `V * N` divides the panel, so this run of lanes is in one panel.
            unsafe {
                let panel = self.block.keys.as_ptr().add(at / KV_PANEL * KV_PANEL * head_dim * E::BYTES);
                let mut acc = [[L::splat(0.0); V]; R];
                for d in 0..head_dim {
                    prefetch(later, (at * head_dim + d * V * L::N) * E::BYTES, V * L::N * E::BYTES);
                    let mut keys = [L::splat(0.0); V];
                    for j in 0..V {
                        keys[j] = E::widen::<L>(panel, d * KV_PANEL + at % KV_PANEL + j * L::N);
                    }
                    for r in 0..R {
                        let q = L::splat(*q[r].add(d));
                        for j in 0..V {
                            acc[r][j] = keys[j].fma(q, acc[r][j]);
                        }
                    }
                }
                for r in 0..R {
                    for j in 0..V {
                        let i = at + j * L::N;
                        let mut score = acc[r][j];
                        if E::SCALED {
                            score = score.mul(L::load(self.block.key_scales.as_ptr().cast::<f32>().add(i)));
                        }
                        score.mul(L::splat(self.tile.scale)).store(scores[r].as_mut_ptr().add(i));
                    }
                }
            }
        }
    }

    /// Sums of the value rows weighted by `weights`, elements `d0 .. d0 + V * N`, joined to `out`.
    ///
    /// # Safety
    /// As `run`, and these elements must be below `head_dim`.
    #[inline(always)]
    unsafe fn values<L: Lanes, E: Element, const R: usize, const V: usize>(
        &self,
        weights: &[[f32; KV_BLOCK]; R],
        factors: &[Option<(f32, f32)>; R],
        d0: usize,
        out: &mut [f32],
    ) {
        // SAFETY: by the caller.
        unsafe {
            let later = self.block.next_keys.as_ptr();
            let mut acc = [[L::splat(0.0); V]; R];
            let Range { start, end } = self.seen_by_any::<R>();
            let by_all = self.seen.ends[self.from..self.from + R].iter().fold(end, |min, end| min.min(*end));
            for pos in start..by_all {
                prefetch(later, (d0 * KV_BLOCK + pos * V * L::N) * E::BYTES, V * L::N * E::BYTES);
                self.add_value::<L, E, R, V>(weights, d0, pos, [true; R], &mut acc);
            }
            for pos in by_all..end {
                let sees = core::array::from_fn(|r| pos < self.seen.ends[self.from + r]);
                self.add_value::<L, E, R, V>(weights, d0, pos, sees, &mut acc);
            }
            for r in 0..R {
                let out = out.as_mut_ptr().add(self.tile.out_at[self.from + r] + d0);
                for j in 0..V {
                    let out = out.add(j * L::N);
                    let sum = match factors[r] {
                        None => acc[r][j],
                        Some((old, new)) => L::splat(new).fma(acc[r][j], L::splat(old).mul(L::load(out))),
                    };
                    sum.store(out);
                }
            }
        }
    }

    /// Adds one position's weighted value, elements `d0 .. d0 + V * N`, to the sums of the queries that see it.
    ///
    /// # Safety
    /// As `values`.
    #[inline(always)]
    unsafe fn add_value<L: Lanes, E: Element, const R: usize, const V: usize>(
        &self,
        weights: &[[f32; KV_BLOCK]; R],
        d0: usize,
        pos: usize,
        sees: [bool; R],
        sums: &mut [[L; V]; R],
    ) {
        // SAFETY: by the caller.
        unsafe {
            let mut values = [L::splat(0.0); V];
            for j in 0..V {
                values[j] = E::widen::<L>(self.block.values.as_ptr(), pos * self.block.head_dim + d0 + j * L::N);
            }
            for r in 0..R {
                if sees[r] {
                    let weight = L::splat(*weights[r].as_ptr().add(pos));
                    for j in 0..V {
                        sums[r][j] = weight.fma(values[j], sums[r][j]);
                    }
                }
            }
        }
    }
}

/// `attention::join` with hardware multiply-adds.
pub(crate) fn join(_: Avx2, running: &mut Running, max: f32, sum: f32, values: &[f32], out: &mut [f32]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run(running: &mut Running, max: f32, sum: f32, values: &[f32], out: &mut [f32]) {
        attention::join::<Hardware>(running, max, sum, values, out);
    }
    // SAFETY: `Avx2` proves the features.
    unsafe { run(running, max, sum, values, out) }
}

/// Narrows whole vectors of `x` to f16, saturating; returns how many elements that covered.
///
/// # Panics
/// When `out` is not two bytes for each element.
pub(crate) fn to_f16(_: Avx2, x: &[f32], out: &mut [u8]) -> usize {
    #[target_feature(enable = "avx,f16c")]
    fn run(x: &[f32], out: &mut [u8]) {
        for (x, out) in x.chunks_exact(8).zip(out.chunks_exact_mut(16)) {
            // SAFETY: the chunks are eight f32 and sixteen bytes.
            unsafe {
                // The second operand is the result when it is NaN.
                let x = _mm256_min_ps(_mm256_set1_ps(65504.0), _mm256_loadu_ps(x.as_ptr()));
                let x = _mm256_max_ps(_mm256_set1_ps(-65504.0), x);
                let x = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm_storeu_si128(out.as_mut_ptr().cast(), x);
            }
        }
    }
    assert_eq!(out.len(), 2 * x.len());
    // SAFETY: `Avx2` proves the features.
    unsafe { run(x, out) };
    x.len() / 8 * 8
}

/// Rounds whole vectors of `x * inverse` to int8 between -127 and 127; returns how many elements that covered.
///
/// # Panics
/// When `out` is not one byte for each element.
pub(crate) fn to_int8(_: Avx2, x: &[f32], inverse: f32, out: &mut [u8]) -> usize {
    #[target_feature(enable = "avx2")]
    fn run(x: &[f32], inverse: f32, out: &mut [u8]) {
        for (x, out) in x.chunks_exact(8).zip(out.chunks_exact_mut(8)) {
            // SAFETY: the chunks are eight f32 and eight bytes.
            unsafe {
                let x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_set1_ps(inverse)));
                let q = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                let q = _mm_max_epi8(_mm_packs_epi16(q, q), _mm_set1_epi8(-127));
                _mm_storel_epi64(out.as_mut_ptr().cast(), q);
            }
        }
    }
    assert_eq!(out.len(), x.len());
    // SAFETY: `Avx2` proves the features.
    unsafe { run(x, inverse, out) };
    x.len() / 8 * 8
}
