//! AVX2 forms of `math`: the same operations in the same order, lane by lane.

use super::Avx2;
use crate::math::fold_halves;
use core::arch::x86_64::*;
use model::architecture::{Activation, RopeOrder};
use model::layout::{BLOCK, XBLOCK_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_HALVES, XBLOCK_SUM, XBLOCK_SUM_LOW};
use model::numerics::{
    EXP_HI, EXP_LO, EXP_POLY, GELU_CUBIC, GELU_LINEAR, LN2_HI, LN2_LO, LOG2E, REDUCE_LANES, ROUND_MAGIC,
};

/// `exp` of eight lanes (see `math::exp_with`).
///
/// # Safety
/// AVX2 and FMA.
#[inline(always)]
pub(super) unsafe fn exp8(x: __m256) -> __m256 {
    // SAFETY: by the caller.
    unsafe {
        let x = _mm256_max_ps(x, _mm256_set1_ps(EXP_LO));
        let x = _mm256_min_ps(x, _mm256_set1_ps(EXP_HI));
        let t = _mm256_fmadd_ps(x, _mm256_set1_ps(LOG2E), _mm256_set1_ps(ROUND_MAGIC));
        let n = _mm256_sub_ps(t, _mm256_set1_ps(ROUND_MAGIC));
        let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2_HI), x);
        let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2_LO), r);
        let mut p = _mm256_set1_ps(EXP_POLY[0]);
        for c in &EXP_POLY[1..] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
        }
        let e = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0)));
        let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e), exponent))
    }
}

/// `silu` of eight lanes.
///
/// # Safety
/// AVX2 and FMA.
#[inline(always)]
pub(super) unsafe fn silu8(x: __m256) -> __m256 {
    // SAFETY: by the caller.
    unsafe {
        let e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), x));
        _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0), e))
    }
}

/// `gelu` of eight lanes.
///
/// # Safety
/// AVX2 and FMA.
#[inline(always)]
pub(super) unsafe fn gelu8(x: __m256) -> __m256 {
    // SAFETY: by the caller.
    unsafe {
        let (cubic, linear) = (_mm256_set1_ps(GELU_CUBIC), _mm256_set1_ps(GELU_LINEAR));
        let z = _mm256_mul_ps(x, _mm256_fmadd_ps(_mm256_mul_ps(x, x), cubic, linear));
        let e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), z));
        _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0), e))
    }
}

/// `math::activate` in whole vectors; returns how many elements that covered.
///
/// # Panics
/// When the slices differ in length.
pub(crate) fn activate(_: Avx2, activation: Activation, x: &mut [f32], up: Option<&[f32]>) -> usize {
    #[target_feature(enable = "avx2,fma")]
    fn run(activation: Activation, x: &mut [f32], up: Option<&[f32]>) -> usize {
        for (i, x) in x.chunks_exact_mut(8).enumerate() {
            // SAFETY: the chunks are eight f32, `up` is as long as `x`; AVX2 and FMA are enabled here.
            unsafe {
                let value = _mm256_loadu_ps(x.as_ptr());
                let mut active = match activation {
                    Activation::Silu => silu8(value),
                    Activation::Gelu => gelu8(value),
                };
                if let Some(up) = up {
                    active = _mm256_mul_ps(active, _mm256_loadu_ps(up[8 * i..8 * i + 8].as_ptr()));
                }
                _mm256_storeu_ps(x.as_mut_ptr(), active);
            }
        }
        x.len() / 8 * 8
    }
    assert!(up.is_none_or(|up| up.len() == x.len()));
    // SAFETY: `Avx2` proves the features.
    unsafe { run(activation, x, up) }
}

/// The four vectors of a reduction, as its 32 lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes_of(vectors: [__m256; 4]) -> [f32; REDUCE_LANES] {
    let mut lanes = [0.0; REDUCE_LANES];
    for (lanes, vector) in lanes.chunks_exact_mut(8).zip(vectors) {
        // SAFETY: the chunk is eight f32.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), vector) };
    }
    lanes
}

