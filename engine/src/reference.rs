//! The ops that define the numerics: plain scalar code in exactly the order of `model::numerics`.
//!
//! Written once, generic over how a fused multiply-add is made: `libm` on any CPU, or the FMA instruction where the
//! CPU has it (instantiated in `simd`). Both round once, so both are the same function.

use crate::dispatch::ColumnsMut;
use crate::pack::field;
use half::f16;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{
    BlockLayout, PANEL, SUPER, WORD_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_SUM, XBLOCK_SUM_LOW, panel_bytes, panels,
    step_bytes, x_row_bytes,
};

/// The two scalar operations that a CPU may or may not have an instruction for. Both are exact functions of their
/// arguments, so every implementation gives the same bits.
pub(crate) trait ScalarArithmetic {
    /// True where the ops are worth code of their own for every type.
    const PER_TYPE: bool;
    /// `a * b + c` with one rounding.
    fn fma(a: f32, b: f32, c: f32) -> f32;
    /// The little-endian f16 `bytes` as f32.
    fn half(bytes: [u8; 2]) -> f32;
}

/// In software, on any CPU.
pub(crate) struct Software;

impl ScalarArithmetic for Software {
    const PER_TYPE: bool = false;

    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        libm::fmaf(a, b, c)
    }

    #[inline(always)]
    fn half(bytes: [u8; 2]) -> f32 {
        f16::from_le_bytes(bytes).to_f32_const()
    }
}

/// Runs code of its own for every quantised type, in which the layout is a constant.
macro_rules! with_layout {
    ($dtype:expr, |$layout:ident| $run:expr) => {
        with_layout!($dtype, $layout, $run, Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K)
    };
    ($dtype:expr, $layout:ident, $run:expr, $($name:ident)*) => {
        match $dtype {
            $(DType::$name => {
                let $layout = const { BlockLayout::of(DType::$name).unwrap() };
                $run
            })*
            DType::F32 | DType::F16 => {}
        }
    };
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
            // One place for the products of both parts of a gated op: their code is inlined here, for every type.
            let mut sums = [[0.0; PANEL]; 2];
            for sums in sums.iter_mut().take(key.op.columns_per_output()) {
                let Some(panel) = panels_of_w.next() else { return };
                *sums = product::<F>(key.dtype, x, panel);
            }
            let [acc, up] = sums;
            match key.op {
                Op::Matmul | Op::Qkv | Op::LmHead => y.copy_from_slice(&acc),
                Op::MatmulResidual => {
                    for (y, acc) in y.iter_mut().zip(acc) {
                        *y += acc;
                    }
                }
                Op::GateUpSilu | Op::GateUpGelu => {
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

/// [`run`] on any CPU. A function of its own, so that there is one copy of it.
pub(crate) fn run_portable(key: &KernelKey, x: &[u8], w: &[u8], y: ColumnsMut<'_>) {
    run::<Software>(key, x, w, y);
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
        _ if F::PER_TYPE => with_layout!(dtype, |layout| blocks::<F>(layout, x, panel, &mut acc)),
        _ => {
            let Some(layout) = BlockLayout::of(dtype) else { return acc };
            blocks::<F>(layout, x, panel, &mut acc);
        }
    }
    acc
}

/// Adds the products of a quantised row with a panel to `acc`.
#[inline(always)]
fn blocks<F: ScalarArithmetic>(layout: BlockLayout, x: &[u8], panel: &[u8], acc: &mut [f32; PANEL]) {
    let group_steps = if layout.super_blocks { SUPER } else { 1 };
    let group_bytes = layout.header_bytes() + group_steps * layout.step_bytes();
    let x_bytes = layout.x_block_bytes();
    for (group, x) in panel.chunks_exact(group_bytes).zip(x.chunks_exact(group_steps * x_bytes)) {
        let (header, steps) = group.split_at(layout.header_bytes());
        for (step, x) in steps.chunks_exact(layout.step_bytes()).zip(x.chunks_exact(x_bytes)) {
            for sub in 0..layout.sub_blocks {
                sub_block::<F>(&layout, sub, header, step, x, acc);
            }
        }
    }
}

/// Adds the products of one sub-block to `acc`.
#[inline(always)]
fn sub_block<F: ScalarArithmetic>(
    layout: &BlockLayout,
    sub: usize,
    header: &[u8],
    step: &[u8],
    x: &[u8],
    acc: &mut [f32; PANEL],
) {
    let d_x = f32::from_le_bytes(field(x, XBLOCK_D));
    let sum = i32::from_le_bytes(field(x, XBLOCK_SUM));
    let sum_low = i32::from_le_bytes(field(x, XBLOCK_SUM_LOW));
    let (sum, dsum) = match (layout.sub_blocks, sub) {
        (1, _) => (sum, f32::from_le_bytes(field(x, XBLOCK_DSUM))),
        (_, 0) => (sum_low, d_x * sum_low as f32),
        _ => (sum - sum_low, d_x * (sum - sum_low) as f32),
    };
    // Column by column inside a quad: what the compiler makes vectors of, where it has any.
    let mut dots = [0i32; PANEL];
    for quad in sub * layout.quads_per_scale()..(sub + 1) * layout.quads_per_scale() {
        let x: [u8; 4] = field(x, 4 * quad);
        let x = x.map(|x| i32::from(x.cast_signed()));
        for (c, dot) in dots.iter_mut().enumerate() {
            let codes = layout.codes(quad, |word| u32::from_le_bytes(field(step, word * WORD_BYTES + 4 * c)));
            for (i, x) in x.into_iter().enumerate() {
                // Byte `i`, moved to the top and back down, with its sign or without.
                let top = codes << (24 - 8 * i);
                let code = if layout.signed_codes() { top.cast_signed() >> 24 } else { (top >> 24).cast_signed() };
                *dot += code * x;
            }
        }
    }
    for (c, acc) in acc.iter_mut().enumerate() {
        let dot = dots[c] - layout.offset * sum;
        let (at, minimum_at) = (layout.scales_offset(sub), layout.minima_offset(sub));
        let d_w = if layout.super_blocks {
            let [scale] = field(step, at + c);
            let scale = if layout.signed_scales { f32::from(scale.cast_signed()) } else { f32::from(scale) };
            F::half(field(header, 2 * c)) * scale
        } else {
            F::half(field(step, at + 2 * c))
        };
        *acc = F::fma(d_w * d_x, dot as f32, *acc);
        if layout.minima {
            let m_w = if layout.super_blocks {
                let [minimum] = field(step, minimum_at + c);
                F::half(field(header, 2 * PANEL + 2 * c)) * f32::from(minimum)
            } else {
                F::half(field(step, minimum_at + 2 * c))
            };
            *acc = F::fma(m_w, dsum, *acc);
        }
    }
}
