//! `mode=selftest`: what only the real machine can show, as a static table.
//!
//! Each test does the forbidden thing on purpose and looks for the exact exception, or compares two sources of the same
//! fact. One [`report::Message::Test`] each; the boot passes only if all pass.

use crate::Machine;
use crate::boot::area::{AREA_FAULT_STACK, AREA_STACK, AREA_TSS};
use crate::boot::gates;
#[cfg(feature = "jit")]
use crate::boot::plan::CODE_ALIAS;
use crate::platform::traps::probe::{self, Caught};
use crate::platform::{clock, memory, power, rtc, virtio};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};
use engine::workers::Workers;
use report::{ExitStatus, Message, TestOutcome};
use runtime::platform::Platform;
use storage::{BlockDevice, DeviceError, SECTOR_BYTES};

/// What went wrong.
type Failure = String;

/// A test: its name, what it does, and what it needs.
type Test = (&'static str, fn(&mut Machine) -> Result<(), Failure>, Needs);

/// What a machine must have for a test to say anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Needs {
    /// Nothing but itself.
    Nothing,
    /// More than one core at work.
    Cores,
    /// A disk.
    Disk,
    /// A disk that cannot be written.
    ReadOnlyDisk,
    /// A boot disk that may be written, and `kernel.scratch_lba`.
    Scratch,
}

impl Needs {
    /// What is missing, for people.
    fn missing(self, machine: &mut Machine) -> Option<&'static str> {
        let (there, missing) = match self {
            Needs::Nothing => (true, ""),
            Needs::Cores => (machine.workers().count() > 1, "one core is at work"),
            Needs::Disk => (!machine.disks().is_empty(), "no disk"),
            Needs::ReadOnlyDisk => (machine.disks().iter().any(|d| d.device.read_only()), "no read-only disk"),
            Needs::Scratch => (machine.boot_facts().options.scratch_lba.is_some(), "kernel.scratch_lba is not set"),
        };
        (!there).then_some(missing)
    }
}

/// Every test, in the order they run.
pub const TESTS: &[Test] = &[
    ("null_page_is_unmapped", null_page_is_unmapped, Needs::Nothing),
    ("text_cannot_be_written", text_cannot_be_written, Needs::Nothing),
    ("constants_cannot_be_written", constants_cannot_be_written, Needs::Nothing),
    ("data_and_stack_cannot_be_executed", data_and_stack_cannot_be_executed, Needs::Nothing),
    ("stack_guards_are_unmapped", stack_guards_are_unmapped, Needs::Nothing),
    ("page_tables_are_out_of_reach", page_tables_are_out_of_reach, Needs::Nothing),
    ("ring_0_is_out_of_reach", ring_0_is_out_of_reach, Needs::Nothing),
    ("the_seal_stays_closed", the_seal_stays_closed, Needs::Nothing),
    ("ports_off_the_list_fault", ports_off_the_list_fault, Needs::Nothing),
    ("privileged_instructions_fault", privileged_instructions_fault, Needs::Nothing),
    ("undefined_instruction_is_survived", undefined_instruction_is_survived, Needs::Nothing),
    #[cfg(feature = "jit")]
    ("code_arena_is_write_xor_execute", code_arena_is_write_xor_execute, Needs::Nothing),
    #[cfg(feature = "jit")]
    ("published_code_runs_on_every_core", published_code_runs_on_every_core, Needs::Cores),
    #[cfg(feature = "jit")]
    ("a_faulting_kernel_is_survived", a_faulting_kernel_is_survived, Needs::Nothing),
    ("a_frozen_arena_cannot_be_written", a_frozen_arena_cannot_be_written, Needs::Nothing),
    ("arena_exhaustion_is_an_error", arena_exhaustion_is_an_error, Needs::Nothing),
    ("heap_survives_fragmentation", heap_survives_fragmentation, Needs::Nothing),
    ("memory_functions_agree_with_loops", memory_functions_agree_with_loops, Needs::Nothing),
    ("workers_run_every_job_once", workers_run_every_job_once, Needs::Cores),
    ("parked_workers_wake_up", parked_workers_wake_up, Needs::Cores),
    ("naps_end", naps_end, Needs::Nothing),
    ("tsc_agrees_with_the_wall_clock", tsc_agrees_with_the_wall_clock, Needs::Nothing),
    ("disk_reads_agree", disk_reads_agree, Needs::Disk),
    ("disk_range_is_checked", disk_range_is_checked, Needs::Disk),
    ("read_only_disk_refuses_writes", read_only_disk_refuses_writes, Needs::ReadOnlyDisk),
    ("scratch_sectors_read_back", scratch_sectors_read_back, Needs::Scratch),
];

