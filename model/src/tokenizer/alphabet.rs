//! The byte alphabet of GPT-2: each byte as one printable character, so that vocabularies are plain text.
//!
//! # Source
//! `bytes_to_unicode` in OpenAI's GPT-2 `encoder.py`.

use alloc::vec::Vec;

/// True for bytes that stand for themselves.
const fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// Characters of the alphabet by byte.
const CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let mut byte = 0;
    let mut next = 256;
    while byte < 256 {
        let code = if is_printable(byte as u8) {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        chars[byte] = match char::from_u32(code) {
            Some(c) => c,
            None => panic!("all codes are below 324"),
        };
        byte += 1;
    }
    chars
};

/// Bytes of the alphabet's characters by code point; `None` where a code point is not in the alphabet.
const BYTES: [Option<u8>; 324] = {
    let mut bytes = [None; 324];
    let mut byte = 0;
    while byte < 256 {
        bytes[CHARS[byte] as usize] = Some(byte as u8);
        byte += 1;
    }
    bytes
};

/// The character that stands for `byte`.
pub(crate) const fn char_of(byte: u8) -> char {
    CHARS[byte as usize]
}

/// Appends the bytes that `text` stands for to `out`; on `None` (something outside the alphabet) `out` is unchanged.
pub(super) fn decode(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let start = out.len();
    // Room at once: a call to grow for every byte is most of the work where code is built for size.
    out.resize(start + text.len(), 0);
    let decoded = decode_into(text, &mut out[start..]);
    out.truncate(start + decoded.unwrap_or(0));
    decoded.map(|_| ())
}

/// Writes the bytes that `text` stands for to the start of `out`, which is as long as `text`; their number.
fn decode_into(text: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut len = 0;
    let mut rest = text.iter();
    while let Some(&first) = rest.next() {
        // Every character of the alphabet is below U+0144, so one or two bytes of UTF-8.
        let code = match first {
            0..0x80 => usize::from(first),
            0xc2..=0xc5 => match rest.next() {
                Some(&second @ 0x80..=0xbf) => usize::from(first & 0x1f) << 6 | usize::from(second & 0x3f),
                _ => return None,
            },
            _ => return None,
        };
        *out.get_mut(len)? = BYTES.get(code).copied().flatten()?;
        len += 1;
    }
    Some(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    #[test]
    fn the_alphabet_is_a_bijection_with_the_known_corners() {
        let all: String = (0..=255).map(char_of).collect();
        let mut bytes = Vec::new();
        assert_eq!(decode(all.as_bytes(), &mut bytes), Some(()));
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!([char_of(b' '), char_of(b'\n'), char_of(0), char_of(0xad)], ['Ġ', 'Ċ', 'Ā', '\u{143}']);
        for outside in ["a b", "ań", "你", "\u{144}"] {
            assert_eq!(decode(outside.as_bytes(), &mut bytes), None, "{outside}");
        }
        assert_eq!(decode(b"\xc4", &mut bytes), None);
        assert_eq!(bytes.len(), 256);
    }
}
