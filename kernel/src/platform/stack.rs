//! How much of the boot CPU's stack was ever used.

use crate::boot::area::{AREA_BYTES, AREA_STACK};
use crate::boot::gates;

/// Bytes of the stack that were written at some time, and bytes in all. The stack is zero at the start of the image, so
/// what lies below the lowest word that is not zero was never used.
pub fn used_and_capacity() -> (u64, u64) {
    let area = gates::cpu0_area();
    let (start, end) = (area + AREA_STACK, area + AREA_BYTES);
    // SAFETY: mapped memory of this CPU; volatile, because the words belong to frames that are live or gone.
    let lowest = (start..end).step_by(8).find(|&at| unsafe { (at as *const u64).read_volatile() } != 0);
    (end - lowest.unwrap_or(end), end - start)
}
