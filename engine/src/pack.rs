//! File rows -> packed panels (`model::layout`), streaming: rows arrive in file order, any number of whole rows a call.
//!
//! A file row is one output column of the matrix. [`ColumnMap`] says where a tensor's columns go in the packed matrix:
//! behind the columns of an earlier tensor (fused q, k, v) or into every other panel (fused gate and up).
//! [`unpack_column`] is the inverse, and [`dequantise_column`] gives one column as f32: the embedding lookup of a
//! model whose head is its token embedding, so that no second copy of that matrix is kept.

use crate::simd::Level;
use half::f16;
use model::TensorType;
use model::kernel::DType;
use model::layout::{BLOCK, MINS_OFFSET, PANEL, panel_bytes, scales_offset, step_bytes};

/// How a file stores the rows of a matrix.
///
/// # Source
/// `block_q8_0`, `block_q4_0`, `block_q4_1` of the ggml project: scale (f16), for Q4_1 the minimum (f16), then quants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowFormat {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32; widened exactly, so the packed type is F32.
    Bf16,
    /// 34-byte blocks: d, 32 x i8.
    Q8_0,
    /// 18-byte blocks: d, 16 x two nibbles.
    Q4_0,
    /// 20-byte blocks: d, m, 16 x two nibbles.
    Q4_1,
}

impl RowFormat {
    /// The format of a file's tensor type; `None` when no op reads it.
    pub fn of(ty: TensorType) -> Option<RowFormat> {
        Some(match ty {
            TensorType::F32 => RowFormat::F32,
            TensorType::F16 => RowFormat::F16,
            TensorType::BF16 => RowFormat::Bf16,
            TensorType::Q8_0 => RowFormat::Q8_0,
            TensorType::Q4_0 => RowFormat::Q4_0,
            TensorType::Q4_1 => RowFormat::Q4_1,
            _ => return None,
        })
    }

    /// Type of the packed matrix.
    pub fn dtype(self) -> DType {
        match self {
            RowFormat::F32 | RowFormat::Bf16 => DType::F32,
            RowFormat::F16 => DType::F16,
            RowFormat::Q8_0 => DType::Q8_0,
            RowFormat::Q4_0 => DType::Q4_0,
            RowFormat::Q4_1 => DType::Q4_1,
        }
    }

    /// Bytes of one file block and the elements it holds.
    const fn block(self) -> (usize, usize) {
        match self {
            RowFormat::F32 => (4, 1),
            RowFormat::F16 | RowFormat::Bf16 => (2, 1),
            RowFormat::Q8_0 => (34, BLOCK),
            RowFormat::Q4_0 => (18, BLOCK),
            RowFormat::Q4_1 => (20, BLOCK),
        }
    }

    /// Elements of a row come in multiples of this.
    pub const fn block_elements(self) -> usize {
        self.block().1
    }

    /// Bytes of one file row of `k` elements.
    pub const fn row_bytes(self, k: usize) -> usize {
        let (bytes, elements) = self.block();
        k / elements * bytes
    }
}

/// Where the columns of one tensor go in a packed matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ColumnMap {
    /// Columns in front of this tensor's first.
    pub offset: usize,
    /// Panels from one of this tensor's panels to its next: 1, or 2 when gate and up alternate.
    pub panel_step: usize,
    /// First panel: 0, or 1 for up.
    pub first_panel: usize,
}

impl ColumnMap {
    /// Columns from the start of the matrix on.
    pub const WHOLE: ColumnMap = ColumnMap::after(0);
    /// The gate half of a fused gate/up matrix.
    pub const GATE: ColumnMap = ColumnMap { offset: 0, panel_step: 2, first_panel: 0 };
    /// The up half of a fused gate/up matrix.
    pub const UP: ColumnMap = ColumnMap { offset: 0, panel_step: 2, first_panel: 1 };

    /// Columns behind `offset` others.
    pub const fn after(offset: usize) -> ColumnMap {
        ColumnMap { offset, panel_step: 1, first_panel: 0 }
    }

    /// Panel and lane of the tensor's column `column`.
    pub const fn place(&self, column: usize) -> (usize, usize) {
        let column = self.offset + column;
        (self.first_panel + column / PANEL * self.panel_step, column % PANEL)
    }
}

/// Packs whole `rows` of depth `k`, the first of which is the tensor's column `column`, into `packed`.
///
/// # Panics
/// When `rows` is not a whole number of rows, or the packed matrix is too short for them.
pub fn pack_rows(
    level: Level,
    format: RowFormat,
    k: usize,
    map: ColumnMap,
    column: usize,
    rows: &[u8],
    packed: &mut [u8],
) {
    let row_bytes = format.row_bytes(k);
    let panel_bytes = panel_bytes(format.dtype(), k);
    assert!(
        row_bytes > 0 && rows.len().is_multiple_of(row_bytes),
        "{} bytes are no whole rows of {row_bytes}",
        rows.len()
    );
    let mut column = column;
    let mut rows = rows;
    while !rows.is_empty() {
        let (panel, lane) = map.place(column);
        let panel = &mut packed[panel * panel_bytes..][..panel_bytes];
        let count = (rows.len() / row_bytes).min(PANEL - lane);
        let (now, later) = rows.split_at(count * row_bytes);
        if count == PANEL {
            match level {
                Level::Portable => pack_panel(format, now, row_bytes, panel),
                Level::Avx2(avx2) => crate::simd::pack::pack_panel(avx2, format, now, row_bytes, panel),
            }
        } else {
            for (i, row) in now.chunks_exact(row_bytes).enumerate() {
                pack_row(format, row, lane + i, panel);
            }
        }
        column += count;
        rows = later;
    }
}

