//! `cargo xtask agree`: does BareFlow compute what llama.cpp computes?
//!
//! Data path: a GGUF file and a text -> four programs at once, each of which writes the logits of every scored position
//! ([`Stream`]): `bareflow perplexity` and llama.cpp, on the file as it is and on its weights as F32 -> compared position by
//! position ([`Score`]) with llama.cpp's on F32 weights -> a table.
//!
//! On F32 weights neither program rounds activations: what differs there is a difference of the computation. What differs
//! on the file itself is also how activations are rounded, which each does in its own way: the table says whose logits are
//! nearer to those of the F32 weights.

use crate::bench::{ours, peers};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// What to compare, on what.
#[derive(Args)]
pub struct AgreeArgs {
    /// GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// Text file; the second half of every window of --context tokens is scored.
    #[arg(long)]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 512)]
    context: u32,
    /// Windows at most; 0 is all.
    #[arg(long, default_value_t = 8)]
    windows: u32,
    /// Directory for logs and the model as F32, which is removed again.
    #[arg(long, default_value = "out/agree")]
    out: PathBuf,
}

/// Largest relative difference of the perplexities on F32 weights. Not 0: llama.cpp rounds gelu to f16, and both round
/// sums in an order of their own.
const F32_LIMIT: f64 = 1e-3;
/// Largest relative difference on the file's own weights, unless so few tokens were scored that [`ERRORS`] standard errors
/// are more, or BareFlow's logits are the nearer ones to those of F32.
const FILE_LIMIT: f64 = 5e-3;
const ERRORS: f64 = 3.0;

/// Runs the comparison and prints the table.
///
/// # Errors
/// A missing tool, a program that fails, token ids that differ, or logits further apart than rounding explains.
pub fn run(workspace: &Path, args: &AgreeArgs) -> Result<()> {
    let python = peers::python(&workspace.join(".cache/peers"))?;
    let bareflow = ours::build(workspace)?;
    let out = workspace.join(&args.out);
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    // Half a gigabyte and more, which goes with the directory, however this ends.
    let dir = tempfile::tempdir_in(&out).with_context(|| format!("making a directory in {}", out.display()))?;
    let f32_model = dir.path().join("f32.gguf");
    convert(&bareflow, &args.model, &f32_model)?;

    let [context, windows] = [args.context, args.windows].map(|number| number.to_string());
    let common = |command: &mut Command| {
        command.args(["--threads", "1", "--context", &context, "--windows", &windows]);
    };
    let ours = |model: &Path| {
        let mut command = Command::new(&bareflow);
        // Through the pipe, in front of the result's text, which is left unread.
        command.arg("perplexity").arg(model).arg(&args.text).args(["--logits", "/dev/stdout"]);
        common(&mut command);
        command
    };
    let theirs = |model: &Path, exact: &[&str]| {
        let mut command = Command::new(&python);
        command.arg(workspace.join("xtask/src/bench/score.py")).arg("--model").arg(model).arg("--text").arg(&args.text);
        common(&mut command);
        command.args(exact);
        command
    };
    let mut reference = Stream::start("llama.cpp, as F32", theirs(&f32_model, &["--exact"]), &out)?;
    let mut others = [
        Stream::start("BareFlow, as F32", ours(&f32_model), &out)?,
        Stream::start("llama.cpp", theirs(&args.model, &[]), &out)?,
        Stream::start("BareFlow", ours(&args.model), &out)?,
    ];
    compare(&mut reference, &mut others)?;

    println!("{}, {} tokens of {} scored", args.model.display(), reference.score.tokens, args.text.display());
    println!(
        "{:<18} {:>10} {:>10} {:>10} {:>7} {:>10}",
        "", "perplexity", "to F32, %", "KL to F32", "top 1", "rms logit"
    );
    for stream in [&reference].into_iter().chain(&others) {
        let score = &stream.score;
        println!(
            "{:<18} {:>10.4} {:>+9.3} +/- {:<4.3} {:>10.6} {:>7.4} {:>9.5}",
            stream.name,
            score.perplexity(),
            100.0 * (score.perplexity() / reference.score.perplexity() - 1.0),
            100.0 * score.error(),
            score.kl(),
            score.top_1(),
            score.rms()
        );
    }
    let [ours_f32, theirs, ours] = others.each_ref().map(|stream| &stream.score);
    verdict(&reference.score, ours_f32, theirs, ours)
}

