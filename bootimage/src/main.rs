//! Builds bootable FAT16 disk images without root.
fn main() {}
