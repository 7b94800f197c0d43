//! Which core reads and packs what of a model file that several can read at once.
//!
//! Input: the tensors of a [`Plan`] whose first column begins a panel, and the arena. They are cut into pieces that fit a core's
//! cache; pieces share neither bytes of the file nor panels, so nothing but their distribution needs a lock.

use crate::pack::{ColumnMap, RowFormat, pack_rows};
use crate::simd::Level;
use crate::weights::Plan;
use crate::workers::Workers;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use model::Tensor;
use model::layout::{PANEL, panel_bytes};
use spin::Mutex;

/// Bytes that a core reads at a time before it packs them: they stay in its second-level cache.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Fills a buffer from an offset of the file on; several cores may call it at once.
pub type ReadAt<'f, E> = dyn Fn(u64, &mut [u8]) -> Result<(), E> + Sync + 'f;

/// Some panels of a matrix and the rows of the file that belong into them.
struct Piece<'a> {
    format: RowFormat,
    k: usize,
    /// Offset of the first row in the file.
    at: u64,
    /// Bytes of all rows.
    len: usize,
    panels: Vec<&'a mut [u8]>,
}

impl Piece<'_> {
    /// Reads the rows through `buffer` and packs them.
    fn pull<E>(self, level: Level, buffer: &mut Vec<u8>, read: &ReadAt<'_, E>) -> Result<(), E> {
        buffer.resize(buffer.len().max(self.len), 0);
        let rows = &mut buffer[..self.len];
        read(self.at, rows)?;
        let panel_rows = rows.chunks(PANEL * self.format.row_bytes(self.k));
        for (rows, panel) in panel_rows.zip(self.panels) {
            pack_rows(level, self.format, self.k, ColumnMap::WHOLE, 0, rows, panel);
        }
        Ok(())
    }
}

/// Reads and packs those of the plan's `tensors` that begin a panel. Each of `workers` begins with a stretch of the file of its
/// own, since cores that read neighbouring pages of a page cache hinder each other, and then helps where most is left: on a
/// shared machine a core may be gone for longer than a whole load takes.
pub(crate) fn pull_panels<E: Send>(
    plan: &Plan,
    tensors: Range<usize>,
    level: Level,
    arena: &mut [u8],
    workers: &dyn Workers,
    read: &ReadAt<'_, E>,
) -> Result<(), E> {
    let pieces = pieces(plan, tensors, arena);
    let total_bytes: usize = pieces.iter().map(|piece| piece.len).sum();
    let share_bytes = total_bytes.div_ceil(workers.count()).max(1);
    let mut shares: Vec<VecDeque<Piece<'_>>> = Vec::new();
    shares.resize_with(workers.count(), VecDeque::new);
    let mut before = 0;
    for piece in pieces {
        let len = piece.len;
        shares[before / share_bytes].push_back(piece);
        before += len;
    }
    let shares: Vec<_> = shares.into_iter().map(Mutex::new).collect();
    let next = |worker: usize| {
        let own = shares[worker].lock().pop_front();
        own.or_else(|| shares.iter().max_by_key(|share| share.lock().len())?.lock().pop_back())
    };
    let failure = Mutex::new(None);
    workers.run(&|worker| {
        let mut buffer = Vec::new();
        while let Some(piece) = next(worker) {
            if let Err(error) = piece.pull(level, &mut buffer, read) {
                failure.lock().get_or_insert(error);
            }
            if failure.lock().is_some() {
                return;
            }
        }
    });
    failure.into_inner().map_or(Ok(()), Err)
}

/// Cuts those of the plan's `tensors` that begin a panel into pieces, in order of the file.
fn pieces<'a>(plan: &Plan, tensors: Range<usize>, arena: &'a mut [u8]) -> Vec<Piece<'a>> {
    let tensors: Vec<_> =
        plan.tensors[tensors].iter().filter_map(|planned| planned.begins_panel().zip(Some(planned))).collect();
    let mut used = vec![false; plan.matrices.len()];
    for ((matrix, ..), _) in &tensors {
        used[*matrix] = true;
    }
    // Gate and up alternate in a matrix: every panel is handed out by itself.
    let mut places: Vec<Vec<&mut [u8]>> = Vec::new();
    let (mut rest, mut rest_at) = (arena, 0);
    for (matrix, used) in plan.matrices.iter().zip(used) {
        let (bytes, later) =
            core::mem::take(&mut rest)[matrix.bytes.start - rest_at..].split_at_mut(matrix.bytes.len());
        (rest, rest_at) = (later, matrix.bytes.end);
        let panel_bytes = panel_bytes(matrix.dtype, matrix.k);
        places.push(if used { bytes.chunks_exact_mut(panel_bytes).collect() } else { Vec::new() });
    }
    let mut pieces = Vec::new();
    for ((matrix, map, format), planned) in tensors {
        let k = plan.matrices[matrix].k;
        let panel_rows_bytes = (PANEL * planned.row_bytes) as u64;
        let piece_bytes = (PIECE_BYTES as u64 / panel_rows_bytes).max(1) * panel_rows_bytes;
        let Tensor { offset, len_bytes, .. } = planned.tensor;
        for from in (0..len_bytes).step_by(piece_bytes as usize) {
            let len = piece_bytes.min(len_bytes - from);
            let first = (from / panel_rows_bytes) as usize;
            let count = len.div_ceil(panel_rows_bytes) as usize;
            let place = |panel| core::mem::take(&mut places[matrix][map.place(panel * PANEL).0]);
            let panels = (first..first + count).map(place).collect();
            pieces.push(Piece { format, k, at: offset + from, len: len as usize, panels });
        }
    }
    pieces
}
