//! Packing a whole panel with in-register transposes, at the speed of memory.
//!
//! Packed weights are read next when the model runs, long after they have left the caches. So they are written past these,
//! each cache line as a whole by consecutive stores, which saves reading it first. And because 32 short rows at a time are too
//! little for the hardware's prefetchers, the rows of the panel behind can be fetched while one is packed; where they are in
//! the second-level cache already, that only costs time.

use super::Avx2;
use crate::pack::RowFormat;
use core::arch::x86_64::*;
use model::layout::{PANEL, WEIGHT_ALIGN, panel_bytes, scales_offset, step_bytes};

/// Bytes of a cache line.
const LINE: usize = 64;
const _: () = assert!(WEIGHT_ALIGN.is_multiple_of(LINE));

/// Packs the 32 `rows` of one panel. With `fetch_behind`, as many bytes behind them are fetched meanwhile.
///
/// # Panics
/// When `rows` is not 32 whole rows, or `panel` does not begin at a cache line or is not their panel.
pub(crate) fn pack_panel(_: Avx2, format: RowFormat, rows: &[u8], fetch_behind: bool, panel: &mut [u8]) {
    let row_bytes = rows.len() / PANEL;
    let k = row_bytes / format.row_bytes(format.block_elements()) * format.block_elements();
    assert_eq!(rows.len(), PANEL * format.row_bytes(k), "rows of one panel");
    assert_eq!(panel.len(), panel_bytes(format.dtype(), k), "a panel of {k} steps");
    assert!(panel.as_ptr().addr().is_multiple_of(LINE), "packed weights begin at a cache line");
    let rows = Rows { first: rows.as_ptr(), row_bytes, fetch_behind };
    let panel = panel.as_mut_ptr();
    // SAFETY: `Avx2` proves the features. The functions read `row_bytes` bytes of each of the 32 rows and write the panel,
    // which is as long as they say and begins at a cache line.
    unsafe {
        match format {
            RowFormat::F32 => pack_f32(rows, k, panel),
            RowFormat::F16 => pack_u16::<false>(rows, k, panel),
            RowFormat::Bf16 => pack_u16::<true>(rows, k, panel),
            RowFormat::Q8_0 => pack_blocks::<34, 2, 2>(rows, panel, format),
            RowFormat::Q4_0 => pack_blocks::<18, 2, 1>(rows, panel, format),
            RowFormat::Q4_1 => pack_blocks::<20, 4, 1>(rows, panel, format),
            _ => unreachable!("{format:?} is packed lane by lane"),
        }
    }
    // Other cores may read the panel next; stores past the caches are ordered by this only.
    // SAFETY: part of SSE, which every x86-64 CPU has.
    unsafe { _mm_sfence() };
}

/// The rows of a panel.
#[derive(Clone, Copy)]
struct Rows {
    first: *const u8,
    row_bytes: usize,
    fetch_behind: bool,
}

impl Rows {
    /// Address of byte `at` of row `row`.
    ///
    /// # Safety
    /// It is in the rows.
    #[inline(always)]
    unsafe fn at(self, row: usize, at: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { self.first.add(row * self.row_bytes + at) }
    }

    /// Fetches the lines of `from..to` (offsets in bytes) behind the rows, which may not exist.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn fetch_behind(self, from: usize, to: usize) {
        if self.fetch_behind {
            let behind = self.first.wrapping_add(PANEL * self.row_bytes);
            for line in (from.next_multiple_of(LINE)..to).step_by(LINE) {
                _mm_prefetch::<_MM_HINT_T1>(behind.wrapping_add(line).cast());
            }
        }
    }
}

/// Writes a whole cache line past the caches.
///
/// # Safety
/// `at` is 64 bytes at a cache line.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn stream_line(at: *mut u8, [low, high]: [__m256i; 2]) {
    // SAFETY: the caller's.
    unsafe {
        _mm256_stream_si256(at.cast(), low);
        _mm256_stream_si256(at.add(LINE / 2).cast(), high);
    }
}

