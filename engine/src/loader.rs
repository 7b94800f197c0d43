//! Takes in a model file once, from front to back, and packs every weight straight into the arena.
//!
//! Input: chunks `(file offset, bytes)` of any size as a device delivers them ([`Loader::feed`]), or the file itself where
//! several cores can read it at once ([`Loader::pull`]). Output: a filled arena and a [`LoadedModel`] that `Engine::new` joins
//! with it. Between chunks only the unfinished panel (or row) of one tensor is kept aside; no weight is stored twice.

use crate::error::EngineError;
use crate::pack::{ColumnMap, RowFormat, pack_rows, scale_groups, zero_padding};
use crate::pieces::{PIECE_BYTES, ReadAt, pull_panels};
use crate::simd::Level;
use crate::weights::{Destination, Plan, PlannedTensor};
use crate::workers::{Single, Workers, for_each};
use alloc::vec;
use alloc::vec::Vec;
use model::layout::{PANEL, panel_bytes};

/// Rows of a tensor from this length on are worth sharing between cores.
const SHARED_BYTES: usize = 64 << 10;

/// A model whose weights are in an arena.
#[derive(Clone, Debug)]
pub struct LoadedModel {
    pub(crate) plan: Plan,
    /// Norms, biases and rotary divisors, where the plan says.
    pub(crate) vectors: Vec<f32>,
    /// Address of the first aligned byte: the arena must stay where it is.
    pub(crate) base_address: usize,
}

/// Takes in the file.
#[derive(Debug)]
pub struct Loader<'a> {
    plan: Plan,
    level: Level,
    arena: &'a mut [u8],
    vectors: Vec<f32>,
    /// Tensor that is being read.
    tensor: usize,
    /// Bytes of it that were taken in, `carry` included.
    have_bytes: u64,
    /// Start of a panel or row whose end is in the next chunk.
    carry: Vec<u8>,
}

impl<'a> Loader<'a> {
    /// Starts to fill `arena` ([`Plan::arena_bytes`] bytes, content arbitrary).
    ///
    /// # Errors
    /// [`EngineError::ArenaTooSmall`].
    pub fn new(plan: Plan, level: Level, arena: &'a mut [u8]) -> Result<Self, EngineError> {
        let base = plan.base(arena)?;
        let vectors = vec![0.0; plan.vectors_len];
        Ok(Self { plan, level, arena: &mut arena[base..], vectors, tensor: 0, have_bytes: 0, carry: Vec::new() })
    }

    /// Starts over: what was taken in will be taken in again, to the same places.
    pub fn rewind(&mut self) {
        (self.tensor, self.have_bytes) = (0, 0);
        self.carry.clear();
    }

    /// First byte of the file that is still needed; `None` when all weights are in.
    pub fn next_offset(&self) -> Option<u64> {
        self.plan.tensors.get(self.tensor).map(|planned| planned.tensor.offset + self.have_bytes)
    }

    /// Takes in the file's `bytes` from `offset` on, on all `workers` where there is much to do. Bytes that are no weights, or
    /// were taken in before, are skipped.
    ///
    /// # Errors
    /// [`EngineError::OutOfOrder`] when weights in front of `offset` are missing; nothing was taken in then.
    pub fn feed(&mut self, offset: u64, bytes: &[u8], workers: &dyn Workers) -> Result<(), EngineError> {
        let mut offset = offset;
        let mut bytes = bytes;
        while let Some(expected) = self.next_offset() {
            if bytes.is_empty() {
                break;
            }
            let Some(skip) = expected.checked_sub(offset) else {
                return Err(EngineError::OutOfOrder { expected, found: offset });
            };
            if skip >= bytes.len() as u64 {
                break;
            }
            let from = skip as usize;
            let len = self.tensor_left().min((bytes.len() - from) as u64) as usize;
            self.take_in(&bytes[from..from + len], workers);
            offset = expected + len as u64;
            bytes = &bytes[from + len..];
        }
        Ok(())
    }

    /// Takes in everything from [`Loader::next_offset`] up to the first tensor that begins at `until` or behind it. Each of
    /// `workers` reads a piece and packs it while it is in its caches.
    ///
    /// # Errors
    /// The first of `read`; what was taken in is then unspecified up to the next [`Loader::rewind`].
    pub fn pull<E: Send>(&mut self, until: u64, workers: &dyn Workers, read: &ReadAt<'_, E>) -> Result<(), E> {
        let begun = usize::from(self.have_bytes > 0);
        let end = self.plan.tensors.partition_point(|planned| planned.tensor.offset < until).max(self.tensor);
        let panels = (self.tensor + begun).min(end)..end;
        pull_panels(&self.plan, panels.clone(), self.level, self.arena, workers, read)?;
        while self.tensor < end {
            let planned = &self.plan.tensors[self.tensor];
            if panels.contains(&self.tensor) && planned.begins_panel().is_some() {
                self.tensor += 1;
                continue;
            }
            let mut piece = vec![0; self.tensor_left().min(PIECE_BYTES as u64) as usize];
            read(planned.tensor.offset + self.have_bytes, &mut piece)?;
            self.take_in(&piece, &Single);
        }
        Ok(())
    }

    /// Bytes of the current tensor that are still needed.
    fn tensor_left(&self) -> u64 {
        self.plan.tensors[self.tensor].tensor.len_bytes - self.have_bytes
    }

    /// Takes in the next bytes of the current tensor, and goes on to the next one with its last.
    fn take_in(&mut self, bytes: &[u8], workers: &dyn Workers) {
        self.store(bytes, workers);
        let is_end = bytes.len() as u64 == self.tensor_left();
        self.have_bytes += bytes.len() as u64;
        if is_end {
            self.tensor += 1;
            self.have_bytes = 0;
        }
    }

