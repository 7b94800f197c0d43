//! `fuzz`: many cases of each target, with a report. `cargo xtask fuzz --cases N` builds and runs it.
#![forbid(unsafe_code)]

use fuzz::{Mutator, Outcome, TARGETS};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A case that takes longer than this counts as a hang.
const LIMIT: Duration = Duration::from_secs(5);

const USAGE: &str =
    "usage: fuzz [--cases N] [--seed N] [TARGET ...]   (default: 1000000 cases of every target, seed 1)";

/// An input on its way through a target.
struct Case {
    target: &'static str,
    seed: u64,
    number: u64,
    input: Vec<u8>,
    began: Instant,
}

impl Case {
    /// Says that this one `what`, and keeps its input.
    fn report(&self, what: &str) {
        let Case { target, seed, number, input, .. } = self;
        let file = format!("fuzz-{target}-{number}.bin");
        eprintln!("{target}: case {number} of seed {seed} {what}");
        match std::fs::write(&file, input) {
            Ok(()) => eprintln!("its {} bytes are in {file}", input.len()),
            Err(error) => eprintln!("its {} bytes could not be written to {file}: {error}", input.len()),
        }
    }
}

/// The case that runs now, for [`watch`].
static CURRENT: Mutex<Option<Case>> = Mutex::new(None);

/// Puts `case` in the place of the one before, which is returned.
fn now_runs(case: Option<Case>) -> Option<Case> {
    std::mem::replace(&mut *CURRENT.lock().unwrap_or_else(PoisonError::into_inner), case)
}

/// Ends the process when a case takes longer than [`LIMIT`]: a loop without end cannot be ended otherwise.
fn watch() {
    loop {
        std::thread::sleep(LIMIT / 10);
        let current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(case) = current.as_ref().filter(|case| case.began.elapsed() > LIMIT) {
            case.report("hung");
            std::process::exit(1);
        }
    }
}

struct Arguments {
    cases: u64,
    seed: u64,
    targets: Vec<String>,
}

fn arguments() -> Result<Arguments, String> {
    let mut out = Arguments { cases: 1_000_000, seed: 1, targets: Vec::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().unwrap_or_default();
            value.parse().map_err(|_| format!("{word}: expected a whole number, found `{value}`"))
        };
        match word.as_str() {
            "--cases" => out.cases = number()?,
            "--seed" => out.seed = number()?,
            name if TARGETS.iter().any(|target| target.name == name) => out.targets.push(word),
            _ => {
                let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
                return Err(format!("`{word}` is no option and no target; the targets are: {}", names.join(" ")));
            }
        }
    }
    Ok(out)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    std::thread::spawn(watch);
    for target in TARGETS {
        if !arguments.targets.is_empty() && !arguments.targets.iter().any(|name| name == target.name) {
            continue;
        }
        let seeds = (target.seeds)();
        let mut mutator = Mutator::new(arguments.seed);
        let (start, mut slowest, mut accepted) = (Instant::now(), Duration::ZERO, 0u64);
        let running = format!("fuzz-{}-running.bin", target.name);
        // A file left behind says nothing: the result does.
        let clean_up = || drop(target.runs_code.then(|| std::fs::remove_file(&running)));
        for number in 0..arguments.cases {
            let input = mutator.mutate(&seeds);
            // Wrong code can end the process: then this file has the input.
            if target.runs_code
                && let Err(error) = std::fs::write(&running, &input)
            {
                eprintln!("cannot write {running}: {error}; choose a writable current directory");
                return ExitCode::FAILURE;
            }
            let (seed, began) = (arguments.seed, Instant::now());
            now_runs(Some(Case { target: target.name, seed, number, input: input.clone(), began }));
            let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
            slowest = slowest.max(began.elapsed());
            let case = now_runs(None);
            match outcome {
                Ok(outcome) => accepted += u64::from(matches!(outcome, Outcome::Accepted)),
                Err(_) => {
                    clean_up();
                    case.iter().for_each(|case| case.report("panicked"));
                    return ExitCode::FAILURE;
                }
            }
        }
        clean_up();
        println!(
            "{:<12} {} cases, {accepted} of them accepted, in {:.0} s, slowest {:.1} ms, peak memory of the process {} MiB",
            target.name,
            arguments.cases,
            start.elapsed().as_secs_f64(),
            slowest.as_secs_f64() * 1e3,
            peak_mib().map_or("-".to_owned(), |mib| mib.to_string())
        );
        if accepted == 0 && arguments.cases > 0 {
            eprintln!("{}: every input was refused, so nothing but errors was checked", target.name);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// High-water mark of the process's memory.
fn peak_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}
