//! Which format a file is in, from its first bytes.

use crate::error::ModelError;
use crate::{gguf, llama2c};
use alloc::vec;
use alloc::vec::Vec;

/// A file format this crate reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileFormat {
    /// GGUF: [`gguf::read`].
    Gguf,
    /// llama2.c `.bin`: [`llama2c::read`], with a tokenizer file.
    Llama2c,
}

/// Tells the format of a file of `file_bytes` that begins with `header`: as many bytes as [`HeaderBytes`] says, or all.
///
/// # Errors
/// [`ModelError::Empty`], [`ModelError::Truncated`], [`ModelError::UnsupportedVersion`] for newer llama2.c files, [`ModelError::UnknownFormat`].
pub fn sniff(header: &[u8], file_bytes: u64) -> Result<FileFormat, ModelError> {
    if file_bytes == 0 {
        return Err(ModelError::Empty);
    }
    if header.starts_with(&gguf::MAGIC) {
        return Ok(FileFormat::Gguf);
    }
    llama2c::Header::parse(header, file_bytes).map(|_| FileFormat::Llama2c)
}

/// How much of a file to read for its header: a guess first, and more as the reader asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeaderBytes {
    file_bytes: u64,
    have: u64,
}

impl HeaderBytes {
    /// Enough for nearly every model.
    const GUESS: u64 = 2 << 20;

    /// More than any header of a model: what would need more is damaged.
    const MOST: u64 = 128 << 20;

    /// The first guess for a file of `file_bytes`.
    pub fn of(file_bytes: u64) -> Self {
        Self { file_bytes, have: Self::GUESS.min(file_bytes) }
    }

    /// Bytes to read from the start of the file.
    pub fn len(self) -> usize {
        usize::try_from(self.have).unwrap_or(usize::MAX)
    }

    /// True for an empty file.
    pub fn is_empty(self) -> bool {
        self.have == 0
    }

    /// After `error` from a reader that was given [`HeaderBytes::len`] bytes: true when it is to be tried again with more of them.
    /// Headers grow in steps and up to a limit, so that a damaged length cannot make anyone read the whole file.
    pub fn grow(&mut self, error: &ModelError) -> bool {
        match *error {
            ModelError::Truncated { need_bytes, .. }
                if need_bytes <= self.file_bytes.min(Self::MOST) && self.have < self.file_bytes =>
            {
                self.have = (2 * self.have).max(need_bytes.min(4 * self.have)).min(self.file_bytes);
                true
            }
            _ => false,
        }
    }
}

/// The start of a file of `file_bytes`, as long as its header is, by `read`, which fills a buffer from byte 0 on. Of a file
/// that is no GGUF file, or a damaged one, whatever was read: the reader that comes next says what is wrong.
///
/// # Errors
/// Those of `read`.
pub fn header_bytes<E>(file_bytes: u64, mut read: impl FnMut(&mut [u8]) -> Result<(), E>) -> Result<Vec<u8>, E> {
    let mut len = HeaderBytes::of(file_bytes);
    loop {
        let mut bytes = vec![0; len.len()];
        read(&mut bytes)?;
        match gguf::Header::parse(&bytes, file_bytes) {
            Err(error) if bytes.starts_with(&gguf::MAGIC) && len.grow(&error) => {}
            _ => return Ok(bytes),
        }
    }
}

/// The error for bytes of no known format.
pub(crate) fn unknown(bytes: &[u8]) -> ModelError {
    let mut first_bytes = [0; 8];
    for (to, from) in first_bytes.iter_mut().zip(bytes) {
        *to = *from;
    }
    ModelError::UnknownFormat { first_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_grow_as_the_reader_asks_and_end_with_the_file() {
        let short = |need_bytes| ModelError::Truncated { need_bytes, have_bytes: 0, at_byte: 0 };
        let mut header = HeaderBytes::of(100);
        assert!(header.len() == 100 && !header.grow(&short(50)), "the whole file was read");
        let mut header = HeaderBytes::of(20 << 20);
        assert_eq!(header.len(), 2 << 20);
        assert!(!header.grow(&short(21 << 20)), "beyond the end of the file");
        assert!(!header.grow(&ModelError::Empty));
        assert!(header.grow(&short((2 << 20) + 1)) && header.len() == 4 << 20);
        assert!(header.grow(&short(15 << 20)) && header.len() == 15 << 20);
        assert!(header.grow(&short(16 << 20)) && header.len() == 20 << 20);
        assert!(!header.grow(&short(20 << 20)));
        // One length of a large file is damaged: it is believed up to a point.
        let mut header = HeaderBytes::of(100 << 30);
        assert!(header.grow(&short(100 << 20)) && header.len() == 8 << 20);
        assert!(!header.grow(&short(90 << 30)) && header.len() == 8 << 20);
    }
}
