//! `export-tool`: disk image and kernel library in, audited native image out.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use export_tool::{DiskImageSpec, ExportSpec, Exported, audit, export};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Freezes a converged snapshot into a native image without a compiler.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example:\n  export-tool link --disk out/demo/disk.img --kernel-library target/guest/x86_64-unknown-linux-gnu/native/libkernel.a \\\n      --linker-script kernel/link.ld --out native.elf --disk-image native.img"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Link the snapshot's kernels with the compiler-free kernel, and audit the result.
    Link {
        /// Disk image that holds the snapshot.
        #[arg(long)]
        disk: PathBuf,
        /// Kernel built as a static library without the compiler (`cargo xtask native-library` prints its path).
        #[arg(long)]
        kernel_library: PathBuf,
        /// The kernel's linker script.
        #[arg(long, default_value = "kernel/link.ld")]
        linker_script: PathBuf,
        /// Model file to embed, so that the image needs no disk at all.
        #[arg(long)]
        embed_model: Option<PathBuf>,
        /// The native ELF to write.
        #[arg(long)]
        out: PathBuf,
        /// Also make a disk that boots the native ELF by itself, on BIOS and UEFI machines: with GRUB, and with the models
        /// and tokenizers that are on --disk.
        #[arg(long, value_name = "IMG")]
        disk_image: Option<PathBuf>,
        /// Text for BAREFLOW.CFG of --disk-image [default: that of --disk].
        #[arg(long, value_name = "FILE", requires = "disk_image")]
        config: Option<PathBuf>,
        /// Also write OUT.debug with symbols.
        #[arg(long)]
        keep_debug: bool,
        /// Export although the snapshot's last boot had not converged.
        #[arg(long)]
        allow_unconverged: bool,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Audit an unstripped ELF: no compiler in it, nothing writable and executable.
    Audit {
        /// The ELF file.
        elf: PathBuf,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What could not be written.
const STANDARD_OUTPUT: &str = "writing standard output";

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where standard error cannot be written there is nobody to tell.
            let _ = writeln!(io::stderr(), "export-tool: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let mut stdout = io::stdout();
    match command {
        Command::Link {
            disk,
            kernel_library,
            linker_script,
            embed_model,
            out,
            disk_image,
            config,
            keep_debug,
            allow_unconverged,
            json,
        } => {
            let read = |path: PathBuf| {
                std::fs::read_to_string(&path).with_context(|| format!("reading the settings {}", path.display()))
            };
            let config = config.map(read).transpose()?;
            let disk_image = disk_image.map(|out| DiskImageSpec { out, config });
            let exported = export(&ExportSpec {
                disk,
                kernel_library,
                linker_script,
                embed_model,
                out,
                disk_image,
                keep_debug,
                allow_unconverged,
            })?;
            if json {
                writeln!(stdout, "{}", serde_json::to_string_pretty(&exported)?).context(STANDARD_OUTPUT)?;
            } else {
                print(&exported, &mut stdout).context(STANDARD_OUTPUT)?;
            }
            Ok(())
        }
        Command::Audit { elf, json } => {
            let bytes = std::fs::read(&elf).with_context(|| format!("reading {}", elf.display()))?;
            let audit = audit::audit(&bytes).with_context(|| elf.display().to_string())?;
            if json {
                writeln!(stdout, "{}", serde_json::to_string_pretty(&audit)?).context(STANDARD_OUTPUT)?;
            } else if audit.passed {
                writeln!(stdout, "{}: passed ({} symbols, {} segments)", elf.display(), audit.symbols, audit.segments)
                    .context(STANDARD_OUTPUT)?;
            }
            anyhow::ensure!(audit.passed, "{} failed the audit:\n  {}", elf.display(), audit.findings.join("\n  "));
            Ok(())
        }
    }
}

fn print(exported: &Exported, out: &mut impl Write) -> io::Result<()> {
    let own_bytes = exported.sizes.elf_bytes - exported.embedded_model_bytes;
    match exported.embedded_model_bytes {
        0 => writeln!(out, "{}: {own_bytes} bytes", exported.elf.display()),
        model => {
            writeln!(out, "{}: {own_bytes} bytes without weights, and a model of {model} bytes", exported.elf.display())
        }
    }?;
    writeln!(
        out,
        "  text {} bytes, of which {} kernels take {} bytes",
        exported.sizes.text_bytes,
        exported.kernels.len(),
        exported.kernel_bytes
    )?;
    for kernel in &exported.kernels {
        writeln!(out, "    {kernel}")?;
    }
    for gap in exported.gaps() {
        writeln!(out, "    {gap}")?;
    }
    writeln!(
        out,
        "  audit passed: {} symbols and {} segments looked at, no compiler, no writable and executable memory",
        exported.audit.symbols, exported.audit.segments
    )?;
    if let Some(disk) = &exported.disk_image {
        writeln!(out, "{}: boots it on BIOS and UEFI", disk.display())?;
    }
    Ok(())
}
