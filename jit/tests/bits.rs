//! Runs compiled kernels against the oracle, bit for bit: the whole space on shapes that exercise remainders, random
//! shapes with random variants, and wide code against narrow code.

mod common;

use common::{Case, EVERY_ISA, Mapping, Runnable, host_isa};
use iced_x86::{Decoder, DecoderOptions, EncodingKind, Mnemonic};
use jit::widen::{Encoding, widen};
use jit::{Compiler, JitError, space};
use model::Isa;
use model::kernel::{DType, Dot, KernelKey, M_BUCKETS, Op, Variant, Width};
use model::layout::k_multiple;
use proptest::prelude::*;

/// Compiles and checks the variants of `key` that this machine can run, of which this is part `part` of `parts`; returns
/// how many, and says what went wrong.
fn check_space(
    compiler: &mut Compiler,
    key: KernelKey,
    (part, parts): (usize, usize),
    seed: u64,
    wrong: &mut Vec<String>,
) -> usize {
    let case = Case::new(key, seed, seed as usize % 3 * 8);
    let variants = space::variants(&key, compiler.isa());
    assert!(!variants.is_empty(), "{key}: empty space");
    let variants: Vec<_> = variants.into_iter().skip(part % parts).step_by(parts).collect();
    for variant in &variants {
        match compiler.compile(&key, variant) {
            Ok(kernel) => wrong.extend(case.check(&kernel).err()),
            Err(refusal) => wrong.push(format!("{key} as {variant}: {refusal}")),
        }
    }
    variants.len()
}

/// Every op, dtype and batch bucket on shapes that exercise remainders: panels that do not divide into streams, odd k.
/// Each variant takes one of the shapes, another one for each op.
fn check_dtype(dtype: DType) {
    let mut kernels = 0;
    let mut wrong = Vec::new();
    for isa in [host_isa(), Isa { avx512: false, avx512_vnni: false, ..host_isa() }] {
        let mut compiler = Compiler::new(isa).unwrap();
        for (turn, op) in Op::ALL.into_iter().enumerate() {
            for m in M_BUCKETS {
                let shapes: &[(u32, u32)] = match (k_multiple(dtype), m) {
                    (256, 1) => &[(1, 256), (161, 768), (224, 512)],
                    (256, 64) => &[(70, 256)],
                    (256, _) => &[(33, 512), (160, 256)],
                    (32, 1) => &[(1, 32), (161, 96), (224, 160)],
                    (32, 64) => &[(70, 96)],
                    (32, _) => &[(33, 32), (160, 160)],
                    (_, 1) => &[(1, 1), (161, 37), (224, 64)],
                    (_, 64) => &[(70, 19), (33, 288)],
                    _ => &[(33, 5), (160, 40)],
                };
                for (i, (n, k)) in shapes.iter().enumerate() {
                    let key = KernelKey { op, dtype, m, n: *n, k: *k };
                    let part = (turn + i, shapes.len());
                    kernels += check_space(&mut compiler, key, part, u64::from(n * 31 + k + m), &mut wrong);
                }
            }
        }
        assert_eq!(compiler.refusals().total(), 0, "refusals: {}", compiler.refusals());
    }
    wrong.truncate(20);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(kernels > 250, "only {kernels} kernels");
}

#[test]
fn f32_space_matches_the_oracle() {
    check_dtype(DType::F32);
}

#[test]
fn f16_space_matches_the_oracle() {
    check_dtype(DType::F16);
}

#[test]
fn q8_0_space_matches_the_oracle() {
    check_dtype(DType::Q8_0);
}

#[test]
fn q4_0_space_matches_the_oracle() {
    check_dtype(DType::Q4_0);
}

#[test]
fn q4_1_space_matches_the_oracle() {
    check_dtype(DType::Q4_1);
}

#[test]
fn q5_0_space_matches_the_oracle() {
    check_dtype(DType::Q5_0);
}

#[test]
fn q5_1_space_matches_the_oracle() {
    check_dtype(DType::Q5_1);
}

#[test]
fn q2_k_space_matches_the_oracle() {
    check_dtype(DType::Q2_K);
}

#[test]
fn q3_k_space_matches_the_oracle() {
    check_dtype(DType::Q3_K);
}

#[test]
fn q4_k_space_matches_the_oracle() {
    check_dtype(DType::Q4_K);
}

#[test]
fn q5_k_space_matches_the_oracle() {
    check_dtype(DType::Q5_K);
}

#[test]
fn q6_k_space_matches_the_oracle() {
    check_dtype(DType::Q6_K);
}

