//! How a boot ends: the last message, then the machine off.

use super::{memory, port, serial};
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use report::{ExitStatus, Message};

/// isa-debug-exit, as `qemu-runs` configures it.
const DEBUG_EXIT: u16 = 0xf4;
/// ACPI SLP_EN with QEMU's sleep type for S5.
const SOFT_OFF: u16 = 0x2000;

static FRAMES: AtomicU32 = AtomicU32::new(0);
static GOING_DOWN: AtomicBool = AtomicBool::new(false);
static PM1_CONTROL: AtomicU16 = AtomicU16::new(0);

/// Notes the ACPI port that switches the machine off.
pub fn set_pm1_control(port: Option<u16>) {
    PM1_CONTROL.store(port.unwrap_or(0), Ordering::Relaxed);
}

/// Sends one encoded frame on COM2.
pub fn send_frame(frame: &[u8]) {
    FRAMES.fetch_add(1, Ordering::Relaxed);
    serial::COM2.lock().write_bytes(frame);
}

/// Encodes and sends one message.
pub fn send(message: &Message) {
    send_frame(&report::wire::encode(message));
}

/// Marks the machine as failing: from here on one core runs, on emergency memory, and no lock is waited for. Returns
/// false when that was so already.
pub fn going_down() -> bool {
    if GOING_DOWN.swap(true, Ordering::SeqCst) {
        return false;
    }
    memory::enter_emergency();
    // SAFETY: whoever held a port was interrupted by what brings the machine down, or belongs to another core, whose
    // output may then mix with the last lines.
    unsafe { serial::break_locks() };
    // Ends a frame that was cut off, so that the host finds the next one.
    serial::COM2.lock().write_bytes(&[0]);
    true
}

/// Sends the End message and switches off.
pub fn end(status: ExitStatus) -> ! {
    send(&Message::End { status, messages: FRAMES.load(Ordering::Relaxed) });
    off(status)
}

/// Switches the machine off with `status` as QEMU's exit code where the debug-exit device exists, else through ACPI.
pub fn off(status: ExitStatus) -> ! {
    // SAFETY: the port belongs to the debug-exit device or to nothing.
    unsafe { port::write_u8(DEBUG_EXIT, status.debug_exit_value()) };
    let pm1 = PM1_CONTROL.load(Ordering::Relaxed);
    if pm1 != 0 {
        // SAFETY: PM1a control as ACPI names it; the machine goes off.
        unsafe { port::write_u16(pm1, SOFT_OFF) };
    }
    loop {
        core::hint::spin_loop();
    }
}
