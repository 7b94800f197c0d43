//! Round trips, exact bytes and error cases of the storage formats.

use super::*;
use alloc::vec;
use proptest::prelude::*;

const SUPPORTED: [TensorType; 13] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
];

fn encode(ty: TensorType, values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    quantise(ty, values, &mut out).unwrap();
    out
}

fn decode(ty: TensorType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() as usize * ty.block_len() as usize];
    dequantise(ty, bytes, &mut out).unwrap();
    out
}

#[test]
fn ids_and_sizes() {
    for &ty in TensorType::ALL {
        assert_eq!(TensorType::from_id(ty.id()), Some(ty));
        assert_eq!(ty.row_bytes(u64::from(ty.block_len()) * 3), Some(u64::from(ty.block_bytes()) * 3));
        assert_eq!(ty.row_bytes(u64::from(ty.block_len()) + 1).is_some(), ty.block_len() == 1, "{ty}");
        assert_eq!(ty.is_supported(), SUPPORTED.contains(&ty), "{ty}");
        assert_eq!(dequantise(ty, &[], &mut []).is_ok(), ty.is_supported(), "{ty}");
    }
    for removed in [4, 5, 31, 32, 33, 36, 37, 38, 4096] {
        assert_eq!(TensorType::from_id(removed), None);
    }
    assert_eq!(TensorType::F64.row_bytes(u64::MAX), None);
}

/// The bytes of one ramp, worked out by hand from the definitions of the formats.
#[test]
fn exact_bytes_of_a_ramp() {
    let ramp: [f32; 32] = core::array::from_fn(|i| i as f32 - 16.0);
    // Largest magnitude -16 becomes code 0: d = 2.0 (0x4000), code = floor(x / 2 + 8.5).
    let q4_0 = encode(TensorType::Q4_0, &ramp);
    assert_eq!(q4_0[..2], [0x00, 0x40]);
    assert_eq!(
        q4_0[2..],
        [0x80, 0x91, 0x91, 0xa2, 0xa2, 0xb3, 0xb3, 0xc4, 0xc4, 0xd5, 0xd5, 0xe6, 0xe6, 0xf7, 0xf7, 0xf8]
    );
    // d = 31 / 15 in f16 is 0x4022, m = -16 is 0xcc00.
    let q4_1 = encode(TensorType::Q4_1, &ramp);
    assert_eq!(q4_1[..4], [0x22, 0x40, 0x00, 0xcc]);
    assert_eq!(q4_1[4], 0x80);
    assert_eq!(q4_1[19], 0xf7);
    // d = 16 / 127 in f16 is 0x3008; -16 is -127, 0 is 0, 15 is round(119.0625) = 119.
    let q8_0 = encode(TensorType::Q8_0, &ramp);
    assert_eq!(q8_0[..2], [0x08, 0x30]);
    assert_eq!([q8_0[2], q8_0[18], q8_0[33]], [0x81, 0, 119]);
}

/// Rounding is half away from zero in Q8_0 and truncation of `x + 0.5` in Q4: where the two differ from ties-to-even.
#[test]
fn ties_round_as_the_reference_does() {
    let mut values = [0.0f32; 32];
    values[..6].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -2.5]);
    assert_eq!(encode(TensorType::Q8_0, &values)[2..8], [127, 1, 2, 3, 0xff, 0xfd]);
    let mut values = [0.0f32; 32];
    values[..4].copy_from_slice(&[-8.0, 0.5, -0.5, 7.6]);
    // 0.5 -> 8.5 + 0.5 = 9; -0.5 -> 8.0 = 8; 7.6 -> 16.1, clamped to 15.
    let bytes = encode(TensorType::Q4_0, &values);
    assert_eq!(bytes[2..6].iter().map(|b| b & 15).collect::<Vec<_>>(), [0, 9, 8, 15]);
}