/// Every variant of the space of a real model's keys compiles: nothing spills, nothing is unlisted.
#[test]
fn spaces_of_a_real_model_compile_without_refusal() {
    let mut kernels = 0;
    for isa in [EVERY_ISA, Isa::AVX2] {
        let mut compiler = Compiler::new(isa).unwrap();
        for dtype in DType::ALL {
            for m in M_BUCKETS {
                for (op, n, k) in [
                    (Op::Qkv, 480, 576),
                    (Op::GateUpSilu, 768, 576),
                    (Op::GateUpGelu, 1024, 640),
                    (Op::MatmulResidual, 288, 576),
                    (Op::MatmulResidual, 576, 1536),
                    (Op::LmHead, 49152, 576),
                ] {
                    // The next smaller depth that K types can have.
                    let key = KernelKey { op, dtype, m, n, k: k / k_multiple(dtype) as u32 * k_multiple(dtype) as u32 };
                    for variant in space::variants(&key, isa).into_iter().step_by(3) {
                        let kernel =
                            compiler.compile(&key, &variant).unwrap_or_else(|e| panic!("{key} as {variant}: {e}"));
                        assert!(kernel.code.len() < 8192, "{key} as {variant}: {} bytes", kernel.code.len());
                        assert!(kernel.stats.stack_bytes <= 20 << 10, "{key} as {variant}: {:?}", kernel.stats);
                        kernels += 1;
                    }
                }
            }
        }
    }
    assert!(kernels > 2000, "only {kernels} kernels");
}

/// What variants share that differ in their prefetch distance is the same code whichever of them came first, and no
/// kernel without one prefetches.
#[test]
fn kernels_do_not_depend_on_what_was_compiled_before() {
    let mut shared = Compiler::new(EVERY_ISA).unwrap();
    let mut compared = 0;
    for dtype in [DType::F32, DType::Q4_1, DType::Q8_0] {
        let key = KernelKey { op: Op::GateUpSilu, dtype, m: 1, n: 768, k: 576 };
        for variant in space::variants(&key, EVERY_ISA).into_iter().rev() {
            let distances = [2048, 0, 512].map(|prefetch_bytes| Variant { prefetch_bytes, ..variant });
            for variant in distances {
                let fresh = Compiler::new(EVERY_ISA).unwrap().compile(&key, &variant).unwrap();
                assert_eq!(shared.compile(&key, &variant).unwrap(), fresh, "{key} as {variant}");
                let prefetches = fresh.stats.widen.prefetches > 0;
                assert_eq!(prefetches, variant.prefetch_bytes > 0, "{key} as {variant}");
                compared += 1;
            }
        }
    }
    assert!(compared > 90, "only {compared} kernels");
}

/// A narrow kernel and the wide one of the same tile are the same program: same bits on the same operands.
#[test]
fn wide_code_computes_what_narrow_code_computes() {
    let isa = host_isa();
    let mut compiler = Compiler::new(isa).unwrap();
    let mut compared = 0;
    for op in Op::ALL {
        for dtype in DType::ALL {
            for (m, rows) in [(1, 1), (4, 3), (16, 2)] {
                let key = KernelKey { op, dtype, m, n: 100, k: k_multiple(dtype).max(64) as u32 };
                let case = Case::new(key, 11, 8);
                let variant = |width, dot| Variant {
                    width,
                    dot,
                    rows,
                    columns: 16,
                    streams: 2,
                    unroll: 2,
                    prefetch_bytes: 512,
                    k_block: 0,
                };
                let narrow = compiler.compile(&key, &variant(Width::X128, Dot::Pairs));
                let Ok(narrow) = narrow else { continue };
                let want: Vec<u32> = case.run(&narrow).iter().map(|v| v.to_bits()).collect();
                for width in [Width::X128, Width::Y256, Width::Z512] {
                    for dot in Dot::ALL {
                        let variant = variant(width, dot);
                        let Ok(wide) = compiler.compile(&key, &variant) else { continue };
                        let got: Vec<u32> = case.run(&wide).iter().map(|v| v.to_bits()).collect();
                        assert_eq!(got, want, "{key} as {variant}");
                        compared += 1;
                    }
                }
            }
        }
    }
    // X128 against itself alone would be 180 or fewer.
    assert!(compared > 300, "only {compared} pairs");
}

