//! PCI configuration through ports 0xcf8 and 0xcfc: where the virtio-blk disks are and which pages their registers need.
//!
//! Firmware usually gives BARs their addresses. Minimal firmware (qboot, microVM monitors) does not; then it is done
//! here, out of the part of the 32-bit address space that the memory map leaves free.

use super::port;
use crate::boot::fixed::FixedList;
use crate::boot::info::{MapEntry, Range};
use crate::boot::paging::PAGE_BYTES;
use core::cmp::Reverse;
use virtio_drivers::transport::pci::bus::{BarInfo, ConfigurationAccess, DeviceFunction, MemoryBarType, PciRoot};

/// Most disks that are used.
pub const MAX_DISKS: usize = 8;
/// Most memory BARs of a device.
const BARS: usize = 6;
/// Bits of a memory BAR that are no address.
const BAR_FLAGS: u32 = 0xf;
/// Largest BAR that is mapped; virtio registers need a few pages.
const BAR_BYTES: u64 = 16 << 20;

/// Offset of the command and status registers.
const COMMAND: u8 = 0x04;
/// Command bits with which a function decodes I/O and memory addresses.
const DECODE: u32 = 1 | 2;
/// Command bits of a working disk: decodes memory addresses, does DMA.
const WORKING: u32 = 2 | 4;
/// Offset of the first BAR.
const BAR_0: u8 = 0x10;

/// Vendor and device of virtio-blk (virtio 1.2, section 4.1.2.1).
const VIRTIO_BLOCK: u32 = 0x1042_1af4;
/// The same device with the legacy interface besides the modern one.
const VIRTIO_BLOCK_TRANSITIONAL: u32 = 0x1001_1af4;

/// Configuration mechanism 1.
pub struct ConfigPorts;

fn address(function: DeviceFunction, register: u8) -> u32 {
    0x8000_0000
        | u32::from(function.bus) << 16
        | u32::from(function.device) << 11
        | u32::from(function.function) << 8
        | u32::from(register & 0xfc)
}

impl ConfigurationAccess for ConfigPorts {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        // SAFETY: selects and reads a configuration register; one core uses PCI.
        unsafe {
            port::write_u32(0xcf8, address(function, register));
            port::read_u32(0xcfc)
        }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, value: u32) {
        // SAFETY: the virtio driver writes command bits, BAR probes and capability selectors of devices it owns.
        unsafe {
            port::write_u32(0xcf8, address(function, register));
            port::write_u32(0xcfc, value);
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        ConfigPorts
    }
}

/// A virtio-blk function and the pages of its registers.
#[derive(Clone, Copy, Default)]
pub struct Disk {
    /// Where it is.
    pub function: Place,
    /// Memory BARs.
    pub bars: FixedList<Range, BARS>,
    /// BAR registers by index.
    registers: [BarRegister; BARS],
}

/// A BAR register of a placed device: what it reads as, and what it reads as after all ones were written to it.
#[derive(Clone, Copy, Default)]
struct BarRegister {
    value: u32,
    sizing: u32,
}

/// Configuration access to a disk whose BARs are sized and placed. Drivers size BARs again by moving them; under a
/// hypervisor each move rebuilds its map of memory and takes milliseconds. Here the answers are known and nothing moves.
pub struct PlacedDisk<C> {
    access: C,
    registers: [BarRegister; BARS],
    /// BARs that all ones were written to last, a bit each.
    sizing: u8,
}

impl PlacedDisk<ConfigPorts> {
    /// Access to `disk`, the only function that may be asked for.
    pub fn new(disk: &Disk) -> Self {
        PlacedDisk { access: ConfigPorts, registers: disk.registers, sizing: 0 }
    }
}

impl<C> PlacedDisk<C> {
    fn bar_index(register: u8) -> Option<usize> {
        (BAR_0..BAR_0 + 4 * BARS as u8).contains(&register).then(|| usize::from(register - BAR_0) / 4)
    }
}

impl<C: ConfigurationAccess> ConfigurationAccess for PlacedDisk<C> {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        match Self::bar_index(register) {
            Some(bar) if self.sizing >> bar & 1 == 1 => self.registers[bar].sizing,
            Some(bar) => self.registers[bar].value,
            // As if decoding were off: then nobody switches it off to size a BAR, and on again.
            None if register == COMMAND => self.access.read_word(function, register) & !DECODE,
            None => self.access.read_word(function, register),
        }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, value: u32) {
        match Self::bar_index(register) {
            Some(bar) => self.sizing = self.sizing & !(1 << bar) | u8::from(value == u32::MAX) << bar,
            None if register == COMMAND => self.access.write_word(function, register, value | WORKING),
            None => self.access.write_word(function, register, value),
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        // SAFETY: the caller's promise is the one asked for.
        PlacedDisk { access: unsafe { self.access.unsafe_clone() }, ..*self }
    }
}

