//! `export-tool`: disk image and kernel library in, audited native image out.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use export_tool::{ExportSpec, audit, export};
use std::path::PathBuf;

/// Freezes a converged snapshot into a native image without a compiler.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example:\n  export-tool link --disk out/demo/disk.img --kernel-library target/guest/x86_64-unknown-linux-gnu/image/libkernel.a \\\n      --linker-script kernel/link.ld --out native.elf"
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

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Link {
            disk,
            kernel_library,
            linker_script,
            embed_model,
            out,
            keep_debug,
            allow_unconverged,
            json,
        } => {
            let spec =
                ExportSpec { disk, kernel_library, linker_script, embed_model, out, keep_debug, allow_unconverged };
            let exported = export(&spec)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&exported)?);
                return Ok(());
            }
            println!("{}: {} bytes", exported.elf.display(), exported.sizes.elf_bytes);
            println!(
                "  text {} bytes, of which {} kernels take {} bytes",
                exported.sizes.text_bytes,
                exported.kernels.len(),
                exported.kernel_bytes
            );
            for kernel in &exported.kernels {
                println!("    {kernel}");
            }
            for key in &exported.without_kernel {
                println!("    {key}: NO KERNEL, no variant matched the hand-written op; the image will be slow there");
            }
            println!(
                "  audit passed: {} symbols and {} segments looked at, no compiler, no writable and executable memory",
                exported.audit.symbols, exported.audit.segments
            );
            Ok(())
        }
        Command::Audit { elf, json } => {
            let bytes = std::fs::read(&elf).with_context(|| format!("reading {}", elf.display()))?;
            let audit = audit::audit(&bytes)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&audit)?);
            } else if audit.passed {
                println!("{}: passed ({} symbols, {} segments)", elf.display(), audit.symbols, audit.segments);
            }
            anyhow::ensure!(audit.passed, "{} failed the audit:\n  {}", elf.display(), audit.findings.join("\n  "));
            Ok(())
        }
    }
}