/// Zeroes the columns `columns..` of the last panel they fall into, for each panel family of the matrix.
pub fn zero_padding(dtype: DType, k: usize, map: ColumnMap, columns: usize, packed: &mut [u8]) {
    let panel_bytes = panel_bytes(dtype, k);
    let (panel, first_lane) = map.place(columns);
    if first_lane == 0 {
        return;
    }
    let panel = &mut packed[panel * panel_bytes..][..panel_bytes];
    for step in panel.chunks_exact_mut(step_bytes(dtype)) {
        for lane in first_lane..PANEL {
            for_each_field(dtype, lane, |at, len| step[at..at + len].fill(0));
        }
    }
}

/// Calls `field(offset, len)` for every run of bytes that belongs to `lane` in one step.
#[inline(always)]
fn for_each_field(dtype: DType, lane: usize, mut field: impl FnMut(usize, usize)) {
    match dtype {
        DType::F32 => field(4 * lane, 4),
        DType::F16 => field(2 * lane, 2),
        DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => {
            let scales = scales_offset(dtype);
            for group in 0..scales / (4 * PANEL) {
                field(group * 4 * PANEL + 4 * lane, 4);
            }
            field(scales + 2 * lane, 2);
            if dtype == DType::Q4_1 {
                field(MINS_OFFSET + 2 * lane, 2);
            }
        }
    }
}

/// Offsets of d, m (Q4_1) and the quants in a file block.
const fn quants_offset(format: RowFormat) -> usize {
    if matches!(format, RowFormat::Q4_1) { 4 } else { 2 }
}

/// Packs one row into one lane: the path for rows at the edge of a chunk or of a panel.
fn pack_row(format: RowFormat, row: &[u8], lane: usize, panel: &mut [u8]) {
    let dtype = format.dtype();
    let (block_bytes, _) = format.block();
    for (step, block) in panel.chunks_exact_mut(step_bytes(dtype)).zip(row.chunks_exact(block_bytes)) {
        pack_block(format, block, lane, step);
    }
}

/// Packs one file block into one lane of one step.
#[inline(always)]
fn pack_block(format: RowFormat, block: &[u8], lane: usize, step: &mut [u8]) {
    match format {
        RowFormat::F32 => step[4 * lane..4 * lane + 4].copy_from_slice(&block[..4]),
        RowFormat::F16 => step[2 * lane..2 * lane + 2].copy_from_slice(&block[..2]),
        RowFormat::Bf16 => {
            step[4 * lane..4 * lane + 2].fill(0);
            step[4 * lane + 2..4 * lane + 4].copy_from_slice(&block[..2]);
        }
        RowFormat::Q8_0 | RowFormat::Q4_0 | RowFormat::Q4_1 => {
            let (quants, tail) = step.split_at_mut(scales_offset(format.dtype()));
            let file_quants = &block[quants_offset(format)..];
            for (group, four) in quants.chunks_exact_mut(4 * PANEL).zip(file_quants.chunks_exact(4)) {
                group[4 * lane..4 * lane + 4].copy_from_slice(four);
            }
            tail[2 * lane..2 * lane + 2].copy_from_slice(&block[..2]);
            if format == RowFormat::Q4_1 {
                tail[2 * PANEL + 2 * lane..2 * PANEL + 2 * lane + 2].copy_from_slice(&block[2..4]);
            }
        }
    }
}

/// Packs 32 rows into a whole panel, writing it front to back.
fn pack_panel(format: RowFormat, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    // One copy of the loop per format, so that the block size is a constant in it.
    match format {
        RowFormat::F32 => pack_panel_of::<4>(RowFormat::F32, rows, row_bytes, panel),
        RowFormat::F16 => pack_panel_of::<2>(RowFormat::F16, rows, row_bytes, panel),
        RowFormat::Bf16 => pack_panel_of::<2>(RowFormat::Bf16, rows, row_bytes, panel),
        RowFormat::Q8_0 => pack_panel_of::<34>(RowFormat::Q8_0, rows, row_bytes, panel),
        RowFormat::Q4_0 => pack_panel_of::<18>(RowFormat::Q4_0, rows, row_bytes, panel),
        RowFormat::Q4_1 => pack_panel_of::<20>(RowFormat::Q4_1, rows, row_bytes, panel),
    }
}

#[inline(always)]
fn pack_panel_of<const BLOCK_BYTES: usize>(format: RowFormat, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    let steps = panel.chunks_exact_mut(step_bytes(format.dtype()));
    for (step, at) in steps.zip((0..row_bytes).step_by(BLOCK_BYTES)) {
        for lane in 0..PANEL {
            pack_block(format, &rows[lane * row_bytes + at..][..BLOCK_BYTES], lane, step);
        }
    }
}