    /// Stores the next bytes of the current tensor: whole panels directly, the rest through `carry`.
    fn store(&mut self, bytes: &[u8], workers: &dyn Workers) {
        let Loader { plan, level, arena, vectors, tensor, have_bytes, carry } = self;
        let planned = &plan.tensors[*tensor];
        let row_bytes = planned.row_bytes;
        let first = ((*have_bytes - carry.len() as u64) / row_bytes as u64) as usize;
        // Columns in front of this tensor's, and how many rows are stored together.
        let (offset, unit) = match &planned.destination {
            Destination::Packed { map, .. } => (map.offset, PANEL),
            _ => (0, 1),
        };
        let is_end = *have_bytes + bytes.len() as u64 == planned.tensor.len_bytes;
        // Of `rows` rows from `first` on, those up to the end of the last unit.
        let whole = |first: usize, rows: usize| {
            if is_end { rows } else { rows.saturating_sub((offset + first + rows) % unit) }
        };
        // Beside a second core that packs, whoever reads comes off worse: the host that serves a disk, a thread.
        let is_shared = match &planned.destination {
            Destination::Packed { format, .. } => !format.is_quick_to_pack(*level),
            _ => false,
        };
        let workers = if is_shared { workers } else { &Single };
        let mut sink = Sink { plan, level: *level, arena, vectors, workers };
        let (mut first, mut bytes) = (first, bytes);
        if !carry.is_empty() {
            let rows_left = unit - (offset + first) % unit;
            let missing = rows_left * row_bytes - carry.len();
            let (head, rest) = bytes.split_at(missing.min(bytes.len()));
            carry.extend_from_slice(head);
            bytes = rest;
            let rows = whole(first, carry.len() / row_bytes);
            if rows == 0 {
                return;
            }
            sink.rows(planned, first, carry);
            carry.clear();
            first += rows;
        }
        let rows = whole(first, bytes.len() / row_bytes);
        let (rows, rest) = bytes.split_at(rows * row_bytes);
        if !rows.is_empty() {
            sink.rows(planned, first, rows);
        }
        carry.extend_from_slice(rest);
    }

    /// Ends the load: pads the last panels with zero weights.
    ///
    /// # Errors
    /// [`EngineError::Incomplete`] when the file ended early.
    pub fn finish(self) -> Result<LoadedModel, EngineError> {
        if let Some(planned) = self.plan.tensors.get(self.tensor) {
            return Err(EngineError::Incomplete {
                name: planned.tensor.name(),
                need_bytes: planned.tensor.len_bytes,
                have_bytes: self.have_bytes,
            });
        }
        for matrix in &self.plan.matrices {
            let packed = &mut self.arena[matrix.bytes.clone()];
            let maps: &[ColumnMap] =
                if matrix.op.is_gated() { &[ColumnMap::GATE, ColumnMap::UP] } else { &[ColumnMap::WHOLE] };
            for &map in maps {
                zero_padding(matrix.dtype, matrix.k, map, matrix.n, packed);
            }
        }
        Ok(LoadedModel { base_address: self.arena.as_ptr().addr(), plan: self.plan, vectors: self.vectors })
    }
}

/// Where rows go: everything of the loader but its position.
struct Sink<'a> {
    plan: &'a Plan,
    level: Level,
    arena: &'a mut [u8],
    vectors: &'a mut [f32],
    workers: &'a dyn Workers,
}

impl Sink<'_> {
    /// Stores whole rows from row `first` of the tensor on.
    fn rows(&mut self, planned: &PlannedTensor, first: usize, rows: &[u8]) {
        match &planned.destination {
            Destination::Packed { matrix, map, format } => {
                let matrix = &self.plan.matrices[*matrix];
                let packed = &mut self.arena[matrix.bytes.clone()];
                pack_on(self.workers, self.level, *format, matrix.k, *map, first, rows, packed);
            }
            Destination::Scales { matrix, map, group_len } => {
                let matrix = &self.plan.matrices[*matrix];
                let packed = &mut self.arena[matrix.bytes.clone()];
                scale_groups(matrix.k, *map, *group_len, first, rows, packed);
            }
            Destination::Rows { bytes } => {
                let at = bytes.start + first * planned.row_bytes;
                self.arena[at..at + rows.len()].copy_from_slice(rows);
            }
            Destination::Vector { at } => {
                for (element, bytes) in self.vectors[*at..].iter_mut().zip(rows.as_chunks().0) {
                    *element = f32::from_le_bytes(*bytes);
                }
            }
        }
    }
}

/// [`pack_rows`], on all `workers` where there is enough to do and the rows begin a panel.
#[expect(clippy::too_many_arguments, reason = "those of pack_rows and the workers")]
fn pack_on(
    workers: &dyn Workers,
    level: Level,
    format: RowFormat,
    k: usize,
    map: ColumnMap,
    column: usize,
    rows: &[u8],
    packed: &mut [u8],
) {
    let (panel, lane) = map.place(column);
    let panel_rows_bytes = PANEL * format.row_bytes(k);
    let panels = rows.len().div_ceil(panel_rows_bytes);
    let share = panels.div_ceil(workers.count());
    if lane != 0 || share == panels || rows.len() < SHARED_BYTES {
        return pack_rows(level, format, k, map, column, rows, packed);
    }
    let from = panel * panel_bytes(format.dtype(), k);
    let step_bytes = map.panel_step * panel_bytes(format.dtype(), k);
    let shares = rows.chunks(share * panel_rows_bytes).zip(packed[from..].chunks_mut(share * step_bytes));
    let own = ColumnMap { panel_step: map.panel_step, ..ColumnMap::WHOLE };
    for_each(workers, shares, |(rows, packed)| pack_rows(level, format, k, own, 0, rows, packed));
}
