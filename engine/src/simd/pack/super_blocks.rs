//! The K types: super-blocks of 256 elements. The file's order of bits suits a row, a step's suits a column, so each row's are
//! put in order first, in registers, and then all rows are transposed.
//!
//! See [`model::quant`] for the order in the file and [`model::layout`] for that in a step.

use super::{LINE, Rows, gather_words, high_halves, low_halves, stream_line, stream_words};
use crate::pack::RowFormat;
use core::arch::x86_64::*;
use core::ops::Range;
use model::layout::{BLOCK, BlockLayout, PANEL, SUPER, WORD_BYTES};

/// Most words of a super-block's codes: Q6_K has six for each step.
const MAX_WORDS: usize = 6 * SUPER;

/// One row's super-block in the order of its steps.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Ordered {
    /// Words of the low bits, behind them those of the high bits; [`place`] says which is which.
    words: [u32; MAX_WORDS],
    /// As [`stream_scales`] wants them.
    scales: [u32; 4],
}

/// Offset in the steps of word `i` of an [`Ordered`] row.
fn place(layout: &BlockLayout, i: usize) -> usize {
    let low = SUPER * layout.low_words();
    let (i, bits, first) =
        if i < low { (i, layout.low_bits, 0) } else { (i - low, layout.high_bits, layout.low_words()) };
    let (step, word) = match bits {
        // As `two_bits` leaves them: four steps' first words, then their second ones.
        2 => (i / 8 * 4 + i % 4, first + i / 4 % 2),
        _ => (i / bits, first + i % bits),
    };
    step * layout.step_bytes() + word * WORD_BYTES
}

/// Packs rows of super-blocks of one of the K types, `layout` being its.
///
/// # Safety
/// The rows are whole super-blocks and not empty, and `panel` is their panel.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn pack_super_blocks(rows: Rows, panel: *mut u8, format: RowFormat, layout: &BlockLayout) {
    let (block_bytes, step_bytes) = (format.row_bytes(SUPER * BLOCK), layout.step_bytes());
    let group_bytes = layout.header_bytes() + SUPER * step_bytes;
    let mut places = [0; MAX_WORDS];
    let places = &mut places[..SUPER * layout.words()];
    places.iter_mut().enumerate().for_each(|(i, at)| *at = place(layout, i));
    let mut buffers = [[Ordered { words: [0; MAX_WORDS], scales: [0; 4] }; PANEL]; 2];
    let [mut ordered, mut next] = buffers.each_mut();
    let order_lanes = |block: usize, lanes: Range<usize>, to: &mut [Ordered]| {
        for (lane, to) in lanes.clone().zip(&mut to[lanes]) {
            let behind = (PANEL * block + lane) * block_bytes;
            rows.fetch_behind(behind, behind + block_bytes);
            // SAFETY: every row has `blocks` blocks of `format`.
            unsafe { order(format, rows.at(lane, block * block_bytes), to) };
        }
    };
    let blocks = rows.row_bytes / block_bytes;
    let lanes_between = PANEL.div_ceil(places.len() / 4);
    order_lanes(0, 0..PANEL, ordered);
    for block in 0..blocks {
        // SAFETY: the panel has as many groups as rows have blocks; all offsets below stay inside the block and the group,
        // whose header and steps are whole lines.
        unsafe {
            let group = panel.add(block * group_bytes);
            let steps = group.add(layout.header_bytes());
            stream_super_scales(format, |lane| rows.at(lane, block * block_bytes), group);
            stream_scales(layout, ordered, |step| steps.add(step * step_bytes + layout.scales_offset(0)));
            for (i, places) in places.as_chunks::<4>().0.iter().enumerate() {
                let words = |lane: usize| ordered[lane].words.as_ptr().add(4 * i).cast();
                stream_words(words, |word| steps.add(places[word]));
                // While these lines are on their way to memory.
                if block + 1 < blocks {
                    let lanes = (i * lanes_between).min(PANEL)..((i + 1) * lanes_between).min(PANEL);
                    order_lanes(block + 1, lanes, next);
                }
            }
        }
        core::mem::swap(&mut ordered, &mut next);
    }
}

