//! Formats with blocks of 32 elements: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1. Their low bits are in words as the file has them.

use super::{LINE, Rows, gather_words, high_halves, low_halves, stream_line, stream_words};
use crate::pack::RowFormat;
use core::arch::x86_64::*;
use model::layout::{BLOCK, BlockLayout, PANEL, WORD_BYTES};

/// Packs rows of blocks of one of these formats: d (f16), in some m (f16), in some a word of fifth bits, then the quants.
///
/// # Safety
/// The rows are whole blocks of `format`, whose layout is `layout`, and `panel` is their panel.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn pack_blocks(rows: Rows, panel: *mut u8, format: RowFormat, layout: &BlockLayout) {
    let block_bytes = format.row_bytes(BLOCK);
    let factors_bytes = if layout.minima { 4 } else { 2 };
    let (low_words, scales) = (layout.low_words(), layout.scales_offset(0));
    let quants = block_bytes - 4 * low_words;
    for block in 0..rows.row_bytes / block_bytes {
        rows.fetch_behind(PANEL * block_bytes * block, PANEL * block_bytes * (block + 1));
        // SAFETY: every row has `row_bytes / block_bytes` blocks and the panel as many steps; all offsets below stay
        // inside the block and the step, which is whole lines.
        unsafe {
            let source = |lane: usize, at: usize| rows.at(lane, block * block_bytes + at);
            let step = panel.add(block * layout.step_bytes());
            for first in (0..low_words).step_by(4) {
                stream_words(|lane| source(lane, quants + 4 * first), |word| step.add((first + word) * WORD_BYTES));
            }
            if layout.high_bits > 0 {
                let [a, b, c, d] = gather_words(|lane| source(lane, factors_bytes)).map(|bits| fifth_bits(bits));
                let word = step.add(low_words * WORD_BYTES);
                stream_line(word, [a, b]);
                stream_line(word.add(LINE), [c, d]);
            }
            // d, and m or whatever is behind it.
            let words = gather_words(|lane| source(lane, 0));
            stream_line(step.add(scales), low_halves(words));
            if layout.minima {
                stream_line(step.add(scales + LINE), high_halves(words));
            }
        }
    }
}

/// The bits of 32 elements in the order of a word that has one of each quad's four in each of its bytes: bit `4 s + t` of
/// every word becomes bit `8 t + s`.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(bits: __m256i) -> __m256i {
    // With s2 s1 s0 t1 t0 as the binary digits of a bit's number, each line exchanges two digits.
    let bits = swap_bits::<14>(bits, 0x0000_cccc);
    let bits = swap_bits::<7>(bits, 0x00aa_00aa);
    let bits = swap_bits::<2>(bits, 0x0c0c_0c0c);
    swap_bits::<1>(bits, 0x2222_2222)
}

/// Exchanges the bits of `mask` in every word with those `DISTANCE` above them.
#[inline]
#[target_feature(enable = "avx2")]
fn swap_bits<const DISTANCE: i32>(words: __m256i, mask: i32) -> __m256i {
    let above = _mm256_srli_epi32::<DISTANCE>(words);
    let differ = _mm256_and_si256(_mm256_xor_si256(words, above), _mm256_set1_epi32(mask));
    _mm256_xor_si256(words, _mm256_xor_si256(differ, _mm256_slli_epi32::<DISTANCE>(differ)))
}
