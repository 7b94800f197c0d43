//! Who gets which physical memory: decided once, before the page tables are built.
//!
//! ```text
//!          0  null page, firmware area: unmapped (one page for the other cores' start-up)
//!    0010_0000  image: text R-X, rodata R--, data RW-, first CPU area (link.ld)
//!              (unmapped up to the next 2 MiB)
//!     tables   page tables                         supervisor
//!     cores    CPU areas of the other cores        guards inside (area.rs)
//!     code     JIT arena, RW- here and R-X at 0080_0000_0000
//!     ram      everything else below 4 GiB, whole 2 MiB pages, RW-
//!              device registers (PCI BARs found at boot), RW-, uncached
//!  1_0000_0000  ram above 4 GiB, RW-
//! 80_0000_0000  executable alias of `code`
//! ```

use super::area::{AREA_BYTES, MAX_CPUS};
use super::fixed::FixedList;
use super::info::Range;
use super::paging::{LARGE_PAGE_BYTES, PAGE_BYTES};

/// Most separate pieces of RAM that are used.
pub const RAM_RANGES: usize = 32;
/// RAM beyond this address is left alone: one PML4 entry's worth.
pub const RAM_LIMIT: u64 = 1 << 39;
/// Virtual address of the executable alias of the code arena.
pub const CODE_ALIAS: u64 = 1 << 39;
/// Largest code arena.
pub const CODE_BYTES: u64 = 32 << 20;
/// Frames kept for everything but the page directories of RAM: image, areas, alias and device pages.
const SPARE_FRAMES: u64 = 160;

/// The division of memory.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Page-table frames.
    pub tables: Range,
    /// CPU areas of cores 1 and up.
    pub areas: Range,
    /// Code arena.
    pub code: Range,
    /// Free RAM, 2 MiB pages, in address order; disjoint from everything above.
    pub ram: FixedList<Range, RAM_RANGES>,
    /// End of the highest RAM.
    pub ram_end: u64,
    /// Bytes of usable RAM that are not used: above [`RAM_LIMIT`], or in more pieces than [`RAM_RANGES`].
    pub left_out_bytes: u64,
}

/// Not enough memory to start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "no {need_bytes} bytes of memory below 4 GiB for {what}; give the machine more memory (64 MiB is enough to start)"
)]
pub struct PlanError {
    /// What it was for.
    pub what: &'static str,
    /// Bytes needed.
    pub need_bytes: u64,
}

