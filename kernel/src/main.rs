//! The image: boot, read the options, do what they say, switch off.
#![no_std]
#![no_main]

extern crate alloc;

use kernel::Machine;
use kernel::platform::power;
use kernel::{selftest, smoke};

/// Called by `kernel::boot::early` once the machine is sealed.
#[unsafe(no_mangle)]
fn bareflow_main(mut machine: Machine) -> ! {
    let status = match mode(machine.command_line()) {
        Some("selftest") => selftest::run(&mut machine),
        _ => smoke::run(&mut machine),
    };
    power::end(status)
}

fn mode(options: &str) -> Option<&str> {
    options.split_whitespace().rev().find_map(|word| word.strip_prefix("mode="))
}
