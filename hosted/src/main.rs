//! `bareflow`: the same runtime as the guest's, as a Linux process.
//!
//! Data path: flags -> [`runtime::Options`] -> [`platform::Process`] -> [`runtime::run`] -> text or JSON.
#![deny(unsafe_code)]

/// What could not be written.
const STANDARD_OUTPUT: &str = "writing standard output";

/// Exit code when who reads standard output has left, as `head` does: what a shell shows for SIGPIPE.
const READER_LEFT: u8 = 128 + 13;

/// Writes a line to standard output, or returns the error from the function it stands in. `println!` panics when the
/// output is full or nobody reads it.
macro_rules! print_line {
    ($($text:tt)*) => {
        anyhow::Context::context(
            std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($text)*))),
            crate::STANDARD_OUTPUT,
        )?
    };
}

/// Writes a line to standard error. Where that cannot be done there is nobody to tell.
macro_rules! print_note {
    ($($text:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($text)*)));
    }};
}

mod convert;
mod explain;
mod info;
mod limits;
mod perplexity;
#[allow(unsafe_code)]
mod platform;
mod tune;
mod workbench;

use anyhow::{Context, Result, ensure};
use bootimage::ImageSpec;
use clap::{Args, Parser, Subcommand};
use platform::{FileDisk, Process};
use report::{BootReport, ExitStatus, ImageKind};
use runtime::boot::{Request, Settings};
use runtime::kernels::Linked;
use runtime::load::Companions;
use runtime::options::{Mode, OptionError, Tier};
use runtime::{Options, RunError, run};
use serde_json::json;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "bareflow", version, about = "Runs language models and tunes itself, as a Linux process")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text from a prompt.
    Generate(GenerateArgs),
    /// Generate with the hand-written and with the compiled kernels in turn, and print the rates of every round.
    Bench {
        #[command(flatten)]
        generate: GenerateArgs,
        /// Rounds.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
    },
    /// Write a GGUF file again with its weights in another type, or a llama2.c model as a GGUF file.
    Convert {
        /// GGUF file to read, or llama2.c .bin with --tokenizer.
        input: PathBuf,
        /// GGUF file to write.
        output: PathBuf,
        /// Tokenizer file of a llama2.c model.
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Type of the matrices: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, or (quickly made) Q2_K to Q6_K. A llama2.c
        /// model keeps its weights without it: as F32, or Q8_0 where its int8 is just that.
        #[arg(long = "type")]
        ty: Option<String>,
        /// Type of the token embedding and output head; default: as --type.
        #[arg(long)]
        embedding: Option<String>,
        /// Replace the output if it is there.
        #[arg(long)]
        force: bool,
    },
    /// Judge a snapshot's kernels: time its choice for every hot key beside the hand-written op and the reference.
    Tune {
        #[command(flatten)]
        generate: GenerateArgs,
        /// Time every variant of the search space too, and say how far the choices are from the best.
        #[arg(long)]
        exhaustive: bool,
        /// Only keys whose name contains this.
        #[arg(long, default_value = "")]
        keys: String,
        /// Calls of each candidate.
        #[arg(long, default_value_t = 11, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
        rounds: usize,
    },
    /// Show what was tried for a kernel key, what won, how close to the limit it is, and its machine code.
    Explain {
        /// Kernel name, as reports show it: gate_up_silu_q4_1_m1_n1536_k576.
        key: String,
        /// Disk image with a snapshot; without it the search space is shown.
        #[arg(long)]
        snapshot: Option<PathBuf>,
        /// Highest instruction set: auto, avx512, avx2_vnni, avx2 or portable.
        #[arg(long, default_value = "auto")]
        isa: String,
    },
    /// Measure this machine's read bandwidth and multiply-add peaks.
    Limits {
        /// Threads; 0 is one per core.
        #[arg(long, default_value_t = 0)]
        threads: u32,
        /// Measure arithmetic with AVX2 only.
        #[arg(long)]
        avx2: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Score a text: the perplexity of the second halves of windows of --context tokens.
    ///
    /// As llama.cpp's tool does it: the text becomes tokens once, with BOS where the model has one, and is cut into whole
    /// windows. Each is run from an empty context, its first token replaced by BOS where the model has one, and every token
    /// of its second half is scored by the logits before it. Printed is the exponential of the mean negative log-likelihood.
    #[command(verbatim_doc_comment)]
    Perplexity {
        /// GGUF file, or llama2.c .bin with --tokenizer.
        model: PathBuf,
        /// Text file.
        text: PathBuf,
        /// Tokenizer file of a llama2.c model.
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Tokens of a window.
        #[arg(long, default_value_t = 512)]
        context: usize,
        /// Windows to score at most; 0 is all.
        #[arg(long, default_value_t = 0)]
        windows: usize,
        /// Threads; 0 is one per core.
        #[arg(long, default_value_t = 0)]
        threads: u32,
        /// Type of the KV cache: auto, f32, f16 or q8_0.
        #[arg(long, default_value = "auto")]
        kv: String,
        /// Write tokens and the logits of every scored position to this file, as `hosted/src/perplexity.rs` says.
        #[arg(long)]
        logits: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say what a model file is: architecture, sizes, tensor types, tokenizer, memory needed.
    Info {
        /// GGUF file, or llama2.c .bin with --tokenizer.
        file: PathBuf,
        /// Tokenizer file of a llama2.c model.
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Clone)]
struct GenerateArgs {
    /// GGUF file, or llama2.c .bin with --tokenizer.
    #[arg(long)]
    model: PathBuf,
    /// Tokenizer file of a llama2.c model.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Ed25519 public key, 64 hex digits: run the model only if --signature is its holder's.
    #[arg(long)]
    public_key: Option<String>,
    /// 64-byte signature over the model file, itself padded with zeros to whole 512-byte sectors; without this flag, the one on
    /// the --snapshot image.
    #[arg(long)]
    signature: Option<PathBuf>,
    /// The prompt.
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// Wrap the prompt in the model's chat template.
    #[arg(long)]
    chat: bool,
    /// System message of the conversation, with --chat; empty takes the template's own.
    #[arg(long, default_value = "")]
    system: String,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Go on after an end-of-generation token.
    #[arg(long)]
    ignore_eos: bool,
    /// Threads; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: u32,
    /// Seed of the sampler.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Sampling temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temp: f32,
    /// Draw from this many best tokens only; 0 is off.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Draw from the fewest best tokens whose probabilities reach this sum; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Draw from tokens at least this probable relative to the best; 0 is off.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Divide the logits of tokens of the prompt and the answer by this; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Last tokens that --repeat-penalty looks at; 0 is all.
    #[arg(long, default_value_t = 64)]
    repeat_window: u32,
    /// No sequence of this many tokens occurs twice; 0 is off.
    #[arg(long, default_value_t = 0)]
    no_repeat_ngram: u32,
    /// Pick another token when one would end the text in this many equal stretches; 0 is off.
    #[arg(long, default_value_t = 0)]
    loop_escape: u32,
    /// A text that ends the generation and is not shown; may be repeated.
    #[arg(long)]
    stop: Vec<String>,
    /// Longest context in tokens; 0 takes the model's, at most 2048.
    #[arg(long, default_value_t = 0)]
    context: u32,
    /// Type of the KV cache: auto, f32, f16 or q8_0; auto is f32 for models with f32 or bf16 weights, else f16.
    #[arg(long, default_value = "auto")]
    kv: String,
    /// Disk image that keeps kernels and profile from run to run; made when missing. A guest's disk works too.
    #[arg(long)]
    snapshot: Option<PathBuf>,
    /// Time for trying kernel variants after the generation, ms; needs --snapshot to be of use later.
    #[arg(long, default_value_t = 0)]
    tune_ms: u64,
    /// Which kernels may run: compiled, baseline (hand-written AVX2) or reference.
    #[arg(long, default_value = "compiled")]
    tier: String,
    /// Highest instruction set: auto, avx512, avx2_vnni, avx2 or portable.
    #[arg(long, default_value = "auto")]
    isa: String,
    /// Any further option in the guest's form, such as tune.pairs=32; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Print one JSON object: token ids, text, rates, memory, and the whole report.
    #[arg(long)]
    json: bool,
    /// Print the report screen too.
    #[arg(long)]
    report: bool,
}

fn main() -> ExitCode {
    let entry_tsc = engine::cycles();
    let result = match Cli::parse().command {
        Command::Generate(args) => generate(&args, entry_tsc),
        Command::Bench { generate, rounds } => bench(&generate, rounds),
        Command::Convert { input, output, tokenizer, ty, embedding, force } => convert::run(&convert::Request {
            input: &input,
            output: &output,
            tokenizer: tokenizer.as_deref(),
            matrices: ty.as_deref(),
            embedding: embedding.as_deref(),
            force,
        }),
        Command::Tune { generate, exhaustive, keys, rounds } => tune(&generate, exhaustive, &keys, rounds),
        Command::Explain { key, snapshot, isa } => explain(&key, snapshot.as_deref(), &isa),
        Command::Limits { threads, avx2, json } => limits::print(threads, avx2, json),
        Command::Perplexity { model, text, tokenizer, context, windows, threads, kv, logits, json } => {
            let mut options = Options { threads, ..Options::default() };
            options.set("kv", &kv).map_err(Into::into).and_then(|()| {
                let tokenizer = tokenizer.as_deref();
                let (model, text) = (model.as_path(), text.as_path());
                let logits = logits.as_deref();
                let request = perplexity::Request { model, tokenizer, text, context, windows, logits, as_json: json };
                perplexity::run(&request, &options)
            })
        }
        Command::Info { file, tokenizer, json } => info::print(&file, tokenizer.as_deref(), json),
    };
    // A line that is not ended yet.
    let result = result.and_then(|()| io::stdout().flush().context(STANDARD_OUTPUT));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if reader_left(&error) => ExitCode::from(READER_LEFT),
        Err(error) => {
            let code = exit_code(&error);
            print_note!("error: {error:#}");
            if code == ExitStatus::Memory.process_exit_code()
                && let Some(limit) = platform::memory_limit()
            {
                print_note!("this process may use {limit} bytes (ulimit -v, ulimit -d); raise that limit first");
            }
            ExitCode::from(code)
        }
    }
}

