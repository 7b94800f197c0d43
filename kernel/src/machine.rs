//! The machine as one value: the runtime's [`Platform`] on bare metal.

use crate::boot::area::MAX_CPUS;
use crate::boot::early::{BootFacts, mark};
use crate::boot::gates;
use crate::boot::info::{Loader, Range};
use crate::boot::paging::LARGE_PAGE_BYTES;
use crate::boot::plan::RAM_LIMIT;
use crate::platform::code::CodeArena;
use crate::platform::cores::Cores;
use crate::platform::embedded::EmbeddedModel;
use crate::platform::virtio::VirtioDisk;
use crate::platform::{clock, cpu, memory, pci, power, rtc, serial, stack};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;
use engine::dispatch::{Kernel, KernelArgs, guard};
use engine::workers::Workers;
use model::kernel::KernelKey;
use runtime::platform::{Clock, CpuFacts, KernelFault, MemoryUse, OutOfMemory, Platform, WhichDisk};
use storage::{BlockDevice, SECTOR_BYTES};

/// A started, sealed machine.
pub struct Machine {
    facts: BootFacts,
    calibration: clock::Calibration,
    cpu: CpuFacts,
    cores: Cores,
    code: CodeArena,
    disks: Vec<Disk>,
    boot_disk: Option<usize>,
    model_disk: Option<usize>,
    embedded: Option<EmbeddedModel>,
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
        let mut disks = Vec::new();
        for found in facts.disks.as_slice() {
            match VirtioDisk::new(found) {
                Ok(device) => disks.push(Disk { place: found.function, device }),
                Err(error) => notes.push(error.to_string()),
            }
        }
        mark(&mut facts.steps, "disks");
        // The clock runs meanwhile: what is left of its window is waited out here.
        let calibration = facts.clock.finish();
        disks.iter_mut().for_each(|disk| disk.device.set_clock(calibration.tsc_hz));
        mark(&mut facts.steps, "calibration");
        if !calibration.trusted {
            let why = if clock::emulated() { "the CPU is emulated" } else { "no two clocks agree" };
            notes.push(alloc::format!("cycle counts are not trusted: {why}"));
        }
        if facts.cores < facts.cores_listed {
            let why = match facts.options.cores {
                Some(_) => "kernel.cores says so",
                None if clock::emulated() => "emulated cores gain little (kernel.cores=N starts them)",
                None => "the others did not start",
            };
            notes.push(alloc::format!("{} of {} cores are used: {why}", facts.cores, facts.cores_listed));
        }
        for (left_out, what, most) in [
            (facts.acpi.apic_ids.left_out(), "cores", MAX_CPUS),
            (facts.disks.left_out(), "disks", pci::MAX_DISKS),
            ((facts.plan.left_out_bytes >> 20) as usize, "MiB of memory", (RAM_LIMIT >> 20) as usize),
        ] {
            if left_out > 0 {
                notes.push(alloc::format!("{left_out} {what} left out: this kernel uses up to {most}"));
            }
        }
        if !facts.can_nap {
            notes
                .push("the local APIC's timer does not count: this machine spins while it waits for disks".to_string());
        }
        if !cpu::has_no_execute() {
            notes.push("this CPU has no NX bit: data can be executed".to_string());
        }
        // A partition table or boot sector ends in 55 aa; anything else is a raw model file.
        let volume: Vec<bool> = disks.iter_mut().map(|d| ends_in_boot_signature(&mut d.device)).collect();
        let boot_disk = volume.iter().position(|&v| v);
        let model_disk = volume.iter().position(|&v| !v);
        mark(&mut facts.steps, "disk kinds");
        let isa = engine::isa::detect();
        let cpu =
            CpuFacts { brand: cpu::brand(), fingerprint: cpu::fingerprint(isa), hypervisor: cpu::hypervisor(), isa };
        // SAFETY: `early` mapped the plan's code range read-write here and read-execute at the alias.
        let code = unsafe { CodeArena::new(facts.plan.code) };
        let cores = Cores::new(facts.cores);
        mark(&mut facts.steps, "cpu");
        Machine { facts, calibration, cpu, cores, code, disks, boot_disk, model_disk, embedded: None, notes }
    }

    /// Puts a model file that is part of the image in the place of a model disk.
    pub fn with_embedded_model(mut self, file: &'static [u8]) -> Machine {
        self.embedded = Some(EmbeddedModel::new(file));
        self
    }

    /// The options text for the runtime, not interpreted.
    pub fn command_line(&self) -> &str {
        &self.facts.command_line
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

    /// The code arena, and the cores that must see what is published in it.
    pub fn code(&mut self) -> (&mut CodeArena, &Cores) {
        (&mut self.code, &self.cores)
    }

    /// The cores, by whom more can be asked than by [`Workers`].
    pub fn cores(&self) -> &Cores {
        &self.cores
    }

    /// Milliseconds from the entry of the image to now.
    pub fn uptime_ms(&self) -> f64 {
        let cycles = clock::tsc().saturating_sub(self.facts.entry_tsc);
        cycles as f64 * 1e3 / self.calibration.tsc_hz as f64
    }
}

