//! Every op x storage type x batch x shape: the portable reference, the reference with hardware FMA and the
//! hand-written ops give the same bits; and the reference itself is close to the product in f64.

use engine::SplitMix64;
use engine::dispatch::ColumnsMut;
use engine::operands::{random_activations, random_weights};
use engine::ops::{run_baseline, run_reference};
use engine::pack::dequantise_column;
use engine::simd::Level;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{k_multiple, padded, x_row_bytes};
use proptest::prelude::*;

/// Runs `op` into a `y` of random content with 8 spare columns that must not change.
fn run(
    f: fn(Level, &KernelKey, &[u8], &[u8], ColumnsMut<'_>),
    level: Level,
    key: &KernelKey,
    x: &[u8],
    w: &[u8],
) -> Vec<f32> {
    let (m, columns) = (key.m as usize, padded(key.n as usize));
    let stride = columns + 8;
    let mut rng = SplitMix64::new(99);
    let mut y: Vec<f32> = (0..m * stride).map(|_| rng.next_bell()).collect();
    let before = y.clone();
    f(level, key, x, w, ColumnsMut::new(&mut y, m, columns, stride));
    for (row, before) in y.chunks_exact(stride).zip(before.chunks_exact(stride)) {
        assert_eq!(row[columns..], before[columns..], "{key}: wrote behind its columns");
    }
    y
}

fn assert_same_bits(key: &KernelKey, name: &str, want: &[f32], got: &[f32]) {
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        assert_eq!(want.to_bits(), got.to_bits(), "{key} {name}: element {i}: {want} {got}");
    }
}

fn check(key: &KernelKey, seed: u64) {
    let mut rng = SplitMix64::new(seed);
    let (x, w) = (random_activations(key, &mut rng), random_weights(key, &mut rng));
    let reference = run(run_reference, Level::Portable, key, &x, &w);
    assert_same_bits(key, "reference with FMA", &reference, &run(run_reference, Level::detect(), key, &x, &w));
    assert_same_bits(key, "baseline", &reference, &run(run_baseline, Level::detect(), key, &x, &w));
    assert_same_bits(key, "portable baseline", &reference, &run(run_baseline, Level::Portable, key, &x, &w));
}

#[test]
fn every_op_and_type_gives_the_same_bits_at_every_level() {
    for op in Op::ALL {
        for dtype in DType::ALL {
            let depths: &[u32] = match k_multiple(dtype) {
                1 => &[1, 7, 64, 172],
                32 => &[32, 96, 160],
                _ => &[256, 768],
            };
            for m in [1, 2, 4, 7, 16] {
                for n in [1, 31, 32, 33, 100] {
                    for &k in depths {
                        check(&KernelKey { op, dtype, m, n, k }, u64::from(m * n * k));
                    }
                }
            }
        }
    }
}

#[test]
fn the_largest_batch_gives_the_same_bits() {
    for dtype in DType::ALL {
        check(&KernelKey { op: Op::GateUpSilu, dtype, m: 64, n: 64, k: 256 }, 5);
        check(&KernelKey { op: Op::GateUpGelu, dtype, m: 64, n: 64, k: 256 }, 5);
        check(&KernelKey { op: Op::MatmulResidual, dtype, m: 64, n: 96, k: 512 }, 6);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape_gives_the_same_bits(op in 0..5usize, dtype in 0..DType::ALL.len(), m in 1..70u32, n in 1..130u32, k in 1..12u32, seed: u64) {
        let dtype = DType::ALL[dtype];
        let k = match k_multiple(dtype) {
            1 => 11 * k,
            32 => 32 * k,
            multiple => multiple as u32 * k.div_ceil(4),
        };
        check(&KernelKey { op: Op::ALL[op], dtype, m, n, k }, seed);
    }
}

/// What the weights and activations of one product are in f64, from the dequantised columns.
fn product_f64(key: &KernelKey, x: &[u8], w: &[u8], r: usize, column: usize) -> f64 {
    let k = key.k as usize;
    let mut weights = vec![0.0f32; k];
    dequantise_column(key.dtype, column, w, &mut weights);
    let row = &x[r * x_row_bytes(key.dtype, k)..][..x_row_bytes(key.dtype, k)];
    let activation = |i: usize| -> f64 {
        if key.dtype.is_quantised() {
            let block = &row[x_row_bytes(key.dtype, i / 32 * 32)..];
            f64::from(f32::from_le_bytes(block[32..36].try_into().unwrap())) * f64::from(block[i % 32] as i8)
        } else {
            f64::from(f32::from_le_bytes(row[4 * i..4 * i + 4].try_into().unwrap()))
        }
    };
    (0..k).map(|i| activation(i) * f64::from(weights[i])).sum()
}

#[test]
fn the_reference_is_the_product() {
    for dtype in DType::ALL {
        for op in Op::ALL {
            let key = KernelKey { op, dtype, m: 3, n: 70, k: if k_multiple(dtype) == 256 { 256 } else { 96 } };
            let mut rng = SplitMix64::new(11);
            let (x, w) = (random_activations(&key, &mut rng), random_weights(&key, &mut rng));
            let y = run(run_reference, Level::Portable, &key, &x, &w);
            let stride = padded(70) + 8;
            let mut before = SplitMix64::new(99);
            let before: Vec<f32> = (0..3 * stride).map(|_| before.next_bell()).collect();
            for r in 0..3 {
                for c in 0..70 {
                    let want = match op {
                        Op::GateUpSilu => {
                            let at = c / 32 * 64 + c % 32;
                            let gate = product_f64(&key, &x, &w, r, at);
                            gate / (1.0 + (-gate).exp()) * product_f64(&key, &x, &w, r, at + 32)
                        }
                        Op::GateUpGelu => {
                            let at = c / 32 * 64 + c % 32;
                            let gate = product_f64(&key, &x, &w, r, at);
                            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                            0.5 * gate * (1.0 + inner.tanh()) * product_f64(&key, &x, &w, r, at + 32)
                        }
                        Op::MatmulResidual => f64::from(before[r * stride + c]) + product_f64(&key, &x, &w, r, c),
                        _ => product_f64(&key, &x, &w, r, c),
                    };
                    let got = f64::from(y[r * stride + c]);
                    assert!((got - want).abs() < 1e-3 * (1.0 + want.abs()), "{key} ({r}, {c}): {got} {want}");
                }
            }
        }
    }
}
