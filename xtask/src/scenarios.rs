//! Boots of the whole system under QEMU, each with one thing arranged and its consequences checked.
//!
//! All run under TCG on a tiny model made here, so they need neither KVM nor a network, and nothing in them depends on
//! time. Every boot of every scenario must give the same tokens.

use crate::hosted_program;
use anyhow::{Context, Result, bail, ensure};
use bootimage::{FileSpec, ImageSpec};
use ed25519_dalek::{Signer, SigningKey};
use export_tool::{DiskImageSpec, ExportSpec, OnDisk};
use model::kernel::Width;
use model::synthetic::{self, Spec};
use model::{Role, TensorType};
use object::{Object, ObjectSymbol};
use qemu_runs::{
    Accel, BootFailure, BootFrom, Deadlines, Drive, Event, Firmware, Machine, Qemu, Session, Transcript, image_bytes,
};
use report::{BootReport, ExitStatus, Level, SnapshotOutcome, TestOutcome};
use runtime::options::setting;
use snapshot_format::header::Header;
use snapshot_format::{DiskMedium, HEADER_BYTES, StoredKernel};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use storage::MemoryDisk;

const DEADLINE: Duration = Duration::from_secs(180);
const MEMORY_MIB: u32 = 512;
const TOKENS: u32 = 12;

/// The files every scenario starts from.
pub struct Bench {
    qemu: Qemu,
    kernel: PathBuf,
    library: PathBuf,
    linker_script: PathBuf,
    workspace: PathBuf,
    dir: PathBuf,
    model: PathBuf,
    other_model: PathBuf,
    /// The disk of some boots that learnt, once a scenario has asked for it.
    learnt: Option<PathBuf>,
}

type Scenario = (&'static str, fn(&mut Bench) -> Result<()>);

/// Each starts with a new disk, or with a copy of that of [`Bench::learnt_disk`]: any of them can run alone.
const SCENARIOS: &[Scenario] = &[
    ("self-tests in the guest", self_tests),
    ("two cores run the self-tests that need them and give the same tokens", two_cores),
    ("failures on purpose end with the right code and say where they were", failures_on_purpose),
    ("cold boot, then warm boots restore code and give the same tokens", cold_then_warm),
    ("a damaged newest snapshot falls back to the one before", damaged_newest),
    ("a save that was cut short falls back to the one before", torn_save),
    ("both snapshots damaged: cold start with a reason", damaged_both),
    ("another CPU: the profile is kept, the kernels are built again", other_cpu),
    ("another build: the profile is kept, the kernels are built again", other_build),
    ("kernels that fault or compute something else are quarantined", bad_kernels),
    ("another model does not use this model's snapshot", other_model),
    ("a read-only boot volume is said, and the run goes on", read_only_volume),
    ("every architecture gives the same tokens with compiled kernels as without", architectures),
    ("a model across the first 4 GiB of its disk gives the same tokens", beyond_four_gib),
    ("K types give the same tokens in the guest as hosted", k_types),
    ("a signed model runs, and one that was changed does not", signed),
    ("a setting in BAREFLOW.CFG that cannot be read, and a file that is too long", bad_config),
    ("a file that is no model", not_a_model),
    ("an empty model file", empty_model),
    ("a truncated model", truncated_model),
    ("no model at all", no_model),
    ("a context larger than memory", large_context),
    ("a model larger than memory", large_model),
    ("an empty prompt and one longer than the context", bad_prompts),
    ("an unknown option", unknown_option),
    ("a CPU without AVX2 runs the portable path with the same tokens", no_avx2),
    ("the exported image gives the same tokens and holds no compiler", exported),
    ("the JIT image fails the native image's audit", audit_can_fail),
    ("a bootable disk boots by BIOS and gives the same tokens", |bench| boots_from_disk(bench, Firmware::Bios)),
    ("a bootable disk boots by UEFI and gives the same tokens", |bench| boots_from_disk(bench, Firmware::Ovmf)),
];

/// Runs every scenario whose name contains `only` and returns how many passed.
///
/// # Errors
/// The scenarios that failed, each with its reason.
pub fn run(kernel: &Path, library: &Path, workspace: &Path, dir: &Path, only: &str) -> Result<usize> {
    std::fs::create_dir_all(dir)?;
    let model = dir.join("tiny.gguf");
    std::fs::write(&model, synthetic::gguf(&tiny())?)?;
    let other_model = dir.join("other.gguf");
    std::fs::write(&other_model, synthetic::gguf(&Spec { seed: 99, ..tiny() })?)?;
    let mut bench = Bench {
        qemu: Qemu::find()?,
        kernel: kernel.to_owned(),
        library: library.to_owned(),
        linker_script: workspace.join("kernel/link.ld"),
        workspace: workspace.to_owned(),
        dir: dir.to_owned(),
        model,
        other_model,
        learnt: None,
    };
    let mut failures = Vec::new();
    let chosen = SCENARIOS.iter().filter(|(name, _)| name.contains(only));
    let count = chosen.clone().count();
    ensure!(count > 0, "no scenario has `{only}` in its name");
    for (name, scenario) in chosen {
        let start = Instant::now();
        let outcome = bench.new_disk().and_then(|()| scenario(&mut bench));
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => println!("scenario {name} ... ok ({seconds:.1} s)"),
            Err(error) => {
                println!("scenario {name} ... FAILED ({seconds:.1} s)\n{error:?}");
                failures.push(*name);
            }
        }
    }
    if !failures.is_empty() {
        bail!("{} of {} scenarios failed: {}", failures.len(), count, failures.join("; "));
    }
    Ok(count)
}

