//! Packing a whole panel with in-register transposes, so that both file rows and panel are read and written in runs.

use super::Avx2;
use crate::pack::RowFormat;
use core::arch::x86_64::*;
use model::layout::{PANEL, panel_bytes, scales_offset, step_bytes};

/// Packs 32 rows of `row_bytes` bytes each into `panel`.
///
/// # Panics
/// When `rows` or `panel` is not exactly as long as 32 rows need.
pub(crate) fn pack_panel(_: Avx2, format: RowFormat, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    let k = row_bytes / format.row_bytes(format.block_elements()) * format.block_elements();
    assert_eq!(rows.len(), PANEL * row_bytes);
    assert_eq!(panel.len(), panel_bytes(format.dtype(), k));
    assert_eq!(format.row_bytes(k), row_bytes);
    let (rows, panel) = (rows.as_ptr(), panel.as_mut_ptr());
    // SAFETY: `Avx2` proves the features. The functions read `row_bytes` bytes of each of the 32 rows and write
    // `panel_bytes` bytes of the panel, which are the lengths just checked.
    unsafe {
        match format {
            RowFormat::F32 => pack_f32(rows, row_bytes, k, panel),
            RowFormat::F16 => pack_u16::<false>(rows, row_bytes, k, panel),
            RowFormat::Bf16 => pack_u16::<true>(rows, row_bytes, k, panel),
            RowFormat::Q8_0 => pack_blocks::<34, 2, 2>(rows, row_bytes, panel, format),
            RowFormat::Q4_0 => pack_blocks::<18, 2, 1>(rows, row_bytes, panel, format),
            RowFormat::Q4_1 => pack_blocks::<20, 4, 1>(rows, row_bytes, panel, format),
            _ => unreachable!("{format:?} is packed lane by lane"),
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn pack_f32(rows: *const u8, row_bytes: usize, k: usize, panel: *mut u8) {
    let whole = k / 8 * 8;
    for k0 in (0..whole).step_by(8) {
        for lane in (0..PANEL).step_by(8) {
            // SAFETY: rows `lane..lane + 8` have `4 k` bytes and `k0 + 8 <= k`; step `k0 + i` of the panel is 128 bytes.
            unsafe {
                let source = rows.add(lane * row_bytes + 4 * k0);
                let row = |i: usize| _mm256_loadu_ps(source.add(i * row_bytes).cast());
                let columns = transpose8(core::array::from_fn(row));
                for (i, column) in columns.into_iter().enumerate() {
                    _mm256_storeu_ps(panel.add((k0 + i) * 4 * PANEL + 4 * lane).cast(), column);
                }
            }
        }
    }
    for k in whole..k {
        for lane in 0..PANEL {
            // SAFETY: as above, element by element.
            unsafe {
                let element = rows.add(lane * row_bytes + 4 * k).cast::<u32>().read_unaligned();
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
unsafe fn pack_u16<const WIDEN: bool>(rows: *const u8, row_bytes: usize, k: usize, panel: *mut u8) {
    let element_bytes = if WIDEN { 4 } else { 2 };
    let whole = k / 8 * 8;
    for k0 in (0..whole).step_by(8) {
        for lane in (0..PANEL).step_by(8) {
            // SAFETY: rows `lane..lane + 8` have `2 k` bytes and `k0 + 8 <= k`; a step is 32 elements.
            unsafe {
                let source = rows.add(lane * row_bytes + 2 * k0);
                let row = |i: usize| _mm_loadu_si128(source.add(i * row_bytes).cast());
                let columns = transpose8_u16(core::array::from_fn(row));
                for (i, column) in columns.into_iter().enumerate() {
                    let at = panel.add(((k0 + i) * PANEL + lane) * element_bytes);
                    if WIDEN {
                        _mm256_storeu_si256(at.cast(), _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(column)));
                    } else {
                        _mm_storeu_si128(at.cast(), column);
                    }
                }
            }
        }
    }
    for k in whole..k {
        for lane in 0..PANEL {
            // SAFETY: as above, element by element.
            unsafe {
                let element = rows.add(lane * row_bytes + 2 * k).cast::<u16>().read_unaligned();
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
    rows: *const u8,
    row_bytes: usize,
    panel: *mut u8,
    format: RowFormat,
) {
    let step_bytes = step_bytes(format.dtype());
    let scales = scales_offset(format.dtype());
    for block in 0..row_bytes / BLOCK_BYTES {
        // SAFETY: every row has `row_bytes / BLOCK_BYTES` blocks and the panel as many steps; all offsets below stay
        // inside the block and the step.
        unsafe {
            let source = rows.add(block * BLOCK_BYTES);
            let step = panel.add(block * step_bytes);
            for lane in (0..PANEL).step_by(8) {
                for sixteen in 0..SIXTEENS {
                    let source = source.add(lane * row_bytes + QUANTS + 16 * sixteen);
                    // Rows i and i + 4 share a register, so that a 4x4 transpose within each half yields 8 lanes in order.
                    let rows: [__m256; 4] = core::array::from_fn(|i| {
                        let low = source.add(i * row_bytes).cast();
                        let high = source.add((i + 4) * row_bytes).cast();
                        _mm256_castsi256_ps(_mm256_loadu2_m128i(high, low))
                    });
                    for (i, group) in transpose4_halves(rows).into_iter().enumerate() {
                        let at = step.add((4 * sixteen + i) * 4 * PANEL + 4 * lane);
                        _mm256_storeu_ps(at.cast(), group);
                    }
                }
            }
            for lane in 0..PANEL {
                let block = source.add(lane * row_bytes).cast::<u16>();
                step.add(scales + 2 * lane).cast::<u16>().write_unaligned(block.read_unaligned());
                if QUANTS == 4 {
                    let mins = step.add(scales + 2 * PANEL + 2 * lane).cast::<u16>();
                    mins.write_unaligned(block.add(1).read_unaligned());
                }
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