/// Sum of squares in the order of a contract reduction.
pub(crate) fn sum_of_squares(_: Avx2, x: &[f32]) -> f32 {
    #[target_feature(enable = "avx2,fma")]
    fn sum(x: &[f32]) -> f32 {
        let mut acc = [_mm256_setzero_ps(); 4];
        let chunks = x.chunks_exact(REDUCE_LANES);
        let tail = chunks.remainder();
        for x in chunks {
            for (acc, x) in acc.iter_mut().zip(x.chunks_exact(8)) {
                // SAFETY: the chunk is eight f32.
                let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
                *acc = _mm256_fmadd_ps(x, x, *acc);
            }
        }
        let mut lanes = lanes_of(acc);
        for (lane, &x) in lanes.iter_mut().zip(tail) {
            *lane = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(x), _mm_set_ss(x), _mm_set_ss(*lane)));
        }
        fold_halves(lanes)
    }
    // SAFETY: `Avx2` proves the features.
    unsafe { sum(x) }
}

/// Index of the first of the largest elements; `None` when every one is NaN.
pub(crate) fn first_of_largest(_: Avx2, x: &[f32]) -> Option<usize> {
    #[target_feature(enable = "avx2")]
    fn run(x: &[f32]) -> Option<usize> {
        let mut max = [_mm256_set1_ps(f32::NEG_INFINITY); 4];
        let chunks = x.chunks_exact(32);
        // `maxps` returns its second operand when the first is NaN, so NaN never becomes the maximum.
        for chunk in chunks.clone() {
            for (j, max) in max.iter_mut().enumerate() {
                // SAFETY: the chunk is 32 f32.
                *max = _mm256_max_ps(unsafe { _mm256_loadu_ps(chunk.as_ptr().add(8 * j)) }, *max);
            }
        }
        let lanes = lanes_of(max);
        let larger = |max: f32, x: &f32| if *x > max { *x } else { max };
        let largest = lanes.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, larger);
        let wanted = _mm256_set1_ps(largest);
        let mut at = 0;
        for chunk in x.chunks_exact(8) {
            // SAFETY: the chunk is eight f32.
            let x = unsafe { _mm256_loadu_ps(chunk.as_ptr()) };
            let equal = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(x, wanted));
            if equal != 0 {
                return Some(at + equal.trailing_zeros() as usize);
            }
            at += 8;
        }
        x[at..].iter().position(|&x| x == largest).map(|i| at + i)
    }
    // SAFETY: `Avx2` proves the features.
    unsafe { run(x) }
}

/// `y = x * scale * weight`, quantised as `math::quantise_activations` does.
///
/// # Panics
/// When the lengths are not those of whole blocks.
pub(crate) fn scale_quantise(_: Avx2, x: &[f32], scale: f32, weight: &[f32], block_bytes: usize, out: &mut [u8]) {
    #[target_feature(enable = "avx2")]
    fn run(x: &[f32], scale: f32, weight: &[f32], block_bytes: usize, out: &mut [u8]) {
        let scale = _mm256_set1_ps(scale);
        let blocks = x.chunks_exact(BLOCK).zip(weight.chunks_exact(BLOCK));
        for ((x, weight), out) in blocks.zip(out.chunks_exact_mut(block_bytes)) {
            let mut y = [_mm256_setzero_ps(); 4];
            for (j, y) in y.iter_mut().enumerate() {
                // SAFETY: both chunks are 32 f32.
                let (x, weight) =
                    unsafe { (_mm256_loadu_ps(x.as_ptr().add(8 * j)), _mm256_loadu_ps(weight.as_ptr().add(8 * j))) };
                *y = _mm256_mul_ps(_mm256_mul_ps(x, scale), weight);
            }
            quantise_block(y, out);
        }
    }
    assert!(x.len() == weight.len() && x.len().is_multiple_of(BLOCK) && out.len() == x.len() / BLOCK * block_bytes);
    // SAFETY: `Avx2` proves the features.
    unsafe { run(x, scale, weight, block_bytes, out) }
}

