//! What the loader says: memory map, command line and the ACPI root pointer, from PVH or Multiboot2.
//!
//! Input: the two registers of the entry and physical memory. Output: [`StartInfo`], copied, so that nothing refers to
//! loader memory afterwards. Both formats describe memory with the E820 types (1 = usable).
//!
//! # Source
//! Xen `public/arch-x86/hvm/start_info.h` (version 1); Multiboot2 specification 2.0, section 3.6.

use super::fixed::FixedList;

/// Multiboot2's entry value of `eax`.
pub const MULTIBOOT2_MAGIC: u32 = 0x36d7_6289;
/// First word of `hvm_start_info`.
pub const PVH_MAGIC: u32 = 0x336e_c578;
/// Longest command line that is kept, in bytes.
pub const COMMAND_LINE_BYTES: usize = 4096;
/// Most entries of a memory map that are kept.
pub const MAP_ENTRIES: usize = 128;

/// Read access to physical memory.
pub trait Physical {
    /// `len` bytes at `address`, or `None` when they cannot be reached.
    fn bytes(&self, address: u64, len: usize) -> Option<&[u8]>;
}

/// Half-open range of physical addresses.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte after the range.
    pub end: u64,
}

impl Range {
    /// Bytes in the range.
    pub fn len_bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// The largest range inside this one whose ends are multiples of `align` (a power of two).
    pub fn aligned_inward(&self, align: u64) -> Range {
        let start = self.start.checked_next_multiple_of(align).unwrap_or(!(align - 1));
        Range { start, end: (self.end & !(align - 1)).max(start) }
    }
}

/// One entry of the loader's memory map.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct MapEntry {
    /// The addresses.
    pub range: Range,
    /// E820 type: 1 is usable memory, everything else is left alone.
    pub kind: u32,
}

/// Which protocol started the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loader {
    /// PVH: `qemu -kernel`, microVM monitors.
    Pvh,
    /// Multiboot2: GRUB.
    Multiboot2,
}

impl Loader {
    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Loader::Pvh => "PVH",
            Loader::Multiboot2 => "Multiboot2",
        }
    }
}

/// Everything the loader said that the kernel uses.
#[derive(Clone, Debug)]
pub struct StartInfo {
    /// Protocol.
    pub loader: Loader,
    /// The memory map as given.
    pub map: FixedList<MapEntry, MAP_ENTRIES>,
    /// The bytes of the command line.
    pub command_line: FixedList<u8, COMMAND_LINE_BYTES>,
    /// Physical address of the ACPI root pointer, when the loader gave one.
    pub rsdp: Option<u64>,
}

/// Start information that cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StartError {
    /// Neither protocol.
    #[error(
        "started by an unknown loader (eax {eax:#x}, first word at {address:#x} is {word:#x}); use qemu -kernel or GRUB's multiboot2"
    )]
    UnknownLoader {
        /// `eax` at entry.
        eax: u32,
        /// `ebx` at entry.
        address: u32,
        /// The word found there.
        word: u32,
    },
    /// A structure points outside memory that can be read.
    #[error("the loader's {what} at {address:#x} ({len_bytes} bytes) cannot be read")]
    Unreachable {
        /// Which structure.
        what: &'static str,
        /// Where it claims to be.
        address: u64,
        /// Its length.
        len_bytes: usize,
    },
    /// No memory map, or one without usable memory.
    #[error("the loader gave no usable memory map ({entries} entries); PVH needs start information version 1 or later")]
    NoMemoryMap {
        /// Entries seen.
        entries: usize,
    },
    /// The memory map has more entries than can be kept.
    #[error("the loader's memory map has more than {MAP_ENTRIES} entries")]
    MemoryMapTooLong,
    /// The command line is longer than can be kept.
    #[error("the command line has more than {COMMAND_LINE_BYTES} bytes; put long settings into BAREFLOW.CFG")]
    CommandLineTooLong,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn reach<'a>(
    memory: &'a dyn Physical,
    what: &'static str,
    address: u64,
    len_bytes: usize,
) -> Result<&'a [u8], StartError> {
    memory.bytes(address, len_bytes).ok_or(StartError::Unreachable { what, address, len_bytes })
}

/// Reads the start information that `eax` and `ebx` of the entry point to.
///
/// # Errors
/// [`StartError`].
pub fn read(memory: &dyn Physical, eax: u32, ebx: u32) -> Result<StartInfo, StartError> {
    let address = u64::from(ebx);
    let info = if eax == MULTIBOOT2_MAGIC {
        multiboot2(memory, address)?
    } else {
        let word = u32_at(reach(memory, "start information", address, 4)?, 0).unwrap_or(0);
        if word != PVH_MAGIC {
            return Err(StartError::UnknownLoader { eax, address: ebx, word });
        }
        pvh(memory, address)?
    };
    if info.map.as_slice().iter().any(|e| e.kind == 1) {
        Ok(info)
    } else {
        Err(StartError::NoMemoryMap { entries: info.map.as_slice().len() })
    }
}

