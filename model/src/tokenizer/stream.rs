//! Token bytes to text, never printing half a character.

use alloc::string::String;
use alloc::vec::Vec;

/// Collects bytes and gives them out as whole characters.
///
/// A byte that can never become part of a character is given out as U+FFFD at once; bytes that may still be completed
/// (at most three) are held back.
#[derive(Clone, Default, Debug)]
pub struct TextStream {
    held: Vec<u8>,
}

impl TextStream {
    /// Takes in `bytes` and returns the text they complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut out = String::new();
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            let at_end = done + invalid.len() == self.held.len();
            if at_end && may_be_completed(invalid) {
                break;
            }
            if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            done += invalid.len();
        }
        self.held.drain(..done);
        out
    }

    /// Ends the text: what is still held back can no longer be completed.
    pub fn finish(&mut self) -> String {
        let out = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        out
    }
}

/// True for the beginning of a character that is cut off by the end of the bytes.
fn may_be_completed(bytes: &[u8]) -> bool {
    core::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_come_whole_whatever_the_cuts() {
        let text = "aé你😀\u{301}z";
        for chunk in 1..=5 {
            let mut stream = TextStream::default();
            let mut out = String::new();
            for bytes in text.as_bytes().chunks(chunk) {
                out.push_str(&stream.push(bytes));
                assert!(text.starts_with(&out), "chunk {chunk}: {out:?}");
            }
            out.push_str(&stream.finish());
            assert_eq!(out, text);
        }
    }

    #[test]
    fn only_what_may_be_completed_is_held_back() {
        let mut stream = TextStream::default();
        assert_eq!(stream.push(b"a\xff"), "a\u{fffd}");
        assert_eq!(stream.push(b"b\xe4\xbd"), "b");
        assert_eq!(stream.push(b"\xa0"), "你");
        assert_eq!(stream.push(b"\xf0\x9f"), "");
        assert_eq!(stream.push(b"c"), "\u{fffd}c");
        assert_eq!(stream.push(b"\xc3"), "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_like_lossy_decoding() {
        let bytes = b"a\xff\xf0\x9f\x98b\xe4\xbd\xc3\xa9\xed\xa0\x80\xf0\x9f";
        let mut stream = TextStream::default();
        let mut out = String::new();
        for byte in bytes {
            out.push_str(&stream.push(&[*byte]));
        }
        out.push_str(&stream.finish());
        assert_eq!(out, String::from_utf8_lossy(bytes));
    }
}