/// Runs the table.
pub fn run(machine: &mut Machine) -> ExitStatus {
    let (mut failed, mut skipped) = (0, 0);
    for (name, test, needs) in TESTS {
        let outcome = match needs.missing(machine) {
            Some(missing) => TestOutcome::Skipped(missing.to_string()),
            None => test(machine).map_or_else(TestOutcome::Failed, |()| TestOutcome::Passed),
        };
        match &outcome {
            TestOutcome::Passed => crate::println!("ok      {name}"),
            TestOutcome::Failed(why) => {
                failed += 1;
                crate::println!("FAILED  {name}: {why}");
            }
            TestOutcome::Skipped(why) => {
                skipped += 1;
                crate::println!("skipped {name}: {why}");
            }
        }
        power::send(&Message::Test { name: (*name).to_string(), outcome });
    }
    let passed = TESTS.len() - failed - skipped;
    crate::println!("{passed} of {} self-tests passed, {skipped} skipped", TESTS.len());
    if failed == 0 { ExitStatus::Pass } else { ExitStatus::TestFailed }
}

/// Page-fault error code bits: the page was present; a write; from ring 3; an instruction fetch.
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const FETCH: u64 = 16;

fn expect_page_fault(what: &str, got: Result<(), Caught>, error_code: u64, address: u64) -> Result<(), Failure> {
    let want = Caught { vector: 14, error_code, address };
    match got {
        Err(caught) if caught == want => Ok(()),
        other => Err(format!("{what}: expected {want:x?}, got {other:x?}")),
    }
}

fn expect_vector(what: &str, got: Result<(), Caught>, vector: u8) -> Result<(), Failure> {
    match got {
        Err(caught) if caught.vector == vector => Ok(()),
        other => Err(format!("{what}: expected vector {vector}, got {other:x?}")),
    }
}

fn expect_ok(what: &str, got: Result<(), Caught>) -> Result<(), Failure> {
    got.map_err(|caught| format!("{what}: unexpected {caught:x?}"))
}

/// A page fault on a fetch has the fetch bit only where NX is on; where it is off, data can be executed and the test fails.
fn expect_no_execute(what: &str, address: u64) -> Result<(), Failure> {
    // SAFETY: the byte at `address` is a `ret` (checked by every caller), so even a successful call does nothing.
    expect_page_fault(what, unsafe { probe::execute(address) }, PRESENT | USER | FETCH, address)
}

/// The machine code of `ret`.
const RET: u8 = 0xc3;
static CONSTANT: [u8; 16] = [RET; 16];
static VARIABLE: AtomicUsize = AtomicUsize::new(RET as usize);

fn null_page_is_unmapped(_: &mut Machine) -> Result<(), Failure> {
    expect_page_fault("reading 0", probe::read(0), USER, 0)?;
    expect_page_fault("reading 0xff8", probe::read(0xff8), USER, 0xff8)
}

fn text_cannot_be_written(_: &mut Machine) -> Result<(), Failure> {
    let address = run as *const () as u64;
    expect_ok("reading text", probe::read(address))?;
    expect_page_fault("writing text", probe::write(address), PRESENT | WRITE | USER, address)
}

