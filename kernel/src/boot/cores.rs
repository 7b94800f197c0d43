//! Starts the other cores: INIT, start-up IPI, through one page of real-mode code into ring 3.
//!
//! Done before the seal, while ring 3 still sees the local APIC's registers; afterwards only ring 0 does, for waking a
//! parked core.
//!
//! # Source
//! Intel SDM volume 3A, section 8.4 (multiple-processor initialisation), 10.6 (interrupt command register).

use super::acpi::AcpiFacts;
use super::area::{AREA_BYTES, TRAMPOLINE};
use super::gates::*;
use super::plan::Plan;
use crate::platform::{clock, cores};

/// Offset of the local APIC's own id, in the upper byte.
const ID: u64 = 0x20;
/// Offset of the local APIC's spurious-interrupt register.
const SPURIOUS: u64 = 0xf0;
/// Offset of the interrupt command register, low half; the high half is 16 bytes on.
const COMMAND: u64 = 0x300;
/// Offset of the register that says what the interrupt line LINT1 does.
const LINT1: u64 = 0x360;
/// LINT1 raises NMIs, as on every PC: a monitor's `nmi` command then shows where the machine is.
const DELIVER_NMI: u32 = 0x400;
/// Offset of the register that says what the timer does when it reaches 0: one interrupt, of the vector written there.
const TIMER: u64 = 0x320;
/// Offset of the register by which the timer's clock is divided.
const TIMER_DIVIDER: u64 = 0x3e0;
/// Offset of the register from which the timer starts to count down when it is written.
const TIMER_INITIAL: u64 = 0x380;
/// Offset of the register that says where it is.
const TIMER_CURRENT: u64 = 0x390;
/// The timer counts, but raises no interrupt.
const MASKED: u32 = 1 << 16;
/// The timer counts every tick of its clock.
const DIVIDE_BY_ONE: u32 = 0b1011;
/// How long a core may take to reach ring 3.
const PATIENCE_US: u64 = 200_000;

/// What [`start`] found.
pub(super) struct Started {
    /// Cores that run, the boot CPU included.
    pub running: usize,
    /// The local APIC's timer counts, so a core can sleep for a time.
    pub can_nap: bool,
}

/// Starts the local APIC's timer and up to `wanted - 1` further cores.
///
/// # Safety
/// Before the seal; the areas of `wanted` cores must be filled and the final page tables complete.
pub(super) unsafe fn start(acpi: &AcpiFacts, plan: &Plan, wanted: usize) -> Started {
    let Some(apic) = acpi.local_apic else { return Started { running: 1, can_nap: false } };
    let register = |offset: u64| (apic + offset) as *mut u32;
    // SAFETY: the local APIC's registers, mapped until the seal; no other interrupt can arrive, they are all masked.
    let can_nap = unsafe {
        register(SPURIOUS).write_volatile(register(SPURIOUS).read_volatile() | 0x1ff);
        register(LINT1).write_volatile(DELIVER_NMI);
        (&raw mut ring0_apic).write_volatile(apic);
        let nap_ticks = start_timer(apic);
        (&raw mut ring0_nap_ticks).write_volatile(u64::from(nap_ticks));
        nap_ticks > 0
    };
    if wanted == 1 {
        return Started { running: 1, can_nap };
    }
    // Not CPUID's: where the host runs ring 3 directly and cannot trap CPUID, that is the host core's.
    // SAFETY: as above.
    let own = unsafe { (register(ID).read_volatile() >> 24) as u8 };
    cores::set_areas(plan.areas.start);
    cores::set_boot_apic_id(own);
    // SAFETY: the trampoline page is unused RAM below 1 MiB (checked by the caller) and holds the whole copy; the ring-0
    // variables are read only by cores that are not started yet.
    unsafe {
        let source = &raw const trampoline_start;
        let bytes = (&raw const trampoline_end).offset_from_unsigned(source);
        core::ptr::copy_nonoverlapping(source, TRAMPOLINE as *mut u8, bytes);
        ((TRAMPOLINE + 8) as *mut u32).write_volatile((&raw const ring0_final_cr3).read() as u32);
        ((TRAMPOLINE + 12) as *mut u32).write_volatile((&raw const ring0_efer).read());
        (&raw mut ring0_core_areas).write_volatile(plan.areas.start);
        (&raw mut ring0_core_count).write_volatile((1 + plan.areas.len_bytes() / AREA_BYTES).min(wanted as u64) as u32);
    }
    let send = |id: u8, command: u32| {
        // SAFETY: as above; the command starts a core in the trampoline, which touches only its own area.
        unsafe {
            register(COMMAND + 16).write_volatile(u32::from(id) << 24);
            register(COMMAND).write_volatile(command);
            clock::spin_until_us(PATIENCE_US, || register(COMMAND).read_volatile() & 1 << 12 == 0)
        }
    };
    let mut running = 1;
    for &id in acpi.apic_ids.as_slice().iter().filter(|&&id| id != own).take(wanted - 1) {
        // INIT. Where it is not even sent there is no APIC at this place.
        if !send(id, 0x4500) {
            break;
        }
        // The 10 ms of the specification are for real hardware.
        clock::spin_us(if clock::hypervised() { 100 } else { 10_000 });
        for _ in 0..2 {
            send(id, 0x4600 | (TRAMPOLINE >> 12) as u32); // start-up
            if clock::spin_until_us(200, || cores::arrived() >= running) {
                break;
            }
        }
        // One that was given up may come late: whoever has arrived by now counts.
        clock::spin_until_us(PATIENCE_US, || cores::arrived() >= running);
        running = cores::arrived() + 1;
    }
    cores::close();
    Started { running: cores::arrived() + 1, can_nap }
}

/// Has the timer of the boot CPU raise [`WAKE_VECTOR`] each time it has counted down, and returns how many of its ticks are
/// [`NAP_CYCLES`]; 0 where it does not count. How fast it counts differs from host to host.
///
/// # Safety
/// `apic` must be the address of the local APIC's registers, mapped; before the seal.
unsafe fn start_timer(apic: u64) -> u32 {
    const WINDOW_CYCLES: u64 = NAP_CYCLES / 4;
    let register = |offset: u64| (apic + offset) as *mut u32;
    // SAFETY: the caller's registers; the interrupt is masked while the timer is tried.
    unsafe {
        register(TIMER_DIVIDER).write_volatile(DIVIDE_BY_ONE);
        register(TIMER).write_volatile(MASKED | WAKE_VECTOR as u32);
        register(TIMER_INITIAL).write_volatile(u32::MAX);
        let start = clock::tsc();
        let first = register(TIMER_CURRENT).read_volatile();
        while clock::tsc().wrapping_sub(start) < WINDOW_CYCLES {
            core::hint::spin_loop();
        }
        let counted = first.saturating_sub(register(TIMER_CURRENT).read_volatile());
        let cycles = clock::tsc().wrapping_sub(start).max(1);
        register(TIMER_INITIAL).write_volatile(0);
        register(TIMER).write_volatile(WAKE_VECTOR as u32);
        (u64::from(counted) * NAP_CYCLES / cycles).min(u64::from(u32::MAX)) as u32
    }
}
