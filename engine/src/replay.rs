//! Runs one op of a slot again, outside the forward pass: how the tuner times a candidate in place.
//!
//! The op runs on all workers, on a real matrix of the model (its *instance*) and on the activations captured from the
//! forward pass, and writes into scratch memory. Walking through the instances between calls keeps the weights as cold
//! as decoding finds them.

use crate::dispatch::ColumnsMut;
use crate::error::EngineError;
use crate::forward::Engine;
use crate::operands::{AlignedBytes, random_activations};
use crate::random::SplitMix64;
use crate::table::{OpCall, Runs};
use crate::weights::Matrix;
use crate::workers::Workers;
use alloc::vec::Vec;
use model::kernel::M_BUCKETS;
use model::layout::padded;

/// Memory that replays write into, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    y: Vec<f32>,
    /// Random activations for a slot whose op has not run yet.
    x: Option<(usize, AlignedBytes)>,
}

impl Engine<'_> {
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
                let op = OpCall { matrix, weights: self.weights, bucket, x, rows: m };
                Ok(self.table.replay(&op, ColumnsMut::new(y, m, stride, stride), workers, slot, runs))
            }
            None => Err(no_instance),
        };
        self.replay = scratch;
        result
    }
}