/// Says whether the rows agree.
fn verdict(reference: &Score, ours_f32: &Score, theirs: &Score, ours: &Score) -> Result<()> {
    let relative = |a: &Score, b: &Score| a.perplexity() / b.perplexity() - 1.0;
    let difference = relative(ours_f32, reference);
    ensure!(
        difference.abs() <= F32_LIMIT,
        "on F32 weights the perplexities differ by {:+.3} %: the two compute different things",
        100.0 * difference
    );
    let difference = relative(ours, theirs);
    // Both err by rounding, each in its own way.
    let error = ours.error().hypot(theirs.error());
    println!("BareFlow / llama.cpp on the file: {:+.3} % +/- {:.3}", 100.0 * difference, 100.0 * error);
    ensure!(
        difference.abs() <= FILE_LIMIT.max(ERRORS * error) || ours.kl() <= theirs.kl(),
        "that is more than {} % and more than rounding explains, and llama.cpp's logits are the nearer ones to those of the \
         F32 weights",
        100.0 * FILE_LIMIT
    );
    Ok(())
}

/// Writes `model` as F32.
fn convert(bareflow: &Path, model: &Path, f32_model: &Path) -> Result<()> {
    let mut command = Command::new(bareflow);
    command.arg("convert").arg(model).arg(f32_model).args(["--type", "F32"]);
    eprintln!("  $ {command:?}");
    let status = command.stdout(std::io::stderr()).status().context("running bareflow convert")?;
    if !status.success() {
        bail!("{command:?} failed ({status}); the lines above say why");
    }
    Ok(())
}

/// Reads all streams to their ends, in step, and scores them.
fn compare(reference: &mut Stream, others: &mut [Stream]) -> Result<()> {
    for other in &mut *others {
        let [found, expected] = [&*other, &*reference].map(|stream| (stream.vocab_size, stream.context, stream.first));
        ensure!(found == expected, "{}: windows {found:?}, {} has {expected:?}", other.name, reference.name);
        let differs = other.tokens.iter().zip(&reference.tokens).position(|(a, b)| a != b);
        if let Some(at) = differs {
            let [found, expected] = [&other.tokens, &reference.tokens].map(|tokens| tokens[at]);
            bail!("token {at} is {found} by {}, {expected} by {}", other.name, reference.name);
        }
        let [found, expected] = [&*other, &*reference].map(|stream| stream.tokens.len());
        ensure!(found == expected, "{found} tokens by {}, {expected} by {}", other.name, reference.name);
    }
    let (context, first) = (reference.context, reference.first);
    let tokens = reference.tokens.clone();
    for window in tokens.chunks_exact(context) {
        for &target in &window[first + 1..] {
            let logits = reference.row()?;
            let expected = log_softmax(&logits);
            reference.score.add(&logits, &logits, &expected, target);
            for other in &mut *others {
                let row = other.row()?;
                other.score.add(&row, &logits, &expected, target);
            }
        }
    }
    for stream in others.iter_mut().chain([reference]) {
        stream.finish()?;
    }
    Ok(())
}

/// A program that scores a text, and what it has written so far.
struct Stream {
    name: &'static str,
    child: Child,
    out: BufReader<ChildStdout>,
    /// What it says of itself.
    log: PathBuf,
    vocab_size: usize,
    context: usize,
    /// Index of the first scored position in a window.
    first: usize,
    /// Of all windows.
    tokens: Vec<u32>,
    score: Score,
}

impl Stream {
    /// Starts `command` and reads what precedes the logits: `hosted/src/perplexity.rs` has the format.
    fn start(name: &'static str, mut command: Command, logs: &Path) -> Result<Self> {
        eprintln!("  $ {command:?}");
        let log = logs.join(format!("{}.log", name.replace(", ", "-").replace(' ', "-")));
        let errors = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let mut child = command.stdout(Stdio::piped()).stderr(errors).spawn().context("starting it")?;
        let out = BufReader::new(child.stdout.take().context("a child without its pipe")?);
        let score = Score::default();
        let mut stream = Self { name, child, out, log, vocab_size: 0, context: 0, first: 0, tokens: Vec::new(), score };
        let [vocab_size, context, windows, first] = *stream.words(4)? else { bail!("four words are four") };
        (stream.vocab_size, stream.context, stream.first) = (vocab_size as usize, context as usize, first as usize);
        stream.tokens = stream.words(context as usize * windows as usize)?;
        Ok(stream)
    }

