//! Pre-tokenizers: how text is cut into pieces that merging never joins. Each is a regular expression (or several, each
//! cutting the pieces of the one before) of the model's training code, matched by hand.
//!
//! # Source
//! GPT-2 `encoder.py`; `llm_tokenizer_bpe` in llama.cpp for the names and sequences.

use super::TokenizerError;
use super::unicode::Class;
use alloc::string::ToString;

/// How text is cut before byte-level merging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pretokenizer {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// Every `\p{N}` alone, then [`Pretokenizer::Gpt2`]. SmolLM, StarCoder, Command-R.
    SmolLm,
    /// Contractions in either case, then `[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
    Llama3,
    /// As [`Pretokenizer::Llama3`], with every `\p{N}` alone.
    Qwen2,
    /// llama.cpp's `default`: runs of `[\p{P}$+<=>^~|]`, then GPT-2, then runs of `\p{N}`, then digits by threes.
    Default,
}

/// Receives the pieces of a text, in order; together they are the text.
type Sink<'s> = &'s mut dyn FnMut(&[u8]);

impl Pretokenizer {
    /// Names understood in `tokenizer.ggml.pre`, for messages.
    pub const SUPPORTED: &'static str = "gpt-2, phi-2, mpt, olmo, jais, trillion, smollm, starcoder, refact, command-r, \
codeshell, exaone, minerva-7b, llama-bpe, llama3, llama-v3, falcon3, pixtral, smaug-bpe, dbrx, qwen2, deepseek-r1-qwen, \
stablelm2, default";

    /// The pre-tokenizer with llama.cpp's name for it.
    ///
    /// # Errors
    /// [`TokenizerError::UnsupportedPretokenizer`], also when the file names none: guessing would change token ids.
    pub fn from_name(name: Option<&str>) -> Result<Self, TokenizerError> {
        Ok(match name {
            Some("gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion") => Pretokenizer::Gpt2,
            Some("smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b") => {
                Pretokenizer::SmolLm
            }
            Some("llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "smaug-bpe" | "dbrx") => {
                Pretokenizer::Llama3
            }
            Some("qwen2" | "deepseek-r1-qwen" | "stablelm2") => Pretokenizer::Qwen2,
            Some("default") => Pretokenizer::Default,
            other => {
                return Err(TokenizerError::UnsupportedPretokenizer {
                    found: other.unwrap_or("(missing)").to_string(),
                    supported: Self::SUPPORTED,
                });
            }
        })
    }

    /// Its name here.
    pub const fn name(self) -> &'static str {
        match self {
            Pretokenizer::Gpt2 => "gpt-2",
            Pretokenizer::SmolLm => "smollm",
            Pretokenizer::Llama3 => "llama-bpe",
            Pretokenizer::Qwen2 => "qwen2",
            Pretokenizer::Default => "default",
        }
    }

    /// Calls `sink` with each piece of `text`.
    pub fn split(self, text: &[u8], sink: Sink<'_>) {
        let gpt2 = |text: &[u8], sink: Sink<'_>| cut(text, gpt2_match, sink);
        match self {
            Pretokenizer::Gpt2 => gpt2(text, sink),
            Pretokenizer::SmolLm => isolate(text, is_number, 1, &mut |part| gpt2(part, sink)),
            Pretokenizer::Llama3 => cut(text, |text| llama3_match(text, 3), sink),
            Pretokenizer::Qwen2 => cut(text, |text| llama3_match(text, 1), sink),
            Pretokenizer::Default => isolate(text, is_symbol, usize::MAX, &mut |part| {
                gpt2(part, &mut |part| {
                    isolate(part, is_number, usize::MAX, &mut |part| digits_by_threes(part, sink));
                });
            }),
        }
    }
}

fn is_number(_first_byte: u8, class: Class) -> bool {
    class == Class::Number
}

fn is_symbol(first_byte: u8, class: Class) -> bool {
    class == Class::Punctuation || b"$+<=>^~|".contains(&first_byte)
}

