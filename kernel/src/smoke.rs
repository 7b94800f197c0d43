//! `mode=smoke`: boots, looks around, prints one screen and ends. `qemu-runs` starts it to find out which accelerator works.

use crate::Machine;
use crate::platform::virtio::{REQUEST_BYTES, VirtioDisk};
use crate::platform::{clock, memory};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use report::ExitStatus;
use runtime::platform::Platform;
use storage::{BlockDevice, DeviceError, SECTOR_BYTES};

/// Most bytes read from a disk for one rate.
const RATE_BYTES: u64 = 64 << 20;
/// Longest time spent on one rate, in milliseconds.
const RATE_MS: u64 = 150;

/// Empty jobs given to the cores for one latency.
const JOBS: usize = 200;

/// Prints the screen. Passes unless a disk cannot be read.
pub fn run(machine: &mut Machine) -> ExitStatus {
    let boot_ms = machine.uptime_ms();
    rule("BareFlow smoke boot");
    machine_lines(machine, boot_ms);
    rule("memory");
    memory_lines(machine);
    rule("disks");
    let status = match disk_lines(machine) {
        Ok(()) => ExitStatus::Pass,
        Err(error) => {
            crate::println!("error: {error}");
            ExitStatus::Fatal
        }
    };
    for note in machine.notes() {
        crate::println!("note: {note}");
    }
    rule(&format!("{:.1} ms after entry", machine.uptime_ms()));
    status
}

fn rule(title: &str) {
    crate::println!("-- {title} {}", "-".repeat(76usize.saturating_sub(title.len())));
}

fn field(name: &str, value: &str) {
    crate::println!("{name:<12} {value}");
}

/// Median time of an empty job on all cores, each `gap_ms` after the one before.
fn job_us(machine: &Machine, gap_ms: u64) -> f64 {
    let tsc_hz = machine.calibration().tsc_hz;
    let mut cycles: Vec<u64> = (0..if gap_ms > 0 { JOBS / 10 } else { JOBS })
        .map(|_| {
            let start = clock::tsc();
            while clock::tsc() - start < gap_ms * tsc_hz / 1000 {
                core::hint::spin_loop();
            }
            let start = clock::tsc();
            machine.cores().run_on_each(&|_| {});
            clock::tsc() - start
        })
        .collect();
    cycles.sort_unstable();
    cycles[cycles.len() / 2] as f64 * 1e6 / tsc_hz as f64
}

fn mhz(hz: Option<u64>) -> String {
    hz.map_or_else(|| "-".to_string(), |hz| format!("{:.1}", hz as f64 / 1e6))
}

fn machine_lines(machine: &Machine, boot_ms: f64) {
    field("loader", machine.loader().name());
    field("options", machine.command_line());
    field("cpu", &machine.cpu().brand);
    field("isa", machine.cpu().isa.name());
    field("hypervisor", machine.cpu().hypervisor.as_deref().unwrap_or("none"));
    let facts = machine.boot_facts();
    field("cores", &format!("{} used, {} listed", machine.workers().count(), facts.cores_listed));
    if machine.workers().count() > 1 {
        let spinning = job_us(machine, 0);
        let parked = job_us(machine, 2);
        field("empty job", &format!("{spinning:.2} us, {parked:.1} us with parked cores (medians)"));
    }
    let c = machine.calibration();
    field(
        "tsc",
        &format!(
            "{:.1} MHz by {}, {}; pm {} pit {} cpuid {}",
            c.tsc_hz as f64 / 1e6,
            c.source,
            if c.trusted { "trusted" } else { "not trusted" },
            mhz(c.pm_hz),
            mhz(c.pit_hz),
            mhz(c.cpuid_hz)
        ),
    );
    field("unix time", &machine.unix_time().map_or_else(|| "-".to_string(), |t| t.to_string()));
    let firmware_ms = facts.entry_tsc as f64 * 1e3 / c.tsc_hz as f64;
    field("entry", &format!("TSC {} ({firmware_ms:.1} ms), boot took {boot_ms:.1} ms", facts.entry_tsc));
    step_line(machine);
}