/// Every kind of weight the tiny model can hold: quantised layers, another type for some, an f16 head.
fn tiny() -> Spec {
    Spec {
        matrices: TensorType::Q4_0,
        overrides: vec![
            (Role::Down, TensorType::Q8_0),
            (Role::AttnOut, TensorType::F32),
            (Role::TokenEmbedding, TensorType::F16),
        ],
        ..Spec::default()
    }
}

impl Bench {
    fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    fn settings(&self) -> String {
        [
            setting("prompt", "ab"),
            setting("max_tokens", &TOKENS.to_string()),
            setting("ignore_eos", "true"),
            setting("tune.max_trials", "6"),
            setting("tune.max_variants", "3"),
            setting("tune.budget_ms", "60000"),
            setting("tune.pairs", "8"),
            setting("context", "64"),
        ]
        .join("\n")
    }

    /// Puts a disk without a snapshot in the place of the one there is.
    fn new_disk(&self) -> Result<()> {
        let config = self.settings();
        let spec = ImageSpec { config, overwrite: true, slot_mib: 1, ..ImageSpec::new(&self.kernel) };
        bootimage::build(&spec, &self.disk())?;
        Ok(())
    }

    /// Puts a disk in its place on which several boots kept kernels: both slots hold a snapshot.
    fn learnt_disk(&mut self) -> Result<()> {
        if let Some(learnt) = &self.learnt {
            std::fs::copy(learnt, self.disk())?;
            return Ok(());
        }
        cold_then_warm(self)
    }

    fn machine(&self, append: &str) -> Machine {
        Machine {
            memory_mib: MEMORY_MIB,
            drives: vec![
                Drive { path: self.disk(), read_only: false },
                Drive { path: self.model.clone(), read_only: true },
            ],
            ..Machine::with_kernel(Accel::Tcg, &self.kernel, append)
        }
    }

    fn boot(&self, machine: &Machine) -> Result<Transcript> {
        let deadlines = Deadlines { boot: DEADLINE, silence: DEADLINE };
        Ok(Session::start(&self.qemu, machine, None)?.run(deadlines, &mut |_| {})?.transcript)
    }

    fn report(&self, machine: &Machine) -> Result<BootReport> {
        self.boot(machine)?.report.context("the boot passed without a report")
    }

    /// A boot that must be refused with `status`, and an error note that holds every one of `words`.
    fn refused(&self, machine: &Machine, status: ExitStatus, words: &[&str]) -> Result<()> {
        let deadlines = Deadlines { boot: DEADLINE, silence: DEADLINE };
        let error = match Session::start(&self.qemu, machine, None)?.run(deadlines, &mut |_| {}) {
            Ok(_) => bail!("the boot passed, but it should have been refused"),
            Err(error) => error,
        };
        let ended = error.transcript.end.map(|(status, _)| status);
        ensure!(ended == Some(status), "expected the status {status:?}, found {ended:?}: {error}");
        ensure!(matches!(error.failure, BootFailure::Guest { .. }), "expected a clean end, found {:?}", error.failure);
        let notes = error_notes(&error.transcript);
        let [note] = notes.as_slice() else { bail!("expected one error note, found {notes:?}") };
        for word in words {
            ensure!(note.contains(word), "the error note does not mention `{word}`: {note}");
        }
        Ok(())
    }

    /// The tokens all boots must give, from a boot without compiled kernels or snapshot.
    fn reference_tokens(&self) -> Result<Vec<u32>> {
        let report = self.report(&self.machine("tier=reference snapshot=false"))?;
        ensure!(report.token_ids.len() == TOKENS as usize, "expected {TOKENS} tokens, found {:?}", report.token_ids);
        Ok(report.token_ids)
    }

    /// The same generation by the runtime as a process.
    fn hosted_tokens(&self, model: &Path) -> Result<Vec<u32>> {
        let mut command = Command::new(hosted_program::of_tests(&self.workspace)?);
        command.current_dir(&self.workspace).args(["generate", "--json"]);
        command.arg("--model").arg(model).args(["--prompt", "ab", "--ignore-eos", "--context", "64"]);
        let output = command.args(["--max-tokens", &TOKENS.to_string()]).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "the hosted run failed: {}", output.status);
        let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(serde_json::from_value(json["token_ids"].clone())?)
    }

    /// Commits an edited copy of the newest snapshot; returns what was committed.
    fn edit_snapshot(&self, edit: impl FnOnce(&mut OnDisk)) -> Result<OnDisk> {
        let mut on_disk = export_tool::read_snapshot(&self.disk())?;
        edit(&mut on_disk);
        let mut device = MemoryDisk::new(std::fs::read(self.disk())?);
        let mut medium = DiskMedium::open(&mut device)?;
        snapshot_format::save(&mut medium, &on_disk.identity, &on_disk.snapshot)?;
        std::fs::write(self.disk(), device.into_bytes())?;
        Ok(on_disk)
    }

    /// Where a file of the disk begins in its image.
    fn slot_offset(&self, name: &str) -> Result<usize> {
        let entries = bootimage::list(&self.disk())?;
        let entry = entries.iter().find(|e| e.path == name).with_context(|| format!("no {name} on the disk"))?;
        let offset = entry.offset_bytes().with_context(|| format!("{name} is not contiguous"))?;
        Ok(usize::try_from(offset)?)
    }

    fn damage(&self, name: &str) -> Result<()> {
        // A byte of the payload, past the header's sector.
        let at = self.slot_offset(name)? + HEADER_BYTES + 37;
        let mut image = std::fs::read(self.disk())?;
        image[at] ^= 0x10;
        Ok(std::fs::write(self.disk(), image)?)
    }
}

