//! Runs one op of a slot again, outside the forward pass: how the tuner times a candidate in place.
//!
//! The op runs on all workers, on a real matrix of the model (its *instance*) and on the activations captured from the
//! forward pass, and writes into scratch memory. Before it is timed, everything is read that the forward pass reads between
//! the matrix before and this one: a last-level cache can hold all the instances of one op, though not the model, and
//! kernels that are best on weights in that cache are not those that are best on weights in memory.

use crate::dispatch::ColumnsMut;
use crate::error::EngineError;
use crate::forward::Engine;
use crate::operands::{AlignedBytes, random_activations};
use crate::random::SplitMix64;
use crate::simd::limits::read;
use crate::table::{OpCall, Runs};
use crate::weights::Matrix;
use crate::workers::{Workers, for_each};
use alloc::vec::Vec;
use model::kernel::M_BUCKETS;
use model::layout::padded;

/// Of the bytes between two matrices, the last so many are read: more than most last-level caches hold.
const COLD_BYTES: usize = 48 << 20;

/// What replays keep between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Where in the arena the last matrix ended.
    end: usize,
    y: Vec<f32>,
    /// Random activations for a slot whose op has not run yet.
    x: Option<(usize, AlignedBytes)>,
}

impl Engine<'_> {
    /// Reads the arena from `end` to `start`, over its end where need be, on all workers; of that the last [`COLD_BYTES`].
    fn read_between(&self, end: usize, start: usize, workers: &dyn Workers) {
        let arena = self.weights;
        let start = start.min(arena.len());
        let between = if end <= start { start - end } else { arena.len() - end.min(arena.len()) + start };
        let before = between.min(COLD_BYTES).min(start);
        let around = between.min(COLD_BYTES) - before;
        for stretch in [&arena[arena.len() - around..], &arena[start - before..start]] {
            let share = stretch.len().div_ceil(workers.count()).max(1);
            for_each(workers, stretch.chunks(share), |share| read(share, self.table.level()));
        }
    }

    /// Matrices of the model that have slices of this slot's key.
    pub fn instances(&self, slot: usize) -> usize {
        self.instances_of(slot).count()
    }

    /// Each such matrix and the batch bucket under which the slot serves it.
    pub(crate) fn instances_of(&self, slot: usize) -> impl Iterator<Item = (&Matrix, usize)> {
        self.plan.matrices.iter().filter_map(move |matrix| {
            let bucket = (0..M_BUCKETS.len()).find(|&bucket| matrix.slots(bucket).any(|s| s == slot))?;
            Some((matrix, bucket))
        })
    }

    /// Runs the op of `slot` once on its `instance`-th matrix, on all workers, with `runs` in place of what the table
    /// says for this slot, and returns the cycles of its longest slice. Nothing is recorded and no session changes.
    ///
    /// # Errors
    /// No such slot or instance; a kernel for another key.
    pub fn replay(
        &mut self,
        workers: &dyn Workers,
        slot: usize,
        runs: Runs,
        instance: usize,
    ) -> Result<u64, EngineError> {
        let slots = self.table.len();
        let key = self.table.key(slot).ok_or(EngineError::NoSlot { slot, slots })?;
        if let Runs::Compiled(kernel) = runs
            && kernel.key() != key
        {
            return Err(EngineError::KeyMismatch { slot: key, kernel: kernel.key() });
        }
        let instances = self.instances(slot);
        let no_instance = EngineError::NoInstance { key, instance, instances };
        let mut scratch = core::mem::take(&mut self.replay);
        if self.captured[slot].is_none() && scratch.x.as_ref().is_none_or(|(of, _)| *of != slot) {
            scratch.x = Some((slot, random_activations(&key, &mut SplitMix64::new(1))));
        }
        let x = match (&self.captured[slot], &scratch.x) {
            (Some(x), _) | (None, Some((_, x))) => x,
            (None, None) => unreachable!("made above"),
        };
        let y = &mut scratch.y;
        let result = match self.instances_of(slot).nth(instance) {
            Some((matrix, bucket)) => {
                let (m, stride) = (key.m as usize, padded(matrix.n));
                if y.len() < m * stride {
                    y.resize(m * stride, 0.0);
                }
                self.read_between(scratch.end, matrix.bytes.start, workers);
                scratch.end = matrix.bytes.end;
                let op = OpCall { matrix, weights: self.weights, bucket, x, rows: m };
                Ok(self.table.replay(&op, ColumnsMut::new(y, m, stride, stride), workers, slot, runs))
            }
            None => Err(no_instance),
        };
        self.replay = scratch;
        result
    }
}
