//! `qemu-runs`: boots, convergence runs and the accelerator probe from the command line.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use qemu_runs::accel::{AccelChoice, KVM_DISK_SMOKE_LIMIT, KVM_SMOKE_LIMIT, Probe, probe};
use qemu_runs::display::Display;
use qemu_runs::runs::{NativeSpec, RunSpec, boot, converge};
use qemu_runs::{Accel, BootFrom, Deadlines, Drive, Environment, Event, Firmware, Machine, Qemu, Session, text};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Boots BareFlow under QEMU, listens to its two serial ports and judges.
///
/// COM1 is text for people; COM2 carries typed messages. A boot passes only if QEMU exits with 33 and the guest's last
/// message confirms it with the right message count.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Boot once and show what the guest prints.
    #[command(after_help = BOOT_EXAMPLES)]
    Boot {
        #[command(flatten)]
        machine: MachineArguments,
        /// Write the guest's report as JSON to this file (`-`: standard output, the guest's text then goes to standard error).
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Also write COM1 to this file.
        #[arg(long, value_name = "FILE")]
        log: Option<PathBuf>,
    },
    /// Boot one disk again and again until the guest reports convergence; write report.json, report.html and report.txt.
    #[command(after_help = CONVERGE_EXAMPLES)]
    Converge {
        #[command(flatten)]
        machine: MachineArguments,
        /// Boots at most.
        #[arg(long, value_name = "N", default_value_t = 12)]
        boots: u32,
        /// Directory for report.json, report.html, report.txt and COM1 logs; made if missing.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Print the JSON report to standard output instead of the text.
        #[arg(long)]
        json: bool,
        /// An exported native image to compare with at the end, on the same machine and disks.
        #[arg(long, value_name = "ELF")]
        native_kernel: Option<PathBuf>,
        /// The export tool's audit (JSON) of the native image, carried into the report.
        #[arg(long, value_name = "FILE", requires = "native_kernel")]
        native_audit: Option<PathBuf>,
        /// Boots of the native image; the self-optimising image boots once after each.
        #[arg(long, value_name = "N", default_value_t = 3)]
        native_boots: u32,
        /// Rounds of reading and loading the model, one after the other, in one more boot of each image; 0 makes no such boot.
        #[arg(long, value_name = "N", default_value_t = 0, requires = "native_kernel")]
        load_rounds: u32,
        /// Commit to name in the report; without it, git is asked.
        #[arg(long, value_name = "HASH")]
        commit: Option<String>,
    },
    /// Find out which accelerator boots the kernel here, by smoke boots.
    Probe {
        #[command(flatten)]
        machine: MachineArguments,
    },
}

const BOOT_EXAMPLES: &str = "\
Examples:
  qemu-runs boot --kernel bareflow.elf --append mode=smoke
  qemu-runs boot --kernel bareflow.elf --disk disk.img --model smollm2.gguf \\
      --append 'prompt=\"Once upon a time\" max_tokens=64'
  qemu-runs boot --disk usb.img --firmware ovmf          (GRUB on the disk starts its kernel)

Exit code: 0 if the boot passed, 1 otherwise.";

const CONVERGE_EXAMPLES: &str = "\
Examples:
  qemu-runs converge --kernel bareflow.elf --disk disk.img --model smollm2.gguf --out out/run
  qemu-runs converge --kernel bareflow.elf --disk disk.img --boots 40 --accel kvm --json > report.json

The disk keeps the snapshot between boots; build it with: bootimage build --kernel bareflow.elf --out disk.img
Exit code: 0 if the guest converged, 3 if it did not within --boots, 1 on any failure.";

