//! Wall clock from the CMOS real-time clock, read as UTC.

use super::port;

fn register(index: u8) -> u8 {
    // SAFETY: selects and reads a CMOS register; bit 7 clear leaves NMIs on.
    unsafe {
        port::write_u8(0x70, index);
        port::read_u8(0x71)
    }
}

/// The registers of one reading: second, minute, hour, day, month, year.
fn reading() -> [u8; 6] {
    [0, 2, 4, 7, 8, 9].map(register)
}

/// Seconds since 1970; `None` without a plausible clock.
///
/// # Source
/// Motorola MC146818 data sheet: update flag, BCD and 12-hour formats.
pub fn unix_time() -> Option<u64> {
    // A reading is good when no update was under way and a second one equals it.
    let mut previous = None;
    for _ in 0..100_000 {
        if register(0x0a) & 0x80 != 0 {
            continue;
        }
        let now = reading();
        if previous == Some(now) {
            return to_unix(now, register(0x0b));
        }
        previous = Some(now);
    }
    None
}

fn to_unix(raw: [u8; 6], status_b: u8) -> Option<u64> {
    let binary = status_b & 4 != 0;
    let number = |value: u8| u64::from(if binary { value } else { (value >> 4) * 10 + (value & 15) });
    let [second, minute, hour, day, month, year] = raw;
    let mut hours = number(hour & 0x7f);
    if status_b & 2 == 0 {
        hours = hours % 12 + if hour & 0x80 != 0 { 12 } else { 0 };
    }
    let (second, minute, day, month) = (number(second), number(minute), number(day), number(month));
    if second > 60 || minute > 59 || hours > 23 || !(1..=31).contains(&day) || !(1..=12).contains(&month) {
        return None;
    }
    // The century register is at different places on different machines; this code is younger than 2000.
    let year = 2000 + number(year);
    // Days since 1970-01-01, counted in years that start in March so that the leap day comes last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(days * 86_400 + hours * 3_600 + minute * 60 + second)
}