/// Divides `usable` memory (sorted, disjoint) for an image that ends at `image_end` and `cores` cores, with a code arena
/// if machine code is to be published at run time.
///
/// # Errors
/// [`PlanError`] when tables, areas or the code arena find no place below 4 GiB.
pub fn plan(usable: &[Range], image_end: u64, cores: usize, code_arena: bool) -> Result<Plan, PlanError> {
    let mut ram: FixedList<Range, RAM_RANGES> = FixedList::new();
    let mut left_out_bytes = 0;
    for range in usable {
        let above = Range { start: range.start.max(image_end), end: range.end.min(RAM_LIMIT) };
        let above = above.aligned_inward(LARGE_PAGE_BYTES);
        if above.len_bytes() > 0 && !ram.push(above) {
            left_out_bytes += above.len_bytes();
        }
        left_out_bytes += range.end.saturating_sub(range.start.max(RAM_LIMIT));
    }
    let ram_end = ram.as_slice().last().map_or(0, |r| r.end);
    let total: u64 = ram.as_slice().iter().map(Range::len_bytes).sum();
    let mut take = |what, bytes: u64| {
        let need_bytes = bytes.next_multiple_of(LARGE_PAGE_BYTES);
        let place =
            ram.as_mut_slice().iter_mut().find(|r| r.len_bytes() >= need_bytes && r.start + need_bytes <= 1 << 32);
        let place = place.ok_or(PlanError { what, need_bytes })?;
        let start = place.start;
        place.start += need_bytes;
        Ok(Range { start, end: start + need_bytes })
    };
    let cores = cores.clamp(1, MAX_CPUS) as u64;
    let frames = ram_end.div_ceil(1 << 30) + SPARE_FRAMES + cores;
    let tables = take("page tables", frames * PAGE_BYTES)?;
    let areas = take("core stacks", (cores - 1) * AREA_BYTES)?;
    let code_bytes = if code_arena { (total / 16).clamp(LARGE_PAGE_BYTES, CODE_BYTES) } else { 0 };
    let code = take("the code arena", code_bytes)?;
    let mut left = FixedList::new();
    for range in ram.as_slice().iter().filter(|r| r.len_bytes() > 0) {
        let _ = left.push(*range);
    }
    Ok(Plan { tables, areas, code, ram: left, ram_end, left_out_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_on_both_sides_of_4_gib_is_used() {
        let usable = [
            Range { start: 0x1000, end: 0x9f000 },
            Range { start: MIB, end: 2048 * MIB - 0x21000 },
            Range { start: 4096 * MIB, end: 10240 * MIB },
        ];
        let plan = plan(&usable, 5 * MIB + 4096, 2, true).unwrap();
        assert_eq!(plan.tables, Range { start: 6 * MIB, end: 8 * MIB });
        assert_eq!(plan.areas, Range { start: 8 * MIB, end: 10 * MIB });
        assert_eq!(plan.code, Range { start: 10 * MIB, end: 42 * MIB });
        assert_eq!(
            plan.ram.as_slice(),
            [Range { start: 42 * MIB, end: 2046 * MIB }, Range { start: 4096 * MIB, end: 10240 * MIB }]
        );
        assert_eq!(plan.ram_end, 10240 * MIB);
    }

    #[test]
    fn too_little_memory_says_what_for() {
        let usable = [Range { start: MIB, end: 9 * MIB }];
        let error = plan(&usable, 6 * MIB + 1, 1, true).unwrap_err();
        assert_eq!(error, PlanError { what: "page tables", need_bytes: 2 * MIB });
        let error = plan(&usable, 5 * MIB, 3, true).unwrap_err();
        assert_eq!(error, PlanError { what: "core stacks", need_bytes: 2 * MIB });
        assert_eq!(plan(&usable, 5 * MIB, 1, false).unwrap().code.len_bytes(), 0);
        let error = plan(&usable, 5 * MIB, 1, true).unwrap_err();
        assert_eq!(error, PlanError { what: "the code arena", need_bytes: 2 * MIB });
    }

    proptest! {
        #[test]
        fn parts_never_overlap_and_stay_in_usable_memory(
            holes in prop::collection::vec((1u64..2000, 0u64..3000), 1..6), image in 2u64..20, cores in 1usize..64,
        ) {
            let mut at = 1;
            let mut usable = alloc::vec::Vec::new();
            for (len, gap) in holes {
                usable.push(Range { start: at * MIB, end: (at + len) * MIB });
                at += len + gap + 1;
            }
            if let Ok(plan) = plan(&usable, image * MIB, cores, true) {
                let mut parts = alloc::vec![plan.tables, plan.areas, plan.code];
                parts.extend(plan.ram.as_slice());
                parts.retain(|p| p.len_bytes() > 0);
                parts.sort_by_key(|p| p.start);
                for part in &parts {
                    prop_assert!(part.start >= image * MIB);
                    prop_assert!(usable.iter().any(|u| u.start <= part.start && part.end <= u.end));
                    prop_assert!(part.start.is_multiple_of(LARGE_PAGE_BYTES) && part.end.is_multiple_of(LARGE_PAGE_BYTES));
                }
                for pair in parts.windows(2) {
                    prop_assert!(pair[0].end <= pair[1].start);
                }
                prop_assert!(plan.areas.len_bytes() >= (cores as u64 - 1) * AREA_BYTES);
            }
        }
    }
}
