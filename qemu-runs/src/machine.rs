//! A QEMU machine as a value, and the QEMU that runs it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What executes the guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// The CPU, through Linux's KVM.
    Kvm,
    /// QEMU's translator: right results, meaningless times.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }

    /// CPU model with every feature the accelerator has to offer.
    pub fn default_cpu_model(self) -> &'static str {
        match self {
            // Some hosts list IA32_ARCH_CAPABILITIES and refuse to set it, on which QEMU aborts; no guest of ours reads it.
            Accel::Kvm => "host,arch-capabilities=off",
            Accel::Tcg => "max",
        }
    }
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a disk boot starts from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Firmware {
    /// SeaBIOS, which QEMU brings along.
    Bios,
    /// OVMF, UEFI for virtual machines.
    Ovmf,
}

impl Firmware {
    /// QEMU has it, or it is where distributions put it.
    pub fn is_there(self) -> bool {
        match self {
            Firmware::Bios => true,
            Firmware::Ovmf => ovmf().is_ok(),
        }
    }
}

/// Where the guest comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BootFrom {
    /// QEMU loads the ELF file itself (PVH).
    Kernel {
        /// The guest.
        elf: PathBuf,
        /// Its command line: `key=value` words.
        append: String,
    },
    /// Firmware boots the first drive through its boot loader.
    Disk(Firmware),
}

/// A virtio block device with a raw image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Drive {
    /// The image.
    pub path: PathBuf,
    /// The guest cannot write it.
    pub read_only: bool,
}

/// A machine: everything QEMU is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    /// What executes instructions.
    pub accel: Accel,
    /// QEMU's `-cpu`; `None` takes [`Accel::default_cpu_model`].
    pub cpu_model: Option<String>,
    /// Guest memory.
    pub memory_mib: u32,
    /// Cores.
    pub cpus: u32,
    /// Kernel or disk.
    pub boot: BootFrom,
    /// In order: the boot volume (FAT16 image), then the raw model file. At most two are used by the guest.
    pub drives: Vec<Drive>,
    /// Further QEMU arguments, appended as they are.
    pub extra: Vec<String>,
}

/// Why no machine can be started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// QEMU is not installed.
    #[error("{program} was not found; install it with: apt-get install qemu-system-x86")]
    QemuMissing {
        /// What was looked for.
        program: String,
    },
    /// QEMU is there and does not run.
    #[error("{} does not run: {message}", path.display())]
    QemuBroken {
        /// The program.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// No UEFI firmware.
    #[error("UEFI firmware was not found ({looked_for}); install it with: apt-get install ovmf")]
    OvmfMissing {
        /// Paths tried.
        looked_for: String,
    },
    /// A file of the machine does not exist.
    #[error("{what} {} cannot be used: {message}", path.display())]
    FileMissing {
        /// Its role.
        what: &'static str,
        /// Where it was expected.
        path: PathBuf,
        /// The system's reason.
        message: String,
    },
}

/// An installed QEMU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Qemu {
    program: PathBuf,
    version: String,
    kernel_firmware: Option<PathBuf>,
}

/// Firmware that only starts the kernel given to QEMU, best first; it comes with QEMU. Measured on a host whose KVM emulates
/// ring 0: 0.8 s from start to end of a smoke boot, 12 s of CPU time with the full SeaBIOS.
const KERNEL_FIRMWARE: [&str; 2] = ["qboot.rom", "bios-microvm.bin"];

const PROGRAM: &str = "qemu-system-x86_64";
const OVMF: [&str; 6] = [
    "/usr/share/ovmf/OVMF.fd",
    "/usr/share/OVMF/OVMF.fd",
    "/usr/share/OVMF/OVMF_CODE.fd",
    "/usr/share/OVMF/OVMF_CODE_4M.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE.fd",
    "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
];

impl Qemu {
    /// `qemu-system-x86_64` from `PATH`.
    ///
    /// # Errors
    /// [`MachineError::QemuMissing`] with the command that installs it, or [`MachineError::QemuBroken`].
    pub fn find() -> Result<Self, MachineError> {
        Self::at(PROGRAM)
    }

    /// The given program.
    ///
    /// # Errors
    /// As for [`Qemu::find`].
    pub fn at(program: impl Into<PathBuf>) -> Result<Self, MachineError> {
        let program = program.into();
        match Command::new(&program).arg("--version").output() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(MachineError::QemuMissing { program: program.display().to_string() })
            }
            Err(e) => Err(MachineError::QemuBroken { path: program, message: e.to_string() }),
            Ok(run) if !run.status.success() => Err(MachineError::QemuBroken {
                path: program,
                message: format!("--version: {}, {}", run.status, String::from_utf8_lossy(&run.stderr).trim()),
            }),
            Ok(run) => {
                let version = String::from_utf8_lossy(&run.stdout).lines().next().unwrap_or_default().trim().to_owned();
                let kernel_firmware = kernel_firmware(&program);
                Ok(Self { program, version, kernel_firmware })
            }
        }
    }

    /// The program's path or name.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Small firmware for boots of a kernel file, if this QEMU brings one.
    pub fn kernel_firmware(&self) -> Option<&Path> {
        self.kernel_firmware.as_deref()
    }

    /// The same QEMU starting kernels through its whole SeaBIOS, as a disk boot does.
    pub fn with_full_firmware(mut self) -> Self {
        self.kernel_firmware = None;
        self
    }

    /// First line of `--version`.
    pub fn version(&self) -> &str {
        &self.version
    }
}

