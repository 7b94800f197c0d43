//! Machine code that is already there: from the snapshot, or linked into a native image. Before its first use in this boot
//! all of it has to give the reference's answers.

use crate::platform::{KernelFault, Platform};
use crate::reporter::Reporter;
#[cfg(feature = "jit")]
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use engine::dispatch::Kernel;
use engine::verify::{Mismatch, VerifyError};
use engine::{Engine, EngineError};
#[cfg(feature = "jit")]
use model::kernel::KernelKey;
use model::kernel::Variant;
use report::Level;
use sha2::{Digest, Sha256};
#[cfg(feature = "jit")]
use snapshot_format::{Snapshot, StoredKernel, TrialOutcome};
use zerocopy::IntoBytes;

/// A kernel that was linked into the image.
#[derive(Clone, Copy, Debug)]
pub struct LinkedKernel {
    /// How it was built.
    pub variant: Variant,
    /// The code.
    pub kernel: Kernel,
    /// SHA-256 of the answer it has to give, see [`check`].
    pub answer_sha256: Option<[u8; 32]>,
}

/// Which variant runs in each slot.
#[derive(Clone)]
pub struct RunningKernels(Vec<Option<Variant>>);

impl RunningKernels {
    /// Nothing compiled runs yet.
    pub fn none(slots: usize) -> Self {
        Self(vec![None; slots])
    }

    /// Variant in `slot`; `None` while the engine's own op runs there.
    pub fn variant(&self, slot: usize) -> Option<Variant> {
        self.0.get(slot).copied().flatten()
    }

    /// Notes what was installed.
    pub fn set(&mut self, slot: usize, variant: Variant) {
        if let Some(entry) = self.0.get_mut(slot) {
            *entry = Some(variant);
        }
    }

    /// Compiled kernels in use.
    pub fn count(&self) -> usize {
        self.0.iter().flatten().count()
    }
}

/// Why a kernel may not be used.
#[derive(Clone, Debug)]
pub enum Rejected {
    /// It raised a CPU exception.
    Faulted(KernelFault),
    /// Its output differs from the reference.
    Wrong(Mismatch),
    /// It is not for this model.
    Unusable(EngineError),
}

#[cfg(feature = "jit")]
impl Rejected {
    /// What the snapshot's history says of it.
    pub fn outcome(&self) -> TrialOutcome {
        match self {
            Rejected::Faulted(_) => TrialOutcome::Faulted,
            Rejected::Wrong(_) | Rejected::Unusable(_) => TrialOutcome::Wrong,
        }
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejected::Faulted(KernelFault { vector, offset: Some(offset) }) => {
                write!(f, "raised CPU exception {vector} at byte {offset} of its code")
            }
            Rejected::Faulted(KernelFault { vector, offset: None }) => {
                write!(f, "raised CPU exception {vector} outside its code")
            }
            Rejected::Wrong(mismatch) => write!(f, "differs from the reference: {mismatch}"),
            Rejected::Unusable(error) => write!(f, "{error}"),
        }
    }
}

impl From<VerifyError<KernelFault>> for Rejected {
    fn from(error: VerifyError<KernelFault>) -> Self {
        match error {
            VerifyError::Wrong(mismatch) => Rejected::Wrong(mismatch),
            VerifyError::Faulted(fault) => Rejected::Faulted(fault),
            VerifyError::Engine(error) => Rejected::Unusable(error),
        }
    }
}

/// Checks `kernel` bit for bit against the reference on random and on captured input.
///
/// # Errors
/// [`Rejected`].
pub fn verify(
    platform: &mut dyn Platform,
    engine: &mut Engine<'_>,
    slot: usize,
    kernel: Kernel,
) -> Result<(), Rejected> {
    Ok(engine.verify(slot, kernel, &mut |kernel, args| platform.call_guarded(kernel, args))?)
}

