//! Everything a user can set, from the kernel command line, from `BAREFLOW.CFG` on the boot volume, or from `hosted`'s flags.
//!
//! Text form: `key=value` words separated by white space; a value with spaces stands in double quotes, in which `\"`,
//! `\\` and `\n` are escapes; `#` starts a comment up to the end of the line. Later settings override earlier ones, and
//! the command line overrides the file.

use alloc::borrow::ToOwned;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::RangeInclusive;
use core::str::FromStr;
use engine::Sampling;
use engine::attention::KvType;
use profiler::trial::PAIRS_RANGE;

/// What the boot is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Generate text, tune, save, report.
    Generate,
    /// Run the in-guest self-tests.
    SelfTest,
    /// Say hello and exit: the accelerator probe.
    Smoke,
}

/// Which kernels may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tier {
    /// Compiled kernels over the hand-written baseline.
    Compiled,
    /// The hand-written SIMD ops only.
    Baseline,
    /// The portable reference only.
    Reference,
}

/// What to do about the model's SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModelHash {
    /// Compute it once, for the snapshot to remember.
    Auto,
    /// Compute it now.
    Show,
    /// Do not compute it.
    Off,
    /// Compute it, and run only this file.
    Is([u8; 32]),
}

/// Name of the signature file when no other is set.
pub const DEFAULT_SIGNATURE: &str = "MODEL.SIG";

/// All settings.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// What the boot is for (`mode=generate|selftest|smoke`).
    pub mode: Mode,
    /// The prompt (`prompt="..."`).
    pub prompt: String,
    /// Wrap the prompt in the model's chat template (`chat=true`).
    pub chat: bool,
    /// System message of the conversation, with `chat=true` (`system="..."`); empty takes the template's own, if any.
    pub system: String,
    /// Tokens to generate at most (`max_tokens=64`).
    pub max_tokens: u32,
    /// Go on after an end-of-generation token (`ignore_eos=true`).
    pub ignore_eos: bool,
    /// How tokens are picked: `temp=0.8` (0 is greedy), `seed=1`, `top_k=40` (0 is off), `top_p=0.95` (1 is off),
    /// `min_p=0.05` (0 is off), `repeat_penalty=1.1` (1 is off) over `repeat_window=64` tokens (0 is all),
    /// `no_repeat_ngram=3` (0 is off), `loop_escape=4` (0 is off).
    pub sampling: Sampling,
    /// Texts that end the generation and are not shown (`stop="..."`, may be repeated).
    pub stop: Vec<String>,
    /// Longest context in tokens; 0 takes the model's, at most 2048 (`context=2048`).
    pub context: u32,
    /// What to do when the context is full: `None` ends the generation; else this many of its first tokens are kept,
    /// the older half of the rest is dropped, and the newer half runs again at its new positions (`context.shift=off`).
    pub context_shift: Option<u32>,
    /// Type of the KV cache; `None` takes f32 for models with unrounded weights, else f16 (`kv=auto|f32|f16|q8_0`).
    pub kv: Option<KvType>,
    /// Cores to use; 0 is all (`threads=1`).
    pub threads: u32,
    /// Model file on the boot volume; empty takes the raw model disk, else the only model file found (`model=NAME.EXT`).
    pub model: String,
    /// Tokenizer file of a llama2.c model on the boot volume (`tokenizer=TOK.BIN`).
    pub tokenizer: String,
    /// SHA-256 of the model file: whether it is computed, and which it must be (`model.sha256=auto|show|off|HEX`).
    pub model_sha256: ModelHash,
    /// Ed25519 public key, 64 hex digits, of whom the model must be signed by; unset asks for no signature
    /// (`model.public_key=...`).
    pub model_public_key: Option<[u8; 32]>,
    /// Signature file on the boot volume, 64 bytes (`model.signature=MODEL.SIG`).
    pub model_signature: String,
    /// Times the model is read and then loaded once more, before it is used, to measure the one against the other
    /// (`load.rounds=0`).
    pub load_rounds: u32,
    /// Which kernels may run (`tier=compiled|baseline|reference`).
    pub tier: Tier,
    /// Highest instruction set to use (`isa=auto|avx512|avx2_vnni|avx2|portable`).
    pub isa: IsaLimit,
    /// Load and save the snapshot (`snapshot=true`).
    pub snapshot: bool,
    /// Time for trying variants in one boot, ms; 0 tunes nothing (`tune.budget_ms=2000`).
    pub tune_budget_ms: u64,
    /// Variants tried in one boot at most (`tune.max_trials=1000`).
    pub tune_max_trials: u32,
    /// Pairs measured in one trial at most (`tune.pairs=48`).
    pub tune_pairs: u32,
    /// Variants of one key tried at most, in all boots; 0 is the whole space (`tune.max_variants=0`).
    pub tune_max_variants: u32,
    /// Boots without a changed kernel that convergence needs, at least 2 (`converge.window=3`).
    pub converge_window: u32,
    /// Largest relative variation of token time over the window (`converge.max_variance=0.01`).
    pub converge_max_variance: f64,
    /// Share of kernel time that settled keys must cover (`converge.coverage=0.99`).
    pub converge_coverage: f64,
    /// Print the report screen at the end (`report=true`).
    pub report: bool,
}

