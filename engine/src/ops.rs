//! Runs an op with this crate's own code: the reference, or the hand-written version of the CPU's level.

use crate::dispatch::{ColumnsMut, check_operands};
use crate::reference;
use crate::simd::{self, Level};
use model::kernel::KernelKey;

/// The reference op: scalar, in the order the numerics contract states. With hardware FMA where `level` has it.
///
/// `y` must have at least `m` rows and `padded(n)` columns; all of these are written (`y + x W` reads them first).
///
/// # Panics
/// When an operand is shorter than the key needs or `w` is not aligned to `WEIGHT_ALIGN`.
pub fn run_reference(level: Level, key: &KernelKey, x: &[u8], w: &[u8], y: ColumnsMut<'_>) {
    check_operands(key, x, w, &y);
    match level.avx2() {
        None => reference::run_portable(key, x, w, y),
        Some(avx2) => simd::fma::run_reference(avx2, key, x, w, y),
    }
}

/// True when this build has the hand-written products.
pub const HAS_BASELINE: bool = cfg!(feature = "baseline");

/// The hand-written op of `level`: the baseline that compiled kernels must beat. The reference where there is none.
///
/// # Panics
/// As [`run_reference`].
pub fn run_baseline(level: Level, key: &KernelKey, x: &[u8], w: &[u8], y: ColumnsMut<'_>) {
    check_operands(key, x, w, &y);
    match level.avx2() {
        None => reference::run_portable(key, x, w, y),
        #[cfg(feature = "baseline")]
        Some(avx2) => simd::avx2::run(avx2, key, x, w, y),
        #[cfg(not(feature = "baseline"))]
        Some(avx2) => simd::fma::run_reference(avx2, key, x, w, y),
    }
}
