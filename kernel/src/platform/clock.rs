//! The time-stamp counter as a clock: how fast it runs, and whether its counts mean anything.
//!
//! The TSC is compared with the ACPI power-management timer and PIT channel 2 over a stretch of the boot: both are read
//! early ([`Started::now`]) and again once the platform is up ([`Started::finish`]), so calibration costs little waiting. A port read takes microseconds under a hypervisor, so each reading
//! is the best of several, taken between two TSC reads. CPUID's own statement is preferred when the timers confirm it.
//!
//! # Source
//! Intel SDM volume 3B, 18.7.3 (TSC frequency from CPUID 0x15/0x16); Intel 8254 data sheet; ACPI 6.5, 4.8.3.3.

use super::port;
use core::arch::x86_64::{__cpuid, _rdtsc};

/// Shortest stretch the timers are compared over, in microseconds.
const WINDOW_US: u64 = 10_000;
/// Shortest stretch for the PIT, which only confirms what another source says.
const PIT_WINDOW_US: u64 = 5_000;
/// Longest stretch after which the 16-bit PIT is still unambiguous.
const PIT_LIMIT_US: u64 = 40_000;
/// Readings without progress after which a timer counts as absent.
const POLLS: u32 = 20_000;
/// Ticks per second of the power-management timer.
const PM_HZ: u64 = 3_579_545;
/// Ticks per second of the PIT.
const PIT_HZ: u64 = 1_193_182;
/// Largest relative difference between two sources, in thousandths, before neither is trusted.
const AGREE_PER_MILLE: u64 = 10;
/// TSC ticks taken for a microsecond before the clock is known: more than any CPU has, so early waits are never short.
const EARLY_TICKS_PER_US: u64 = 6_000;

/// Reads the time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Waits at least `us` microseconds, before the clock is calibrated.
pub fn spin_us(us: u64) {
    spin_until_us(us, || false);
}

/// Waits until `done`, at least `us` microseconds long; returns whether it was.
pub fn spin_until_us(us: u64, done: impl Fn() -> bool) -> bool {
    let start = tsc();
    while !done() {
        if tsc().wrapping_sub(start) > us * EARLY_TICKS_PER_US {
            return done();
        }
        core::hint::spin_loop();
    }
    true
}

/// The hypervisor's signature (CPUID 0x40000000), all zero without one.
pub fn hypervisor_signature() -> [u8; 12] {
    let mut out = [0; 12];
    if hypervised() {
        let leaf = __cpuid(0x4000_0000);
        for (bytes, word) in out.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    out
}

/// CPUID says that a hypervisor is there.
pub fn hypervised() -> bool {
    __cpuid(1).ecx >> 31 == 1
}

/// True under software emulation, where cycle counts say nothing about hardware: QEMU's TCG by its signature, or, when
/// the signature is hidden, by its CPU name. A hypervisor we do not know by name is taken at its word.
pub fn emulated() -> bool {
    if &hypervisor_signature() == b"TCGTCGTCGTCG" {
        return true;
    }
    let brand = super::cpu::brand_bytes();
    let starts = |text: &[u8]| brand.windows(text.len()).any(|w| w == text);
    starts(b"QEMU TCG") || (starts(b"QEMU Virtual CPU") && hypervisor_signature() == [0; 12])
}

/// A reading of a timer with the TSC at the same moment.
#[derive(Clone, Copy)]
struct Reading {
    tsc: u64,
    ticks: u64,
}

fn best_reading(read: impl Fn() -> (u64, u64, u64)) -> Reading {
    let mut best = (u64::MAX, Reading { tsc: 0, ticks: 0 });
    for _ in 0..8 {
        let (before, ticks, after) = read();
        let width = after.wrapping_sub(before);
        if width < best.0 {
            best = (width, Reading { tsc: before + width / 2, ticks });
        }
    }
    best.1
}

fn read_pm(port: u16) -> Reading {
    best_reading(|| {
        let before = tsc();
        // SAFETY: the timer's port as ACPI names it; reading has no effect.
        let ticks = unsafe { port::read_u32(port) } & 0xff_ffff;
        (before, u64::from(ticks), tsc())
    })
}

fn read_pit() -> Reading {
    best_reading(|| {
        let before = tsc();
        // SAFETY: latches channel 2, which only this module uses; the latch is the moment of the reading.
        let after = unsafe {
            port::write_u8(0x43, 0x80);
            tsc()
        };
        // SAFETY: reads the two latched bytes.
        let count = unsafe { u16::from_le_bytes([port::read_u8(0x42), port::read_u8(0x42)]) };
        (before, u64::from(count), after)
    })
}

/// The reference timers at an early moment.
#[derive(Clone, Copy)]
pub struct Started {
    pm_port: Option<u16>,
    pm: Option<Reading>,
    pit: Reading,
}

/// How fast the TSC runs, and how that is known.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Calibration {
    /// Ticks per second.
    pub tsc_hz: u64,
    /// Where `tsc_hz` comes from.
    pub source: &'static str,
    /// By the power-management timer.
    pub pm_hz: Option<u64>,
    /// By the PIT.
    pub pit_hz: Option<u64>,
    /// By CPUID.
    pub cpuid_hz: Option<u64>,
    /// At least two sources agree within 1 %, and the machine is not emulated.
    pub trusted: bool,
}

