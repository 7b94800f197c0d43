//! The character classes that pre-tokenizers are written in: `\p{L}`, `\p{N}`, `\p{P}`, `\s`.

/// Runs of characters of one class, in ascending order, made by `build.rs`.
mod runs {
    use super::Class;

    /// A run's first character and its class in one word.
    const fn run(start: u32, class: Class) -> u32 {
        start << 3 | class as u32
    }

    include!(concat!(env!("OUT_DIR"), "/unicode_runs.rs"));

    /// The class of the run that `c` is in; white space is among `Other`.
    pub(super) fn class(c: char) -> Class {
        let after = RUNS.partition_point(|&run| run >> 3 <= c as u32);
        let run = RUNS[after.saturating_sub(1)];
        [Class::Letter, Class::Number, Class::Space, Class::Punctuation, Class::Other]
            .into_iter()
            .find(|&class| class as u32 == run & 7)
            .unwrap_or(Class::Other)
    }
}

/// Class of a character, or of a byte that is not part of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// `\p{L}`.
    Letter,
    /// `\p{N}`.
    Number,
    /// `\s`, the White_Space property.
    Space,
    /// `\p{P}`.
    Punctuation,
    /// Anything else, bytes that are not UTF-8 included.
    Other,
}

impl Class {
    pub(super) fn of(c: char) -> Self {
        match c {
            'a'..='z' | 'A'..='Z' => Class::Letter,
            '0'..='9' => Class::Number,
            _ if c.is_whitespace() => Class::Space,
            _ => runs::class(c),
        }
    }

    /// Class and length in bytes of what `text` begins with; length 0 at the end.
    pub(super) fn first(text: &[u8]) -> (Self, usize) {
        let (c, len) = first_char(text);
        (c.map_or(Class::Other, Class::of), len)
    }
}

/// The character `text` begins with and its length in bytes; `None` with length 1 for a byte that is not part of a
/// character, length 0 at the end.
pub(super) fn first_char(text: &[u8]) -> (Option<char>, usize) {
    let width = match text.first() {
        None => return (None, 0),
        Some(&byte @ 0..0x80) => return (Some(char::from(byte)), 1),
        Some(0xc2..=0xdf) => 2,
        Some(0xe0..=0xef) => 3,
        Some(0xf0..=0xf4) => 4,
        Some(_) => return (None, 1),
    };
    let decoded = text.get(..width).and_then(|bytes| core::str::from_utf8(bytes).ok());
    decoded.and_then(|text| text.chars().next()).map_or((None, 1), |c| (Some(c), width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unicode_general_category::{GeneralCategory, get_general_category};

    /// `\p{L}` is not `char::is_alphabetic`, `\p{N}` is `char::is_numeric`: the corners where hand-made tables go wrong.
    #[test]
    fn classes_at_the_corners() {
        for (c, class) in [
            ('é', Class::Letter),
            ('ª', Class::Letter),
            ('ǅ', Class::Letter),
            ('ー', Class::Letter),
            ('你', Class::Letter),
            ('\u{301}', Class::Other),
            ('\u{93e}', Class::Other),
            ('Ⓐ', Class::Other),
            ('\u{345}', Class::Other),
            ('Ⅷ', Class::Number),
            ('½', Class::Number),
            ('②', Class::Number),
            ('٣', Class::Number),
            ('\u{a0}', Class::Space),
            ('\u{85}', Class::Space),
            ('\u{3000}', Class::Space),
            ('\u{200b}', Class::Other),
            ('\u{feff}', Class::Other),
            ('\u{1c}', Class::Other),
            ('_', Class::Punctuation),
            ('。', Class::Punctuation),
            ('$', Class::Other),
            ('😀', Class::Other),
        ] {
            assert_eq!(Class::of(c), class, "U+{:04X}", c as u32);
        }
    }

    #[test]
    fn runs_agree_with_the_category_table() {
        use GeneralCategory as G;
        for c in '\0'..=char::MAX {
            let category = get_general_category(c);
            let letter = matches!(
                category,
                G::UppercaseLetter | G::LowercaseLetter | G::TitlecaseLetter | G::ModifierLetter | G::OtherLetter
            );
            assert_eq!(Class::of(c) == Class::Letter, letter, "U+{:04X}", c as u32);
            let number = matches!(category, G::DecimalNumber | G::LetterNumber | G::OtherNumber);
            assert_eq!(Class::of(c) == Class::Number, number, "U+{:04X}", c as u32);
            assert_eq!(Class::of(c) == Class::Space, c.is_whitespace(), "U+{:04X}", c as u32);
        }
    }

    /// The category table and core's `is_numeric` come from different sources; where both know a character they agree.
    #[test]
    fn numbers_agree_with_core() {
        for c in ('\0'..=char::MAX).filter(|&c| get_general_category(c) != GeneralCategory::Unassigned) {
            assert_eq!(Class::of(c) == Class::Number, c.is_numeric(), "U+{:04X}", c as u32);
        }
    }

    #[test]
    fn bytes_that_are_not_characters_have_length_one() {
        for (bytes, expected) in [
            (&b""[..], (None, 0)),
            (b"\xff", (None, 1)),
            (b"\x80a", (None, 1)),
            (b"\xe4\xbd", (None, 1)),
            (b"\xed\xa0\x80", (None, 1)),
            (b"\xc0\x80", (None, 1)),
            (b"\xe4\xbd\xa0x", (Some('你'), 3)),
            (b"\xf0\x9f\x98\x80", (Some('😀'), 4)),
        ] {
            assert_eq!(first_char(bytes), expected, "{bytes:x?}");
        }
    }
}