#[target_feature(enable = "avx2")]
unsafe fn pack_f32(rows: Rows, k: usize, panel: *mut u8) {
    let whole = k / 8 * 8;
    for k0 in (0..whole).step_by(16) {
        let k_end = (k0 + 16).min(whole);
        rows.fetch_behind(PANEL * 4 * k0, PANEL * 4 * k_end);
        for lane in (0..PANEL).step_by(16) {
            // Eight and eight elements of a row's cache line in turn: the rows of many shapes share few sets of the cache.
            for k0 in (k0..k_end).step_by(8) {
                // SAFETY: rows `lane..lane + 16` have `4 k` bytes and `k0 + 8 <= k`; step `k0 + i` of the panel is 128
                // bytes, of which these lanes are one line.
                unsafe {
                    let eight = |lane: usize| {
                        transpose8(core::array::from_fn(|i| _mm256_loadu_ps(rows.at(lane + i, 4 * k0).cast())))
                    };
                    for (i, (low, high)) in eight(lane).into_iter().zip(eight(lane + 8)).enumerate() {
                        let at = panel.add((k0 + i) * 4 * PANEL + 4 * lane);
                        stream_line(at, [_mm256_castps_si256(low), _mm256_castps_si256(high)]);
                    }
                }
            }
        }
    }
    for k in whole..k {
        for lane in 0..PANEL {
            // SAFETY: as above, element by element.
            unsafe {
                let element = rows.at(lane, 4 * k).cast::<u32>().read_unaligned();
                panel.add((k * PANEL + lane) * 4).cast::<u32>().write_unaligned(element);
            }
        }
    }
}

/// Transposes an 8x8 matrix of 32-bit elements.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    let pair = |i: usize| (_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1]));
    let (p0, p1, p2, p3) = (pair(0), pair(2), pair(4), pair(6));
    let low = [
        _mm256_shuffle_ps::<0x44>(p0.0, p1.0),
        _mm256_shuffle_ps::<0xee>(p0.0, p1.0),
        _mm256_shuffle_ps::<0x44>(p0.1, p1.1),
        _mm256_shuffle_ps::<0xee>(p0.1, p1.1),
    ];
    let high = [
        _mm256_shuffle_ps::<0x44>(p2.0, p3.0),
        _mm256_shuffle_ps::<0xee>(p2.0, p3.0),
        _mm256_shuffle_ps::<0x44>(p2.1, p3.1),
        _mm256_shuffle_ps::<0xee>(p2.1, p3.1),
    ];
    core::array::from_fn(|i| {
        if i < 4 {
            _mm256_permute2f128_ps::<0x20>(low[i], high[i])
        } else {
            _mm256_permute2f128_ps::<0x31>(low[i - 4], high[i - 4])
        }
    })
}

/// F16 (copied) and BF16 (widened to f32 by 16 zero bits).
#[target_feature(enable = "avx2")]
unsafe fn pack_u16<const WIDEN: bool>(rows: Rows, k: usize, panel: *mut u8) {
    let element_bytes = if WIDEN { 4 } else { 2 };
    let whole = k / 8 * 8;
    for k0 in (0..whole).step_by(8) {
        rows.fetch_behind(PANEL * 2 * k0, PANEL * 2 * (k0 + 8));
        // SAFETY: all 32 rows have `2 k` bytes and `k0 + 8 <= k`; a step is 32 elements, one line or two.
        unsafe {
            let eight = |lane: usize| {
                transpose8_u16(core::array::from_fn(|i| _mm_loadu_si128(rows.at(lane + i, 2 * k0).cast())))
            };
            let (a, b, c, d) = (eight(0), eight(8), eight(16), eight(24));
            for i in 0..8 {
                let at = panel.add((k0 + i) * PANEL * element_bytes);
                if WIDEN {
                    let widened = |column: __m128i| _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(column));
                    stream_line(at, [widened(a[i]), widened(b[i])]);
                    stream_line(at.add(LINE), [widened(c[i]), widened(d[i])]);
                } else {
                    stream_line(at, [_mm256_set_m128i(b[i], a[i]), _mm256_set_m128i(d[i], c[i])]);
                }
            }
        }
    }
    for k in whole..k {
        for lane in 0..PANEL {
            // SAFETY: as above, element by element.
            unsafe {
                let element = rows.at(lane, 2 * k).cast::<u16>().read_unaligned();
                let at = panel.add((k * PANEL + lane) * element_bytes);
                if WIDEN {
                    at.cast::<u32>().write_unaligned(u32::from(element) << 16);
                } else {
                    at.cast::<u16>().write_unaligned(element);
                }
            }
        }
    }
}

