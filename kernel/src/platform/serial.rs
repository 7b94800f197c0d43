//! The two 16550 serial ports: COM1 for people, COM2 for typed frames ([`report::wire`]).
//!
//! Polled. The transmit FIFO takes 16 bytes at once, so the line status is read once for 16 bytes; under a hypervisor
//! every port access is an exit, and the usual loop has two for each byte.

use super::port;
use core::fmt;
use spin::Mutex;

/// Bytes the transmit FIFO holds.
const FIFO_BYTES: usize = 16;
/// Polls of the line status before a port is given up: nobody drains it.
const PATIENCE: u32 = 1 << 22;

/// A serial port.
pub struct Serial {
    base: u16,
    present: bool,
}

/// COM1: text.
pub static COM1: Mutex<Serial> = Mutex::new(Serial { base: 0x3f8, present: false });
/// COM2: frames.
pub static COM2: Mutex<Serial> = Mutex::new(Serial { base: 0x2f8, present: false });

/// First and last port of each serial line, for the port allow-list.
pub const PORTS: [(u16, u16); 2] = [(0x3f8, 0x3ff), (0x2f8, 0x2ff)];

/// Sets both ports to 115200 baud, 8N1, FIFOs on. A port that is not there stays silent.
pub fn init() {
    COM1.lock().init();
    COM2.lock().init();
}

impl Serial {
    fn init(&mut self) {
        // SAFETY: the registers of a 16550 at a legacy address; without the device, writes go nowhere.
        unsafe {
            port::write_u8(self.base + 7, 0x5a); // scratch register: reads back only if the chip exists
            self.present = port::read_u8(self.base + 7) == 0x5a;
            port::write_u8(self.base + 1, 0); // no interrupts
            port::write_u8(self.base + 3, 0x80); // divisor latch
            port::write_u8(self.base, 1); // 115200 baud
            port::write_u8(self.base + 1, 0);
            port::write_u8(self.base + 3, 0x03); // 8N1
            port::write_u8(self.base + 2, 0xc7); // FIFOs on and empty
            port::write_u8(self.base + 4, 0x0b); // DTR, RTS, OUT2
        }
    }

    /// True when the chip answered.
    pub fn present(&self) -> bool {
        self.present
    }

    /// Sends `bytes` as they are.
    pub fn write_bytes(&mut self, bytes: &[u8]) {
        if !self.present {
            return;
        }
        for chunk in bytes.chunks(FIFO_BYTES) {
            let mut polls = 0;
            // SAFETY: the line status register; reading it clears error flags nobody looks at.
            while unsafe { port::read_u8(self.base + 5) } & 0x20 == 0 {
                polls += 1;
                if polls == PATIENCE {
                    self.present = false;
                    return;
                }
                core::hint::spin_loop();
            }
            // SAFETY: the transmit register; the FIFO is empty and takes a chunk.
            unsafe { port::write_all(self.base, chunk) };
        }
    }
}

/// Text for people: each line ends with a carriage return, too.
impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (index, line) in text.split('\n').enumerate() {
            if index > 0 {
                self.write_bytes(b"\r\n");
            }
            self.write_bytes(line.as_bytes());
        }
        Ok(())
    }
}

/// Opens the locks of both ports: for the fault reporter, which may have interrupted their holder.
///
/// # Safety
/// The holder must never run again.
pub unsafe fn break_locks() {
    // SAFETY: the caller promises that no holder goes on.
    unsafe {
        COM1.force_unlock();
        COM2.force_unlock();
    }
}

/// Writes formatted text to COM1.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::platform::serial::COM1.lock(), $($arg)*);
    }};
}

/// Writes formatted text and a line end to COM1.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => { $crate::print!("{}\n", format_args!($($arg)*)) };
}