/// A flag that cannot be taken, where no setting of the runtime is behind it.
#[derive(Debug)]
struct BadFlag(String);

impl std::fmt::Display for BadFlag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadFlag {}

/// Whether `error` is that nobody reads standard output any more.
fn reader_left(error: &anyhow::Error) -> bool {
    let broken_pipe = |cause: &io::Error| cause.kind() == ErrorKind::BrokenPipe;
    error.to_string() == STANDARD_OUTPUT && error.downcast_ref().is_some_and(broken_pipe)
}

/// The exit code for `error`: by its kind where a run was refused, that of storage where a file could not be used.
fn exit_code(error: &anyhow::Error) -> u8 {
    let refusals = error.chain().filter_map(|cause| {
        let refusal = cause.downcast_ref::<RunError>().map(RunError::exit_status);
        let setting = cause.downcast_ref::<OptionError>().map(|_| ExitStatus::Settings);
        let setting = setting.or(cause.downcast_ref::<BadFlag>().map(|_| ExitStatus::Settings));
        let setting = setting.or(cause.downcast_ref::<bootimage::SameFile>().map(|_| ExitStatus::Settings));
        let file = cause.downcast_ref::<std::io::Error>().map(|_| ExitStatus::Storage);
        let model = cause.downcast_ref::<model::ModelError>().map(|_| ExitStatus::Model);
        // Making the snapshot image is all that is asked of it here.
        let image = cause.downcast_ref::<bootimage::ImageError>().map(|_| ExitStatus::Storage);
        let disk = cause.downcast_ref::<storage::StorageError>().map(|_| ExitStatus::Storage);
        refusal.or(setting).or(file).or(model).or(image).or(disk)
    });
    refusals.last().unwrap_or(ExitStatus::Fatal).process_exit_code()
}

