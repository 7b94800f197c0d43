//! Byte-addressed reading on top of sectors: what the model loader sees.

use crate::StorageError;

/// A run of bytes that can be read at any offset: a file, or a raw disk that holds one.
pub trait ByteSource {
    /// Length in bytes.
    fn len_bytes(&self) -> u64;

    /// Fills `buf` from byte `offset` on.
    ///
    /// # Errors
    /// [`StorageError::BeyondEnd`], or a device error.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), StorageError>;

    /// Reads `len_bytes` bytes from byte `offset` on once, in order, and hands consecutive chunks of any size but zero
    /// to `sink`.
    ///
    /// # Errors
    /// [`StorageError::BeyondEnd`] before anything is read, or a device error after the chunks that preceded it.
    fn stream(&mut self, offset: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), StorageError>;
}
