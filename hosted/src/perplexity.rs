//! `bareflow perplexity`: how well a model predicts a text, by the method of llama.cpp's tool of that name.
//!
//! The text becomes tokens once (with BOS where the model has one) and is cut into whole windows of `context` tokens; what
//! is left over is not used. Each window is run from an empty context, its first token replaced by BOS where the model has
//! one, and every token of its second half is scored by the logits before it. The perplexity is the exponential of the mean
//! negative log-likelihood; its error is that mean's standard error times the perplexity.
//!
//! `--logits` writes what was scored, for comparison with another program (`cargo xtask agree`): four u32 (vocabulary,
//! context, windows, index of the first scored position), the tokens of all windows as u32, and then the logits after every
//! scored position, window by window, as f32 rows; everything little-endian.

use crate::platform::{FileDisk, Process};
use crate::{BadFlag, read_file};
use anyhow::{Context, Result, ensure};
use runtime::boot::Shape;
use runtime::load::Companions;
use runtime::platform::Platform;
use runtime::{Options, boot, load};
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// What to score.
pub struct Request<'a> {
    /// The model.
    pub model: &'a Path,
    /// Tokenizer file of a llama2.c model.
    pub tokenizer: Option<&'a Path>,
    /// The text.
    pub text: &'a Path,
    /// Tokens of a window.
    pub context: usize,
    /// Windows to score at most; 0 is all.
    pub windows: usize,
    /// File to write tokens and logits to.
    pub logits: Option<&'a Path>,
    /// Print JSON.
    pub as_json: bool,
}

/// Sums over scored tokens.
#[derive(Default)]
struct Score {
    tokens: u64,
    nll: f64,
    squares: f64,
}

impl Score {
    /// Takes in the logits before `target`.
    fn add(&mut self, logits: &[f32], target: u32) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        let nll = sum.ln() - f64::from(logits[target as usize] - max);
        self.tokens += 1;
        self.nll += nll;
        self.squares += nll * nll;
    }

    fn perplexity(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    /// Standard error of the perplexity.
    fn error(&self) -> f64 {
        let count = self.tokens as f64;
        let mean = self.nll / count;
        let variance = (self.squares / count - mean * mean).max(0.0);
        (variance / (count - 1.0).max(1.0)).sqrt() * self.perplexity()
    }
}

/// The file of `--logits`.
struct Dump {
    out: BufWriter<File>,
    /// First error of a row: rows come from where nothing can be returned.
    result: std::io::Result<()>,
}

impl Dump {
    /// Begins the file for `tokens`, whole windows of `context`.
    fn create(path: &Path, vocab_size: u32, context: usize, tokens: &[u32]) -> std::io::Result<Self> {
        let mut out = BufWriter::new(File::create(path)?);
        // All below 2^32: the model's context length bounds the window, and tokens fit memory.
        for number in [vocab_size, context as u32, (tokens.len() / context) as u32, (context / 2) as u32] {
            out.write_all(&number.to_le_bytes())?;
        }
        tokens.iter().try_for_each(|token| out.write_all(&token.to_le_bytes()))?;
        Ok(Self { out, result: Ok(()) })
    }

    fn row(&mut self, logits: &[f32]) {
        if self.result.is_ok() {
            self.result = logits.iter().try_for_each(|logit| self.out.write_all(&logit.to_le_bytes()));
        }
    }

    fn finish(mut self) -> std::io::Result<()> {
        self.result?;
        self.out.flush()
    }
}