/// f16 `d` of every row and, where there are minima, their `m`, which is subtracted in the file and added here.
///
/// # Safety
/// `source(lane)` is a super-block, `group` its header.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn stream_super_scales(format: RowFormat, source: impl Fn(usize) -> *const u8, group: *mut u8) {
    // Of the four bytes that are loaded: d and m, or what is in front of a last d.
    let (at, has_minima) = match format {
        RowFormat::Q2K => (80, true),
        RowFormat::Q3K => (106, false),
        RowFormat::Q6K => (206, false),
        _ => (0, true),
    };
    // SAFETY: the caller's.
    unsafe {
        let words = gather_words(|lane| source(lane).add(at));
        if has_minima {
            stream_line(group, low_halves(words));
            let sign = _mm256_set1_epi16(i16::MIN);
            stream_line(group.add(LINE), high_halves(words).map(|m| _mm256_xor_si256(m, sign)));
        } else {
            stream_line(group, high_halves(words));
        }
    }
}

/// Puts a super-block's codes and scales in order.
///
/// # Safety
/// `block` is one of `format`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn order(format: RowFormat, block: *const u8, to: &mut Ordered) {
    let words = to.words.as_mut_ptr();
    // SAFETY: the offsets are those of the format's parts, and its words fit.
    unsafe {
        to.scales = match format {
            RowFormat::Q2K => {
                two_bits(block.add(16), words);
                block.cast::<[u32; 4]>().read_unaligned()
            }
            RowFormat::Q3K => {
                two_bits(block.add(32), words);
                one_bit(block, words.add(2 * SUPER));
                six_bits(block.add(96))
            }
            RowFormat::Q4K => {
                nibbles(block.add(16), words);
                six_bit_pairs(block.add(4))
            }
            RowFormat::Q5K => {
                nibbles(block.add(48), words);
                one_bit(block.add(16), words.add(4 * SUPER));
                six_bit_pairs(block.add(4))
            }
            _ => {
                nibbles_of_halves(block, words);
                two_bits(block.add(128), words.add(4 * SUPER));
                block.add(192).cast::<[u32; 4]>().read_unaligned()
            }
        };
    }
}

/// The nibbles of Q4_K and Q5_K: 32 bytes of the file are a step in their lower and the next one in their upper halves, 16
/// bytes here are a step's first 16 and, above them, its last 16 elements.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn nibbles(qs: *const u8, words: *mut u32) {
    let low = _mm_set1_epi8(0x0f);
    for pair in 0..SUPER / 2 {
        // SAFETY: 128 bytes of nibbles make 32 words.
        unsafe {
            let first = _mm_loadu_si128(qs.add(32 * pair).cast());
            let last = _mm_loadu_si128(qs.add(32 * pair + 16).cast());
            let even = _mm_or_si128(_mm_and_si128(first, low), _mm_slli_epi16::<4>(_mm_and_si128(last, low)));
            let odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16::<4>(first), low), _mm_andnot_si128(low, last));
            _mm_storeu_si128(words.add(8 * pair).cast(), even);
            _mm_storeu_si128(words.add(8 * pair + 4).cast(), odd);
        }
    }
}

/// The nibbles of Q6_K: of 64 bytes the first and last 32 are two steps in their lower and the second next two in their
/// upper halves; here each word has a quad in its lower and the next one in its upper halves.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn nibbles_of_halves(qs: *const u8, words: *mut u32) {
    let low = _mm256_set1_epi8(0x0f);
    let quads = |codes: __m256i| {
        let paired = _mm256_or_si256(codes, _mm256_srli_epi64::<28>(codes));
        let evens = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
        _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(paired, evens))
    };
    for quarter in 0..4 {
        let step = quarter / 2 * 4 + quarter % 2;
        // SAFETY: 128 bytes of nibbles make 32 words.
        unsafe {
            let both = _mm256_loadu_si256(qs.add(32 * quarter).cast());
            _mm_storeu_si128(words.add(4 * step).cast(), quads(_mm256_and_si256(both, low)));
            let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
            _mm_storeu_si128(words.add(4 * (step + 2)).cast(), quads(upper));
        }
    }
}

/// 64 bytes with two bits of each element: byte `l` of 32 has those of element `l` of four steps. Here byte `t` of a word has
/// those of element `t` of four quads, and there are two words to a step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn two_bits(qs: *const u8, words: *mut u32) {
    // Within each 16 bytes, four words of four fields a byte are transposed: fields by pairs, then one by one.
    let pairs = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x0f0f_0f0f, 0x0f0f_0f0f, -0x0f0f_0f10, -0x0f0f_0f10));
    let single = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x3333_3333, -0x3333_3334, 0x3333_3333, -0x3333_3334));
    let select = |mask: __m256i, own: __m256i, other: __m256i| {
        _mm256_or_si256(_mm256_and_si256(mask, own), _mm256_andnot_si256(mask, other))
    };
    for half in 0..2 {
        // SAFETY: 64 bytes make 16 words.
        unsafe {
            let x = _mm256_loadu_si256(qs.add(32 * half).cast());
            let other = _mm256_shuffle_epi32::<0b01_00_11_10>(x);
            let shifted =
                _mm256_blend_epi32::<0b1100_1100>(_mm256_slli_epi32::<4>(other), _mm256_srli_epi32::<4>(other));
            let x = select(pairs, x, shifted);
            let other = _mm256_shuffle_epi32::<0b10_11_00_01>(x);
            let shifted =
                _mm256_blend_epi32::<0b1010_1010>(_mm256_slli_epi32::<2>(other), _mm256_srli_epi32::<2>(other));
            _mm256_storeu_si256(words.add(8 * half).cast(), select(single, x, shifted));
        }
    }
}

