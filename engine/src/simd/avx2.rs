//! The hand-written AVX2, FMA and F16C ops: the baseline that compiled kernels are measured against.
//!
//! Good plain code with one weight stream and no software prefetch: for one row of `x` a whole panel (32 columns, four
//! accumulators) per pass, for more rows a register tile of 6 (or 4) rows x 16 columns. The order of operations is that of
//! `reference`, lane by lane, so the results are the same bits.
//!
//! The generic functions are `#[inline(always)]` without a target feature of their own, so that they compile inside
//! the few functions at the end that enable the features.

use super::Avx2;
use crate::dispatch::{ColumnsMut, check_operands};
use core::arch::x86_64::*;
use core::ptr::read_unaligned;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{
    BlockLayout, PANEL, QuadField, SUPER, WORD_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_SUM, XBLOCK_SUM_LOW, panel_bytes,
    panels, step_k, x_row_bytes,
};

/// Rows of a register tile.
const ROWS: usize = 6;
/// Vectors of a register tile's row.
const TILE: usize = 2;
/// Vectors that cover a panel.
const VECTORS: usize = PANEL / 8;

/// Sums of activation rows with a panel, for one storage type.
trait Product {
    /// One row with all 32 columns of the panel at `w`.
    ///
    /// # Safety
    /// AVX2, FMA and F16C; `x` is a whole activation row and `w` a whole panel of `steps` steps.
    unsafe fn row(x: *const u8, w: *const u8, steps: usize) -> [__m256; VECTORS];

    /// `R` rows, `x_stride` bytes apart, with the 16 columns `8 * vector..8 * vector + 16` of the panel at `w`.
    ///
    /// # Safety
    /// As [`Product::row`], for each row; `vector + 2 <= 4`.
    unsafe fn tile<const R: usize>(
        x: *const u8,
        x_stride: usize,
        w: *const u8,
        vector: usize,
        steps: usize,
    ) -> [[__m256; TILE]; R];
}

/// F32 (`HALF` false) and F16 (`HALF` true) weights with f32 activations.
struct Float<const HALF: bool>;

impl<const HALF: bool> Float<HALF> {
    const BYTES: usize = if HALF { 2 } else { 4 };

    /// Eight weights as f32.
    #[inline(always)]
    unsafe fn load(w: *const u8) -> __m256 {
        // SAFETY: the caller vouches for 8 weights at `w` and for the features.
        unsafe { if HALF { _mm256_cvtph_ps(_mm_loadu_si128(w.cast())) } else { _mm256_loadu_ps(w.cast()) } }
    }
}

impl<const HALF: bool> Product for Float<HALF> {
    #[inline(always)]
    unsafe fn row(x: *const u8, w: *const u8, steps: usize) -> [__m256; VECTORS] {
        // SAFETY: step `i < steps` of the panel is 32 weights and element `i` of `x` exists.
        unsafe {
            let mut acc = [_mm256_setzero_ps(); VECTORS];
            for i in 0..steps {
                let w = w.add(i * PANEL * Self::BYTES);
                let x = _mm256_broadcast_ss(&*x.cast::<f32>().add(i));
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(Self::load(w.add(j * 8 * Self::BYTES)), x, *acc);
                }
            }
            acc
        }
    }

    #[inline(always)]
    unsafe fn tile<const R: usize>(
        x: *const u8,
        x_stride: usize,
        w: *const u8,
        vector: usize,
        steps: usize,
    ) -> [[__m256; TILE]; R] {
        // SAFETY: as in `row`, for rows `x_stride` bytes apart and columns inside the panel.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); TILE]; R];
            let w = w.add(vector * 8 * Self::BYTES);
            for i in 0..steps {
                let w = w.add(i * PANEL * Self::BYTES);
                let w: [__m256; TILE] = core::array::from_fn(|j| Self::load(w.add(j * 8 * Self::BYTES)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*x.add(r * x_stride).cast::<f32>().add(i));
                    for (acc, w) in acc.iter_mut().zip(w) {
                        *acc = _mm256_fmadd_ps(w, x, *acc);
                    }
                }
            }
            acc
        }
    }
}

