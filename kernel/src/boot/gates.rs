//! The symbols of `entry.s` and the five requests ring 3 can make of ring 0.

use super::area::*;
use super::info::Range;
use core::arch::{asm, global_asm};
use report::ExitStatus;

/// `eax` of a breakpoint that asks for the seal.
const REQUEST_SEAL: u32 = 0x5ea1_0001;
/// `eax` of a breakpoint that asks for `freeze`.
const REQUEST_FREEZE: u32 = 0x5ea1_0002;
/// `eax` of a breakpoint that parks the core.
const REQUEST_PARK: u32 = 0x5ea1_0003;
/// `eax` of a breakpoint that wakes another core.
const REQUEST_WAKE: u32 = 0x5ea1_0004;
/// `eax` of a breakpoint that lets the boot CPU sleep for a time.
const REQUEST_NAP: u32 = 0x5ea1_0005;
/// Interrupt that wakes a parked core, from another core or from its own timer.
pub(super) const WAKE_VECTOR: u64 = 0x40;

/// TSC ticks that [`nap`] takes, about: some tens of microseconds.
pub const NAP_CYCLES: u64 = 120_000;

global_asm!(
    include_str!("entry.s"),
    AREA_BYTES = const AREA_BYTES,
    AREA_SHIFT = const AREA_SHIFT,
    AREA_TSS = const AREA_TSS,
    AREA_IST_END = const AREA_IST_END,
    AREA_FRAME = const AREA_FRAME,
    AREA_FAULT_STACK_END = const AREA_FAULT_STACK_END,
    TSS_LIMIT = const TSS_LIMIT,
    GDT_BYTES = const GDT_BYTES,
    TRAMPOLINE = const TRAMPOLINE,
    REQUEST_SEAL = const REQUEST_SEAL,
    REQUEST_FREEZE = const REQUEST_FREEZE,
    REQUEST_PARK = const REQUEST_PARK,
    REQUEST_WAKE = const REQUEST_WAKE,
    REQUEST_NAP = const REQUEST_NAP,
    WAKE_VECTOR = const WAKE_VECTOR,
    EXIT_PANIC = const ExitStatus::Panic.debug_exit_value(),
    EXIT_FATAL = const ExitStatus::Fatal.debug_exit_value(),
);

unsafe extern "C" {
    /// 32 entry stubs, 16 bytes each.
    pub(super) static ring0_stubs: u8;
    pub(super) static ring0_ignore: u8;
    pub(super) static ring0_woken: u8;
    pub(super) static ring0_breakpoint: u8;
    pub(super) static mut ring0_idt: [[u64; 2]; 256];
    pub(super) static mut ring0_gdt: [u64; GDT_BYTES as usize / 8];
    pub(super) static mut ring0_entry_tsc: u64;
    pub(super) static mut ring0_efer: u32;
    pub(super) static mut ring0_final_cr3: u64;
    pub(super) static mut ring0_sealed_cr4: u64;
    pub(super) static mut ring0_ram_directory: u64;
    pub(super) static mut ring0_ram_end: u64;
    pub(super) static mut ring0_core_areas: u64;
    pub(super) static mut ring0_core_count: u32;
    pub(super) static mut ring0_apic: u64;
    pub(super) static mut ring0_nap_ticks: u64;
    pub(super) static trampoline_start: u8;
    pub(super) static trampoline_end: u8;
}

macro_rules! image_symbols {
    ($($function:ident $symbol:ident $doc:literal;)*) => {
        unsafe extern "C" { $( static $symbol: u8; )* }
        $(
            #[doc = $doc]
            pub fn $function() -> u64 {
                &raw const $symbol as u64
            }
        )*
    };
}

image_symbols! {
    image_start __image_start "First byte of the image.";
    image_end __image_end "End of the image, the boot CPU's area included.";
    ring0_text_start __ring0_text_start "First byte of the privileged code.";
    ring0_text_end __ring0_text_end "End of the privileged code.";
    text_start __text_start "First byte of ring 3's code.";
    text_end __text_end "End of ring 3's code.";
    rodata_end __rodata_end "End of constants.";
    ring0_data_start __ring0_data_start "First byte of descriptor tables.";
    ring0_data_end __ring0_data_end "End of descriptor tables.";
    data_end __data_end "End of data and bss.";
    boot_pointers boot_pdpt "The table of page directories of the boot page tables: 512 entries.";
    boot_directories boot_pd "Four page directories for the boot page tables, in no use yet: 2048 entries.";
    cpu0_area __cpu0_area "The boot CPU's area.";
}

/// The gate said no: the seal is closed already, or the range is not whole 2 MiB pages of RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("ring 0 refused the request")]
pub struct Refused;

/// Installs the prepared page tables; works once.
///
/// # Errors
/// [`Refused`] from the second call on.
///
/// # Safety
/// `ring0_final_cr3` must name page tables that map the running code, its stack and everything Rust refers to at the
/// same addresses as now. After the seal the call is always refused and then safe.
pub unsafe fn seal() -> Result<(), Refused> {
    let answer: u64;
    // SAFETY: the caller vouches for the tables; the gate changes rax and flags only.
    unsafe { asm!("int3", inout("rax") u64::from(REQUEST_SEAL) => answer) };
    if answer == 0 { Ok(()) } else { Err(Refused) }
}

/// Takes write permission from the 2 MiB pages of `range` as this core sees them. There is no way back.
///
/// An empty range only drops this core's stale translations: what the other cores do after one core froze a range.
///
/// # Errors
/// [`Refused`] when `range` is not whole 2 MiB pages inside RAM.
///
/// # Safety
/// No `&mut` to any byte of `range` may exist any more.
pub unsafe fn freeze(range: Range) -> Result<(), Refused> {
    let answer: u64;
    // SAFETY: only write permission is taken, from memory that the caller says nobody writes. The gate changes the
    // registers named here and the flags.
    unsafe {
        asm!(
            "int3",
            inout("rax") u64::from(REQUEST_FREEZE) => answer,
            out("rcx") _,
            inout("rdi") range.start => _,
            inout("rsi") range.end => _,
        )
    };
    if answer == 0 { Ok(()) } else { Err(Refused) }
}

/// Lets this core sleep until [`wake`] names it; returns at once when that happened since it last slept, and may return
/// for no reason. Only on cores that `boot::cores` started.
pub fn park() {
    // SAFETY: the gate halts and returns; it changes rax and flags only.
    unsafe { asm!("int3", inout("rax") u64::from(REQUEST_PARK) => _) };
}

/// Wakes the core with this APIC id.
///
/// # Errors
/// [`Refused`] when no other core was started.
pub fn wake(apic_id: u8) -> Result<(), Refused> {
    let answer: u64;
    // SAFETY: the gate sends an interrupt whose only effect is to end a halt; it changes rax, rdi and flags only.
    unsafe { asm!("int3", inout("rax") u64::from(REQUEST_WAKE) => answer, inout("rdi") u64::from(apic_id) => _) };
    if answer == 0 { Ok(()) } else { Err(Refused) }
}

/// Lets the boot CPU sleep for [`NAP_CYCLES`], or less: any wake-up ends it.
///
/// # Errors
/// [`Refused`] where there is no timer to end it (`boot::cores`).
pub fn nap() -> Result<(), Refused> {
    let answer: u64;
    // SAFETY: the gate starts a timer whose only effect is to end a halt, and halts; it changes rax, rdi and flags only.
    unsafe { asm!("int3", inout("rax") u64::from(REQUEST_NAP) => answer, out("rdi") _) };
    if answer == 0 { Ok(()) } else { Err(Refused) }
}