fn constants_cannot_be_written(_: &mut Machine) -> Result<(), Failure> {
    let address = CONSTANT.as_ptr() as u64;
    expect_ok("reading a constant", probe::read(address))?;
    expect_page_fault("writing a constant", probe::write(address), PRESENT | WRITE | USER, address)?;
    expect_no_execute("executing a constant", address)
}

fn data_and_stack_cannot_be_executed(_: &mut Machine) -> Result<(), Failure> {
    let on_stack = core::hint::black_box([RET; 16]);
    let on_heap = Box::new([RET; 16]);
    expect_no_execute("executing a variable", VARIABLE.as_ptr() as u64)?;
    expect_no_execute("executing the stack", on_stack.as_ptr() as u64)?;
    expect_no_execute("executing the heap", on_heap.as_ptr() as u64)
}

fn stack_guards_are_unmapped(_: &mut Machine) -> Result<(), Failure> {
    for (what, stack) in [("main stack", AREA_STACK), ("fault stack", AREA_FAULT_STACK)] {
        let below = gates::cpu0_area() + stack - 8;
        expect_ok(what, probe::read(below + 8))?;
        expect_page_fault(what, probe::write(below), USER, below)?;
    }
    let end = gates::image_end();
    expect_page_fault("after the image", probe::read(end), USER, end)
}

fn page_tables_are_out_of_reach(machine: &mut Machine) -> Result<(), Failure> {
    let tables = machine.boot_facts().plan.tables;
    for address in [tables.start, tables.start + 4096, tables.end - 8] {
        expect_page_fault("reading a page table", probe::read(address), PRESENT | USER, address)?;
    }
    Ok(())
}

fn ring_0_is_out_of_reach(_: &mut Machine) -> Result<(), Failure> {
    let places = [
        ("ring-0 code", gates::ring0_text_start()),
        ("descriptor tables", gates::ring0_data_start()),
        ("TSS", gates::cpu0_area() + AREA_TSS),
        ("interrupt stack", gates::cpu0_area() + crate::boot::area::AREA_IST),
    ];
    for (what, address) in places {
        expect_page_fault(what, probe::read(address), PRESENT | USER, address)?;
    }
    Ok(())
}

fn the_seal_stays_closed(_: &mut Machine) -> Result<(), Failure> {
    match probe::seal_again() {
        Err(gates::Refused) => Ok(()),
        Ok(()) => Err("ring 0 sealed a second time".to_string()),
    }
}

fn ports_off_the_list_fault(_: &mut Machine) -> Result<(), Failure> {
    expect_ok("port 0x61", probe::port_in(0x61))?;
    // Interrupt controller, keyboard controller, fw_cfg, and the last port, whose bit is the bitmap's last.
    for port in [0x21, 0x64, 0x511, 0xffff] {
        expect_vector(&format!("port {port:#x}"), probe::port_in(port), 13)?;
    }
    Ok(())
}

fn privileged_instructions_fault(_: &mut Machine) -> Result<(), Failure> {
    expect_vector("reading CR3", probe::privileged(), 13)
}

fn undefined_instruction_is_survived(_: &mut Machine) -> Result<(), Failure> {
    for _ in 0..100 {
        expect_vector("ud2", probe::undefined(), 6)?;
    }
    Ok(())
}

#[cfg(feature = "jit")]
fn code_arena_is_write_xor_execute(machine: &mut Machine) -> Result<(), Failure> {
    let (code, workers) = machine.code();
    let entry = code.publish(&[RET; 64], workers).map_err(|full| format!("{full:?}"))? as u64;
    let alias = code.writable_alias(entry as *const u8).ok_or("no writable alias")?;
    if entry == alias || entry < CODE_ALIAS {
        return Err(format!("executable at {entry:#x}, writable at {alias:#x}"));
    }
    // SAFETY: the code is a `ret`.
    expect_ok("executing published code", unsafe { probe::execute(entry) })?;
    expect_page_fault("writing the executable alias", probe::write(entry), PRESENT | WRITE | USER, entry)?;
    expect_ok("writing the writable alias", probe::write(alias))?;
    expect_no_execute("executing the writable alias", alias)
}