/// Cuts out every run, at most `max` long, of the characters that `inside` picks; what lies between stays whole.
fn isolate(text: &[u8], inside: fn(u8, Class) -> bool, max: usize, sink: Sink<'_>) {
    let mut rest = text;
    while !rest.is_empty() {
        let starts_inside = inside_first(rest, inside);
        let limit = if starts_inside { max } else { usize::MAX };
        let mut len = 0;
        let mut count = 0;
        while let Some(tail) = rest.get(len..).filter(|tail| !tail.is_empty()) {
            if count == limit || inside_first(tail, inside) != starts_inside {
                break;
            }
            len += Class::first(tail).1;
            count += 1;
        }
        let (part, after) = rest.split_at(len);
        sink(part);
        rest = after;
    }
}

fn inside_first(text: &[u8], inside: fn(u8, Class) -> bool) -> bool {
    text.first().is_some_and(|&byte| inside(byte, Class::first(text).0))
}

/// `[0-9][0-9][0-9]`, leftmost first; the rest between matches stays whole.
fn digits_by_threes(text: &[u8], sink: Sink<'_>) {
    let mut start = 0;
    let mut at = 0;
    while at < text.len() {
        if text.get(at..at + 3).is_some_and(|triple| triple.iter().all(u8::is_ascii_digit)) {
            if start < at {
                sink(&text[start..at]);
            }
            sink(&text[at..at + 3]);
            at += 3;
            start = at;
        } else {
            at += 1;
        }
    }
    if start < text.len() {
        sink(&text[start..]);
    }
}

/// Cuts `text` into the pieces whose lengths `first` finds one after the other.
fn cut(text: &[u8], first: impl Fn(&[u8]) -> usize, sink: Sink<'_>) {
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(first(rest).clamp(1, rest.len()));
        sink(piece);
        rest = after;
    }
}

/// Length of GPT-2's match at the start of `text`, which is not empty.
fn gpt2_match(text: &[u8]) -> usize {
    for contraction in [&b"'s"[..], b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d"] {
        if text.starts_with(contraction) {
            return contraction.len();
        }
    }
    let space = usize::from(text.first() == Some(&b' '));
    let word = text.get(space..).unwrap_or_default();
    if let (class, 1..) = Class::first(word)
        && class != Class::Space
    {
        return space + run(word, |other| kind(other) == kind(class)).0;
    }
    // White space: all of it at the end of the text, else all but its last character, which belongs to what follows.
    let (len, last) = run(text, |class| class == Class::Space);
    if len == text.len() || len == last { len } else { len - last }
}

/// Length of Llama 3's match at the start of `text`, which is not empty; numbers are cut after `max_digits`.
fn llama3_match(text: &[u8], max_digits: usize) -> usize {
    if let [b'\'', after @ ..] = text {
        for contraction in [&b"s"[..], b"t", b"re", b"ve", b"m", b"ll", b"d"] {
            if after.get(..contraction.len()).is_some_and(|after| after.eq_ignore_ascii_case(contraction)) {
                return 1 + contraction.len();
            }
        }
    }
    let is_letter = |class| class == Class::Letter;
    let is_break = |text: &[u8]| matches!(text.first(), Some(b'\r' | b'\n'));
    let breaks = |text: &[u8]| text.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let (class, width) = Class::first(text);
    let after = text.get(width..).unwrap_or_default();
    if is_letter(class) {
        return run(text, is_letter).0;
    }
    if class == Class::Number {
        let mut len = 0;
        for _ in 0..max_digits {
            match Class::first(text.get(len..).unwrap_or_default()) {
                (Class::Number, width) => len += width,
                _ => break,
            }
        }
        return len;
    }
    // One character of any other kind but a line break goes with the letters behind it.
    if !is_break(text) && is_letter(Class::first(after).0) {
        return width + run(after, is_letter).0;
    }
    let space = usize::from(text.first() == Some(&b' '));
    let symbols = run(text.get(space..).unwrap_or_default(), |class| kind(class) == Class::Other).0;
    if symbols > 0 {
        let len = space + symbols;
        return len + breaks(text.get(len..).unwrap_or_default());
    }
    // White space: up to its last line break, else as in GPT-2.
    let (len, last) = run(text, |class| class == Class::Space);
    match text.get(..len).and_then(|spaces| spaces.iter().rposition(|byte| matches!(byte, b'\r' | b'\n'))) {
        Some(at) => at + 1,
        None if len == text.len() || len == last => len,
        None => len - last,
    }
}

/// Punctuation and the rest are one class to GPT-2.
fn kind(class: Class) -> Class {
    if class == Class::Punctuation { Class::Other } else { class }
}

