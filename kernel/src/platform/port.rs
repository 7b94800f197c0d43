//! Port I/O from ring 3. The TSS bitmap lists the ports that may be used; any other raises #GP.

use core::arch::asm;
use x86_64::instructions::port::{PortReadOnly, PortWriteOnly};

/// Reads a byte.
///
/// # Safety
/// Reading `port` must have no effect on memory.
pub unsafe fn read_u8(port: u16) -> u8 {
    // SAFETY: the caller knows the device behind the port.
    unsafe { PortReadOnly::new(port).read() }
}

/// Reads a double word.
///
/// # Safety
/// As [`read_u8`].
pub unsafe fn read_u32(port: u16) -> u32 {
    // SAFETY: the caller knows the device behind the port.
    unsafe { PortReadOnly::new(port).read() }
}

/// Writes a byte.
///
/// # Safety
/// The write must not make a device change memory that Rust owns.
pub unsafe fn write_u8(port: u16, value: u8) {
    // SAFETY: the caller knows the device behind the port.
    unsafe { PortWriteOnly::new(port).write(value) }
}

/// Writes a word.
///
/// # Safety
/// As [`write_u8`].
pub unsafe fn write_u16(port: u16, value: u16) {
    // SAFETY: the caller knows the device behind the port.
    unsafe { PortWriteOnly::new(port).write(value) }
}

/// Writes a double word.
///
/// # Safety
/// As [`write_u8`].
pub unsafe fn write_u32(port: u16, value: u32) {
    // SAFETY: the caller knows the device behind the port.
    unsafe { PortWriteOnly::new(port).write(value) }
}

/// Writes every byte of `bytes` to `port`, in order.
///
/// # Safety
/// As [`write_u8`].
pub unsafe fn write_all(port: u16, bytes: &[u8]) {
    // The crate has no string form, and every single `out` is an exit to the hypervisor.
    // SAFETY: `rep outsb` reads exactly `bytes`; the caller knows the device behind the port.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            options(nostack, preserves_flags, readonly)
        );
    }
}
