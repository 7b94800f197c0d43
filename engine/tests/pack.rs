//! Packing is exact and reversible for every file format, chunking, placement and level.

use engine::SplitMix64;
use engine::operands::AlignedBytes;
use engine::pack::{ColumnMap, RowFormat, dequantise_column, pack_rows, unpack_column, zero_padding};
use engine::simd::Level;
use model::TensorType;
use model::layout::{BlockLayout, SUPER, WORD_BYTES, packed_len_bytes};
use model::quant::{dequantise, quantise};
use proptest::prelude::*;

const FORMATS: [RowFormat; 13] = [
    RowFormat::F32,
    RowFormat::F16,
    RowFormat::Bf16,
    RowFormat::Q8_0,
    RowFormat::Q4_0,
    RowFormat::Q4_1,
    RowFormat::Q5_0,
    RowFormat::Q5_1,
    RowFormat::Q2K,
    RowFormat::Q3K,
    RowFormat::Q4K,
    RowFormat::Q5K,
    RowFormat::Q6K,
];

fn random_rows(format: RowFormat, n: usize, k: usize, seed: u64) -> Vec<u8> {
    let mut rng = SplitMix64::new(seed);
    (0..n * format.row_bytes(k)).map(|_| rng.next_u64() as u8).collect()
}

/// The row as `unpack_column` gives it back: BF16 has become F32.
fn as_packed(format: RowFormat, row: &[u8]) -> Vec<u8> {
    match format {
        RowFormat::Bf16 => row.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]).collect(),
        _ => row.to_vec(),
    }
}