/// Length of the run of characters `text` begins with that satisfy `inside`, and of the run's last character.
fn run(text: &[u8], inside: impl Fn(Class) -> bool) -> (usize, usize) {
    let mut len = 0;
    let mut last = 0;
    while let Some(tail) = text.get(len..) {
        match Class::first(tail) {
            (class, width @ 1..) if inside(class) => {
                len += width;
                last = width;
            }
            _ => break,
        }
    }
    (len, last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec::Vec;

    fn pieces(pretokenizer: Pretokenizer, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        pretokenizer.split(text.as_bytes(), &mut |piece| out.push(String::from_utf8(piece.to_vec()).unwrap()));
        out
    }

    #[test]
    fn gpt2_pieces() {
        let split = |text| pieces(Pretokenizer::Gpt2, text);
        assert_eq!(split("Hello, world!"), ["Hello", ",", " world", "!"]);
        assert_eq!(split("  two  spaces "), [" ", " two", " ", " spaces", " "]);
        assert_eq!(split("don't SHE'S it's'"), ["don", "'t", " SHE", "'", "S", " it", "'s", "'"]);
        assert_eq!(split("we'll 've're"), ["we", "'ll", " '", "ve", "'re"]);
        assert_eq!(split("12345 6789"), ["12345", " 6789"]);
        assert_eq!(split("\n\n\n   \t mixed\r\n ws"), ["\n\n\n   \t", " mixed", "\r\n", " ws"]);
        assert_eq!(split("a\n b\nc"), ["a", "\n", " b", "\n", "c"]);
        assert_eq!(split("e\u{301} x"), ["e", "\u{301}", " x"]);
        assert_eq!(split(" \u{a0}x"), [" ", "\u{a0}", "x"]);
        assert_eq!(split(""), [""; 0]);
    }

    #[test]
    fn smollm_isolates_every_number() {
        let split = |text| pieces(Pretokenizer::SmolLm, text);
        assert_eq!(split("12345 6789"), ["1", "2", "3", "4", "5", " ", "6", "7", "8", "9"]);
        assert_eq!(split("a  1b"), ["a", "  ", "1", "b"]);
        assert_eq!(split("½Ⅷx"), ["½", "Ⅷ", "x"]);
        assert_eq!(split("it's 3."), ["it", "'s", " ", "3", "."]);
    }

    #[test]
    fn default_cuts_punctuation_and_threes() {
        let split = |text| pieces(Pretokenizer::Default, text);
        assert_eq!(split("Hi, there"), ["Hi", ",", " there"]);
        assert_eq!(split("a 12345"), ["a", " ", "123", "45"]);
        assert_eq!(split("x+=1;"), ["x", "+=", "1", ";"]);
        assert_eq!(split("don't"), ["don", "'", "t"]);
        assert_eq!(split(" (a)"), [" ", "(", "a", ")"]);
    }

    #[test]
    fn llama3_and_qwen2_differ_in_digits_only() {
        for (pretokenizer, digits) in [(Pretokenizer::Llama3, 3), (Pretokenizer::Qwen2, 1)] {
            let split = |text| pieces(pretokenizer, text);
            assert_eq!(split("Hello, world!"), ["Hello", ",", " world", "!"]);
            assert_eq!(split("I'LL don't"), ["I", "'LL", " don", "'t"]);
            assert_eq!(split("  two  spaces "), [" ", " two", " ", " spaces", " "]);
            assert_eq!(split("a\n\n  b \n c"), ["a", "\n\n", " ", " b", " \n", " c"]);
            assert_eq!(split("x==\n\ny"), ["x", "==\n\n", "y"]);
            assert_eq!(split("$price (a)"), ["$price", " (", "a", ")"]);
            assert_eq!(split("\u{a0}x"), ["\u{a0}x"]);
            let numbers = split("1234567");
            assert_eq!(numbers[0].len(), digits);
            assert_eq!(numbers.concat(), "1234567");
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        for name in [None, Some("tekken"), Some("")] {
            assert!(matches!(Pretokenizer::from_name(name), Err(TokenizerError::UnsupportedPretokenizer { .. })));
        }
        for name in Pretokenizer::SUPPORTED.split(", ") {
            assert!(Pretokenizer::from_name(Some(name)).is_ok(), "{name}");
        }
    }
}
