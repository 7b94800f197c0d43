//! What a key and a variant mean in numbers: regions of panels, loop counts, strides, and where accumulators live.
//!
//! Everything that can be refused about a shape or a variant is refused here, before any code is emitted.

use crate::error::JitError;
use alloc::vec::Vec;
use model::kernel::{DType, Dot, KernelKey, M_BUCKETS, Op, Variant, Width};
use model::layout::{
    BLOCK, BlockLayout, PANEL, group_steps, header_bytes, k_multiple, op_weight_bytes, panel_bytes, panels, step_bytes,
    step_k, x_row_bytes,
};

/// Vector registers Cranelift allocates (it knows no zmm16..31).
const VECTOR_REGISTERS: usize = 16;
/// Largest constant displacement a kernel may use.
const MAX_DISPLACEMENT: usize = i32::MAX as usize - (1 << 20);
/// Steps of `k` that one iteration may unroll.
const MAX_UNROLL: u8 = 32;

/// Where the f32 accumulators of a tile are between steps of `k`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Home {
    /// In registers for the whole sum.
    Registers,
    /// In the stack frame (first-level cache); one stream's are in registers while its steps run.
    Frame,
}

/// A run of panels walked by `streams` weight streams side by side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Region {
    /// First panel (of outputs).
    pub(crate) first: usize,
    /// Streams; stream `s` walks panels `first + s * run ..`.
    pub(crate) streams: usize,
    /// Panels in each stream.
    pub(crate) run: usize,
}

/// A key and a variant, checked and worked out.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) op: Op,
    pub(crate) dtype: DType,
    /// Layout of the steps of a quantised type.
    pub(crate) blocks: Option<BlockLayout>,
    pub(crate) width: Width,
    pub(crate) vnni: bool,
    /// Codes of 8 bits are widened to 16.
    pub(crate) halves: bool,
    pub(crate) m: usize,
    /// Steps of `k` (elements, or blocks of 32).
    pub(crate) k_steps: usize,
    /// Steps that share super-scales (1 without), and bytes of these in front of them.
    pub(crate) group_steps: usize,
    pub(crate) header_bytes: usize,
    /// Rows, columns, unroll of one register tile.
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) unroll: usize,
    /// Vectors that cover `columns`.
    pub(crate) vectors: usize,
    /// Weight panels per output panel: 2 for gate and up.
    pub(crate) parts: usize,
    pub(crate) regions: Vec<Region>,
    pub(crate) prefetch_bytes: i32,
    /// Steps of a block of `k`, where all rows go through one block after the other ([`crate::blocked`]).
    pub(crate) k_block: Option<usize>,
    pub(crate) home: Home,
    /// Bytes of one row of `x`, and of one step of it.
    pub(crate) x_row_bytes: usize,
    pub(crate) x_step_bytes: usize,
    /// Bytes of one step of a panel, and of one weight panel.
    pub(crate) step_bytes: usize,
    pub(crate) panel_bytes: usize,
}

