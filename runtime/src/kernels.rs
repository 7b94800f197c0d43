//! Machine code that is already there: from the snapshot, or linked into a native image. Before its first use in this boot
//! all of it has to give the reference's answers.

#[cfg(not(feature = "jit"))]
use crate::error::RunError;
#[cfg(feature = "jit")]
use crate::platform::OutOfMemory;
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
use jit::audit::AuditError;
use model::Isa;
#[cfg(feature = "jit")]
use model::kernel::KernelKey;
use model::kernel::Variant;
use report::Level;
use sha2::{Digest, Sha256};
use snapshot_format::frozen::FrozenModel;
#[cfg(feature = "jit")]
use snapshot_format::{KeyRecord, Snapshot, StoredKernel, TrialOutcome};
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

/// What was linked into the image besides code; nothing in one with a compiler.
#[derive(Clone, Copy, Default, Debug)]
pub struct Linked<'a> {
    /// The model the kernels converged with.
    pub model: FrozenModel,
    /// The kernels.
    pub kernels: &'a [LinkedKernel],
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
            Rejected::Unusable(error) => write!(f, "cannot be used: {error}"),
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
/// the reference itself decides. That is against damage and mistakes: whoever can write the kernel can write the hash.
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
/// Verifies and installs the kernels linked into a native image that may run with `allowed`; returns those in use.
///
/// # Errors
/// [`RunError::NoLinkedKernel`] when none is for this model, [`RunError::LinkedKernelsRefused`] when none of those can be used.
pub fn install_linked(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'_>,
    linked: &[LinkedKernel],
    allowed: Isa,
) -> Result<RunningKernels, RunError> {
    let mut running = RunningKernels::none(engine.table().len());
    let (mut matching, mut first) = (0, None);
    for LinkedKernel { variant, kernel, len_bytes, answer_sha256 } in linked {
        let key = kernel.key();
        let Some(slot) = engine.table().find(&key) else { continue };
        matching += 1;
        let refused = match allowed.missing(variant) {
            Some(needs) => Some(alloc::format!("needs {needs}, which the CPU lacks or isa= rules out")),
            None => check(platform, engine, slot, *kernel, *len_bytes, *answer_sha256)
                .and_then(|()| engine.table_mut().install(slot, *kernel).map_err(Rejected::Unusable))
                .err()
                .map(|why| alloc::format!("{why}")),
        };
        if let Some(why) = refused {
            let text = alloc::format!("linked kernel {key} {variant} {why}; not used");
            reporter.note(platform, Level::Warning, text.clone());
            first.get_or_insert(text);
        } else {
            running.set(slot, *variant);
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
    /// Kernels that are in the snapshot no more: what was searched for them starts over.
    pub lost: u32,
}

#[cfg(feature = "jit")]
/// Why a kernel of the snapshot does not run in this boot.
enum LeftOut {
    /// Its code was for another build or CPU, or damaged, and cannot be made again: the variant is forgotten.
    NotBuilt(String),
    /// The code arena is full: it stays in the snapshot.
    NoRoom(OutOfMemory),
    /// It is quarantined.
    Refused(Rejected),
}

#[cfg(feature = "jit")]
impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOut::NotBuilt(why) => write!(f, "not built again: {why}"),
            LeftOut::NoRoom(full) => write!(f, "not restored: {full}"),
            LeftOut::Refused(rejected) => write!(f, "{rejected}; quarantined"),
        }
    }
}

#[cfg(feature = "jit")]
/// Compiles a kernel again whose code cannot be used.
pub type Rebuild<'f> = dyn FnMut(&KernelKey, &Variant) -> Result<StoredKernel, String> + 'f;

#[cfg(feature = "jit")]
/// Restores the snapshot's kernels that may run with `allowed` (of what the CPU has), and notes in the snapshot what
/// became of the others.
pub fn restore(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'_>,
    snapshot: &mut Snapshot,
    allowed: Isa,
    rebuild: &mut Rebuild<'_>,
) -> Restored {
    let cpu = platform.cpu().isa;
    let mut restored = Restored { running: RunningKernels::none(engine.table().len()), left_out: 0, lost: 0 };
    let mut lacks = None;
    for record in &mut snapshot.entries {
        let Some(slot) = engine.table().find(&record.key) else { continue };
        let Some(variant) = record.incumbent.as_ref().map(|stored| stored.variant) else { continue };
        if let Some(needs) = allowed.missing(&variant)
            && cpu.missing(&variant).is_none()
        {
            restored.left_out += 1;
            lacks = Some(needs);
            continue;
        }
        let Err(why) = restore_one(platform, engine, slot, record, rebuild) else {
            restored.running.set(slot, variant);
            continue;
        };
        reporter.note(platform, Level::Warning, alloc::format!("{} {variant}: {why}", record.key));
        match why {
            LeftOut::NoRoom(_) => {}
            LeftOut::NotBuilt(_) => {
                record.drop_incumbent();
                restored.lost += 1;
            }
            LeftOut::Refused(_) => {
                record.quarantined.push(variant);
                record.drop_incumbent();
                restored.lost += 1;
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

#[cfg(feature = "jit")]
/// Audits, publishes, checks and installs the kernel of `record`, built again where its code is not intact.
fn restore_one(
    platform: &mut dyn Platform,
    engine: &mut Engine<'_>,
    slot: usize,
    record: &mut KeyRecord,
    rebuild: &mut Rebuild<'_>,
) -> Result<(), LeftOut> {
    let Some(stored) = &mut record.incumbent else { return Ok(()) };
    if stored.is_intact() {
        // Its hash proves nothing: whoever can write the disk can hash.
        let audit = jit::audit::audit(&stored.code, stored.variant.width);
        audit.map_err(|error| LeftOut::Refused(Rejected::Unsafe(error)))?;
    } else {
        // The compiler audits what it makes.
        *stored = rebuild(&record.key, &stored.variant).map_err(LeftOut::NotBuilt)?;
    }
    let kernel = platform.publish(record.key, &stored.code).map_err(LeftOut::NoRoom)?;
    check(platform, engine, slot, kernel, stored.code.len(), record.answer_sha256).map_err(LeftOut::Refused)?;
    engine.table_mut().install(slot, kernel).map_err(|error| LeftOut::Refused(Rejected::Unusable(error)))?;
    if record.answer_sha256.is_none() {
        record.answer_sha256 = reference_answer(engine, slot);
    }
    Ok(())
}