fn pack_in_chunks(
    level: Level,
    format: RowFormat,
    k: usize,
    map: ColumnMap,
    rows: &[u8],
    chunk: usize,
    out: &mut [u8],
) {
    let row_bytes = format.row_bytes(k);
    let mut column = 0;
    for rows in rows.chunks(chunk * row_bytes) {
        pack_rows(level, format, k, map, column, rows, out);
        column += rows.len() / row_bytes;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn packing_round_trips(
        format in 0..FORMATS.len(), n in 1..150usize, k in 1..20usize, offset in 0..70usize, chunk in 1..150usize, seed: u64
    ) {
        let format = FORMATS[format];
        let k = if format.block_elements() > 32 { k.div_ceil(8) } else { k } * format.block_elements();
        let dtype = format.dtype();
        let rows = random_rows(format, n, k, seed);
        let row_bytes = format.row_bytes(k);
        let map = ColumnMap::after(offset);
        let mut packed = AlignedBytes::zeroed(packed_len_bytes(dtype, offset + n, k));
        packed.fill(0xaa);
        pack_in_chunks(Level::detect(), format, k, map, &rows, chunk, &mut packed);
        zero_padding(dtype, k, map, n, &mut packed);
        let mut portable = AlignedBytes::zeroed(packed.len());
        portable.fill(0xaa);
        pack_in_chunks(Level::Portable, format, k, map, &rows, n, &mut portable);
        zero_padding(dtype, k, map, n, &mut portable);
        prop_assert!(packed[..] == portable[..], "levels or chunks differ");
        let mut row = vec![0; as_packed(format, &rows[..row_bytes]).len()];
        for (c, want) in rows.chunks_exact(row_bytes).enumerate() {
            unpack_column(dtype, k, map, c, &packed, &mut row);
            prop_assert_eq!(&row, &as_packed(format, want), "column {}", c);
        }
        let zeroes = AlignedBytes::zeroed(packed_len_bytes(dtype, 32, k));
        let mut zero_row = row.clone();
        unpack_column(dtype, k, ColumnMap::WHOLE, 0, &zeroes, &mut zero_row);
        for c in n..(offset + n).next_multiple_of(32) - offset {
            unpack_column(dtype, k, map, c, &packed, &mut row);
            prop_assert_eq!(&row, &zero_row, "padding column {}", c);
        }
        let mut untouched = AlignedBytes::zeroed(packed_len_bytes(dtype, 32, k));
        untouched.fill(0xaa);
        let mut untouched_row = row.clone();
        unpack_column(dtype, k, ColumnMap::WHOLE, 0, &untouched, &mut untouched_row);
        for c in 0..offset {
            unpack_column(dtype, k, ColumnMap::WHOLE, c, &packed, &mut row);
            prop_assert_eq!(&row, &untouched_row, "column {} of the tensor in front", c);
        }
    }
}

#[test]
fn gate_and_up_panels_alternate() {
    for format in FORMATS {
        let (n, k) = (70, 2 * format.block_elements());
        let dtype = format.dtype();
        let (gate, up) = (random_rows(format, n, k, 1), random_rows(format, n, k, 2));
        let mut packed = AlignedBytes::zeroed(2 * packed_len_bytes(dtype, n, k));
        packed.fill(0xaa);
        for (map, rows) in [(ColumnMap::GATE, &gate), (ColumnMap::UP, &up)] {
            pack_rows(Level::detect(), format, k, map, 0, rows, &mut packed);
            zero_padding(dtype, k, map, n, &mut packed);
        }
        let panel = packed_len_bytes(dtype, 32, k);
        let mut zero_row = as_packed(format, &gate[..format.row_bytes(k)]);
        unpack_column(dtype, k, ColumnMap::WHOLE, 0, &AlignedBytes::zeroed(panel), &mut zero_row);
        for (p, panels) in packed.chunks_exact(2 * panel).enumerate() {
            for (rows, panel) in [(&gate, &panels[..panel]), (&up, &panels[panel..])] {
                let mut row = vec![0; as_packed(format, &rows[..format.row_bytes(k)]).len()];
                for lane in 0..32 {
                    unpack_column(dtype, k, ColumnMap::WHOLE, lane, panel, &mut row);
                    let want = rows.chunks_exact(format.row_bytes(k)).nth(32 * p + lane);
                    let want = want.map_or(zero_row.clone(), |row| as_packed(format, row));
                    assert_eq!(row, want, "{format:?} panel {p} lane {lane}");
                }
            }
        }
    }
}

#[test]
fn a_packed_block_has_the_documented_layout() {
    // Q4_1, one row in lane 3: d, m, then bytes 0..16 whose low nibbles are q[0..16] and high nibbles q[16..32].
    let mut row = vec![0x34, 0x12, 0x78, 0x56];
    row.extend(0x40..0x50);
    let mut packed = AlignedBytes::zeroed(640);
    pack_rows(Level::detect(), RowFormat::Q4_1, 32, ColumnMap::after(3), 0, &row, &mut packed);
    for s in 0..4u8 {
        let at = usize::from(s) * 128 + 12;
        assert_eq!(packed[at..at + 4], [0x40 + 4 * s, 0x41 + 4 * s, 0x42 + 4 * s, 0x43 + 4 * s]);
    }
    assert_eq!(packed[512 + 6..512 + 8], [0x34, 0x12]);
    assert_eq!(packed[576 + 6..576 + 8], [0x78, 0x56]);
    assert_eq!(packed.iter().filter(|&&b| b != 0).count(), 20);
}

/// A column of a packed matrix is the row of the file, for every type, bit for bit.
#[test]
fn packed_columns_are_what_the_file_says() {
    for &ty in TensorType::ALL {
        let Some(format) = RowFormat::of(ty) else { continue };
        let (n, k) = (40, 512);
        let mut rng = SplitMix64::new(ty.id().into());
        let values: Vec<f32> = (0..n * k).map(|_| rng.next_bell()).collect();
        let mut rows = Vec::new();
        quantise(ty, &values, &mut rows).unwrap();
        let mut want = vec![0.0f32; n * k];
        dequantise(ty, &rows, &mut want).unwrap();
        let mut packed = AlignedBytes::zeroed(packed_len_bytes(format.dtype(), n, k));
        pack_rows(Level::detect(), format, k, ColumnMap::WHOLE, 0, &rows, &mut packed);
        let mut column = vec![0.0f32; k];
        for (c, want) in want.chunks_exact(k).enumerate() {
            dequantise_column(format.dtype(), c, &packed, &mut column);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&column), bits(want), "{ty} column {c}");
        }
    }
}

#[test]
fn a_packed_super_block_has_the_documented_layout() {
    // Q6_K in lane 5: element 17 is code 0x2b, so nibble 0xb and upper bits 2; the scale of elements 16..32 is -3.
    let mut row = vec![0u8; 210];
    row[17] = 0x0b;
    row[128 + 17] = 2;
    row[192 + 1] = (-3i8) as u8;
    row[208..].copy_from_slice(&[0x34, 0x12]);
    let layout = BlockLayout::of(model::kernel::DType::Q6_K).unwrap();
    let mut packed = AlignedBytes::zeroed(64 + SUPER * layout.step_bytes());
    pack_rows(Level::detect(), RowFormat::Q6K, 256, ColumnMap::after(5), 0, &row, &mut packed);
    assert_eq!(packed[10..12], [0x34, 0x12]);
    // Quad 4, byte 1: the low half of word 2, and bits 0 and 1 of word 5.
    assert_eq!(packed[64 + 2 * WORD_BYTES + 4 * 5 + 1], 0x0b);
    assert_eq!(packed[64 + 5 * WORD_BYTES + 4 * 5 + 1], 2);
    assert_eq!(packed[64 + 6 * WORD_BYTES + 32 + 5], (-3i8) as u8);
    assert_eq!(packed.iter().filter(|&&b| b != 0).count(), 5);
}