fn step_line(machine: &Machine) {
    let facts = machine.boot_facts();
    let mut line = String::new();
    let mut start = facts.entry_tsc;
    for step in facts.steps.as_slice() {
        let ms = step.end_tsc.saturating_sub(start) as f64 * 1e3 / machine.calibration().tsc_hz as f64;
        start = step.end_tsc;
        line += &format!("{} {ms:.1}, ", step.name);
    }
    field("steps, ms", line.trim_end_matches(", "));
}

fn memory_lines(machine: &Machine) {
    let facts = machine.boot_facts();
    for entry in facts.start.map.as_slice() {
        let kind = if entry.kind == 1 { "usable" } else { "reserved" };
        crate::println!(
            "{:#014x}..{:#014x} {:>10} KiB  {kind}",
            entry.range.start,
            entry.range.end,
            entry.range.len_bytes() >> 10
        );
    }
    let heap = memory::heap_use();
    crate::println!(
        "free {} MiB, code arena {} MiB, page tables {} KiB, heap {} KiB in {} allocations",
        memory::free_bytes() >> 20,
        facts.plan.code.len_bytes() >> 20,
        facts.table_frames * 4,
        heap.peak_bytes >> 10,
        heap.allocations
    );
}

fn disk_lines(machine: &mut Machine) -> Result<(), DeviceError> {
    let tsc_hz = machine.calibration().tsc_hz;
    let (boot, model) = (machine.boot_disk_index(), machine.model_disk_index());
    if machine.disks().is_empty() {
        crate::println!("none");
    }
    for (index, disk) in machine.disks().iter_mut().enumerate() {
        let role = match Some(index) {
            i if i == boot => "boot volume",
            i if i == model => "raw model",
            _ => "unused",
        };
        let access = if disk.device.read_only() { "read-only" } else { "read-write" };
        crate::println!("{} {:>8} KiB {access:<10} {role}", disk.place, disk.device.len_bytes() >> 10);
        let serial_small = rate(&mut disk.device, tsc_hz, 64 << 10)?;
        let serial_large = rate(&mut disk.device, tsc_hz, REQUEST_BYTES)?;
        let stream = stream_rate(&mut disk.device, tsc_hz)?;
        crate::println!(
            "        read MB/s: {serial_small:.0} at 64 KiB, {serial_large:.0} at {} KiB, {stream:.0} streamed",
            REQUEST_BYTES >> 10
        );
    }
    Ok(())
}

/// MB/s of one request of `bytes` after the other from the start of the disk.
fn rate(disk: &mut VirtioDisk, tsc_hz: u64, bytes: usize) -> Result<f64, DeviceError> {
    let mut buffer = vec![0u8; bytes];
    let total = disk.len_bytes().min(RATE_BYTES);
    let start = clock::tsc();
    let mut at = 0u64;
    while at < total && clock::tsc() - start < tsc_hz / 1000 * RATE_MS {
        let now = (total - at).min(bytes as u64) as usize;
        disk.read(at / SECTOR_BYTES as u64, &mut buffer[..now])?;
        at += now as u64;
    }
    Ok(mb_s(at, clock::tsc() - start, tsc_hz))
}

/// MB/s of [`BlockDevice::stream`] over the same bytes.
fn stream_rate(disk: &mut VirtioDisk, tsc_hz: u64) -> Result<f64, DeviceError> {
    let total = disk.len_bytes().min(RATE_BYTES);
    let start = clock::tsc();
    let mut got = 0u64;
    disk.stream(0, total, &mut |chunk| got += chunk.len() as u64)?;
    Ok(mb_s(got, clock::tsc() - start, tsc_hz))
}

fn mb_s(bytes: u64, cycles: u64, tsc_hz: u64) -> f64 {
    bytes as f64 / 1e6 * tsc_hz as f64 / cycles.max(1) as f64
}
