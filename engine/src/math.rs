//! Everything of the forward pass that is not a matmul or attention: exp, silu, rmsnorm, rope, softmax, and the int8
//! quantisation of activations. Each has a portable form here and an AVX2 form in `simd::math` with the same bits.

use crate::reference::{ScalarArithmetic, Software};
use crate::simd::{self, Level};
use alloc::vec::Vec;
use model::architecture::{Activation, RopeOrder};
use model::kernel::DType;
use model::layout::{
    BLOCK, QUADS, XBLOCK_D, XBLOCK_DSUM, XBLOCK_HALVES, XBLOCK_QS, XBLOCK_SUM, XBLOCK_SUM_LOW, x_row_bytes,
};
use model::numerics::{
    EXP_HI, EXP_LO, EXP_POLY, GELU_CUBIC, GELU_LINEAR, LN2_HI, LN2_LO, LOG2E, REDUCE_LANES, ROUND_MAGIC,
};

/// `exp(x)` of the numerics contract: within 2 ulp of the true value between the clamps -87 and 87, NaN gives `exp(-87)`.
pub fn exp(x: f32) -> f32 {
    exp_with::<Software>(x)
}

#[inline(always)]
pub(crate) fn exp_with<F: ScalarArithmetic>(x: f32) -> f32 {
    // Comparisons written as `maxps` and `minps` decide them, NaN included.
    let x = if x > EXP_LO { x } else { EXP_LO };
    let x = if x < EXP_HI { x } else { EXP_HI };
    let t = F::fma(x, LOG2E, ROUND_MAGIC);
    let n = t - ROUND_MAGIC;
    let r = F::fma(n, -LN2_HI, x);
    let r = F::fma(n, -LN2_LO, r);
    let p = EXP_POLY[1..].iter().fold(EXP_POLY[0], |p, &c| F::fma(p, r, c));
    let e = F::fma(p, r * r, r + 1.0);
    f32::from_bits(e.to_bits().wrapping_add(t.to_bits() << 23))
}

#[inline(always)]
pub(crate) fn silu_with<F: ScalarArithmetic>(x: f32) -> f32 {
    x / (1.0 + exp_with::<F>(0.0 - x))
}

#[inline(always)]
pub(crate) fn gelu_with<F: ScalarArithmetic>(x: f32) -> f32 {
    let z = x * F::fma(x * x, GELU_CUBIC, GELU_LINEAR);
    x / (1.0 + exp_with::<F>(0.0 - z))
}

/// `x = activation(x)`, times `up` where there is one: the fusion of the gated ops for models whose gate and up weights
/// differ in type, and the activation of plain feed-forward blocks.
///
/// # Panics
/// When the slices differ in length.
pub fn activate(level: Level, activation: Activation, x: &mut [f32], up: Option<&[f32]>) {
    assert!(up.is_none_or(|up| up.len() == x.len()), "gate and up activations");
    let done = match level.avx2() {
        None => 0,
        Some(avx2) => simd::math::activate(avx2, activation, x, up),
    };
    for (i, x) in x.iter_mut().enumerate().skip(done) {
        let active = match activation {
            Activation::Silu => silu_with::<Software>(*x),
            Activation::Gelu => gelu_with::<Software>(*x),
        };
        *x = up.map_or(active, |up| active * up[i]);
    }
}

