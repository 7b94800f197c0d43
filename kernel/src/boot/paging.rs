//! The final page tables, as a value: built here in plain memory, installed by `gate_seal`, never written again
//! (except by `gate_freeze`, which only takes write permission away).
//!
//! Input: ranges with permissions. Output: frames whose first one is the PML4. 4 KiB and 2 MiB pages; 1 GiB pages are not
//! used, because `gate_freeze` works on 2 MiB pages and because hosts that shadow page tables split larger ones anyway.
//!
//! # Source
//! Intel SDM volume 3A, section 4.5 (4-level paging).

use x86_64::structures::paging::PageTableFlags;

/// Bytes of a small page.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes of a large page.
pub const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// First virtual address the builder refuses: one PML4 entry each for RAM and for the executable alias.
pub const LIMIT: u64 = 2 << 39;

const PRESENT: u64 = PageTableFlags::PRESENT.bits();
const WRITE: u64 = PageTableFlags::WRITABLE.bits();
const USER: u64 = PageTableFlags::USER_ACCESSIBLE.bits();
const WRITE_THROUGH: u64 = PageTableFlags::WRITE_THROUGH.bits();
const CACHE_DISABLE: u64 = PageTableFlags::NO_CACHE.bits();
const LARGE: u64 = PageTableFlags::HUGE_PAGE.bits();
const NO_EXECUTE: u64 = PageTableFlags::NO_EXECUTE.bits();
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// One page of page-table entries.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Frame(pub [u64; 512]);

/// What a mapping allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// Ring 3 may use it.
    pub user: bool,
    /// It may be written.
    pub write: bool,
    /// It may be executed.
    pub execute: bool,
    /// Device memory: not cached.
    pub device: bool,
}

impl Access {
    /// Ring 3, read-only data.
    pub const READ: Access = Access { user: true, write: false, execute: false, device: false };
    /// Ring 3, data.
    pub const READ_WRITE: Access = Access { user: true, write: true, execute: false, device: false };
    /// Ring 3, code.
    pub const READ_EXECUTE: Access = Access { user: true, write: false, execute: true, device: false };
    /// Ring 3, device registers.
    pub const DEVICE: Access = Access { user: true, write: true, execute: false, device: true };
    /// Ring 0, data.
    pub const SUPERVISOR: Access = Access { user: false, write: true, execute: false, device: false };
    /// Ring 0, code.
    pub const SUPERVISOR_EXECUTE: Access = Access { user: false, write: false, execute: true, device: false };
}

/// A mapping as the tables hold it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Physical address of the first byte of the page.
    pub physical: u64,
    /// 4 KiB or 2 MiB.
    pub page_bytes: u64,
    /// What it allows.
    pub access: Access,
}

/// A range that cannot be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// All frames are in use.
    #[error("page tables need more than {frames} frames")]
    OutOfFrames {
        /// Frames the builder was given.
        frames: usize,
    },
    /// Something is mapped there already.
    #[error("{address:#x} is mapped twice")]
    Mapped {
        /// The address.
        address: u64,
    },
    /// Not whole pages, or beyond [`LIMIT`].
    #[error("{start:#x}..{end:#x} cannot be mapped: not whole pages or beyond {LIMIT:#x}")]
    BadRange {
        /// First virtual address.
        start: u64,
        /// End.
        end: u64,
    },
}

/// Page tables under construction.
pub struct Builder<'a> {
    frames: &'a mut [Frame],
    base: u64,
    used: usize,
    no_execute: bool,
}

impl<'a> Builder<'a> {
    /// Starts tables in `frames`, which lie at physical address `base`. The page directories of `0..ram_end` are taken
    /// at once and contiguously, so that 2 MiB page `n` is entry `n` of [`Builder::ram_directory`].
    /// `no_execute` is whether the CPU has the NX bit; without it everything readable can be executed.
    ///
    /// # Errors
    /// [`MapError::OutOfFrames`]; [`MapError::BadRange`] when `ram_end` exceeds 512 GiB.
    pub fn new(frames: &'a mut [Frame], base: u64, ram_end: u64, no_execute: bool) -> Result<Self, MapError> {
        if ram_end > 1 << 39 {
            return Err(MapError::BadRange { start: 0, end: ram_end });
        }
        let mut tables = Self { frames, base, used: 0, no_execute };
        let pml4 = tables.take()?;
        let pointers = tables.take()?;
        tables.link(pml4, 0, pointers);
        for gib in 0..ram_end.div_ceil(1 << 30) as usize {
            let directory = tables.take()?;
            tables.link(pointers, gib, directory);
        }
        Ok(tables)
    }

    /// Physical address of the PML4.
    pub fn root(&self) -> u64 {
        self.base
    }