/// 32 bytes with a bit of each element: bit `j` of byte `l` is that of element `l` of step `j`. Here bit `s` of byte `t` of a
/// step's word is that of element `4 s + t`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn one_bit(bits: *const u8, words: *mut u32) {
    let by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    // SAFETY: 32 bytes make 8 words.
    unsafe {
        let bits = _mm256_shuffle_epi8(_mm256_loadu_si256(bits.cast()), by_byte);
        let mut bits = _mm256_permutevar8x32_epi32(bits, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        for step in (0..SUPER).rev() {
            *words.add(step) = _mm256_movemask_epi8(bits).cast_unsigned();
            bits = _mm256_add_epi8(bits, bits);
        }
    }
}

/// Eight scales, then eight minima, of the 12 bytes that Q4_K and Q5_K have for them.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn six_bit_pairs(at: *const u8) -> [u32; 4] {
    // SAFETY: the caller's.
    let [scales, minima, both] = unsafe { at.cast::<[u32; 3]>().read_unaligned() };
    let upper = |x: u32| x >> 2 & 0x3030_3030;
    [
        scales & 0x3f3f_3f3f,
        both & 0x0f0f_0f0f | upper(scales),
        minima & 0x3f3f_3f3f,
        both >> 4 & 0x0f0f_0f0f | upper(minima),
    ]
}

/// 16 scales of the 12 bytes that Q3_K has for them, still without sign.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn six_bits(at: *const u8) -> [u32; 4] {
    // SAFETY: the caller's.
    let [a, b, upper] = unsafe { at.cast::<[u32; 3]>().read_unaligned() };
    let scales = |nibbles: u32, upper: u32| nibbles & 0x0f0f_0f0f | (upper & 0x0303_0303) << 4;
    [scales(a, upper), scales(b, upper >> 2), scales(a >> 4, upper >> 4), scales(b >> 4, upper >> 6)]
}

/// Transposes the scales of all rows; those of step `i` begin at `step(i)`.
///
/// # Safety
/// `step(i)` is as many bytes as the layout has for scales and minima, at a cache line.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn stream_scales(layout: &BlockLayout, ordered: &[Ordered; PANEL], step: impl Fn(usize) -> *mut u8) {
    // SAFETY: the scales are 16 bytes.
    let row = |lane: usize| unsafe { _mm_load_si128(ordered[lane].scales.as_ptr().cast()) };
    let mut columns: [__m256i; 16] = core::array::from_fn(|i| _mm256_set_m128i(row(i + 16), row(i)));
    // With the digits of row and byte as one number, each round moves the row's highest digit behind the byte's lowest and
    // the byte's highest behind the row's lowest.
    for _ in 0..4 {
        columns = core::array::from_fn(|i| {
            let (a, b) = (columns[i / 2], columns[i / 2 + 8]);
            if i % 2 == 0 { _mm256_unpacklo_epi8(a, b) } else { _mm256_unpackhi_epi8(a, b) }
        });
    }
    let nibble = _mm256_set1_epi8(0x0f);
    for i in 0..SUPER {
        let (first, second) = (columns[2 * i], columns[2 * i + 1]);
        // SAFETY: the caller's.
        unsafe {
            match (layout.sub_blocks, layout.minima) {
                (1, _) => stream_line(step(i), [columns[i], columns[SUPER + i]]),
                // Q2_K's are still pairs of nibbles.
                (_, true) => {
                    let upper = |pairs| _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), nibble);
                    stream_line(step(i), [_mm256_and_si256(first, nibble), _mm256_and_si256(second, nibble)]);
                    stream_line(step(i).add(LINE), [upper(first), upper(second)]);
                }
                (_, false) => {
                    // Q3_K's are 32 more than they mean.
                    let above = _mm256_set1_epi8(if layout.high_bits == 1 { 32 } else { 0 });
                    stream_line(step(i), [_mm256_sub_epi8(first, above), _mm256_sub_epi8(second, above)]);
                }
            }
        }
    }
}