fn self_tests(bench: &mut Bench) -> Result<()> {
    let skipped = selftests(bench, 1)?;
    // Each of them runs in the next scenario.
    let needs_cores = ["published_code_runs_on_every_core", "workers_run_every_job_once", "parked_workers_wake_up"];
    ensure!(skipped == needs_cores, "skipped on one core: {skipped:?}");
    Ok(())
}

/// Sector of the boot disk from which the self-test overwrites and restores 2 MiB: somewhere in the volume.
const SCRATCH_LBA: u64 = 4096;

/// Runs the self-tests on `cpus` cores; returns the names of those that could not run.
fn selftests(bench: &Bench, cpus: u32) -> Result<Vec<String>> {
    let append = format!("mode=selftest kernel.cores={cpus} kernel.scratch_lba={SCRATCH_LBA}");
    let before = std::fs::read(bench.disk())?;
    let transcript = bench.boot(&Machine { cpus, ..bench.machine(&append) })?;
    ensure!(!transcript.tests.is_empty(), "no test ran");
    let mut skipped = Vec::new();
    for (name, outcome) in transcript.tests {
        println!("    {name}: {outcome:?}");
        match outcome {
            TestOutcome::Passed => {}
            TestOutcome::Skipped(_) => skipped.push(name),
            TestOutcome::Failed(why) => bail!("{name} failed: {why}"),
        }
    }
    ensure!(std::fs::read(bench.disk())? == before, "the self-tests did not restore the disk");
    Ok(skipped)
}

fn two_cores(bench: &mut Bench) -> Result<()> {
    let skipped = selftests(bench, 2)?;
    ensure!(skipped.is_empty(), "skipped on two cores: {skipped:?}");
    let tokens = bench.reference_tokens()?;
    let report = bench.report(&Machine { cpus: 2, ..bench.machine("kernel.cores=2") })?;
    ensure!(report.threads == 2, "{} threads", report.threads);
    ensure!(report.token_ids == tokens, "two cores: {:?}, reference {tokens:?}", report.token_ids);
    Ok(())
}

/// `kernel.crash=`: what the machine layer sends and prints when something of ours, or the memory, gives out.
fn failures_on_purpose(bench: &mut Bench) -> Result<()> {
    let image = std::fs::read(&bench.kernel)?;
    let (transcript, console) = crashes(bench, "panic", ExitStatus::Panic)?;
    ensure!(transcript.fault.is_none(), "a panic is no fault: {:?}", transcript.fault);
    let errors = error_notes(&transcript);
    ensure!(errors.len() == 1 && errors[0].contains("kernel.crash=panic"), "error notes {errors:?}");
    // In `panicked at FILE:LINE`.
    ensure!(errors[0].contains("traps.rs:"), "the note does not name the place: {errors:?}");
    let calls = functions(&image, &backtrace_on(&console)?)?;
    ensure!(calls.len() > 2 && calls.iter().any(|f| f.contains("early_main")), "backtrace {calls:?}:\n{console}");

    let (transcript, console) = crashes(bench, "fault", ExitStatus::Panic)?;
    let fault = transcript.fault.context("a fault without a fault message")?;
    // A page fault by a write of ring 3 to a page that is not there.
    ensure!((fault.vector, fault.error_code, fault.address) == (14, 6, 0), "{fault:?}");
    ensure!(console.contains("writing 0x0000000000000000: nothing is mapped there"), "console:\n{console}");
    ensure!(!console.contains("overflowed"), "no stack has overflowed:\n{console}");
    ensure!(fault.backtrace.first() == Some(&fault.rip), "{fault:x?}");
    ensure!(backtrace_on(&console)? == fault.backtrace, "printed and sent differ: {fault:x?}\n{console}");
    let calls = functions(&image, &fault.backtrace)?;
    ensure!(calls.len() > 1 && calls.iter().any(|f| f.contains("early_main")), "backtrace {calls:?}: {fault:x?}");

    let (transcript, console) = crashes(bench, "stack_overflow", ExitStatus::Panic)?;
    let fault = transcript.fault.context("a stack overflow without a fault message")?;
    ensure!(fault.vector == 14 && console.contains("the stack has overflowed"), "{fault:x?}\n{console}");
    // The innermost calls, as many as a backtrace takes: the recursion, and nothing else.
    let calls = functions(&image, &fault.backtrace)?;
    ensure!(calls.len() == 32 && calls.iter().all(|f| f.contains("recurse")), "backtrace {calls:?}: {fault:x?}");

    let (transcript, _) = crashes(bench, "out_of_memory", ExitStatus::Memory)?;
    ensure!(transcript.fault.is_none(), "{:?}", transcript.fault);
    let errors = error_notes(&transcript);
    let says = |word| errors.len() == 1 && errors[0].contains(word);
    ensure!(says("out of memory") && says("16777216 bytes") && says("-m"), "error notes {errors:?}");
    let machine = bench.machine("kernel.crash=somehow");
    bench.refused(&machine, ExitStatus::Settings, &["kernel.crash=somehow", "stack_overflow"])
}