#[test]
fn constant_and_zero_blocks() {
    for ty in SUPPORTED {
        assert!(decode(ty, &encode(ty, &[0.0; 256])).iter().all(|&v| v == 0.0), "{ty}");
    }
    for ty in [TensorType::Q4_1, TensorType::Q5_1] {
        assert!(decode(ty, &encode(ty, &[0.25; 32])).iter().all(|&v| v == 0.25), "{ty}");
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    for ty in SUPPORTED {
        let values = ty.block_len() as usize + 1;
        let bytes = ty.block_bytes() as usize * 2 - 1;
        let error = QuantError::Length { ty, values, bytes };
        assert_eq!(dequantise(ty, &vec![0; bytes], &mut vec![0.0; values]), Err(error));
    }
    assert_eq!(
        quantise(TensorType::Q8_0, &[0.0; 33], &mut Vec::new()),
        Err(QuantError::Length { ty: TensorType::Q8_0, values: 33, bytes: 0 })
    );
    let unsupported = QuantError::Unsupported { ty: TensorType::Q8_K };
    assert_eq!(quantise(TensorType::Q8_K, &[0.0; 256], &mut Vec::new()), Err(unsupported));
}

#[test]
fn half_precision_is_exact() {
    for bits in 0..=u16::MAX {
        let value = f16_to_f32(bits);
        if value.is_nan() {
            assert!(bits & 0x7c00 == 0x7c00 && bits & 0x3ff != 0, "{bits:#x}");
        } else {
            assert_eq!(f32_to_f16(value), bits);
            // Independent definition of binary16.
            let (sign, exponent, fraction) = (bits >> 15, i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff));
            let magnitude = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 => f64::INFINITY,
                e => (1024.0 + fraction) * 2f64.powi(e - 25),
            };
            assert_eq!(f64::from(value), if sign == 1 { -magnitude } else { magnitude });
        }
        let widened = f32::from_bits(u32::from(bits) << 16);
        assert!(bf16_to_f32(bits) == widened || widened.is_nan() && bf16_to_f32(bits).is_nan(), "{bits:#x}");
    }
    assert_eq!([f32_to_f16(1.0 + 1.0 / 2048.0), f32_to_f16(1.0 + 3.0 / 2048.0)], [0x3c00, 0x3c02], "ties to even");
    assert_eq!([f32_to_f16(65519.9), f32_to_f16(65520.0)], [0x7bff, 0x7c00]);
    assert_eq!([f32_to_bf16(1.0 + 1.0 / 256.0), f32_to_bf16(1.0 + 3.0 / 256.0)], [0x3f80, 0x3f82]);
}

proptest! {
    /// Each value comes back within half a step of its block's scale (a whole step for the one clamped Q4 end), plus the
    /// rounding of the scale to f16.
    #[test]
    fn round_trips_stay_within_a_step(values in prop::collection::vec(-100.0f32..100.0, 256)) {
        for ty in SUPPORTED {
            let back = decode(ty, &encode(ty, &values));
            for (block, out) in values.chunks(32).zip(back.chunks(32)) {
                let amax = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                let max = block.iter().fold(f32::MIN, |m, &v| m.max(v));
                let min = block.iter().fold(f32::MAX, |m, &v| m.min(v));
                // The largest magnitude of the block that shares super-scales.
                let all = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                let tolerance = match ty {
                    TensorType::F32 => 0.0,
                    TensorType::F16 => amax / 2048.0,
                    TensorType::BF16 => amax / 256.0,
                    TensorType::Q8_0 => amax / 254.0 + amax / 1024.0,
                    TensorType::Q4_0 => amax / 8.0 + amax / 512.0,
                    TensorType::Q5_0 => amax / 16.0 + amax / 512.0,
                    TensorType::Q5_1 => (max - min) / 62.0 + amax / 512.0,
                    // A step of the scale, an error of half a super-step in it for every code, and the same of the minimum.
                    TensorType::Q6_K => amax / 32.0 + all / 127.0,
                    TensorType::Q3_K => amax / 4.0 + all / 31.0,
                    TensorType::Q5_K => (max.max(0.0) - min.min(0.0)) / 62.0 + all / 20.0,
                    TensorType::Q4_K => (max.max(0.0) - min.min(0.0)) / 30.0 + all / 20.0,
                    TensorType::Q2_K => (max.max(0.0) - min.min(0.0)) / 6.0 + all / 8.0,
                    _ => (max - min) / 30.0 + amax / 512.0,
                };
                for (a, b) in block.iter().zip(out) {
                    prop_assert!((a - b).abs() <= tolerance * 1.001 + 1e-6, "{ty}: {a} -> {b}, tolerance {tolerance}");
                }
            }
        }
    }

    /// Q8_0 written twice is Q8_0 written once: requantising loses nothing more.
    #[test]
    fn q8_0_is_idempotent(values in prop::collection::vec(-1.0f32..1.0, 32)) {
        let once = decode(TensorType::Q8_0, &encode(TensorType::Q8_0, &values));
        let twice = decode(TensorType::Q8_0, &encode(TensorType::Q8_0, &once));
        for (a, b) in once.iter().zip(&twice) {
            prop_assert!((a - b).abs() <= a.abs() / 512.0);
        }
    }
}

/// Blocks of any bytes, taken apart and put together again.
#[test]
fn blocks_survive_being_taken_apart() {
    fn check<F: BlockFormat<LEN, BYTES>, const LEN: usize, const BYTES: usize>() {
        let mut state = 0x1234_5678_9abc_def1u64;
        for _ in 0..200 {
            let block: [u8; BYTES] = core::array::from_fn(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            });
            assert_eq!(F::put_together(&F::take_apart(&block)), block, "{}", F::DTYPE);
        }
        let ty = TensorType::from(F::DTYPE);
        assert_eq!((ty.block_len() as usize, ty.block_bytes() as usize), (LEN, BYTES));
    }
    check::<Q8_0, 32, 34>();
    check::<Q4_0, 32, 18>();
    check::<Q4_1, 32, 20>();
    check::<Q5_0, 32, 22>();
    check::<Q5_1, 32, 24>();
    check::<Q2K, 256, 84>();
    check::<Q3K, 256, 110>();
    check::<Q4K, 256, 144>();
    check::<Q5K, 256, 176>();
    check::<Q6K, 256, 210>();
}
