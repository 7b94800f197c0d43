//! Machine code that is already there: from the snapshot, or linked into a native image. Before its first use in this boot
//! all of it has to give the reference's answers.

#[cfg(not(feature = "jit"))]
use crate::error::RunError;
use crate::platform::{KernelFault, Platform};
use crate::reporter::Reporter;
#[cfg(feature = "jit")]
use crate::tune::target;
#[cfg(feature = "jit")]
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
#[cfg(feature = "jit")]
use engine::Isa;
use engine::dispatch::Kernel;
use engine::verify::{Mismatch, VerifyError};
use engine::{Engine, EngineError};
#[cfg(feature = "jit")]
use jit::audit::AuditError;
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
    /// Bytes of the code.
    pub len_bytes: usize,
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
    /// Its machine code does what no kernel may do; it was not run.
    #[cfg(feature = "jit")]
    Unsafe(AuditError),
}

#[cfg(feature = "jit")]
impl Rejected {
    /// What the snapshot's history says of it.
    pub fn outcome(&self) -> TrialOutcome {
        match self {
            Rejected::Faulted(_) => TrialOutcome::Faulted,
            Rejected::Wrong(_) | Rejected::Unusable(_) | Rejected::Unsafe(_) => TrialOutcome::Wrong,
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
            #[cfg(feature = "jit")]
            Rejected::Unsafe(error) => write!(f, "refused by the audit before it ran: {error}"),
        }
    }
}

/// `error` of a kernel whose code has `len_bytes` bytes.
fn rejected(error: VerifyError<KernelFault>, len_bytes: usize) -> Rejected {
    match error {
        VerifyError::Wrong(mismatch) => Rejected::Wrong(mismatch),
        // The platform knows where the code starts, not where it ends.
        VerifyError::Faulted(KernelFault { vector, offset }) => {
            Rejected::Faulted(KernelFault { vector, offset: offset.filter(|&at| (at as usize) < len_bytes) })
        }
        VerifyError::Engine(error) => Rejected::Unusable(error),
    }
}