/// The file row that [`pack_rows`] put into `column` of a packed matrix, as bytes of the packed type (BF16 as F32).
///
/// # Panics
/// When `row` is not the length of a file row of `k` elements, or `packed` is too short.
pub fn unpack_column(dtype: DType, k: usize, map: ColumnMap, column: usize, packed: &[u8], row: &mut [u8]) {
    let format = match dtype {
        DType::F32 => RowFormat::F32,
        DType::F16 => RowFormat::F16,
        DType::Q8_0 => RowFormat::Q8_0,
        DType::Q4_0 => RowFormat::Q4_0,
        DType::Q4_1 => RowFormat::Q4_1,
    };
    let (block_bytes, _) = format.block();
    assert_eq!(row.len(), format.row_bytes(k), "bytes of a {dtype} row of {k} elements");
    let (panel, lane) = map.place(column);
    let panel_bytes = panel_bytes(dtype, k);
    let panel = &packed[panel * panel_bytes..][..panel_bytes];
    for (step, block) in panel.chunks_exact(step_bytes(dtype)).zip(row.chunks_exact_mut(block_bytes)) {
        match format {
            RowFormat::F32 | RowFormat::F16 | RowFormat::Bf16 => {
                for_each_field(dtype, lane, |at, len| block.copy_from_slice(&step[at..at + len]));
            }
            RowFormat::Q8_0 | RowFormat::Q4_0 | RowFormat::Q4_1 => {
                let (quants, tail) = step.split_at(scales_offset(dtype));
                for (group, four) in
                    quants.chunks_exact(4 * PANEL).zip(block[quants_offset(format)..].chunks_exact_mut(4))
                {
                    four.copy_from_slice(&group[4 * lane..4 * lane + 4]);
                }
                block[..2].copy_from_slice(&tail[2 * lane..2 * lane + 2]);
                if format == RowFormat::Q4_1 {
                    block[2..4].copy_from_slice(&tail[2 * PANEL + 2 * lane..][..2]);
                }
            }
        }
    }
}

/// One column of a packed matrix as f32: `w = d * q`, `d * (q - 8)` or `d * q + m`, each operation rounded on its own.
///
/// # Panics
/// When `packed` is too short for that column.
pub fn dequantise_column(dtype: DType, column: usize, packed: &[u8], out: &mut [f32]) {
    let k = out.len();
    let (panel, lane) = ColumnMap::WHOLE.place(column);
    let panel_bytes = panel_bytes(dtype, k);
    let panel = &packed[panel * panel_bytes..][..panel_bytes];
    let steps = panel.chunks_exact(step_bytes(dtype));
    match dtype {
        DType::F32 => {
            for (step, x) in steps.zip(out) {
                *x = f32::from_le_bytes(field(step, 4 * lane));
            }
        }
        DType::F16 => {
            for (step, x) in steps.zip(out) {
                *x = f16::from_le_bytes(field(step, 2 * lane)).to_f32_const();
            }
        }
        DType::Q8_0 => {
            for (step, block) in steps.zip(out.chunks_exact_mut(BLOCK)) {
                let d = f16::from_le_bytes(field(step, scales_offset(dtype) + 2 * lane)).to_f32_const();
                for (group, four) in step.chunks_exact(4 * PANEL).zip(block.chunks_exact_mut(4)) {
                    let quants: [u8; 4] = field(group, 4 * lane);
                    for (x, q) in four.iter_mut().zip(quants) {
                        *x = d * f32::from(q.cast_signed());
                    }
                }
            }
        }
        DType::Q4_0 | DType::Q4_1 => {
            for (step, block) in steps.zip(out.chunks_exact_mut(BLOCK)) {
                let d = f16::from_le_bytes(field(step, scales_offset(dtype) + 2 * lane)).to_f32_const();
                let (low, high) = block.split_at_mut(BLOCK / 2);
                let fours = low.chunks_exact_mut(4).zip(high.chunks_exact_mut(4));
                if dtype == DType::Q4_0 {
                    for (group, (low, high)) in step.chunks_exact(4 * PANEL).zip(fours) {
                        let quants: [u8; 4] = field(group, 4 * lane);
                        for ((low, high), q) in low.iter_mut().zip(high).zip(quants) {
                            *low = d * (f32::from(q & 15) - 8.0);
                            *high = d * (f32::from(q >> 4) - 8.0);
                        }
                    }
                } else {
                    let m = f16::from_le_bytes(field(step, MINS_OFFSET + 2 * lane)).to_f32_const();
                    for (group, (low, high)) in step.chunks_exact(4 * PANEL).zip(fours) {
                        let quants: [u8; 4] = field(group, 4 * lane);
                        for ((low, high), q) in low.iter_mut().zip(high).zip(quants) {
                            *low = d * f32::from(q & 15) + m;
                            *high = d * f32::from(q >> 4) + m;
                        }
                    }
                }
            }
        }
    }
}

/// The `N` bytes at `at`.
#[inline(always)]
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