/// One block of [`quantise`].
#[inline]
#[target_feature(enable = "avx2")]
fn quantise_block(x: [__m256; 4], out: &mut [u8]) {
    let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
    let zero = _mm256_setzero_ps();
    // `maxps` returns its second operand when the first is NaN, so NaN never becomes the maximum.
    let max = x.iter().fold(zero, |max, &x| _mm256_max_ps(_mm256_and_ps(x, magnitude), max));
    let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
    let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    let amax = _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
    let d = amax / 127.0;
    let id = _mm256_set1_ps(if amax == 0.0 { 0.0 } else { 127.0 / amax });
    let q: [__m256i; 4] = core::array::from_fn(|j| _mm256_cvtps_epi32(_mm256_mul_ps(x[j], id)));
    let q = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    // The packs interleave 128-bit halves: put the eight groups of four back in order.
    let q = _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    let q = _mm256_max_epi8(q, _mm256_set1_epi8(-127));
    let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
    let sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    // Both halves of the block at once: neighbours, then pairs.
    let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0x4e>(sums));
    let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0xb1>(sums));
    let sum_low = _mm_cvtsi128_si32(_mm256_castsi256_si128(sums));
    let sum = sum_low + _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(sums));
    let (out, behind) = out.split_at_mut(XBLOCK_BYTES);
    // SAFETY: what was split off is 48 bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), q) };
    out[XBLOCK_D..XBLOCK_D + 4].copy_from_slice(&d.to_le_bytes());
    out[XBLOCK_SUM..XBLOCK_SUM + 4].copy_from_slice(&sum.to_le_bytes());
    out[XBLOCK_DSUM..XBLOCK_DSUM + 4].copy_from_slice(&(d * sum as f32).to_le_bytes());
    out[XBLOCK_SUM_LOW..].copy_from_slice(&sum_low.to_le_bytes());
    let Some((padding, halves)) = behind.split_at_mut_checked(XBLOCK_HALVES - XBLOCK_BYTES) else { return };
    padding.fill(0);
    assert_eq!(halves.len(), 2 * BLOCK);
    let (even, odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(q)), _mm256_srai_epi16::<8>(q));
    // Of each 128-bit half two quads and two quads.
    let (first, second) = (_mm256_unpacklo_epi32(even, odd), _mm256_unpackhi_epi32(even, odd));
    // SAFETY: `halves` is 64 bytes.
    unsafe {
        let halves = halves.as_mut_ptr().cast::<__m256i>();
        _mm256_storeu_si256(halves, _mm256_permute2x128_si256::<0x20>(first, second));
        _mm256_storeu_si256(halves.add(1), _mm256_permute2x128_si256::<0x31>(first, second));
    }
}

/// `math::quantise_activations`, which has checked that the lengths are those of whole blocks.
pub(crate) fn quantise(_: Avx2, x: &[f32], block_bytes: usize, out: &mut [u8]) {
    #[target_feature(enable = "avx2")]
    fn quantise(x: &[f32], block_bytes: usize, out: &mut [u8]) {
        for (x, out) in x.chunks_exact(BLOCK).zip(out.chunks_exact_mut(block_bytes)) {
            // SAFETY: the chunk is 32 f32.
            let x: [__m256; 4] = core::array::from_fn(|j| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * j)) });
            quantise_block(x, out);
        }
    }
    // SAFETY: `Avx2` proves the features.
    unsafe { quantise(x, block_bytes, out) }
}

