//! The kernel table: one slot per [`KernelKey`], what runs there, and what it cost.
//!
//! A slot's statistics count ops: for an op that is cut into slices of one key for several workers, one sample is
//! the longest time a worker spent in a slice of that key. Bytes and operations per sample are then those of the key
//! times [`KernelTable::slices`].

use crate::dispatch::{ColumnsMut, Kernel, MAX_PARTS, SharedColumns};
use crate::error::EngineError;
use crate::ops;
use crate::simd::{Level, cycles};
use crate::weights::Matrix;
use crate::workers::Workers;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use model::kernel::KernelKey;
use profiler::Profile;

/// What computes a slot.
#[derive(Clone, Copy, Debug)]
pub enum Runs {
    /// The portable reference.
    Reference,
    /// The hand-written op.
    Baseline,
    /// A compiled kernel.
    Compiled(Kernel),
}

/// Which of this crate's own ops run in slots without a compiled kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tier {
    /// The reference.
    Reference,
    /// The hand-written ops.
    Baseline,
}

/// One slot.
#[derive(Clone, Debug)]
struct Entry {
    key: KernelKey,
    kernel: Option<Kernel>,
    /// Slices of this key in one op.
    slices: usize,
}

/// Cycles of one worker's slice, on a cache line of its own.
#[repr(align(64))]
#[derive(Default, Debug)]
struct SliceCycles(AtomicU64);

/// The kernel table.
#[derive(Debug)]
pub struct KernelTable {
    entries: Vec<Entry>,
    profile: Profile,
    level: Level,
    tier: Tier,
    slice_cycles: Box<[SliceCycles]>,
}

impl KernelTable {
    /// A table whose slots run this crate's own ops.
    pub(crate) fn new(level: Level, tier: Tier) -> Self {
        let slice_cycles = (0..MAX_PARTS).map(|_| SliceCycles::default()).collect();
        Self { entries: Vec::new(), profile: Profile::default(), level, tier, slice_cycles }
    }