/// A boot that fails as `kind` says: it must end in order, with the exit code and the last message of `status`. Returns
/// what it sent, and what it printed.
fn crashes(bench: &Bench, kind: &str, status: ExitStatus) -> Result<(Transcript, String)> {
    let deadlines = Deadlines { boot: DEADLINE, silence: DEADLINE };
    let mut console = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Console(bytes) = event {
            console.extend_from_slice(bytes);
        }
    };
    let machine = bench.machine(&format!("kernel.crash={kind}"));
    let error = match Session::start(&bench.qemu, &machine, None)?.run(deadlines, &mut listen) {
        Ok(_) => bail!("kernel.crash={kind}: the boot passed"),
        Err(error) => error,
    };
    let exited = matches!(&error.failure, BootFailure::Guest { status: s, .. } if *s == status);
    ensure!(exited, "kernel.crash={kind}: expected the exit code of {status:?}, found {error}");
    let sent = error.transcript.messages;
    ensure!(error.transcript.end == Some((status, sent)), "{:?} after {sent} messages", error.transcript.end);
    ensure!(error.transcript.broken_frame.is_none(), "{:?}", error.transcript.broken_frame);
    Ok((*error.transcript, String::from_utf8_lossy(&console).into_owned()))
}

fn error_notes(transcript: &Transcript) -> Vec<&str> {
    let errors = transcript.notes.iter().filter(|(level, _)| *level == Level::Error);
    errors.map(|(_, text)| text.as_str()).collect()
}

/// The addresses below the line that begins with `backtrace`.
fn backtrace_on(console: &str) -> Result<Vec<u64>> {
    let (_, below) = console.split_once("\nbacktrace ").context("no backtrace was printed")?;
    let addresses = below.lines().skip(1).map_while(|line| line.strip_prefix("  0x"));
    addresses
        .map(|line| {
            let digits = line.split_whitespace().next().unwrap_or_default();
            u64::from_str_radix(digits, 16).with_context(|| format!("no address: {line}"))
        })
        .collect()
}

/// Names of the functions of the image that a backtrace goes through: where the first address lies, and for the others,
/// which are return addresses, where the call before them does.
fn functions(image: &[u8], backtrace: &[u64]) -> Result<Vec<String>> {
    let file = object::File::parse(image)?;
    let name = |(i, address): (usize, &u64)| {
        let address = address - u64::from(i > 0);
        let inside = |s: &object::Symbol<'_, '_>| (s.address()..s.address() + s.size()).contains(&address);
        let symbol = file.symbols().find(inside).with_context(|| format!("{address:#x} is in no function"))?;
        Ok(symbol.name()?.to_owned())
    };
    backtrace.iter().enumerate().map(name).collect()
}

fn cold_then_warm(bench: &mut Bench) -> Result<()> {
    let tokens = bench.reference_tokens()?;
    let cold = bench.report(&bench.machine(""))?;
    ensure!(cold.snapshot.outcome == SnapshotOutcome::Cold, "first boot: {:?}", cold.snapshot);
    ensure!(cold.boot == 1 && cold.kernels_loaded == 0, "first boot is number {}", cold.boot);
    ensure!(cold.kernels_compiled > 0, "the first boot compiled nothing");
    ensure!(cold.snapshot.generation_saved == Some(1), "first boot saved {:?}", cold.snapshot);
    ensure!(cold.token_ids == tokens, "cold tokens {:?}, reference {tokens:?}", cold.token_ids);
    // How large it is says nothing under TCG; that it was measured does.
    ensure!(cold.profiler_overhead.is_some_and(|share| share > 0.0), "{:?}", cold.profiler_overhead);
    // Under TCG a compiled kernel may not win; whatever won is what must come back.
    let mut kept = cold.kernels_changed;
    for number in 2..=4 {
        let warm = bench.report(&bench.machine(""))?;
        ensure!(warm.boot == number, "expected boot {number}, found {}", warm.boot);
        ensure!(warm.snapshot.outcome == SnapshotOutcome::Loaded, "boot {number}: {:?}", warm.snapshot);
        ensure!(warm.token_ids == tokens, "boot {number} tokens {:?}, reference {tokens:?}", warm.token_ids);
        ensure!(kept == 0 || warm.kernels_loaded > 0, "boot {number} restored no kernel of {kept}");
        kept += warm.kernels_changed;
    }
    ensure!(kept > 0, "no boot kept a compiled kernel: nothing was restored or tested");
    let learnt = bench.dir.join("learnt.img");
    std::fs::copy(bench.disk(), &learnt)?;
    bench.learnt = Some(learnt);
    Ok(())
}

fn damaged_newest(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let before = bench.report(&bench.machine(""))?;
    let generation = before.snapshot.generation_saved.context("nothing saved")?;
    // Generations alternate between the slots, A first.
    bench.damage(if generation % 2 == 1 { "SNAPA.BIN" } else { "SNAPB.BIN" })?;
    let after = bench.report(&bench.machine(""))?;
    ensure!(after.snapshot.outcome == SnapshotOutcome::Loaded, "{:?}", after.snapshot);
    ensure!(after.snapshot.generation_loaded == Some(generation - 1), "{:?}", after.snapshot);
    ensure!(after.snapshot.reason.is_some(), "the damaged slot is not mentioned: {:?}", after.snapshot);
    ensure!(after.token_ids == before.token_ids, "tokens changed");
    Ok(())
}