/// `math::softmax_numerators`; `scores` is padded to whole chunks of 32.
pub(crate) fn softmax_numerators(_: Avx2, scores: &mut [f32], len: usize) -> f32 {
    #[target_feature(enable = "avx2,fma")]
    fn numerators(scores: &mut [f32], len: usize) -> f32 {
        let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
        for scores in scores.chunks_exact(8) {
            // SAFETY: the chunk is eight f32.
            max = _mm256_max_ps(unsafe { _mm256_loadu_ps(scores.as_ptr()) }, max);
        }
        let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
        let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
        let max = _mm256_set1_ps(_mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max))));
        let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let mut acc = [_mm256_setzero_ps(); 4];
        for (i, scores) in scores.chunks_exact_mut(8).enumerate() {
            // SAFETY: the chunk is eight f32; AVX2 and FMA are enabled here.
            unsafe {
                let e = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores.as_ptr()), max));
                _mm256_storeu_ps(scores.as_mut_ptr(), e);
                // Lanes behind `len` add +0.0, which changes no sum of positive terms.
                let left = i32::try_from(len.saturating_sub(8 * i).min(8)).unwrap_or(8);
                let inside = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(left), index));
                acc[i % 4] = _mm256_add_ps(acc[i % 4], _mm256_and_ps(e, inside));
            }
        }
        fold_halves(lanes_of(acc))
    }
    let scores = &mut scores[..len.next_multiple_of(REDUCE_LANES)];
    // The padding takes part in the maximum, so it repeats a score.
    let first = scores[0];
    scores[len..].fill(first);
    // SAFETY: `Avx2` proves the features.
    unsafe { numerators(scores, len) }
}

/// Turns the pairs of one head in whole vectors and returns how many pairs that covered.
///
/// # Panics
/// When the slices differ in length.
pub(crate) fn rope(_: Avx2, order: RopeOrder, head: &mut [f32], cos_sin: &[f32]) -> usize {
    #[target_feature(enable = "avx2")]
    fn adjacent(head: &mut [f32], cos_sin: &[f32]) -> usize {
        for (pairs, angles) in head.chunks_exact_mut(8).zip(cos_sin.chunks_exact(8)) {
            // SAFETY: both chunks are eight f32.
            unsafe {
                let (x, angles) = (_mm256_loadu_ps(pairs.as_ptr()), _mm256_loadu_ps(angles.as_ptr()));
                let swapped = _mm256_permute_ps::<0xb1>(x);
                let turned = _mm256_addsub_ps(
                    _mm256_mul_ps(x, _mm256_moveldup_ps(angles)),
                    _mm256_mul_ps(swapped, _mm256_movehdup_ps(angles)),
                );
                _mm256_storeu_ps(pairs.as_mut_ptr(), turned);
            }
        }
        head.len() / 8 * 4
    }
    #[target_feature(enable = "avx2")]
    fn halves(head: &mut [f32], cos_sin: &[f32]) -> usize {
        let (first, second) = head.split_at_mut(head.len() / 2);
        let angles = cos_sin.chunks_exact(16);
        for ((first, second), angles) in first.chunks_exact_mut(8).zip(second.chunks_exact_mut(8)).zip(angles) {
            // SAFETY: the chunks are eight f32, that of the angles sixteen.
            unsafe {
                let low = _mm256_loadu_ps(angles.as_ptr());
                let high = _mm256_loadu_ps(angles.as_ptr().add(8));
                // The shuffles work in 128-bit halves: put the pairs of lanes back in order.
                let in_order = |v: __m256| _mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(_mm256_castps_pd(v)));
                let cos = in_order(_mm256_shuffle_ps::<0x88>(low, high));
                let sin = in_order(_mm256_shuffle_ps::<0xdd>(low, high));
                let (x0, x1) = (_mm256_loadu_ps(first.as_ptr()), _mm256_loadu_ps(second.as_ptr()));
                let turned0 = _mm256_sub_ps(_mm256_mul_ps(x0, cos), _mm256_mul_ps(x1, sin));
                let turned1 = _mm256_add_ps(_mm256_mul_ps(x1, cos), _mm256_mul_ps(x0, sin));
                _mm256_storeu_ps(first.as_mut_ptr(), turned0);
                _mm256_storeu_ps(second.as_mut_ptr(), turned1);
            }
        }
        head.len() / 16 * 8
    }
    assert_eq!(head.len(), cos_sin.len());
    // SAFETY: `Avx2` proves the features.
    unsafe {
        match order {
            RopeOrder::Adjacent => adjacent(head, cos_sin),
            RopeOrder::Halves => halves(head, cos_sin),
        }
    }
}