    /// Physical address of the page directory of address 0, which those of all RAM follow.
    pub fn ram_directory(&self) -> u64 {
        self.base + 2 * PAGE_BYTES
    }

    /// Frames in use.
    pub fn frames_used(&self) -> usize {
        self.used
    }

    fn take(&mut self) -> Result<usize, MapError> {
        let index = self.used;
        let frames = self.frames.len();
        self.frames.get_mut(index).ok_or(MapError::OutOfFrames { frames })?.0.fill(0);
        self.used += 1;
        Ok(index)
    }

    /// Makes entry `slot` of table `parent` point to table `child`; permissions are decided at the leaves.
    fn link(&mut self, parent: usize, slot: usize, child: usize) {
        self.frames[parent].0[slot] = (self.base + child as u64 * PAGE_BYTES) | PRESENT | WRITE | USER;
    }

    /// The table below entry `slot` of table `parent`, made when missing. `None` when a large page is there.
    fn below(&mut self, parent: usize, slot: usize) -> Result<Option<usize>, MapError> {
        let entry = self.frames[parent].0[slot];
        if entry & PRESENT == 0 {
            let child = self.take()?;
            self.link(parent, slot, child);
            return Ok(Some(child));
        }
        Ok((entry & LARGE == 0).then(|| ((entry & ADDRESS) - self.base) as usize / PAGE_BYTES as usize))
    }

    fn leaf(&self, physical: u64, access: Access) -> u64 {
        let mut entry = physical | PRESENT;
        if access.user {
            entry |= USER;
        }
        if access.write {
            entry |= WRITE;
        }
        if access.device {
            entry |= WRITE_THROUGH | CACHE_DISABLE;
        }
        if self.no_execute && !access.execute {
            entry |= NO_EXECUTE;
        }
        entry
    }

    /// Maps `len` bytes at `virt` to `physical`, with large pages wherever both addresses allow.
    ///
    /// # Errors
    /// [`MapError`]; part of the range may then be mapped.
    pub fn map(&mut self, virt: u64, physical: u64, len: u64, access: Access) -> Result<(), MapError> {
        let end = virt.checked_add(len).filter(|&end| end <= LIMIT);
        let bad = MapError::BadRange { start: virt, end: virt.saturating_add(len) };
        let Some(end) = end else { return Err(bad) };
        if !(virt | physical | len).is_multiple_of(PAGE_BYTES) || physical & !ADDRESS != 0 {
            return Err(bad);
        }
        let (mut virt, mut physical) = (virt, physical);
        while virt < end {
            let large = (virt | physical).is_multiple_of(LARGE_PAGE_BYTES) && end - virt >= LARGE_PAGE_BYTES;
            self.map_page(virt, physical, large, access)?;
            let step = if large { LARGE_PAGE_BYTES } else { PAGE_BYTES };
            virt += step;
            physical += step;
        }
        Ok(())
    }

    fn map_page(&mut self, virt: u64, physical: u64, large: bool, access: Access) -> Result<(), MapError> {
        const ERROR: fn(u64) -> MapError = |address| MapError::Mapped { address };
        let slot = |shift: u32| (virt >> shift) as usize & 511;
        let pointers = self.below(0, slot(39))?.ok_or(ERROR(virt))?;
        let directory = self.below(pointers, slot(30))?.ok_or(ERROR(virt))?;
        let (table, index, extra) = if large {
            (directory, slot(21), LARGE)
        } else {
            (self.below(directory, slot(21))?.ok_or(ERROR(virt))?, slot(12), 0)
        };
        let entry = self.leaf(physical, access) | extra;
        let place = &mut self.frames[table].0[index];
        if *place & PRESENT != 0 {
            return Err(ERROR(virt));
        }
        *place = entry;
        Ok(())
    }