/// Looks through the data directories that `-L help` prints.
fn kernel_firmware(program: &Path) -> Option<PathBuf> {
    let run = Command::new(program).args(["-L", "help"]).output().ok()?;
    let directories = String::from_utf8(run.stdout).ok()?;
    let places =
        KERNEL_FIRMWARE.iter().flat_map(|name| directories.lines().map(move |d| Path::new(d.trim()).join(name)));
    places.into_iter().find(|path| path.is_file())
}

impl Machine {
    /// A machine that boots `elf` with `append` and has no drives: 512 MiB, one core.
    pub fn with_kernel(accel: Accel, elf: impl Into<PathBuf>, append: impl Into<String>) -> Self {
        Self {
            accel,
            cpu_model: None,
            memory_mib: 512,
            cpus: 1,
            boot: BootFrom::Kernel { elf: elf.into(), append: append.into() },
            drives: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// QEMU's arguments, with COM1 going to the file `console` and COM2 to standard output.
    ///
    /// # Errors
    /// [`MachineError::FileMissing`] or [`MachineError::OvmfMissing`].
    pub fn arguments(&self, qemu: &Qemu, console: &Path) -> Result<Vec<OsString>, MachineError> {
        let mut out: Vec<OsString> = Vec::new();
        let mut add = |words: &[&dyn AsRef<OsStr>]| out.extend(words.iter().map(|w| w.as_ref().to_owned()));
        add(&[&"-nodefaults", &"-no-user-config", &"-display", &"none", &"-no-reboot"]);
        add(&[&"-machine", &format!("q35,accel={}", self.accel)]);
        add(&[&"-cpu", &self.cpu_model.as_deref().unwrap_or(self.accel.default_cpu_model())]);
        add(&[&"-m", &self.memory_mib.to_string(), &"-smp", &self.cpus.to_string()]);
        add(&[&"-chardev", &option("file,id=com1,path=", console), &"-serial", &"chardev:com1"]);
        add(&[&"-chardev", &"stdio,id=com2,signal=off", &"-serial", &"chardev:com2"]);
        add(&[&"-device", &"isa-debug-exit,iobase=0xf4,iosize=0x04"]);
        match &self.boot {
            BootFrom::Kernel { elf, append } => {
                readable("the kernel", elf)?;
                if let Some(firmware) = qemu.kernel_firmware() {
                    add(&[&"-bios", &firmware]);
                }
                add(&[&"-kernel", &elf, &"-append", append]);
            }
            BootFrom::Disk(firmware) => {
                // A boot loader expects a screen to exist, even if nobody looks.
                add(&[&"-vga", &"std"]);
                if *firmware == Firmware::Ovmf {
                    add(&[&"-bios", &ovmf()?]);
                }
            }
        }
        for (i, drive) in self.drives.iter().enumerate() {
            readable("the disk image", &drive.path)?;
            let mode = if drive.read_only { "on" } else { "off" };
            add(&[&"-drive", &option(&format!("if=none,id=disk{i},format=raw,readonly={mode},file="), &drive.path)]);
            let order = if i == 0 && matches!(self.boot, BootFrom::Disk(_)) { ",bootindex=0" } else { "" };
            add(&[&"-device", &format!("virtio-blk-pci,drive=disk{i}{order}")]);
        }
        add(&self.extra.iter().map(|e| e as &dyn AsRef<OsStr>).collect::<Vec<_>>());
        Ok(out)
    }

    /// The command as a shell would take it, for people.
    pub fn command_line(&self, qemu: &Qemu) -> String {
        let words = self.arguments(qemu, Path::new("console.log")).unwrap_or_default();
        let words = std::iter::once(qemu.program.as_os_str()).chain(words.iter().map(OsString::as_os_str));
        words.map(|w| quote(&w.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }
}

/// `prefix` and a path whose commas are doubled, as QEMU's option syntax wants them.
fn option(prefix: &str, path: &Path) -> OsString {
    let mut out = OsString::from(prefix);
    // A path that is not UTF-8 cannot be escaped; it is passed as it is and works unless it holds a comma.
    match path.to_str() {
        Some(text) => out.push(text.replace(',', ",,")),
        None => out.push(path),
    }
    out
}

fn readable(what: &'static str, path: &Path) -> Result<(), MachineError> {
    match std::fs::File::open(path).and_then(|f| f.metadata()) {
        Ok(metadata) if !metadata.is_dir() => Ok(()),
        Ok(_) => Err(MachineError::FileMissing { what, path: path.to_owned(), message: "it is a directory".into() }),
        Err(e) => Err(MachineError::FileMissing { what, path: path.to_owned(), message: e.to_string() }),
    }
}

fn ovmf() -> Result<PathBuf, MachineError> {
    let found = OVMF.iter().map(PathBuf::from).find(|p| p.exists());
    found.ok_or_else(|| MachineError::OvmfMissing { looked_for: OVMF.join(", ") })
}

/// `word` as a POSIX shell reads it back.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu() -> Qemu {
        Qemu { program: "qemu".into(), version: "test".into(), kernel_firmware: Some("/firmware/qboot.rom".into()) }
    }

    fn arguments(machine: &Machine) -> Vec<String> {
        let arguments = machine.arguments(&qemu(), Path::new("/c,d/console")).unwrap();
        arguments.into_iter().map(|a| a.into_string().unwrap()).collect()
    }

    fn after<'a>(arguments: &'a [String], flag: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|w| w[0] == flag).map(|w| w[1].as_str()).collect()
    }