/// Highest instruction set to use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IsaLimit {
    /// Whatever CPUID offers.
    Auto,
    /// AVX-512 and below.
    Avx512,
    /// AVX2+FMA and AVX-VNNI and below.
    Avx2Vnni,
    /// AVX2+FMA and below.
    Avx2,
    /// No vector extension.
    Portable,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: Mode::Generate,
            prompt: "Once upon a time".to_owned(),
            chat: false,
            system: String::new(),
            max_tokens: 64,
            ignore_eos: false,
            sampling: Sampling::default(),
            stop: Vec::new(),
            context: 0,
            context_shift: None,
            kv: None,
            threads: 0,
            model: String::new(),
            tokenizer: String::new(),
            model_sha256: ModelHash::Auto,
            model_public_key: None,
            model_signature: DEFAULT_SIGNATURE.to_owned(),
            load_rounds: 0,
            tier: Tier::Compiled,
            isa: IsaLimit::Auto,
            snapshot: true,
            tune_budget_ms: 2000,
            tune_max_trials: 1000,
            tune_pairs: 48,
            tune_max_variants: 0,
            converge_window: 3,
            converge_max_variance: 0.01,
            converge_coverage: 0.99,
            report: true,
        }
    }
}

/// A setting that cannot be taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionError {
    /// No such key.
    #[error("unknown option `{key}`; the options are: {known}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// Every key, separated by spaces.
        known: String,
    },
    /// A word of the machine layer, which takes its own words out of the command line before the rest is read here.
    #[error(
        "option `{key}`: kernel. words are read before any disk; give them on the kernel command line (on a bootable disk: `bootimage build --append`)"
    )]
    MachineKey {
        /// What was written.
        key: String,
    },
    /// The value does not fit the key.
    #[error("option `{key}`: expected {expected}, found `{found}`")]
    BadValue {
        /// The key.
        key: String,
        /// What it takes.
        expected: &'static str,
        /// What was written.
        found: String,
    },
    /// A word without `=`.
    #[error("`{word}` is not an option: expected key=value (quote values that contain spaces)")]
    NotAnOption {
        /// The word.
        word: String,
    },
    /// A quote that is never closed.
    #[error("the quoted value of `{key}` has no closing quote")]
    UnclosedQuote {
        /// The key.
        key: String,
    },
}

type Setter = fn(&mut Options, &str) -> Result<(), &'static str>;

fn number<T: FromStr>(value: &str, expected: &'static str) -> Result<T, &'static str> {
    value.parse().map_err(|_| expected)
}

fn flag(value: &str) -> Result<bool, &'static str> {
    match value {
        "true" | "1" | "on" | "yes" => Ok(true),
        "false" | "0" | "off" | "no" => Ok(false),
        _ => Err("true or false"),
    }
}

/// Most digits of a decimal: their value is below 2^53, and ten to that power is exact, too.
const MAX_DIGITS: usize = 15;

/// A decimal without sign and exponent, such as `0.85`, rounded correctly: the quotient of two exact numbers.
///
/// The standard library's parser takes any number of digits, and 15 KiB of tables.
///
/// # Source
/// W. Clinger, "How to read floating point numbers accurately", 1990: the fast path.
fn decimal(value: &str) -> Option<f64> {
    let (whole, part) = value.split_once('.').unwrap_or((value, ""));
    let digits = whole.len() + part.len();
    if digits == 0 || digits > MAX_DIGITS {
        return None;
    }
    let (mut mantissa, mut scale) = (0u64, 1u64);
    for digit in whole.chars().chain(part.chars()) {
        mantissa = mantissa * 10 + u64::from(digit.to_digit(10)?);
    }
    for _ in 0..part.len() {
        scale *= 10;
    }
    Some(mantissa as f64 / scale as f64)
}

