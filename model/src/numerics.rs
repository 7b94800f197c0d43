//! The numerics contract: the exact sequence of f32 operations every tier performs.
//!
//! Reference ops, hand-written SIMD, compiled kernels of every width and variant, every thread count and the
//! exported native image give bit-identical results because each output element is computed by exactly these steps.
//! `fma(a, b, c)` is one rounding (IEEE 754 fusedMultiplyAdd); every other operation rounds on its own.
//!
//! **Products.** One f32 accumulator per output element, starting at `+0.0`, `k` ascending:
//! - F32, F16: `acc = fma(f32(w[k]), x[k], acc)`.
//! - Quantised types, for each block of 32, sub-block after sub-block (the whole block, or its two halves of 16 for types
//!   with a scale for each 16): `acc = fma(d_w * d_x, f32(dot), acc)`, then for types with minima
//!   `acc = fma(m_w, dsum_x, acc)`.
//!   - `dot = sum q_w q_x - offset * sum q_x` over the sub-block, an exact i32. The offset of codes is 8 for Q4_0, 16 for
//!     Q5_0, 4 for Q3_K, 32 for Q6_K and otherwise 0 ([`BlockLayout::offset`](crate::layout::BlockLayout::offset)).
//!   - `d_w = f32(d)` and `m_w = f32(m)`; for K types `d_w = f32(d) * f32(sc)` and `m_w = f32(m) * f32(mn)` with the scale
//!     and minimum of the sub-block, 8-bit integers: these products of 11 and 8 bits are exact.
//!   - `dsum_x = d_x * f32(sum q_x)` over the sub-block.
//!
//! **Fusions.** `GateUpSilu`: `y = silu(g) * u`. `GateUpGelu`: `y = gelu(g) * u`. `MatmulResidual`: `y = y + acc`. The
//! rest store `acc`. A bias is added to what was stored; an output that is normalised first is added to the residual after.
//!
//! **Activation quantisation**, per block of 32: `amax = max |x|`; `d = amax / 127`; `id = 127 / amax` (0 when `amax` is 0);
//! `q = round_ties_even(x * id)`; `sum = sum q`; `sum_low` that of the first 16; `dsum = d * f32(sum)`. `d` stays f32.
//!
//! **exp(x)**, with the constants below: `x = min(max(x, EXP_LO), EXP_HI)`; `t = fma(x, LOG2E, ROUND_MAGIC)`;
//! `n = t - ROUND_MAGIC`; `r = fma(n, -LN2_HI, x)`; `r = fma(n, -LN2_LO, r)`; `p = EXP_POLY[0]`; for the other
//! coefficients `p = fma(p, r, c)`; `e = fma(p, r * r, r + 1)`; the result is `e * 2^n`, made by adding
//! `bits(t) << 23` (wrapping) to `bits(e)`.
//!
//! **silu(x)** = `x / (1 + exp(0 - x))`.
//!
//! **gelu(x)** (tanh form) = `x / (1 + exp(0 - z))` with `z = x * fma(x * x, GELU_CUBIC, GELU_LINEAR)`.
//!
//! **Reductions** that are not products (rmsnorm, softmax) accumulate in [`REDUCE_LANES`] partial sums, element `i`
//! into lane `i % REDUCE_LANES` in ascending order, then fold halves: `lane[i] += lane[i + width]` for width 16, 8, 4, 2, 1.
//!
//! **rmsnorm**: reduction by `lane = fma(x, x, lane)`; `scale = 1 / sqrt(sum / n + eps)`; `y = x * scale * weight`.
//! **LayerNorm**: reduction by `lane = lane + x`; `mean = sum / n`; `d = x - mean`; reduction by `lane = fma(d, d, lane)`;
//! `scale = 1 / sqrt(sum / n + eps)`; `y = d * scale * weight + bias`.
//! **rope**, pairs `(2i, 2i+1)` or `(i, i + rope_dim/2)`: `x0 * cos - x1 * sin`, `x1 * cos + x0 * sin`; cos and sin are made
//! in f64 and rounded once.
//! **KV cache.** f32: as computed. f16: rounded to nearest even after clamping to +-65504, widened exactly. int8: for
//! each position and head `d = max |x| / 127`, `q = round_ties_even(x * (1 / d))` (0 when `d` is 0), kept between -127 and
//! 127.
//! **Attention** goes block by block over [`KV_BLOCK`](crate::layout::KV_BLOCK) positions, counted from position 0; of
//! each block the query's visible positions take part. Per block: `score = (k-ascending fma of key and query) * scale`
//! (int8: `* d_k` before `* scale`); `m = max score`; `e = exp(score - m)`; `l` = reduction of `e`, element `i` being
//! position `i` of the block; `o = position-ascending fma of e and value` (int8: of `e * d_v` and `q`). The first block
//! gives `M, L, O = m, l, o`; each later one, in ascending order: `top = max(M, m)`; `a = exp(M - top)`;
//! `b = exp(m - top)`; `L = fma(b, l, a * L)`; `O = fma(b, o, a * O)`; `M = top`. `out = O * (1 / L)`.
//!
//! Source of the polynomial: Cephes `expf` coefficients (S. Moshier).

/// Upper clamp of `exp`'s argument.
pub const EXP_HI: f32 = 87.0;
/// Lower clamp of `exp`'s argument.
pub const EXP_LO: f32 = -87.0;
/// `log2(e)`.
pub const LOG2E: f32 = core::f32::consts::LOG2_E;
/// `1.5 * 2^23`: adding it rounds to an integer held in the low mantissa bits.
pub const ROUND_MAGIC: f32 = 12_582_912.0;
/// High part of `ln 2`.
#[allow(clippy::excessive_precision)] // exact: 355/512
pub const LN2_HI: f32 = 0.693_359_375;
/// Low part of `ln 2`.
pub const LN2_LO: f32 = -2.121_944_4e-4;
/// Coefficients of `(exp(r) - 1 - r) / r^2`, highest degree first.
pub const EXP_POLY: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1];
/// `2 sqrt(2 / pi)`: the linear part of gelu's exponent.
pub const GELU_LINEAR: f32 = 1.595_769_1;
/// `0.044715` times [`GELU_LINEAR`]: its cubic part.
pub const GELU_CUBIC: f32 = 7.135_481_6e-2;
/// Partial sums of a reduction.
pub const REDUCE_LANES: usize = 32;