    #[test]
    fn a_kernel_machine_says_everything_the_guest_relies_on() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, "x").unwrap();
            path
        };
        let mut machine = Machine::with_kernel(Accel::Tcg, file("k.elf"), "prompt=\"a, b\" mode=smoke");
        machine.drives = vec![
            Drive { path: file("disk,1.img"), read_only: false },
            Drive { path: file("model.gguf"), read_only: true },
        ];
        machine.extra = vec!["-d".into(), "int".into()];
        let arguments = arguments(&machine);
        assert_eq!(after(&arguments, "-machine"), ["q35,accel=tcg"]);
        assert_eq!(after(&arguments, "-cpu"), ["max"]);
        assert_eq!(after(&arguments, "-bios"), ["/firmware/qboot.rom"]);
        assert_eq!(after(&arguments, "-append"), ["prompt=\"a, b\" mode=smoke"], "one word, unchanged");
        assert_eq!(after(&arguments, "-serial"), ["chardev:com1", "chardev:com2"], "the order makes COM1 and COM2");
        assert_eq!(after(&arguments, "-chardev"), ["file,id=com1,path=/c,,d/console", "stdio,id=com2,signal=off"]);
        let drives = after(&arguments, "-drive");
        assert!(drives[0].starts_with("if=none,id=disk0,format=raw,readonly=off,file="), "{drives:?}");
        assert!(drives[0].ends_with("/disk,,1.img"), "{drives:?}");
        assert!(drives[1].starts_with("if=none,id=disk1,format=raw,readonly=on,file="), "{drives:?}");
        let devices = after(&arguments, "-device");
        assert_eq!(
            devices,
            ["isa-debug-exit,iobase=0xf4,iosize=0x04", "virtio-blk-pci,drive=disk0", "virtio-blk-pci,drive=disk1"]
        );
        assert!(arguments.contains(&"-no-reboot".to_owned()));
        assert_eq!(arguments[arguments.len() - 2..], ["-d", "int"]);
    }

    #[test]
    fn a_disk_machine_boots_its_first_drive() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, "x").unwrap();
        let mut machine = Machine::with_kernel(Accel::Kvm, "unused", "");
        machine.boot = BootFrom::Disk(Firmware::Bios);
        machine.drives = vec![Drive { path, read_only: false }];
        let arguments = arguments(&machine);
        assert!(!arguments.contains(&"-kernel".to_owned()));
        assert!(!arguments.contains(&"-bios".to_owned()), "disks need the whole SeaBIOS");
        assert!(arguments.contains(&"virtio-blk-pci,drive=disk0,bootindex=0".to_owned()));
        assert_eq!(after(&arguments, "-cpu"), ["host,arch-capabilities=off"]);
    }

    #[test]
    fn missing_files_are_named_before_qemu_starts() {
        let machine = Machine::with_kernel(Accel::Tcg, "/nowhere/k.elf", "");
        let error = machine.arguments(&qemu(), Path::new("c")).unwrap_err();
        assert!(matches!(&error, MachineError::FileMissing { what: "the kernel", .. }), "{error}");
        let error = Qemu::at("/nowhere/qemu").unwrap_err();
        assert!(
            matches!(error, MachineError::QemuMissing { .. }) && error.to_string().contains("apt-get install"),
            "{error}"
        );
        let error = Qemu::at("false").unwrap_err();
        assert!(matches!(error, MachineError::QemuBroken { .. }), "{error}");
    }

    #[test]
    fn shell_words_are_quoted_when_they_must_be() {
        assert_eq!(quote("a=b,c"), "a=b,c");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), "'it'\\''s'");
        assert_eq!(quote(""), "''");
    }
}