impl Plan {
    /// Works out `variant` of `key`.
    ///
    /// # Errors
    /// [`JitError::Shape`] when no variant could do it, [`JitError::Variant`] when this one cannot.
    pub(crate) fn new(key: &KernelKey, variant: &Variant) -> Result<Plan, JitError> {
        let (m, n, k) = (key.m as usize, key.n as usize, key.k as usize);
        let shape = |reason| JitError::Shape { key: *key, reason };
        if !M_BUCKETS.contains(&key.m) {
            return Err(shape("m is not one of the batch buckets"));
        }
        if n == 0 || k == 0 {
            return Err(shape("n and k must be at least 1"));
        }
        if !k.is_multiple_of(k_multiple(key.dtype)) {
            return Err(shape("k of a quantised type must be a multiple of 32, of a K type of 256"));
        }
        let parts = key.op.columns_per_output();
        let bound = |len: Option<usize>| len.is_some_and(|len| len <= MAX_DISPLACEMENT);
        // The packed size is n * k * (at most 8) bytes: bound the factors before multiplying them.
        if !bound(n.checked_mul(k).and_then(|nk| nk.checked_mul(8 * parts)).filter(|_| n < (1 << 28)))
            && !bound((n < (1 << 28) && k < (1 << 28)).then(|| op_weight_bytes(key.op, key.dtype, n, k)))
        {
            return Err(shape("packed weights exceed 2 GiB, the reach of a displacement"));
        }
        let x_row_bytes = x_row_bytes(key.dtype, k);
        if !bound(x_row_bytes.checked_mul(m)) {
            return Err(shape("activations exceed 2 GiB, the reach of a displacement"));
        }

        let refuse = |reason| JitError::Variant { key: *key, variant: *variant, reason };
        let lanes = variant.width.lanes();
        let (rows, columns) = (usize::from(variant.rows), usize::from(variant.columns));
        let (streams, unroll) = (usize::from(variant.streams), usize::from(variant.unroll));
        if columns == 0 || !PANEL.is_multiple_of(columns) || !columns.is_multiple_of(lanes) {
            return Err(refuse("columns must divide a panel of 32 and be whole vectors"));
        }
        if rows == 0 || rows > m {
            return Err(refuse("rows must be 1..=m"));
        }
        if streams == 0 || streams > panels(n) {
            return Err(refuse("streams must be 1..=the number of panels"));
        }
        let k_steps = k / step_k(key.dtype);
        if unroll == 0 || variant.unroll > MAX_UNROLL || unroll > k_steps {
            return Err(refuse("unroll must be 1..=32 and at most the steps of k"));
        }
        let group_steps = group_steps(key.dtype);
        if group_steps > 1 && !group_steps.is_multiple_of(unroll) {
            return Err(refuse("unroll of a K type must divide the 8 blocks of a super-block"));
        }
        let (vnni, halves) = (matches!(variant.dot, Dot::Evex | Dot::Vex), variant.dot == Dot::Halves);
        if vnni && !key.dtype.is_quantised() {
            return Err(refuse("vnni needs a quantised type"));
        }
        if halves && key.dtype != DType::Q8_0 {
            return Err(refuse("halves are for the codes of 8 bits of q8_0"));
        }
        if variant.dot == Dot::Vex && variant.width == Width::Z512 {
            return Err(refuse("AVX-VNNI has no zmm form"));
        }
        if key.dtype == DType::Q8_0 && variant.width == Width::Z512 && variant.dot == Dot::Pairs {
            return Err(refuse("q8_0 at 512 bits needs vnni or halves: vpsignb has no zmm form"));
        }
        let k_block = usize::from(variant.k_block);
        if k_block > 0 {
            if key.dtype.is_quantised() {
                return Err(refuse("blocks of k are for f32 and f16"));
            }
            if m == 1 || streams != 1 || variant.prefetch_bytes != 0 {
                return Err(refuse("blocks of k need several rows, one stream, and no prefetch distance"));
            }
            if !k_steps.is_multiple_of(k_block) || unroll > k_block {
                return Err(refuse("blocks of k must be equal, and no shorter than the unroll"));
            }
        }
        let vectors = columns / lanes;
        let home = home(key.dtype, variant.dot, rows, vectors, streams)
            .ok_or_else(|| refuse("the register tile does not fit 16 vector registers"))?;
        if k_block > 0 && home == Home::Frame {
            return Err(refuse("the register tile of a block of k does not fit 16 vector registers"));
        }
        Ok(Plan {
            op: key.op,
            dtype: key.dtype,
            blocks: BlockLayout::of(key.dtype),
            width: variant.width,
            vnni,
            halves,
            m,
            k_steps,
            group_steps,
            header_bytes: header_bytes(key.dtype),
            rows,
            columns,
            unroll,
            vectors,
            parts,
            regions: regions(panels(n), streams),
            prefetch_bytes: i32::from(variant.prefetch_bytes),
            k_block: (k_block > 0).then_some(k_block),
            home,
            x_row_bytes,
            x_step_bytes: BlockLayout::of(key.dtype).map_or(4, |layout| layout.x_block_bytes()),
            step_bytes: step_bytes(key.dtype),
            panel_bytes: panel_bytes(key.dtype, k),
        })
    }

