//! What the runtime needs of the machine under it. Implemented by `kernel` (bare metal) and `hosted` (Linux).

use alloc::string::String;
use alloc::vec::Vec;
use engine::dispatch::{Kernel, KernelArgs};
use engine::workers::Workers;
use model::kernel::KernelKey;
use storage::BlockDevice;

/// CPU facts that decide which kernels can run and that name the machine in a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuFacts {
    /// Brand string, or vendor when there is none.
    pub brand: String,
    /// Vendor, family, model, stepping and feature words: equal strings run the same machine code.
    pub fingerprint: String,
    /// Hypervisor vendor string, if CPUID reports one.
    pub hypervisor: Option<String>,
    /// Usable instruction sets (CPU and enabled state).
    pub isa: model::Isa,
}

/// The time-stamp counter as a clock.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Clock {
    /// Ticks per second.
    pub tsc_hz: u64,
    /// False where cycle counts say nothing about hardware (software emulation).
    pub trusted: bool,
    /// TSC at entry of the image or process.
    pub entry_tsc: u64,
}

/// A CPU fault raised by compiled code and recovered from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelFault {
    /// Exception vector (hosted: the one the signal stands for).
    pub vector: u8,
    /// Bytes from the kernel's first byte to the faulting instruction, unless that is before it. Whether it is inside is for
    /// who knows the kernel's length.
    pub offset: Option<u32>,
}

/// Memory use of one named region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryUse {
    /// Region name.
    pub name: &'static str,
    /// High-water mark in bytes.
    pub used_bytes: u64,
    /// Capacity in bytes.
    pub capacity_bytes: u64,
}

/// An arena could not be set aside.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "not enough memory for {name}: {need_bytes} bytes needed, {have_bytes} free; give the machine more memory or use a smaller model or context"
)]
pub struct OutOfMemory {
    /// What it was for.
    pub name: &'static str,
    /// Bytes asked for.
    pub need_bytes: u64,
    /// Bytes free.
    pub have_bytes: u64,
}

/// The disks of a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WhichDisk {
    /// The boot volume's device (FAT16, snapshot slots).
    Boot,
    /// The device that holds the raw model file from byte 0.
    Model,
}

/// The machine under the runtime.
pub trait Platform {
    /// Clock facts, calibrated.
    fn clock(&self) -> Clock;
    /// CPU facts.
    fn cpu(&self) -> &CpuFacts;
    /// Seconds since 1970, when a wall clock exists.
    fn unix_time(&self) -> Option<u64>;
    /// Writes text for people (COM1, or standard error when hosted).
    fn print(&mut self, text: &str);
    /// Says how far a long piece of work is: `done` of `total` bytes, the last time with all of them.
    fn progress(&mut self, what: &str, done: u64, total: u64) {
        if done < total {
            self.print(&alloc::format!("{what}: {} of {} MiB\n", done >> 20, total >> 20));
        }
    }
    /// Sends one encoded frame ([`report::wire`]); a no-op where nobody listens.
    fn send(&mut self, frame: &[u8]);
    /// One of the disks, if there is such a one, and the cores to work on what is read from it.
    fn disk(&mut self, which: WhichDisk) -> (Option<&mut dyn BlockDevice>, &dyn Workers);
    /// [`WhichDisk::Boot`].
    fn boot_disk(&mut self) -> Option<&mut dyn BlockDevice> {
        self.disk(WhichDisk::Boot).0
    }
    /// [`WhichDisk::Model`].
    fn model_disk(&mut self) -> Option<&mut dyn BlockDevice> {
        self.disk(WhichDisk::Model).0
    }
    /// Sets aside memory of any content for the life of the boot, 2 MiB aligned where the machine allows.
    ///
    /// # Errors
    /// [`OutOfMemory`] with the numbers.
    #[allow(clippy::mut_from_ref, reason = "the memory outlives the platform and is handed out once")]
    fn arena(&mut self, name: &'static str, len_bytes: usize) -> Result<&'static mut [u8], OutOfMemory>;
    /// Gives up `weights` for writing: from here on it is mapped read-only.
    fn freeze(&mut self, weights: &'static mut [u8]) -> &'static [u8];
    /// Copies machine code for `key` into executable memory.
    ///
    /// # Errors
    /// [`OutOfMemory`] when the code arena is full.
    fn publish(&mut self, key: KernelKey, code: &[u8]) -> Result<Kernel, OutOfMemory>;
    /// Runs `kernel` once, surviving a fault inside it.
    ///
    /// # Errors
    /// The fault.
    fn call_guarded(&mut self, kernel: Kernel, args: KernelArgs<'_>) -> Result<(), KernelFault>;
    /// The cores to compute on.
    fn workers(&self) -> &dyn Workers;
    /// Memory use for the report.
    fn memory(&self) -> Vec<MemoryUse>;
}

/// The text that names a CPU in snapshots: machine code made on one CPU runs on every other with the same text.
/// Family, model, stepping and instruction sets decide what may run and how fast it is; core counts and clocks do not.
pub fn cpu_fingerprint(vendor: &str, signature: u32, isa: model::Isa) -> String {
    alloc::format!("{vendor} {signature:08x} {isa:?}")
}