/// Sums the lanes by folding halves.
#[inline(always)]
pub(crate) fn fold_halves(mut lanes: [f32; REDUCE_LANES]) -> f32 {
    let mut width = REDUCE_LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `out = x * (1 / sqrt(mean(x^2) + eps)) * weight` for one row.
///
/// # Panics
/// When the three slices differ in length.
pub fn rmsnorm(level: Level, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "rmsnorm of {} with {} weights", x.len(), weight.len());
    let scale = 1.0 / libm::sqrtf(sum_of_squares(level, x) / x.len() as f32 + eps);
    // Multiplications only: the compiler may vectorise them as it likes, each rounds by itself.
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// [`rmsnorm`] and then [`quantise_activations`] in one pass, without a row in between.
///
/// # Panics
/// When the lengths differ or are not those of whole blocks.
pub fn rmsnorm_quantise(level: Level, x: &[f32], weight: &[f32], eps: f32, dtype: DType, out: &mut [u8]) {
    assert!(x.len() == weight.len(), "rmsnorm of {} with {} weights", x.len(), weight.len());
    let block_bytes = check_blocks(x, dtype, out);
    let scale = 1.0 / libm::sqrtf(sum_of_squares(level, x) / x.len() as f32 + eps);
    match level.avx2() {
        None => {
            let blocks = x.chunks_exact(BLOCK).zip(weight.chunks_exact(BLOCK));
            for ((x, weight), out) in blocks.zip(out.chunks_exact_mut(block_bytes)) {
                let y: [f32; BLOCK] = core::array::from_fn(|i| x[i] * scale * weight[i]);
                quantise_block(&y, out);
            }
        }
        Some(avx2) => simd::math::scale_quantise(avx2, x, scale, weight, block_bytes, out),
    }
}

/// `out = (x - mean(x)) * (1 / sqrt(variance(x) + eps)) * weight + bias` for one row.
///
/// # Panics
/// When the four slices differ in length.
pub fn layernorm(level: Level, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len();
    assert!(n == weight.len() && n == bias.len() && n == out.len(), "layernorm of {n} with {} weights", weight.len());
    // Additions of independent lanes: the compiler may vectorise them as it likes.
    let mut lanes = [0.0; REDUCE_LANES];
    for x in x.chunks(REDUCE_LANES) {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane += x;
        }
    }
    let mean = fold_halves(lanes) / n as f32;
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x - mean;
    }
    let scale = 1.0 / libm::sqrtf(sum_of_squares(level, out) / n as f32 + eps);
    for ((out, &weight), &bias) in out.iter_mut().zip(weight).zip(bias) {
        *out = *out * scale * weight + bias;
    }
}

/// Sum of squares in the order of a contract reduction.
fn sum_of_squares(level: Level, x: &[f32]) -> f32 {
    match level.avx2() {
        None => {
            let mut lanes = [0.0; REDUCE_LANES];
            for x in x.chunks(REDUCE_LANES) {
                for (lane, &x) in lanes.iter_mut().zip(x) {
                    *lane = Software::fma(x, x, *lane);
                }
            }
            fold_halves(lanes)
        }
        Some(avx2) => simd::math::sum_of_squares(avx2, x),
    }
}

/// Quantises one activation row to the int8 blocks that products with weights of `dtype` read (`model::layout`).
///
/// `q` saturates at -127 and 127, which finite rows reach only as the contract's rounding does.
///
/// # Panics
/// When `x` is no whole number of blocks or `out` is not as long as they are.
pub fn quantise_activations(level: Level, x: &[f32], dtype: DType, out: &mut [u8]) {
    let block_bytes = check_blocks(x, dtype, out);
    match level.avx2() {
        None => {
            for (x, out) in x.chunks_exact(BLOCK).zip(out.chunks_exact_mut(block_bytes)) {
                quantise_block(x, out);
            }
        }
        Some(avx2) => simd::math::quantise(avx2, x, block_bytes, out),
    }
}

/// Bytes of a block; panics where `out` is not as long as the blocks of `x`.
fn check_blocks(x: &[f32], dtype: DType, out: &[u8]) -> usize {
    assert!(x.len().is_multiple_of(BLOCK), "{} activations are no whole blocks of {BLOCK}", x.len());
    assert_eq!(out.len(), x_row_bytes(dtype, x.len()), "bytes of {} quantised activations", x.len());
    x_row_bytes(dtype, BLOCK)
}

fn quantise_block(x: &[f32], out: &mut [u8]) {
    let amax = x.iter().fold(0.0f32, |max, x| if x.abs() > max { x.abs() } else { max });
    let d = amax / 127.0;
    let id = if amax == 0.0 { 0.0 } else { 127.0 / amax };
    let (mut sum, mut sum_low) = (0i32, 0);
    for (i, (out, &x)) in out[XBLOCK_QS..XBLOCK_QS + BLOCK].iter_mut().zip(x).enumerate() {
        let scaled = libm::rintf(x * id);
        // As `vcvtps2dq` and the saturating packs: NaN and what is out of range become the lowest value.
        let q = if (-127.0..=2_147_483_520.0).contains(&scaled) { scaled.min(127.0) as i8 } else { -127 };
        sum += i32::from(q);
        *out = q.cast_unsigned();
        if i == BLOCK / 2 - 1 {
            sum_low = sum;
        }
    }
    out[XBLOCK_D..XBLOCK_D + 4].copy_from_slice(&d.to_le_bytes());
    out[XBLOCK_SUM..XBLOCK_SUM + 4].copy_from_slice(&sum.to_le_bytes());
    out[XBLOCK_DSUM..XBLOCK_DSUM + 4].copy_from_slice(&(d * sum as f32).to_le_bytes());
    out[XBLOCK_SUM_LOW..XBLOCK_SUM_LOW + 4].copy_from_slice(&sum_low.to_le_bytes());
    widen_codes(out);
}