/// Kernels for AVX-VNNI are those for AVX512-VNNI, instruction for instruction, in encodings that need no AVX-512. So what
/// the other tests run on machines with AVX512-VNNI alone holds for them too.
#[test]
fn avx_vnni_kernels_differ_in_encoding_only() {
    let avx_vnni = Isa { avx2: true, avx_vnni: true, ..Default::default() };
    let mut without_avx512 = Compiler::new(avx_vnni).unwrap();
    let mut with_everything = Compiler::new(EVERY_ISA).unwrap();
    // Offsets differ with the lengths of encodings, and with them the targets of branches.
    let instructions = |code: &[u8]| -> Vec<String> {
        let lines = jit::disassemble(code).lines().map(|line| line[6..].trim().to_string()).collect::<Vec<_>>();
        lines.into_iter().map(|line| if line.starts_with('j') { line[..2].to_string() } else { line }).collect()
    };
    let mut kernels = 0;
    for (op, dtype, m) in Op::ALL
        .iter()
        .flat_map(|op| DType::ALL.iter().map(move |dtype| (*op, *dtype)))
        .flat_map(|(op, dtype)| [1, 16].map(|m| (op, dtype, m)))
    {
        let key = KernelKey { op, dtype, m, n: 100, k: k_multiple(dtype).max(64) as u32 };
        for variant in jit::space::variants(&key, avx_vnni).into_iter().filter(|v| v.dot == Dot::Vex).take(6) {
            let vex = without_avx512.compile(&key, &variant).unwrap();
            let evex = with_everything.compile(&key, &Variant { dot: Dot::Evex, ..variant }).unwrap();
            assert_eq!(instructions(&vex.code), instructions(&evex.code), "{key} as {variant}");
            let decoded = Decoder::new(64, &vex.code, DecoderOptions::NONE).into_iter().collect::<Vec<_>>();
            assert!(decoded.iter().all(|i| i.op_code().encoding() != EncodingKind::EVEX), "{key} as {variant}");
            assert!(decoded.iter().any(|i| i.mnemonic() == Mnemonic::Vpdpbusd), "{key} as {variant}");
            kernels += 1;
        }
    }
    assert!(kernels > 300, "only {kernels} kernels");
}

/// Sums and factors that were just loaded stay what they are: a load that Cranelift folds takes another place among the
/// operands, where a carrier means something else. (Kernels have no such sums; found by the fuzz target `widen`.)
#[test]
fn sums_and_factors_may_be_loads() {
    let mut compiler = Compiler::new(host_isa()).unwrap();
    let narrow = compiler.narrow(|e, [x, w, y, ..]| {
        let (sum, a, b) = (e.load_f32(x, 0), e.load_f32(w, 0), e.load_f32(w, 64));
        let sum = e.accumulate(sum, a, b);
        let (a, b) = (e.load_f32(w, 128), e.load_f32(w, 192));
        let sum = e.fma(a, b, sum);
        e.store(sum, y, 0);
    });
    let narrow = narrow.unwrap();
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let x: Vec<f32> = (0..16).map(|i| i as f32 + 0.5).collect();
    let w: Vec<f32> = (0..64).map(|i| 3.0 - i as f32).collect();
    let (mut x_memory, mut w_memory) = (Mapping::new(64, 4), Mapping::new(256, 4));
    x_memory.bytes_mut().copy_from_slice(&floats(&x));
    w_memory.bytes_mut().copy_from_slice(&floats(&w));
    for width in [Width::X128, Width::Y256, Width::Z512] {
        if width == Width::Z512 && !host_isa().avx512 {
            continue;
        }
        let (code, _) = widen(&narrow, Encoding { width, dot: Dot::Pairs, prefetch_bytes: 0 }).unwrap();
        let mut y = Mapping::new(64, 4);
        let (x_start, w_start) = (x_memory.bytes().as_ptr(), w_memory.bytes().as_ptr());
        // SAFETY: the code reads one vector of `x`, four of `w`, and writes one of `y`; none is longer than 64 bytes.
        unsafe { Runnable::of_code(&code).call(x_start, w_start, y.floats_mut().as_mut_ptr(), 0, 0) };
        for i in 0..width.lanes() {
            let want = w[32 + i].mul_add(w[48 + i], w[i].mul_add(w[16 + i], x[i]));
            assert_eq!(y.floats_mut()[i].to_bits(), want.to_bits(), "lane {i} at {} bits", width.bits());
        }
    }
}

