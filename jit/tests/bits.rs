//! Runs every variant of the space against the oracle, bit for bit.

mod common;

use common::{Case, host_isa};
use jit::{Compiler, space};
use model::kernel::{DType, KernelKey, M_BUCKETS, Op};

/// Compiles and checks every variant of `key` this machine can run; returns how many, and says what went wrong.
fn check_space(compiler: &mut Compiler, key: KernelKey, seed: u64, wrong: &mut Vec<String>) -> usize {
    let case = Case::new(key, seed, seed as usize % 3 * 8);
    let variants = space::variants(&key, compiler.isa());
    assert!(!variants.is_empty(), "{key}: empty space");
    for variant in &variants {
        match compiler.compile(&key, variant) {
            Ok(kernel) => wrong.extend(case.check(&kernel).err()),
            Err(refusal) => wrong.push(format!("{key} as {variant}: {refusal}")),
        }
    }
    variants.len()
}

/// Every op, dtype and batch bucket on shapes that exercise remainders: panels that do not divide into streams, odd k.
#[test]
fn every_variant_matches_the_oracle_bit_for_bit() {
    let mut compiler = Compiler::new(host_isa()).unwrap();
    let mut kernels = 0;
    let mut wrong = Vec::new();
    for op in Op::ALL {
        for dtype in DType::ALL {
            for m in M_BUCKETS {
                let shapes: &[(u32, u32)] = match (dtype.is_quantised(), m) {
                    (true, 1) => &[(1, 32), (160, 96), (224, 160)],
                    (true, 64) => &[(70, 96)],
                    (true, _) => &[(33, 32), (160, 160)],
                    (false, 1) => &[(1, 1), (161, 37), (224, 64)],
                    (false, 64) => &[(70, 19)],
                    (false, _) => &[(33, 5), (160, 40)],
                };
                for (n, k) in shapes {
                    let key = KernelKey { op, dtype, m, n: *n, k: *k };
                    kernels += check_space(&mut compiler, key, u64::from(n * 31 + k + m), &mut wrong);
                }
            }
        }
    }
    wrong.truncate(40);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(compiler.refusals().total(), 0, "refusals: {}", compiler.refusals());
    assert!(kernels > 1000, "only {kernels} kernels");
    println!("{kernels} kernels");
}
