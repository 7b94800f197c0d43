//! Formats without blocks: F32, F16 and BF16.

use super::{LINE, Rows, stream_line};
use core::arch::x86_64::*;
use model::layout::PANEL;

#[target_feature(enable = "avx2")]
pub(super) unsafe fn pack_f32(rows: Rows, k: usize, panel: *mut u8) {
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
pub(super) unsafe fn pack_u16<const WIDEN: bool>(rows: Rows, k: usize, panel: *mut u8) {
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