/// Bus, device, function.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Place {
    /// Bus.
    pub bus: u8,
    /// Device.
    pub device: u8,
    /// Function.
    pub function: u8,
}

impl From<Place> for DeviceFunction {
    fn from(place: Place) -> Self {
        DeviceFunction { bus: place.bus, device: place.device, function: place.function }
    }
}

impl core::fmt::Display for Place {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// Where BARs go that the firmware left without an address: below the I/O APIC.
const WINDOW: Range = Range { start: 0xe000_0000, end: 0xfec0_0000 };

/// Free addresses for BARs, from the bottom of [`WINDOW`] up.
struct Window<'a> {
    next: u64,
    map: &'a [MapEntry],
}

impl Window<'_> {
    /// An aligned range of `len` bytes (a power of two) that no entry of the memory map touches.
    fn take(&mut self, len: u64) -> Option<u64> {
        let mut start = self.next.next_multiple_of(len);
        while let Some(taken) = self.map.iter().find(|e| e.range.start < start + len && start < e.range.end) {
            start = taken.range.end.checked_next_multiple_of(len)?;
        }
        self.next = start.checked_add(len).filter(|&end| end <= WINDOW.end)?;
        Some(start)
    }
}

/// The disk at `place`, its memory BARs given addresses where the firmware did not, decoding memory and doing DMA.
fn start_disk(place: Place, window: &mut Window<'_>) -> Disk {
    let function = place.into();
    let mut disk = Disk { function: place, ..Disk::default() };
    // Not decoding, BARs can be sized and moved at no cost.
    ConfigPorts.write_word(function, COMMAND, 0);
    let mut root = PciRoot::new(ConfigPorts);
    for (index, bar) in (0u8..).zip(root.bars(function).into_iter().flatten()) {
        let Some(BarInfo::Memory { address_type, address, size, .. }) = bar else { continue };
        if !(1..=BAR_BYTES).contains(&size) {
            continue;
        }
        // The mapping works in pages, so a small BAR gets a page of its own.
        let start = if address != 0 { Some(address) } else { window.take(size.max(PAGE_BYTES)) };
        let Some(start) = start else { continue };
        let wide = address_type == MemoryBarType::Width64;
        if address == 0 {
            match wide {
                true => root.set_bar_64(function, index, start),
                false => root.set_bar_32(function, index, start as u32),
            }
        }
        let _ = disk.bars.push(Range { start, end: start + size });
        let mask = !(size - 1);
        let value = ConfigPorts.read_word(function, BAR_0 + 4 * index);
        disk.registers[usize::from(index)] = BarRegister { value, sizing: mask as u32 | value & BAR_FLAGS };
        if wide {
            disk.registers[usize::from(index) + 1] =
                BarRegister { value: (start >> 32) as u32, sizing: (mask >> 32) as u32 };
        }
    }
    ConfigPorts.write_word(function, COMMAND, WORKING);
    disk
}

/// The part of a configuration header that says what a function is.
struct Header {
    identity: u32,
    kind: u8,
}

impl Header {
    /// `None` when there is no such function.
    fn read(place: Place) -> Option<Header> {
        let identity = ConfigPorts.read_word(place.into(), 0);
        (identity & 0xffff != 0xffff)
            .then(|| Header { identity, kind: (ConfigPorts.read_word(place.into(), 0x0c) >> 16) as u8 })
    }

    fn multifunction(&self) -> bool {
        self.kind & 0x80 != 0
    }

    /// The secondary bus of a PCI-to-PCI bridge.
    fn bus_behind(&self, place: Place) -> Option<u8> {
        (self.kind & 0x7f == 1).then(|| (ConfigPorts.read_word(place.into(), 0x18) >> 8) as u8)
    }

    fn is_virtio_block(&self) -> bool {
        self.identity == VIRTIO_BLOCK || self.identity == VIRTIO_BLOCK_TRANSITIONAL
    }
}

