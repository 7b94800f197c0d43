//! [`runtime::platform::Platform`] on Linux. With `fault`, `memory` and `threads` the only unsafe code of this crate.

mod fault;
mod file_disk;
mod memory;
mod threads;

pub use file_disk::FileDisk;

use engine::EngineError;
use engine::dispatch::{Kernel, KernelArgs, MAX_PARTS, guard};
use engine::workers::Workers;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use model::kernel::KernelKey;
use report::wire::Decoder;
use report::{Level, Message};
use runtime::RunError;
use runtime::platform::{Clock, CpuFacts, KernelFault, MemoryUse, OutOfMemory, Platform, WhichDisk};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant, SystemTime};
use storage::BlockDevice;

/// Of a limit on the process this much is left to everything that is no arena: buffers that the model is read through, and
/// what holds them to huge pages. Without it the next allocation, which cannot say what it was for, would end the process.
const OWN_BYTES: u64 = 64 << 20;

/// Threads that load a model where more than that may compute: memory is full with them, on any machine.
const LOADERS: usize = 8;

/// How long the TSC is timed where CPUID does not say how fast it runs. Somebody waits for an answer meanwhile.
const CALIBRATION: Duration = Duration::from_millis(2);

/// A Linux process as a machine.
pub struct Process {
    clock: Clock,
    cpu: CpuFacts,
    snapshot: Option<FileDisk>,
    model: Option<FileDisk>,
    code: memory::CodePages,
    arenas: Vec<MemoryUse>,
    threads: threads::Threads,
    /// The threads that load, where the process may use more CPUs than it computes on.
    loaders: Option<threads::Threads>,
    quiet: bool,
    /// Of the work that is under way, on a terminal.
    bar: Option<ProgressBar>,
}

impl Process {
    /// Takes over the process: fault handlers, code pages, `threads` threads (0: one per available core).
    ///
    /// # Errors
    /// [`RunError::Memory`] when there is no address space for compiled code; when the operating system gives no thread.
    pub fn start(
        entry_tsc: u64,
        threads: usize,
        model: Option<FileDisk>,
        snapshot: Option<FileDisk>,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        fault::install();
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = match threads {
            0 => {
                if cpus > MAX_PARTS {
                    print_note!("warning: {MAX_PARTS} of {cpus} CPUs are used: a model is cut into no more parts");
                }
                cpus.min(MAX_PARTS)
            }
            // Refused before they are started, as the plan of any model would.
            n if n > MAX_PARTS => {
                return Err(RunError::from(EngineError::Threads { threads: n, max: MAX_PARTS }).into());
            }
            n => n,
        };
        Ok(Self {
            clock: Clock { tsc_hz: tsc_hz(), trusted: true, entry_tsc },
            cpu: cpu_facts(),
            snapshot,
            model,
            code: code_pages().map_err(RunError::Memory)?,
            arenas: Vec::new(),
            threads: threads::Threads::start(threads).map_err(|reason| {
                anyhow::anyhow!("the system gives no {threads} threads: {reason}; ask for fewer (threads=, --threads)")
            })?,
            // Only a help, and threads take address space: without them, those that compute load.
            loaders: (cpus.min(LOADERS) > threads && memory_limit().is_none())
                .then(|| threads::Threads::unbound(cpus.min(LOADERS)))
                .and_then(Result::ok),
            quiet,
            bar: None,
        })
    }
}

/// Address space for compiled code, where that leaves what the process needs besides. It is no memory before code is in it.
fn code_pages() -> Result<memory::CodePages, OutOfMemory> {
    let (need_bytes, have_bytes) = (memory::CODE_ARENA_BYTES as u64, left_of(memory::Limit::AddressSpace));
    let error = OutOfMemory { name: "code", need_bytes, have_bytes };
    if need_bytes > have_bytes { Err(error) } else { memory::CodePages::reserve().map_err(|_| error) }
}

/// TSC frequency: CPUID where it says, else timed against the monotonic clock.
fn tsc_hz() -> u64 {
    let cpuid = raw_cpuid::CpuId::new();
    if let Some(hz) = cpuid.get_tsc_info().and_then(|info| info.tsc_frequency()) {
        return hz;
    }
    let (start, start_tsc) = moment();
    std::thread::sleep(CALIBRATION);
    let (end, end_tsc) = moment();
    (end_tsc.wrapping_sub(start_tsc) as f64 / (end - start).as_secs_f64()) as u64
}

/// The time and the TSC at the same moment: of several readings the one with the least between its two looks at the TSC,
/// some tens of nanoseconds, so that a few milliseconds apart they tell the frequency to some ten parts in a million.
fn moment() -> (Instant, u64) {
    let reading = |_| {
        let (before, time, after) = (engine::cycles(), Instant::now(), engine::cycles());
        (after.wrapping_sub(before), time, before)
    };
    let (width, time, before) = (0..8).map(reading).min_by_key(|reading| reading.0).expect("there are eight");
    (time, before.wrapping_add(width / 2))
}

fn cpu_facts() -> CpuFacts {
    let cpuid = raw_cpuid::CpuId::new();
    let vendor = cpuid.get_vendor_info().map_or_else(String::new, |v| v.as_str().to_owned());
    let brand = cpuid.get_processor_brand_string().map_or_else(|| vendor.clone(), |b| b.as_str().trim().to_owned());
    let hypervisor = cpuid.get_hypervisor_info().map(|h| format!("{:?}", h.identify()));
    let isa = engine::isa::detect();
    let signature = raw_cpuid::cpuid!(1).eax;
    CpuFacts { fingerprint: runtime::platform::cpu_fingerprint(&vendor, signature, isa), brand, hypervisor, isa }
}

