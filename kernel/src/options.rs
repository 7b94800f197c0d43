//! The kernel's own words on the command line.
//!
//! Words that start with `kernel.` are for the kernel and are taken out; everything else is handed to the runtime as it
//! stands. Quotes are respected, so a prompt may contain such a word.
//!
//! | word | meaning |
//! |---|---|
//! | `kernel.cores=N` | start at most N cores |
//! | `kernel.memory=SIZE` | use at most SIZE bytes of RAM; K, M and G are binary |
//! | `kernel.crash=KIND` | fail on purpose, to see what a host makes of it: panic, fault, stack_overflow or out_of_memory |
//! | `kernel.scratch_lba=N` | the self-test may overwrite (and restore) 2 MiB of the boot disk from sector N on |

use alloc::string::{String, ToString};

/// Settings of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KernelOptions {
    /// Most cores to start.
    pub cores: Option<usize>,
    /// Most bytes of RAM to use.
    pub memory_bytes: Option<u64>,
    /// Fail on purpose, right after the start.
    pub crash: Option<Crash>,
    /// First sector of the boot disk that the self-test may write.
    pub scratch_lba: Option<u64>,
}

/// A way to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// A Rust panic: exit code 37.
    Panic,
    /// A write to address 0: exit code 37 and a fault message.
    Fault,
    /// Recursion without end into the stack's guard page: likewise.
    StackOverflow,
    /// Allocation without end: exit code 45.
    OutOfMemory,
}

/// A word the kernel cannot take.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KernelOptionError {
    /// No such word.
    #[error(
        "unknown kernel option `{word}`; there are kernel.cores, kernel.memory, kernel.crash and kernel.scratch_lba"
    )]
    Unknown {
        /// The word.
        word: String,
    },
    /// The value does not fit.
    #[error("`{word}`: expected {expected}")]
    BadValue {
        /// The word.
        word: String,
        /// What it takes.
        expected: &'static str,
    },
}

/// Splits `text` into the kernel's settings and the rest.
///
/// # Errors
/// The first [`KernelOptionError`].
pub fn split(text: &str) -> Result<(KernelOptions, String), KernelOptionError> {
    let mut options = KernelOptions::default();
    let mut rest = String::new();
    let mut left = text;
    while !left.is_empty() {
        let (word, after) = left.split_at(word_len(left));
        match word.strip_prefix("kernel.") {
            Some(setting) => take(&mut options, word, setting)?,
            None => rest.push_str(word),
        }
        let gap = after.len() - after.trim_start().len();
        rest.push_str(&after[..gap]);
        left = &after[gap..];
    }
    Ok((options, rest.trim().to_string()))
}

/// Bytes up to the first white space outside quotes.
fn word_len(text: &str) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => return at,
            _ => {}
        }
    }
    text.len()
}

fn take(options: &mut KernelOptions, word: &str, setting: &str) -> Result<(), KernelOptionError> {
    let bad = |expected| KernelOptionError::BadValue { word: word.to_string(), expected };
    let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
    match key {
        "cores" => {
            let cores = value.parse().ok().filter(|&n| n > 0).ok_or(bad("a number of cores from 1 up"))?;
            options.cores = Some(cores);
        }
        "memory" => options.memory_bytes = Some(size(value).ok_or(bad("a size such as 512M or 4G"))?),
        "crash" => {
            options.crash = Some(match value {
                "panic" => Crash::Panic,
                "fault" => Crash::Fault,
                "stack_overflow" => Crash::StackOverflow,
                "out_of_memory" => Crash::OutOfMemory,
                _ => return Err(bad("panic, fault, stack_overflow or out_of_memory")),
            });
        }
        "scratch_lba" => options.scratch_lba = Some(value.parse().map_err(|_| bad("a sector number"))?),
        _ => return Err(KernelOptionError::Unknown { word: word.to_string() }),
    }
    Ok(())
}

/// A size in bytes, with an optional binary suffix K, M or G.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kernel_words_are_taken_out_and_quotes_are_respected() {
        let text = "mode=smoke kernel.cores=2 prompt=\"say kernel.cores=9 \\\" x\"  kernel.memory=512M seed=3";
        let (options, rest) = split(text).unwrap();
        assert_eq!(options, KernelOptions { cores: Some(2), memory_bytes: Some(512 << 20), ..Default::default() });
        assert_eq!(rest, "mode=smoke  prompt=\"say kernel.cores=9 \\\" x\"   seed=3");
    }

    #[test]
    fn sizes() {
        let cases = [("1", Some(1)), ("4K", Some(4096)), ("2g", Some(2 << 30)), ("", None), ("M", None), ("-1", None)];
        for (text, want) in cases {
            assert_eq!(size(text), want, "{text}");
        }
        assert_eq!(size("99999999999G"), None, "too large for 64 bits");
    }

    #[test]
    fn bad_words_are_errors() {
        let unknown = KernelOptionError::Unknown { word: "kernel.core=1".to_string() };
        assert_eq!(split("kernel.core=1"), Err(unknown));
        for word in ["kernel.cores=0", "kernel.cores", "kernel.memory=lots", "kernel.crash=no", "kernel.scratch_lba=-1"]
        {
            assert!(matches!(split(word), Err(KernelOptionError::BadValue { word: w, .. }) if w == word), "{word}");
        }
    }

    proptest! {
        #[test]
        fn text_without_kernel_words_passes_unchanged(text in "[a-z=\" \\\\é.]{0,40}") {
            prop_assume!(!text.contains("kernel."));
            prop_assert_eq!(split(&text), Ok((KernelOptions::default(), text.trim().to_string())));
        }
    }
}
