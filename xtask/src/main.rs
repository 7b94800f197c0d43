//! `cargo xtask`: the commands of the README, and their parts.
#![forbid(unsafe_code)]

mod agree;
mod bench;
mod demo;
mod demo_model;
mod hosted_program;
mod kernel_build;
mod packages;
mod real_model;
mod scenarios;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and demonstrates BareFlow")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a real model under QEMU until it converges, export the native image, boot that too, write a report.
    Demo(demo::DemoArgs),
    /// Run every test: formatting, lints, host tests, fuzz targets, the demo model where it is, guest self-tests and scenarios.
    Test,
    /// Run many inputs through every fuzz target (`fuzz` has them) and say how many each survived: damaged files through the
    /// parsers, random functions and kernels through the compiler.
    Fuzz {
        /// Inputs for each target.
        #[arg(long, default_value_t = 1_000_000)]
        cases: u64,
        /// Seed of the inputs.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Targets; all when none is named.
        targets: Vec<String>,
    },
    /// Boot every scenario under QEMU: the last step of `test` alone.
    Scenarios {
        /// Only those whose name contains this.
        #[arg(default_value = "")]
        only: String,
    },
    /// Measure BareFlow against llama.cpp on the same files, interleaved, and write docs/BENCHMARKS.md.
    Bench(bench::BenchArgs),
    /// Compare the logits of a GGUF model on a text with llama.cpp's, as it is and with its weights as F32.
    Agree(agree::AgreeArgs),
    /// Build the self-optimising image and print its path.
    JitImage,
    /// Build the compiler-free kernel library for export-tool and print its path.
    NativeLibrary,
}

fn main() -> ExitCode {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_owned);
    match run(&workspace, Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(workspace: &Path, command: Command) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(workspace, &args),
        Command::Bench(args) => bench::run(workspace, &args),
        Command::Agree(args) => agree::run(workspace, &args),
        Command::Test => test::run(workspace),
        Command::Fuzz { cases, seed, targets } => test::fuzz(workspace, cases, seed, &targets),
        Command::Scenarios { only } => {
            packages::ensure(&packages::SCENARIOS)?;
            let kernel = kernel_build::jit_image(workspace)?;
            let library = kernel_build::native_library(workspace)?;
            let passed = scenarios::run(&kernel, &library, workspace, &workspace.join("out/scenarios"), &only)?;
            println!("{passed} passed, 0 failed");
            Ok(())
        }
        Command::JitImage => {
            println!("{}", kernel_build::jit_image(workspace)?.display());
            Ok(())
        }
        Command::NativeLibrary => {
            println!("{}", kernel_build::native_library(workspace)?.display());
            Ok(())
        }
    }
}