fn torn_save(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let before = bench.report(&bench.machine(""))?;
    let generation = before.snapshot.generation_saved.context("nothing saved")?;
    // The newest slot as a power cut between its payload and its last header leaves it.
    let mut image = std::fs::read(bench.disk())?;
    let mut torn = 0;
    for name in bootimage::SLOT_NAMES {
        let offset = bench.slot_offset(name)?;
        let sector = &mut image[offset..offset + HEADER_BYTES];
        let header = Header::decode(sector.as_ref().try_into()?)?;
        if header.generation == generation {
            sector.copy_from_slice(&Header { committed: false, ..header }.encode());
            torn += 1;
        }
    }
    ensure!(torn == 1, "{torn} slots hold generation {generation}");
    std::fs::write(bench.disk(), image)?;
    let after = bench.report(&bench.machine(""))?;
    ensure!(after.snapshot.outcome == SnapshotOutcome::Loaded, "{:?}", after.snapshot);
    ensure!(after.snapshot.generation_loaded == Some(generation - 1), "{:?}", after.snapshot);
    let reason = after.snapshot.reason.clone().unwrap_or_default();
    ensure!(reason.contains("cut short"), "the torn slot is not mentioned: {reason}");
    ensure!(after.snapshot.generation_saved == Some(generation + 1), "{:?}", after.snapshot);
    ensure!(after.token_ids == before.token_ids, "tokens changed");
    Ok(())
}

fn damaged_both(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let before = bench.report(&bench.machine(""))?;
    bench.damage("SNAPA.BIN")?;
    bench.damage("SNAPB.BIN")?;
    let after = bench.report(&bench.machine(""))?;
    ensure!(after.snapshot.outcome == SnapshotOutcome::Cold, "{:?}", after.snapshot);
    ensure!(after.snapshot.reason.is_some(), "no reason: {:?}", after.snapshot);
    ensure!(after.boot == 1, "a cold start counts from 1, found {}", after.boot);
    ensure!(after.token_ids == before.token_ids, "tokens changed");
    Ok(())
}

/// Boots on a snapshot whose code belongs elsewhere: what was learnt must survive, the code must not be run.
fn rebuilds(bench: &Bench, machine: &Machine, before: &OnDisk) -> Result<()> {
    let kept = before.snapshot.entries.iter().filter(|record| record.incumbent.is_some()).count();
    ensure!(kept > 0, "there is no kernel on the disk to build again");
    let after = bench.report(machine)?;
    ensure!(after.snapshot.outcome == SnapshotOutcome::ProfileOnly, "{:?}", after.snapshot);
    ensure!(after.snapshot.reason.is_some(), "no reason: {:?}", after.snapshot);
    ensure!(after.kernels_loaded as usize == kept, "{} of {kept} kernels came back", after.kernels_loaded);
    ensure!(after.kernels_compiled as usize >= kept, "{} kernels were compiled", after.kernels_compiled);
    ensure!(after.boot == before.snapshot.boot_count + 1, "boot {}", after.boot);
    ensure!(after.token_ids == bench.reference_tokens()?, "tokens changed");
    Ok(())
}

fn other_cpu(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let mut machine = bench.machine("");
    machine.cpu_model = Some("max,stepping=9".to_owned());
    rebuilds(bench, &machine, &export_tool::read_snapshot(&bench.disk())?)
}

fn other_build(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let before = bench.edit_snapshot(|on_disk| on_disk.identity.build_id[0] ^= 1)?;
    rebuilds(bench, &bench.machine(""), &before)
}

/// A kernel that passes the audit and computes nothing, or reads 1 GiB past `x`, where there is no memory.
fn body(width: Width, reads_far: bool) -> Vec<u8> {
    // vmovups (xmm0|ymm0|zmm0), [rdi + 0x40000000]
    let load: &[u8] = match width {
        Width::X128 => &[0xc5, 0xf8, 0x10],
        Width::Y256 => &[0xc5, 0xfc, 0x10],
        Width::Z512 => &[0x62, 0xf1, 0x7c, 0x48, 0x10],
    };
    let mut code = Vec::new();
    if reads_far {
        code.extend(load);
        code.extend([0x87, 0x00, 0x00, 0x00, 0x40]);
    }
    if width != Width::X128 {
        code.extend([0xc5, 0xf8, 0x77]);
    }
    code.push(0xc3);
    code
}

fn bad_kernels(bench: &mut Bench) -> Result<()> {
    /// Not on the audit's list: never run.
    const UD2: [u8; 2] = [0x0f, 0x0b];
    bench.learnt_disk()?;
    let mut replaced = Vec::new();
    bench.edit_snapshot(|on_disk| {
        // Which variants won does not matter here: one that was tried is put in the place of a winner.
        let known = on_disk.snapshot.entries.iter_mut().filter_map(|record| {
            let tried = record.trials.first().map(|trial| trial.variant);
            let variant = record.incumbent.as_ref().map(|kernel| kernel.variant).or(tried)?;
            Some((record, variant))
        });
        for ((record, variant), number) in known.zip(0..3) {
            let code = match number {
                0 => UD2.to_vec(),
                1 => body(variant.width, false),
                _ => body(variant.width, true),
            };
            record.incumbent = Some(StoredKernel::new(variant, code));
            replaced.push((record.key, Some(variant)));
        }
    })?;
    ensure!(replaced.len() == 3, "{} keys on the disk have variants, expected at least 3", replaced.len());
    let transcript = bench.boot(&bench.machine(""))?;
    let words = ["refused by the audit", "differs from the reference", "exception 14 at byte 0 of its code"];
    for ((key, _), word) in replaced.iter().zip(words) {
        let key = key.to_string();
        let said = |text: &str| text.contains(&key) && text.contains(word) && text.contains("quarantined");
        ensure!(
            transcript.notes.iter().any(|(_, text)| said(text)),
            "{key}: no word of `{word}`: {:?}",
            transcript.notes
        );
    }
    let report = transcript.report.context("no report")?;
    ensure!(report.token_ids == bench.reference_tokens()?, "tokens changed");
    let after = export_tool::read_snapshot(&bench.disk())?.snapshot;
    for (key, variant) in replaced {
        let record = after.record(&key).context("the key is gone")?;
        ensure!(record.quarantined.iter().any(|v| Some(*v) == variant), "{key} is not in quarantine");
        ensure!(record.incumbent.as_ref().is_none_or(|kernel| Some(kernel.variant) != variant), "{key} came back");
    }
    Ok(())
}

