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
    BLOCK, MINS_OFFSET, PANEL, XBLOCK_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_SUM, panel_bytes, panels, scales_offset,
    step_bytes, x_row_bytes,
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

/// The last operations of a quantised block, the same for every type.
///
/// # Safety
/// AVX2, FMA and F16C; `x` is an activation block and `w` a step; `vector < 4`.
#[inline(always)]
unsafe fn scale_block(acc: __m256, dot: __m256i, x: *const u8, w: *const u8, vector: usize, dtype: DType) -> __m256 {
    // SAFETY: the offsets lie inside the activation block and the step.
    unsafe {
        let half = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(w.add(at + 16 * vector).cast()));
        let d = _mm256_mul_ps(half(scales_offset(dtype)), _mm256_broadcast_ss(&*x.add(XBLOCK_D).cast()));
        let acc = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(dot), acc);
        match dtype {
            DType::Q4_1 => _mm256_fmadd_ps(half(MINS_OFFSET), _mm256_broadcast_ss(&*x.add(XBLOCK_DSUM).cast()), acc),
            _ => acc,
        }
    }
}

/// Four activation bytes `4 group..` of a block, in every 32-bit lane.
#[inline(always)]
unsafe fn broadcast_group(x: *const u8, group: usize) -> __m256i {
    // SAFETY: the caller vouches for an activation block of 8 groups at `x` and `group < 8`.
    unsafe { _mm256_set1_epi32(read_unaligned(x.add(4 * group).cast())) }
}

/// Q8_0 weights with int8 activations.
struct Q8;