/// Four activation bytes `4 quad..` of a block, in every 32-bit lane.
#[inline(always)]
unsafe fn broadcast_quad(x: *const u8, quad: usize) -> __m256i {
    // SAFETY: the caller vouches for an activation block of 8 quads at `x` and `quad < 8`.
    unsafe { _mm256_set1_epi32(read_unaligned(x.add(4 * quad).cast())) }
}

/// `v` with its 16-bit lanes shifted from bit `from` to bit `to`: constants once inlined.
#[inline(always)]
unsafe fn shift(v: __m256i, from: usize, to: usize) -> __m256i {
    // SAFETY: AVX2, by the caller.
    unsafe {
        if from >= to {
            _mm256_srl_epi16(v, _mm_cvtsi32_si128((from - to) as i32))
        } else {
            _mm256_sll_epi16(v, _mm_cvtsi32_si128((to - from) as i32))
        }
    }
}

/// Quantised weights of the type number `DTYPE` with int8 activations: one code for all types, in which the layout is a
/// constant.
struct Quantised<const DTYPE: usize>;

impl<const DTYPE: usize> Quantised<DTYPE> {
    const LAYOUT: BlockLayout = BlockLayout::of(DType::ALL[DTYPE]).unwrap();
    const STEP_BYTES: usize = Self::LAYOUT.step_bytes();
    const HEADER_BYTES: usize = Self::LAYOUT.header_bytes();
    const GROUP_STEPS: usize = if Self::LAYOUT.super_blocks { SUPER } else { 1 };
    /// Quads whose products with activations of at most 127 sum in 16 bits: pairs of `2 * code * 127`.
    const QUADS_IN_16_BITS: usize = i16::MAX as usize / (2 * 127 * ((1 << Self::LAYOUT.bits()) - 1));

