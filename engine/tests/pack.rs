//! Packing is exact and reversible for every file format, chunking, placement and level.

use engine::SplitMix64;
use engine::operands::AlignedBytes;
use engine::pack::{ColumnMap, RowFormat, pack_rows, unpack_column, zero_padding};
use engine::simd::Level;
use model::layout::packed_len_bytes;
use proptest::prelude::*;

const FORMATS: [RowFormat; 6] =
    [RowFormat::F32, RowFormat::F16, RowFormat::Bf16, RowFormat::Q8_0, RowFormat::Q4_0, RowFormat::Q4_1];

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
        format in 0..6usize, n in 1..150usize, k in 1..20usize, offset in 0..70usize, chunk in 1..150usize, seed: u64
    ) {
        let format = FORMATS[format];
        let k = k * format.block_elements();
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
        for c in n..(offset + n).next_multiple_of(32) - offset {
            unpack_column(dtype, k, map, c, &packed, &mut row);
            prop_assert!(row.iter().all(|&b| b == 0), "padding column {}", c);
        }
        for c in 0..offset {
            unpack_column(dtype, k, ColumnMap::WHOLE, c, &packed, &mut row);
            prop_assert!(row.iter().all(|&b| b == 0xaa), "column {} of the tensor in front", c);
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
        for (p, panels) in packed.chunks_exact(2 * panel).enumerate() {
            for (rows, panel) in [(&gate, &panels[..panel]), (&up, &panels[panel..])] {
                let mut row = vec![0; as_packed(format, &rows[..format.row_bytes(k)]).len()];
                for lane in 0..32 {
                    unpack_column(dtype, k, ColumnMap::WHOLE, lane, panel, &mut row);
                    let want = rows.chunks_exact(format.row_bytes(k)).nth(32 * p + lane);
                    let want = want.map_or(vec![0; row.len()], |row| as_packed(format, row));
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