#[derive(Args)]
struct MachineArguments {
    /// The guest's ELF file, loaded by QEMU itself; without it the machine boots from --disk.
    #[arg(long, value_name = "ELF")]
    kernel: Option<PathBuf>,
    /// The boot volume: a FAT16 image made by bootimage, written by the guest.
    #[arg(long, value_name = "IMG")]
    disk: Option<PathBuf>,
    /// A model file, attached raw and read-only as the second disk.
    #[arg(long, value_name = "FILE", requires = "disk")]
    model: Option<PathBuf>,
    /// Guest options, `key=value` words; they win over BAREFLOW.CFG. Only with --kernel.
    #[arg(long, value_name = "WORDS", default_value = "", requires = "kernel")]
    append: String,
    /// What executes the guest; kvm boots the kernel with mode=smoke first, auto falls back to TCG if that fails.
    #[arg(long, value_enum, default_value = "auto")]
    accel: AccelChoice,
    /// QEMU's CPU model [default: host under KVM, max under TCG].
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Guest memory.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory_mib: u32,
    /// Guest cores.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Firmware of a boot without --kernel.
    #[arg(long, value_enum, default_value = "bios")]
    firmware: FirmwareChoice,
    /// Longest time one boot may take [default: 300 under KVM, 1800 under TCG].
    #[arg(long, value_name = "SECONDS")]
    timeout_s: Option<u64>,
    /// Longest time without a byte on either serial port [default: 60 under KVM, 600 under TCG].
    #[arg(long, value_name = "SECONDS")]
    silence_s: Option<u64>,
    /// The QEMU to use [default: qemu-system-x86_64 from PATH].
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
    /// A further QEMU argument; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum FirmwareChoice {
    Bios,
    Ovmf,
}

impl MachineArguments {
    fn qemu(&self) -> Result<Qemu> {
        Ok(match &self.qemu {
            Some(program) => Qemu::at(program)?,
            None => Qemu::find()?,
        })
    }

    /// The ELF file to probe with: the one given, or the one on the disk.
    fn probe(&self, qemu: &Qemu) -> Result<Probe> {
        if let Some(kernel) = &self.kernel {
            return Ok(probe(qemu, kernel, self.accel, self.memory_mib, self.cpus, KVM_SMOKE_LIMIT)?);
        }
        let Some(disk) = &self.disk else { bail!("give --kernel ELF or --disk IMG: there is nothing to boot") };
        let bytes = bootimage::read_file(disk, "KERNEL.ELF")?;
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let kernel = directory.path().join("kernel.elf");
        std::fs::write(&kernel, bytes).context("cannot unpack the kernel")?;
        let qemu = qemu.clone().with_full_firmware();
        // Whoever asks for KVM may wait for it.
        let limit = if self.accel == AccelChoice::Kvm { KVM_SMOKE_LIMIT } else { KVM_DISK_SMOKE_LIMIT };
        Ok(probe(&qemu, &kernel, self.accel, self.memory_mib, self.cpus, limit)?)
    }

    fn choose(&self, qemu: &Qemu) -> Result<Probe> {
        match self.accel {
            AccelChoice::Tcg => Ok(Probe { accel: Accel::Tcg, attempts: Vec::new() }),
            AccelChoice::Kvm | AccelChoice::Auto => self.probe(qemu),
        }
    }

    fn machine(&self, accel: Accel) -> Result<Machine> {
        let boot = match (&self.kernel, &self.disk, self.firmware) {
            (Some(elf), ..) => BootFrom::Kernel { elf: elf.clone(), append: self.append.clone() },
            (None, Some(_), FirmwareChoice::Bios) => BootFrom::Disk(Firmware::Bios),
            (None, Some(_), FirmwareChoice::Ovmf) => BootFrom::Disk(Firmware::Ovmf),
            (None, None, _) => bail!("give --kernel ELF or --disk IMG: there is nothing to boot"),
        };
        let mut drives = Vec::new();
        drives.extend(self.disk.iter().map(|path| Drive { path: path.clone(), read_only: false }));
        drives.extend(self.model.iter().map(|path| Drive { path: path.clone(), read_only: true }));
        Ok(Machine {
            accel,
            cpu_model: self.cpu.clone(),
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            boot,
            drives,
            extra: self.qemu_arg.clone(),
        })
    }

    fn deadlines(&self, accel: Accel) -> Deadlines {
        let (boot, silence) = if accel == Accel::Kvm { (300, 60) } else { (1800, 600) };
        Deadlines {
            boot: Duration::from_secs(self.timeout_s.unwrap_or(boot)),
            silence: Duration::from_secs(self.silence_s.or(self.timeout_s).unwrap_or(silence)),
        }
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            print_note(&format!("qemu-runs: {error:#}"));
            ExitCode::from(1)
        }
    }
}

fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Boot { machine, json, log } => run_boot(&machine, json.as_deref(), log.as_deref()),
        Action::Converge {
            machine,
            boots,
            out,
            json,
            native_kernel,
            native_audit,
            native_boots,
            load_rounds,
            commit,
        } => {
            let audit = native_audit.as_deref().map(read_json).transpose()?;
            let native = native_kernel.map(|elf| NativeSpec { elf, audit, boots: native_boots, load_rounds });
            run_converge(&machine, boots, out.as_deref(), json, native, commit)
        }
        Action::Probe { machine } => {
            let qemu = machine.qemu()?;
            let probe = machine.probe(&qemu)?;
            print_line(&format!("{}\n{}\nuse: --accel {}", qemu.version(), probe.details(), probe.accel))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Writes a line to standard error. `eprintln!` would end the run where nobody reads that.
fn print_note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes a line to standard output; `println!` would panic where that is full or closed.
fn print_line(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").context(STANDARD_OUTPUT)
}

/// What could not be written.
const STANDARD_OUTPUT: &str = "cannot write to standard output";

fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

fn run_boot(arguments: &MachineArguments, json: Option<&Path>, log: Option<&Path>) -> Result<ExitCode> {
    for output in json.into_iter().chain(log) {
        let inputs = [&arguments.kernel, &arguments.disk, &arguments.model, &arguments.qemu];
        bootimage::not_over(inputs.into_iter().flatten(), output)?;
    }
    let qemu = arguments.qemu()?;
    let chosen = arguments.choose(&qemu)?;
    print_note(&format!("accel: {}", chosen.reason()));
    let machine = arguments.machine(chosen.accel)?;
    let deadlines = arguments.deadlines(chosen.accel);
    let json_to_stdout = json == Some(Path::new("-"));
    let mut watch = |event: Event<'_>| {
        if let Event::Console(bytes) = event {
            // A closed pipe must not end the boot: the verdict still counts.
            let _ = if json_to_stdout {
                std::io::stderr().write_all(bytes)
            } else {
                std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush())
            };
        }
    };
    let Some(json) = json else {
        let boot = Session::start(&qemu, &machine, log)?.run(deadlines, &mut watch)?;
        print_note(&format!("passed in {:.1} s, {} messages", boot.wall.as_secs_f64(), boot.transcript.messages));
        return Ok(ExitCode::SUCCESS);
    };
    let record = boot(&qemu, &machine, deadlines, log, &mut watch)?;
    let text = serde_json::to_string_pretty(&record)? + "\n";
    if json_to_stdout {
        std::io::stdout().write_all(text.as_bytes()).context(STANDARD_OUTPUT)?;
    } else {
        std::fs::write(json, text).with_context(|| format!("cannot write {}", json.display()))?;
    }
    print_note(&format!("passed in {:.1} s", record.wall_s));
    Ok(ExitCode::SUCCESS)
}

fn run_converge(
    arguments: &MachineArguments,
    max_boots: u32,
    out: Option<&Path>,
    json: bool,
    native: Option<NativeSpec>,
    commit: Option<String>,
) -> Result<ExitCode> {
    if arguments.disk.is_none() {
        bail!(
            "converge needs --disk IMG: without a disk no boot can remember the one before; make one with bootimage build"
        );
    }
    let qemu = arguments.qemu()?;
    if let Some(out) = out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make the directory {}", out.display()))?;
    }
    let chosen = arguments.choose(&qemu)?;
    print_note(&format!("accel: {}", chosen.reason()));
    let spec = RunSpec {
        machine: arguments.machine(chosen.accel)?,
        deadlines: arguments.deadlines(chosen.accel),
        max_boots,
        accel_reason: chosen.reason(),
        logs: out.map(Path::to_owned),
        native,
        environment: {
            let here = Environment::of_host(Path::new("."), std::env::args().collect::<Vec<_>>().join(" "));
            Environment { commit: commit.or(here.commit.clone()), ..here }
        },
    };
    let mut display = Display::new(max_boots);
    let report = converge(&qemu, &spec, &mut |progress| display.show(progress));
    display.finish();
    // A run takes long: a full disk under the one output does not cost the other.
    let written =
        out.map(|out| report.write(out).with_context(|| format!("cannot write the report to {}", out.display())));
    print_line(&if json { report.to_json() } else { text::summary(&report) })?;
    written.transpose()?;
    if let Some(out) = out {
        print_note(&format!("report: {}", out.join("report.html").display()));
    }
    Ok(match (&report.failure, report.converged_at) {
        (Some(_), _) => ExitCode::from(1),
        // Not 2: that is a wrong command line.
        (None, None) => ExitCode::from(3),
        (None, Some(_)) => ExitCode::SUCCESS,
    })
}
