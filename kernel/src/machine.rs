//! The machine as one value: what `bareflow_main` gets, and the runtime's `Platform`.

use crate::boot::early::{BootFacts, mark};
use crate::boot::gates;
use crate::boot::info::{Loader, Range};
use crate::boot::paging::LARGE_PAGE_BYTES;
use crate::platform::code::CodeArena;
use crate::platform::cores::Cores;
use crate::platform::virtio::VirtioDisk;
use crate::platform::{clock, cpu, memory, pci, power, rtc, serial};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;
use engine::workers::Workers;
use storage::{BlockDevice, SECTOR_BYTES};

/// A started, sealed machine.
pub struct Machine {
    facts: BootFacts,
    command_line: String,
    calibration: clock::Calibration,
    cores: Cores,
    code: CodeArena,
    disks: Vec<Disk>,
    boot_disk: Option<usize>,
    model_disk: Option<usize>,
    notes: Vec<String>,
}

/// A disk and where it sits.
pub struct Disk {
    /// Bus, device, function.
    pub place: pci::Place,
    /// The device.
    pub device: VirtioDisk,
}

impl Machine {
    /// Puts the pieces together after the seal.
    pub(crate) fn new(mut facts: BootFacts) -> Machine {
        power::set_pm1_control(facts.acpi.pm1_control_port);
        let mut notes = Vec::new();
        let calibration = facts.clock.finish();
        mark(&mut facts.steps, "calibration");
        if !calibration.trusted {
            let why = if clock::emulated() { "the CPU is emulated" } else { "no two clocks agree" };
            notes.push(alloc::format!("cycle counts are not trusted: {why}"));
        }
        if facts.cores < facts.cores_listed {
            let why = if clock::emulated() { "emulated cores gain nothing" } else { "the others did not start" };
            notes.push(alloc::format!("{} of {} cores are used: {why}", facts.cores, facts.cores_listed));
        }
        let mut disks = Vec::new();
        for found in facts.disks.as_slice() {
            match VirtioDisk::new(found, calibration.tsc_hz) {
                Ok(device) => disks.push(Disk { place: found.function, device }),
                Err(error) => notes.push(error.to_string()),
            }
        }
        // A partition table or boot sector ends in 55 aa; anything else is a raw model file.
        let volume: Vec<bool> = disks.iter_mut().map(|d| ends_in_boot_signature(&mut d.device)).collect();
        let boot_disk = volume.iter().position(|&v| v);
        let model_disk = volume.iter().position(|&v| !v);
        let command_line = String::from_utf8_lossy(facts.start.command_line.as_slice()).into_owned();
        mark(&mut facts.steps, "disks");
        // SAFETY: `early` mapped the plan's code range read-write here and read-execute at the alias.
        let code = unsafe { CodeArena::new(facts.plan.code) };
        let cores = Cores::new(facts.cores);
        Machine { facts, command_line, calibration, cores, code, disks, boot_disk, model_disk, notes }
    }

    /// The options text: the loader's command line, not interpreted.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Which protocol started the image.
    pub fn loader(&self) -> Loader {
        self.facts.start.loader
    }

    /// What the boot found out before the seal.
    pub fn boot_facts(&self) -> &BootFacts {
        &self.facts
    }

    /// The clock's calibration.
    pub fn calibration(&self) -> clock::Calibration {
        self.calibration
    }

    /// Instruction sets that run here.
    pub fn isa(&self) -> engine::Isa {
        engine::Isa::detect()
    }

    /// Things that were refused or degraded so far.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The disks in bus order.
    pub fn disks(&mut self) -> &mut [Disk] {
        &mut self.disks
    }

    /// Index of the boot volume in [`Machine::disks`].
    pub fn boot_disk_index(&self) -> Option<usize> {
        self.boot_disk
    }

    /// Index of the raw model disk in [`Machine::disks`].
    pub fn model_disk_index(&self) -> Option<usize> {
        self.model_disk
    }

    /// The code arena.
    pub fn code(&mut self) -> (&mut CodeArena, &dyn Workers) {
        (&mut self.code, &self.cores)
    }

    /// The cores.
    pub fn cores(&self) -> &dyn Workers {
        &self.cores
    }

    /// Seconds since 1970.
    pub fn wall_clock(&self) -> Option<u64> {
        rtc::unix_time()
    }

    /// Milliseconds from the entry of the image to now.
    pub fn uptime_ms(&self) -> f64 {
        let cycles = clock::tsc().saturating_sub(self.facts.entry_tsc);
        cycles as f64 * 1e3 / self.calibration.tsc_hz as f64
    }

    /// Text for COM1.
    pub fn write_text(&self, text: &str) {
        let _ = serial::COM1.lock().write_str(text);
    }

    /// Sets aside zeroed memory, whole 2 MiB pages.
    ///
    /// # Errors
    /// [`memory::Exhausted`].
    pub fn set_aside(&self, name: &'static str, len_bytes: usize) -> Result<&'static mut [u8], memory::Exhausted> {
        memory::arena(name, len_bytes as u64)
    }

    /// Makes an arena read-only on every core, for good. Memory that is not an arena of [`Machine::set_aside`] is
    /// returned as it is, unprotected.
    pub fn make_read_only(&self, arena: &'static mut [u8]) -> &'static [u8] {
        let start = arena.as_ptr() as u64;
        let owned = memory::arenas().into_iter().find(|a| a.range.start == start);
        let arena: &'static [u8] = arena;
        if let Some(owned) = owned {
            let end = (start + arena.len() as u64).next_multiple_of(LARGE_PAGE_BYTES);
            let range = Range { start, end: end.min(owned.range.end) };
            self.cores.run(&|core| {
                let range = if core == 0 { range } else { Range { start: 0, end: 0 } };
                // SAFETY: the only `&mut` to these pages came in as the argument and is a shared reference now; the
                // rest of the last page belongs to the same arena and was never handed out.
                let frozen = unsafe { gates::freeze(range) };
                assert_eq!(frozen, Ok(()), "an arena is whole 2 MiB pages of RAM");
            });
        }
        arena
    }

    /// One line on what kind of machine this is.
    pub fn summary(&self) -> String {
        alloc::format!(
            "{}, {} of {} cores, hypervisor {}",
            cpu::brand(),
            self.cores.count(),
            self.facts.cores_listed,
            cpu::hypervisor().unwrap_or_else(|| "none".to_string())
        )
    }
}

fn ends_in_boot_signature(disk: &mut VirtioDisk) -> bool {
    let mut sector = [0u8; SECTOR_BYTES];
    disk.read(0, &mut sector).is_ok() && sector[510..] == [0x55, 0xaa] && !sector.starts_with(b"GGUF")
}
