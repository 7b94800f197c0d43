//! From the first instruction in ring 3 to the seal. Runs on the boot page tables (4 GiB, everything allowed), allocates
//! nothing but messages, and ends with page tables nobody in ring 3 can change.
//!
//! Order: exception table -> serial -> loader's facts -> ACPI -> clock starts -> PCI disks -> memory plan -> page tables ->
//! other cores -> port allow-list -> seal -> heap -> `bareflow_main`.

use super::acpi::{self, AcpiFacts};
use super::area::*;
use super::cores;
use super::fixed::FixedList;
use super::gates::{self, *};
use super::info::{self, Physical, Range, StartInfo};
use super::paging::{Access, Builder, Frame, MapError, PAGE_BYTES};
use super::plan::{self, CODE_ALIAS, Plan};
use crate::Machine;
use crate::options::{self, KernelOptions};
use crate::platform::{clock, memory, pci, power, serial};
use alloc::string::String;
use core::arch::asm;
use report::{ExitStatus, Level, Message};

/// Ports ring 3 may use besides serial lines and what ACPI names: PIT, speaker gate, RTC, debug exit, PCI configuration.
const PORTS: [(u16, u16); 6] = [(0x40, 0x43), (0x61, 0x61), (0x70, 0x71), (0xf4, 0xf4), (0xcf8, 0xcff), (0x80, 0x80)];

/// What the early boot found out, for [`Machine`].
pub struct BootFacts {
    /// Loader, memory map, command line as given.
    pub start: StartInfo,
    /// The kernel's own settings.
    pub options: KernelOptions,
    /// The command line without them.
    pub command_line: String,
    /// Division of memory.
    pub plan: Plan,
    /// Cores and ports.
    pub acpi: AcpiFacts,
    /// virtio-blk functions in bus order.
    pub disks: FixedList<pci::Disk, { pci::MAX_DISKS }>,
    /// Reference clocks as they stood early in the boot.
    pub clock: clock::Started,
    /// TSC at the entry of the image.
    pub entry_tsc: u64,
    /// Cores that run, the boot CPU included.
    pub cores: usize,
    /// A core that waits for a disk can sleep meanwhile.
    pub can_nap: bool,
    /// Cores ACPI lists.
    pub cores_listed: usize,
    /// Page-table frames in use.
    pub table_frames: usize,
    /// Ends of the early boot's steps: name and TSC.
    pub steps: FixedList<Step, 16>,
}

/// A step of the boot and the TSC at its end.
#[derive(Clone, Copy, Default, Debug)]
pub struct Step {
    /// What was done.
    pub name: &'static str,
    /// When it was over.
    pub end_tsc: u64,
}

/// Notes the end of a step.
pub(crate) fn mark<const N: usize>(steps: &mut FixedList<Step, N>, name: &'static str) {
    // A full list loses the step, which only a report would miss.
    let _ = steps.push(Step { name, end_tsc: clock::tsc() });
}

/// Memory below 4 GiB as the boot page tables show it.
struct BootMemory;

impl Physical for BootMemory {
    fn bytes(&self, address: u64, len: usize) -> Option<&[u8]> {
        let end = address.checked_add(len as u64)?;
        if address == 0 || end > 1 << 32 {
            return None;
        }
        // SAFETY: identity-mapped; the loader's and firmware's tables are not written while the early boot reads them.
        Some(unsafe { core::slice::from_raw_parts(address as *const u8, len) })
    }
}

unsafe extern "Rust" {
    /// The image's main, in its binary (or in the `native` module of the library).
    fn bareflow_main(machine: Machine) -> !;
}

