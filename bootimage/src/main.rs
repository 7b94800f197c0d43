//! `bootimage`: disk images from the command line.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use bootimage::{DEFAULT_SLOT_MIB, Entry, FileSpec, ImageSpec, short_name, split_name};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Builds BareFlow disk images (MBR, one FAT16 partition) and looks into them. Needs no root and no loop mounts.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build an image.
    #[command(after_help = BUILD_EXAMPLES)]
    Build {
        /// The guest's ELF file.
        #[arg(long, value_name = "ELF")]
        kernel: PathBuf,
        /// A model to put on the volume, as MODEL.GGU (GGUF) or MODEL.BIN (llama2.c); FILE=NAME.EXT names it otherwise.
        /// May be repeated. Models too large for FAT16 go on a raw second disk: qemu-runs --model FILE.
        #[arg(long, value_name = "FILE[=NAME.EXT]")]
        model: Vec<String>,
        /// The tokenizer.bin of a llama2.c model, put on the volume as TOK.BIN and named in BAREFLOW.CFG.
        #[arg(long, value_name = "FILE")]
        tokenizer: Option<PathBuf>,
        /// Text for BAREFLOW.CFG: key=value lines such as `prompt="Once upon a time"`.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The image to write.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Size of the image; without it, what the files need and some room.
        #[arg(long, value_name = "MIB")]
        size_mib: Option<u64>,
        /// Length of each of the two snapshot slots.
        #[arg(long, value_name = "MIB", default_value_t = DEFAULT_SLOT_MIB)]
        slot_mib: u64,
        /// Install GRUB, so that the disk boots by itself on BIOS and UEFI machines.
        #[arg(long)]
        bootable: bool,
        /// Words for the kernel's command line, such as kernel.cores=2: those that BAREFLOW.CFG cannot hold.
        #[arg(long, value_name = "WORDS", default_value = "", requires = "bootable")]
        append: String,
        /// Replace the image if it exists.
        #[arg(long)]
        force: bool,
    },
    /// List the files of an image, with where each lies.
    List {
        /// The image.
        image: PathBuf,
    },
    /// Copy one file out of an image.
    Get {
        /// The image.
        image: PathBuf,
        /// Its path on the volume, such as REPORT.TXT.
        name: String,
        /// The file to write; `-` is standard output.
        out: PathBuf,
    },
}

const BUILD_EXAMPLES: &str = "\
Examples:
  bootimage build --kernel bareflow.elf --config demo.cfg --out disk.img
  bootimage build --kernel bareflow.elf --model smollm2.gguf --bootable --append 'kernel.memory=2G' --out boot.img
  bootimage build --kernel bareflow.elf --model stories.bin --tokenizer tok512.bin --out disk.img";

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bootimage: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(action: Action) -> Result<()> {
    match action {
        Action::Build { kernel, model, tokenizer, config, out, size_mib, slot_mib, bootable, append, force } => {
            let mut spec =
                ImageSpec { size_mib, slot_mib, bootable, append, overwrite: force, ..ImageSpec::new(kernel) };
            if let Some(path) = config {
                spec.config = std::fs::read_to_string(&path)
                    .with_context(|| format!("cannot read the configuration {}", path.display()))?;
            }
            for (i, argument) in model.iter().enumerate() {
                let (path, name) = split_name(argument);
                let name = name.unwrap_or_else(|| default_name(&path, i == 0));
                spec.files.push(FileSpec { name, path });
            }
            if let Some(path) = tokenizer {
                // In front, so that the user's own lines win.
                let mut lines = String::from("tokenizer=TOK.BIN\n");
                if let Some(first) = spec.files.first() {
                    lines = format!("model={}\n{lines}", first.name);
                }
                spec.config.insert_str(0, &lines);
                spec.files.push(FileSpec { name: "TOK.BIN".into(), path });
            }
            let entries = bootimage::build(&spec, &out)?;
            let bytes = std::fs::metadata(&out).map(|m| m.len()).unwrap_or(0);
            let boots = if bootable { ", boots on BIOS and UEFI" } else { "" };
            writeln!(std::io::stdout(), "{}: {} MiB{boots}", out.display(), bytes >> 20).context(STANDARD_OUTPUT)?;
            print_entries(&entries).context(STANDARD_OUTPUT)?;
        }
        Action::List { image } => print_entries(&bootimage::list(&image)?).context(STANDARD_OUTPUT)?,
        Action::Get { image, name, out } => {
            bootimage::not_over([&image], &out)?;
            let bytes = bootimage::read_file(&image, &name)?;
            if out == Path::new("-") {
                let mut stdout = std::io::stdout();
                stdout.write_all(&bytes).and_then(|()| stdout.flush()).context(STANDARD_OUTPUT)?;
            } else {
                std::fs::write(&out, bytes).with_context(|| format!("cannot write {}", out.display()))?;
            }
        }
    }
    Ok(())
}

/// The first model takes the name the guest looks for by itself.
fn default_name(path: &Path, first: bool) -> String {
    if !first {
        return short_name(path);
    }
    let mut magic = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut magic));
    if read.is_ok() && magic == *b"GGUF" { "MODEL.GGU".into() } else { "MODEL.BIN".into() }
}

/// What could not be written.
const STANDARD_OUTPUT: &str = "cannot write to standard output";

/// `println!` would panic where standard output is full or closed.
fn print_entries(entries: &[Entry]) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{:>12}  {:>12}  {:>6}  path", "bytes", "at byte", "pieces")?;
    for entry in entries {
        let at = entry.offset_bytes().map_or("-".to_owned(), |at| at.to_string());
        writeln!(out, "{:>12}  {at:>12}  {:>6}  {}", entry.len_bytes, entry.extents.len(), entry.path)?;
    }
    Ok(())
}