fn map_entry(bytes: &[u8]) -> Option<MapEntry> {
    let (start, len, kind) = (u64_at(bytes, 0)?, u64_at(bytes, 8)?, u32_at(bytes, 16)?);
    Some(MapEntry { range: Range { start, end: start.saturating_add(len) }, kind })
}

/// Adds the entry in `bytes` to the map. One that is left out could forbid memory that another one allows.
fn add(info: &mut StartInfo, bytes: &[u8]) -> Result<(), StartError> {
    match map_entry(bytes) {
        Some(entry) if !info.map.push(entry) => Err(StartError::MemoryMapTooLong),
        _ => Ok(()),
    }
}

fn pvh(memory: &dyn Physical, address: u64) -> Result<StartInfo, StartError> {
    const WHAT: &str = "start information";
    let head = reach(memory, WHAT, address, 56)?;
    let short = StartError::Unreachable { what: WHAT, address, len_bytes: 56 };
    let version = u32_at(head, 4).ok_or(short)?;
    let command_line_at = u64_at(head, 24).ok_or(short)?;
    let rsdp = u64_at(head, 32).ok_or(short)?;
    let mut info = StartInfo {
        loader: Loader::Pvh,
        map: FixedList::new(),
        command_line: FixedList::new(),
        rsdp: (rsdp != 0).then_some(rsdp),
    };
    if version >= 1 {
        let map_at = u64_at(head, 40).ok_or(short)?;
        let entries = u32_at(head, 48).ok_or(short)? as usize;
        for index in 0..entries {
            let entry = reach(memory, "memory map", map_at.saturating_add(24 * index as u64), 24)?;
            add(&mut info, entry)?;
        }
    }
    if command_line_at != 0 {
        copy_command_line(&mut info, |at| memory.bytes(command_line_at + at as u64, 1).map(|b| b[0]))?;
    }
    Ok(info)
}

fn copy_command_line(info: &mut StartInfo, byte: impl Fn(usize) -> Option<u8>) -> Result<(), StartError> {
    for at in 0..=COMMAND_LINE_BYTES {
        match byte(at) {
            None | Some(0) => return Ok(()),
            Some(byte) if info.command_line.push(byte) => {}
            Some(_) => break,
        }
    }
    Err(StartError::CommandLineTooLong)
}

fn multiboot2(memory: &dyn Physical, address: u64) -> Result<StartInfo, StartError> {
    const WHAT: &str = "Multiboot2 information";
    let total = u32_at(reach(memory, WHAT, address, 8)?, 0).unwrap_or(0) as usize;
    let bytes = reach(memory, WHAT, address, total)?;
    let mut info =
        StartInfo { loader: Loader::Multiboot2, map: FixedList::new(), command_line: FixedList::new(), rsdp: None };
    let mut at = 8;
    while let (Some(kind), Some(size)) = (u32_at(bytes, at), u32_at(bytes, at.saturating_add(4))) {
        let size = size as usize;
        if kind == 0 || size < 8 {
            break;
        }
        let Some(tag) = at.checked_add(size).and_then(|end| bytes.get(at..end)) else { break };
        match kind {
            1 => copy_command_line(&mut info, |i| tag.get(8 + i).copied())?,
            6 => {
                let stride = u32_at(tag, 8).unwrap_or(0) as usize;
                if stride >= 20 {
                    for entry in tag.get(16..).unwrap_or(&[]).chunks_exact(stride) {
                        add(&mut info, entry)?;
                    }
                }
            }
            // A copy of the root pointer inside the tag; the newer one (15) wins.
            14 | 15 if info.rsdp.is_none() || kind == 15 => info.rsdp = Some(address + at as u64 + 8),
            _ => {}
        }
        at = at.saturating_add(size.next_multiple_of(8));
    }
    Ok(info)
}