    /// `R` rows of `x`, `x_stride` bytes apart, with the `V` vectors of columns from `vector` on of the panel at `w`.
    ///
    /// # Safety
    /// AVX2, FMA and F16C; the rows are whole, the panel has `steps` steps, and `vector + V <= 4`.
    #[inline(always)]
    unsafe fn sums<const R: usize, const V: usize>(
        x: *const u8,
        x_stride: usize,
        w: *const u8,
        vector: usize,
        steps: usize,
    ) -> [[__m256; V]; R] {
        // SAFETY: group `g` of the panel has a header and `GROUP_STEPS` steps, and each row as many activation blocks.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); V]; R];
            let (mut x, mut header) = (x, w);
            for _ in 0..steps / Self::GROUP_STEPS {
                let mut step = header.add(Self::HEADER_BYTES);
                for _ in 0..Self::GROUP_STEPS {
                    for sub in 0..Self::LAYOUT.sub_blocks {
                        let dots = Self::dots::<R, V>(x, x_stride, step, vector, sub);
                        for j in 0..V {
                            let (d, m) = Self::factors(header, step, vector + j, sub);
                            for (r, acc) in acc.iter_mut().enumerate() {
                                acc[j] = Self::scale(acc[j], dots[r][j], d, m, x.add(r * x_stride), sub);
                            }
                        }
                    }
                    x = x.add(Self::LAYOUT.x_block_bytes());
                    step = step.add(Self::STEP_BYTES);
                }
                header = step;
            }
            acc
        }
    }

    /// The codes of `quad` in the 8 columns of `vector`, as unsigned bytes.
    #[inline(always)]
    unsafe fn codes(step: *const u8, quad: usize, vector: usize) -> __m256i {
        // SAFETY: the fields of a quad lie inside the step, and `vector < 4`, by the caller.
        unsafe {
            let field = |field: QuadField, to: usize| {
                let words = _mm256_loadu_si256(step.add(field.word * WORD_BYTES + 32 * vector).cast());
                let mask = (((1u32 << field.bits) - 1) << to) as u8;
                _mm256_and_si256(shift(words, field.shift, to), _mm256_set1_epi8(mask.cast_signed()))
            };
            let low = field(Self::LAYOUT.low_field(quad), 0);
            match Self::LAYOUT.high_field(quad) {
                Some(high) => _mm256_or_si256(low, field(high, Self::LAYOUT.low_bits)),
                None => low,
            }
        }
    }

    /// Exact sums `q_w q_x` of sub-block `sub`, without the offset.
    #[inline(always)]
    unsafe fn dots<const R: usize, const V: usize>(
        x: *const u8,
        x_stride: usize,
        step: *const u8,
        vector: usize,
        sub: usize,
    ) -> [[__m256i; V]; R] {
        let layout = Self::LAYOUT;
        let first_word = sub * layout.low_words_per_scale();
        // SAFETY: words and quads of the step and of an activation block, by the caller.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut dots = [[_mm256_setzero_si256(); V]; R];
            let mut pairs = [[_mm256_setzero_si256(); V]; R];
            let mut in_pairs = 0;
            for word in first_word..first_word + layout.low_words_per_scale() {
                if layout.signed_codes() {
                    for j in 0..V {
                        // `|w| . sign(w) x`, as vpmaddubsw needs it: `|w| <= 128` and `|x| <= 127` cannot saturate its pairs.
                        let w = _mm256_loadu_si256(step.add(word * WORD_BYTES + 32 * (vector + j)).cast());
                        let w_abs = _mm256_abs_epi8(w);
                        for (r, dots) in dots.iter_mut().enumerate() {
                            let x = broadcast_quad(x.add(r * x_stride), word);
                            let pairs = _mm256_maddubs_epi16(w_abs, _mm256_sign_epi8(x, w));
                            dots[j] = _mm256_add_epi32(dots[j], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                    continue;
                }
                for i in 0..layout.quads_per_word() {
                    let quad = layout.quad_in_word(word, i);
                    for j in 0..V {
                        let codes = Self::codes(step, quad, vector + j);
                        for (r, pairs) in pairs.iter_mut().enumerate() {
                            let products = _mm256_maddubs_epi16(codes, broadcast_quad(x.add(r * x_stride), quad));
                            pairs[j] = _mm256_add_epi16(pairs[j], products);
                        }
                    }
                    in_pairs += 1;
                    if in_pairs == Self::QUADS_IN_16_BITS {
                        Self::widen(&mut dots, &mut pairs);
                        in_pairs = 0;
                    }
                }
            }
            if !layout.signed_codes() && in_pairs > 0 {
                Self::widen(&mut dots, &mut pairs);
            }
            dots
        }
    }

    /// Adds the 16-bit sums to the 32-bit ones and clears them.
    #[inline(always)]
    unsafe fn widen<const R: usize, const V: usize>(dots: &mut [[__m256i; V]; R], pairs: &mut [[__m256i; V]; R]) {
        // SAFETY: AVX2, by the caller.
        unsafe {
            for (dot, pair) in dots.as_flattened_mut().iter_mut().zip(pairs.as_flattened_mut()) {
                *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(*pair, _mm256_set1_epi16(1)));
                *pair = _mm256_setzero_si256();
            }
        }
    }

    /// Scale and minimum (0 where there is none) of sub-block `sub` in the 8 columns of `vector`.
    #[inline(always)]
    unsafe fn factors(header: *const u8, step: *const u8, vector: usize, sub: usize) -> (__m256, __m256) {
        let layout = Self::LAYOUT;
        // SAFETY: header and step of the group, `vector < 4`, by the caller.
        unsafe {
            let half = |at: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(at.add(16 * vector).cast()));
            let (scales, minima) = (step.add(layout.scales_offset(sub)), step.add(layout.minima_offset(sub)));
            if !layout.super_blocks {
                let m = if layout.minima { half(minima) } else { _mm256_setzero_ps() };
                return (half(scales), m);
            }
            let scales = _mm_loadl_epi64(scales.add(8 * vector).cast());
            let scales = if layout.signed_scales { _mm256_cvtepi8_epi32(scales) } else { _mm256_cvtepu8_epi32(scales) };
            let d = _mm256_mul_ps(half(header), _mm256_cvtepi32_ps(scales));
            if !layout.minima {
                return (d, _mm256_setzero_ps());
            }
            let minima = _mm256_cvtepu8_epi32(_mm_loadl_epi64(minima.add(8 * vector).cast()));
            (d, _mm256_mul_ps(half(header.add(2 * PANEL)), _mm256_cvtepi32_ps(minima)))
        }
    }

    /// The last operations of a sub-block.
    #[inline(always)]
    unsafe fn scale(acc: __m256, dot: __m256i, d: __m256, m: __m256, x: *const u8, sub: usize) -> __m256 {
        let layout = Self::LAYOUT;
        // SAFETY: an activation block at `x`, by the caller.
        unsafe {
            let sum = |at: usize| read_unaligned(x.add(at).cast::<i32>());
            let sum = match (layout.sub_blocks, sub) {
                (1, _) => sum(XBLOCK_SUM),
                (_, 0) => sum(XBLOCK_SUM_LOW),
                _ => sum(XBLOCK_SUM) - sum(XBLOCK_SUM_LOW),
            };
            let d_x = read_unaligned(x.add(XBLOCK_D).cast::<f32>());
            let dot = match layout.offset {
                0 => dot,
                offset => _mm256_sub_epi32(dot, _mm256_set1_epi32(offset * sum)),
            };
            let acc = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(d_x)), _mm256_cvtepi32_ps(dot), acc);
            if !layout.minima {
                return acc;
            }
            let dsum = match layout.sub_blocks {
                1 => read_unaligned(x.add(XBLOCK_DSUM).cast::<f32>()),
                _ => d_x * sum as f32,
            };
            _mm256_fmadd_ps(m, _mm256_set1_ps(dsum), acc)
        }
    }
}