/// What cannot be is refused with its own error, and counted.
#[test]
fn refusals_have_their_own_error() {
    let key = KernelKey { op: Op::Matmul, dtype: DType::Q8_0, m: 4, n: 64, k: 64 };
    let variant = Variant {
        width: Width::Y256,
        dot: Dot::Pairs,
        rows: 2,
        columns: 16,
        streams: 1,
        unroll: 1,
        prefetch_bytes: 0,
        k_block: 0,
    };
    let mut compiler = Compiler::new(Isa::AVX2).unwrap();
    assert!(compiler.compile(&key, &variant).is_ok());
    for key in [
        KernelKey { m: 5, ..key },
        KernelKey { n: 0, ..key },
        KernelKey { k: 0, ..key },
        KernelKey { k: 48, ..key },
        KernelKey { dtype: DType::Q4_K, k: 128, ..key },
        KernelKey { n: u32::MAX, k: u32::MAX - 31, ..key },
        KernelKey { n: 1 << 20, k: 1 << 20, ..key },
    ] {
        assert!(matches!(compiler.compile(&key, &variant), Err(JitError::Shape { .. })), "{key}");
    }
    assert_eq!(compiler.refusals().shape, 7);
    for variant in [
        Variant { rows: 0, ..variant },
        Variant { rows: 5, ..variant },
        Variant { columns: 0, ..variant },
        Variant { columns: 12, ..variant },
        Variant { columns: 64, ..variant },
        Variant { columns: 4, ..variant },
        Variant { streams: 0, ..variant },
        Variant { streams: 3, ..variant },
        Variant { unroll: 0, ..variant },
        Variant { unroll: 3, ..variant },
        Variant { rows: 4, columns: 32, ..variant },
        Variant { k_block: 1, ..variant },
    ] {
        assert!(matches!(compiler.compile(&key, &variant), Err(JitError::Variant { .. })), "{variant}");
    }
    assert_eq!(compiler.refusals().variant, 12);
    for variant in [
        Variant { width: Width::Z512, ..variant },
        Variant { dot: Dot::Evex, ..variant },
        Variant { dot: Dot::Vex, ..variant },
    ] {
        assert!(matches!(compiler.compile(&key, &variant), Err(JitError::Isa { .. })), "{variant}");
    }
    assert_eq!(compiler.refusals().isa, 3);
    assert_eq!(compiler.refusals().total(), 22);
}

fn any_key() -> impl Strategy<Value = KernelKey> {
    (0..Op::ALL.len(), 0..DType::ALL.len(), 0..M_BUCKETS.len(), 1u32..300, 1u32..200).prop_map(
        |(op, dtype, m, n, k)| {
            let dtype = DType::ALL[dtype];
            let k = k.next_multiple_of(k_multiple(dtype) as u32);
            let n = if M_BUCKETS[m] == 64 { n.min(100) } else { n };
            KernelKey { op: Op::ALL[op], dtype, m: M_BUCKETS[m], n, k }
        },
    )
}

fn any_variant() -> impl Strategy<Value = Variant> {
    (0..3usize, 0..Dot::ALL.len(), 1u8..15, 0..4usize, 1u8..9, 1u8..9, 0u16..5000, 0u16..9).prop_map(
        |(width, dot, rows, columns, streams, unroll, prefetch_bytes, k_block)| Variant {
            width: [Width::X128, Width::Y256, Width::Z512][width],
            dot: Dot::ALL[dot],
            rows,
            columns: [4, 8, 16, 32][columns],
            streams,
            unroll,
            prefetch_bytes,
            k_block,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any key with any variant is either refused before code is made, or right. Nothing fails in between: the
    /// register estimate of the plan lets nothing through that spills.
    #[test]
    fn any_variant_of_any_key_is_refused_early_or_right(key in any_key(), variant in any_variant(), seed in any::<u64>()) {
        let mut compiler = Compiler::new(host_isa()).unwrap();
        let dot = if key.dtype.is_quantised() { variant.dot } else { Dot::Pairs };
        let mut variant = Variant { rows: variant.rows.min(key.m as u8), dot, ..variant };
        if variant.k_block > 0 && key.m > 1 && !key.dtype.is_quantised() {
            // Otherwise next to none would be legal: so many blocks, one stream, no distance.
            let blocks = u32::from(variant.k_block);
            let k_block = if key.k.is_multiple_of(blocks) { key.k / blocks } else { key.k } as u16;
            variant = Variant { k_block, streams: 1, prefetch_bytes: 0, ..variant };
        } else {
            variant.k_block = 0;
        }
        match compiler.compile(&key, &variant) {
            Ok(kernel) => {
                let case = Case::new(key, seed, seed as usize % 40);
                prop_assert_eq!(case.check(&kernel), Ok(()));
            }
            Err(JitError::Variant { .. } | JitError::Isa { .. }) => {}
            Err(other) => prop_assert!(false, "{} as {}: {}", key, variant, other),
        }
    }
}