#[cfg(feature = "jit")]
fn published_code_runs_on_every_core(machine: &mut Machine) -> Result<(), Failure> {
    // Each version is published at a new place and called at once on all cores: mov eax, N; ret.
    for n in 0..50u32 {
        let mut bytes = vec![0xb8];
        bytes.extend(n.to_le_bytes());
        bytes.push(RET);
        let (code, cores) = machine.code();
        let entry = code.publish(&bytes, cores).map_err(|full| format!("{full:?}"))?;
        // SAFETY: the six bytes just published are a function of this type.
        let function = unsafe { core::mem::transmute::<*const u8, extern "sysv64" fn() -> u32>(entry) };
        let wrong = AtomicUsize::new(0);
        machine.cores().run_on_each(&|_| {
            if function() != n {
                wrong.fetch_add(1, Ordering::Relaxed);
            }
        });
        if wrong.load(Ordering::Relaxed) > 0 {
            return Err(format!("version {n}: {} cores got another value", wrong.load(Ordering::Relaxed)));
        }
    }
    Ok(())
}

#[cfg(feature = "jit")]
fn a_faulting_kernel_is_survived(machine: &mut Machine) -> Result<(), Failure> {
    use engine::dispatch::{Kernel, KernelArgs, guard};
    use model::kernel::{DType, KernelKey, Op};
    let key = KernelKey { op: Op::Matmul, dtype: DType::F32, m: 1, n: 32, k: 1 };
    #[repr(align(64))]
    struct Weights([u8; 128]);
    let (x, w, mut y) = ([0u8; 4], Weights([0; 128]), [0f32; 32]);
    // mov rax, [0] in its 64-bit form; hlt; ud2: page fault, general protection, invalid opcode.
    let null_read: &[u8] = &[0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0, RET];
    for (code, vector) in [(null_read, 14u8), (&[0xf4, RET], 13), (&[0x90, 0x0f, 0x0b], 6), (&[RET], 0)] {
        let (arena, cores) = machine.code();
        let entry = arena.publish(code, cores).map_err(|full| format!("{full:?}"))?;
        // SAFETY: the code faults or returns, and touches no memory that exists.
        let kernel = unsafe { Kernel::from_entry(key, entry) };
        let got = guard::call(kernel, KernelArgs { x: &x, w: &w.0, y: &mut y, ldy: 32, rows: 1 });
        let offset = u64::from(vector == 6);
        match got {
            Ok(()) if vector == 0 => {}
            Err(fault) if vector != 0 && fault.vector == vector && fault.rip == entry as u64 + offset => {}
            other => return Err(format!("expected vector {vector} at {entry:p} + {offset}, got {other:x?}")),
        }
    }
    Ok(())
}

fn a_frozen_arena_cannot_be_written(machine: &mut Machine) -> Result<(), Failure> {
    let arena = machine.arena("selftest", 3 << 20).map_err(|e| format!("{e:?}"))?;
    let start = arena.as_ptr() as u64;
    if !start.is_multiple_of(2 << 20) {
        return Err(format!("arena at {start:#x} is not 2 MiB aligned"));
    }
    arena[0] = 7;
    // Written just before, so that a stale translation would show.
    expect_ok("writing before", probe::write(start + (2 << 20)))?;
    let frozen = machine.freeze(arena);
    for offset in [0, (2 << 20) - 1, 2 << 20, (3 << 20) - 1] {
        let address = start + offset;
        expect_page_fault("writing after", probe::write(address), PRESENT | WRITE | USER, address)?;
    }
    if frozen[0] != 7 { Err("the content changed".to_string()) } else { Ok(()) }
}