fn decimal_in(range: RangeInclusive<f64>, value: &str, expected: &'static str) -> Result<f64, &'static str> {
    decimal(value).filter(|x| range.contains(x)).ok_or(expected)
}

fn fraction(value: &str) -> Result<f64, &'static str> {
    decimal_in(0.0..=1.0, value, "a decimal number from 0 to 1")
}

/// 32 bytes as 64 hexadecimal digits: a SHA-256 or an Ed25519 public key.
///
/// # Errors
/// What was expected.
pub fn hex_32(value: &str) -> Result<[u8; 32], &'static str> {
    const EXPECTED: &str = "64 hexadecimal digits";
    let mut out = [0u8; 32];
    if value.len() != 64 || !value.is_ascii() {
        return Err(EXPECTED);
    }
    for (byte, pair) in out.iter_mut().zip(value.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16).ok_or(EXPECTED);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Ok(out)
}

const PAIRS_EXPECTED: &str = "a whole number of pairs from 8 to 128";

/// Key, setter: the one list of options.
const TABLE: &[(&str, Setter)] = &[
    ("mode", |o, v| {
        o.mode = match v {
            "generate" => Mode::Generate,
            "selftest" => Mode::SelfTest,
            "smoke" => Mode::Smoke,
            _ => return Err("generate, selftest or smoke"),
        };
        Ok(())
    }),
    ("prompt", |o, v| {
        o.prompt = v.to_owned();
        Ok(())
    }),
    ("chat", |o, v| flag(v).map(|x| o.chat = x)),
    ("system", |o, v| {
        o.system = v.to_owned();
        Ok(())
    }),
    ("max_tokens", |o, v| number(v, "a whole number of tokens").map(|x| o.max_tokens = x)),
    ("ignore_eos", |o, v| flag(v).map(|x| o.ignore_eos = x)),
    ("temp", |o, v| {
        decimal_in(0.0..=100.0, v, "a decimal temperature from 0 to 100").map(|x| o.sampling.temperature = x as f32)
    }),
    ("seed", |o, v| number(v, "a whole number").map(|x| o.sampling.seed = x)),
    ("top_k", |o, v| number(v, "a whole number of tokens, 0 for all").map(|x| o.sampling.top_k = x)),
    ("top_p", |o, v| fraction(v).map(|x| o.sampling.top_p = x as f32)),
    ("min_p", |o, v| fraction(v).map(|x| o.sampling.min_p = x as f32)),
    ("repeat_penalty", |o, v| {
        decimal_in(1.0..=100.0, v, "a decimal factor from 1 to 100").map(|x| o.sampling.repeat_penalty = x as f32)
    }),
    ("repeat_window", |o, v| number(v, "a whole number of tokens, 0 for all").map(|x| o.sampling.repeat_window = x)),
    ("no_repeat_ngram", |o, v| {
        number(v, "a whole number of tokens, 0 for off").map(|x| o.sampling.no_repeat_ngram = x)
    }),
    ("loop_escape", |o, v| {
        const EXPECTED: &str = "a number of rounds from 2 on, 0 for off";
        let x: u32 = number(v, EXPECTED)?;
        if x == 1 {
            return Err(EXPECTED);
        }
        o.sampling.loop_escape = x;
        Ok(())
    }),
    ("stop", |o, v| {
        o.stop.push(v.to_owned());
        Ok(())
    }),
    ("context", |o, v| number(v, "a whole number of tokens").map(|x| o.context = x)),
    ("context.shift", |o, v| {
        o.context_shift = match v {
            "off" => None,
            v => Some(number(v, "off, or the number of first tokens to keep")?),
        };
        Ok(())
    }),
    ("kv", |o, v| {
        o.kv = match v {
            "auto" => None,
            "f32" => Some(KvType::F32),
            "f16" => Some(KvType::F16),
            "q8_0" => Some(KvType::Q8_0),
            _ => return Err("auto, f32, f16 or q8_0"),
        };
        Ok(())
    }),
    ("threads", |o, v| number(v, "a whole number of cores, 0 for all").map(|x| o.threads = x)),
    ("model", |o, v| {
        o.model = v.to_owned();
        Ok(())
    }),
    ("tokenizer", |o, v| {
        o.tokenizer = v.to_owned();
        Ok(())
    }),
    ("model.sha256", |o, v| {
        o.model_sha256 = match v {
            "auto" => ModelHash::Auto,
            "show" => ModelHash::Show,
            "off" => ModelHash::Off,
            v => ModelHash::Is(hex_32(v).map_err(|_| "auto, show, off or 64 hexadecimal digits")?),
        };
        Ok(())
    }),
    ("model.public_key", |o, v| hex_32(v).map(|x| o.model_public_key = Some(x))),
    ("model.signature", |o, v| {
        o.model_signature = v.to_owned();
        Ok(())
    }),
    ("load.rounds", |o, v| number(v, "a whole number of rounds").map(|x| o.load_rounds = x)),
    ("tier", |o, v| {
        o.tier = match v {
            "compiled" => Tier::Compiled,
            "baseline" => Tier::Baseline,
            "reference" => Tier::Reference,
            _ => return Err("compiled, baseline or reference"),
        };
        Ok(())
    }),
    ("isa", |o, v| {
        o.isa = match v {
            "auto" => IsaLimit::Auto,
            "avx512" => IsaLimit::Avx512,
            "avx2_vnni" => IsaLimit::Avx2Vnni,
            "avx2" => IsaLimit::Avx2,
            "portable" => IsaLimit::Portable,
            _ => return Err("auto, avx512, avx2_vnni, avx2 or portable"),
        };
        Ok(())
    }),
    ("snapshot", |o, v| flag(v).map(|x| o.snapshot = x)),
    ("tune.budget_ms", |o, v| number(v, "a whole number of milliseconds").map(|x| o.tune_budget_ms = x)),
    ("tune.max_trials", |o, v| number(v, "a whole number").map(|x| o.tune_max_trials = x)),
    ("tune.pairs", |o, v| {
        let pairs = number(v, PAIRS_EXPECTED)?;
        let asked = usize::try_from(pairs).unwrap_or(usize::MAX);
        if !PAIRS_RANGE.contains(&asked) {
            return Err(PAIRS_EXPECTED);
        }
        o.tune_pairs = pairs;
        Ok(())
    }),
    ("tune.max_variants", |o, v| number(v, "a whole number of variants, 0 for all").map(|x| o.tune_max_variants = x)),
    ("converge.window", |o, v| {
        const EXPECTED: &str = "a number of boots from 2 on: one shows no variation";
        let x: u32 = number(v, EXPECTED)?;
        if x < 2 {
            return Err(EXPECTED);
        }
        o.converge_window = x;
        Ok(())
    }),
    ("converge.max_variance", |o, v| fraction(v).map(|x| o.converge_max_variance = x)),
    ("converge.coverage", |o, v| fraction(v).map(|x| o.converge_coverage = x)),
    ("report", |o, v| flag(v).map(|x| o.report = x)),
];

