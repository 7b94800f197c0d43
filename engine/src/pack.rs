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
use model::layout::{
    BLOCK, BlockLayout, PANEL, QUADS, SUPER, WEIGHT_ALIGN, WORD_BYTES, group_bytes, panel_bytes, step_bytes,
};
use model::quant::{BlockFormat, Parts, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

/// How a file stores the rows of a matrix.
///
/// # Source
/// `block_q8_0`, `block_q4_0`, `block_q4_1` of the ggml project: scale (f16), for Q4_1 the minimum (f16), then quants.
/// For the other quantised types see [`model::quant`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowFormat {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32; widened exactly, so the packed type is F32.
    Bf16,
    /// Int8 codes, packed as F32; [`scale_groups`] makes weights of them.
    Int8,
    /// 34-byte blocks: d, 32 x i8.
    Q8_0,
    /// 18-byte blocks: d, 16 x two nibbles.
    Q4_0,
    /// 20-byte blocks: d, m, 16 x two nibbles.
    Q4_1,
    /// As [`model::quant::Q5_0`] says.
    Q5_0,
    /// As [`model::quant::Q5_1`] says.
    Q5_1,
    /// As [`model::quant::Q2K`] says.
    Q2K,
    /// As [`model::quant::Q3K`] says.
    Q3K,
    /// As [`model::quant::Q4K`] says.
    Q4K,
    /// As [`model::quant::Q5K`] says.
    Q5K,
    /// As [`model::quant::Q6K`] says.
    Q6K,
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
            TensorType::Q5_0 => RowFormat::Q5_0,
            TensorType::Q5_1 => RowFormat::Q5_1,
            TensorType::Q2_K => RowFormat::Q2K,
            TensorType::Q3_K => RowFormat::Q3K,
            TensorType::Q4_K => RowFormat::Q4K,
            TensorType::Q5_K => RowFormat::Q5K,
            TensorType::Q6_K => RowFormat::Q6K,
            _ => return None,
        })
    }

    /// Type of the packed matrix.
    pub fn dtype(self) -> DType {
        match self {
            RowFormat::F32 | RowFormat::Bf16 | RowFormat::Int8 => DType::F32,
            RowFormat::F16 => DType::F16,
            RowFormat::Q8_0 => DType::Q8_0,
            RowFormat::Q4_0 => DType::Q4_0,
            RowFormat::Q4_1 => DType::Q4_1,
            RowFormat::Q5_0 => DType::Q5_0,
            RowFormat::Q5_1 => DType::Q5_1,
            RowFormat::Q2K => DType::Q2_K,
            RowFormat::Q3K => DType::Q3_K,
            RowFormat::Q4K => DType::Q4_K,
            RowFormat::Q5K => DType::Q5_K,
            RowFormat::Q6K => DType::Q6_K,
        }
    }

    /// Bytes of one file block and the elements it holds.
    const fn block(self) -> (usize, usize) {
        match self {
            RowFormat::F32 => (4, 1),
            RowFormat::Int8 => (1, 1),
            RowFormat::F16 | RowFormat::Bf16 => (2, 1),
            RowFormat::Q8_0 => (34, BLOCK),
            RowFormat::Q4_0 => (18, BLOCK),
            RowFormat::Q4_1 => (20, BLOCK),
            RowFormat::Q5_0 => (22, BLOCK),
            RowFormat::Q5_1 => (24, BLOCK),
            RowFormat::Q2K => (84, SUPER * BLOCK),
            RowFormat::Q3K => (110, SUPER * BLOCK),
            RowFormat::Q4K => (144, SUPER * BLOCK),
            RowFormat::Q5K => (176, SUPER * BLOCK),
            RowFormat::Q6K => (210, SUPER * BLOCK),
        }
    }

    /// One core packs rows of this format faster than disks read them.
    pub(crate) fn is_quick_to_pack(self, level: Level) -> bool {
        matches!(level, Level::Avx2(_)) && has_panel_code(self)
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
/// When `rows` is not a whole number of rows, the packed matrix is too short for them, or does not begin at a cache line.
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
    assert!(packed.as_ptr().addr().is_multiple_of(WEIGHT_ALIGN), "packed weights begin at a cache line");
    let mut column = column;
    let mut rows = rows;
    while !rows.is_empty() {
        let (panel, lane) = map.place(column);
        let panel = &mut packed[panel * panel_bytes..][..panel_bytes];
        let count = (rows.len() / row_bytes).min(PANEL - lane);
        let (now, later) = rows.split_at(count * row_bytes);
        match level {
            Level::Avx2(avx2) if has_panel_code(format) && count == PANEL => {
                crate::simd::pack::pack_panel(avx2, format, now, !later.is_empty(), panel);
            }
            _ => pack_lanes(format, now, row_bytes, lane, panel),
        }
        column += count;
        rows = later;
    }
}