    /// Whether the `x` of a row of a float tile is an operand in memory of each multiply-add. Only at 512 bits is there such an operand
    /// that is broadcast; there an `x` that has a single user becomes one anyway ([`crate::widen::fold`]).
    pub(crate) fn x_is_operand(&self, row: usize) -> bool {
        self.width == Width::Z512 && self.vectors == 2 && !row.is_multiple_of(2)
    }

    /// Bytes of one vector.
    pub(crate) fn vector_bytes(&self) -> usize {
        self.width.lanes() * 4
    }

    /// Bytes of the weights behind one output panel.
    pub(crate) fn unit_bytes(&self) -> usize {
        self.parts * self.panel_bytes
    }

    /// Accumulators of the largest tile.
    pub(crate) fn accumulators(&self) -> usize {
        let streams = self.regions.iter().map(|r| r.streams).max().unwrap_or(0);
        streams * self.parts * self.rows * self.vectors
    }
}

/// Cuts `panels` into `streams` equal contiguous runs, and what is left over into one short region with fewer streams.
fn regions(panels: usize, streams: usize) -> Vec<Region> {
    let run = panels / streams;
    let left = panels - run * streams;
    let mut regions = Vec::with_capacity(2);
    regions.push(Region { first: 0, streams, run });
    if left > 0 {
        regions.push(Region { first: run * streams, streams: left, run: 1 });
    }
    regions
}

/// Decides where accumulators live, by counting the registers a step needs; `None` if not even one stream's fit.
fn home(dtype: DType, dot: Dot, rows: usize, vectors: usize, streams: usize) -> Option<Home> {
    let tile = rows * vectors;
    let vnni = matches!(dot, Dot::Evex | Dot::Vex);
    // The allocator is not perfect: with many rows in flight it needs room to move (found by random variants).
    let slack = if rows > 1 { 2 } else { 0 };
    // Registers a step needs beside the f32 accumulators of its own stream (`work`), and of all streams.
    let work = match dtype {
        // One row: the broadcast x; weights fold into the fma. More rows: weights stay, x passes through one register.
        DType::F32 => 1 + if rows == 1 { 0 } else { vectors },
        DType::F16 => 1 + if rows == 1 { 1 } else { vectors },
        // Exact block sums, and: both halves of the weights, x, product.
        DType::Q8_0 if dot == Dot::Halves => tile + 2 * vectors + 2 + slack,
        // Exact block sums, and: w, |w|, x, product, ones | w+128, x, flip.
        DType::Q8_0 => tile + if vnni { 3 } else { 5 + slack },
        dtype => {
            let layout = BlockLayout::of(dtype)?;
            // Exact block sums, and: codes, mask, x of each quad of a word, product; for high bits their mask and a word.
            // A word of four quads is needed longer, but its x are loaded again.
            let x = if layout.quads_per_word() == 2 { 2 } else { 1 };
            let high = if layout.high_bits > 0 { 2 } else { 0 };
            // Sums that do not fit 16 bits are widened on the way.
            let widened = if vnni || layout.bits() <= 4 { 0 } else { tile + 1 };
            // Scaling by halves with minima makes two sums of x.
            let halves = usize::from(layout.minima && layout.sub_blocks > 1);
            tile + 3 + x + high + halves + if vnni { 0 } else { 1 + slack / 2 + widened }
        }
    };
    if streams * tile + work <= VECTOR_REGISTERS {
        return Some(Home::Registers);
    }
    // Quantised steps load their f32 accumulators one by one at the end of a block; float steps hold the stream's.
    let held = if dtype.is_quantised() { work } else { tile + work };
    (held <= VECTOR_REGISTERS).then_some(Home::Frame)
}

// The layout's block length is the length of a quantised step.
const _: () = assert!(step_k(DType::Q8_0) == BLOCK);