fn other_model(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let mut machine = bench.machine("");
    machine.drives[1].path = bench.other_model.clone();
    let report = bench.report(&machine)?;
    ensure!(report.snapshot.outcome == SnapshotOutcome::Cold, "{:?}", report.snapshot);
    let reason = report.snapshot.reason.unwrap_or_default();
    ensure!(reason.contains("model"), "the reason does not name the model: {reason}");
    Ok(())
}

fn read_only_volume(bench: &mut Bench) -> Result<()> {
    bench.learnt_disk()?;
    let mut machine = bench.machine("");
    machine.drives[0].read_only = true;
    let before = std::fs::read(bench.disk())?;
    let transcript = bench.boot(&machine)?;
    let warned = transcript.notes.iter().any(|(level, text)| *level == Level::Warning && text.contains("read-only"));
    ensure!(warned, "no warning about the read-only volume: {:?}", transcript.notes);
    let snapshot = transcript.report.context("no report")?.snapshot;
    ensure!(snapshot.generation_loaded.is_some() && snapshot.generation_saved.is_none(), "{snapshot:?}");
    let reason = snapshot.reason.unwrap_or_default();
    ensure!(reason.contains("not saved: the boot volume is read-only"), "the report does not say why: {reason}");
    ensure!(std::fs::read(bench.disk())? == before, "the read-only volume was changed");
    Ok(())
}

fn with_model(bench: &Bench, name: &str, bytes: &[u8]) -> Result<Machine> {
    let path = bench.dir.join(name);
    std::fs::write(&path, bytes)?;
    let mut machine = bench.machine("snapshot=false");
    machine.drives[1].path = path;
    Ok(machine)
}

fn architectures(bench: &mut Bench) -> Result<()> {
    for (name, spec) in synthetic::gallery() {
        let path = bench.dir.join(format!("{name}.gguf"));
        std::fs::write(&path, synthetic::gguf(&spec)?)?;
        let boot = |append: &str| -> Result<BootReport> {
            let mut machine = bench.machine(append);
            machine.drives[1].path = path.clone();
            bench.report(&machine).with_context(|| format!("{name}, {append}"))
        };
        bench.new_disk()?;
        let expected = boot("tier=reference snapshot=false")?.token_ids;
        // The first boot leaves kernels, the second one runs with what it found worth keeping.
        let first = boot("")?;
        ensure!(first.kernels_compiled > 0, "{name}: nothing was compiled");
        ensure!(first.token_ids == expected, "{name}: {:?}, reference {expected:?}", first.token_ids);
        let second = boot("")?;
        ensure!(second.token_ids == expected, "{name}: {:?}, reference {expected:?}", second.token_ids);
    }
    Ok(())
}

fn beyond_four_gib(bench: &mut Bench) -> Result<()> {
    let path = bench.dir.join("around-4-gib.gguf");
    let file = std::fs::File::create(&path)?;
    for (offset, bytes) in synthetic::gguf_around(&std::fs::read(&bench.model)?, 1 << 32)? {
        file.write_all_at(&bytes, offset)?;
    }
    let mut machine = bench.machine("snapshot=false");
    machine.drives[1].path = path.clone();
    let report = bench.report(&machine)?;
    std::fs::remove_file(&path)?;
    ensure!(report.model.file_bytes > 1 << 32, "the model ends at {}", report.model.file_bytes);
    ensure!(report.token_ids == bench.reference_tokens()?, "tokens {:?}", report.token_ids);
    Ok(())
}

/// The mixture of a Q4_K_M file, in small.
fn k_types(bench: &mut Bench) -> Result<()> {
    let spec = Spec {
        dim: 256,
        hidden_dim: 512,
        n_layers: 1,
        n_heads: 8,
        head_dim: 32,
        matrices: TensorType::Q4_K,
        overrides: vec![(Role::TokenEmbedding, TensorType::Q6_K), (Role::Down, TensorType::Q6_K)],
        ..Spec::default()
    };
    let path = bench.dir.join("k-types.gguf");
    std::fs::write(&path, synthetic::gguf(&spec)?)?;
    let expected = bench.hosted_tokens(&path)?;
    for (append, compiles) in [("tier=reference snapshot=false", false), ("", true), ("", true)] {
        let mut machine = bench.machine(append);
        machine.drives[1].path = path.clone();
        let report = bench.report(&machine)?;
        ensure!(["q4_k+q6_k", "q6_k+q4_k"].contains(&report.model.dtypes.as_str()), "types {}", report.model.dtypes);
        ensure!(report.token_ids == expected, "{append}: {:?}, hosted {expected:?}", report.token_ids);
        ensure!(!compiles || report.kernels_loaded + report.kernels_compiled > 0, "nothing was compiled");
    }
    Ok(())
}