fn arena_exhaustion_is_an_error(machine: &mut Machine) -> Result<(), Failure> {
    for len in [usize::MAX, 1 << 45] {
        match machine.arena("too large", len) {
            Err(e) if e.need_bytes == len as u64 && e.have_bytes > 0 && e.have_bytes < 1 << 45 => {}
            Err(e) => return Err(format!("wrong numbers: {e:?}")),
            Ok(_) => return Err(format!("an arena of {len} bytes was handed out")),
        }
    }
    // After the refusals there is still memory.
    machine.arena("selftest small", 1).map(|_| ()).map_err(|e| format!("{e:?}"))
}

fn heap_survives_fragmentation(_: &mut Machine) -> Result<(), Failure> {
    let before = memory::heap_use().used_bytes;
    let mut pieces: Vec<Option<Vec<u8>>> = Vec::new();
    let mut random = 1u64;
    for round in 0..4000usize {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let len = (random >> 33) as usize % 3000 + 1;
        pieces.push(Some(vec![(round % 251) as u8; len]));
        let victim = (random >> 20) as usize % pieces.len();
        if let Some(piece) = pieces[victim].take() {
            let value = (victim % 251) as u8;
            if piece.iter().any(|&b| b != value) {
                return Err(format!("allocation {victim} holds foreign bytes"));
            }
        }
    }
    drop(pieces);
    let after = memory::heap_use().used_bytes;
    if after == before { Ok(()) } else { Err(format!("{before} bytes in use before, {after} after")) }
}

fn memory_functions_agree_with_loops(_: &mut Machine) -> Result<(), Failure> {
    let source: Vec<u8> = (0..600u32).map(|i| (i * 7 % 251) as u8).collect();
    for len in (0..140).chain([255, 256, 257, 511]) {
        for offset in [0, 1, 7, 16, 33] {
            for distance in [0usize, 1, 5, 16, 40] {
                // copy_within is memmove, both ways; the expectation is built byte by byte.
                for (from, to) in [(offset, offset + distance), (offset + distance, offset)] {
                    let mut got = source.clone();
                    got.copy_within(from..from + len, to);
                    let want: Vec<u8> = (0..source.len())
                        .map(|i| if (to..to + len).contains(&i) { source[i - to + from] } else { source[i] })
                        .collect();
                    // black_box keeps the comparison from becoming the same memcmp that is under test.
                    if let Some(at) = (0..want.len()).find(|&i| core::hint::black_box(got[i]) != want[i]) {
                        return Err(format!("memmove of {len} from {from} to {to} is wrong at {at}"));
                    }
                }
            }
            let mut filled = source.clone();
            filled[offset..offset + len].fill(0xa5);
            let wrong = (0..filled.len()).find(|&i| {
                let want = if (offset..offset + len).contains(&i) { 0xa5 } else { source[i] };
                core::hint::black_box(filled[i]) != want
            });
            if let Some(at) = wrong {
                return Err(format!("memset of {len} at {offset} is wrong at {at}"));
            }
        }
        let mut other = source[..len].to_vec();
        for at in 0..len {
            other[at] ^= 0x80;
            let want = source[at].cmp(&other[at]);
            if source[..len].cmp(&other[..]) != want || source[..len] == other[..] {
                return Err(format!("memcmp of {len} misses a difference at {at}"));
            }
            other[at] ^= 0x80;
        }
        if source[..len] != other[..] {
            return Err(format!("memcmp of {len} equal bytes says they differ"));
        }
    }
    Ok(())
}

