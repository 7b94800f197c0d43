//! Pseudo-random operands of an op, in the packed layouts: what kernels are verified and, without captured inputs, timed on.
//!
//! The values cover what real ones do and what they rarely do: quants over their whole range, zero and negative
//! scales, zero activations, and activations at both ends of the int8 range.

use crate::math::{quantise_activations, widen_codes};
use crate::random::SplitMix64;
use crate::simd::Level;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::{Deref, DerefMut};
use half::f16;
use model::kernel::{DType, KernelKey};
use model::layout::{
    BLOCK, BlockLayout, WEIGHT_ALIGN, XBLOCK_DSUM, XBLOCK_SUM, XBLOCK_SUM_LOW, group_bytes, op_weight_bytes,
    panel_bytes, x_row_bytes,
};

/// Heap bytes whose start is aligned as packed weights must be.
#[derive(Debug)]
pub struct AlignedBytes {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let bytes = vec![0u8; len + WEIGHT_ALIGN];
        let start = bytes.as_ptr().align_offset(WEIGHT_ALIGN);
        Self { bytes, start, len }
    }

    /// The same bytes at an aligned address.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Panels of random weights before they repeat: making them takes longer than the product. A prime that divides no number
/// of streams, so that a kernel which mixes panels up meets other weights.
const RANDOM_PANELS: usize = 7;

/// Packed weights for `key`, padding columns included.
pub fn random_weights(key: &KernelKey, rng: &mut SplitMix64) -> AlignedBytes {
    let mut w = AlignedBytes::zeroed(op_weight_bytes(key.op, key.dtype, key.n as usize, key.k as usize));
    let own = w.len().min(RANDOM_PANELS * panel_bytes(key.dtype, key.k as usize));
    let (random, copies) = w.split_at_mut(own);
    for group in random.chunks_exact_mut(group_bytes(key.dtype)) {
        match BlockLayout::of(key.dtype) {
            Some(layout) => fill_group(&layout, group, rng),
            None if key.dtype == DType::F16 => fill_f16(group, rng, 1.0),
            None => {
                for w in group.chunks_exact_mut(4) {
                    w.copy_from_slice(&rng.next_bell().to_le_bytes());
                }
            }
        }
    }
    for copy in copies.chunks_mut(own.max(1)) {
        copy.copy_from_slice(&random[..copy.len()]);
    }
    w
}

/// One step of a quantised type, or one super-block of a K type. Codes and 8-bit scales take any value.
fn fill_group(layout: &BlockLayout, group: &mut [u8], rng: &mut SplitMix64) {
    let (header, steps) = group.split_at_mut(layout.header_bytes());
    fill_f16(header, rng, 0.0005);
    for step in steps.chunks_exact_mut(layout.step_bytes()) {
        let random_bytes = if layout.super_blocks { step.len() } else { layout.scales_offset(0) };
        let (bytes, scales) = step.split_at_mut(random_bytes);
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        fill_f16(scales, rng, 0.02);
    }
}

fn fill_f16(out: &mut [u8], rng: &mut SplitMix64, scale: f32) {
    for w in out.chunks_exact_mut(2) {
        w.copy_from_slice(&f16::from_f32(rng.next_bell() * scale).to_le_bytes());
    }
}

/// `m` activation rows for `key`, 4-byte aligned and a little longer than needed at no row's expense.
pub fn random_activations(key: &KernelKey, rng: &mut SplitMix64) -> AlignedBytes {
    let (m, k) = (key.m as usize, key.k as usize);
    let mut x = AlignedBytes::zeroed(m * x_row_bytes(key.dtype, k));
    for (r, row) in x.chunks_exact_mut(x_row_bytes(key.dtype, k)).enumerate() {
        let values: Vec<f32> = (0..k).map(|_| rng.next_bell() * 4.0).collect();
        if key.dtype.is_quantised() {
            quantise_activations(Level::detect(), &values, key.dtype, row);
            extreme_blocks(row, x_row_bytes(key.dtype, BLOCK), r, rng);
        } else {
            for (out, value) in row.chunks_exact_mut(4).zip(values) {
                out.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    x
}

/// Makes some blocks all zero, all 127 or all -127, with the sums that belong to them.
fn extreme_blocks(row: &mut [u8], block_bytes: usize, r: usize, rng: &mut SplitMix64) {
    for (b, block) in row.chunks_exact_mut(block_bytes).enumerate() {
        let q = match (b + r) % 5 {
            1 => 127i8,
            2 if rng.next_u64() & 1 == 0 => -127,
            3 if rng.next_u64() & 3 == 0 => 0,
            _ => continue,
        };
        let d = if q == 0 { 0.0 } else { 0.01 };
        let sum = i32::from(q) * BLOCK as i32;
        block[..BLOCK].fill(q.cast_unsigned());
        block[BLOCK..XBLOCK_SUM].copy_from_slice(&f32::to_le_bytes(d));
        block[XBLOCK_SUM..XBLOCK_DSUM].copy_from_slice(&sum.to_le_bytes());
        block[XBLOCK_DSUM..XBLOCK_DSUM + 4].copy_from_slice(&(d * sum as f32).to_le_bytes());
        block[XBLOCK_SUM_LOW..XBLOCK_SUM_LOW + 4].copy_from_slice(&(sum / 2).to_le_bytes());
        widen_codes(block);
    }
}
