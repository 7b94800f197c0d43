//! Repeated boots: [`boot`] once for a report, [`converge`] until the guest says nothing improves any more.

use crate::elf::image_bytes;
use crate::machine::{BootFrom, Machine, Qemu};
use crate::run_report::{BootRecord, Environment, LoadRecord, NativeRecord, RunReport};
use crate::session::{BootError, Deadlines, Event, Session};
use crate::transcript::BootFailure;
use std::path::{Path, PathBuf};

/// The exported image to compare with.
#[derive(Clone, Debug)]
pub struct NativeSpec {
    /// Its ELF file.
    pub elf: PathBuf,
    /// The export tool's audit (JSON), to be carried into the report.
    pub audit: Option<serde_json::Value>,
    /// Native boots; after each one the self-optimising image boots again.
    pub boots: u32,
    /// Rounds of reading and loading the model, in one more boot of each image; 0 makes no such boot.
    pub load_rounds: u32,
}

/// A run to make.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// The machine of every boot; its first drive keeps the snapshot from boot to boot.
    pub machine: Machine,
    /// Limits of every boot.
    pub deadlines: Deadlines,
    /// Boots at most.
    pub max_boots: u32,
    /// Why [`Machine::accel`] is what it is, for the report.
    pub accel_reason: String,
    /// Directory for COM1 logs, `boot-01.log` and so on.
    pub logs: Option<PathBuf>,
    /// Compare with the exported image at the end.
    pub native: Option<NativeSpec>,
    /// Command, commit and host, for the report.
    pub environment: Environment,
}

/// Which boot of a run is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Towards convergence, counted from 1.
    Converge(u32),
    /// The native image, counted from 1.
    Native(u32),
    /// The self-optimising image after a native boot, counted from 1.
    Interleaved(u32),
    /// The self-optimising image, loading again and again.
    Load,
    /// The native image, loading again and again.
    NativeLoad,
}

/// What a run tells whoever watches.
#[derive(Debug)]
pub enum Progress<'a> {
    /// A boot starts.
    Started(Phase),
    /// A boot says something.
    Event(Event<'a>),
    /// A boot passed.
    Passed(Phase, &'a BootRecord),
}

/// One boot that must pass and report.
///
/// # Errors
/// [`BootError`].
pub fn boot(
    qemu: &Qemu,
    machine: &Machine,
    deadlines: Deadlines,
    console: Option<&Path>,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<BootRecord, BootError> {
    let boot = Session::start(qemu, machine, console)?.run(deadlines, watch)?;
    let wall_s = boot.wall.as_secs_f64();
    let mut transcript = boot.transcript;
    match transcript.report.take() {
        Some(report) => Ok(BootRecord { report, wall_s }),
        None => Err(BootError { failure: BootFailure::NoReport, transcript: Box::new(transcript), console_tail: None }),
    }
}

/// Boots until a boot reports convergence or `max_boots` is reached, then compares with the native image.
///
/// A boot that fails ends the run: the report then holds the boots before it and says why in `failure`.
pub fn converge(qemu: &Qemu, spec: &RunSpec, watch: &mut dyn FnMut(Progress<'_>)) -> RunReport {
    let environment = Environment {
        qemu: qemu.version().to_owned(),
        machine: spec.machine.command_line(qemu),
        memory_mib: spec.machine.memory_mib,
        cpus: spec.machine.cpus,
        ..spec.environment.clone()
    };
    let mut report = RunReport::new(spec.machine.accel, spec.accel_reason.clone(), spec.max_boots, environment);
    if let BootFrom::Kernel { elf, .. } = &spec.machine.boot {
        report.jit_image = image_bytes(elf).ok();
    }
    if let Err(error) = run_all(qemu, spec, &mut report, watch) {
        report.failure = Some(error);
    }
    report
}

fn run_all(
    qemu: &Qemu,
    spec: &RunSpec,
    report: &mut RunReport,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<(), String> {
    for number in 1..=spec.max_boots {
        let record = run_one(qemu, spec, &spec.machine, Phase::Converge(number), watch)?;
        report.push(record);
        if report.converged_at.is_some() || report.failure.is_some() {
            break;
        }
    }
    if let (Some(native), None) = (&spec.native, &report.failure) {
        compare_all(qemu, spec, native, report, watch)?;
    }
    Ok(())
}

/// Boots the native image and the self-optimising one in turn and adds what they did to `report`; a boot that fails is
/// said in its `failure`.
pub fn compare(
    qemu: &Qemu,
    spec: &RunSpec,
    native: &NativeSpec,
    report: &mut RunReport,
    watch: &mut dyn FnMut(Progress<'_>),
) {
    if let Err(error) = compare_all(qemu, spec, native, report, watch) {
        report.failure = Some(error);
    }
}

/// Native and self-optimising boots in turn, each first in every other pair: bandwidth of shared machines drifts, so only
/// neighbours are comparable.
fn compare_all(
    qemu: &Qemu,
    spec: &RunSpec,
    native: &NativeSpec,
    report: &mut RunReport,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<(), String> {
    let image = image_bytes(&native.elf).map_err(|e| format!("native image: {e}"))?;
    let append = match &spec.machine.boot {
        BootFrom::Kernel { append, .. } => append.clone(),
        BootFrom::Disk(_) => String::new(),
    };
    let machine = Machine { boot: BootFrom::Kernel { elf: native.elf.clone(), append }, ..spec.machine.clone() };
    let (mut boots, mut between) = (Vec::new(), Vec::new());
    for number in 1..=native.boots {
        let mut pair = [(Phase::Native(number), &machine), (Phase::Interleaved(number), &spec.machine)];
        if number % 2 == 0 {
            pair.reverse();
        }
        for (phase, machine) in pair {
            let boot = run_one(qemu, spec, machine, phase, watch)?;
            if matches!(phase, Phase::Native(_)) { boots.push(boot) } else { between.push(boot) }
        }
        // After each pair: should a later boot fail, these are in the report.
        report.set_native(NativeRecord::new(image, native.audit.clone(), boots.clone(), between.clone()));
    }
    for (phase, machine) in [(Phase::Load, &spec.machine), (Phase::NativeLoad, &machine)] {
        // A machine that boots from its disk takes no further settings.
        let (BootFrom::Kernel { elf, append }, 1..) = (&machine.boot, native.load_rounds) else { continue };
        let append = format!("{append} load.rounds={}", native.load_rounds);
        let machine = Machine { boot: BootFrom::Kernel { elf: elf.clone(), append }, ..machine.clone() };
        let boot = run_one(qemu, spec, &machine, phase, watch)?;
        report.push_load(LoadRecord::of(boot).ok_or("a boot with load.rounds reported none")?);
    }
    Ok(())
}

fn run_one(
    qemu: &Qemu,
    spec: &RunSpec,
    machine: &Machine,
    phase: Phase,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<BootRecord, String> {
    let name = match phase {
        Phase::Converge(n) => format!("boot-{n:02}"),
        Phase::Native(n) => format!("native-{n:02}"),
        Phase::Interleaved(n) => format!("interleaved-{n:02}"),
        Phase::Load => "load-jit".to_owned(),
        Phase::NativeLoad => "load-native".to_owned(),
    };
    let console = spec.logs.as_ref().map(|logs| logs.join(format!("{name}.log")));
    watch(Progress::Started(phase));
    let record = boot(qemu, machine, spec.deadlines, console.as_deref(), &mut |event| watch(Progress::Event(event)))
        .map_err(|error| format!("{name}: {error}"))?;
    watch(Progress::Passed(phase, &record));
    Ok(record)
}