fn workers_run_every_job_once(machine: &mut Machine) -> Result<(), Failure> {
    let cores = machine.cores();
    const ROUNDS: usize = 20_000;
    // As often as not the boot CPU has nothing to do and takes the other cores' shares, if they let it.
    let uneven = |job: &(dyn Fn(usize) + Sync)| {
        for round in 0..ROUNDS {
            let share = |index: usize| {
                for _ in 0..index * (round % 2) * 50 {
                    core::hint::spin_loop();
                }
                job(index);
            };
            cores.run(&share);
        }
    };
    let each = |job: &(dyn Fn(usize) + Sync)| (0..ROUNDS).for_each(|_| cores.run_on_each(job));
    for (name, run) in [("run", &uneven as &dyn Fn(&(dyn Fn(usize) + Sync))), ("run_on_each", &each)] {
        let counts: Vec<AtomicUsize> = (0..cores.count()).map(|_| AtomicUsize::new(0)).collect();
        run(&|index| {
            counts[index].fetch_add(1, Ordering::Relaxed);
        });
        if let Some(i) = counts.iter().position(|c| c.load(Ordering::Relaxed) != ROUNDS) {
            return Err(format!("{name}: share {i} was done {} of {ROUNDS} times", counts[i].load(Ordering::Relaxed)));
        }
    }
    Ok(())
}

