//! The ops that define the numerics: plain scalar code in exactly the order of `model::numerics`.
//!
//! Written once, generic over how a fused multiply-add is made: `libm` on any CPU, or the FMA instruction where the
//! CPU has it (instantiated in `simd`). Both round once, so both are the same function.

use crate::dispatch::ColumnsMut;
use crate::pack::field;
use half::f16;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{
    BLOCK, MINS_OFFSET, PANEL, XBLOCK_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_SUM, panel_bytes, panels, scales_offset,
    step_bytes, x_row_bytes,
};

/// The two scalar operations that a CPU may or may not have an instruction for. Both are exact functions of their
/// arguments, so every implementation gives the same bits.
pub(crate) trait ScalarArithmetic {
    /// `a * b + c` with one rounding.
    fn fma(a: f32, b: f32, c: f32) -> f32;
    /// The little-endian f16 `bytes` as f32.
    fn half(bytes: [u8; 2]) -> f32;
}

/// In software, on any CPU.
pub(crate) struct Software;

impl ScalarArithmetic for Software {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        libm::fmaf(a, b, c)
    }

    #[inline(always)]
    fn half(bytes: [u8; 2]) -> f32 {
        f16::from_le_bytes(bytes).to_f32_const()
    }
}

/// Computes the op `key` names on operands as `model::layout` lays them out.
///
/// `x`: `m` activation rows; `w`: packed weights; `y`: at least `(m, padded(n))`, padding columns are written.
/// The caller has checked the operands' sizes.
#[inline(always)]
pub(crate) fn run<F: ScalarArithmetic>(key: &KernelKey, x: &[u8], w: &[u8], mut y: ColumnsMut<'_>) {
    let (m, n, k) = (key.m as usize, key.n as usize, key.k as usize);
    let x_row_bytes = x_row_bytes(key.dtype, k);
    let panel_bytes = panel_bytes(key.dtype, k);
    for r in 0..m {
        let x = &x[r * x_row_bytes..][..x_row_bytes];
        let y = y.row(r);
        // Plain loops without closures: a closure would not inherit the target features this code is inlined into.
        let mut panels_of_w = w.chunks_exact(panel_bytes);
        for y in y.chunks_exact_mut(PANEL).take(panels(n)) {
            let Some(panel) = panels_of_w.next() else { return };
            let acc = product::<F>(key.dtype, x, panel);
            match key.op {
                Op::Matmul | Op::Qkv | Op::LmHead => y.copy_from_slice(&acc),
                Op::MatmulResidual => {
                    for (y, acc) in y.iter_mut().zip(acc) {
                        *y += acc;
                    }
                }
                Op::GateUpSilu | Op::GateUpGelu => {
                    let Some(panel) = panels_of_w.next() else { return };
                    let up = product::<F>(key.dtype, x, panel);
                    let is_silu = key.op == Op::GateUpSilu;
                    for (y, (gate, up)) in y.iter_mut().zip(acc.into_iter().zip(up)) {
                        let gate =
                            if is_silu { crate::math::silu_with::<F>(gate) } else { crate::math::gelu_with::<F>(gate) };
                        *y = gate * up;
                    }
                }
            }
        }
    }
}

/// The 32 sums of one activation row with one panel.
#[inline(always)]
fn product<F: ScalarArithmetic>(dtype: DType, x: &[u8], panel: &[u8]) -> [f32; PANEL] {
    let mut acc = [0.0f32; PANEL];
    let steps = panel.chunks_exact(step_bytes(dtype));
    match dtype {
        DType::F32 => {
            for (w, x) in steps.zip(x.chunks_exact(4)) {
                let x = f32::from_le_bytes(field(x, 0));
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = F::fma(f32::from_le_bytes(field(w, 4 * c)), x, *acc);
                }
            }
        }
        DType::F16 => {
            for (w, x) in steps.zip(x.chunks_exact(4)) {
                let x = f32::from_le_bytes(field(x, 0));
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = F::fma(F::half(field(w, 2 * c)), x, *acc);
                }
            }
        }
        DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => {
            for (w, x) in steps.zip(x.chunks_exact(XBLOCK_BYTES)) {
                let d_x = f32::from_le_bytes(field(x, XBLOCK_D));
                let x_sum = i32::from_le_bytes(field(x, XBLOCK_SUM));
                for (c, acc) in acc.iter_mut().enumerate() {
                    let d_w = F::half(field(w, scales_offset(dtype) + 2 * c));
                    let dot = match dtype {
                        DType::Q8_0 => dot_q8(w, x, c),
                        DType::Q4_0 => dot_q4(w, x, c) - 8 * x_sum,
                        _ => dot_q4(w, x, c),
                    };
                    *acc = F::fma(d_w * d_x, dot as f32, *acc);
                    if dtype == DType::Q4_1 {
                        let m_w = F::half(field(w, MINS_OFFSET + 2 * c));
                        *acc = F::fma(m_w, f32::from_le_bytes(field(x, XBLOCK_DSUM)), *acc);
                    }
                }
            }
        }
    }
    acc
}

/// Exact integer dot product of column `c` of a Q8_0 step with an activation block.
#[inline(always)]
fn dot_q8(w: &[u8], x: &[u8], c: usize) -> i32 {
    let mut dot = 0;
    for (i, x) in x[..BLOCK].iter().enumerate() {
        let w = w[i / 4 * 4 * PANEL + 4 * c + i % 4].cast_signed();
        dot += i32::from(w) * i32::from(x.cast_signed());
    }
    dot
}

/// Exact integer dot product of the unsigned nibbles of column `c` of a Q4 step with an activation block.
#[inline(always)]
fn dot_q4(w: &[u8], x: &[u8], c: usize) -> i32 {
    let mut dot = 0;
    let (low, high) = x[..BLOCK].split_at(BLOCK / 2);
    for (i, (low, high)) in low.iter().zip(high).enumerate() {
        let pair = w[i / 4 * 4 * PANEL + 4 * c + i % 4];
        dot +=
            i32::from(pair & 15) * i32::from(low.cast_signed()) + i32::from(pair >> 4) * i32::from(high.cast_signed());
    }
    dot
}