/// Checks a kernel that was verified before it was stored: it has to give the reference's answer of then, whose SHA-256 is
/// `answer_sha256`. Where there is none, or the kernel gives another (one of the two is damaged, or the weights are others),
/// the reference itself decides.
///
/// # Errors
/// [`Rejected`].
fn check(
    platform: &mut dyn Platform,
    engine: &mut Engine<'_>,
    slot: usize,
    kernel: Kernel,
    answer_sha256: Option<[u8; 32]>,
) -> Result<(), Rejected> {
    if let Some(expected) = answer_sha256 {
        let answer = engine.kernel_answer(slot, kernel, &mut |kernel, args| platform.call_guarded(kernel, args))?;
        if digest(&answer) == expected {
            return Ok(());
        }
    }
    verify(platform, engine, slot, kernel)
}

/// SHA-256 of the reference's answer for `slot`; `None` when there is no such slot.
#[cfg(feature = "jit")]
pub fn reference_answer(engine: &Engine<'_>, slot: usize) -> Option<[u8; 32]> {
    engine.reference_answer(slot).ok().map(|answer| digest(&answer))
}

fn digest(output: &[f32]) -> [u8; 32] {
    Sha256::digest(output.as_bytes()).into()
}

#[cfg(not(feature = "jit"))]
/// Verifies and installs the kernels linked into a native image; returns those in use.
pub fn install_linked(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'_>,
    linked: &[LinkedKernel],
) -> RunningKernels {
    let mut running = RunningKernels::none(engine.table().len());
    for LinkedKernel { variant, kernel, answer_sha256 } in linked {
        let key = kernel.key();
        let Some(slot) = engine.table().find(&key) else { continue };
        match check(platform, engine, slot, *kernel, *answer_sha256) {
            Ok(()) if engine.table_mut().install(slot, *kernel).is_ok() => running.set(slot, *variant),
            Ok(()) => {}
            Err(rejected) => {
                let text = alloc::format!("linked kernel {key} {variant} {rejected}; not used");
                reporter.note(platform, Level::Warning, text);
            }
        }
    }
    running
}

#[cfg(feature = "jit")]
/// Publishes, verifies and installs the snapshot's kernels; returns those in use. `rebuild` compiles a kernel again whose
/// code belongs to another build or CPU. A kernel that is refused here is quarantined.
pub fn restore(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'_>,
    snapshot: &mut Snapshot,
    rebuild: &mut dyn FnMut(&KernelKey, &Variant) -> Result<StoredKernel, String>,
) -> RunningKernels {
    let mut running = RunningKernels::none(engine.table().len());
    for record in &mut snapshot.entries {
        let Some(slot) = engine.table().find(&record.key) else { continue };
        let Some(mut stored) = record.incumbent.clone() else { continue };
        let rebuilt = !stored.is_intact();
        if rebuilt {
            match rebuild(&record.key, &stored.variant) {
                Ok(kernel) => stored = kernel,
                Err(why) => {
                    let text = alloc::format!("{} {}: not built again: {why}", record.key, stored.variant);
                    reporter.note(platform, Level::Warning, text);
                    record.incumbent = None;
                    continue;
                }
            }
        }
        let kernel = match platform.publish(record.key, &stored.code) {
            Ok(kernel) => kernel,
            Err(full) => {
                reporter.note(platform, Level::Warning, alloc::format!("{}: not restored: {full}", record.key));
                continue;
            }
        };
        match check(platform, engine, slot, kernel, record.answer_sha256) {
            Ok(()) if engine.table_mut().install(slot, kernel).is_ok() => {
                running.set(slot, stored.variant);
                record.incumbent = Some(stored);
                // Answers of another build's numerics are not ours.
                if rebuilt || record.answer_sha256.is_none() {
                    record.answer_sha256 = reference_answer(engine, slot);
                }
            }
            Ok(()) => {}
            Err(rejected) => {
                let text = alloc::format!("{} {}: {rejected}; quarantined", record.key, stored.variant);
                reporter.note(platform, Level::Warning, text);
                record.quarantined.push(stored.variant);
                record.incumbent = None;
            }
        }
    }
    running
}
