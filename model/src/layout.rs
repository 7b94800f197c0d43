//! Byte layout of packed weights and of activations: the contract between `engine` (which packs), the hand-written
//! ops and the compiled kernels (which read).
//!
//! Weights are stored in *panels* of [`PANEL`] output columns. Inside a panel the sum index `k` runs slowest, so
//! a kernel reads each panel as one sequential stream, and each vector lane is one output column: no horizontal
//! reduction exists anywhere. `N` is padded to a whole panel with zero weights.
//!
//! ```text
//! F32   per k:             32 x f32                                  128 B
//! F16   per k:             32 x f16                                   64 B
//! Q8_0  per block of 32 k: 8 x [32 columns x 4 i8] , 32 x f16 d     1088 B
//! Q4_0  per block of 32 k: 4 x [32 columns x 4 B ] , 32 x f16 d      576 B
//! Q4_1  per block of 32 k: 4 x [32 columns x 4 B ] , 32 x f16 d, 32 x f16 m   640 B
//! ```
//!
//! In a 4-byte group of column `c`, step `s`: Q8_0 holds `q[4s..4s+4]`; Q4 holds four bytes whose low nibbles are
//! `q[4s..4s+4]` and whose high nibbles are `q[16+4s..16+4s+4]` (the pairing of the GGUF block, unchanged).
//!
//! For [`Op::GateUpSilu`] and [`Op::GateUpGelu`] gate and up panels alternate: panel `2p` is gate columns `32p..`,
//! panel `2p+1` the same up columns. For `Qkv` the three matrices' columns are concatenated before panels are cut.
//!
//! Activations: for F32/F16 weights row `r` is `k` f32 values at byte `r * 4k`. For quantised weights it is `k/32`
//! blocks of [`XBLOCK_BYTES`] at byte `r * 48 (k/32)`, each as the `XBLOCK_*` offsets say.
//! Outputs are f32, row-major, with a row stride (`ldy`) of at least `n` rounded up to [`PANEL`]; kernels write the
//! padding columns.
//!
//! KV cache: for each layer and kv head, blocks of [`KV_BLOCK`] positions, each block
//!
//! ```text
//! keys           2 panels x head_dim x 64 positions
//! values         128 positions x head_dim
//! key scales     128 x f32    int8 only
//! value scales   128 x f32    int8 only
//! ```
//!
//! with elements of f32, f16 or int8.
//!
//! Sources: GGUF block formats `block_q8_0`, `block_q4_0`, `block_q4_1` of the ggml project.

use crate::kernel::{DType, Op};

/// Output columns in a panel.
pub const PANEL: usize = 32;
/// Elements of `k` in a quantisation block.
pub const BLOCK: usize = 32;
/// Bytes of one quantised activation block.
pub const XBLOCK_BYTES: usize = 48;
/// Offset of the 32 `i8` values `q`.
pub const XBLOCK_QS: usize = 0;
/// Offset of the f32 scale `d` (`x = d * q`).
pub const XBLOCK_D: usize = 32;
/// Offset of the i32 sum of the 32 `q`.
pub const XBLOCK_SUM: usize = 36;
/// Offset of the f32 product `d * sum` (what Q4_1's minimum multiplies).
pub const XBLOCK_DSUM: usize = 40;
/// Positions in a block of the KV cache: the piece of the context whose attention is computed on its own.
pub const KV_BLOCK: usize = 128;
/// Positions in a panel of keys.
pub const KV_PANEL: usize = 64;
/// Alignment of every packed matrix, in bytes.
pub const WEIGHT_ALIGN: usize = 64;

/// Elements of `k` that one step of a panel covers.
pub const fn step_k(dtype: DType) -> usize {
    match dtype {
        DType::F32 | DType::F16 => 1,
        DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => BLOCK,
    }
}

/// Bytes of one step (see the table in the module docs).
pub const fn step_bytes(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4 * PANEL,
        DType::F16 => 2 * PANEL,
        DType::Q8_0 => 8 * 4 * PANEL + 2 * PANEL,
        DType::Q4_0 => 4 * 4 * PANEL + 2 * PANEL,
        DType::Q4_1 => 4 * 4 * PANEL + 4 * PANEL,
    }
}

/// Offset of the f16 scales inside a step of a quantised type.
pub const fn scales_offset(dtype: DType) -> usize {
    match dtype {
        DType::Q8_0 => 8 * 4 * PANEL,
        _ => 4 * 4 * PANEL,
    }
}

/// Offset of the f16 minima inside a Q4_1 step.
pub const MINS_OFFSET: usize = 4 * 4 * PANEL + 2 * PANEL;

/// Panels that cover `n` columns.
pub const fn panels(n: usize) -> usize {
    n.div_ceil(PANEL)
}

/// Columns after padding to whole panels.
pub const fn padded(n: usize) -> usize {
    panels(n) * PANEL
}

/// Bytes of one packed panel of depth `k`.
pub const fn panel_bytes(dtype: DType, k: usize) -> usize {
    k / step_k(dtype) * step_bytes(dtype)
}

/// Bytes of `n` packed columns of depth `k`.
pub const fn packed_len_bytes(dtype: DType, n: usize, k: usize) -> usize {
    panels(n) * panel_bytes(dtype, k)
}

/// Bytes of one activation row of length `k`.
pub const fn x_row_bytes(dtype: DType, k: usize) -> usize {
    match dtype {
        DType::F32 | DType::F16 => 4 * k,
        DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => k / BLOCK * XBLOCK_BYTES,
    }
}

/// Bytes of packed weights for `n` output columns of `op`.
pub const fn op_weight_bytes(op: Op, dtype: DType, n: usize, k: usize) -> usize {
    let factor = if op.is_gated() { 2 } else { 1 };
    factor * packed_len_bytes(dtype, n, k)
}