/// Fills what a block has behind its sums, if anything, from its codes.
pub(crate) fn widen_codes(block: &mut [u8]) {
    let (codes, behind) = block.split_at_mut(XBLOCK_SUM_LOW + 4);
    let Some((padding, halves)) = behind.split_at_mut_checked(XBLOCK_HALVES - XBLOCK_SUM_LOW - 4) else { return };
    padding.fill(0);
    for quad in 0..QUADS {
        for (to, from) in [0, 2, 1, 3].into_iter().enumerate() {
            let code = i16::from(codes[XBLOCK_QS + 4 * quad + from].cast_signed());
            halves[8 * quad + 2 * to..][..2].copy_from_slice(&code.to_le_bytes());
        }
    }
}

/// Replaces `scores[..len]` by `exp(score - max)` and returns their sum: softmax without its division.
///
/// `scores` must be padded to a multiple of 32 elements; what is behind `len` is overwritten with unspecified values.
///
/// # Panics
/// When `len` is 0 or the padding is missing.
pub fn softmax_numerators(level: Level, scores: &mut [f32], len: usize) -> f32 {
    assert!(len > 0 && scores.len() >= len.next_multiple_of(REDUCE_LANES), "{len} scores in {}", scores.len());
    match level.avx2() {
        None => {
            let scores = &mut scores[..len];
            let max = scores.iter().fold(f32::NEG_INFINITY, |max, &s| if s > max { s } else { max });
            let mut lanes = [0.0; REDUCE_LANES];
            for scores in scores.chunks_mut(REDUCE_LANES) {
                for (lane, score) in lanes.iter_mut().zip(scores) {
                    *score = exp(*score - max);
                    *lane += *score;
                }
            }
            fold_halves(lanes)
        }
        Some(avx2) => simd::math::softmax_numerators(avx2, scores, len),
    }
}

/// Angles of rotary position embedding, made for each position when it is first reached.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `base^(-2 i / rope_dim) * scale / divisors[i]` for each pair `i`.
    frequencies: Vec<f64>,
    /// For each position, for each pair: cos, sin.
    cos_sin: Vec<f32>,
}

impl RopeTable {
    /// A table for heads whose first `rope_dim` elements turn. `divisors`, one per pair, may be empty: all 1 then.
    pub fn new(base: f32, scale: f32, divisors: &[f32], rope_dim: usize) -> Self {
        let pairs = rope_dim / 2;
        let frequency = |i: usize| {
            let plain = libm::pow(f64::from(base), -2.0 * i as f64 / rope_dim as f64);
            plain * f64::from(scale) / divisors.get(i).map_or(1.0, |&divisor| f64::from(divisor))
        };
        Self { frequencies: (0..pairs).map(frequency).collect(), cos_sin: Vec::new() }
    }

    /// Elements of a head that turn.
    pub fn rope_dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Takes the memory of the rows of positions `..positions`.
    pub fn reserve(&mut self, positions: usize) {
        let len = positions.saturating_mul(self.rope_dim());
        self.cos_sin.reserve_exact(len.saturating_sub(self.cos_sin.len()));
    }

    /// Makes the rows of positions `..positions` that are not there yet.
    pub fn extend_to(&mut self, positions: usize) {
        if self.frequencies.is_empty() {
            return;
        }
        let known = self.cos_sin.len() / self.rope_dim();
        self.cos_sin.reserve(positions.saturating_sub(known) * self.rope_dim());
        for pos in known..positions {
            for frequency in &self.frequencies {
                let angle = pos as f64 * frequency;
                self.cos_sin.push(libm::cos(angle) as f32);
                self.cos_sin.push(libm::sin(angle) as f32);
            }
        }
    }