impl Started {
    /// Reads the timers and starts the PIT.
    pub fn now(pm_port: Option<u16>) -> Started {
        // SAFETY: channel 2 is the speaker's; the gate is switched on and the speaker off.
        unsafe {
            port::write_u8(0x61, port::read_u8(0x61) & !2 | 1);
            port::write_u8(0x43, 0xb0); // channel 2, both bytes, mode 0: counts down and wraps
            port::write_u8(0x42, 0);
            port::write_u8(0x42, 0);
        }
        Started { pm_port, pm: pm_port.map(read_pm), pit: read_pit() }
    }

    /// Reads the timers again, after waiting out the rest of the window, and computes the frequency.
    pub fn finish(mut self) -> Calibration {
        let pm_hz = self.pm_port.and_then(|port| {
            let hz = self.pm_window(port)?;
            // The 16-bit PIT wraps after 55 ms. Where the boot took longer, it gets a fresh, short window.
            if clock_us(tsc().wrapping_sub(self.pit.tsc), hz) > PIT_LIMIT_US {
                self.pit = read_pit();
            }
            Some(hz)
        });
        Calibration::decide(pm_hz, self.pit_window(), cpuid_hz(), emulated())
    }

    /// TSC frequency by the power-management timer; `None` when it stands still.
    fn pm_window(&self, port: u16) -> Option<u64> {
        let start = self.pm?;
        for _ in 0..POLLS {
            let now = read_pm(port);
            let ticks = now.ticks.wrapping_sub(start.ticks) & 0xff_ffff;
            if ticks * 1_000_000 / PM_HZ >= WINDOW_US {
                return Some(frequency(start, now, ticks, PM_HZ));
            }
        }
        None
    }

    /// TSC frequency by the PIT; `None` when it stands still. The window is over before the counter wraps.
    fn pit_window(&self) -> Option<u64> {
        let start = self.pit;
        for _ in 0..POLLS {
            let now = read_pit();
            let ticks = start.ticks.wrapping_sub(now.ticks) & 0xffff;
            if ticks * 1_000_000 / PIT_HZ >= PIT_WINDOW_US {
                return Some(frequency(start, now, ticks, PIT_HZ));
            }
        }
        None
    }
}

fn clock_us(cycles: u64, hz: u64) -> u64 {
    (u128::from(cycles) * 1_000_000 / u128::from(hz.max(1))) as u64
}

fn frequency(start: Reading, now: Reading, ticks: u64, timer_hz: u64) -> u64 {
    (u128::from(now.tsc.wrapping_sub(start.tsc)) * u128::from(timer_hz) / u128::from(ticks.max(1))) as u64
}

impl Calibration {
    fn decide(pm_hz: Option<u64>, pit_hz: Option<u64>, cpuid_hz: Option<u64>, emulated: bool) -> Calibration {
        let agree = |a: u64, b: u64| a.abs_diff(b) <= a.max(b) / 1000 * AGREE_PER_MILLE;
        let both = |a: Option<u64>, b: Option<u64>| matches!((a, b), (Some(a), Some(b)) if agree(a, b));
        let (cpuid, pm, pit) = ((cpuid_hz, "cpuid"), (pm_hz, "pm timer"), (pit_hz, "pit"));
        // What CPUID states is exact, where a timer agrees with it; two timers that agree overrule it.
        let pairs = [(cpuid, pm), (cpuid, pit), (pm, pit)];
        let confirmed = pairs.into_iter().find(|(a, b)| both(a.0, b.0)).map(|(a, _)| a);
        let any = || [pm, pit, cpuid].into_iter().find(|source| source.0.is_some());
        let (hz, source) = confirmed.or_else(any).unwrap_or((None, "guess"));
        let (tsc_hz, confirmed) = (hz.unwrap_or(1_000_000_000), confirmed.is_some());
        Calibration { tsc_hz, source, pm_hz, pit_hz, cpuid_hz, trusted: confirmed && !emulated }
    }
}

/// The frequency CPUID states: crystal clock and ratio, or a hypervisor's own leaf.
fn cpuid_hz() -> Option<u64> {
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    let hypervisor_leaves = if hypervised() { __cpuid(0x4000_0000).eax } else { 0 };
    if (0x4000_0010..0x4001_0000).contains(&hypervisor_leaves) {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz > 0).then(|| u64::from(khz) * 1000);
    }
    None
}
