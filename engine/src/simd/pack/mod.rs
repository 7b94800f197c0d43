//! Packing a whole panel with in-register transposes, at the speed of memory.
//!
//! Packed weights are read next when the model runs, long after they have left the caches. So they are written past these,
//! each cache line as a whole by consecutive stores, which saves reading it first. And because 32 short rows at a time are too
//! little for the hardware's prefetchers, the rows of the panel behind can be fetched while one is packed; where they are in
//! the second-level cache already, that only costs time.
//!
//! Here is what all formats share; [`elements`], [`blocks`] and [`super_blocks`] each know where the bits of theirs are.

mod blocks;
mod elements;
mod super_blocks;

use super::Avx2;
use crate::pack::RowFormat;
use core::arch::x86_64::*;
use model::layout::{BlockLayout, PANEL, WEIGHT_ALIGN, panel_bytes};

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
        match (BlockLayout::of(format.dtype()), format) {
            (Some(layout), _) if layout.super_blocks => super_blocks::pack_super_blocks(rows, panel, format, &layout),
            (Some(layout), _) => blocks::pack_blocks(rows, panel, format, &layout),
            (None, RowFormat::F32) => elements::pack_f32(rows, k, panel),
            (None, RowFormat::F16) => elements::pack_u16::<false>(rows, k, panel),
            (None, RowFormat::Bf16) => elements::pack_u16::<true>(rows, k, panel),
            (None, _) => unreachable!("{format:?} is packed lane by lane"),
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

/// Transposes four words of every row: those of row `lane` are 16 bytes at `source(lane)`, and word `i` of all rows goes to
/// `word(i)`.
///
/// # Safety
/// The 16 bytes are readable, and `word(i)` is `WORD_BYTES` bytes at a cache line.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn stream_words(source: impl Fn(usize) -> *const u8, word: impl Fn(usize) -> *mut u8) {
    for lane in (0..PANEL).step_by(16) {
        // SAFETY: the caller's; 16 lanes of a word are one line.
        unsafe {
            // Rows i and i + 4 share a register, so that a 4x4 transpose within each half yields 8 lanes in order.
            let eight = |lane: usize| {
                transpose4_halves(core::array::from_fn(|i| {
                    let (low, high) = (source(lane + i).cast(), source(lane + i + 4).cast());
                    _mm256_castsi256_ps(_mm256_loadu2_m128i(high, low))
                }))
            };
            for (i, (low, high)) in eight(lane).into_iter().zip(eight(lane + 8)).enumerate() {
                stream_line(word(i).add(4 * lane), [_mm256_castps_si256(low), _mm256_castps_si256(high)]);
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

/// One word of every row, in order: that of row `lane` is at `source(lane)`.
///
/// # Safety
/// The four bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn gather_words(source: impl Fn(usize) -> *const u8) -> [__m256i; 4] {
    core::array::from_fn(|i| {
        // SAFETY: the caller's.
        let word = |lane: usize| unsafe { source(8 * i + lane).cast::<i32>().read_unaligned() };
        _mm256_set_epi32(word(7), word(6), word(5), word(4), word(3), word(2), word(1), word(0))
    })
}

/// The lower halves of 32 words.
#[inline]
#[target_feature(enable = "avx2")]
fn low_halves(words: [__m256i; 4]) -> [__m256i; 2] {
    let [a, b, c, d] = words.map(|w| _mm256_blend_epi16::<0b1010_1010>(w, _mm256_setzero_si256()));
    // Packing works within halves, so its eight-byte pieces come as 0 2 1 3.
    let sixteen = |a: __m256i, b: __m256i| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
    [sixteen(a, b), sixteen(c, d)]
}

/// The upper halves of 32 words.
#[inline]
#[target_feature(enable = "avx2")]
fn high_halves(words: [__m256i; 4]) -> [__m256i; 2] {
    low_halves(words.map(|w| _mm256_srli_epi32::<16>(w)))
}