/// Scores the text and prints the perplexity.
///
/// # Errors
/// A model that cannot be loaded, a text shorter than one window, a window the model was not made for.
pub fn run(request: &Request<'_>, options: &Options) -> Result<()> {
    if let Some(output) = request.logits {
        bootimage::not_over(
            [Some(request.model), Some(request.text), request.tokenizer].into_iter().flatten(),
            output,
        )?;
    }
    let disk = FileDisk::open(request.model, false).with_context(|| format!("opening {}", request.model.display()))?;
    let text = std::fs::read(request.text).with_context(|| format!("reading {}", request.text.display()))?;
    let companions = Companions { tokenizer: read_file(request.tokenizer)?, signature: None };
    let mut process = Process::start(engine::cycles(), options.threads as usize, Some(disk), None, true)?;
    let isa = boot::limited(process.cpu().isa, options.isa);
    let location = load::locate(&mut process, options)?;
    let description = load::describe(&mut process, &location, options, &companions)?;
    let context = request.context;
    let trained = description.config.seq_len as usize;
    let text_of_context = || BadFlag(format!("--context {context}: this model takes 4 to {trained} tokens"));
    ensure!((4..=trained).contains(&context), text_of_context());
    let mut tokens = description.tokenizer.encode_prompt(&text, false);
    let bos = description.tokenizer.special().bos.filter(|_| description.tokenizer.special().add_bos);
    let windows = match (tokens.len() / context, request.windows) {
        (all, 0) => all,
        (all, some) => all.min(some),
    };
    ensure!(windows > 0, "the text is {} tokens, less than one window of {context}; see --context", tokens.len());

    let threads = boot::threads(options, process.workers());
    let shape = Shape { isa, threads, context, prompt: context };
    let (mut engine, mut session, _) = boot::load_session(&mut process, &location, &description, options, shape)?;
    let mut score = Score::default();
    let windows_tokens = &mut tokens[..windows * context];
    if let Some(bos) = bos {
        windows_tokens.iter_mut().step_by(context).for_each(|first| *first = bos);
    }
    let mut dump = match request.logits {
        Some(path) => {
            let dump = Dump::create(path, description.config.vocab_size, context, windows_tokens);
            Some(dump.with_context(|| format!("writing {}", path.display()))?)
        }
        None => None,
    };
    for (index, window) in windows_tokens.chunks_exact(context).enumerate() {
        session.truncate(0);
        // The last token is only a target.
        let (known, targets) = (&window[..context - 1], &window[1..]);
        session.prefill_each(&mut engine, process.workers(), known, context / 2, &mut |i, logits| {
            score.add(logits, targets[i]);
            dump.iter_mut().for_each(|dump| dump.row(logits));
        })?;
        let _ = write!(std::io::stderr(), "\rwindow {} of {windows}: perplexity {:.4}", index + 1, score.perplexity());
    }
    print_note!("");
    if request.as_json {
        let value = json!({
            "perplexity": score.perplexity(),
            "error": score.error(),
            "mean_nll": score.nll / score.tokens as f64,
            "tokens": tokens.len(),
            "scored_tokens": score.tokens,
            "windows": windows,
            "context": context,
            "kv_cache": boot::kv_type(options, &description).name(),
        });
        print_line!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        let (perplexity, error) = (score.perplexity(), score.error());
        print_line!("perplexity {perplexity:.4} +/- {error:.4}");
        print_line!("{} of {} tokens scored, {windows} windows of {context}", score.tokens, tokens.len());
    }
    // Last: a full disk does not cost what was computed.
    if let Some((dump, path)) = dump.zip(request.logits) {
        dump.finish().with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_the_formulas() {
        let mut score = Score::default();
        // Probabilities 1/2, 1/4, 1/4 of whatever base.
        let logits = [3.0 + 2f32.ln(), 3.0, 3.0];
        for target in [0, 1, 2, 0] {
            score.add(&logits, target);
        }
        // (1/2 * 1/4 * 1/4 * 1/2)^(-1/4) = 64^(1/4)
        assert!((score.perplexity() - 64f64.powf(0.25)).abs() < 1e-6);
        // Deviations from the mean are ln(2) / 2 each: standard error ln(2) / 2 / sqrt(3).
        assert!((score.error() / score.perplexity() - 2f64.ln() / 2.0 / 3f64.sqrt()).abs() < 1e-6);
    }
}