/// Finds the virtio-blk disks on bus 0 and on the buses behind its bridges, and lets them decode memory and do DMA.
pub fn find_disks(map: &[MapEntry]) -> FixedList<Disk, MAX_DISKS> {
    let mut window = Window { next: WINDOW.start, map };
    let mut disks = FixedList::new();
    let mut buses: FixedList<u8, 256> = FixedList::new();
    let _ = buses.push(0);
    let mut next = 0;
    while let Some(&bus) = buses.as_slice().get(next) {
        next += 1;
        for device in 0..32 {
            for function in 0..8 {
                let place = Place { bus, device, function };
                let Some(header) = Header::read(place) else {
                    // Each configuration access is an exit under a hypervisor: no function 0, no device.
                    if function == 0 {
                        break;
                    }
                    continue;
                };
                if let Some(behind) = header.bus_behind(place) {
                    // A bridge that leads back is not followed.
                    if behind != 0 && !buses.as_slice().contains(&behind) {
                        let _ = buses.push(behind);
                    }
                } else if header.is_virtio_block() {
                    let _ = disks.push(start_disk(place, &mut window));
                }
                if function == 0 && !header.multifunction() {
                    break;
                }
            }
        }
    }
    disks
}

/// The pages that hold the registers of `disks`: sorted, disjoint.
pub fn register_pages(disks: &[Disk]) -> FixedList<Range, { MAX_DISKS * BARS }> {
    let bars = disks
        .iter()
        .flat_map(|d| d.bars.as_slice())
        .map(|bar| Range { start: bar.start & !(PAGE_BYTES - 1), end: bar.end.next_multiple_of(PAGE_BYTES) });
    let mut pages: FixedList<Range, { MAX_DISKS * BARS }> = FixedList::new();
    // They are few: looking for the next one is less code than sorting them.
    let mut behind = 0;
    while let Some(bar) = bars.clone().filter(|bar| bar.start >= behind).min_by_key(|bar| (bar.start, Reverse(bar.end)))
    {
        behind = bar.start + 1;
        match pages.as_mut_slice().last_mut() {
            Some(last) if bar.start <= last.end => last.end = last.end.max(bar.end),
            _ => {
                let _ = pages.push(bar);
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;
    use virtio_drivers::transport::pci::bus::PciError;

    /// A function whose registers are words; writes are counted.
    struct Registers<'a> {
        words: [u32; 16],
        writes: &'a Cell<u32>,
    }

    impl ConfigurationAccess for Registers<'_> {
        fn read_word(&self, _function: DeviceFunction, register: u8) -> u32 {
            self.words[usize::from(register) / 4]
        }

        fn write_word(&mut self, _function: DeviceFunction, register: u8, value: u32) {
            self.words[usize::from(register) / 4] = value;
            self.writes.set(self.writes.get() + 1);
        }

        unsafe fn unsafe_clone(&self) -> Self {
            Registers { ..*self }
        }
    }

    #[test]
    fn a_driver_sizes_the_bars_of_a_placed_disk_without_moving_them() {
        let writes = Cell::new(0);
        let mut words = [0; 16];
        words[1] = WORKING;
        let register = |value, sizing| BarRegister { value, sizing };
        let registers = [
            register(0xc001, 0),
            register(0xfebd_1000, 0xffff_f000),
            BarRegister::default(),
            BarRegister::default(),
            register(0xe000_000c, 0xffff_c00c),
            register(1, 0xffff_ffff),
        ];
        let access = Registers { words, writes: &writes };
        let mut root = PciRoot::new(PlacedDisk { access, registers, sizing: 0 });
        let place = Place::default().into();
        let memory = |address_type, prefetchable, address, size| {
            Ok::<_, PciError>(Some(BarInfo::Memory { address_type, prefetchable, address, size }))
        };
        assert_eq!(root.bar_info(place, 1), memory(MemoryBarType::Width32, false, 0xfebd_1000, 0x1000));
        assert_eq!(root.bar_info(place, 4), memory(MemoryBarType::Width64, true, 0x1_e000_0000, 0x4000));
        assert_eq!(root.bar_info(place, 4), memory(MemoryBarType::Width64, true, 0x1_e000_0000, 0x4000), "and again");
        assert_eq!(writes.get(), 0);
        // A driver that sets the command register cannot switch the disk off.
        let mut disk = PlacedDisk { access: Registers { words, writes: &writes }, registers, sizing: 0 };
        disk.write_word(place, COMMAND, 0);
        assert_eq!((disk.access.words[1], disk.read_word(place, COMMAND) & DECODE), (WORKING, 0));
    }
}