/// The usable memory of `map`: sorted, disjoint, merged, whole 4 KiB pages, everything that any entry calls unusable
/// taken out. Entries of a map may overlap; the stricter one wins.
pub fn usable(map: &[MapEntry]) -> FixedList<Range, MAP_ENTRIES> {
    let mut out: FixedList<Range, MAP_ENTRIES> = FixedList::new();
    // Sweep over the usable entries in address order; each pass finds the next piece at or after `from`.
    let mut from = 0u64;
    loop {
        let next = map
            .iter()
            .filter(|e| e.kind == 1 && e.range.end > from && e.range.len_bytes() > 0)
            .map(|e| e.range.start.max(from))
            .min();
        let Some(mut start) = next else { break };
        // Step over unusable entries that cover `start`.
        while let Some(e) = map.iter().find(|e| e.kind != 1 && e.range.start <= start && start < e.range.end) {
            start = e.range.end;
        }
        let end = map
            .iter()
            .filter(|e| e.kind == 1 && e.range.start <= start && start < e.range.end)
            .map(|e| e.range.end)
            .max();
        let Some(end) = end else {
            if start <= from {
                break;
            }
            from = start;
            continue;
        };
        let hole = map.iter().filter(|e| e.kind != 1 && e.range.len_bytes() > 0 && e.range.start > start);
        let end = hole.map(|e| e.range.start).min().map_or(end, |hole| hole.min(end));
        match out.as_mut_slice().last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => {
                if !out.push(Range { start, end }) {
                    break;
                }
            }
        }
        from = end;
    }
    let mut pages = FixedList::new();
    for range in out.as_slice() {
        let range = range.aligned_inward(4096);
        if range.len_bytes() > 0 {
            let _ = pages.push(range);
        }
    }
    pages
}

