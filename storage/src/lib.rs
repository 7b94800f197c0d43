//! MBR and FAT16 volumes over a block device: find files, read extents, write in place.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