    /// Cos and sin of each pair at `pos`, alternating.
    ///
    /// # Panics
    /// When the table was not extended that far.
    pub fn row(&self, pos: usize) -> &[f32] {
        &self.cos_sin[pos * self.rope_dim()..][..self.rope_dim()]
    }
}

/// Turns the pairs of every head in `heads` by the angles `cos_sin` of one position; `order` says which elements pair.
///
/// `heads`: heads of `head_dim` elements; `cos_sin`: [`RopeTable::row`].
///
/// # Panics
/// When `heads` is no whole number of heads or the table row is longer than a head.
pub fn rope(level: Level, order: RopeOrder, heads: &mut [f32], head_dim: usize, cos_sin: &[f32]) {
    assert!(heads.len().is_multiple_of(head_dim) && cos_sin.len() <= head_dim, "{} of heads {head_dim}", heads.len());
    for head in heads.chunks_exact_mut(head_dim) {
        let head = &mut head[..cos_sin.len()];
        let half = head.len() / 2;
        // Pairs that whole vectors covered.
        let done = match level.avx2() {
            None => 0,
            Some(avx2) => simd::math::rope(avx2, order, head, cos_sin),
        };
        for (i, angle) in cos_sin.chunks_exact(2).enumerate().skip(done) {
            let (a, b) = match order {
                RopeOrder::Adjacent => (2 * i, 2 * i + 1),
                RopeOrder::Halves => (i, i + half),
            };
            let (x0, x1, cos, sin) = (head[a], head[b], angle[0], angle[1]);
            head[a] = x0 * cos - x1 * sin;
            head[b] = x1 * cos + x0 * sin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;
    use alloc::vec;

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    fn random(rng: &mut SplitMix64, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| rng.next_bell() * scale).collect()
    }

    #[test]
    fn exp_is_close_to_the_true_value() {
        let mut worst = 0.0f64;
        for i in -8_700..=8_700 {
            let x = i as f32 / 100.0;
            let want = libm::exp(f64::from(x));
            worst = worst.max(((f64::from(exp(x)) - want) / want).abs());
        }
        assert!(worst < 1.5e-7, "relative error {worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), exp(-87.0));
        assert_eq!(exp(f32::INFINITY), exp(87.0));
        assert_eq!(exp(f32::NAN), exp(-87.0));
    }

    #[test]
    fn activations_are_the_formulas_and_the_same_at_every_level() {
        let mut rng = SplitMix64::new(5);
        for (len, is_gated) in [(1, true), (8, true), (13, false), (172, true), (172, false)] {
            for activation in [Activation::Silu, Activation::Gelu] {
                let (gate, up) = (random(&mut rng, len, 9.0), random(&mut rng, len, 2.0));
                let up = is_gated.then_some(up.as_slice());
                let (mut portable, mut fast) = (gate.clone(), gate.clone());
                activate(Level::Portable, activation, &mut portable, up);
                activate(Level::detect(), activation, &mut fast, up);
                assert_eq!(bits(&portable), bits(&fast), "{activation:?} {len}");
                for i in 0..len {
                    let x = f64::from(gate[i]);
                    let active = match activation {
                        Activation::Silu => x / (1.0 + libm::exp(-x)),
                        Activation::Gelu => {
                            let inner = (2.0 / core::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                            0.5 * x * (1.0 + libm::tanh(inner))
                        }
                    };
                    let want = active * up.map_or(1.0, |up| f64::from(up[i]));
                    let error = (f64::from(fast[i]) - want).abs();
                    assert!(error < 1e-5 * (want.abs() + 1e-3), "{activation:?} {len} [{i}]: {error}");
                }
            }
        }
        let mut extreme = [1e30, -1e30, 0.0, -0.0, 40.0, -40.0];
        activate(Level::Portable, Activation::Gelu, &mut extreme, None);
        assert_eq!(extreme[0], 1e30);
        assert!(extreme[1..].iter().take(3).all(|x| x.abs() < 1e-7), "{extreme:?}");
    }

    #[test]
    fn layernorm_is_the_formula_and_the_same_at_every_level() {
        let mut rng = SplitMix64::new(6);
        for len in [1, 7, 32, 48, 100, 768] {
            let (x, weight, bias) =
                (random(&mut rng, len, 3.0), random(&mut rng, len, 1.0), random(&mut rng, len, 1.0));
            let (mut portable, mut fast) = (vec![0.0; len], vec![0.0; len]);
            layernorm(Level::Portable, &x, &weight, &bias, 1e-5, &mut portable);
            layernorm(Level::detect(), &x, &weight, &bias, 1e-5, &mut fast);
            assert_eq!(bits(&portable), bits(&fast), "{len}");
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / len as f64;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / len as f64;
            for i in 0..len {
                let want =
                    (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i]) + f64::from(bias[i]);
                assert!((f64::from(fast[i]) - want).abs() <= 1e-5 * (want.abs() + 1.0), "{len} [{i}]");
            }
        }
    }

    #[test]
    fn rmsnorm_is_the_formula_and_the_same_at_every_level() {
        let mut rng = SplitMix64::new(1);
        for len in [1, 7, 32, 48, 64, 100, 172, 288, 576] {
            let (x, weight) = (random(&mut rng, len, 3.0), random(&mut rng, len, 1.0));
            let (mut portable, mut fast) = (vec![0.0; len], vec![0.0; len]);
            rmsnorm(Level::Portable, &x, &weight, 1e-5, &mut portable);
            rmsnorm(Level::detect(), &x, &weight, 1e-5, &mut fast);
            assert_eq!(bits(&portable), bits(&fast), "{len}");
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / len as f64;
            for i in 0..len {
                let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(fast[i]) - want).abs() <= 1e-5 * want.abs() + 1e-7, "{len} [{i}]");
            }
            for dtype in [DType::Q4_0, DType::Q8_0].into_iter().filter(|_| len % BLOCK == 0) {
                let bytes = x_row_bytes(dtype, len);
                let mut want = vec![0u8; bytes];
                quantise_activations(Level::Portable, &portable, dtype, &mut want);
                for level in [Level::Portable, Level::detect()] {
                    let mut got = vec![1u8; bytes];
                    rmsnorm_quantise(level, &x, &weight, 1e-5, dtype, &mut got);
                    assert_eq!(got, want, "{len} quantised for {dtype}");
                }
            }
        }
    }

    #[test]
    fn activations_quantise_to_the_nearest_step() {
        let mut rng = SplitMix64::new(2);
        let mut x = random(&mut rng, 32 * 40, 2.0);
        x[32..64].fill(0.0);
        // Ties: with amax 127 every half is a tie.
        for (i, x) in x[64..96].iter_mut().enumerate() {
            *x = i as f32 - 15.5;
        }
        x[64] = 127.0;
        x[96] = f32::INFINITY;
        x[129] = f32::NAN;
        x[160] = f32::NEG_INFINITY;
        x[192..224].fill(1e-40);
        x[224..256].fill(-3.0e38);
        let (mut portable, mut fast) = (vec![1u8; 48 * 40], vec![2u8; 48 * 40]);
        quantise_activations(Level::Portable, &x, DType::Q4_0, &mut portable);
        quantise_activations(Level::detect(), &x, DType::Q4_0, &mut fast);
        for (i, (a, b)) in portable.chunks_exact(48).zip(fast.chunks_exact(48)).enumerate() {
            assert_eq!(a, b, "block {i}");
        }
        assert!(portable[48..96].iter().all(|&b| b == 0), "a zero block is all zero bytes");
        for (block, x) in portable.chunks_exact(48).zip(x.chunks_exact(32)).skip(8) {
            let d = f32::from_le_bytes(block[32..36].try_into().unwrap());
            let sum = i32::from_le_bytes(block[36..40].try_into().unwrap());
            let quants: Vec<i32> = block[..32].iter().map(|q| i32::from(q.cast_signed())).collect();
            assert_eq!(sum, quants.iter().sum::<i32>());
            assert_eq!(d * sum as f32, f32::from_le_bytes(block[40..44].try_into().unwrap()));
            assert_eq!(quants.iter().map(|q| q.abs()).max(), Some(127));
            for (q, x) in quants.iter().zip(x) {
                assert!((d * *q as f32 - x).abs() <= 0.501 * d, "{x} as {q} * {d}");
            }
        }
        for level in [Level::Portable, Level::detect()] {
            let mut with_halves = vec![3u8; 128 * 40];
            quantise_activations(level, &x, DType::Q8_0, &mut with_halves);
            for (i, (block, want)) in with_halves.chunks_exact(128).zip(portable.chunks_exact(48)).enumerate() {
                assert_eq!(block[..48], *want, "block {i}");
                let halves = |at: usize| i16::from_le_bytes([block[64 + 2 * at], block[65 + 2 * at]]);
                for (at, q) in want[..32].iter().enumerate() {
                    let place = at / 4 * 4 + [0, 2, 1, 3][at % 4];
                    assert_eq!(halves(place), i16::from(q.cast_signed()), "block {i}, element {at}");
                }
            }
        }
        let tie: Vec<i8> = portable[96..128].iter().map(|q| q.cast_signed()).collect();
        assert_eq!(tie[..6], [127, -14, -14, -12, -12, -10], "ties go to even");
    }

    #[test]
    fn softmax_is_the_formula_and_the_same_at_every_level() {
        let mut rng = SplitMix64::new(3);
        for len in [1, 2, 31, 32, 33, 64, 100, 257] {
            let padded = usize::next_multiple_of(len, 32);
            let mut portable = random(&mut rng, padded, 20.0);
            let scores = portable.clone();
            let mut fast = portable.clone();
            let sum = softmax_numerators(Level::Portable, &mut portable, len);
            let sum_fast = softmax_numerators(Level::detect(), &mut fast, len);
            assert_eq!(sum.to_bits(), sum_fast.to_bits(), "{len}");
            assert_eq!(bits(&portable[..len]), bits(&fast[..len]), "{len}");
            let max = scores[..len].iter().cloned().fold(f32::MIN, f32::max);
            let want: f64 = scores[..len].iter().map(|&s| f64::from(s - max).exp()).sum();
            assert!((f64::from(sum) / want - 1.0).abs() < 1e-5, "{len}: {sum} {want}");
        }
    }

    #[test]
    fn rope_turns_pairs_by_position_times_frequency() {
        let mut rng = SplitMix64::new(4);
        for (head_dim, rope_dim) in [(8, 8), (64, 64), (48, 48), (20, 12), (6, 6), (40, 36)] {
            for order in [RopeOrder::Adjacent, RopeOrder::Halves] {
                let divisors: Vec<f32> = (0..rope_dim / 2).map(|i| 1.0 + i as f32).collect();
                let mut table = RopeTable::new(10_000.0, 0.5, &divisors, rope_dim);
                table.extend_to(3);
                table.extend_to(12);
                let x = random(&mut rng, 3 * head_dim, 1.0);
                let (mut portable, mut fast) = (x.clone(), x.clone());
                rope(Level::Portable, order, &mut portable, head_dim, table.row(11));
                rope(Level::detect(), order, &mut fast, head_dim, table.row(11));
                assert_eq!(bits(&portable), bits(&fast), "{head_dim}/{rope_dim} {order:?}");
                for (i, got) in fast.iter().enumerate() {
                    let (head, d) = (i / head_dim * head_dim, i % head_dim);
                    if d >= rope_dim {
                        assert_eq!(*got, x[i], "elements behind rope_dim stay");
                        continue;
                    }
                    let (pair, is_first, other) = match order {
                        RopeOrder::Adjacent => (d / 2, d % 2 == 0, d ^ 1),
                        RopeOrder::Halves => (d % (rope_dim / 2), d < rope_dim / 2, (d + rope_dim / 2) % rope_dim),
                    };
                    let plain = 11.0 / 10_000f64.powf((2 * pair) as f64 / rope_dim as f64);
                    let angle = plain * 0.5 / (1.0 + pair as f64);
                    let (own, other) = (f64::from(x[i]), f64::from(x[head + other]));
                    let sign = if is_first { -1.0 } else { 1.0 };
                    let want = own * angle.cos() + sign * other * angle.sin();
                    assert!((f64::from(*got) - want).abs() < 1e-6, "{head_dim}/{rope_dim} [{i}]: {got} {want}");
                }
            }
        }
    }
}