/// Checks `kernel`, whose code has `len_bytes` bytes, bit for bit against the reference on random and on captured input.
///
/// # Errors
/// [`Rejected`].
pub fn verify(
    platform: &mut dyn Platform,
    engine: &mut Engine<'_>,
    slot: usize,
    kernel: Kernel,
    len_bytes: usize,
) -> Result<(), Rejected> {
    engine
        .verify(slot, kernel, &mut |kernel, args| platform.call_guarded(kernel, args))
        .map_err(|error| rejected(error, len_bytes))
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
    len_bytes: usize,
    answer_sha256: Option<[u8; 32]>,
) -> Result<(), Rejected> {
    if let Some(expected) = answer_sha256 {
        let answer = engine
            .kernel_answer(slot, kernel, &mut |kernel, args| platform.call_guarded(kernel, args))
            .map_err(|error| rejected(error, len_bytes))?;
        if digest(&answer) == expected {
            return Ok(());
        }
    }
    verify(platform, engine, slot, kernel, len_bytes)
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
///
/// # Errors
/// [`RunError::NoLinkedKernel`] when none is for this model, [`RunError::LinkedKernelsRefused`] when none of those can be used.
pub fn install_linked(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'_>,
    linked: &[LinkedKernel],
) -> Result<RunningKernels, RunError> {
    let mut running = RunningKernels::none(engine.table().len());
    let (mut matching, mut first) = (0, None);
    for LinkedKernel { variant, kernel, len_bytes, answer_sha256 } in linked {
        let key = kernel.key();
        let Some(slot) = engine.table().find(&key) else { continue };
        matching += 1;
        match check(platform, engine, slot, *kernel, *len_bytes, *answer_sha256) {
            Ok(()) if engine.table_mut().install(slot, *kernel).is_ok() => running.set(slot, *variant),
            Ok(()) => {}
            Err(rejected) => {
                let text = alloc::format!("linked kernel {key} {variant} {rejected}; not used");
                reporter.note(platform, Level::Warning, text.clone());
                first.get_or_insert(text);
            }
        }
    }
    match first {
        _ if running.count() > 0 => Ok(running),
        Some(first) => Err(RunError::LinkedKernelsRefused { matching, first }),
        None => Err(RunError::NoLinkedKernel),
    }
}

#[cfg(feature = "jit")]
/// What became of a snapshot's kernels.
pub struct Restored {
    /// Those in use.
    pub running: RunningKernels,
    /// Kernels that were left out, and stay in the snapshot, because the CPU has what they need but this boot may not use it.
    pub left_out: usize,
}

#[cfg(feature = "jit")]
/// Audits, publishes, verifies and installs the snapshot's kernels that may run with `allowed` (of what the CPU has).
/// `rebuild` compiles a kernel again whose code belongs to another build or CPU. A kernel that is refused here is
/// quarantined.
pub fn restore(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'_>,
    snapshot: &mut Snapshot,
    allowed: Isa,
    rebuild: &mut dyn FnMut(&KernelKey, &Variant) -> Result<StoredKernel, String>,
) -> Restored {
    let (allowed, cpu) = (target(allowed), target(platform.cpu().isa));
    let mut restored = Restored { running: RunningKernels::none(engine.table().len()), left_out: 0 };
    let mut lacks = None;
    for record in &mut snapshot.entries {
        let Some(slot) = engine.table().find(&record.key) else { continue };
        let Some(mut stored) = record.incumbent.clone() else { continue };
        if let Some(needs) = allowed.missing(&stored.variant)
            && cpu.missing(&stored.variant).is_none()
        {
            restored.left_out += 1;
            lacks = Some(needs);
            continue;
        }
        let rebuilt = !stored.is_intact();
        let audited = if !rebuilt {
            // Its hash proves nothing: whoever can write the disk can hash.
            jit::audit::audit(&stored.code, stored.variant.width).map(|_| ()).map_err(Rejected::Unsafe)
        } else {
            match rebuild(&record.key, &stored.variant) {
                Ok(kernel) => stored = kernel,
                Err(why) => {
                    let text = alloc::format!("{} {}: not built again: {why}", record.key, stored.variant);
                    reporter.note(platform, Level::Warning, text);
                    record.incumbent = None;
                    continue;
                }
            }
            // The compiler audits what it makes.
            Ok(())
        };
        let verified = match audited {
            Ok(()) => match platform.publish(record.key, &stored.code) {
                Ok(kernel) => {
                    check(platform, engine, slot, kernel, stored.code.len(), record.answer_sha256).map(|()| kernel)
                }
                Err(full) => {
                    reporter.note(platform, Level::Warning, alloc::format!("{}: not restored: {full}", record.key));
                    continue;
                }
            },
            Err(rejected) => Err(rejected),
        };
        match verified {
            Ok(kernel) if engine.table_mut().install(slot, kernel).is_ok() => {
                restored.running.set(slot, stored.variant);
                record.incumbent = Some(stored);
                // Answers of another build's numerics are not ours.
                if rebuilt || record.answer_sha256.is_none() {
                    record.answer_sha256 = reference_answer(engine, slot);
                }
            }
            Ok(_) => {}
            Err(rejected) => {
                let text = alloc::format!("{} {}: {rejected}; quarantined", record.key, stored.variant);
                reporter.note(platform, Level::Warning, text);
                record.quarantined.push(stored.variant);
                record.incumbent = None;
            }
        }
    }
    if let Some(needs) = lacks {
        let text = alloc::format!(
            "{} kernels of the snapshot are left out: they need {needs}, which isa= rules out; this boot changes nothing in the snapshot (use one of its own to tune with this limit)",
            restored.left_out
        );
        reporter.note(platform, Level::Warning, text);
    }
    restored
}