impl Platform for Process {
    fn clock(&self) -> Clock {
        self.clock
    }

    fn cpu(&self) -> &CpuFacts {
        &self.cpu
    }

    fn unix_time(&self) -> Option<u64> {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok().map(|d| d.as_secs())
    }

    /// Where standard error cannot be written there is nobody to tell, and the work still counts.
    fn print(&mut self, text: &str) {
        if !self.quiet {
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }

    /// A bar on a terminal, lines elsewhere.
    fn progress(&mut self, what: &str, done: u64, total: u64) {
        if self.quiet || done >= total {
            if let Some(bar) = self.bar.take() {
                bar.finish_and_clear();
            }
        } else if std::io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(|| progress_bar(total));
            bar.set_message(what.to_owned());
            bar.set_position(done);
        } else {
            self.print(&format!("{what}: {} of {} MiB\n", done >> 20, total >> 20));
        }
    }

    /// Nobody listens to frames here, but a warning is for people even where text is left out.
    fn send(&mut self, frame: &[u8]) {
        if !self.quiet {
            return;
        }
        for message in Decoder::default().push(frame) {
            if let Ok(Message::Note { level: Level::Warning, text }) = message {
                print_note!("warning: {text}");
            }
        }
    }

    fn disk(&mut self, which: WhichDisk) -> (Option<&mut dyn BlockDevice>, &dyn Workers) {
        let disk = match which {
            WhichDisk::Boot => self.snapshot.as_mut(),
            WhichDisk::Model => self.model.as_mut(),
        };
        (disk.map(|disk| disk as &mut dyn BlockDevice), self.loaders.as_ref().unwrap_or(&self.threads))
    }

    fn arena(&mut self, name: &'static str, len_bytes: usize) -> Result<&'static mut [u8], OutOfMemory> {
        let have_bytes = available_bytes();
        let need_bytes = len_bytes as u64;
        let error = OutOfMemory { name, need_bytes, have_bytes };
        if need_bytes > have_bytes {
            return Err(error);
        }
        let arena = memory::map_arena(len_bytes).ok_or(error)?;
        self.arenas.push(MemoryUse { name, used_bytes: need_bytes, capacity_bytes: need_bytes });
        Ok(arena)
    }

    fn freeze(&mut self, weights: &'static mut [u8]) -> &'static [u8] {
        memory::freeze(weights)
    }

    fn publish(&mut self, key: KernelKey, code: &[u8]) -> Result<Kernel, OutOfMemory> {
        let have_bytes = (memory::CODE_ARENA_BYTES - self.code.used_bytes()) as u64;
        let entry =
            self.code.publish(code).ok_or(OutOfMemory { name: "code", need_bytes: code.len() as u64, have_bytes })?;
        // SAFETY: the pages are never unmapped or rewritten; the rest is as `from_entry` says of publishers.
        Ok(unsafe { Kernel::from_entry(key, entry.as_ptr()) })
    }

    fn call_guarded(&mut self, kernel: Kernel, args: KernelArgs<'_>) -> Result<(), KernelFault> {
        guard::call(kernel, args).map_err(|fault| KernelFault {
            vector: fault.vector,
            offset: fault.rip.checked_sub(kernel.entry_address() as u64).and_then(|offset| u32::try_from(offset).ok()),
        })
    }

    fn workers(&self) -> &dyn Workers {
        &self.threads
    }

    fn memory(&self) -> Vec<MemoryUse> {
        let mut out = self.arenas.clone();
        out.push(MemoryUse {
            name: "code",
            used_bytes: self.code.used_bytes() as u64,
            capacity_bytes: memory::CODE_ARENA_BYTES as u64,
        });
        if let Some(peak) = proc_field("/proc/self/status", "VmHWM:") {
            out.push(MemoryUse { name: "process", used_bytes: peak, capacity_bytes: available_bytes().max(peak) });
        }
        out
    }
}

fn progress_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta}";
    bar.with_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Bytes this process can have: what the system can give without swapping, and what a limit on the process leaves of
/// that. Unlimited when neither says.
fn available_bytes() -> u64 {
    let system = proc_field("/proc/meminfo", "MemAvailable:").unwrap_or(u64::MAX);
    system.min(left_of(memory::Limit::AddressSpace)).min(left_of(memory::Limit::Data))
}

/// What a limit on the process leaves.
fn left_of(limit: memory::Limit) -> u64 {
    let used = match limit {
        memory::Limit::AddressSpace => "VmSize:",
        memory::Limit::Data => "VmData:",
    };
    memory::limit_bytes(limit).map_or(u64::MAX, |limit| {
        let used = proc_field("/proc/self/status", used).unwrap_or(0).saturating_add(OWN_BYTES);
        limit.saturating_sub(used)
    })
}

/// The limit on this process's memory, of which `ulimit` tells and a message should, too.
pub fn memory_limit() -> Option<u64> {
    [memory::Limit::AddressSpace, memory::Limit::Data].into_iter().filter_map(memory::limit_bytes).min()
}

/// A `NAME: N kB` field of a proc file, in bytes.
fn proc_field(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