/// As `truncate -s %512` and `openssl pkeyutl -sign -rawin` make them.
fn signed(bench: &mut Bench) -> Result<()> {
    let key = SigningKey::from_bytes(&[9; 32]);
    let mut file = std::fs::read(&bench.model)?;
    file.resize(file.len().next_multiple_of(512), 0);
    let signature = bench.dir.join("model.sig");
    std::fs::write(&signature, key.sign(&file).to_bytes())?;
    let public: String = key.verifying_key().as_bytes().iter().map(|b| format!("{b:02x}")).collect();
    let disk = bench.dir.join("signed.img");
    let files = vec![FileSpec { name: "MODEL.SIG".into(), path: signature }];
    let config = format!("prompt=ab ignore_eos=1 max_tokens={TOKENS} context=64 model.public_key={public}");
    bootimage::build(&ImageSpec { config, files, overwrite: true, ..ImageSpec::new(&bench.kernel) }, &disk)?;
    let boot_from = |machine: Machine| {
        let mut machine = machine;
        machine.drives[0].path = disk.clone();
        machine
    };
    let report = bench.report(&boot_from(bench.machine("snapshot=false")))?;
    ensure!(report.token_ids == bench.reference_tokens()?, "tokens {:?}", report.token_ids);
    let last = file.len() - 1000;
    file[last] ^= 1;
    bench.refused(
        &boot_from(with_model(bench, "changed.gguf", &file)?),
        ExitStatus::Model,
        &["signature", "does not fit"],
    )?;
    bench.refused(
        &bench.machine(&format!("snapshot=false model.public_key={public}")),
        ExitStatus::Model,
        &["MODEL.SIG"],
    )
}

fn bad_config(bench: &mut Bench) -> Result<()> {
    let disk = bench.dir.join("bad-config.img");
    let refused = |config: String, words: &[&str]| -> Result<()> {
        let spec = ImageSpec { config, overwrite: true, ..ImageSpec::new(&bench.kernel) };
        bootimage::build(&spec, &disk)?;
        let mut machine = bench.machine("");
        machine.drives[0].path = disk.clone();
        bench.refused(&machine, ExitStatus::Settings, words)
    };
    refused("max_tokens=many\n".into(), &["max_tokens", "many"])?;
    refused("kernel.cores=2\n".into(), &["kernel.cores", "command line"])?;
    // A file that is too long is not read up to some byte and then run with what was in that.
    refused(format!("#{}\nmax_tokens=1\n", " ".repeat(65 << 10)), &["BAREFLOW.CFG", "65536"])
}

fn empty_model(bench: &mut Bench) -> Result<()> {
    bench.refused(&with_model(bench, "empty.gguf", &[])?, ExitStatus::Model, &["empty"])
}

fn not_a_model(bench: &mut Bench) -> Result<()> {
    bench.refused(&with_model(bench, "noise.bin", &[0xa5; 4096])?, ExitStatus::Model, &["not a model"])
}

fn truncated_model(bench: &mut Bench) -> Result<()> {
    let whole = std::fs::read(&bench.model)?;
    let cut = whole.len() / 2 / 512 * 512;
    bench.refused(&with_model(bench, "cut.gguf", &whole[..cut])?, ExitStatus::Model, &["bytes"])
}

fn no_model(bench: &mut Bench) -> Result<()> {
    let mut machine = bench.machine("");
    machine.drives.truncate(1);
    bench.refused(&machine, ExitStatus::Model, &["no model"])
}

fn large_model(bench: &mut Bench) -> Result<()> {
    // 100 MiB of weights, and a machine that has 64 MiB left for everything.
    let spec =
        Spec { dim: 512, hidden_dim: 1408, n_heads: 8, n_kv_heads: 8, head_dim: 64, n_layers: 8, ..Spec::default() };
    let path = bench.dir.join("large.gguf");
    std::fs::write(&path, synthetic::gguf(&spec)?)?;
    let mut machine = bench.machine("snapshot=false kernel.memory=64M");
    machine.drives[1].path = path.clone();
    bench.refused(&machine, ExitStatus::Memory, &["not enough memory for weights", "needed"])?;
    Ok(std::fs::remove_file(path)?)
}

fn large_context(bench: &mut Bench) -> Result<()> {
    // The session's memory grows with the context: one that no 512 MiB machine holds.
    let model = synthetic::gguf(&Spec { seq_len: 1 << 22, ..tiny() })?;
    let path = bench.dir.join("long.gguf");
    std::fs::write(&path, model)?;
    let mut machine = bench.machine("snapshot=false context=4194304");
    machine.drives[1].path = path;
    bench.refused(&machine, ExitStatus::Memory, &["not enough memory for kv", "needed"])
}

fn bad_prompts(bench: &mut Bench) -> Result<()> {
    bench.refused(&bench.machine("snapshot=false prompt=\"\""), ExitStatus::Settings, &["prompt is empty"])?;
    let long = "a b c d ".repeat(40);
    bench.refused(&bench.machine(&format!("snapshot=false prompt=\"{long}\"")), ExitStatus::Settings, &["context"])
}

fn unknown_option(bench: &mut Bench) -> Result<()> {
    bench.refused(&bench.machine("promt=x"), ExitStatus::Settings, &["promt", "prompt"])
}

fn no_avx2(bench: &mut Bench) -> Result<()> {
    let tokens = bench.reference_tokens()?;
    let mut machine = bench.machine("");
    machine.cpu_model = Some("Nehalem".to_owned());
    let transcript = bench.boot(&machine)?;
    let warned = transcript.notes.iter().any(|(level, text)| *level == Level::Warning && text.contains("AVX2"));
    ensure!(warned, "no word about the missing AVX2: {:?}", transcript.notes);
    let report = transcript.report.context("no report")?;
    ensure!(report.isa == "portable" && report.kernels_compiled == 0, "isa {}", report.isa);
    ensure!(report.token_ids == tokens, "portable tokens {:?}, reference {tokens:?}", report.token_ids);
    Ok(())
}