/// Entry of ring 3 on the boot CPU; `eax` and `ebx` as the loader left them.
#[unsafe(no_mangle)]
extern "sysv64" fn early_main(eax: u32, ebx: u32) -> ! {
    // SAFETY: the boot CPU, once, before anything else runs; the tables are plain memory until the seal.
    unsafe {
        map_boot_memory();
        asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1f80u32, options(nostack));
        fill_exception_table();
        fill_area(0, cpu0_area());
    }
    let mut steps = FixedList::new();
    mark(&mut steps, "entry");
    serial::init();
    mark(&mut steps, "serial");
    let mut facts = match prepare(eax, ebx, steps) {
        Ok(facts) => facts,
        Err((status, text)) => stop(status, text),
    };
    // SAFETY: `prepare` built tables that map the image and its stack at the addresses in use.
    if unsafe { gates::seal() }.is_err() {
        stop(ExitStatus::Fatal, String::from("ring 0 refused to seal the page tables"));
    }
    // SAFETY: the plan's free RAM is mapped and belongs to nobody yet.
    unsafe { memory::init(facts.plan.ram.as_slice()) };
    mark(&mut facts.steps, "seal");
    let machine = Machine::new(facts);
    // SAFETY: defined once per image with this signature.
    unsafe { bareflow_main(machine) }
}

/// Completes the boot page tables, in which ring 0 mapped the image only: 4 GiB, everything allowed. Hypervisors that keep
/// page tables of their own trap every write to one in use (12 us each here), so directories are filled before they are.
///
/// # Safety
/// Before the seal, once.
unsafe fn map_boot_memory() {
    const PRESENT_WRITABLE_USER: u64 = 0x07;
    const LARGE: u64 = 0x80;
    let directories = gates::boot_directories() as *mut u64;
    for page in 0..2048 {
        // SAFETY: the four directories are one array, writable until the seal, and not part of the tables yet.
        unsafe { directories.add(page).write_volatile((page as u64) << 21 | LARGE | PRESENT_WRITABLE_USER) };
    }
    let pointers = gates::boot_pointers() as *mut u64;
    for gib in 0..4 {
        let directory = gates::boot_directories() + gib as u64 * PAGE_BYTES;
        // SAFETY: as above; what is in use, the image, is mapped by the new directory as it was by the old one.
        unsafe { pointers.add(gib).write_volatile(directory | PRESENT_WRITABLE_USER) };
    }
}

fn stop(status: ExitStatus, text: String) -> ! {
    crate::println!("\nFATAL: {text}");
    power::send(&Message::Note { level: Level::Error, text });
    power::end(status)
}

fn prepare(eax: u32, ebx: u32, mut steps: FixedList<Step, 16>) -> Result<BootFacts, (ExitStatus, String)> {
    use alloc::string::ToString;
    let start = info::read(&BootMemory, eax, ebx).map_err(|e| (ExitStatus::Fatal, e.to_string()))?;
    let command_line = String::from_utf8_lossy(start.command_line.as_slice());
    let (options, command_line) = options::split(&command_line).map_err(|e| (ExitStatus::Settings, e.to_string()))?;
    let acpi = match start.rsdp.or_else(|| acpi::scan(&BootMemory)) {
        Some(rsdp) => acpi::read(&BootMemory, rsdp),
        None => AcpiFacts::default(),
    };
    mark(&mut steps, "loader+acpi");
    let clock = clock::Started::now(acpi.pm_timer_port);
    mark(&mut steps, "timers");
    let disks = pci::find_disks(start.map.as_slice());
    mark(&mut steps, "pci");
    let cores_listed = acpi.apic_ids.as_slice().len().max(1);
    let wanted = options.cores.unwrap_or(if clock::emulated() { 1 } else { cores_listed }).min(cores_listed);
    let usable = info::limited(&info::usable(start.map.as_slice()), options.memory_bytes.unwrap_or(u64::MAX));
    let plan = plan::plan(usable.as_slice(), image_end(), wanted, cfg!(feature = "jit"))
        .map_err(|e| (ExitStatus::Memory, e.to_string()))?;
    let trampoline = Range { start: TRAMPOLINE, end: TRAMPOLINE + PAGE_BYTES };
    let low_page_free = usable.as_slice().iter().any(|r| r.start <= trampoline.start && trampoline.end <= r.end);
    let wanted = if low_page_free { wanted } else { 1 };
    // SAFETY: the early boot runs alone, and the plan gave these pages to the page tables and CPU areas.
    let (table_frames, started) = unsafe {
        let frames = build_tables(&plan, wanted, acpi.local_apic, disks.as_slice())
            .map_err(|e| (ExitStatus::Fatal, e.to_string()))?;
        mark(&mut steps, "page tables");
        for core in 1..wanted {
            fill_area(core, area_of(core, plan.areas));
        }
        (frames, cores::start(&acpi, &plan, wanted))
    };
    mark(&mut steps, "cores");
    for core in 0..wanted {
        // SAFETY: the TSS is still plain memory; the other cores do no port I/O.
        unsafe { allow_ports(area_of(core, plan.areas), &acpi) };
    }
    // SAFETY: read once, written by entry.s before.
    let entry_tsc = unsafe { (&raw const ring0_entry_tsc).read() };
    Ok(BootFacts {
        start,
        options,
        command_line,
        plan,
        acpi,
        disks,
        clock,
        entry_tsc,
        cores: started.running,
        can_nap: started.can_nap,
        cores_listed,
        table_frames,
        steps,
    })
}