fn parked_workers_wake_up(machine: &mut Machine) -> Result<(), Failure> {
    let ms = machine.calibration().tsc_hz / 1000;
    let cores = machine.cores();
    for round in 0..100u64 {
        // Gaps around the time after which a core parks, so that some jobs meet it just then.
        let start = clock::tsc();
        while clock::tsc() - start < ms * (round % 12) / 4 {
            core::hint::spin_loop();
        }
        let ran = AtomicUsize::new(0);
        cores.run_on_each(&|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        let ran = ran.load(Ordering::Relaxed);
        if ran != cores.count() {
            return Err(format!("round {round}: {ran} of {} workers ran", cores.count()));
        }
    }
    Ok(())
}

/// A nap that ends too late is the host's doing; one that never does ends the boot by its deadline.
fn naps_end(_: &mut Machine) -> Result<(), Failure> {
    const NAPS: u64 = 50;
    let start = clock::tsc();
    for n in 0..NAPS {
        gates::nap().map_err(|refused| format!("nap {n}: {refused}"))?;
    }
    // A wake-up left over from an earlier test ends one of them at once.
    let slept = clock::tsc() - start;
    let least = (NAPS - 1) * gates::NAP_CYCLES / 2;
    if slept < least { Err(format!("{NAPS} naps took {slept} cycles, expected at least {least}")) } else { Ok(()) }
}

fn tsc_agrees_with_the_wall_clock(machine: &mut Machine) -> Result<(), Failure> {
    let tsc_hz = machine.calibration().tsc_hz;
    let Some(first) = rtc::unix_time() else { return Err("no wall clock".to_string()) };
    if !(1_700_000_000..4_102_444_800).contains(&first) {
        return Err(format!("the wall clock says {first}, which is before 2023 or after 2100"));
    }
    // From one change of the second to the next.
    let change = |from: u64| {
        let start = clock::tsc();
        loop {
            match rtc::unix_time() {
                Some(now) if now != from => return Ok((now, clock::tsc())),
                _ if clock::tsc() - start > 4 * tsc_hz => return Err("the wall clock stands still".to_string()),
                _ => {}
            }
        }
    };
    let (second, start) = change(first)?;
    let (third, end) = change(second)?;
    let by_tsc = (end - start) as f64 / tsc_hz as f64;
    let by_rtc = (third - second) as f64;
    // The RTC is polled through slow ports on hosts that may be busy: it only has to be about right.
    if (by_tsc - by_rtc).abs() < 0.3 {
        Ok(())
    } else {
        Err(format!("{by_rtc} s by the wall clock, {by_tsc:.3} s by the TSC"))
    }
}

fn disk_reads_agree(machine: &mut Machine) -> Result<(), Failure> {
    for disk in machine.disks() {
        // More requests than are in flight, and a bit, so that the stream wraps around its buffers.
        let wrapping = (virtio::DEPTH + 1) * virtio::REQUEST_BYTES + 3 * SECTOR_BYTES;
        let len = disk.device.len_bytes().min(wrapping as u64);
        let mut whole = vec![0u8; len as usize];
        disk.device.read(0, &mut whole).map_err(|e| e.to_string())?;
        // Read ahead: nothing, what comes, too little of it, something else.
        for (lba, ahead_bytes) in [(0, 0), (0, len), (0, SECTOR_BYTES as u64), (1, len - SECTOR_BYTES as u64)] {
            disk.device.read_ahead(lba, ahead_bytes);
            let mut at = 0;
            let mut wrong = None;
            disk.device
                .stream(0, len, &mut |chunk| {
                    if whole.get(at..at + chunk.len()) != Some(chunk) {
                        wrong.get_or_insert(at);
                    }
                    at += chunk.len();
                })
                .map_err(|e| e.to_string())?;
            if at as u64 != len || wrong.is_some() {
                return Err(format!(
                    "{}: after reading ahead {ahead_bytes} bytes from sector {lba}, stream gave {at} of {len} bytes, first difference {wrong:?}",
                    disk.place
                ));
            }
        }
        disk.device.read_ahead(0, len);
        let mut sector = [0u8; SECTOR_BYTES];
        for lba in [0, 1, len / SECTOR_BYTES as u64 - 1] {
            disk.device.read(lba, &mut sector).map_err(|e| e.to_string())?;
            let start = lba as usize * SECTOR_BYTES;
            if sector[..] != whole[start..start + SECTOR_BYTES] {
                return Err(format!("{}: sector {lba} differs from the large read", disk.place));
            }
        }
    }
    Ok(())
}

fn disk_range_is_checked(machine: &mut Machine) -> Result<(), Failure> {
    for disk in machine.disks() {
        let end = disk.device.len_bytes() / SECTOR_BYTES as u64;
        let want = DeviceError::OutOfRange { lba: end, sectors: 1, device_sectors: end };
        let mut sector = [0u8; SECTOR_BYTES];
        let got = disk.device.read(end, &mut sector);
        if got != Err(want) {
            return Err(format!("{}: reading past the end gave {got:?}", disk.place));
        }
        let got = disk.device.read(0, &mut sector[..100]);
        if got != Err(DeviceError::Unaligned { len_bytes: 100 }) {
            return Err(format!("{}: reading 100 bytes gave {got:?}", disk.place));
        }
    }
    Ok(())
}

fn read_only_disk_refuses_writes(machine: &mut Machine) -> Result<(), Failure> {
    for disk in machine.disks().iter_mut().filter(|d| d.device.read_only()) {
        let got = disk.device.write(0, &[0; SECTOR_BYTES]);
        if got != Err(DeviceError::ReadOnly { lba: 0 }) {
            return Err(format!("{}: {got:?}", disk.place));
        }
    }
    Ok(())
}

/// Writes, reads back and restores sectors of the boot disk, only where `kernel.scratch_lba` allows it.
fn scratch_sectors_read_back(machine: &mut Machine) -> Result<(), Failure> {
    const SECTORS: usize = 2 * 2048 + 3; // over 2 MiB: three requests, the last one short
    let lba = machine.boot_facts().options.scratch_lba.ok_or("kernel.scratch_lba is not set")?;
    let index = machine.boot_disk_index().ok_or("no boot disk")?;
    let disk = &mut machine.disks()[index].device;
    let mut original = vec![0u8; SECTORS * SECTOR_BYTES];
    disk.read(lba, &mut original).map_err(|e| e.to_string())?;
    let pattern: Vec<u8> = original.iter().enumerate().map(|(i, b)| !b ^ (i / 512) as u8).collect();
    disk.write(lba, &pattern).map_err(|e| e.to_string())?;
    disk.flush().map_err(|e| e.to_string())?;
    let mut back = vec![0u8; pattern.len()];
    disk.read(lba, &mut back).map_err(|e| e.to_string())?;
    disk.write(lba, &original).map_err(|e| e.to_string())?;
    disk.flush().map_err(|e| e.to_string())?;
    match back.iter().zip(&pattern).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("byte {at} read back as {:#x}, written as {:#x}", back[at], pattern[at])),
    }
}
