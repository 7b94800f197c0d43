//! The reference ops instantiated with the CPU's scalar FMA and F16C instructions: same code, same results.

use super::Avx2;
use crate::dispatch::ColumnsMut;
use crate::reference::{self, ScalarArithmetic};
use core::arch::x86_64::{_mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32, _mm_fmadd_ss, _mm_set_ss};
use model::kernel::KernelKey;

/// `vfmadd` and `vcvtph2ps`. Only named inside functions that enable the features.
pub(super) struct Hardware;

impl ScalarArithmetic for Hardware {
    /// An image with kernels only seldom needs the reference, and then is better small.
    const PER_TYPE: bool = crate::ops::HAS_BASELINE;

    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        // SAFETY: this type is private to `simd` and used only behind the `Avx2` proof, which includes FMA.
        unsafe { _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))) }
    }

    #[inline(always)]
    fn half(bytes: [u8; 2]) -> f32 {
        // SAFETY: as above; `Avx2` includes F16C.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(bytes))))) }
    }
}

/// [`reference::run`] with hardware FMA.
pub(crate) fn run_reference(_: Avx2, key: &KernelKey, x: &[u8], w: &[u8], y: ColumnsMut<'_>) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run(key: &KernelKey, x: &[u8], w: &[u8], y: ColumnsMut<'_>) {
        reference::run::<Hardware>(key, x, w, y);
    }
    // SAFETY: `Avx2` proves the features.
    unsafe { run(key, x, w, y) }
}