impl Platform for Machine {
    fn clock(&self) -> Clock {
        let calibration = self.calibration;
        Clock { tsc_hz: calibration.tsc_hz, trusted: calibration.trusted, entry_tsc: self.facts.entry_tsc }
    }

    fn cpu(&self) -> &CpuFacts {
        &self.cpu
    }

    fn unix_time(&self) -> Option<u64> {
        rtc::unix_time()
    }

    fn print(&mut self, text: &str) {
        let _ = serial::COM1.lock().write_str(text);
    }

    fn send(&mut self, frame: &[u8]) {
        power::send_frame(frame);
    }

    fn disk(&mut self, which: WhichDisk) -> (Option<&mut dyn BlockDevice>, &dyn Workers) {
        let index = match which {
            WhichDisk::Boot => self.boot_disk,
            WhichDisk::Model => self.model_disk,
        };
        let disk = match &mut self.embedded {
            Some(embedded) if which == WhichDisk::Model => Some(embedded as &mut dyn BlockDevice),
            _ => index.and_then(|i| self.disks.get_mut(i)).map(|disk| &mut disk.device as &mut dyn BlockDevice),
        };
        (disk, &self.cores)
    }

    fn arena(&mut self, name: &'static str, len_bytes: usize) -> Result<&'static mut [u8], OutOfMemory> {
        memory::arena(name, len_bytes as u64).map_err(|e| OutOfMemory {
            name,
            need_bytes: e.need_bytes,
            have_bytes: e.have_bytes,
        })
    }

    /// Memory that did not come from [`Platform::arena`] is returned as it is, unprotected.
    fn freeze(&mut self, weights: &'static mut [u8]) -> &'static [u8] {
        let start = weights.as_ptr() as u64;
        let owned = memory::arenas().into_iter().find(|a| a.range.start == start);
        let weights: &'static [u8] = weights;
        if let Some(owned) = owned {
            let end = (start + weights.len() as u64).next_multiple_of(LARGE_PAGE_BYTES);
            let range = Range { start, end: end.min(owned.range.end) };
            let freeze = |range: Range| {
                // SAFETY: the only `&mut` to these pages came in as the argument and is a shared reference now; the
                // rest of the last page belongs to the same arena and was never handed out.
                let frozen = unsafe { gates::freeze(range) };
                assert_eq!(frozen, Ok(()), "an arena is whole 2 MiB pages of RAM");
            };
            freeze(range);
            // Only once the tables all share have changed do the cores drop what they remember of them: one that did so
            // earlier could read the old entries again.
            self.cores.run_on_each(&|_| freeze(Range { start: 0, end: 0 }));
        }
        weights
    }

    fn publish(&mut self, key: KernelKey, code: &[u8]) -> Result<Kernel, OutOfMemory> {
        let entry = self.code.publish(code, &self.cores).map_err(|full| OutOfMemory {
            name: "code",
            need_bytes: full.need_bytes,
            have_bytes: full.have_bytes,
        })?;
        // SAFETY: the code is mapped read-execute for the life of the boot; the rest is as `from_entry` says of publishers.
        Ok(unsafe { Kernel::from_entry(key, entry) })
    }

    fn call_guarded(&mut self, kernel: Kernel, args: KernelArgs<'_>) -> Result<(), KernelFault> {
        guard::call(kernel, args).map_err(|fault| KernelFault {
            vector: fault.vector,
            offset: fault.rip.checked_sub(kernel.entry_address() as u64).and_then(|o| u32::try_from(o).ok()),
        })
    }

    fn workers(&self) -> &dyn Workers {
        &self.cores
    }

    fn memory(&self) -> Vec<MemoryUse> {
        let heap = memory::heap_use();
        let (code_used, code_capacity) = self.code.used_and_capacity();
        let (stack_used, stack_capacity) = stack::used_and_capacity();
        let mut out = Vec::new();
        let mut row = |name, used_bytes, capacity_bytes| out.push(MemoryUse { name, used_bytes, capacity_bytes });
        for arena in memory::arenas() {
            row(arena.name, arena.len_bytes, arena.range.len_bytes());
        }
        row("heap", heap.peak_bytes, heap.capacity_bytes);
        if code_capacity > 0 {
            row("code", code_used, code_capacity);
        }
        row("stack", stack_used, stack_capacity);
        out
    }
}

fn ends_in_boot_signature(disk: &mut VirtioDisk) -> bool {
    let mut sector = [0u8; SECTOR_BYTES];
    disk.read(0, &mut sector).is_ok() && sector[510..] == [0x55, 0xaa] && !sector.starts_with(b"GGUF")
}
