//! One CPU's memory: its TSS with the port allow-list, its ring-0 stacks, its ring-3 stacks, and the guards between.
//!
//! ```text
//! +00_0000  control          supervisor   CPU number
//! +00_1000  TSS, port bitmap supervisor   104 + 8192 + 1 bytes
//! +00_4000  IST1             supervisor   faults and gates; last 8 bytes: address of this area
//! +00_5000  IST2             supervisor   double fault
//! +00_6000  IST3             supervisor   NMI
//! +00_7000  IST4             supervisor   machine check
//! +00_8000  IST5             supervisor   device interrupts
//! +00_9000  guard            unmapped
//! +00_a000  fault frame      ring 3       registers of the last fault, written by ring 0
//! +00_b000  guard            unmapped
//! +00_c000  fault stack      ring 3       64 KiB, grows down
//! +01_c000  guard            unmapped
//! +01_d000  main stack       ring 3       908 KiB, grows down
//! +10_0000  end
//! ```

/// Bytes of one area, a power of two.
pub const AREA_BYTES: u64 = 1 << AREA_SHIFT;
/// Binary logarithm of [`AREA_BYTES`].
pub const AREA_SHIFT: u32 = 20;
/// The TSS.
pub const AREA_TSS: u64 = 0x1000;
/// IST1; IST2 to IST5 follow, one page each.
pub const AREA_IST: u64 = 0x4000;
/// End of the first IST page.
pub const AREA_IST_END: u64 = AREA_IST + 0x1000;
/// Interrupt stacks.
pub const IST_COUNT: u64 = 5;
/// Register frame of the last fault.
pub const AREA_FRAME: u64 = 0xa000;
/// Stack of the fault reporter.
pub const AREA_FAULT_STACK: u64 = 0xc000;
/// End of the stack of the fault reporter.
pub const AREA_FAULT_STACK_END: u64 = 0x1_c000;
/// Lowest byte of the main stack.
pub const AREA_STACK: u64 = 0x1_d000;

/// Bytes of the TSS before the port bitmap.
pub const TSS_BYTES: u64 = 104;
/// Bytes of the port bitmap, without the closing `0xff`.
pub const PORT_BITMAP_BYTES: u64 = 8192;
/// Segment limit of TSS, bitmap and closing byte.
pub const TSS_LIMIT: u64 = TSS_BYTES + PORT_BITMAP_BYTES;

/// CPUs the descriptor table has room for.
pub const MAX_CPUS: usize = 64;
/// Bytes of the descriptor table: eight entries and one two-entry TSS descriptor for each CPU.
pub const GDT_BYTES: u64 = 64 + 16 * MAX_CPUS as u64;
/// Physical page the other cores start in.
pub const TRAMPOLINE: u64 = 0x8000;

/// A part of an area that ring 0 alone, or ring 3, may use; everything between parts stays unmapped.
pub struct Part {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset of the end.
    pub end: u64,
    /// Ring 3 may read and write it; otherwise only ring 0.
    pub user: bool,
}

/// Mapped parts of an area, in address order.
pub const PARTS: [Part; 4] = [
    Part { start: 0, end: AREA_IST + IST_COUNT * 0x1000, user: false },
    Part { start: AREA_FRAME, end: AREA_FRAME + 0x1000, user: true },
    Part { start: AREA_FAULT_STACK, end: AREA_FAULT_STACK_END, user: true },
    Part { start: AREA_STACK, end: AREA_BYTES, user: true },
];

// The TSS with its bitmap ends before the interrupt stacks, and the descriptor table is one page.
const _: () = assert!(AREA_TSS + TSS_LIMIT < AREA_IST && GDT_BYTES <= 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_ordered_and_every_stack_has_a_guard_below() {
        for pair in PARTS.windows(2) {
            assert!(pair[0].end < pair[1].start, "no guard before {:#x}", pair[1].start);
        }
        assert_eq!(PARTS[0].end, AREA_FRAME - 0x1000);
    }
}