/// Multiplies the packed codes of groups of `group_len` weights by `scales` (f32 each), from the tensor's group `group` on.
/// Groups follow each other through the tensor's rows of `k` weights and may begin in one and end in the next.
///
/// # Panics
/// When the packed matrix is too short for them.
pub fn scale_groups(k: usize, map: ColumnMap, group_len: usize, group: usize, scales: &[u8], packed: &mut [u8]) {
    const STEP: usize = step_bytes(DType::F32);
    let panel_bytes = panel_bytes(DType::F32, k);
    for (i, scale) in scales.as_chunks().0.iter().enumerate() {
        let scale = f32::from_le_bytes(*scale);
        let (mut at, end) = ((group + i) * group_len, (group + i + 1) * group_len);
        while at < end {
            let (column, first) = (at / k, at % k);
            let count = (k - first).min(end - at);
            let (panel, lane) = map.place(column);
            let panel = &mut packed[panel * panel_bytes..][..panel_bytes];
            for step in panel[first * STEP..][..count * STEP].chunks_exact_mut(STEP) {
                let weight = f32::from_le_bytes(field(step, 4 * lane)) * scale;
                step[4 * lane..4 * lane + 4].copy_from_slice(&weight.to_le_bytes());
            }
            at += count;
        }
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
    for group in panel.chunks_exact_mut(group_bytes(dtype)) {
        for lane in first_lane..PANEL {
            for_each_field(dtype, lane, |at, len| group[at..at + len].fill(0));
        }
    }
}

/// Calls `field(offset, len)` for every run of bytes that belongs to `lane` in one step, or in one super-block.
fn for_each_field(dtype: DType, lane: usize, mut field: impl FnMut(usize, usize)) {
    let Some(layout) = BlockLayout::of(dtype) else {
        let bytes = step_bytes(dtype) / PANEL;
        return field(bytes * lane, bytes);
    };
    for at in (0..layout.header_bytes()).step_by(2 * PANEL) {
        field(at + 2 * lane, 2);
    }
    let scale_bytes = layout.scale_bytes();
    for step in (layout.header_bytes()..group_bytes(dtype)).step_by(layout.step_bytes()) {
        for word in 0..layout.words() {
            field(step + word * WORD_BYTES + 4 * lane, 4);
        }
        for at in (layout.scales_offset(0)..layout.step_bytes()).step_by(scale_bytes * PANEL) {
            field(step + at + scale_bytes * lane, scale_bytes);
        }
    }
}

/// Packs one element of a format without blocks into one lane of one step.
#[inline(always)]
fn pack_element(format: RowFormat, element: &[u8], lane: usize, step: &mut [u8]) {
    match format {
        RowFormat::F32 => step[4 * lane..4 * lane + 4].copy_from_slice(&element[..4]),
        RowFormat::F16 => step[2 * lane..2 * lane + 2].copy_from_slice(&element[..2]),
        RowFormat::Bf16 => {
            step[4 * lane..4 * lane + 2].fill(0);
            step[4 * lane + 2..4 * lane + 4].copy_from_slice(&element[..2]);
        }
        RowFormat::Int8 => {
            let code = f32::from(element[0].cast_signed());
            step[4 * lane..4 * lane + 4].copy_from_slice(&code.to_le_bytes());
        }
        _ => unreachable!("{format:?} has blocks"),
    }
}

/// Calls a function generic over a block format with that of the quantised `$dtype`.
macro_rules! with_block_format {
    ($dtype:expr, $call:ident ( $($arg:expr),* )) => {
        match $dtype {
            DType::Q8_0 => $call::<Q8_0, 32, 34>($($arg),*),
            DType::Q4_0 => $call::<Q4_0, 32, 18>($($arg),*),
            DType::Q4_1 => $call::<Q4_1, 32, 20>($($arg),*),
            DType::Q5_0 => $call::<Q5_0, 32, 22>($($arg),*),
            DType::Q5_1 => $call::<Q5_1, 32, 24>($($arg),*),
            DType::Q2_K => $call::<Q2K, 256, 84>($($arg),*),
            DType::Q3_K => $call::<Q3K, 256, 110>($($arg),*),
            DType::Q4_K => $call::<Q4K, 256, 144>($($arg),*),
            DType::Q5_K => $call::<Q5K, 256, 176>($($arg),*),
            DType::Q6_K => $call::<Q6K, 256, 210>($($arg),*),
            DType::F32 | DType::F16 => unreachable!("{} has no blocks", $dtype),
        }
    };
}

/// Whether `simd::pack` has code for panels of the format.
fn has_panel_code(format: RowFormat) -> bool {
    format != RowFormat::Int8
}

/// Packs `rows` into the lanes of `panel` from `lane` on, block by block through all rows, so that the panel is written
/// front to back.
fn pack_lanes(format: RowFormat, rows: &[u8], row_bytes: usize, lane: usize, panel: &mut [u8]) {
    if format.dtype().is_quantised() {
        return with_block_format!(format.dtype(), pack_lanes_of(rows, row_bytes, lane, panel));
    }
    let (element_bytes, _) = format.block();
    let steps = panel.chunks_exact_mut(step_bytes(format.dtype()));
    for (step, at) in steps.zip((0..row_bytes).step_by(element_bytes)) {
        for (j, row) in rows.chunks_exact(row_bytes).enumerate() {
            pack_element(format, &row[at..at + element_bytes], lane + j, step);
        }
    }
}

fn pack_lanes_of<F: BlockFormat<LEN, BYTES>, const LEN: usize, const BYTES: usize>(
    rows: &[u8],
    row_bytes: usize,
    lane: usize,
    panel: &mut [u8],
) {
    let layout = const { BlockLayout::of(F::DTYPE).unwrap() };
    for (i, group) in panel.chunks_exact_mut(group_bytes(F::DTYPE)).enumerate() {
        for (j, row) in rows.chunks_exact(row_bytes).enumerate() {
            if let Some(block) = row[i * BYTES..].first_chunk() {
                write_parts(&layout, &F::take_apart(block), lane + j, group);
            }
        }
    }
}

/// Puts one block into one lane of a step, or one super-block into one lane of its header and steps. A function of its own
/// for all formats: only panels that are not whole are packed this way, and a native image is to be small.
#[inline(never)]
fn write_parts<const LEN: usize>(layout: &BlockLayout, parts: &Parts<LEN>, lane: usize, group: &mut [u8]) {
    let (header, steps) = group.split_at_mut(layout.header_bytes());
    if layout.super_blocks {
        header[2 * lane..2 * lane + 2].copy_from_slice(&parts.d.to_le_bytes());
        if layout.minima {
            header[2 * (PANEL + lane)..2 * (PANEL + lane) + 2].copy_from_slice(&parts.m.to_le_bytes());
        }
    }
    let blocks = parts.codes.as_chunks::<BLOCK>().0.iter();
    for (b, (step, codes)) in steps.chunks_exact_mut(layout.step_bytes()).zip(blocks).enumerate() {
        let mut words = [0; QUADS];
        for (quad, codes) in codes.as_chunks().0.iter().enumerate() {
            layout.place(quad, u32::from_le_bytes(*codes), &mut words);
        }
        for (i, word) in words[..layout.words()].iter().enumerate() {
            let at = i * WORD_BYTES + 4 * lane;
            step[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        for sub in 0..layout.sub_blocks {
            let (scale, minimum) = (layout.scales_offset(sub), layout.minima_offset(sub));
            if layout.super_blocks {
                step[scale + lane] = parts.scales[b * layout.sub_blocks + sub];
                if layout.minima {
                    step[minimum + lane] = parts.minima[b * layout.sub_blocks + sub];
                }
            } else {
                step[scale + 2 * lane..scale + 2 * lane + 2].copy_from_slice(&parts.d.to_le_bytes());
                if layout.minima {
                    step[minimum + 2 * lane..minimum + 2 * lane + 2].copy_from_slice(&parts.m.to_le_bytes());
                }
            }
        }
    }
}

/// What [`write_parts`] put into `lane`.
fn read_parts<const LEN: usize>(layout: &BlockLayout, lane: usize, group: &[u8]) -> Parts<LEN> {
    let mut parts = Parts::ZERO;
    let (header, steps) = group.split_at(layout.header_bytes());
    if layout.super_blocks {
        parts.d = u16::from_le_bytes(field(header, 2 * lane));
        if layout.minima {
            parts.m = u16::from_le_bytes(field(header, 2 * (PANEL + lane)));
        }
    }
    let blocks = parts.codes.as_chunks_mut::<BLOCK>().0.iter_mut();
    for (b, (step, codes)) in steps.chunks_exact(layout.step_bytes()).zip(blocks).enumerate() {
        for (quad, codes) in codes.as_chunks_mut().0.iter_mut().enumerate() {
            let word = |word| u32::from_le_bytes(field(step, word * WORD_BYTES + 4 * lane));
            *codes = layout.codes(quad, word).to_le_bytes();
        }
        for sub in 0..layout.sub_blocks {
            let (scale, minimum) = (layout.scales_offset(sub), layout.minima_offset(sub));
            if layout.super_blocks {
                parts.scales[b * layout.sub_blocks + sub] = step[scale + lane];
                if layout.minima {
                    parts.minima[b * layout.sub_blocks + sub] = step[minimum + lane];
                }
            } else {
                parts.d = u16::from_le_bytes(field(step, scale + 2 * lane));
                if layout.minima {
                    parts.m = u16::from_le_bytes(field(step, minimum + 2 * lane));
                }
            }
        }
    }
    parts
}

/// The file row that [`pack_rows`] put into `column` of a packed matrix, as bytes of the packed type (BF16 as F32).
///
/// # Panics
/// When `row` is not the length of a file row of `k` elements, or `packed` is too short.
pub fn unpack_column(dtype: DType, k: usize, map: ColumnMap, column: usize, packed: &[u8], row: &mut [u8]) {
    let row_bytes = TensorType::from(dtype).row_bytes(k as u64);
    assert_eq!(Some(row.len() as u64), row_bytes, "bytes of a {dtype} row of {k} elements");
    let (panel, lane) = map.place(column);
    let panel_bytes = panel_bytes(dtype, k);
    let panel = &packed[panel * panel_bytes..][..panel_bytes];
    if dtype.is_quantised() {
        with_block_format!(dtype, unpack_lane(lane, panel, row));
        return;
    }
    let bytes = step_bytes(dtype) / PANEL;
    for (step, element) in panel.chunks_exact(step_bytes(dtype)).zip(row.chunks_exact_mut(bytes)) {
        element.copy_from_slice(&step[bytes * lane..][..bytes]);
    }
}

fn unpack_lane<F: BlockFormat<LEN, BYTES>, const LEN: usize, const BYTES: usize>(
    lane: usize,
    panel: &[u8],
    row: &mut [u8],
) {
    let layout = const { BlockLayout::of(F::DTYPE).unwrap() };
    for (group, block) in panel.chunks_exact(group_bytes(F::DTYPE)).zip(row.as_chunks_mut().0) {
        *block = F::put_together(&read_parts(&layout, lane, group));
    }
}

/// One column of a packed matrix as f32, as [`Parts`] says: `w = d * (q - offset)`, `+ m` for types with minima, each
/// operation rounded on its own.
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
        _ => {
            let Some(layout) = BlockLayout::of(dtype) else { return };
            let groups = panel.chunks_exact(group_bytes(dtype));
            if layout.super_blocks {
                dequantise_lane::<{ SUPER * BLOCK }>(&layout, lane, groups, out);
            } else {
                dequantise_lane::<BLOCK>(&layout, lane, groups, out);
            }
        }
    }
}

fn dequantise_lane<const LEN: usize>(
    layout: &BlockLayout,
    lane: usize,
    groups: core::slice::ChunksExact<'_, u8>,
    out: &mut [f32],
) {
    for (group, out) in groups.zip(out.as_chunks_mut().0) {
        *out = read_parts::<LEN>(layout, lane, group).values(layout);
    }
}

/// The `N` bytes at `at`.
#[inline(always)]
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