fn options(args: &GenerateArgs) -> Result<Options> {
    let mut options = Options {
        prompt: args.prompt.clone(),
        chat: args.chat,
        system: args.system.clone(),
        stop: args.stop.clone(),
        max_tokens: args.max_tokens,
        ignore_eos: args.ignore_eos,
        threads: args.threads,
        context: args.context,
        snapshot: args.snapshot.is_some(),
        tune_budget_ms: args.tune_ms,
        report: args.report,
        ..Options::default()
    };
    for (key, value) in [
        ("temp", args.temp.to_string()),
        ("seed", args.seed.to_string()),
        ("top_k", args.top_k.to_string()),
        ("top_p", args.top_p.to_string()),
        ("min_p", args.min_p.to_string()),
        ("repeat_penalty", args.repeat_penalty.to_string()),
        ("repeat_window", args.repeat_window.to_string()),
        ("no_repeat_ngram", args.no_repeat_ngram.to_string()),
        ("loop_escape", args.loop_escape.to_string()),
        ("tier", args.tier.clone()),
        ("isa", args.isa.clone()),
        ("kv", args.kv.clone()),
    ] {
        options.set(key, &value)?;
    }
    if let Some(key) = &args.public_key {
        options.set("model.public_key", key)?;
    }
    for setting in &args.settings {
        options.apply(setting)?;
    }
    let no_guest = "mode: a process generates; selftest and smoke are for the guest; leave it out";
    ensure!(options.mode == Mode::Generate, BadFlag(no_guest.into()));
    Ok(options)
}

