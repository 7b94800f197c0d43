//! Which accelerator works here: decided by booting our own kernel with `mode=smoke`, not by looking at device files.
//!
//! `/dev/kvm` can exist and be of a kind, or nested in a way, under which a guest does not get far; only a boot tells.

use crate::machine::{Accel, Machine, Qemu};
use crate::session::{BootError, Deadlines, Session};
use crate::transcript::BootFailure;
use report::ExitStatus;
use std::path::Path;
use std::time::{Duration, Instant};

/// What the user asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum AccelChoice {
    /// KVM if it boots our kernel, else TCG.
    Auto,
    /// KVM.
    Kvm,
    /// TCG.
    Tcg,
}

/// How one accelerator did.
#[derive(Clone, PartialEq, Debug)]
pub struct Attempt {
    /// Which.
    pub accel: Accel,
    /// Seconds the smoke boot took, or why it failed.
    pub outcome: Result<f64, String>,
}

/// The accelerator to use, and why.
#[derive(Clone, PartialEq, Debug)]
pub struct Probe {
    /// The one to use.
    pub accel: Accel,
    /// What was tried, in order; empty when the user chose.
    pub attempts: Vec<Attempt>,
}

/// No accelerator works.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error("no accelerator boots the kernel:\n{}{}", list(attempts), advice(attempts))]
pub struct ProbeError {
    /// What was tried.
    pub attempts: Vec<Attempt>,
}

fn list(attempts: &[Attempt]) -> String {
    let line = |a: &Attempt| match &a.outcome {
        Ok(seconds) => format!("  {}: smoke boot passed in {seconds:.1} s", a.accel),
        Err(why) => format!("  {}: {why}", a.accel),
    };
    attempts.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// What is left to try.
fn advice(attempts: &[Attempt]) -> &'static str {
    match attempts {
        [Attempt { accel: Accel::Kvm, .. }] => "\nuse --accel tcg: software emulation, whose times mean nothing",
        _ => "",
    }
}

impl Probe {
    /// One line for people: what is used and why.
    pub fn reason(&self) -> String {
        match self.attempts.as_slice() {
            [] => format!("{} was asked for", self.accel),
            attempts => {
                let one_line = list(attempts).lines().map(str::trim).collect::<Vec<_>>().join("; ");
                format!("{} ({one_line})", self.accel)
            }
        }
    }

    /// Each attempt on a line of its own.
    pub fn details(&self) -> String {
        list(&self.attempts)
    }
}

/// Longest smoke boot under KVM; a working one takes about a second, on a busy host or with large firmware many.
pub const KVM_SMOKE_LIMIT: Duration = Duration::from_secs(60);
/// Longest smoke boot under KVM through the whole SeaBIOS that still promises a usable disk boot: where ring 0 is emulated,
/// firmware alone takes longer, and a boot loader minutes.
pub const KVM_DISK_SMOKE_LIMIT: Duration = Duration::from_secs(10);
/// Longest smoke boot under TCG.
pub const TCG_SMOKE_LIMIT: Duration = Duration::from_secs(120);

/// Decides by smoke boots of `kernel` in machines of `memory_mib` and `cpus`; KVM gets `kvm_limit`, such as
/// [`KVM_SMOKE_LIMIT`].
///
/// # Errors
/// [`ProbeError`] with every attempt when nothing boots.
pub fn probe(
    qemu: &Qemu,
    kernel: &Path,
    choice: AccelChoice,
    memory_mib: u32,
    cpus: u32,
    kvm_limit: Duration,
) -> Result<Probe, ProbeError> {
    let candidates = match choice {
        AccelChoice::Auto => vec![Accel::Kvm, Accel::Tcg],
        AccelChoice::Kvm => vec![Accel::Kvm],
        AccelChoice::Tcg => vec![Accel::Tcg],
    };
    let mut attempts = Vec::new();
    for accel in candidates {
        let limit = if accel == Accel::Kvm { kvm_limit } else { TCG_SMOKE_LIMIT };
        let machine = Machine { memory_mib, cpus, ..Machine::with_kernel(accel, kernel, "mode=smoke") };
        let outcome = smoke(qemu, &machine, limit);
        let works = outcome.is_ok();
        attempts.push(Attempt { accel, outcome });
        if works {
            return Ok(Probe { accel, attempts });
        }
    }
    Err(ProbeError { attempts })
}

fn smoke(qemu: &Qemu, machine: &Machine, limit: Duration) -> Result<f64, String> {
    if machine.accel == Accel::Kvm {
        let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
        device.map_err(|e| format!("/dev/kvm cannot be opened: {e}"))?;
    }
    let start = Instant::now();
    let boot = Session::start(qemu, machine, None)
        .and_then(|session| session.run(Deadlines { boot: limit, silence: limit }, &mut |_| {}));
    match boot {
        Ok(_) => {}
        // A guest that gets as far as refusing the work in order runs here. A native image refuses any smoke boot.
        Err(BootError { failure: BootFailure::Guest { status, .. }, transcript, .. })
            if transcript.end.is_some() && !matches!(status, ExitStatus::Panic | ExitStatus::TestFailed) => {}
        Err(error) => return Err(format!("smoke boot failed: {}", error.failure)),
    }
    Ok(start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kvm_the_other_accelerator_is_named() {
        let failed = |accel| Attempt { accel, outcome: Err("/dev/kvm cannot be opened: not found".into()) };
        let only_kvm = ProbeError { attempts: vec![failed(Accel::Kvm)] }.to_string();
        assert!(only_kvm.contains("/dev/kvm") && only_kvm.contains("--accel tcg"), "{only_kvm}");
        let neither = ProbeError { attempts: vec![failed(Accel::Kvm), failed(Accel::Tcg)] }.to_string();
        assert!(!neither.contains("--accel"), "nothing else is left: {neither}");
    }
}