/// The first `bytes` bytes of `ranges`.
pub fn limited(ranges: &FixedList<Range, MAP_ENTRIES>, bytes: u64) -> FixedList<Range, MAP_ENTRIES> {
    let mut out = FixedList::new();
    let mut left = bytes;
    for range in ranges.as_slice() {
        let take = range.len_bytes().min(left);
        left -= take;
        if take > 0 {
            let _ = out.push(Range { start: range.start, end: range.start + take });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    struct Memory(Vec<u8>);

    impl Physical for Memory {
        fn bytes(&self, address: u64, len: usize) -> Option<&[u8]> {
            let start = usize::try_from(address).ok()?;
            self.0.get(start..start.checked_add(len)?)
        }
    }

    fn entry(start: u64, end: u64, kind: u32) -> MapEntry {
        MapEntry { range: Range { start, end }, kind }
    }

    fn put(memory: &mut [u8], at: usize, bytes: &[u8]) {
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn pvh_memory(command_line: &[u8]) -> Memory {
        let mut m = alloc::vec![0u8; 0x6000];
        put(&mut m, 0x100, &PVH_MAGIC.to_le_bytes());
        put(&mut m, 0x104, &1u32.to_le_bytes());
        put(&mut m, 0x118, &0x1000u64.to_le_bytes());
        put(&mut m, 0x120, &0xf_1234u64.to_le_bytes());
        put(&mut m, 0x128, &0x200u64.to_le_bytes());
        put(&mut m, 0x130, &2u32.to_le_bytes());
        for (i, (start, len, kind)) in [(0u64, 0x9_fc00u64, 1u32), (0xf_0000, 0x1_0000, 2)].into_iter().enumerate() {
            put(&mut m, 0x200 + 24 * i, &start.to_le_bytes());
            put(&mut m, 0x208 + 24 * i, &len.to_le_bytes());
            put(&mut m, 0x210 + 24 * i, &kind.to_le_bytes());
        }
        put(&mut m, 0x1000, command_line);
        Memory(m)
    }

    #[test]
    fn pvh_is_read() {
        let info = read(&pvh_memory(b"mode=smoke\0rest"), 0, 0x100).unwrap();
        assert_eq!(info.loader, Loader::Pvh);
        assert_eq!(info.command_line.as_slice(), b"mode=smoke");
        assert_eq!(info.rsdp, Some(0xf_1234));
        assert_eq!(info.map.as_slice(), [entry(0, 0x9_fc00, 1), entry(0xf_0000, 0x10_0000, 2)]);
    }

    #[test]
    fn a_too_long_command_line_is_an_error() {
        let long = [b'x'; COMMAND_LINE_BYTES];
        assert_eq!(read(&pvh_memory(&long), 0, 0x100).unwrap().command_line.as_slice().len(), COMMAND_LINE_BYTES);
        let long = [b'x'; COMMAND_LINE_BYTES + 1];
        assert_eq!(read(&pvh_memory(&long), 0, 0x100).unwrap_err(), StartError::CommandLineTooLong);
    }

    #[test]
    fn a_memory_map_is_kept_whole_or_refused() {
        let map = |entries: usize| {
            let mut memory = pvh_memory(b"");
            let at = memory.0.len();
            for i in 0..entries as u64 {
                memory.0.extend([i << 12, 0x1000].map(u64::to_le_bytes).concat());
                memory.0.extend(1u64.to_le_bytes());
            }
            memory.0[0x100 + 40..0x100 + 48].copy_from_slice(&(at as u64).to_le_bytes());
            memory.0[0x100 + 48..0x100 + 52].copy_from_slice(&(entries as u32).to_le_bytes());
            read(&memory, 0, 0x100)
        };
        assert_eq!(map(MAP_ENTRIES).unwrap().map.as_slice().len(), MAP_ENTRIES);
        assert_eq!(map(MAP_ENTRIES + 1).unwrap_err(), StartError::MemoryMapTooLong);
    }

    #[test]
    fn foreign_loaders_are_named() {
        let memory = Memory(alloc::vec![7; 64]);
        assert_eq!(
            read(&memory, 5, 8).unwrap_err(),
            StartError::UnknownLoader { eax: 5, address: 8, word: 0x0707_0707 }
        );
        assert_eq!(
            read(&memory, 5, 62).unwrap_err(),
            StartError::Unreachable { what: "start information", address: 62, len_bytes: 4 }
        );
    }

    fn tag(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
        out.extend(kind.to_le_bytes());
        out.extend((8 + body.len() as u32).to_le_bytes());
        out.extend(body);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    fn multiboot2_memory() -> Memory {
        let mut tags = Vec::new();
        tag(&mut tags, 1, b"prompt=\"a b\"\0");
        let mut map = Vec::new();
        map.extend(24u32.to_le_bytes());
        map.extend(0u32.to_le_bytes());
        for (start, len, kind) in [(0x10_0000u64, 0x100_0000u64, 1u32), (0xfd00_0000, 0x1000, 2)] {
            map.extend(start.to_le_bytes());
            map.extend(len.to_le_bytes());
            map.extend(kind.to_le_bytes());
            map.extend(0u32.to_le_bytes());
        }
        tag(&mut tags, 6, &map);
        tag(&mut tags, 14, b"RSD PTR old");
        tag(&mut tags, 15, b"RSD PTR new");
        tag(&mut tags, 0, b"");
        let mut m = alloc::vec![0u8; 64];
        m.extend((tags.len() as u32 + 8).to_le_bytes());
        m.extend(0u32.to_le_bytes());
        m.extend(tags);
        Memory(m)
    }

    #[test]
    fn multiboot2_is_read() {
        let memory = multiboot2_memory();
        let info = read(&memory, MULTIBOOT2_MAGIC, 64).unwrap();
        assert_eq!(info.command_line.as_slice(), b"prompt=\"a b\"");
        assert_eq!(info.map.as_slice(), [entry(0x10_0000, 0x110_0000, 1), entry(0xfd00_0000, 0xfd00_1000, 2)]);
        assert_eq!(memory.bytes(info.rsdp.unwrap(), 11), Some(&b"RSD PTR new"[..]));
    }

    proptest! {
        #[test]
        fn damaged_start_information_never_panics(at in 0usize..400, byte: u8, magic in prop_oneof![Just(0u32), Just(MULTIBOOT2_MAGIC)]) {
            let mut memory = if magic == 0 { pvh_memory(b"x") } else { multiboot2_memory() };
            let base = if magic == 0 { 0x100 } else { 64 };
            let at = (base + at) % memory.0.len();
            memory.0[at] = byte;
            let _ = read(&memory, magic, base as u32);
        }

        #[test]
        fn usable_memory_is_exactly_what_no_entry_forbids(entries in prop::collection::vec((0u64..64, 0u64..16, 1u32..3), 0..12)) {
            let map: Vec<_> = entries.iter().map(|&(s, l, k)| entry(s * 4096, (s + l) * 4096, k)).collect();
            let usable = usable(&map);
            for pair in usable.as_slice().windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "sorted, disjoint and merged");
            }
            for page in 0u64..96 {
                let inside = |e: &MapEntry| e.range.start <= page * 4096 && page * 4096 < e.range.end;
                let want = map.iter().any(|e| e.kind == 1 && inside(e)) && !map.iter().any(|e| e.kind != 1 && inside(e));
                let got = usable.as_slice().iter().any(|r| r.start <= page * 4096 && page * 4096 < r.end);
                prop_assert_eq!(got, want, "page {}", page);
            }
        }
    }

    #[test]
    fn memory_can_be_limited() {
        let mut ranges = FixedList::new();
        for (start, end) in [(0x1000, 0x3000), (0x8000, 0xa000)] {
            assert!(ranges.push(Range { start, end }));
        }
        assert_eq!(
            limited(&ranges, 0x3000).as_slice(),
            [Range { start: 0x1000, end: 0x3000 }, Range { start: 0x8000, end: 0x9000 }]
        );
        assert_eq!(limited(&ranges, 0x2000).as_slice(), [Range { start: 0x1000, end: 0x3000 }]);
    }

    #[test]
    fn partial_pages_are_dropped() {
        let usable = usable(&[entry(1, 0x9_fc00, 1), entry(0x9_fc00, 0xa_0000, 2)]);
        assert_eq!(usable.as_slice(), [Range { start: 0x1000, end: 0x9_f000 }]);
    }
}