fn run_once(args: &GenerateArgs, entry_tsc: u64) -> Result<BootReport> {
    let options = options(args)?;
    let model = FileDisk::open(&args.model, false).with_context(|| format!("opening {}", args.model.display()))?;
    let snapshot = match &args.snapshot {
        Some(path) => Some(open_snapshot(path)?),
        None => None,
    };
    let companions = companions(args)?;
    let quiet = args.json;
    let mut process = Process::start(entry_tsc, options.threads as usize, Some(model), snapshot, quiet)?;
    let request = Request {
        image: ImageKind::Hosted,
        settings: Settings::Given(Box::new(options)),
        linked: Linked::default(),
        companions,
    };
    let outcome = run(&mut process, request);
    match (outcome.status, outcome.report, outcome.error) {
        (ExitStatus::Pass, Some(report), _) => Ok(report),
        (_, _, Some(error)) => Err(error.into()),
        (status, ..) => anyhow::bail!("the run ended as {status:?} without a report"),
    }
}

/// What belongs to the model and lies in files of its own.
fn companions(args: &GenerateArgs) -> Result<Companions> {
    Ok(Companions {
        tokenizer: read_file(args.tokenizer.as_deref())?,
        signature: read_file(args.signature.as_deref())?,
    })
}

/// Content of a file, where one is named.
fn read_file(path: Option<&Path>) -> Result<Option<Vec<u8>>> {
    path.map(|path| std::fs::read(path).with_context(|| format!("reading {}", path.display()))).transpose()
}

/// Opens the image at `path`, making an empty one first if there is none.
fn open_snapshot(path: &Path) -> Result<FileDisk> {
    if !path.exists() {
        bootimage::build(&ImageSpec::without_kernel(), path)
            .with_context(|| format!("making the snapshot image {}", path.display()))?;
    }
    let writable = std::fs::metadata(path).is_ok_and(|m| !m.permissions().readonly());
    let (disk, refused) = open_writable(writable, |writable| FileDisk::open(path, writable))
        .with_context(|| format!("opening {}", path.display()))?;
    if let Some(refused) = refused {
        print_note!("warning: {}: {refused}: opened read-only, what this run learns is not kept", path.display());
    }
    Ok(disk)
}

/// Opens for writing if that is `wanted` and allowed, else for reading only, with the reason if it was not allowed. Mode
/// bits do not tell: the file may be another user's, or its file system mounted read-only.
fn open_writable<T>(wanted: bool, open: impl Fn(bool) -> io::Result<T>) -> io::Result<(T, Option<io::Error>)> {
    match open(wanted) {
        Ok(file) => Ok((file, None)),
        Err(e) if wanted && matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            Ok((open(false)?, Some(e)))
        }
        Err(e) => Err(e),
    }
}