impl<const DTYPE: usize> Product for Quantised<DTYPE> {
    #[inline(always)]
    unsafe fn row(x: *const u8, w: *const u8, steps: usize) -> [__m256; VECTORS] {
        // SAFETY: by the caller.
        let [row] = unsafe { Self::sums::<1, VECTORS>(x, 0, w, 0, steps) };
        row
    }

    #[inline(always)]
    unsafe fn tile<const R: usize>(
        x: *const u8,
        x_stride: usize,
        w: *const u8,
        vector: usize,
        steps: usize,
    ) -> [[__m256; TILE]; R] {
        // SAFETY: by the caller. One vector at a time: its block sums alone take `R` registers.
        unsafe {
            let left = Self::sums::<R, 1>(x, x_stride, w, vector, steps);
            let right = Self::sums::<R, 1>(x, x_stride, w, vector + 1, steps);
            core::array::from_fn(|r| [left[r][0], right[r][0]])
        }
    }
}

/// Operands of one op, checked against `key`.
#[derive(Clone, Copy)]
struct Operands<'a> {
    key: &'a KernelKey,
    x: *const u8,
    w: *const u8,
    y: *mut f32,
    /// Elements from one row of `y` to the next.
    ldy: usize,
}

impl Operands<'_> {
    /// Stores the vectors `acc` of one row at column `column`, through the op's fusion. `up` holds the second product
    /// of a gated op and is ignored elsewhere.
    ///
    /// # Safety
    /// AVX2 and FMA; `row < m` and `column + 8 V <= padded(n)`.
    #[inline(always)]
    unsafe fn store<const V: usize>(&self, row: usize, column: usize, acc: [__m256; V], up: [__m256; V]) {
        for (j, (acc, up)) in acc.into_iter().zip(up).enumerate() {
            // SAFETY: inside `y` by the caller's promise.
            unsafe {
                let y = self.y.add(row * self.ldy + column + 8 * j);
                let value = match self.key.op {
                    Op::Matmul | Op::Qkv | Op::LmHead => acc,
                    Op::MatmulResidual => _mm256_add_ps(_mm256_loadu_ps(y), acc),
                    Op::GateUpSilu => _mm256_mul_ps(super::math::silu8(acc), up),
                    Op::GateUpGelu => _mm256_mul_ps(super::math::gelu8(acc), up),
                };
                _mm256_storeu_ps(y, value);
            }
        }
    }

    /// The whole op.
    ///
    /// # Safety
    /// AVX2, FMA and F16C; the operands have the sizes the key states.
    #[inline(always)]
    unsafe fn run<P: Product>(self) {
        let (m, n, k) = (self.key.m as usize, self.key.n as usize, self.key.k as usize);
        let dtype = self.key.dtype;
        let panel_bytes = panel_bytes(dtype, k);
        let steps = k / step_k(dtype);
        let x_stride = x_row_bytes(dtype, k);
        let fused = self.key.op.is_gated();
        for p in 0..panels(n) {
            // SAFETY: panel `p`, or panels `2p` and `2p + 1` of a gate/up matrix, lie inside `w`; rows below `m` inside
            // `x` and `y`.
            unsafe {
                let w = self.w.add(p * self.key.op.columns_per_output() * panel_bytes);
                if m == 1 {
                    let acc = P::row(self.x, w, steps);
                    let up = if fused { P::row(self.x, w.add(panel_bytes), steps) } else { acc };
                    self.store(0, p * PANEL, acc, up);
                    continue;
                }
                for vector in (0..VECTORS).step_by(TILE) {
                    let mut row = 0;
                    while row < m {
                        let left = m - row;
                        // Two tiles of 4 rather than one of 6 and a remainder.
                        if left >= ROWS && left != 8 {
                            self.tile::<P, ROWS>(row, p, w, vector, steps, x_stride, panel_bytes);
                            row += ROWS;
                        } else if left >= 4 {
                            self.tile::<P, 4>(row, p, w, vector, steps, x_stride, panel_bytes);
                            row += 4;
                        } else {
                            self.tile::<P, 1>(row, p, w, vector, steps, x_stride, panel_bytes);
                            row += 1;
                        }
                    }
                }
            }
        }
    }

    /// `R` rows from `row` on with 16 columns of panel `p`.
    ///
    /// # Safety
    /// As [`Operands::run`], and `row + R <= m`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // loop invariants of `run`, in registers
    unsafe fn tile<P: Product, const R: usize>(
        &self,
        row: usize,
        p: usize,
        w: *const u8,
        vector: usize,
        steps: usize,
        x_stride: usize,
        panel_bytes: usize,
    ) {
        // SAFETY: by the caller's promise.
        unsafe {
            let x = self.x.add(row * x_stride);
            let acc = P::tile::<R>(x, x_stride, w, vector, steps);
            let fused = self.key.op.is_gated();
            let up = if fused { P::tile::<R>(x, x_stride, w.add(panel_bytes), vector, steps) } else { acc };
            for r in 0..R {
                self.store(row + r, p * PANEL + 8 * vector, acc[r], up[r]);
            }
        }
    }
}