fn exported(bench: &mut Bench) -> Result<()> {
    let tokens = bench.reference_tokens()?;
    let (native, native_disk) = (bench.dir.join("native.elf"), bench.dir.join("native.img"));
    let export = ExportSpec {
        disk: bench.disk(),
        kernel_library: bench.library.clone(),
        linker_script: bench.linker_script.clone(),
        embed_model: None,
        out: native.clone(),
        disk_image: Some(DiskImageSpec { out: native_disk.clone(), config: None }),
        keep_debug: true,
        allow_unconverged: false,
    };
    let mut boots = 0;
    let mut kept = 0;
    loop {
        // Enough trials to settle every key within a few boots.
        let report = bench.report(&bench.machine("tune.max_trials=100"))?;
        kept += report.kernels_changed;
        boots += 1;
        if report.convergence.converged {
            break;
        }
        let why = report.convergence.reason;
        ensure!(boots < 12, "not converged after {boots} boots: {why}");
        let refused = export_tool::export(&export).err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(refused.contains("not converged"), "exported before it had converged: {refused}");
    }
    ensure!(kept > 0, "no kernel was kept: there is nothing to export");
    let exported = export_tool::export(&export)?;
    ensure!(exported.audit.passed && !exported.kernels.is_empty(), "{:?}", exported.audit);
    let boot_native = |boot: BootFrom, drives: Vec<Drive>| -> Result<()> {
        let machine = Machine { boot, drives, ..bench.machine("") };
        let report = bench.report(&machine)?;
        ensure!(report.image == report::ImageKind::Native, "image kind {:?}", report.image);
        ensure!(report.token_ids == tokens, "native tokens {:?}, reference {tokens:?}", report.token_ids);
        ensure!(report.kernels_loaded as usize == exported.kernels.len(), "{} kernels ran", report.kernels_loaded);
        ensure!(report.kernels_compiled == 0, "a native image compiled something");
        Ok(())
    };
    // The report counts any image as if it had no symbols: from the file that has them, what the linker's own file has.
    let counted = image_bytes(&bench.dir.join("native.elf.debug"))?;
    let (written, with_symbols) = (image_bytes(&native)?, std::fs::metadata(bench.dir.join("native.elf.debug"))?.len());
    ensure!(written.elf_bytes == std::fs::metadata(&native)?.len(), "{written:?}");
    // Alignment.
    ensure!(counted.elf_bytes.abs_diff(written.elf_bytes) <= 16, "{counted:?}, written {written:?}");
    ensure!(counted.text_bytes == written.text_bytes && with_symbols > counted.elf_bytes, "{counted:?}");
    let loaded = |elf: &Path, append: String| BootFrom::Kernel { elf: elf.to_owned(), append };
    let drives = bench.machine("").drives;
    boot_native(loaded(&native, String::new()), drives.clone())?;
    // By itself, from a disk of its own: GRUB loads the stripped file, and the settings are those of the JIT image's disk.
    let mut from_disk = drives;
    from_disk[0] = Drive { path: native_disk.clone(), read_only: false };
    let before = std::fs::read(&native_disk)?;
    boot_native(BootFrom::Disk(Firmware::Bios), from_disk)?;
    ensure!(std::fs::read(&native_disk)? == before, "the native image wrote on its disk");
    let embedded = bench.dir.join("native-embedded.elf");
    let export =
        ExportSpec { embed_model: Some(bench.model.clone()), out: embedded.clone(), disk_image: None, ..export };
    let exported = export_tool::export(&export)?;
    ensure!(exported.embedded_model_bytes == std::fs::metadata(&bench.model)?.len(), "{exported:?}");
    boot_native(loaded(&embedded, setting("prompt", "ab") + " ignore_eos=1 max_tokens=12"), Vec::new())
}

fn boots_from_disk(bench: &mut Bench, firmware: Firmware) -> Result<()> {
    let expected = bench.reference_tokens()?;
    let settings = bench.settings();
    let spec = ImageSpec {
        config: settings,
        overwrite: true,
        slot_mib: 1,
        bootable: true,
        // Under TCG one core is used unless this says otherwise, and no file can say it.
        append: "kernel.cores=2 tune.pairs=9".to_owned(),
        ..ImageSpec::new(&bench.kernel)
    };
    let disk = bench.dir.join("bootable.img");
    bootimage::build(&spec, &disk)?;
    let mut machine = Machine { cpus: 2, ..bench.machine("") };
    machine.boot = BootFrom::Disk(firmware);
    machine.drives[0].path = disk;
    // Twice: the second boot finds what the first one left on the disk it booted from.
    for boot in 1..=2 {
        let report = bench.report(&machine)?;
        ensure!(report.boot == boot, "expected boot {boot}, found {}", report.boot);
        ensure!(report.threads == 2, "{} threads: GRUB did not pass kernel.cores=2", report.threads);
        ensure!(report.token_ids == expected, "tokens {:?}, reference {expected:?}", report.token_ids);
    }
    Ok(())
}

fn audit_can_fail(bench: &mut Bench) -> Result<()> {
    let audit = export_tool::audit::audit(&std::fs::read(&bench.kernel)?)?;
    ensure!(!audit.passed, "the audit found no compiler in the image that has one");
    ensure!(audit.findings.iter().any(|f| f.contains("cranelift")), "{:?}", audit.findings);
    ensure!(audit.findings.iter().any(|f| f.contains("JIT arena")), "{:?}", audit.findings);
    Ok(())
}