    /// The slot of `key`, which is added if it is new; `slices` of it make up one op.
    pub(crate) fn slot_for(&mut self, key: KernelKey, slices: usize) -> usize {
        match self.entries.iter().position(|entry| entry.key == key) {
            Some(slot) => {
                self.entries[slot].slices = self.entries[slot].slices.max(slices);
                slot
            }
            None => {
                self.entries.push(Entry { key, kernel: None, slices });
                self.profile.add(key)
            }
        }
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when there are no slots.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Key of a slot; `None` when there is no such slot.
    pub fn key(&self, slot: usize) -> Option<KernelKey> {
        self.entries.get(slot).map(|entry| entry.key)
    }

    /// Slot of a key; `None` when the model has no such op.
    pub fn find(&self, key: &KernelKey) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key == *key)
    }

    /// Slices of the slot's key that workers compute side by side in one op; 0 when there is no such slot.
    pub fn slices(&self, slot: usize) -> usize {
        self.entries.get(slot).map_or(0, |entry| entry.slices)
    }

    /// What runs in a slot; `None` when there is no such slot.
    pub fn runs(&self, slot: usize) -> Option<Runs> {
        self.entries.get(slot).map(|entry| match (entry.kernel, self.tier) {
            (Some(kernel), _) => Runs::Compiled(kernel),
            (None, Tier::Reference) => Runs::Reference,
            (None, Tier::Baseline) => Runs::Baseline,
        })
    }

    /// Whether hand-written ops run where there is no compiled kernel; else the reference does.
    pub fn has_hand_written(&self) -> bool {
        crate::ops::HAS_BASELINE && matches!((self.tier, self.level), (Tier::Baseline, Level::Avx2(_)))
    }

    /// Name of what runs without a compiled kernel: `reference`, or the level of the hand-written ops (`avx2`).
    pub fn own_name(&self) -> &'static str {
        if self.has_hand_written() { "avx2" } else { "reference" }
    }

    /// Puts a verified kernel into a slot and returns the one it replaces.
    ///
    /// # Errors
    /// [`EngineError::NoSlot`]; [`EngineError::KeyMismatch`] when the kernel computes something else.
    pub fn install(&mut self, slot: usize, kernel: Kernel) -> Result<Option<Kernel>, EngineError> {
        let slots = self.entries.len();
        let entry = self.entries.get_mut(slot).ok_or(EngineError::NoSlot { slot, slots })?;
        if entry.key != kernel.key() {
            return Err(EngineError::KeyMismatch { slot: entry.key, kernel: kernel.key() });
        }
        Ok(entry.kernel.replace(kernel))
    }

    /// Takes the compiled kernel out of a slot, which then runs this crate's own op.
    pub fn remove(&mut self, slot: usize) -> Option<Kernel> {
        self.entries.get_mut(slot)?.kernel.take()
    }

    /// Statistics by slot.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Level of this crate's own ops.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Runs one slice for the op's rows.
    fn run_slice(&self, runs: Runs, key: &KernelKey, op: &OpCall<'_>, w: &[u8], y: ColumnsMut<'_>) {
        // This crate's own ops take any number of rows.
        let key = &KernelKey { m: op.rows as u32, ..*key };
        match runs {
            Runs::Compiled(kernel) => kernel.call_columns(op.x, w, y, op.rows),
            Runs::Baseline => ops::run_baseline(self.level, key, op.x, w, y),
            Runs::Reference => ops::run_reference(self.level, key, op.x, w, y),
        }
    }

    /// Runs one op on all workers, without recording it; each slice's cycles are left in `slice_cycles`. `replaced` runs in its
    /// slot instead of what the table says.
    fn run_parts(&self, op: &OpCall<'_>, y: ColumnsMut<'_>, workers: &dyn Workers, replaced: Option<(usize, Runs)>) {
        let parts = op.matrix.partition.parts();
        let shared = SharedColumns::new(y, &op.matrix.partition);
        let stride = workers.count();
        let job = |worker: usize| {
            // With fewer workers than parts, each takes several.
            for part in (worker..parts).step_by(stride) {
                let (Some(slot), Some(y)) = (op.matrix.slot(part, op.bucket), shared.take(part)) else { continue };
                let runs = match replaced {
                    Some((replaced, runs)) if replaced == slot => runs,
                    _ => self.runs(slot).unwrap_or(Runs::Reference),
                };
                let w = &op.weights[op.matrix.part_bytes(part)];
                let key = &self.entries[slot].key;
                let start = cycles();
                self.run_slice(runs, key, op, w, y);
                self.slice_cycles[part].0.store(cycles().wrapping_sub(start), Ordering::Relaxed);
            }
        };
        if parts == 1 { job(0) } else { workers.run(&job) }
    }

    /// Longest time of the parts that belong to `slot` in the op just timed.
    fn longest(&self, matrix: &Matrix, bucket: usize, slot: usize) -> u64 {
        let parts = (0..matrix.partition.parts()).filter(|&part| matrix.slot(part, bucket) == Some(slot));
        parts.map(|part| self.slice_cycles[part].0.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Runs one op and records it.
    pub(crate) fn run(&mut self, op: &OpCall<'_>, y: ColumnsMut<'_>, workers: &dyn Workers) {
        self.run_parts(op, y, workers, None);
        for slot in op.matrix.slots(op.bucket) {
            let cycles = self.longest(op.matrix, op.bucket, slot);
            self.profile.record(slot, op.rows as u32, cycles);
        }
    }

    /// Runs one op with `runs` in `slot`, unrecorded, and returns the longest time of a slice of that slot.
    pub(crate) fn replay(
        &self,
        op: &OpCall<'_>,
        y: ColumnsMut<'_>,
        workers: &dyn Workers,
        slot: usize,
        runs: Runs,
    ) -> u64 {
        self.run_parts(op, y, workers, Some((slot, runs)));
        self.longest(op.matrix, op.bucket, slot)
    }
}

/// One op to run.
#[derive(Clone, Copy)]
pub(crate) struct OpCall<'a> {
    pub matrix: &'a Matrix,
    /// The weights arena.
    pub weights: &'a [u8],
    /// Index into `M_BUCKETS`.
    pub bucket: usize,
    /// Activation rows, as many as the bucket.
    pub x: &'a [u8],
    /// Of these, from the first on, the ones that are wanted.
    pub rows: usize,
}