/// Computes the op `key` names. `y` must have at least `m` rows and `padded(n)` columns.
///
/// # Panics
/// When an operand is shorter than the key needs or `w` is not aligned.
pub(crate) fn run(_: Avx2, key: &KernelKey, x: &[u8], w: &[u8], mut y: ColumnsMut<'_>) {
    check_operands(key, x, w, &y);
    let ldy = y.stride();
    let operands = Operands { key, x: x.as_ptr(), w: w.as_ptr(), y: y.as_mut_ptr(), ldy };
    // SAFETY: `Avx2` proves the features and `check_operands` the sizes.
    unsafe {
        match key.dtype {
            DType::F32 => run_f32(operands),
            DType::F16 => run_f16(operands),
            DType::Q8_0 => run_quantised::<{ DType::Q8_0 as usize }>(operands),
            DType::Q4_0 => run_quantised::<{ DType::Q4_0 as usize }>(operands),
            DType::Q4_1 => run_quantised::<{ DType::Q4_1 as usize }>(operands),
            DType::Q5_0 => run_quantised::<{ DType::Q5_0 as usize }>(operands),
            DType::Q5_1 => run_quantised::<{ DType::Q5_1 as usize }>(operands),
            DType::Q2_K => run_quantised::<{ DType::Q2_K as usize }>(operands),
            DType::Q3_K => run_quantised::<{ DType::Q3_K as usize }>(operands),
            DType::Q4_K => run_quantised::<{ DType::Q4_K as usize }>(operands),
            DType::Q5_K => run_quantised::<{ DType::Q5_K as usize }>(operands),
            DType::Q6_K => run_quantised::<{ DType::Q6_K as usize }>(operands),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_f32(operands: Operands<'_>) {
    // SAFETY: the caller checked the operands; the features are enabled here.
    unsafe { operands.run::<Float<false>>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_f16(operands: Operands<'_>) {
    // SAFETY: the caller checked the operands; the features are enabled here.
    unsafe { operands.run::<Float<true>>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_quantised<const DTYPE: usize>(operands: Operands<'_>) {
    // SAFETY: the caller checked the operands; the features are enabled here.
    unsafe { operands.run::<Quantised<DTYPE>>() }
}
