//! What an image does once the machine is up: the options decide between generating, self-tests and a smoke boot.

use crate::Machine;
use crate::platform::{power, traps};
#[cfg(feature = "jit")]
use crate::{selftest, smoke};
use alloc::boxed::Box;
use alloc::string::ToString;
use report::{ExitStatus, ImageKind, Level, Message};
use runtime::boot::{Request, Settings, read_options};
use runtime::kernels::Linked;
use runtime::load::Companions;
use runtime::options::Mode;
use runtime::platform::Platform;

/// Does what the settings say and switches off.
pub fn run(mut machine: Machine, image: ImageKind, linked: Linked<'_>) -> ! {
    if let Some(kind) = machine.boot_facts().options.crash {
        traps::crash(kind);
    }
    let text = machine.command_line().to_string();
    let settings = match read_options(&mut machine, &text) {
        Ok(options) => {
            #[cfg(not(feature = "jit"))]
            if options.mode != Mode::Generate {
                give_up("a native image only generates: mode=selftest and mode=smoke are the JIT image's");
            }
            #[cfg(feature = "jit")]
            match options.mode {
                Mode::Generate => {}
                Mode::SelfTest => examine(&mut machine, image, selftest::run),
                Mode::Smoke => examine(&mut machine, image, smoke::run),
            }
            Settings::Given(Box::new(options))
        }
        // The runtime reads them again and says what is wrong with them.
        Err(_) => Settings::CommandLine(&text),
    };
    for note in machine.notes().to_vec() {
        machine.print(&alloc::format!("note: {note}\n"));
    }
    // The runtime sends every message from Hello to End itself.
    power::off(
        runtime::run(&mut machine, Request { image, settings, linked, companions: Companions::default() }).status,
    )
}

/// A boot that looks at the machine instead of running a model.
#[cfg(feature = "jit")]
fn examine(machine: &mut Machine, image: ImageKind, work: fn(&mut Machine) -> ExitStatus) -> ! {
    let build_id = runtime::BUILD_ID.to_string();
    power::send(&Message::Hello { protocol: report::PROTOCOL, image, build_id });
    let status = work(machine);
    power::end(status)
}

/// Ends a boot that cannot go on before the runtime runs.
pub fn give_up(text: &str) -> ! {
    crate::println!("\nFATAL: {text}");
    power::send(&Message::Note { level: Level::Error, text: text.to_string() });
    power::end(ExitStatus::Fatal)
}
