//! What an image does once the machine is up: the options decide between generating, self-tests and a smoke boot.

use crate::platform::{power, traps};
use crate::{Machine, selftest, smoke};
use alloc::string::ToString;
use report::{ExitStatus, ImageKind, Level, Message, PROTOCOL};
use runtime::boot::{Request, Settings};
use runtime::kernels::LinkedKernel;
use runtime::options::Mode;
use runtime::platform::Platform;
use runtime::{BUILD_ID, Options};

/// Does what the command line says and switches off.
pub fn run(mut machine: Machine, image: ImageKind, linked: &[LinkedKernel]) -> ! {
    if let Some(kind) = machine.boot_facts().options.crash {
        traps::crash(kind);
    }
    let mut options = Options::default();
    // A command line that cannot be read is reported by the runtime, which reads it again.
    let mode = options.apply(machine.command_line()).map_or(Mode::Generate, |()| options.mode);
    let work: fn(&mut Machine) -> ExitStatus = match mode {
        Mode::Generate => generate_and_end(machine, image, linked),
        Mode::SelfTest => selftest::run,
        Mode::Smoke => smoke::run,
    };
    power::send(&Message::Hello { protocol: PROTOCOL, image, build_id: BUILD_ID.to_string() });
    let status = work(&mut machine);
    power::end(status)
}

fn generate_and_end(mut machine: Machine, image: ImageKind, linked: &[LinkedKernel]) -> ! {
    let text = machine.command_line().to_string();
    let request = Request { image, settings: Settings::CommandLine(&text), linked, tokenizer: None };
    for note in machine.notes().to_vec() {
        machine.print(&alloc::format!("note: {note}\n"));
    }
    // The runtime sends every message from Hello to End itself.
    power::off(runtime::run(&mut machine, request).status)
}

/// Ends a boot that cannot go on before the runtime runs.
pub fn give_up(text: &str) -> ! {
    crate::println!("\nFATAL: {text}");
    power::send(&Message::Note { level: Level::Error, text: text.to_string() });
    power::end(ExitStatus::Fatal)
}