impl Q8 {
    /// `sum + |w| . sign(w) x`: the operands `vpmaddubsw` needs. `|w| <= 128` and `|x| <= 127` cannot saturate its pairs.
    #[inline(always)]
    unsafe fn dot4(sum: __m256i, w: __m256i, w_abs: __m256i, x: __m256i) -> __m256i {
        // SAFETY: AVX2, by the caller.
        unsafe {
            let pairs = _mm256_maddubs_epi16(w_abs, _mm256_sign_epi8(x, w));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

impl Product for Q8 {
    #[inline(always)]
    unsafe fn row(x: *const u8, w: *const u8, steps: usize) -> [__m256; VECTORS] {
        // SAFETY: block `b < steps` of `x` and step `b` of `w` exist, and the offsets lie inside them.
        unsafe {
            let mut acc = [_mm256_setzero_ps(); VECTORS];
            for b in 0..steps {
                let (x, w) = (x.add(b * XBLOCK_BYTES), w.add(b * step_bytes(DType::Q8_0)));
                let mut dot = [_mm256_setzero_si256(); VECTORS];
                for group in 0..BLOCK / 4 {
                    let x = broadcast_group(x, group);
                    for (j, dot) in dot.iter_mut().enumerate() {
                        let w = _mm256_loadu_si256(w.add(group * 4 * PANEL + 32 * j).cast());
                        *dot = Self::dot4(*dot, w, _mm256_abs_epi8(w), x);
                    }
                }
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = scale_block(*acc, dot[j], x, w, j, DType::Q8_0);
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
            for j in 0..TILE {
                for b in 0..steps {
                    let (x, w) = (x.add(b * XBLOCK_BYTES), w.add(b * step_bytes(DType::Q8_0)));
                    let mut dot = [_mm256_setzero_si256(); R];
                    for group in 0..BLOCK / 4 {
                        let w = _mm256_loadu_si256(w.add(group * 4 * PANEL + 32 * (vector + j)).cast());
                        let w_abs = _mm256_abs_epi8(w);
                        for (r, dot) in dot.iter_mut().enumerate() {
                            *dot = Self::dot4(*dot, w, w_abs, broadcast_group(x.add(r * x_stride), group));
                        }
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        acc[j] = scale_block(acc[j], dot[r], x.add(r * x_stride), w, vector + j, DType::Q8_0);
                    }
                }
            }
            acc
        }
    }
}

/// Q4_0 (`MINS` false) and Q4_1 (`MINS` true) weights with int8 activations.
struct Q4<const MINS: bool>;

impl<const MINS: bool> Q4<MINS> {
    const DTYPE: DType = if MINS { DType::Q4_1 } else { DType::Q4_0 };

    /// Nibble sums of a block in 16-bit pairs -> exact 32-bit dots, less `8 sum q_x` for Q4_0.
    #[inline(always)]
    unsafe fn finish(pairs: __m256i, x: *const u8) -> __m256i {
        // SAFETY: AVX2 and an activation block at `x`, by the caller.
        unsafe {
            let dot = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            if MINS {
                dot
            } else {
                let sum = _mm256_set1_epi32(read_unaligned(x.add(XBLOCK_SUM).cast()));
                _mm256_sub_epi32(dot, _mm256_slli_epi32::<3>(sum))
            }
        }
    }

    /// Low and high nibbles of 32 bytes.
    #[inline(always)]
    unsafe fn nibbles(w: *const u8) -> (__m256i, __m256i) {
        // SAFETY: 32 bytes at `w` and AVX2, by the caller.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let pairs = _mm256_loadu_si256(w.cast());
            (_mm256_and_si256(pairs, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), mask))
        }
    }
}

impl<const MINS: bool> Product for Q4<MINS> {
    #[inline(always)]
    unsafe fn row(x: *const u8, w: *const u8, steps: usize) -> [__m256; VECTORS] {
        // SAFETY: block `b < steps` of `x` and step `b` of `w` exist, and the offsets lie inside them.
        unsafe {
            let mut acc = [_mm256_setzero_ps(); VECTORS];
            for b in 0..steps {
                let (x, w) = (x.add(b * XBLOCK_BYTES), w.add(b * step_bytes(Self::DTYPE)));
                // Eight products of at most 2 * 15 * 127 stay below 2^15, so a block sums in 16 bits.
                let mut pairs = [_mm256_setzero_si256(); VECTORS];
                for group in 0..BLOCK / 8 {
                    let (x_low, x_high) = (broadcast_group(x, group), broadcast_group(x, group + 4));
                    for (j, pairs) in pairs.iter_mut().enumerate() {
                        let (low, high) = Self::nibbles(w.add(group * 4 * PANEL + 32 * j));
                        let both =
                            _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
                        *pairs = _mm256_add_epi16(*pairs, both);
                    }
                }
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = scale_block(*acc, Self::finish(pairs[j], x), x, w, j, Self::DTYPE);
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
            for j in 0..TILE {
                for b in 0..steps {
                    let (x, w) = (x.add(b * XBLOCK_BYTES), w.add(b * step_bytes(Self::DTYPE)));
                    let mut pairs = [_mm256_setzero_si256(); R];
                    for group in 0..BLOCK / 8 {
                        let (low, high) = Self::nibbles(w.add(group * 4 * PANEL + 32 * (vector + j)));
                        for (r, pairs) in pairs.iter_mut().enumerate() {
                            let x = x.add(r * x_stride);
                            let low = _mm256_maddubs_epi16(low, broadcast_group(x, group));
                            let high = _mm256_maddubs_epi16(high, broadcast_group(x, group + 4));
                            *pairs = _mm256_add_epi16(*pairs, _mm256_add_epi16(low, high));
                        }
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = x.add(r * x_stride);
                        acc[j] = scale_block(acc[j], Self::finish(pairs[r], x), x, w, vector + j, Self::DTYPE);
                    }
                }
            }
            acc
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
        let steps = panel_bytes / step_bytes(dtype);
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
            DType::Q8_0 => run_q8_0(operands),
            DType::Q4_0 => run_q4_0(operands),
            DType::Q4_1 => run_q4_1(operands),
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
unsafe fn run_q8_0(operands: Operands<'_>) {
    // SAFETY: the caller checked the operands; the features are enabled here.
    unsafe { operands.run::<Q8>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_q4_0(operands: Operands<'_>) {
    // SAFETY: the caller checked the operands; the features are enabled here.
    unsafe { operands.run::<Q4<false>>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_q4_1(operands: Operands<'_>) {
    // SAFETY: the caller checked the operands; the features are enabled here.
    unsafe { operands.run::<Q4<true>>() }
}
