//! A bounded reader over the beginning of a file: every length is checked before anything is sliced or allocated.

use crate::error::ModelError;

/// Position in a header slice. `bytes` is the beginning of a file of `file_bytes`.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
    file_bytes: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8], file_bytes: u64) -> Self {
        let within = usize::try_from(file_bytes).unwrap_or(usize::MAX).min(bytes.len());
        Cursor { bytes: bytes.get(..within).unwrap_or(bytes), pos: 0, file_bytes }
    }

    /// Bytes consumed so far.
    pub(crate) fn pos(&self) -> u64 {
        self.pos as u64
    }

    /// Consumes `len` bytes.
    ///
    /// # Errors
    /// [`ModelError::FileEnds`] when the file is too short for them, [`ModelError::Truncated`] when only the slice is.
    pub(crate) fn take(&mut self, len: u64, what: &'static str) -> Result<&'a [u8], ModelError> {
        self.require(len, what)?;
        // `require` proved that `pos + len` lies inside `bytes`.
        let end = self.pos + len as usize;
        let taken = self.bytes.get(self.pos..end).unwrap_or_default();
        self.pos = end;
        Ok(taken)
    }

    /// Checks that `len` more bytes are present without consuming them.
    pub(crate) fn require(&self, len: u64, what: &'static str) -> Result<(), ModelError> {
        let at_byte = self.pos as u64;
        let need_bytes = at_byte.saturating_add(len);
        if need_bytes <= self.bytes.len() as u64 {
            Ok(())
        } else if need_bytes > self.file_bytes {
            Err(ModelError::FileEnds { what, at_byte, need_bytes, file_bytes: self.file_bytes })
        } else {
            Err(ModelError::Truncated { need_bytes, have_bytes: self.bytes.len() as u64, at_byte })
        }
    }

    /// Consumes `N` bytes as an array.
    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ModelError> {
        // `take` gave exactly `N` bytes.
        Ok(self.take(N as u64, what)?.first_chunk().copied().unwrap_or([0; N]))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Consumes a GGUF string: `u64` length, then bytes.
    pub(crate) fn string_bytes(&mut self, what: &'static str) -> Result<&'a [u8], ModelError> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// A GGUF string that must be UTF-8.
    pub(crate) fn str(&mut self, what: &'static str) -> Result<&'a str, ModelError> {
        let at_byte = self.pos();
        core::str::from_utf8(self.string_bytes(what)?).map_err(|_| ModelError::NotUtf8 { what, at_byte })
    }
}