fn generate(args: &GenerateArgs, entry_tsc: u64) -> Result<()> {
    let report = run_once(args, entry_tsc)?;
    if args.json {
        let peak = report.memory.iter().find(|m| m.name == "process").map(|m| m.used_bytes);
        let summary = json!({
            "token_ids": report.token_ids,
            "text": report.text,
            "prefill_tok_s": report.prefill_tok_s,
            "decode_tok_s": report.decode_tok_s,
            "ttft_ms": report.ttft_ms,
            "peak_memory_bytes": peak,
            "threads": report.threads,
            "report": report,
        });
        print_line!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        // The text went to standard error as it came; standard output gets it whole, for pipes and files.
        if !(io::stdout().is_terminal() && io::stderr().is_terminal()) {
            print_line!("{}", report.text);
        }
        let rate = |tok_s: f64| if tok_s.is_finite() { format!("{tok_s:.1}") } else { "-".to_owned() };
        print_note!(
            "{} tokens, prefill {} tok/s, decode {} tok/s, first token after {:.0} ms, {} threads",
            report.token_ids.len(),
            rate(report.prefill_tok_s),
            rate(report.decode_tok_s),
            report.ttft_ms,
            report.threads
        );
    }
    Ok(())
}

fn tune(args: &GenerateArgs, exhaustive: bool, keys: &str, rounds: usize) -> Result<()> {
    ensure!(!args.report, BadFlag("--report: tune boots nothing that could be reported; leave it out".into()));
    let no_search = "--tune-ms: tune judges kernels and keeps none; use generate to search for better ones";
    ensure!(args.tune_ms == 0, BadFlag(no_search.into()));
    let request = tune::Request {
        model: &args.model,
        companions: companions(args)?,
        snapshot: args.snapshot.as_deref(),
        exhaustive,
        filter: keys,
        rounds,
        json: args.json,
    };
    tune::run(&request, &options(args)?)
}

fn explain(key: &str, snapshot: Option<&Path>, isa: &str) -> Result<()> {
    let mut options = Options::default();
    options.set("isa", isa)?;
    explain::print(key, snapshot, options.isa)
}

fn bench(args: &GenerateArgs, rounds: u32) -> Result<()> {
    ensure!(!args.report, BadFlag("--report: bench prints the rates of every round instead; leave it out".into()));
    let one_tier = BadFlag("--tier: bench runs the hand-written and the compiled kernels in turn; leave it out".into());
    ensure!(args.tier == "compiled", one_tier);
    let mut rows = Vec::new();
    for round in 1..=rounds {
        for tier in [Tier::Baseline, Tier::Compiled] {
            let name = if tier == Tier::Baseline { "baseline" } else { "compiled" };
            let args = GenerateArgs { tier: name.to_owned(), json: true, ..args.clone() };
            let report = run_once(&args, engine::cycles())?;
            print_note!(
                "round {round} {name:<9} prefill {:>8.1} tok/s  decode {:>7.1} tok/s  ttft {:>7.1} ms",
                report.prefill_tok_s,
                report.decode_tok_s,
                report.ttft_ms
            );
            rows.push(json!({
                "round": round,
                "tier": name,
                "prefill_tok_s": report.prefill_tok_s,
                "decode_tok_s": report.decode_tok_s,
                "ttft_ms": report.ttft_ms,
                "kernels_loaded": report.kernels_loaded,
                "kernels_compiled": report.kernels_compiled,
                "token_ids": report.token_ids,
            }));
        }
    }
    if args.json {
        print_line!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_that_may_only_be_read_is_read() {
        let refuse = |kind: ErrorKind| move |writable| if writable { Err(io::Error::from(kind)) } else { Ok("read") };
        for kind in [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem] {
            let (opened, why) = open_writable(true, refuse(kind)).unwrap();
            assert_eq!((opened, why.unwrap().kind()), ("read", kind));
        }
        assert_eq!(open_writable(true, refuse(ErrorKind::NotFound)).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(open_writable(false, refuse(ErrorKind::PermissionDenied)).unwrap().1.is_none(), "nothing was refused");
        let never = |_| -> io::Result<()> { Err(ErrorKind::PermissionDenied.into()) };
        assert_eq!(open_writable(true, never).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}