    fn words(&mut self, count: usize) -> Result<Vec<u32>> {
        let mut bytes = vec![0; 4 * count];
        let ends = || format!("{} ended early; {} says why", self.name, self.log.display());
        self.out.read_exact(&mut bytes).with_context(ends)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// The next logits.
    fn row(&mut self) -> Result<Vec<f32>> {
        Ok(self.words(self.vocab_size)?.into_iter().map(f32::from_bits).collect())
    }

    /// Waits for the program's end.
    fn finish(&mut self) -> Result<()> {
        std::io::copy(&mut self.out, &mut std::io::sink())?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{} failed ({status}); {} says why", self.name, self.log.display());
        Ok(())
    }
}

/// Sums over scored positions.
#[derive(Default)]
struct Score {
    tokens: u64,
    nll: f64,
    /// Of what it is above the reference's, and of the squares of that.
    above: f64,
    above_squares: f64,
    /// Kullback-Leibler divergence from the reference's distribution.
    kl: f64,
    /// Positions where the likeliest token is the reference's.
    same_top: u64,
    /// Mean square differences to the reference's logits.
    squares: f64,
}

impl Score {
    /// Takes in `logits` before `target`, where the reference has `expected_logits` and their `expected` log-probabilities.
    fn add(&mut self, logits: &[f32], expected_logits: &[f32], expected: &[f64], target: u32) {
        let found = log_softmax(logits);
        let pairs = logits.iter().zip(expected_logits);
        self.tokens += 1;
        self.nll -= found[target as usize];
        let above = expected[target as usize] - found[target as usize];
        self.above += above;
        self.above_squares += above * above;
        self.kl += expected.iter().zip(&found).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        self.same_top += u64::from(top(logits) == top(expected_logits));
        self.squares += pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / logits.len() as f64;
    }

    fn perplexity(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    /// Standard error of the perplexity relative to the reference's: how far rounding alone takes it on this many tokens.
    fn error(&self) -> f64 {
        let (count, mean) = (self.tokens as f64, self.above / self.tokens as f64);
        ((self.above_squares / count - mean * mean).max(0.0) / (count - 1.0).max(1.0)).sqrt()
    }

    fn kl(&self) -> f64 {
        self.kl / self.tokens as f64
    }

    fn top_1(&self) -> f64 {
        self.same_top as f64 / self.tokens as f64
    }

    fn rms(&self) -> f64 {
        (self.squares / self.tokens as f64).sqrt()
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let shift = f64::from(max) + sum.ln();
    logits.iter().map(|&logit| f64::from(logit) - shift).collect()
}

/// Index of the largest.
fn top(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(rows: &[([f32; 3], u32)], reference: &[f32; 3]) -> Score {
        let mut score = Score::default();
        for (logits, target) in rows {
            score.add(logits, reference, &log_softmax(reference), *target);
        }
        score
    }

    /// Logits of the probabilities 1/2, 1/4, 1/4.
    fn half_and_quarters() -> [f32; 3] {
        [2f32.ln() + 5.0, 5.0, 5.0]
    }

    #[test]
    fn scores_are_the_formulas() {
        let half = half_and_quarters();
        let same = score(&[(half, 0), (half, 1), (half, 2), (half, 0)], &half);
        assert!((same.perplexity() - 64f64.powf(0.25)).abs() < 1e-6);
        assert_eq!((same.kl(), same.top_1(), same.rms()), (0.0, 1.0, 0.0));
        // Against 1/3 each: sum of 1/2 ln(3/2) + 2 * 1/4 ln(3/4); the likeliest token is another.
        let even = score(&[([0.0, 0.0, 1e-6], 0)], &half);
        let kl = 0.5 * 1.5f64.ln() + 0.5 * 0.75f64.ln();
        assert!((even.kl() - kl).abs() < 1e-6 && even.top_1() == 0.0, "{}", even.kl());
        let rms = ((5.693_147f64.powi(2) + 25.0 + 25.0) / 3.0).sqrt();
        assert!((even.rms() - rms).abs() < 1e-5, "{}", even.rms());
    }

    #[test]
    fn what_rounding_does_not_explain_is_refused() {
        let reference = half_and_quarters();
        // Twice, or there is no standard error.
        let with = |nudge: f32| score(&[([reference[0] + nudge, 5.0, 5.0], 0); 2], &reference);
        let (exact, near, far) = (with(0.0), with(1e-4), with(0.1));
        assert!(verdict(&exact, &near, &near, &near).is_ok());
        // On F32 weights nothing may part them; on the file's own, only towards the F32 weights.
        assert!(verdict(&exact, &far, &near, &near).is_err());
        assert!(verdict(&exact, &near, &far, &near).is_ok());
        assert!(verdict(&exact, &near, &near, &far).is_err());
        // Differences that come to the same perplexity as none would on few tokens prove nothing.
        let scattered = score(&[([reference[0] + 0.1, 5.0, 5.0], 0), ([reference[0] - 0.05, 5.0, 5.0], 0)], &reference);
        assert!(scattered.error() > 0.02 && verdict(&exact, &near, &near, &scattered).is_ok());
    }
}