/// Address of a core's area.
fn area_of(core: usize, others: Range) -> u64 {
    if core == 0 { cpu0_area() } else { others.start + (core as u64 - 1) * AREA_BYTES }
}

/// Interrupt gate for `handler` on interrupt stack `ist`, callable from ring `dpl`.
fn gate(handler: u64, ist: u64, dpl: u64) -> [u64; 2] {
    let low = (handler & 0xffff) | 0x08 << 16 | ist << 32 | (0x8e | dpl << 5) << 40 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// # Safety
/// Before the seal, once.
unsafe fn fill_exception_table() {
    // SAFETY: symbols of entry.s; the table is writable until the seal and used by nobody else.
    unsafe {
        let table = &raw mut ring0_idt;
        let stubs = &raw const ring0_stubs as u64;
        let ignore = &raw const ring0_ignore as u64;
        for vector in 0..256u64 {
            let entry = match vector {
                2 => gate(stubs + 16 * vector, 3, 0),
                8 => gate(stubs + 16 * vector, 2, 0),
                18 => gate(stubs + 16 * vector, 4, 0),
                3 => gate(&raw const ring0_breakpoint as u64, 1, 3),
                0..32 => gate(stubs + 16 * vector, 1, 0),
                WAKE_VECTOR => gate(&raw const ring0_woken as u64, 5, 0),
                _ => gate(ignore, 5, 0),
            };
            (&raw mut (*table)[vector as usize]).write_volatile(entry);
        }
    }
}

/// Prepares the area of `core`: number, TSS with every port open, interrupt stacks; and its TSS descriptor.
///
/// # Safety
/// `area` must be [`AREA_BYTES`] of zeroed or unused memory that nothing else refers to; before the seal.
unsafe fn fill_area(core: usize, area: u64) {
    // SAFETY: the caller gives the area; all offsets lie inside it (boot/area.rs). The descriptor index is below
    // MAX_CPUS, because the list of cores is no longer than that.
    unsafe {
        if core > 0 {
            core::ptr::write_bytes(area as *mut u8, 0, AREA_FRAME as usize);
        }
        (area as *mut u64).write_volatile(core as u64);
        let tss = area + AREA_TSS;
        // rsp0 at 4, ist1 at 36: each stack ends 16 bytes below its page's end, where the area's address is kept.
        let stack = |ist: u64| area + AREA_IST + ist * PAGE_BYTES - 16;
        ((tss + 4) as *mut u64).write_unaligned(stack(1));
        for ist in 1..=IST_COUNT {
            ((tss + 28 + 8 * ist) as *mut u64).write_unaligned(stack(ist));
            ((stack(ist) + 8) as *mut u64).write_volatile(area);
        }
        ((tss + 102) as *mut u16).write_unaligned(TSS_BYTES as u16);
        ((tss + TSS_LIMIT) as *mut u8).write_volatile(0xff);
        if core > 0 {
            let low = TSS_LIMIT | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
            let table = &raw mut ring0_gdt;
            (&raw mut (*table)[8 + 2 * core]).write_volatile(low);
            (&raw mut (*table)[9 + 2 * core]).write_volatile(tss >> 32);
        }
    }
}

/// Closes every port but the ones the kernel uses.
///
/// # Safety
/// `area` must be a filled area; before the seal.
unsafe fn allow_ports(area: u64, acpi: &AcpiFacts) {
    let bitmap = area + AREA_TSS + TSS_BYTES;
    // SAFETY: the bitmap lies inside the area; a port is below 65536, so its byte is below 8192.
    unsafe {
        core::ptr::write_bytes(bitmap as *mut u8, 0xff, PORT_BITMAP_BYTES as usize);
        let allow = |first: u16, last: u16| {
            for port in first..=last {
                let byte = (bitmap + u64::from(port / 8)) as *mut u8;
                byte.write_volatile(byte.read_volatile() & !(1 << (port % 8)));
            }
        };
        PORTS.iter().chain(&serial::PORTS).for_each(|&(first, last)| allow(first, last));
        if let Some(port) = acpi.pm_timer_port {
            allow(port, port.saturating_add(3));
        }
        if let Some(port) = acpi.pm1_control_port {
            allow(port, port.saturating_add(1));
        }
    }
}

/// Builds the final page tables and tells ring 0 about them; returns the frames in use.
///
/// # Safety
/// Before the seal, once; the plan's table and area pages must be unused.
unsafe fn build_tables(plan: &Plan, cores: usize, apic: Option<u64>, disks: &[pci::Disk]) -> Result<usize, MapError> {
    // SAFETY: read once, written by entry.s.
    let no_execute = unsafe { (&raw const ring0_efer).read() } & 0x800 != 0;
    let frames = (plan.tables.len_bytes() / PAGE_BYTES) as usize;
    // SAFETY: the plan gave these whole pages to the tables; entries are plain integers.
    let frames = unsafe { core::slice::from_raw_parts_mut(plan.tables.start as *mut Frame, frames) };
    let mut tables = Builder::new(frames, plan.tables.start, plan.ram_end, no_execute)?;
    let same = |tables: &mut Builder<'_>, start: u64, end: u64, access| tables.map(start, start, end - start, access);

    same(&mut tables, image_start(), ring0_text_start(), Access::READ)?;
    same(&mut tables, ring0_text_start(), ring0_text_end(), Access::SUPERVISOR_EXECUTE)?;
    same(&mut tables, text_start(), text_end(), Access::READ_EXECUTE)?;
    same(&mut tables, text_end(), rodata_end(), Access::READ)?;
    same(&mut tables, ring0_data_start(), ring0_data_end(), Access::SUPERVISOR)?;
    same(&mut tables, ring0_data_end(), data_end(), Access::READ_WRITE)?;
    for core in 0..cores {
        let area = area_of(core, plan.areas);
        for part in &PARTS {
            let access = if part.user { Access::READ_WRITE } else { Access::SUPERVISOR };
            same(&mut tables, area + part.start, area + part.end, access)?;
        }
    }
    if let Some(apic) = apic {
        let registers = Access { user: false, ..Access::DEVICE };
        same(&mut tables, apic, apic + PAGE_BYTES, registers)?;
    }
    if cores > 1 {
        same(&mut tables, TRAMPOLINE, TRAMPOLINE + PAGE_BYTES, Access::SUPERVISOR_EXECUTE)?;
    }
    same(&mut tables, plan.tables.start, plan.tables.end, Access::SUPERVISOR)?;
    same(&mut tables, plan.code.start, plan.code.end, Access::READ_WRITE)?;
    tables.map(CODE_ALIAS, plan.code.start, plan.code.len_bytes(), Access::READ_EXECUTE)?;
    for range in plan.ram.as_slice() {
        same(&mut tables, range.start, range.end, Access::READ_WRITE)?;
    }
    for page in pci::register_pages(disks).as_slice() {
        same(&mut tables, page.start, page.end, Access::DEVICE)?;
    }
    let leaf7 = core::arch::x86_64::__cpuid_count(7, 0);
    // SMEP: ring 0 never executes ring-3 pages. UMIP: ring 3 cannot read where the descriptor tables are.
    let mut cr4 = u64::from(leaf7.ebx >> 7 & 1) << 20;
    cr4 |= u64::from(leaf7.ecx >> 2 & 1) << 11;
    // SAFETY: ring 0 reads these only in the gates and in the other cores' start, which come later.
    unsafe {
        (&raw mut ring0_final_cr3).write_volatile(tables.root());
        (&raw mut ring0_ram_directory).write_volatile(tables.ram_directory());
        (&raw mut ring0_ram_end).write_volatile(plan.ram_end);
        (&raw mut ring0_sealed_cr4).write_volatile(cr4);
    }
    Ok(tables.frames_used())
}