impl Options {
    /// Sets one option.
    ///
    /// # Errors
    /// [`OptionError::UnknownKey`], [`OptionError::MachineKey`] or [`OptionError::BadValue`].
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), OptionError> {
        let Some((_, setter)) = TABLE.iter().find(|(name, _)| *name == key) else {
            if key.starts_with("kernel.") {
                return Err(OptionError::MachineKey { key: key.to_owned() });
            }
            let known: Vec<&str> = TABLE.iter().map(|(name, _)| *name).collect();
            return Err(OptionError::UnknownKey { key: key.to_owned(), known: known.join(" ") });
        };
        setter(self, value).map_err(|expected| OptionError::BadValue {
            key: key.to_owned(),
            expected,
            found: value.to_owned(),
        })
    }

    /// Applies every setting in `text` (a command line or a file).
    ///
    /// # Errors
    /// The first [`OptionError`]; settings before it have been applied.
    pub fn apply(&mut self, text: &str) -> Result<(), OptionError> {
        for (key, value) in settings(text)? {
            self.set(&key, &value)?;
        }
        Ok(())
    }
}

fn settings(text: &str) -> Result<Vec<(String, String)>, OptionError> {
    let mut out = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        if c.is_whitespace() || c == '\0' {
            chars.next();
            continue;
        }
        if c == '#' {
            chars.by_ref().find(|&c| c == '\n');
            continue;
        }
        let mut key = String::new();
        let mut has_value = false;
        while let Some(&c) = chars.peek() {
            if c.is_whitespace() || c == '\0' {
                break;
            }
            chars.next();
            if c == '=' {
                has_value = true;
                break;
            }
            key.push(c);
        }
        if !has_value {
            return Err(OptionError::NotAnOption { word: key });
        }
        let mut value = String::new();
        if chars.peek() == Some(&'"') {
            chars.next();
            loop {
                match chars.next() {
                    None => return Err(OptionError::UnclosedQuote { key }),
                    Some('"') => break,
                    Some('\\') => match chars.next() {
                        Some('n') => value.push('\n'),
                        Some(escaped) => value.push(escaped),
                        None => return Err(OptionError::UnclosedQuote { key }),
                    },
                    Some(c) => value.push(c),
                }
            }
        } else {
            while let Some(&c) = chars.peek() {
                if c.is_whitespace() || c == '\0' {
                    break;
                }
                value.push(c);
                chars.next();
            }
        }
        out.push((key, value));
    }
    Ok(out)
}