    /// What `virt` is mapped to, as the CPU would walk it.
    pub fn lookup(&self, virt: u64) -> Option<Mapping> {
        if virt >= LIMIT {
            return None;
        }
        let mut table = 0;
        for shift in [39u32, 30, 21, 12] {
            let entry = self.frames[table].0[(virt >> shift) as usize & 511];
            if entry & PRESENT == 0 {
                return None;
            }
            if shift == 12 || entry & LARGE != 0 {
                let access = Access {
                    user: entry & USER != 0,
                    write: entry & WRITE != 0,
                    execute: entry & NO_EXECUTE == 0,
                    device: entry & CACHE_DISABLE != 0,
                };
                return Some(Mapping { physical: entry & ADDRESS, page_bytes: 1 << shift, access });
            }
            table = ((entry & ADDRESS) - self.base) as usize / PAGE_BYTES as usize;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    const BASE: u64 = 0x40_0000;

    fn frames(n: usize) -> Vec<Frame> {
        vec![Frame([!0; 512]); n]
    }

    #[test]
    fn large_pages_are_used_where_alignment_allows() {
        let mut memory = frames(16);
        let mut tables = Builder::new(&mut memory, BASE, 1 << 30, true).unwrap();
        tables.map(0x1f_f000, 0x1f_f000, 0x40_2000, Access::READ_WRITE).unwrap();
        let at = |tables: &Builder, virt| tables.lookup(virt).unwrap();
        assert_eq!(at(&tables, 0x1f_f123).page_bytes, PAGE_BYTES);
        assert_eq!(at(&tables, 0x20_0000).page_bytes, LARGE_PAGE_BYTES);
        assert_eq!(at(&tables, 0x5f_ffff).page_bytes, LARGE_PAGE_BYTES);
        assert_eq!(at(&tables, 0x60_0000).page_bytes, PAGE_BYTES);
        assert_eq!(tables.lookup(0x60_1000), None);
        assert_eq!(tables.lookup(0), None);
    }

    #[test]
    fn ram_directories_are_contiguous() {
        let mut memory = frames(16);
        let mut tables = Builder::new(&mut memory, BASE, 6 << 30, true).unwrap();
        tables.map(5 << 30, 5 << 30, LARGE_PAGE_BYTES, Access::READ).unwrap();
        let page = (5u64 << 30) / LARGE_PAGE_BYTES;
        let address = tables.ram_directory() + 8 * page;
        let entry = memory[((address - BASE) / PAGE_BYTES) as usize].0[(address % PAGE_BYTES) as usize / 8];
        assert_eq!(entry, (5 << 30) | PRESENT | USER | LARGE | NO_EXECUTE);
    }

    #[test]
    fn the_same_address_is_not_mapped_twice() {
        let mut memory = frames(16);
        let mut tables = Builder::new(&mut memory, BASE, 1 << 30, true).unwrap();
        tables.map(0x20_0000, 0x20_0000, LARGE_PAGE_BYTES, Access::READ).unwrap();
        let twice = MapError::Mapped { address: 0x20_1000 };
        assert_eq!(tables.map(0x20_1000, 0, PAGE_BYTES, Access::READ), Err(twice));
        tables.map(0x40_1000, 0, PAGE_BYTES, Access::READ).unwrap();
        let twice = MapError::Mapped { address: 0x40_0000 };
        assert_eq!(tables.map(0x40_0000, 0, LARGE_PAGE_BYTES, Access::READ), Err(twice));
    }

    #[test]
    fn limits_are_errors() {
        let mut memory = frames(3);
        assert_eq!(Builder::new(&mut memory, BASE, 2 << 30, true).err(), Some(MapError::OutOfFrames { frames: 3 }));
        assert!(matches!(Builder::new(&mut memory, BASE, 1 << 40, true).err(), Some(MapError::BadRange { .. })));
        let mut tables = Builder::new(&mut memory, BASE, 1 << 30, true).unwrap();
        assert_eq!(tables.map(0, 0, PAGE_BYTES, Access::READ), Err(MapError::OutOfFrames { frames: 3 }));
        for (virt, len) in [(1, PAGE_BYTES), (0, 1), (LIMIT, PAGE_BYTES), (u64::MAX - 4095, PAGE_BYTES)] {
            assert!(matches!(tables.map(virt, 0, len, Access::READ), Err(MapError::BadRange { .. })), "{virt:#x}");
        }
    }

    proptest! {
        #[test]
        fn lookup_finds_exactly_what_was_mapped(
            start in 0u64..2000, pages in 1u64..1500, offset in 0u64..4, bits in 0u8..16,
        ) {
            let access = Access { user: bits & 1 != 0, write: bits & 2 != 0, execute: bits & 4 != 0, device: bits & 8 != 0 };
            let (virt, physical) = (start * PAGE_BYTES, (start + offset * 512) * PAGE_BYTES);
            let mut memory = frames(16);
            let mut tables = Builder::new(&mut memory, BASE, 1 << 30, true).unwrap();
            tables.map(virt, physical, pages * PAGE_BYTES, access).unwrap();
            for page in start.saturating_sub(2)..start + pages + 2 {
                let got = tables.lookup(page * PAGE_BYTES);
                if page < start || page >= start + pages {
                    prop_assert_eq!(got, None);
                } else {
                    let got = got.unwrap();
                    prop_assert_eq!(got.access, access);
                    let inside = page * PAGE_BYTES % got.page_bytes;
                    prop_assert_eq!(got.physical + inside, (page + offset * 512) * PAGE_BYTES);
                }
            }
        }
    }
}