/// Transposes an 8x8 matrix of 16-bit elements.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose8_u16(r: [__m128i; 8]) -> [__m128i; 8] {
    let low = |i: usize| _mm_unpacklo_epi16(r[i], r[i + 1]);
    let high = |i: usize| _mm_unpackhi_epi16(r[i], r[i + 1]);
    // Columns 0..4 (low) and 4..8 (high) of row pairs, then of row quadruples.
    let quad = |a: __m128i, b: __m128i| (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
    let (a01, a23) = quad(low(0), low(2));
    let (a45, a67) = quad(high(0), high(2));
    let (b01, b23) = quad(low(4), low(6));
    let (b45, b67) = quad(high(4), high(6));
    [
        _mm_unpacklo_epi64(a01, b01),
        _mm_unpackhi_epi64(a01, b01),
        _mm_unpacklo_epi64(a23, b23),
        _mm_unpackhi_epi64(a23, b23),
        _mm_unpacklo_epi64(a45, b45),
        _mm_unpackhi_epi64(a45, b45),
        _mm_unpacklo_epi64(a67, b67),
        _mm_unpackhi_epi64(a67, b67),
    ]
}

/// Quantised blocks of `BLOCK_BYTES`, whose quants are `SIXTEENS` times 16 bytes from offset `QUANTS` on.
#[target_feature(enable = "avx2")]
unsafe fn pack_blocks<const BLOCK_BYTES: usize, const QUANTS: usize, const SIXTEENS: usize>(
    rows: Rows,
    panel: *mut u8,
    format: RowFormat,
) {
    let step_bytes = step_bytes(format.dtype());
    let scales = scales_offset(format.dtype());
    for block in 0..rows.row_bytes / BLOCK_BYTES {
        rows.fetch_behind(PANEL * BLOCK_BYTES * block, PANEL * BLOCK_BYTES * (block + 1));
        // SAFETY: every row has `row_bytes / BLOCK_BYTES` blocks and the panel as many steps; all offsets below stay
        // inside the block and the step, which is whole lines.
        unsafe {
            let source = |lane: usize, at: usize| rows.at(lane, block * BLOCK_BYTES + at);
            let step = panel.add(block * step_bytes);
            for lane in (0..PANEL).step_by(16) {
                for sixteen in 0..SIXTEENS {
                    // Rows i and i + 4 share a register, so that a 4x4 transpose within each half yields 8 lanes in order.
                    let eight = |lane: usize| {
                        transpose4_halves(core::array::from_fn(|i| {
                            let low = source(lane + i, QUANTS + 16 * sixteen).cast();
                            let high = source(lane + i + 4, QUANTS + 16 * sixteen).cast();
                            _mm256_castsi256_ps(_mm256_loadu2_m128i(high, low))
                        }))
                    };
                    for (i, (low, high)) in eight(lane).into_iter().zip(eight(lane + 8)).enumerate() {
                        let at = step.add((4 * sixteen + i) * 4 * PANEL + 4 * lane);
                        stream_line(at, [_mm256_castps_si256(low), _mm256_castps_si256(high)]);
                    }
                }
            }
            // The block's first four bytes: d, and m or quants.
            let eight = |lane: usize| {
                let word = |i: usize| source(lane + i, 0).cast::<i32>().read_unaligned();
                let half = |i: usize| _mm_set_epi32(word(i + 3), word(i + 2), word(i + 1), word(i));
                _mm256_set_m128i(half(4), half(0))
            };
            // Packing works within halves, so its eight-byte pieces come as 0 2 1 3.
            let sixteen = |a: __m256i, b: __m256i| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
            let words = [eight(0), eight(8), eight(16), eight(24)];
            let low = words.map(|w| _mm256_blend_epi16::<0b1010_1010>(w, _mm256_setzero_si256()));
            stream_line(step.add(scales), [sixteen(low[0], low[1]), sixteen(low[2], low[3])]);
            if QUANTS == 4 {
                let high = words.map(|w| _mm256_srli_epi32::<16>(w));
                stream_line(step.add(scales + LINE), [sixteen(high[0], high[1]), sixteen(high[2], high[3])]);
            }
        }
    }
}

/// Transposes the 4x4 matrices of 32-bit elements in the lower and in the upper halves.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose4_halves(r: [__m256; 4]) -> [__m256; 4] {
    let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
    let (c, d) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
    [
        _mm256_shuffle_ps::<0x44>(a, c),
        _mm256_shuffle_ps::<0xee>(a, c),
        _mm256_shuffle_ps::<0x44>(b, d),
        _mm256_shuffle_ps::<0xee>(b, d),
    ]
}