/// The text form of one setting, quoted where needed; [`Options::apply`] reads it back.
pub fn setting(key: &str, value: &str) -> String {
    if !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '"' || c == '\\' || c == '#') {
        return alloc::format!("{key}={value}");
    }
    let mut out = key.to_string();
    out.push_str("=\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_later_ones_win() {
        let mut options = Options::default();
        options
            .apply("# a comment\nprompt=\"Once \\\"upon\\\"\\na time\" max_tokens=5\nthreads=1 # one\nmax_tokens=7\0")
            .unwrap();
        assert_eq!(options.prompt, "Once \"upon\"\na time");
        assert_eq!((options.max_tokens, options.threads), (7, 1));
    }

    #[test]
    fn sampling_settings_reach_the_sampler_and_stops_add_up() {
        let mut options = Options::default();
        options.apply("temp=0.5 top_k=40 top_p=0.9 min_p=0.05 repeat_penalty=1.1 repeat_window=0 seed=9").unwrap();
        options.apply("no_repeat_ngram=3 loop_escape=4 stop=\"\\n\\n\" stop=END").unwrap();
        let expected = Sampling {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            repeat_penalty: 1.1,
            repeat_window: 0,
            no_repeat_ngram: 3,
            loop_escape: 4,
            seed: 9,
        };
        assert_eq!(options.sampling, expected);
        assert_eq!(options.stop, ["\n\n", "END"]);
    }

    #[test]
    fn a_setting_reads_back_as_written() {
        for value in ["plain", "two words", "", "quo\"te", "back\\slash", "line\nfeed", "#hash", "naïve =="] {
            let mut options = Options::default();
            options.apply(&setting("prompt", value)).unwrap();
            assert_eq!(options.prompt, value);
        }
    }

    #[test]
    fn bad_settings_say_what_was_expected() {
        let error = |text: &str| Options::default().apply(text).unwrap_err();
        assert!(
            matches!(error("promt=x"), OptionError::UnknownKey { key, known } if key == "promt" && known.contains("prompt"))
        );
        assert_eq!(error("kernel.cores=2"), OptionError::MachineKey { key: "kernel.cores".into() });
        assert_eq!(
            error("max_tokens=-1"),
            OptionError::BadValue {
                key: "max_tokens".into(),
                expected: "a whole number of tokens",
                found: "-1".into()
            }
        );
        assert_eq!(error("quiet"), OptionError::NotAnOption { word: "quiet".into() });
        assert_eq!(error("prompt=\"a"), OptionError::UnclosedQuote { key: "prompt".into() });
        for bad in [
            "temp=-1",
            "temp=nan",
            "top_p=1.5",
            "min_p=-0.1",
            "repeat_penalty=0.5",
            "loop_escape=1",
            "converge.coverage=1.5",
            "converge.window=0",
            "converge.window=1",
            "tune.pairs=7",
            "tune.pairs=129",
            "model.sha256=12",
            "model.public_key=12",
            "model.public_key=zz4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "chat=maybe",
            "mode=x",
            "tier=x",
            "isa=sse",
            "kv=f64",
            "context.shift=on",
            "context.shift=-1",
        ] {
            assert!(matches!(error(bad), OptionError::BadValue { .. }), "{bad}");
        }
    }

    #[test]
    fn decimals_are_what_the_standard_library_reads() {
        for text in ["0", "1", "0.1", "0.85", "1.", ".5", "3.14159265358979", "999999999999999", "0.00000000000001"] {
            assert_eq!(decimal(text), text.parse().ok(), "{text}");
        }
        let mut state = 1u64;
        for digits in (1..=MAX_DIGITS).cycle().take(2000) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut text = alloc::format!("{:015}", state % 1_000_000_000_000_000);
            text.truncate(digits);
            text.insert((state >> 60) as usize % (digits + 1), '.');
            assert_eq!(decimal(&text), text.parse().ok(), "{text}");
        }
        for bad in ["", ".", "-1", "+1", "1e3", "nan", "inf", "0x1", "1,5", "1.2.3", "0.0000000000000001"] {
            assert_eq!(decimal(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_option_is_in_the_documented_table() {
        let document = include_str!("../../docs/FORMATS.md");
        for (key, _) in TABLE {
            assert!(document.contains(&alloc::format!("| `{key}` |")), "docs/FORMATS.md has no row for {key}");
        }
    }
}
